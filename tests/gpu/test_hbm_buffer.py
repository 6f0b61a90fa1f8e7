"""The buffer on a GPU: bit-exact between scattered caches of small pieces, and what a killed daemon does to it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.daemons import DaemonProcess
from tests.engines import EngineProcess
from tests.gpu.conftest import MakeGpuEngine
from tests.waiting import eventually

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

BLOCKS = 96
SOURCES = random.Random(1).sample(range(BLOCKS), 40)
DESTINATIONS = random.Random(2).sample(range(BLOCKS), 40)


def attached(make_engine: MakeGpuEngine, daemon: DaemonProcess, **how: Any) -> EngineProcess:
    engine = make_engine("buffer_engine.py")
    usual = {"layers": 32, "blocks": BLOCKS, "tokens": 16, "heads": 8, "buffer_blocks": 64, "dtype": "bfloat16"}
    assert engine.do("attach", socket_dir=daemon.socket_dir, **(usual | how)) == "cuda-ipc"
    return engine


@pytest.mark.parametrize(
    ("layers", "tokens", "heads", "dtype"),
    [
        (32, 16, 4, "bfloat16"),  # pieces of 16 KiB
        (32, 16, 8, "bfloat16"),  # of 32 KiB
        (16, 32, 8, "float16"),  # of 64 KiB
        (4, 16, 8, "float32"),
    ],
)
@pytest.mark.parametrize("buffer_blocks", [64, 7])
def test_blocks_come_back_bit_by_bit_also_where_the_buffer_is_smaller_than_the_load(
    daemon: DaemonProcess,
    make_engine: MakeGpuEngine,
    layers: int,
    tokens: int,
    heads: int,
    dtype: str,
    buffer_blocks: int,
) -> None:
    how: dict[str, Any] = {"layers": layers, "tokens": tokens, "heads": heads, "dtype": dtype}
    engine = attached(make_engine, daemon, buffer_blocks=buffer_blocks, **how)
    other = attached(make_engine, daemon, buffer_blocks=buffer_blocks, **how)
    engine.do("fill", seed=1)
    saved = engine.do("digest", block_ids=SOURCES)
    assert engine.do("save", chain_name="a", block_ids=SOURCES) == 40
    untouched = [block_id for block_id in range(BLOCKS) if block_id not in DESTINATIONS]
    for reader in (engine, other):
        reader.do("poison")
        poisoned = reader.do("digest", block_ids=[0])
        loaded = reader.do("load", chain_name="a", block_ids=DESTINATIONS)
        assert loaded == {"blocks": 40, "reason": "ok", "waited_right": True, "failed": False}
        assert reader.do("digest", block_ids=DESTINATIONS) == saved
        assert set(reader.do("digest", block_ids=untouched)) <= set(poisoned)
        reader.do("poison")
        assert reader.do("load_in_thread", chain_name="a", block_ids=DESTINATIONS) == 40
        assert reader.do("digest", block_ids=DESTINATIONS) == saved
        eventually(lambda reader=reader: reader.do("free_blocks") == buffer_blocks)  # type: ignore[misc]  # bound now
    assert not daemon.errors


@pytest.mark.parametrize("buffer_blocks", [64, 2])
def test_keys_that_moved_are_bit_for_bit_those_that_torch_turns(
    daemon: DaemonProcess, make_engine: MakeGpuEngine, buffer_blocks: int
) -> None:
    engine = attached(make_engine, daemon, buffer_blocks=buffer_blocks)
    engine.do("fill", seed=2)
    turned = engine.do("turned_right", block_ids=SOURCES[:8], kept=[0, 5, 6, 7], places=DESTINATIONS[:4])
    shift = -4 * 16
    assert turned == {"saved": 8, "held": 4, "blocks": 4, "shifts": [0, shift, shift, shift], "right": True}


def test_a_daemon_killed_in_the_middle_of_a_load_holds_up_no_stream_and_its_load_counts_for_nothing(
    daemon: DaemonProcess, make_engine: MakeGpuEngine
) -> None:
    engine = attached(make_engine, daemon, blocks=512, buffer_blocks=512)
    everything = list(range(512))
    for seed in range(3):
        engine.do("fill", seed=seed)
        saved = engine.do("digest", block_ids=everything[:8])
        assert engine.do("save", chain_name="a", block_ids=everything) == 512
        started = engine.do("start_load", chain_name="a", block_ids=everything, deadline_s=5.0)
        daemon.kill()
        assert started == 512
        waited = engine.do("wait_on_gpu")
        assert waited["seconds"] < 6.0
        # Killed too late, it has copied everything.
        assert waited["blocks"] == (0 if waited["failed"] else 512)
        if waited["blocks"]:
            assert engine.do("digest", block_ids=everything[:8]) == saved
        eventually(lambda: engine.do("free_blocks") == 512)
        daemon.restart()
        eventually(lambda: engine.do("plane") == "cuda-ipc")
        engine.do("fill", seed=seed)
        assert engine.do("save", chain_name="b", block_ids=everything[:200]) == 200
        engine.do("poison")
        assert engine.do("load", chain_name="b", block_ids=everything[:200])["blocks"] == 200
        assert engine.do("digest", block_ids=everything[:8]) == saved


def test_a_stopped_daemon_fails_a_load_and_keeps_its_run_until_it_goes_on(
    daemon: DaemonProcess, make_engine: MakeGpuEngine
) -> None:
    engine = attached(make_engine, daemon)
    engine.do("fill", seed=4)
    saved = engine.do("digest", block_ids=SOURCES)
    assert engine.do("save", chain_name="a", block_ids=SOURCES) == 40
    daemon.pause()
    try:
        assert engine.do("start_load", chain_name="a", block_ids=DESTINATIONS, deadline_s=0.5) == 0
        assert engine.do("wait_on_gpu")["seconds"] < 5.0
        assert engine.do("free_blocks") == 64 - 40, "a stopped daemon may go on and write"
    finally:
        daemon.resume()
    eventually(lambda: engine.do("free_blocks") == 64)
    assert engine.do("load", chain_name="a", block_ids=DESTINATIONS)["blocks"] == 40
    assert engine.do("digest", block_ids=DESTINATIONS) == saved
    engine.do("close")
