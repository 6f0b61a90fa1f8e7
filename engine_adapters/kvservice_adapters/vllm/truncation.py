"""truncation: what an application says of a conversation that it cut, and what that makes of the request's blocks.

A request that begins with parts of a conversation says which, in its kv_transfer_params:

    "session_id": "conversation 7",
    "truncation": {"conversation": [token ids from the very first on], "keep": [[0, 64], [2048, 4100]],
                   "kept_before": [[0, 64], [1024, 4100]]}

The prompt is the kept ranges' tokens, then whatever is new. What is computed from blocks of the longer context is fit
for this session and this cut only. So the request gets a salt of its own, made of the application's, the session and
all that was dropped: vLLM's own prefix cache, and the store, then know its blocks under names that no other request
comes to, be its tokens the same. The names that the kept blocks had before the cut are computed from the conversation's
tokens: a text that is not what was computed then is a miss, never another's KV.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEPT_RANGES_MAX = 64
CONVERSATION_TOKENS_MAX = 1 << 20
_SALT_TAG = b"kvservice vllm truncation 1\n"
_TOKEN = "I"  # 32 bits, unsigned
_KNOWN = frozenset({"conversation", "keep", "kept_before"})

Ranges = tuple[tuple[int, int], ...]
NamesOf = Callable[[Any], Sequence[bytes]]
"""The store's names of a request's full blocks."""


class TruncationRefused(Exception):
    """The request is computed as any other one; the message says why, and `reason` is its short name."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class View:
    """A conversation as a request has, or had, it: the kept ranges, and everything behind the last one's start."""

    keep: Ranges

    @property
    def dropped(self) -> Ranges:
        """What is left out."""
        ends = (0, *(end for _, end in self.keep))
        starts = (start for start, _ in self.keep)
        return tuple((end, start) for end, start in zip(ends, starts, strict=False) if start > end)

    @property
    def _open(self) -> Ranges:
        return (*self.keep[:-1], (self.keep[-1][0], CONVERSATION_TOKENS_MAX))

    def tokens(self, conversation: Sequence[int]) -> list[int]:
        """What a request has of the conversation."""
        return _joined(conversation, self._open)

    def place_of(self, start: int, end: int) -> int | None:
        """Where these tokens of the conversation begin in `tokens`; None: not all of them, one after the other."""
        place = 0
        for kept_start, kept_end in self._open:
            if kept_start <= start and end <= kept_end:
                return place + start - kept_start
            place += kept_end - kept_start
        return None

    def salt(self, conversation: Sequence[int], *, session_id: str, cache_salt: str) -> str:
        """The cache_salt of requests with this view: the application's, or another where something is dropped."""
        if not self.dropped:
            return cache_salt
        digest = hashlib.sha256(_SALT_TAG)
        for text in (session_id, cache_salt, repr(self.dropped)):
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        digest.update(array(_TOKEN, conversation[: self.keep[-1][0]]).tobytes())
        return f"kvservice-truncated:{digest.hexdigest()}"


@dataclass(frozen=True, slots=True)
class FormerNames:
    """Where blocks of a truncated request may be found: a chain in the store, and what of it the request has.

    Attributes:
        kept: token ranges [start, end) of the chain, whole blocks.
        blocks: how many leading blocks of the request they are.
    """

    hashes: Sequence[bytes]
    kept: Ranges
    blocks: int


@dataclass(frozen=True, slots=True)
class Truncation:
    """What a request said, checked.

    Attributes:
        moved: token ranges of the conversation that stand in the prompt as whole blocks, from its beginning on.
        rounding: why that is not all that was kept; "": it is, but for a last part of a block.
    """

    session_id: str
    cache_salt: str
    conversation: Sequence[int]
    view: View
    before: View
    tokens_per_block: int
    moved: Ranges
    rounding: str

    @property
    def salt(self) -> str:
        """The request's cache_salt from now on."""
        return self.view.salt(self.conversation, session_id=self.session_id, cache_salt=self.cache_salt)

    @property
    def usable_blocks(self) -> int:
        """Leading blocks of the prompt that the store may have."""
        return sum(end - start for start, end in self.moved) // self.tokens_per_block

    def former_names(self, request: Any, names_of: NamesOf, *, blocks_max: int) -> list[FormerNames]:
        """Where to look for the kept blocks, the most likely first. Hashes the conversation: milliseconds.

        Args:
            blocks_max: how many of the request's leading blocks are wanted.
        """
        views = [self.before, View(((0, CONVERSATION_TOKENS_MAX),))] if self.before.dropped else [self.before]
        found = (self._names_in(view, request, names_of, blocks_max) for view in views)
        return [former for former in found if former.blocks]

    def _names_in(self, view: View, request: Any, names_of: NamesOf, blocks_max: int) -> FormerNames:
        size = self.tokens_per_block
        places: list[int] = []
        for first in [first for start, end in self.moved for first in range(start, end, size)][:blocks_max]:
            place = view.place_of(first, first + size)
            if place is None or place % size:
                break
            places.append(place)
        if not places:
            return FormerNames((), (), 0)
        tokens = view.tokens(self.conversation)[: places[-1] + size]
        salt = view.salt(self.conversation, session_id=self.session_id, cache_salt=self.cache_salt)
        hashes = names_of(twin_of(request, tokens, cache_salt=salt))
        return FormerNames(hashes, _ranges_of(places, size), len(places))


@dataclass(slots=True)
class TruncationOutcome:
    """What became of a request's truncation; told to the application with its answer.

    Attributes:
        reason: "ok", why it was refused, or why not every kept block was there.
        message: why it was refused, or rounded.
        usable_tokens: of the kept ones, those in whole blocks; what is new may be among them.
        held_tokens: of these, those that the store had.
        reused_tokens: of the prompt, those that were not computed.
    """

    reason: str
    message: str
    tokens_per_block: int
    usable_tokens: int = 0
    held_tokens: int = 0
    reused_tokens: int = 0

    def told(self) -> dict[str, Any]:
        """As kv_transfer_params of the answer."""
        return {name: getattr(self, name) for name in self.__slots__ if getattr(self, name) != ""}


def stated_truncation(
    request: Any, params: Mapping[str, Any], *, session_id: str, tokens_per_block: int, unsupported: str
) -> Truncation:
    """Check what a request's kv_transfer_params say in "truncation".

    Args:
        unsupported: why this engine's keys cannot be turned; "": they can.

    Raises:
        TruncationRefused: see there; `reason` is one of unsupported, bad_request, missing_session, missing_salt,
            nothing_dropped, tokens_differ.
    """
    if unsupported:
        raise TruncationRefused("unsupported", unsupported)
    stated = params["truncation"]
    if not isinstance(stated, Mapping) or not {"conversation", "keep"} <= set(stated) <= _KNOWN:
        raise TruncationRefused("bad_request", f"truncation is a mapping with {', '.join(sorted(_KNOWN))}")
    if not session_id:
        raise TruncationRefused("missing_session", "a truncation belongs to a session: name it with session_id")
    if not request.cache_salt:
        raise TruncationRefused(
            "missing_salt",
            "a truncated session needs a cache_salt of its own, from its first turn on: its KV is approximate, and no "
            "other request may take it for its own",
        )
    if request.prompt_token_ids is None or request.mm_features or request.sampling_params is None:
        raise TruncationRefused(
            "bad_request", "only prompts of tokens alone can be truncated: no images, no embeddings"
        )
    conversation = _conversation(stated["conversation"])
    view = View(_ranges("keep", stated["keep"], len(conversation)))
    if not view.dropped:
        raise TruncationRefused("nothing_dropped", f"keep {list(view.keep)} leaves nothing out")
    before = View(_ranges("kept_before", stated.get("kept_before", [[0, len(conversation)]]), len(conversation)))
    kept = _joined(conversation, view.keep)
    if list(request.prompt_token_ids[: len(kept)]) != kept:
        raise TruncationRefused(
            "tokens_differ", f"the prompt does not begin with the {len(kept)} tokens that keep names"
        )
    moved, rounding = _whole_blocks(view.keep, tokens_per_block)
    return Truncation(session_id, request.cache_salt, conversation, view, before, tokens_per_block, moved, rounding)


def twin_of(request: Any, tokens: Sequence[int], *, cache_salt: str) -> Any:
    """A request that differs in tokens and salt: it has the block hashes that the engine would give it."""
    return type(request)(
        request_id=request.request_id,
        prompt_token_ids=list(tokens),
        sampling_params=request.sampling_params,
        pooling_params=None,
        lora_request=request.lora_request,
        cache_salt=cache_salt,
        block_hasher=request._block_hasher,  # noqa: SLF001  # the engine's own: every other way could differ from it
    )


def resalt(request: Any, cache_salt: str) -> None:
    """Give a request that the engine has not looked at yet another salt, and the block hashes that go with it."""
    hashes = twin_of(request, request.all_token_ids, cache_salt=cache_salt).block_hashes
    request.cache_salt = cache_salt
    request.block_hashes[:] = hashes


def _conversation(stated: Any) -> Sequence[int]:
    if not isinstance(stated, list) or not 0 < len(stated) <= CONVERSATION_TOKENS_MAX:
        raise TruncationRefused("bad_request", f"conversation is a list of 1 to {CONVERSATION_TOKENS_MAX} token ids")
    try:
        return array(_TOKEN, stated)  # a loop over a million tokens would hold the scheduler up
    except (TypeError, OverflowError) as error:
        raise TruncationRefused("bad_request", f"conversation holds what is no token id: {error}") from error


def _joined(conversation: Sequence[int], ranges: Ranges) -> list[int]:
    tokens: list[int] = []
    for start, end in ranges:
        tokens += conversation[start:end]
    return tokens


def _ranges(name: str, stated: Any, length: int) -> Ranges:
    if not isinstance(stated, list) or not 0 < len(stated) <= KEPT_RANGES_MAX:
        raise TruncationRefused("bad_request", f"{name} is a list of 1 to {KEPT_RANGES_MAX} token ranges [start, end]")
    before = 0
    for one in stated:
        is_pair = isinstance(one, list | tuple) and len(one) == 2 and all(type(place) is int for place in one)
        if not is_pair or not before <= one[0] < one[1] <= length:
            raise TruncationRefused(
                "bad_request", f"{name}: {one} is no range [start, end] behind {before} inside {length} tokens"
            )
        before = one[1]
    return tuple((start, end) for start, end in stated)


def _whole_blocks(keep: Ranges, size: int) -> tuple[Ranges, str]:
    """The leading ranges whose tokens are whole blocks both in the conversation and in the prompt; why they end."""
    moved: list[tuple[int, int]] = []
    place = 0
    for start, end in keep:
        if start % size or place % size:
            where = f"token {start} of the conversation is token {place} of the prompt"
            return tuple(moved), f"{where}: both must be multiples of {size}, what follows is computed"
        moved.append((start, start + (end - start) // size * size))
        place += end - start
    return tuple(moved), ""


def _ranges_of(places: Sequence[int], size: int) -> Ranges:
    """Places of blocks, ascending, as token ranges."""
    ranges: list[tuple[int, int]] = []
    for place in places:
        if ranges and ranges[-1][1] == place:
            ranges[-1] = (ranges[-1][0], place + size)
        else:
            ranges.append((place, place + size))
    return tuple(ranges)
