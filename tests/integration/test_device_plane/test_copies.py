"""The device plane end to end: a daemon, a client, and a GPU of host memory that a test can hold still.

What runs on a real GPU only is in tests/gpu.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import kvservice_client as kv
from kvservice_client import Reason
from kvservice_client.device import CachePart, DeviceCache, DeviceKV
from kvservice_cuda.api import CudaError
from kvservice_cuda.copier import Direction
from tests.blocks import chain, namespace
from tests.daemons import DaemonThread
from tests.devices import ILLEGAL_ADDRESS, UUID, FakeGpu
from tests.integration.test_device_plane.conftest import BLOCK, BLOCKS, LAYERS, PIECE, MakeEngine
from tests.waiting import eventually

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(("exportable", "plane"), [(True, "cuda-ipc"), (False, "mapped")])
def test_blocks_come_back_bit_by_bit_to_other_places(
    make_engine: MakeEngine, daemon: DaemonThread, *, exportable: bool, plane: str
) -> None:
    engine = make_engine(exportable=exportable)
    assert engine.kv.plane.name == plane
    sources, destinations = [3, 4, 5, 9, 0], [1, 15, 2, 7, 8]
    saved = engine.blocks(sources)
    result = engine.kv.save(chain("a", 5), sources)
    assert (result.saved, result.reason) == (5, Reason.OK)
    engine.fill(seed=1)
    others = [number for number in range(BLOCKS) if number not in destinations]
    before = engine.blocks(others)
    load = engine.kv.load(chain("a", 6), [*destinations, 12])
    assert (load.blocks, load.reason) == (5, Reason.NOT_HELD)
    assert load.result() == kv.LoadResult(5, Reason.NOT_HELD)
    assert engine.blocks(destinations) == saved
    assert engine.blocks(others) == before
    assert load.is_quiet
    eventually(lambda: daemon.holds() == (0, 0, 0))


def test_who_asks_does_not_wait_for_what_is_queued_before(make_engine: MakeEngine, daemon: DaemonThread) -> None:
    engine = make_engine()
    saved = engine.blocks([0, 1, 2])
    assert engine.kv.save(chain("a", 3), [0, 1, 2]).saved == 3
    may_queue = threading.Event()
    (gpu,) = daemon.daemon.store.device_copies.plane._gpus.values()
    # As where another engine registers: its segments are pinned first.
    gpu._queuing[Direction.LOAD].submit(may_queue.wait)
    try:
        load = engine.kv.load(chain("a", 3), [5, 6, 7])
        assert load.blocks == 3
        assert not load.is_quiet
    finally:
        may_queue.set()
    assert load.result().blocks == 3
    assert engine.blocks([5, 6, 7]) == saved


@pytest.mark.parametrize("exportable", [True, False])
def test_what_was_read_from_blocks_given_away_is_not_published(
    make_engine: MakeEngine, daemon: DaemonThread, *, exportable: bool
) -> None:
    engine = make_engine(exportable=exportable)
    asked: list[bool] = []

    def is_source_kept() -> bool:
        """Until the copy has begun."""
        asked.append(True)
        return len(asked) < 2

    result = engine.kv.save(chain("a", 3), [0, 1, 2], is_source_kept=is_source_kept)
    assert (result.saved, result.refused, result.reason) == (0, 3, Reason.CHANGED)
    assert engine.client.lookup(chain("a", 3)).blocks == 0
    eventually(lambda: daemon.holds() == (0, 0, 0))
    assert engine.kv.save(chain("a", 3), [0, 1, 2]).saved == 3


def test_memory_that_fails_to_be_exported_takes_the_other_plane_whatever_its_attribute_says(
    make_engine: MakeEngine, gpu: FakeGpu
) -> None:
    gpu.is_honest = False
    engine = make_engine(exportable=False)
    assert engine.kv.plane.name == "mapped"
    assert "expandable segments, sleep mode); cuIpcGetMemHandle" in engine.kv.plane.why


@pytest.mark.parametrize("exportable", [True, False])
def test_what_the_device_plane_saved_reads_the_same_through_shared_memory(
    make_engine: MakeEngine, *, exportable: bool
) -> None:
    engine = make_engine(exportable=exportable)
    engine.kv.save(chain("a", 3), [2, 0, 1])
    landed = bytearray(3 * BLOCK)
    assert engine.client.load(chain("a", 3), landed).blocks == 3
    assert bytes(landed) == b"".join(engine.blocks([2, 0, 1]))


def test_a_stream_passes_a_layer_when_its_bytes_are_there_and_the_call_waits_for_none(
    make_engine: MakeEngine, gpu: FakeGpu
) -> None:
    engine = make_engine()
    saved = engine.blocks([0, 1, 2, 3])
    engine.kv.save(chain("a", 4), [0, 1, 2, 3])
    engine.fill(seed=1)
    context = gpu.driver.context(0)
    stream = context.stream()
    seen: list[bool] = []

    def layer_is_there(layer: int) -> bool:
        first = layer * 2 * PIECE
        there = [block[first : first + 2 * PIECE] for block in engine.blocks([4, 5, 6, 7])]
        seen.append(there == [block[first : first + 2 * PIECE] for block in saved])
        return True

    with gpu.held():
        load = engine.kv.load(chain("a", 4), [4, 5, 6, 7])
        assert load.blocks == 4
        assert not load.is_quiet
        for layer in range(LAYERS):
            load.wait_layer(layer, stream)
            gpu.queue(stream, partial(layer_is_there, layer))
    context.synchronize(stream)
    assert seen == [True] * LAYERS
    # Who asks for a layer afterwards does not wait either.
    load.wait_layer(0, stream)
    context.synchronize(stream)


def test_a_daemon_that_does_not_answer_holds_up_no_stream_and_keeps_its_hands_on_the_blocks(
    make_engine: MakeEngine, gpu: FakeGpu
) -> None:
    engine = make_engine()
    engine.kv.save(chain("a", 2), [0, 1])
    context = gpu.driver.context(0)
    # The engine's own stream is not the copying ones': it is let through while those stand still.
    with gpu.held():
        load = engine.kv.load(chain("a", 2), [2, 3])
        assert load.blocks == 2
        assert load.result(0.05).blocks == 0
        assert load.has_failed
        assert not load.is_quiet, "copies are still queued: the blocks are not the engine's yet"
        stream = context.stream()
        load.wait_layer(LAYERS - 1, stream)
    context.synchronize(stream)
    assert load.wait_quiet(5.0)
    assert load.result().blocks == 0, "what came too late does not count"


def test_a_get_without_an_answer_is_quiet_only_when_the_daemon_has_acknowledged_its_end(
    make_engine: MakeEngine, daemon: DaemonThread, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    engine.kv.save(chain("a", 2), [0, 1])
    copies = daemon.store.device_copies
    begin = copies.load

    def begin_and_lose_the_answer(*arguments: Any) -> None:
        assert begin(*arguments) is not None
        raise OSError("the answer is lost")

    monkeypatch.setattr(copies, "load", begin_and_lose_the_answer)
    with gpu.held():
        load = engine.kv.load(chain("a", 2), [2, 3], deadline_s=5.0)
        assert load.blocks == 0
        assert load.has_failed
        # Long enough for the daemon's next sign of life, with which the debt is paid: it is not acknowledged yet.
        assert not load.wait_quiet(3.0)
    assert load.wait_quiet(20.0)
    eventually(lambda: daemon.on_loop(lambda: copies.plane.copies_in_flight) == 0)
    eventually(lambda: engine.kv.transfers_under_way == 0)


def test_an_engine_that_goes_with_copies_under_way_leaves_slots_and_memory_only_when_they_ended(
    make_engine: MakeEngine, daemon: DaemonThread, gpu: FakeGpu
) -> None:
    engine = make_engine()
    engine.kv.save(chain("a", 4), [0, 1, 2, 3])
    plane = daemon.store.device_copies.plane
    instance_id = engine.client.link.welcome.instance_id
    queued = gpu.queued_copies
    with gpu.held():
        load = engine.kv.load(chain("a", 4), [4, 5, 6, 7])
        assert load.blocks == 4
        eventually(lambda: gpu.queued_copies > queued)
        # What the kernel does when a process ends: both sockets close, whatever the program still meant to do.
        engine.client.link._memory_socket.close()
        eventually(
            lambda: daemon.on_loop(lambda: [each.instance_id for each in daemon.store.instances] != [instance_id])
        )
        assert gpu.opened, "memory is open while copies are under way"

        def holders() -> int:
            return sum(int(each.pool.holders.sum()) for each in daemon.store.namespaces.values())

        assert daemon.on_loop(holders) >= 4
    eventually(lambda: not gpu.opened)
    eventually(lambda: daemon.on_loop(lambda: plane.copies_in_flight) == 0)
    daemon.wait_checksummed()
    assert daemon.on_loop(holders) == 0
    assert daemon.holds() == (0, 0, 0)


def test_two_engines_on_one_gpu_resume_from_each_other(make_engine: MakeEngine) -> None:
    first, second = make_engine(), make_engine(fill=False)
    first.kv.save(chain("a", 6), [0, 1, 2, 3, 4, 5])
    assert second.kv.load(chain("a", 6), [5, 4, 3, 2, 1, 0]).result().blocks == 6
    assert second.blocks([5, 4, 3, 2, 1, 0]) == first.blocks([0, 1, 2, 3, 4, 5])


def test_a_gpu_that_fails_costs_the_plane_and_not_the_service(
    make_engine: MakeEngine, daemon: DaemonThread, gpu: FakeGpu
) -> None:
    engine = make_engine()
    engine.kv.save(chain("a", 2), [0, 1])
    with gpu.held():
        load = engine.kv.load(chain("a", 2), [2, 3])
        gpu.fail(CudaError("the GPU fell off the bus", ILLEGAL_ADDRESS))
    assert load.result().blocks == 0
    assert load.is_quiet
    assert engine.kv.save(chain("b", 1), [0]).saved == 0
    landed = bytearray(2 * BLOCK)
    assert engine.client.load(chain("a", 2), landed).blocks == 2
    (shown,) = engine.client.stats().devices
    assert shown.state.startswith("lost: ")


def test_stats_say_how_bytes_travel(make_engine: MakeEngine) -> None:
    ipc, mapped = make_engine(), make_engine(exportable=False)
    stats = ipc.client.stats()
    assert stats.planes == "shared-memory, cuda-ipc (1 x fake GPU)"
    assert sorted(each.plane.split(" (")[0] for each in stats.attached_instances) == ["cuda-ipc", "shared-memory"]
    assert any("legacy CUDA IPC cannot export" in each.plane for each in stats.attached_instances)
    (device,) = stats.devices
    assert (device.name, device.uuid, device.state, device.registrations) == ("fake GPU", UUID, "online", 1)
    assert device.registered_bytes == LAYERS * 2 * BLOCKS * PIECE
    assert "cannot export" in mapped.kv.plane.why


def test_without_the_plane_the_client_copies_itself(
    make_daemon_thread: Callable[..., DaemonThread], gpu: FakeGpu
) -> None:
    daemon = make_daemon_thread(directory="without", driver=None)
    layer = gpu.allocate(BLOCKS * BLOCK)
    gpu.array(layer)[:] = np.random.default_rng(0).integers(0, 256, BLOCKS * BLOCK, dtype=np.uint8)
    cache = DeviceCache(BLOCKS, (CachePart(layer, BLOCK, BLOCK),))
    with kv.attach(namespace(block_size_bytes=BLOCK), socket_dir=daemon.socket_dir) as client:
        device = DeviceKV(client, cache, driver=gpu.driver)
        assert device.plane.name == "mapped"
        assert "turned off" in device.plane.why
        assert device.save(chain("a", 3), [0, 1, 2]).saved == 3
        assert device.load(chain("a", 3), [5, 6, 7]).result().blocks == 3
        memory = gpu.array(layer)
        assert bytes(memory[: 3 * BLOCK]) == bytes(memory[5 * BLOCK : 8 * BLOCK])
        device.close()
    eventually(lambda: daemon.holds() == (0, 0, 0))


def test_a_save_that_fits_only_in_part_saves_a_prefix(
    make_daemon_thread: Callable[..., DaemonThread], gpu: FakeGpu
) -> None:
    size = 1 << 19
    daemon = make_daemon_thread(directory="small", driver=gpu.driver)
    layer = gpu.allocate(12 * size)
    cache = DeviceCache(12, (CachePart(layer, size, size),))
    with kv.attach(namespace("large", block_size_bytes=size), socket_dir=daemon.socket_dir) as client:
        device = DeviceKV(client, cache, driver=gpu.driver)
        result = device.save(chain("a", 12), range(12))
        assert (result.reason, result.refused) == (Reason.CAPACITY, 12 - result.saved)
        assert 1 <= result.saved <= 8
        assert client.lookup(chain("a", 12)).blocks == result.saved
        device.close()
