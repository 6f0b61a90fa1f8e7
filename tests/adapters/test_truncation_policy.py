"""The rule by which conversations are cut: whole blocks, inside the window, under names that nobody else has."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice_adapters.truncation import PromptTooLong, TruncationPolicy

pytestmark = pytest.mark.engines

FINGERPRINT = hashlib.sha256(b"model").digest()
POLICY = TruncationPolicy(window_tokens=256)
TOKENS = tuple(range(1, 1001))


def fit(policy: TruncationPolicy, length: int, new: int = 16, session: str = "talk") -> Any:
    return policy.fit(TOKENS[:length], session_id=session, max_new_tokens=new)


def test_what_fits_is_not_cut() -> None:
    assert fit(POLICY, 240).tokens == TOKENS[:240]
    assert fit(POLICY, 240, session="").dropped_tokens == 0


def test_each_overflow_drops_another_step() -> None:
    assert [fit(POLICY, length).dropped_tokens for length in (241, 368, 369, 496, 497)] == [128, 128, 256, 256, 384]
    assert fit(POLICY, 300).tokens == TOKENS[128:300]
    sinks = TruncationPolicy(window_tokens=256, sink_tokens=4, drop_ratio=0.3)
    assert (sinks.sinks, sinks.step) == (16, 80)
    assert fit(sinks, 300).tokens == (*TOKENS[:16], *TOKENS[96:300])


@given(
    window=st.integers(64, 400),
    ratio=st.floats(0.05, 0.9),
    sinks=st.integers(0, 40),
    length=st.integers(1, 1000),
    new=st.integers(1, 40),
)
def test_a_prompt_fits_ends_alike_and_keeps_whole_blocks(
    window: int, ratio: float, sinks: int, length: int, new: int
) -> None:
    try:
        policy = TruncationPolicy(window, drop_ratio=ratio, sink_tokens=sinks)
        fitted = fit(policy, length, new)
    except (PromptTooLong, ValueError):
        return
    tokens = fitted.tokens
    assert len(tokens) + new <= window
    assert tokens[-1] == TOKENS[length - 1]
    assert tokens[: policy.sinks] == TOKENS[: min(policy.sinks, len(tokens))]
    assert fitted.dropped_tokens % 16 == 0
    # Blocks of the former view are found where the present one has the same tokens.
    chain = fitted.chain(FINGERPRINT, 16)
    assert chain.tokens == list(tokens)
    for view in fitted.former_views(FINGERPRINT, 16, len(chain.hashes)):
        kept = [place for start, end in view.kept for place in range(start, end)]
        assert len(kept) == 16 * view.blocks
        assert all(start % 16 == end % 16 == 0 for start, end in view.kept)
        assert view.kept[-1][1] == 16 * len(view.hashes) <= window


def test_the_names_of_a_view_are_the_sessions_and_of_what_was_dropped() -> None:
    mine = fit(POLICY, 300).chain(FINGERPRINT, 16).hashes
    assert mine == fit(POLICY, 300).chain(FINGERPRINT, 16).hashes
    assert set(mine).isdisjoint(fit(POLICY, 300, session="other").chain(FINGERPRINT, 16).hashes)
    forked = POLICY.fit((0, *TOKENS[1:300]), session_id="talk", max_new_tokens=16)
    assert forked.tokens == fit(POLICY, 300).tokens
    assert set(mine).isdisjoint(forked.chain(FINGERPRINT, 16).hashes), "another beginning was dropped"
    plain = POLICY.fit(fit(POLICY, 300).tokens, session_id="talk", max_new_tokens=16)
    assert set(mine).isdisjoint(plain.chain(FINGERPRINT, 16).hashes), "the same tokens for another reason"


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="must name its session"):
        fit(POLICY, 300, session="")
    with pytest.raises(PromptTooLong, match="do not fit into a window of 256"):
        fit(POLICY, 100, new=300)
    with pytest.raises(ValueError, match="not between 0 and 1"):
        TruncationPolicy(256, drop_ratio=1.0)
    with pytest.raises(ValueError, match="no room"):
        TruncationPolicy(64, sink_tokens=32)


@pytest.mark.parametrize("sink_tokens", [0, 20])
def test_a_request_to_vllm_says_what_is_kept_and_was_kept_before(sink_tokens: int) -> None:
    policy = TruncationPolicy(window_tokens=128, sink_tokens=sink_tokens)
    sinks = [[0, policy.sinks]] if sink_tokens else []
    conversation = list(range(300))
    for number in (1, 2, 3):
        tokens = conversation[: 100 + number * policy.step]
        fitted = policy.fit(tokens, session_id="s", max_new_tokens=10)
        assert fitted.number == number
        stated = fitted.stated()
        assert stated["conversation"] == tokens
        assert [token for start, end in stated["keep"] for token in tokens[start:end]] == list(fitted.tokens)
        before = [*sinks, [policy.sinks + (number - 1) * policy.step, len(tokens)]]
        assert stated["kept_before"] == (before if number > 1 else [[0, len(tokens)]])
