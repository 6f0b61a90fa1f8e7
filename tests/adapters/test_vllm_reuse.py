"""The vLLM adapter on a real vLLM: what was computed once is loaded, and the tokens are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adapters.vllm_engine import TOKENS_PER_BLOCK, VllmEngine
from tests.adapters.vllm_scenes import (
    ANSWER_TOKENS,
    HELD_TOKENS,
    PROMPT_TOKENS,
    TAIL_TOKENS,
    answer,
    computed_before,
    prompt,
    two_tiers,
    wait_attached,
)
from tests.daemons import DaemonProcess

pytestmark = [pytest.mark.engines, pytest.mark.timeout(180)]

TURNS = 10


def cold(vllm: VllmEngine, model_dir: Path, ids: list[int], **engine: object) -> list[int]:
    """The tokens that an engine without the adapter computes."""
    vllm.open(model_dir, **engine)
    (outcome,) = vllm.generate(ids)
    vllm.do("close")
    tokens: list[int] = outcome["tokens"]
    return tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_restarted_engine_loads_every_full_block_and_computes_the_tail(
    vllm: VllmEngine, model_dir: Path, daemon: DaemonProcess, dtype: str
) -> None:
    ids = prompt()
    expected = cold(vllm, model_dir, ids, dtype=dtype)
    vllm.open_attached(model_dir, daemon, dtype=dtype)
    first = answer(vllm, ids)
    assert (first["tokens"], first["computed"]) == (expected, PROMPT_TOKENS)
    vllm.do("close")
    vllm.open_attached(model_dir, daemon, dtype=dtype)
    again = answer(vllm, ids)
    assert (again["tokens"], again["computed"], again["cached"]) == (expected, TAIL_TOKENS, HELD_TOKENS)


def test_the_loaded_bytes_are_what_the_answer_is_made_of(served: VllmEngine) -> None:
    ids = prompt(10)
    expected = computed_before(served, ids)
    served.do("zero_loads")
    spoilt = answer(served, ids)
    assert spoilt["computed"] == TAIL_TOKENS
    assert spoilt["tokens"] != expected, (
        "zeros in place of keys and values make no difference: nothing here proves reuse"
    )


def test_the_whole_prompt_held_leaves_one_token_to_compute(served: VllmEngine) -> None:
    ids = prompt(11, tokens=HELD_TOKENS)
    expected = computed_before(served, ids)
    again = answer(served, ids)
    assert (again["tokens"], again["computed"]) == (expected, 1)


def test_requests_of_another_salt_share_nothing(served: VllmEngine) -> None:
    ids = prompt(12)
    computed_before(served, ids, cache_salt="mine")
    computed = [answer(served, ids, cache_salt=salt)["computed"] for salt in ("yours", "", "mine")]
    assert computed == [PROMPT_TOKENS, PROMPT_TOKENS, TAIL_TOKENS]


def test_two_engines_in_two_processes_share_what_either_computed(
    vllm: VllmEngine, model_dir: Path, daemon: DaemonProcess
) -> None:
    ids, other = prompt(1), prompt(2)
    with VllmEngine() as second:
        vllm.open_attached(model_dir, daemon)
        second.open_attached(model_dir, daemon)
        expected = answer(vllm, ids)
        found = answer(second, ids)
        assert (found["tokens"], found["computed"]) == (expected["tokens"], TAIL_TOKENS)
        theirs = answer(second, other)
        back = answer(vllm, other)
        assert (back["tokens"], back["computed"]) == (theirs["tokens"], TAIL_TOKENS)
        second.do("close")


def test_ten_turns_across_restarts_of_engine_and_daemon_compute_only_what_is_new(
    vllm: VllmEngine, model_dir: Path, tmp_path: Path
) -> None:
    with DaemonProcess(tmp_path / "s", **two_tiers(tmp_path / "nvme")) as daemon:
        vllm.open_attached(model_dir, daemon)
        history = prompt(3)
        held_tokens = 0
        for turn in range(TURNS):
            if turn in {3, 7}:
                vllm.do("close")
                vllm.open_attached(model_dir, daemon)
            if turn in {5, 7}:
                # Everything is on NVMe once it has drained, and nothing in DRAM when it is back.
                assert daemon.stop() == 0
                daemon.restart()
                daemon.wait_event("recovered")
                wait_attached(vllm)
                # Not from the engine's own cache, which outlives the daemon.
                vllm.do("close")
                vllm.open_attached(model_dir, daemon)
            outcome = answer(vllm, history)
            assert outcome["computed"] == len(history) - held_tokens, f"turn {turn}"
            # The answer's last token was never computed.
            held_tokens = (len(history) + ANSWER_TOKENS - 1) // TOKENS_PER_BLOCK * TOKENS_PER_BLOCK
            history += outcome["tokens"] + prompt(100 + turn, tokens=37)
        assert not [name for name in vllm.do("counts") if name.startswith(("unloaded_blocks", "hook_errors"))]
        vllm.do("close")
        assert outcome["tokens"] == cold(vllm, model_dir, history[: -37 - ANSWER_TOKENS])
        assert daemon.stop() == 0


@pytest.mark.parametrize(
    "engine",
    [{"enable_prefix_caching": False}, {"max_num_batched_tokens": 64, "enable_chunked_prefill": True}],
    ids=["without prefix caching", "chunked prefill"],
)
def test_other_ways_to_run_the_engine(
    vllm: VllmEngine, model_dir: Path, daemon: DaemonProcess, engine: dict[str, object]
) -> None:
    ids = prompt()
    expected = cold(vllm, model_dir, ids, **engine)
    vllm.open_attached(model_dir, daemon, **engine)
    assert answer(vllm, ids)["tokens"] == expected
    vllm.do("drop_cache")
    again = answer(vllm, ids)
    assert (again["tokens"], again["computed"]) == (expected, TAIL_TOKENS)
    assert vllm.do("counts")["loaded_blocks"] == HELD_TOKENS // TOKENS_PER_BLOCK


def test_an_engine_that_differs_in_model_dtype_or_block_size_gets_misses(
    vllm: VllmEngine, model_dir: Path, other_model_dir: Path, daemon: DaemonProcess
) -> None:
    ids = prompt()
    vllm.open_attached(model_dir, daemon)
    answer(vllm, ids)
    names = [vllm.do("namespace")["fingerprint"]]
    vllm.do("close")
    for model, engine in (
        (other_model_dir, {}),
        (model_dir, {"dtype": "bfloat16"}),
        (model_dir, {"block_size": 2 * TOKENS_PER_BLOCK}),
        (model_dir, {"options": {"salt": "another tenant's"}}),
    ):
        vllm.open_attached(model, daemon, **engine)
        assert answer(vllm, ids)["computed"] == PROMPT_TOKENS
        names.append(vllm.do("namespace")["fingerprint"])
        vllm.do("close")
    assert len(set(names)) == len(names)
    vllm.open_attached(model_dir, daemon)
    assert answer(vllm, ids)["computed"] == TAIL_TOKENS
