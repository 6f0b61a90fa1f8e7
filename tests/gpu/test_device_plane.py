"""The device plane on a GPU: bit-exact both ways, in every layout, and what happens when somebody is killed."""

from __future__ import annotations

import pytest

from tests.daemons import DaemonProcess
from tests.engines import EngineProcess
from tests.gpu.conftest import MakeGpuEngine
from tests.waiting import eventually

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

SOURCES = [3, 4, 5, 11, 0, 7]
DESTINATIONS = [20, 21, 2, 9, 30, 31]


def attach(engine: EngineProcess, daemon: DaemonProcess, **how: object) -> dict[str, object]:
    attached: dict[str, object] = engine.do(
        "attach", socket_dir=daemon.socket_dir, **({"layout": "split", "layers": 8, "blocks": 32} | how)
    )
    return attached


@pytest.mark.parametrize(
    ("layout", "layers", "tokens", "dtype"),
    [
        ("split", 32, 16, "bfloat16"),
        ("split", 80, 16, "float16"),
        ("layered", 32, 16, "bfloat16"),
        ("layered", 1, 256, "float16"),
        ("layered", 28, 64, "float8_e4m3fn"),
        ("contiguous", 32, 16, "bfloat16"),
        ("contiguous", 80, 32, "float8_e4m3fn"),
    ],
)
def test_random_blocks_come_back_bit_by_bit(
    daemon: DaemonProcess, make_engine: MakeGpuEngine, layout: str, layers: int, tokens: int, dtype: str
) -> None:
    engine, other = make_engine(), make_engine()
    how = {"layout": layout, "layers": layers, "tokens": tokens, "dtype": dtype}
    assert attach(engine, daemon, **how)["plane"] == "cuda-ipc"
    attach(other, daemon, **how)
    engine.do("fill", seed=1)
    saved = engine.do("digest", block_ids=SOURCES)
    assert engine.do("save", chain_name="a", block_ids=SOURCES) == {"saved": 6, "held": 0, "reason": "ok"}
    for reader in (engine, other):
        reader.do("poison")
        poisoned = reader.do("digest", block_ids=[1])
        loaded = reader.do("load", chain_name="a", block_ids=DESTINATIONS)
        assert loaded == {"blocks": 6, "reason": "ok", "waited_right": True, "quiet": True}
        assert reader.do("digest", block_ids=DESTINATIONS) == saved
        untouched = [block_id for block_id in range(32) if block_id not in DESTINATIONS]
        assert set(reader.do("digest", block_ids=untouched)) == set(poisoned)
    assert not daemon.errors


@pytest.mark.parametrize("layout", ["split", "contiguous"])
def test_an_engine_killed_with_copies_under_way_leaves_nothing_behind(
    daemon: DaemonProcess, make_engine: MakeGpuEngine, layout: str
) -> None:
    survivor, victim = make_engine(), make_engine()
    attach(survivor, daemon, layout=layout, layers=32, blocks=256)
    attach(victim, daemon, layout=layout, layers=32, blocks=256)
    survivor.do("fill", seed=2)
    everything = list(range(256))
    saved = survivor.do("digest", block_ids=everything[:8])
    assert survivor.do("save", chain_name="a", block_ids=everything)["saved"] == 256
    free_before = survivor.do("free_gpu_bytes")
    victim.start("loads_for_ever", chain_name="a", blocks=256)
    assert victim.answer() == "started"
    # Some loads, so that the kill falls into one.
    eventually(lambda: _copied_bytes(daemon) > 1 << 30)
    victim.kill()
    # Its memory is the GPU's again: the daemon let go of its handles.
    eventually(lambda: survivor.do("free_gpu_bytes") > free_before + (256 << 21) - (64 << 20))
    survivor.do("poison")
    assert survivor.do("load", chain_name="a", block_ids=everything)["blocks"] == 256
    assert survivor.do("digest", block_ids=everything[:8]) == saved
    assert not daemon.errors


def test_a_stopped_daemon_holds_up_no_stream_and_a_killed_one_is_replaced(
    daemon: DaemonProcess, make_engine: MakeGpuEngine
) -> None:
    engine = make_engine()
    attach(engine, daemon, layers=32, blocks=64)
    engine.do("fill", seed=3)
    blocks = list(range(64))
    saved = engine.do("digest", block_ids=blocks[:4])
    assert engine.do("save", chain_name="a", block_ids=blocks)["saved"] == 64
    daemon.pause()
    try:
        assert engine.do("start_load", chain_name="a", block_ids=blocks, deadline_s=0.5) == 0
        waited = engine.do("wait_on_gpu", layer=31)
        assert waited["seconds"] < 5.0
        assert not engine.do("quiet", timeout_s=0.5), "a stopped daemon may go on and write"
    finally:
        daemon.resume()
    assert engine.do("quiet", timeout_s=15.0)
    daemon.kill()
    eventually(lambda: engine.do("load", chain_name="a", block_ids=blocks)["blocks"] == 0)
    daemon.restart()
    eventually(lambda: engine.do("plane") == "cuda-ipc")
    engine.do("fill", seed=3)
    assert engine.do("save", chain_name="b", block_ids=blocks)["saved"] == 64
    engine.do("poison")
    assert engine.do("load", chain_name="b", block_ids=blocks)["blocks"] == 64
    assert engine.do("digest", block_ids=blocks[:4]) == saved


def test_a_waiting_stream_is_let_go_when_the_daemon_is_killed(
    daemon: DaemonProcess, make_engine: MakeGpuEngine
) -> None:
    engine = make_engine()
    attach(engine, daemon, layout="split", layers=32, blocks=512, tokens=16)
    engine.do("fill", seed=4)
    blocks = list(range(512))
    assert engine.do("save", chain_name="a", block_ids=blocks)["saved"] == 512
    for _ in range(3):
        started = engine.do("start_load", chain_name="a", block_ids=blocks, deadline_s=5.0)
        daemon.kill()
        assert started == 512
        assert engine.do("wait_on_gpu", layer=31)["seconds"] < 6.0
        assert engine.do("quiet", timeout_s=5.0)
        daemon.restart()
        eventually(lambda: engine.do("plane") == "cuda-ipc")
        assert engine.do("save", chain_name="a", block_ids=blocks)["saved"] == 512


def test_memory_of_a_pool_takes_the_other_plane(daemon: DaemonProcess, make_engine: MakeGpuEngine) -> None:
    engine = make_engine()
    engine.do("use_expandable_segments")
    attached = attach(engine, daemon, layers=8)
    assert attached["plane"] == "mapped"
    assert "legacy CUDA IPC cannot export" in str(attached["why"])
    engine.do("fill", seed=5)
    saved = engine.do("digest", block_ids=SOURCES)
    assert engine.do("save", chain_name="a", block_ids=SOURCES)["saved"] == 6
    engine.do("poison")
    assert engine.do("load", chain_name="a", block_ids=DESTINATIONS)["blocks"] == 6
    assert engine.do("digest", block_ids=DESTINATIONS) == saved


def _copied_bytes(daemon: DaemonProcess) -> float:
    _, text = daemon.get("/metrics")
    name = 'kvservice_transfer_bytes_total{direction="dram_to_gpu"}'
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))
