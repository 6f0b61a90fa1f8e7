"""What goes wrong with a load: it is never taken for one that arrived, and a run of the buffer is never two loads'."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest

import kvservice_client as kv
from kvservice_adapters.gpu import buffer as buffer_module
from kvservice_client import Reason
from kvservice_client.device import DeviceLoad, ipc
from kvservice_client.link import Link
from kvservice_cuda.api import CudaError
from tests.blocks import chain
from tests.daemons import DaemonThread
from tests.devices import ILLEGAL_ADDRESS, FakeGpu
from tests.integration.conftest import MakeDaemonThread
from tests.integration.test_hbm_buffer.conftest import BUFFER_BLOCKS, LAYERS, Engine, MakeEngine
from tests.waiting import eventually

pytestmark = pytest.mark.integration

PLACES = [20, 21, 22]


@pytest.fixture
def saved(engine: Engine) -> list[bytes]:
    """Three blocks of the chain "a" are held; the cache has others now."""
    blocks = engine.blocks([0, 1, 2])
    engine.save(chain("a", 3), [0, 1, 2])
    engine.fill(seed=1)
    return blocks


def test_a_late_load_has_failed_and_keeps_its_run_but_not_the_engine_s_blocks(
    engine: Engine, saved: list[bytes], gpu: FakeGpu
) -> None:
    with gpu.copies_held():
        load = engine.buffer.load(chain("a", 3), engine.mover, PLACES, deadline_s=60.0)
        assert load.blocks == 3
        assert load.finish(0.05) == kv.LoadResult(0, Reason.TIMEOUT)
        assert load.has_failed
        assert engine.buffer.free_blocks == BUFFER_BLOCKS - 3, "the daemon still writes there"
        engine.fill(seed=2)
        before = engine.blocks(PLACES)
        launches = list(engine.mover.launches)
        # Whoever goes on with it all the same scatters nothing, and waits for nothing.
        load.wait_layer(LAYERS - 1, engine.stream)
        assert load.finish().blocks == 0
    eventually(lambda: engine.buffer.free_blocks == BUFFER_BLOCKS)
    assert load.finish().blocks == 0, "what came too late does not count"
    engine.synchronize()
    assert engine.mover.launches == launches
    assert engine.blocks(PLACES) == before


def test_a_stream_that_waits_for_a_late_load_goes_on_and_the_load_says_that_it_failed(
    engine: Engine, saved: list[bytes], gpu: FakeGpu
) -> None:
    with gpu.held(but=[engine.stream, engine.buffer._uploads]):
        load = engine.buffer.load(chain("a", 3), engine.mover, PLACES, deadline_s=0.1)
        for layer in range(LAYERS):
            load.wait_layer(layer, engine.stream)
        engine.synchronize()
        assert load.has_failed
        assert engine.buffer.free_blocks == BUFFER_BLOCKS - 3
        # Its blocks are the engine's at once, whatever the daemon still does.
        engine.fill(seed=2)
        before = engine.blocks(PLACES)
    eventually(lambda: engine.buffer.free_blocks == BUFFER_BLOCKS)
    assert engine.blocks(PLACES) == before
    assert load.finish() == kv.LoadResult(0, Reason.CHANGED)


def test_a_run_is_nobody_else_s_before_the_kernels_that_read_it_have_run(engine: Engine, saved: list[bytes]) -> None:
    gate = threading.Event()
    load = engine.buffer.load(chain("a", 3), engine.mover, PLACES)
    engine.stop_at(gate)
    load.wait_layer(LAYERS - 1, engine.stream)
    eventually(lambda: engine.buffer._kv.transfers_under_way == 0)
    assert engine.buffer.free_blocks == BUFFER_BLOCKS - 3
    del load
    gc.collect()
    assert engine.buffer.free_blocks == BUFFER_BLOCKS - 3
    # Everything else is another load's meanwhile.
    assert engine.buffer.gather(engine.mover, range(BUFFER_BLOCKS - 2)) is None
    gate.set()
    engine.synchronize()
    assert engine.blocks(PLACES) == saved
    assert engine.buffer.free_blocks == BUFFER_BLOCKS


@pytest.mark.usefixtures("every_layer_alone")
def test_a_cancelled_load_scatters_no_more_and_holds_up_no_stream(
    engine: Engine, saved: list[bytes], gpu: FakeGpu
) -> None:
    before = engine.blocks(PLACES)
    with gpu.held(but=[engine.stream, engine.buffer._uploads]):
        load = engine.buffer.load(chain("a", 3), engine.mover, PLACES)
        load.cancel()
        load.wait_layer(LAYERS - 1, engine.stream)
        engine.synchronize()
        assert load.has_failed
        assert load.finish().blocks == 0
        assert engine.buffer.free_blocks == BUFFER_BLOCKS - 3
    eventually(lambda: engine.buffer.free_blocks == BUFFER_BLOCKS)
    assert engine.blocks(PLACES) == before
    assert engine.mover.launches == []
    # Half of it waited for already: that half is scattered, the rest is not.
    load = engine.buffer.load(chain("a", 3), engine.mover, PLACES)
    load.wait_layer(1, engine.stream)
    load.cancel()
    assert load.has_failed
    load.wait_layer(LAYERS - 1, engine.stream)
    engine.synchronize()
    assert [launch[1:] for launch in engine.mover.launches] == [(0, 2)]
    eventually(lambda: engine.buffer.free_blocks == BUFFER_BLOCKS)


def test_to_cancel_what_has_arrived_takes_nothing_back(engine: Engine, saved: list[bytes]) -> None:
    load = engine.buffer.load(chain("a", 3), engine.mover, PLACES)
    assert load.finish().blocks == 3
    load.cancel()
    assert not load.has_failed
    assert load.finish().blocks == 3


def test_a_forgotten_load_gives_its_run_back(engine: Engine, saved: list[bytes]) -> None:
    load = engine.buffer.load(chain("a", 3), engine.mover, PLACES)
    eventually(lambda: engine.buffer._kv.transfers_under_way == 0)
    assert engine.buffer.free_blocks == BUFFER_BLOCKS - 3
    del load
    gc.collect()
    assert engine.buffer.free_blocks == BUFFER_BLOCKS
    assert engine.mover.launches == []


def test_a_kernel_that_cannot_be_launched_fails_the_load_and_no_request(engine: Engine, saved: list[bytes]) -> None:
    engine.mover.error = RuntimeError("no such kernel")
    waited = engine.buffer.load(chain("a", 3), engine.mover, PLACES)
    waited.wait_layer(0, engine.stream)
    assert waited.has_failed
    assert waited.finish().blocks == 0
    finished = engine.buffer.load(chain("a", 3), engine.mover, PLACES)
    assert finished.finish().blocks == 0
    assert finished.has_failed
    engine.synchronize()
    eventually(lambda: engine.buffer.free_blocks == BUFFER_BLOCKS)


def test_a_gpu_that_is_lost_fails_loads_and_saves_and_raises_nothing(
    engine: Engine, saved: list[bytes], gpu: FakeGpu
) -> None:
    with gpu.held():
        load = engine.buffer.load(chain("a", 3), engine.mover, PLACES)
        load.wait_layer(0, engine.stream)
        gathered = engine.buffer.gather(engine.mover, [0])
        gpu.fail(CudaError("the GPU fell off the bus", ILLEGAL_ADDRESS))
    assert load.finish().blocks == 0
    assert load.has_failed
    assert gathered is not None
    assert engine.buffer.save(gathered, chain("b", 1)).saved == 0
    assert engine.buffer.gather(engine.mover, [0]) is None
    assert engine.buffer.load(chain("a", 3), engine.mover, PLACES).finish().blocks == 0


def test_a_get_without_an_answer_keeps_its_whole_run_until_the_daemon_has_acknowledged_its_end(
    engine: Engine, saved: list[bytes], daemon: DaemonThread, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = daemon.store.device_copies
    begin = copies.load

    def begin_and_lose_the_answer(*arguments: Any) -> None:
        assert begin(*arguments) is not None
        raise OSError("the answer is lost")

    monkeypatch.setattr(copies, "load", begin_and_lose_the_answer)
    with gpu.held():
        load = engine.buffer.load(chain("a", 5), engine.mover, [*PLACES, 30, 31], deadline_s=5.0)
        assert load.blocks == 0
        assert load.finish().blocks == 0
        assert engine.buffer.free_blocks == BUFFER_BLOCKS - 5
    eventually(lambda: engine.buffer.free_blocks == BUFFER_BLOCKS)
    assert engine.mover.launches == []


def test_no_lane_is_a_miss_that_loses_no_room(
    engine: Engine, saved: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    plane = engine.buffer._kv._ipc
    assert plane is not None
    monkeypatch.setattr(plane._lanes, "_free", [])
    load = engine.buffer.load(chain("a", 3), engine.mover, PLACES)
    assert (load.blocks, load.reason) == (0, Reason.OVERLOADED)
    assert load.finish() == kv.LoadResult(0, Reason.OVERLOADED)
    assert engine.buffer.free_blocks == BUFFER_BLOCKS


def test_a_dead_daemon_s_load_has_failed_and_its_run_comes_back_after_a_while(
    engine: Engine, saved: list[bytes], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gpu.held(but=[engine.stream, engine.buffer._uploads]):
        load = engine.buffer.load(chain("a", 3), engine.mover, PLACES)
        monkeypatch.setattr(Link, "is_hung_up", True)
        load.wait_layer(LAYERS - 1, engine.stream)
        engine.synchronize()
        assert load.has_failed
        eventually(lambda: engine.buffer.free_blocks == BUFFER_BLOCKS)
    assert load.finish().blocks == 0


# Whoever connects in the moment in which a daemon ends finds a socket that is closed with its process: here, later.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_with_the_next_daemon_it_goes_on(
    make_engine: MakeEngine, make_daemon_thread: MakeDaemonThread, short_path: Path, gpu: FakeGpu
) -> None:
    with DaemonThread(short_path / "other", driver=gpu.driver) as daemon:
        engine = make_engine(socket_dir=daemon.socket_dir)
        engine.save(chain("a", 3), [0, 1, 2])
    eventually(lambda: not engine.client.attached)
    load = engine.buffer.load(chain("a", 3), engine.mover, PLACES)
    assert (load.blocks, load.reason) == (0, Reason.UNAVAILABLE)
    assert engine.buffer.plane.name == "none"
    make_daemon_thread(directory="other", driver=gpu.driver)
    eventually(lambda: engine.buffer.plane.name == "cuda-ipc")
    saved = engine.blocks([0, 1, 2])
    assert engine.buffer.load(chain("a", 3), engine.mover, PLACES).reason is Reason.NOT_HELD
    engine.save(chain("a", 3), [0, 1, 2])
    engine.fill(seed=1)
    assert engine.buffer.load(chain("a", 3), engine.mover, PLACES).finish().blocks == 3
    assert engine.blocks(PLACES) == saved


# ------------------------------------------------------------------ the end


def test_close_fails_what_is_under_way_and_waits_until_the_daemon_is_done(
    engine: Engine, saved: list[bytes], gpu: FakeGpu
) -> None:
    before = engine.blocks(PLACES)
    gathered = engine.buffer.gather(engine.mover, [0])
    assert gathered is not None
    with gpu.held():
        load = engine.buffer.load(chain("a", 3), engine.mover, PLACES)
        closing = threading.Thread(target=engine.buffer.close)
        closing.start()
        eventually(lambda: load.has_failed)
        assert gpu.opened, "the daemon has it open while it copies"
        load.wait_layer(LAYERS - 1, engine.stream)
    closing.join(30.0)
    assert not closing.is_alive()
    assert not gpu.opened
    engine.synchronize()
    assert engine.blocks(PLACES) == before
    assert load.finish().blocks == 0
    assert engine.buffer.load(chain("a", 3), engine.mover, PLACES).reason is Reason.CLOSED
    assert engine.buffer.gather(engine.mover, [0]) is None
    assert engine.buffer.save(gathered, chain("b", 1)).reason is Reason.CLOSED
    assert buffer_module._kept == []


def test_close_keeps_what_has_arrived(engine: Engine, saved: list[bytes]) -> None:
    load = engine.buffer.load(chain("a", 3), engine.mover, PLACES)
    for layer in range(LAYERS):
        load.wait_layer(layer, engine.stream)
    engine.synchronize()
    eventually(lambda: engine.buffer._kv.transfers_under_way == 0)
    engine.buffer.close()
    engine.buffer.close()
    assert load.finish().blocks == 3
    assert engine.blocks(PLACES) == saved


def test_memory_that_a_daemon_may_still_write_into_is_kept_for_ever(
    engine: Engine, saved: list[bytes], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ipc, "_REGISTER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(buffer_module, "_CLOSE_WAIT_S", 0.1)
    monkeypatch.setattr(buffer_module, "_kept", [])
    queued = gpu.queued_copies
    with gpu.held():
        engine.buffer.load(chain("a", 3), engine.mover, PLACES)
        eventually(lambda: gpu.queued_copies > queued)
        engine.buffer.close()
        assert len(buffer_module._kept) == 1
    eventually(lambda: engine.buffer._kv.transfers_under_way == 0)


def test_a_buffer_too_small_for_a_block_is_refused(engine: Engine, gpu: FakeGpu) -> None:
    with pytest.raises(kv.InvalidRequest, match="a buffer of 100 bytes"):
        buffer_module.HbmBuffer(
            engine.client, layer_bytes=[800], size_bytes=100, device=engine.buffer._device, driver=gpu.driver
        )


# --------------------------------------------------------- more than one piece


def answer_from(engine: Engine, call: int, load: DeviceLoad, monkeypatch: pytest.MonkeyPatch) -> None:
    """From that call on the device plane answers this."""
    asked = engine.buffer._kv.load
    calls: list[int] = []

    def ask(*arguments: Any, **more: Any) -> DeviceLoad:
        calls.append(1)
        return asked(*arguments, **more) if len(calls) < call else load

    monkeypatch.setattr(engine.buffer._kv, "load", ask)


@pytest.mark.parametrize("call", [2, 3, 4])
def test_of_a_large_load_that_ends_early_the_pieces_before_count(
    engine: Engine, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = 2 * BUFFER_BLOCKS
    sources = list(range(blocks))
    saved = engine.blocks(sources)
    engine.save(chain("a", blocks), sources)
    engine.fill(seed=1)
    answer_from(engine, call, DeviceLoad(None, None, 0, Reason.OVERLOADED), monkeypatch)
    load = engine.buffer.load(chain("a", blocks), engine.mover, sources)
    loaded = (call - 1) * BUFFER_BLOCKS // 2
    assert (load.blocks, load.reason) == (loaded, Reason.OVERLOADED)
    assert load.finish() == kv.LoadResult(loaded, Reason.OVERLOADED)
    assert engine.blocks(sources[:loaded]) == saved[:loaded]


def test_of_a_large_load_whose_second_piece_does_not_arrive_only_the_first_counts(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = 2 * BUFFER_BLOCKS
    sources = list(range(blocks))
    engine.save(chain("a", blocks), sources)
    scatter = engine.mover.scatter

    def scatter_once(*arguments: Any, **more: Any) -> None:
        if engine.mover.launches:
            raise RuntimeError("the second is one too many")
        scatter(*arguments, **more)

    monkeypatch.setattr(engine.mover, "scatter", scatter_once)
    load = engine.buffer.load(chain("a", blocks), engine.mover, sources)
    assert (load.blocks, load.reason) == (BUFFER_BLOCKS // 2, Reason.INTERNAL)
    assert not load.has_failed
    load.wait_layer(0, engine.stream)
    assert load.finish() == kv.LoadResult(BUFFER_BLOCKS // 2, Reason.INTERNAL)
    eventually(lambda: engine.buffer.free_blocks == BUFFER_BLOCKS)
