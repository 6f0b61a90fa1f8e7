"""What a vLLM request says of its truncation: which blocks that makes, under which names, for whom."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvservice_adapters.vllm.truncation import Truncation, TruncationRefused, View, resalt, stated_truncation

pytestmark = pytest.mark.unit

SIZE = 4
CONVERSATION = list(range(100, 140))
Keep = list[list[int]]


class Request:
    """What the adapter needs of vLLM's: block hashes are chained over salt and tokens."""

    def __init__(
        self,
        *,
        request_id: str = "r",
        prompt_token_ids: list[int] | None = None,
        sampling_params: object = "greedy",
        pooling_params: None = None,
        lora_request: object = None,
        cache_salt: str = "",
        block_hasher: Callable[[Request], list[bytes]] | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.all_token_ids = list(prompt_token_ids or [])
        self.sampling_params = sampling_params
        self.pooling_params = pooling_params
        self.lora_request = lora_request
        self.mm_features: list[object] = []
        self.cache_salt = cache_salt
        self._block_hasher = block_hasher or hashed
        self.block_hashes = self._block_hasher(self)


def hashed(request: Request) -> list[bytes]:
    return chain(request.all_token_ids, request.cache_salt)


def chain(tokens: Sequence[int], salt: str) -> list[bytes]:
    hashes, parent = [], salt.encode()
    for start in range(0, len(tokens) - SIZE + 1, SIZE):
        parent = hashlib.sha256(parent + bytes(tokens[start : start + SIZE])).digest()
        hashes.append(parent)
    return hashes


def kept(keep: Keep, conversation: list[int]) -> list[int]:
    return [token for start, end in keep for token in conversation[start:end]]


def stated(keep: Keep, before: Keep | None = None, *, session_id: str = "s", **more: Any) -> tuple[Request, Truncation]:
    """A request of that cut, resalted, and what was understood."""
    conversation = more.pop("conversation", CONVERSATION)
    request = Request(prompt_token_ids=[*kept(keep, conversation), 1, 2, 3], cache_salt=more.pop("cache_salt", "salt"))
    said: dict[str, Any] = {"conversation": conversation, "keep": keep}
    if before is not None:
        said["kept_before"] = before
    truncation = stated_truncation(
        request, {"truncation": said}, session_id=session_id, tokens_per_block=SIZE, unsupported=""
    )
    resalt(request, truncation.salt)
    return request, truncation


def names_of(request: Request) -> list[bytes]:
    return request.block_hashes


def test_kept_blocks_are_looked_for_under_the_names_of_the_whole_conversation() -> None:
    request, truncation = stated([[0, 4], [20, 38]])
    assert (truncation.usable_blocks, truncation.rounding) == (5, "")
    (former,) = truncation.former_names(request, names_of, blocks_max=100)
    assert former.hashes == chain(CONVERSATION[:36], "salt")
    assert (former.kept, former.blocks) == (((0, 4), (20, 36)), 5)
    (fewer,) = truncation.former_names(request, names_of, blocks_max=2)
    assert (fewer.kept, fewer.blocks, len(fewer.hashes)) == (((0, 4), (20, 24)), 2, 6)


def test_a_second_cut_looks_first_where_the_first_one_left_them() -> None:
    first, _ = stated([[0, 4], [12, 38]])
    request, truncation = stated([[0, 4], [20, 40]], [[0, 4], [12, 38]])
    former, whole = truncation.former_names(request, names_of, blocks_max=100)
    assert former.hashes == chain([*CONVERSATION[:4], *CONVERSATION[12:40]], first.cache_salt)
    assert (former.kept, former.blocks) == (((0, 4), (12, 32)), 6)
    assert (whole.kept, whole.hashes) == (((0, 4), (20, 40)), chain(CONVERSATION, "salt"))


def test_the_names_are_those_of_the_session_and_of_what_was_dropped() -> None:
    keep = [[0, 4], [20, 38]]
    other_past = [*CONVERSATION[:8], 99, *CONVERSATION[9:]]
    longer = [*CONVERSATION, 7, 8]
    names = [
        request.block_hashes[0]
        for request, _ in (
            stated(keep),
            stated(keep, session_id="t"),
            stated(keep, cache_salt="tlas"),
            stated(keep, conversation=other_past),
            stated([[0, 4], [16, 20], [24, 38]]),
            stated([[20, 38]]),
        )
    ]
    assert len({*names, chain(CONVERSATION, "salt")[0], chain(CONVERSATION, "")[0]}) == 8
    # And of nothing else: a later turn finds them.
    later, _ = stated([[0, 4], [20, 42]], [[0, 4], [20, 38]], conversation=longer)
    assert later.block_hashes[0] == names[0]


@pytest.mark.parametrize(
    ("keep", "moved", "why"),
    [
        ([[0, 4], [20, 39]], ((0, 4), (20, 36)), ""),
        ([[0, 6], [20, 40]], ((0, 4),), "token 20 of the conversation is token 6 of the prompt"),
        ([[0, 4], [21, 40]], ((0, 4),), "token 21 of the conversation is token 4 of the prompt"),
        ([[3, 40]], (), "token 3 of the conversation is token 0 of the prompt"),
        ([[0, 4], [8, 12], [17, 40]], ((0, 4), (8, 12)), "token 17"),
    ],
)
def test_cuts_between_blocks_are_rounded_to_what_is_whole_in_both(
    keep: Keep, moved: tuple[tuple[int, int], ...], why: str
) -> None:
    _, truncation = stated(keep)
    assert truncation.moved == moved
    assert why in truncation.rounding
    assert bool(why) is bool(truncation.rounding)


@st.composite
def cuts(draw: st.DrawFn) -> Keep:
    places = sorted(draw(st.sets(st.integers(0, len(CONVERSATION)), min_size=2, max_size=8)))
    places = places[: len(places) // 2 * 2]
    return [list(pair) for pair in zip(places[::2], places[1::2], strict=True)]


@given(keep=cuts(), before=cuts())
@settings(max_examples=300, deadline=None)
def test_every_name_that_is_looked_for_is_of_the_tokens_that_stand_there(keep: Keep, before: Keep) -> None:
    if not View(tuple((start, end) for start, end in keep)).dropped:
        return
    request, truncation = stated(keep, before)
    prompt = request.prompt_token_ids
    assert prompt is not None
    for former in truncation.former_names(request, names_of, blocks_max=len(request.block_hashes)):
        view = truncation.before if former.hashes != chain(CONVERSATION[: len(former.hashes) * SIZE], "salt") else None
        tokens = CONVERSATION if view is None else view.tokens(CONVERSATION)
        places = [place for start, end in former.kept for place in range(start, end, SIZE)]
        assert len(places) == former.blocks <= truncation.usable_blocks
        assert all(place % SIZE == 0 for place in places)
        assert places[-1] + SIZE == len(former.hashes) * SIZE
        found = [token for place in places for token in tokens[place : place + SIZE]]
        assert found == prompt[: len(found)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cache_salt": ""}, "missing_salt"),
        ({"mm_features": ["an image"]}, "bad_request"),
        ({"prompt_token_ids": None}, "bad_request"),
        ({"sampling_params": None}, "bad_request"),
        ({"prompt_token_ids": [*CONVERSATION[:4], 0, *CONVERSATION[21:]]}, "tokens_differ"),
    ],
)
def test_a_request_that_cannot_be_truncated_is_refused(change: dict[str, Any], reason: str) -> None:
    keep = [[0, 4], [20, 40]]
    request = Request(prompt_token_ids=kept(keep, CONVERSATION), cache_salt="salt")
    params = {"truncation": {"conversation": CONVERSATION, "keep": keep}}
    stated_truncation(request, params, session_id="s", tokens_per_block=SIZE, unsupported="")
    for name, value in change.items():
        setattr(request, name, value)
    with pytest.raises(TruncationRefused) as refused:
        stated_truncation(request, params, session_id="s", tokens_per_block=SIZE, unsupported="")
    assert refused.value.reason == reason


def test_an_engine_that_cannot_turn_keys_says_so_before_anything_else() -> None:
    with pytest.raises(TruncationRefused, match="M-RoPE") as refused:
        stated_truncation(Request(), {"truncation": 7}, session_id="", tokens_per_block=SIZE, unsupported="M-RoPE")
    assert refused.value.reason == "unsupported"
