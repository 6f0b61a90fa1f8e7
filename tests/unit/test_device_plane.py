"""The daemon's device plane alone: what it opens and pins, it closes and unpins, in an order that nobody can feel."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from kvservice.device import Copy, DevicePlane, Region, Registration
from kvservice.device.registration import Places
from kvservice.dram import Arena, Segment
from kvservice.errors import InvalidRequest, LeaseUnknown
from kvservice_cuda.api import CudaError
from kvservice_cuda.copier import Direction
from kvservice_cuda.geometry import Geometry, Piece
from kvservice_cuda.plan import Plan
from tests.devices import UUID, FakeGpu
from tests.waiting import eventually

pytestmark = pytest.mark.unit

BLOCK, BLOCKS = 4096, 8


class Setting:
    """A plane, a cache and a segment."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.plane = DevicePlane(gpu.driver, clock=time.monotonic)
        self.cache = gpu.allocate(BLOCK * BLOCKS)
        arena = Arena(capacity_bytes=BLOCK * BLOCKS, huge_pages=False, numa_node=-1)
        self.segment: Segment = arena.make_segment(
            arena.promise(BLOCK * BLOCKS), stride_bytes=BLOCK, slots=BLOCKS
        )  # fmt: skip
        self.done: list[str] = []

    async def register(self, instance_id: int = 1) -> Registration:
        return await self.plane.register(
            instance_id,
            UUID,
            [Region(self.cache.to_bytes(64, "little"), 0, BLOCK * BLOCKS)],
            Geometry(BLOCKS, (Piece(0, 0, BLOCK, BLOCK),)),
            block_size_bytes=BLOCK,
            segments=[self.segment],
        )

    def start(self, registration: Registration, *, lane: int = 0, sequence: int = 1, attempt_id: int = 0) -> Copy:
        return self.plane.start(
            registration,
            Direction.LOAD,
            np.array([2, 3], dtype=np.uint32),
            [Places(self.segment, np.array([0, 1], dtype=np.int32))],
            lane=lane,
            sequence=sequence,
            attempt_id=attempt_id,
            on_done=lambda: self.done.append(f"{lane}/{sequence}"),
        )


async def queued(gpu: FakeGpu) -> None:
    """The copy has reached the GPU."""
    await asyncio.to_thread(eventually, lambda: gpu.queued_copies)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_a_closed_segment_is_unpinned_before_its_memory_goes(gpu: FakeGpu) -> None:
    setting = Setting(gpu)

    async def work() -> None:
        await setting.register()
        address = setting.segment.address
        assert address in gpu.pinned
        setting.segment.close()
        assert address not in gpu.pinned
        setting.plane.close()

    run(work())


def test_closing_waits_for_copies_and_new_ones_are_refused_meanwhile(gpu: FakeGpu) -> None:
    setting = Setting(gpu)

    async def work() -> None:
        registration = await setting.register()
        with gpu.held():
            copy = setting.start(registration)
            await queued(gpu)
            closing = asyncio.create_task(setting.plane.close_registration(registration))
            await asyncio.sleep(0)
            with pytest.raises(LeaseUnknown):
                setting.plane.find(1, registration.registration_id)
            assert gpu.opened
            assert not closing.done()
        await closing
        assert await copy.done
        assert setting.done == ["0/1"]
        assert not gpu.opened
        assert list(gpu.pinned) == [setting.segment.address]
        setting.plane.close()

    run(work())


def test_what_waits_to_be_queued_when_its_engine_leaves_is_never_written(gpu: FakeGpu) -> None:
    setting = Setting(gpu)

    async def work() -> None:
        registration = await setting.register()
        may_queue = threading.Event()
        setting.plane._gpus[UUID]._queuing[Direction.LOAD].submit(may_queue.wait)
        copy = setting.start(registration)
        setting.plane.forget(1)
        may_queue.set()
        assert await copy.done is False
        assert copy.begun.is_set(), "who waits for it to begin waits for ever"
        assert gpu.queued_copies == 0
        assert setting.done == ["0/1"]
        await asyncio.gather(*setting.plane._tasks)
        assert not gpu.opened
        setting.plane.close()

    run(work())


def test_a_copy_has_begun_when_it_is_queued_or_waits_behind_another(gpu: FakeGpu) -> None:
    setting = Setting(gpu)

    async def work() -> None:
        registration = await setting.register()
        may_queue = threading.Event()
        setting.plane._gpus[UUID]._queuing[Direction.LOAD].submit(may_queue.wait)
        first = setting.start(registration, lane=0)
        second = setting.start(registration, lane=1)
        assert not first.begun.is_set()
        assert second.begun.is_set()
        with gpu.held():
            may_queue.set()
            await first.begun.wait()
            assert gpu.queued_copies
            assert not first.done.done()
        await setting.plane.until_quiet([first, second])
        setting.plane.close()

    run(work())


def test_memory_that_cannot_be_pinned_leaves_nothing_open(gpu: FakeGpu) -> None:
    setting = Setting(gpu)
    gpu.pins_left = 0

    async def work() -> None:
        with pytest.raises(InvalidRequest, match="refuses: cuMemHostRegister"):
            await setting.register()
        assert not gpu.opened
        assert not gpu.pinned
        setting.plane.close()

    run(work())


def test_forgetting_an_instance_closes_what_is_its_own_only(gpu: FakeGpu) -> None:
    setting = Setting(gpu)

    async def work() -> None:
        first, second = await setting.register(1), await setting.register(2)
        assert first.registration_id != second.registration_id
        setting.plane.forget(1)
        await asyncio.gather(*setting.plane._tasks)
        assert gpu.opened == [setting.cache]
        assert setting.plane.find(2, second.registration_id) is second
        with pytest.raises(LeaseUnknown):
            setting.plane.find(1, second.registration_id)
        setting.plane.close()

    run(work())


def test_copies_are_found_by_the_attempt_that_began_them(gpu: FakeGpu) -> None:
    setting = Setting(gpu)

    async def work() -> None:
        registration = await setting.register()
        with gpu.held():
            copies = [setting.start(registration, lane=lane, attempt_id=lane) for lane in range(3)]
            assert setting.plane.of_attempts(1, [2, 7]) == [copies[2]]
            assert setting.plane.of_attempts(1, [0]) == [], "0 is no attempt"
            assert setting.plane.of_attempts(2, [1]) == []
            waiting = asyncio.create_task(setting.plane.until_quiet([copies[1]]))
            await asyncio.sleep(0)
            assert not waiting.done()
        await waiting
        await setting.plane.until_quiet(copies)
        setting.plane.close()

    run(work())


def test_a_failed_copy_says_so_in_its_lane_and_lets_nobody_wait(gpu: FakeGpu) -> None:
    setting = Setting(gpu)
    failed: list[Direction] = []
    setting.plane.on_failed = failed.append

    async def work() -> None:
        registration = await setting.register()
        with gpu.held():
            copy = setting.start(registration, lane=3, sequence=5)
            await queued(gpu)
            gpu.fail(CudaError("lost", 719))
        assert await copy.done is False
        words = np.frombuffer(registration.progress._memory, dtype=np.uint64)[3 * 4 :]
        assert words[:3].tolist() == [(5 << 16) + 1, 5, 5]
        assert (failed, setting.done) == ([Direction.LOAD], ["3/5"])
        with pytest.raises(InvalidRequest, match="the GPU is lost"):
            await setting.register(2)
        del words
        setting.plane.close()

    run(work())


def test_no_context_is_made_before_somebody_registers(gpu: FakeGpu) -> None:
    plane = DevicePlane(gpu.driver, clock=time.monotonic)
    assert plane.description == "cuda-ipc (1 x fake GPU)"
    assert plane.usage() == []
    plane.close()


def test_a_plane_that_is_off_says_so() -> None:
    async def work() -> None:
        plane = DevicePlane(None, clock=time.monotonic)
        assert plane.description == "no cuda-ipc: turned off (device_plane)"
        with pytest.raises(InvalidRequest, match="turned off"):
            await plane.register(
                1,
                UUID,
                [Region(bytes(64), 0, BLOCK)],
                Geometry(1, (Piece(0, 0, BLOCK, BLOCK),)),
                block_size_bytes=BLOCK,
                segments=[],
            )

    run(work())


def test_the_fake_gpu_notices_a_copy_outside(gpu: FakeGpu) -> None:
    setting = Setting(gpu)

    async def work() -> None:
        registration = await setting.register()
        registration.plan = Plan(registration.geometry, np.array([setting.cache + BLOCK * BLOCKS], dtype=np.uint64))
        assert await setting.start(registration).done is False

    run(work())
    eventually(lambda: gpu.failure is not None)
