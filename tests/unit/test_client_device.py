"""The client's side of the device plane without a daemon: lanes, loads, the watchdog; where blocks are."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest
import torch

import kvservice_client as kv
from kvservice_client import Reason
from kvservice_client.device import CachePart, DeviceCache, DeviceLoad
from kvservice_client.device.buffer import read_buffer_bytes
from kvservice_client.device.lanes import Lanes
from kvservice_client.device.load import Transfer, Watchdog
from kvservice_cuda.copier import ENDED_BYTES, FAILED_BYTES, progress
from tests.devices import FakeGpu
from tests.waiting import eventually

pytestmark = pytest.mark.unit


@pytest.fixture
def lanes(gpu: FakeGpu) -> Lanes:
    return Lanes(gpu.driver.context(0), lanes=2)


@dataclass
class Side:
    """What a transfer asks of the copying side."""

    is_settled: bool = False
    is_hung_up: bool = False
    is_valid: bool = True
    quiet_calls: list[float] = field(default_factory=list)

    def transfer(self, lanes: Lanes, *, deadline_s: float = 60.0, has_begun: bool = True) -> Transfer:
        def on_quiet() -> bool:
            self.quiet_calls.append(time.monotonic())
            return self.is_valid

        lane, sequence = lanes.take()
        made = Transfer(
            lanes,
            lane,
            sequence,
            is_settled=lambda: self.is_settled,
            is_hung_up=lambda: self.is_hung_up,
            on_quiet=on_quiet,
            deadline_s=deadline_s,
        )
        made.has_begun = has_begun
        return made


def store(lanes: Lanes, transfer: Transfer, offset_bytes: int, value: int) -> None:
    """What the GPU or the daemon stores."""
    lanes._words[transfer.lane * 4 + offset_bytes // 8] = value


def end(lanes: Lanes, transfer: Transfer, layers: int = 4) -> None:
    store(lanes, transfer, 0, progress(transfer.sequence, layers))
    store(lanes, transfer, ENDED_BYTES, transfer.sequence)


def test_a_lane_is_one_transfer_s_until_no_byte_of_it_moves(lanes: Lanes) -> None:
    side = Side()
    first, second = side.transfer(lanes), side.transfer(lanes)
    with pytest.raises(kv.Overloaded):
        lanes.take()
    end(lanes, first)
    assert first.look()
    assert first.is_ok
    third = side.transfer(lanes)
    assert (third.lane, third.sequence) == (first.lane, first.sequence + 1)
    # The outcome of the first does not change with what becomes of the lane.
    store(lanes, third, FAILED_BYTES, third.sequence)
    end(lanes, third)
    assert third.look()
    assert not third.is_ok
    assert first.is_ok
    assert not second.look()
    assert len(side.quiet_calls) == 2


def test_a_late_transfer_fails_and_lets_streams_go_but_is_not_quiet(gpu: FakeGpu, lanes: Lanes) -> None:
    side = Side()
    transfer = side.transfer(lanes, deadline_s=0.0)
    context = gpu.driver.context(0)
    stream = context.stream()
    context.await_flag(stream, lanes.device_address(transfer.lane), progress(transfer.sequence, 4))
    assert not transfer.look()
    assert transfer.has_failed
    context.synchronize(stream)
    # The GPU stores an earlier layer's progress late: waits that come now must not hang either.
    store(lanes, transfer, 0, progress(transfer.sequence, 2))
    context.await_flag(stream, lanes.device_address(transfer.lane), progress(transfer.sequence, 4))
    assert not transfer.look()
    context.synchronize(stream)
    end(lanes, transfer)
    assert transfer.look()
    assert not transfer.is_ok, "too late is too late"


def test_a_call_without_an_answer_is_quiet_when_its_end_was_acknowledged(lanes: Lanes) -> None:
    side = Side()
    transfer = side.transfer(lanes, has_begun=False)
    transfer.fail()
    assert not transfer.look()
    side.is_settled = True
    assert transfer.look()
    assert not transfer.is_ok


def test_a_copy_that_was_queued_is_not_quiet_because_its_call_was_settled(lanes: Lanes) -> None:
    transfer = Side(is_settled=True).transfer(lanes)
    assert not transfer.look()


def test_a_dead_daemon_s_copies_are_over_after_a_while(lanes: Lanes) -> None:
    side = Side(is_hung_up=True)
    transfer = side.transfer(lanes)
    assert not transfer.look()
    assert transfer.has_failed
    assert transfer.wait(5.0)
    assert not transfer.is_ok


def test_what_was_not_what_was_asked_for_has_failed(lanes: Lanes) -> None:
    transfer = Side(is_valid=False).transfer(lanes)
    end(lanes, transfer)
    assert transfer.look()
    assert transfer.has_failed


def test_the_watchdog_looks_at_every_transfer_until_it_is_quiet(lanes: Lanes) -> None:
    side, watchdog = Side(), Watchdog()
    late, good = side.transfer(lanes, deadline_s=0.01), side.transfer(lanes)
    watchdog.watch(late)
    watchdog.watch(good)
    eventually(lambda: late.has_failed)
    assert not good.has_failed
    for each in (late, good):
        end(lanes, each)
    eventually(lambda: watchdog.under_way == 0)
    watchdog.stop()
    eventually(lambda: not watchdog._thread.is_alive())


def test_a_load_that_began_nothing_asks_nothing_of_a_stream() -> None:
    load = DeviceLoad(None, None, 0, Reason.NOT_HELD)
    load.wait_layer(0, 123)
    assert load.result() == kv.LoadResult(0, Reason.NOT_HELD)
    assert load.is_quiet
    assert not load.has_failed


class OnGpu:
    """A tensor that says that it is on a GPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.device = torch.device("cuda", 0)

    def __getattr__(self, name: str) -> object:
        return getattr(self._tensor, name)

    def __getitem__(self, place: int) -> torch.Tensor:
        return self._tensor[place]


def test_parts_of_tensors_follow_their_strides() -> None:
    split = torch.empty(2, 10, 4, 3, dtype=torch.float16)
    cache = DeviceCache.of_tensors([[OnGpu(split[0]), OnGpu(split[1])]])
    start = split.data_ptr()
    assert cache == DeviceCache(10, (CachePart(start, 24, 24), CachePart(start + 240, 24, 24)))
    layered = [torch.empty(10, 2, 4, 3) for _ in range(3)]
    cache = DeviceCache.of_tensors([[OnGpu(each)] for each in layered])
    assert [(part.address, part.layer) for part in cache.parts] == [
        (each.data_ptr(), layer) for layer, each in enumerate(layered)
    ]
    assert cache.block_size_bytes == 3 * 2 * 4 * 3 * 4


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ([], "without tensors"),
        ([[torch.empty(4, 4)]], "a tensor on cpu"),
        ([[OnGpu(torch.empty(4, 4))], [OnGpu(torch.empty(5, 4))]], r"have \[4, 5\] blocks"),
        ([[OnGpu(torch.empty(4, 4, 6).transpose(1, 2))]], "layer 0: the bytes of a block are not contiguous"),
    ],
)
def test_tensors_that_are_no_cache_are_refused(layers: list[list[OnGpu]], problem: str) -> None:
    with pytest.raises(kv.InvalidRequest, match=problem):
        DeviceCache.of_tensors(layers)


def test_the_read_buffer_covers_what_the_prefill_does_not() -> None:
    # The paper's LLaMA-65B on A100s: 2.5 MB a token, 26 GB/s, 0.176 ms of prefill a token.
    size = read_buffer_bytes(
        bytes_per_s=26e9,
        block_bytes_per_token=2_500_000,
        prefill_s_per_token=0.176e-3,
        history_tokens=1900,
        new_tokens=100,
    )
    assert size == pytest.approx(4.29e9, rel=0.01)
    short = read_buffer_bytes(
        bytes_per_s=26e9,
        block_bytes_per_token=2_500_000,
        prefill_s_per_token=0.176e-3,
        history_tokens=100,
        new_tokens=100,
    )
    assert short == 0
