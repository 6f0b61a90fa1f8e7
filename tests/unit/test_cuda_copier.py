"""The copier, on a GPU of host memory: bytes before progress, layer by layer, and an end that comes last."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from kvservice_cuda.api import CudaError, DriverMissing, call
from kvservice_cuda.copier import ENDED_BYTES, LANE_BYTES, Copier, Direction, progress
from kvservice_cuda.geometry import Geometry, Piece
from kvservice_cuda.plan import Plan
from tests.devices import FakeContext, FakeGpu

pytestmark = pytest.mark.unit

LAYERS, PIECE, BLOCKS = 5, 1 << 20, 24


class Setting:
    """A cache of five layers, room in host memory, and a lane."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.context: FakeContext = gpu.driver.context(0)
        self.cache = gpu.allocate(LAYERS * BLOCKS * PIECE)
        self.host = np.zeros(LAYERS * BLOCKS * PIECE, dtype=np.uint8)
        self.context.pin(self.host.ctypes.data, len(self.host))
        self.lane = np.zeros(LANE_BYTES // 8, dtype=np.uint64)
        self.geometry = Geometry(
            BLOCKS, tuple(Piece(0, layer * BLOCKS * PIECE, PIECE, PIECE, layer) for layer in range(LAYERS))
        )

    def submit(
        self, copier: Copier, blocks: list[int], sequence: int, has_begun: Callable[[], None] = lambda: None
    ) -> None:
        host = np.uint64(self.host.ctypes.data) + np.arange(len(blocks), dtype=np.uint64) * np.uint64(LAYERS * PIECE)
        plan = Plan(self.geometry, np.array([self.cache], dtype=np.uint64))
        copier.submit(
            plan, np.array(blocks), host, lane_address=self.lane.ctypes.data, sequence=sequence, has_begun=has_begun
        )

    @property
    def ended(self) -> int:
        return int(self.lane[ENDED_BYTES // 8])


@pytest.mark.parametrize("chosen", [[4, 0, 5], [23, 1, *range(3, 21)]], ids=["pieces", "rows and pieces"])
@pytest.mark.parametrize("direction", Direction)
def test_bytes_arrive_in_both_directions(gpu: FakeGpu, direction: Direction, chosen: list[int]) -> None:
    setting = Setting(gpu)
    cache = gpu.array(setting.cache)
    source = setting.host if direction is Direction.LOAD else cache
    source[:] = np.random.default_rng(1).integers(0, 256, len(source), dtype=np.uint8)
    copier = Copier(setting.context, direction)
    setting.submit(copier, chosen, sequence=9)
    copier.drain()
    assert setting.lane[0] == progress(9, LAYERS)
    assert setting.ended == 9
    shaped = cache.reshape(LAYERS, BLOCKS, PIECE)
    blocks = setting.host[: len(chosen) * LAYERS * PIECE].reshape(len(chosen), LAYERS, PIECE)
    for place, block in enumerate(chosen):
        assert np.array_equal(shaped[:, block], blocks[place])
    copier.close()


def test_progress_rises_by_layers_and_the_end_is_told_last(gpu: FakeGpu) -> None:
    setting = Setting(gpu)
    copier = Copier(setting.context, Direction.LOAD)
    stream = setting.context.stream()
    order: list[str] = []

    def note(name: str) -> bool:
        order.append(f"{name} {setting.ended}")
        return True

    with gpu.held():
        for layer in range(LAYERS):
            setting.context.await_flag(stream, setting.lane.ctypes.data, progress(1, layer + 1))
            gpu.queue(stream, partial(note, f"layer {layer}"))
        setting.submit(copier, list(range(BLOCKS)), sequence=1)
        assert setting.lane[0] == 0
        assert setting.ended == 0
    setting.context.synchronize(stream)
    copier.drain()
    assert [line.rsplit(" ", 1)[0] for line in order] == [f"layer {layer}" for layer in range(LAYERS)]
    assert setting.ended == 1
    copier.close()


@pytest.mark.parametrize(("blocks", "groups"), [(BLOCKS, LAYERS), (1, 1)])
def test_who_submits_hears_when_the_first_of_several_groups_is_queued(gpu: FakeGpu, blocks: int, groups: int) -> None:
    setting = Setting(gpu)
    copier = Copier(setting.context, Direction.LOAD)
    queued: list[int] = []
    setting.submit(copier, list(range(blocks)), sequence=1, has_begun=lambda: queued.append(gpu.queued_copies))
    assert queued == [gpu.queued_copies // LAYERS] * (groups > 1)
    copier.drain()
    copier.close()


def test_a_later_copy_on_the_lane_lets_waits_for_an_earlier_one_pass(gpu: FakeGpu) -> None:
    assert progress(2, 0) > progress(1, 1024)


def test_a_failure_on_the_way_is_raised_to_who_waits(gpu: FakeGpu) -> None:
    setting = Setting(gpu)
    copier = Copier(setting.context, Direction.LOAD)
    setting.context.unpin(setting.host.ctypes.data)  # what a copy to memory that is gone would meet
    setting.submit(copier, [0], sequence=1)
    with pytest.raises(CudaError, match="leaves what it may touch"):
        setting.context.await_event(copier.finish_event())
    copier.drain()  # also of a GPU that is lost
    assert setting.ended == 0


def test_without_a_driver_the_reason_is_said() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(DriverMissing, match="no CUDA driver here"):
            call("cuDriverGetVersion", None)
    else:
        pytest.skip("there is a CUDA driver here")


@pytest.mark.parametrize(("code", "is_fatal"), [(1, False), (2, False), (700, True), (719, True), (999, True)])
def test_errors_that_stay_are_told_from_those_of_one_call(code: int, *, is_fatal: bool) -> None:
    assert CudaError("", code).is_fatal is is_fatal
