"""The vLLM adapter's loads and saves on a GPU, on tensors in the layouts of vLLM's GPU backends; without vLLM."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import DaemonProcess
from tests.engines import EngineProcess
from tests.waiting import eventually

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

DIRECT, BUFFERED = "the engine's own blocks, cuda-ipc", "a buffer of "
# A piece has 256 KiB from 64 tokens on: 8 heads, 2 x 128 dimensions, bfloat16.
SMALL: list[dict[str, Any]] = [
    {"layout": "hnd"},
    {"layout": "nhd"},
    {"layout": "heads first"},
    {"layout": "small kernel blocks", "tokens": 32},
    {"layout": "nhd", "dtype": "float16", "form": "INTERLEAVED", "rotary_dims": 64},
    {"layout": "hnd", "dtype": "float32", "heads": 1, "rotary_dims": 32},
    {"layout": "hnd", "dim": 80, "rotary_dims": 80, "tokens": 8, "heads": 5},
]
LARGE: list[dict[str, Any]] = [
    {"layout": "across layers"},
    {"layout": "hnd", "tokens": 64},
    {"layout": "nhd", "tokens": 64, "form": "INTERLEAVED"},
    {"layout": "small kernel blocks", "tokens": 128},
]
BOTH: list[dict[str, Any]] = [SMALL[1], LARGE[0]]

MakeVllmEngine = Callable[..., EngineProcess]


def named(how: dict[str, Any]) -> str:
    return " ".join(map(str, how.values()))


@pytest.fixture
def make_engine(stack: ExitStack, daemon: DaemonProcess) -> MakeVllmEngine:
    """Call it with what `attach` takes for an attached engine; its `way` says how the blocks travel."""

    def make(**how: Any) -> EngineProcess:
        engine = stack.enter_context(EngineProcess(program=Path(__file__).parent / "vllm_engine.py"))
        way = engine.do("attach", socket_dir=daemon.socket_dir, **how)
        is_large = how in LARGE or how["layout"] == "across layers"
        assert way.startswith(DIRECT if is_large else BUFFERED), way
        return engine

    return make


def save(engine: EngineProcess, chain_name: str, block_ids: list[int], **how: Any) -> None:
    engine.do("save", chain_name=chain_name, block_ids=block_ids, **how)
    blocks = how.get("first", 0) + len(block_ids)
    eventually(lambda: engine.do("held", chain_name=chain_name, blocks=blocks) == blocks)


@pytest.mark.parametrize("how", [*SMALL, *LARGE, {"layout": "halves"}], ids=named)
def test_the_end_of_a_chain_comes_back_bit_by_bit_to_other_blocks_and_engines(
    make_engine: MakeVllmEngine, daemon: DaemonProcess, how: dict[str, Any]
) -> None:
    engine, other = make_engine(**how), make_engine(**how)
    for each in (engine, other):
        each.do("fill", seed=1)
    save(engine, "a", [3, 4, 5, 11, 0, 7])
    for reader in (engine, other):
        reader.do("poison")
        assert reader.do("load", chain_name="a", first=2, block_ids=[20, 31, 2, 9, 13]) == [13]
        assert reader.do("differing", block_ids=[20, 31, 2, 9], kept_ids=[5, 11, 0, 7]) == []
        assert reader.do("untouched", but=[20, 31, 2, 9])
    assert not daemon.errors


@pytest.mark.parametrize("how", [*SMALL, *LARGE], ids=named)
def test_keys_of_blocks_that_moved_are_what_the_engine_would_have_computed(
    make_engine: MakeVllmEngine, how: dict[str, Any]
) -> None:
    engine = make_engine(**how)
    tokens = how.get("tokens", 16)
    engine.do("fill", seed=2)
    save(engine, "a", [3, 4, 5, 11, 0, 7], session_id="s")
    cut = {"session_id": "s", "chain_name": "a", "blocks": 6, "new_name": "cut"}
    assert engine.do("truncate", drop=2, **cut) == 4
    engine.do("poison")
    how_to_load = {"session_id": "s", "is_truncated": True}
    assert engine.do("load", chain_name="cut", first=1, block_ids=[20, 31, 2], **how_to_load) == []
    moved = {"first": 1, "shift_tokens": -2 * tokens}
    assert engine.do("differing", block_ids=[20, 31, 2], kept_ids=[11, 0, 7], **moved) == []
    assert engine.do("differing", block_ids=[20], kept_ids=[11]) == [20], "they did not turn"
    assert engine.do("counts")["shifted_blocks"] == 3
    # In one load with blocks that stand where they stood.
    assert engine.do("load", chain_name="a", first=0, block_ids=[10, 12], **how_to_load) == []
    assert engine.do("differing", block_ids=[10, 12], kept_ids=[3, 4]) == []


@pytest.mark.parametrize("how", BOTH, ids=named)
def test_blocks_that_are_overwritten_after_the_step_are_saved_as_they_were_or_not_at_all(
    make_engine: MakeVllmEngine, how: dict[str, Any]
) -> None:
    engine = make_engine(**how)
    engine.do("fill", seed=3)
    blocks = list(range(32))
    engine.do("save", chain_name="a", block_ids=blocks)
    if how in SMALL:
        assert engine.do("are_free", chain_name="a"), "they are in the buffer, as far as the stream is concerned"
    else:
        eventually(lambda: engine.do("are_free", chain_name="a"))
    engine.do("poison")
    eventually(lambda: engine.do("held", chain_name="a", blocks=32) == 32)
    assert engine.do("load", chain_name="a", first=0, block_ids=blocks) == []
    assert engine.do("differing", block_ids=blocks, kept_ids=blocks) == []


@pytest.mark.parametrize("how", BOTH, ids=named)
def test_a_step_s_saves_of_many_requests_and_their_later_blocks_are_all_stored(
    make_engine: MakeVllmEngine, how: dict[str, Any]
) -> None:
    engine = make_engine(**how)
    engine.do("fill", seed=4)
    engine.do("save_many", chains={"a": [0, 1], "b": [2], "c": [3, 4, 5]})
    engine.do("save", chain_name="a", block_ids=[6], first=2)
    for name, block_ids in (("a", [0, 1, 6]), ("b", [2]), ("c", [3, 4, 5])):
        blocks = len(block_ids)
        eventually(lambda name=name, blocks=blocks: engine.do("held", chain_name=name, blocks=blocks) == blocks)  # type: ignore[misc]
        into = list(range(20, 20 + blocks))
        assert engine.do("load", chain_name=name, first=0, block_ids=into) == []
        assert engine.do("differing", block_ids=into, kept_ids=block_ids) == []


def test_a_daemon_that_stops_costs_a_load_by_way_of_the_buffer_and_holds_no_block(
    make_engine: MakeVllmEngine, daemon: DaemonProcess
) -> None:
    engine = make_engine(layout="nhd", load_timeout_s=0.5)
    engine.do("fill", seed=5)
    save(engine, "a", [0, 1, 2, 3])
    daemon.pause()
    try:
        assert engine.do("load", chain_name="a", first=0, block_ids=[20, 21, 22, 23]) == [20, 21, 22, 23]
        engine.do("poison")
    finally:
        daemon.resume()
    eventually(lambda: engine.do("load", chain_name="a", first=0, block_ids=[10, 11, 12, 13]) == [])
    assert engine.do("differing", block_ids=[10, 11, 12, 13], kept_ids=[0, 1, 2, 3]) == []
    assert engine.do("untouched", but=[10, 11, 12, 13]), "the late copy went into blocks that were the engine's again"


def test_a_daemon_that_stops_keeps_the_engine_s_own_blocks_until_it_goes_on_or_ends(
    make_engine: MakeVllmEngine, daemon: DaemonProcess
) -> None:
    engine = make_engine(layout="across layers", load_timeout_s=0.5)
    engine.do("fill", seed=6)
    save(engine, "a", [0, 1, 2, 3])
    daemon.pause()
    try:
        engine.do("start_load", chain_name="a", first=0, block_ids=[20, 21, 22, 23])
        eventually(lambda: engine.do("unquiet") == 1)
        assert not engine.do("is_over", chain_name="a")
    finally:
        daemon.resume()
    eventually(lambda: engine.do("is_over", chain_name="a"))
    assert engine.do("failed_blocks") == [20, 21, 22, 23]
