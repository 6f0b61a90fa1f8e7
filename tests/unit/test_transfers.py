"""The queue of one device: the most urgent first, bounded, nothing lost, its depth told by priority."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kvservice.errors import Overloaded
from kvservice.tiers import Depth
from kvservice.transfers import Priority, Transfer, TransferQueue

pytestmark = pytest.mark.unit


class Device:
    """One thread that works behind a gate, and the order in which it worked."""

    def __init__(self, executor: ThreadPoolExecutor, *, waiting_max: int = 100) -> None:
        self.queue = TransferQueue(executor, depth=1, waiting_max=waiting_max)
        self.gate = threading.Event()
        self.done: list[str] = []
        self.first = self.submit("first", Priority.WRITE)  # stands at the gate: everything else waits

    def submit(self, name: str, priority: Priority, *, size_bytes: int = 0) -> Transfer[str]:
        def work() -> str:
            assert self.gate.wait(10)
            self.done.append(name)
            return name

        return self.queue.submit(priority, work, size_bytes=size_bytes)


def on_device(scenario: Callable[[Device], Coroutine[Any, Any, None]], **knobs: int) -> None:
    async def run(executor: ThreadPoolExecutor) -> None:
        device = Device(executor, **knobs)
        try:
            await scenario(device)
        finally:
            device.gate.set()
            await device.queue.close()

    with ThreadPoolExecutor(1) as executor:
        asyncio.run(run(executor))


def test_a_get_overtakes_a_prefetch_which_overtakes_write_behind() -> None:
    async def scenario(device: Device) -> None:
        names = ("write 1", "prefetch 1", "get 1", "write 2", "prefetch 2", "get 2")
        waiting = [device.submit(name, Priority[name.split()[0].upper()]) for name in names]
        device.gate.set()
        await asyncio.gather(*(transfer.done for transfer in waiting))
        expected = ["get 1", "get 2", "prefetch 1", "prefetch 2", "write 1", "write 2"]
        assert device.done == ["first", *expected]

    on_device(scenario)


@pytest.mark.parametrize(("other", "of_its_own"), [(Priority.PREFETCH, 1), (Priority.GET, 4)])
def test_writes_that_wait_have_a_share_of_the_bytes(other: Priority, of_its_own: int) -> None:
    """Half of the device beside prefetches, a fifth beside Gets, however many of these come."""

    async def scenario(device: Device) -> None:
        waiting = [device.submit("write", Priority.WRITE, size_bytes=200) for _ in range(10)]
        waiting += [device.submit("other", other, size_bytes=100) for _ in range(200)]
        device.gate.set()
        await asyncio.gather(*(transfer.done for transfer in waiting))
        one_round = ["other"] * 2 * of_its_own + ["write"]
        assert device.done[1:] == one_round * 10 + ["other"] * (200 - 20 * of_its_own)

    on_device(scenario, waiting_max=1000)


def test_the_share_is_not_saved_up_while_nothing_waits_to_be_written() -> None:
    async def scenario(device: Device) -> None:
        before = [device.submit("other", Priority.PREFETCH, size_bytes=100) for _ in range(5)]
        device.gate.set()
        await asyncio.gather(*(transfer.done for transfer in before))
        device.gate.clear()
        first = device.submit("first", Priority.GET)
        writes = [device.submit("write", Priority.WRITE, size_bytes=100) for _ in range(2)]
        others = [device.submit("other", Priority.PREFETCH, size_bytes=100) for _ in range(2)]
        device.gate.set()
        await asyncio.gather(*(transfer.done for transfer in (first, *writes, *others)))
        assert device.done[-4:] == ["other", "write", "other", "write"]

    on_device(scenario)


def test_a_prefetch_that_a_get_joins_becomes_as_urgent_and_runs_once() -> None:
    async def scenario(device: Device) -> None:
        prefetch = device.submit("prefetch", Priority.PREFETCH)
        get = device.submit("get", Priority.GET)
        joined = device.submit("joined", Priority.PREFETCH)
        device.queue.hurry(joined, Priority.GET)
        device.gate.set()
        await asyncio.gather(prefetch.done, get.done, joined.done)
        assert device.done == ["first", "get", "joined", "prefetch"]

    on_device(scenario)


def test_what_has_not_started_can_be_cancelled_and_is_never_run() -> None:
    async def scenario(device: Device) -> None:
        cancelled, kept = device.submit("cancelled", Priority.GET), device.submit("kept", Priority.WRITE)
        assert device.queue.cancel(cancelled)
        assert not device.queue.cancel(cancelled)
        assert not device.queue.cancel(device.first), "it runs"
        assert device.queue.waiting == 1
        device.gate.set()
        assert await kept.done == "kept"
        assert cancelled.done.cancelled()
        assert device.done == ["first", "kept"]

    on_device(scenario)


def test_no_more_may_wait_than_the_bound() -> None:
    async def scenario(device: Device) -> None:
        for name in ("a", "b"):
            device.submit(name, Priority.GET)
        with pytest.raises(Overloaded, match="2 transfers are waiting"):
            device.submit("c", Priority.GET)

    on_device(scenario, waiting_max=2)


def test_its_depth_is_told_by_priority() -> None:
    async def scenario(device: Device) -> None:
        device.submit("a", Priority.GET)
        hurried = device.submit("b", Priority.PREFETCH)
        device.queue.hurry(hurried, Priority.GET)
        device.queue.cancel(device.submit("c", Priority.PREFETCH))
        device.submit("d", Priority.PREFETCH)
        assert device.queue.depths() == {
            Priority.GET: Depth(waiting=2, running=0),
            Priority.PREFETCH: Depth(waiting=1, running=0),
            Priority.WRITE: Depth(waiting=0, running=1),
        }

    on_device(scenario)


def test_a_device_that_fails_ends_everything_that_waits_at_once() -> None:
    async def scenario(device: Device) -> None:
        waiting = [device.submit(str(number), Priority.GET) for number in range(3)]
        device.queue.fail_waiting(OSError("broken"))
        for transfer in waiting:
            with pytest.raises(OSError, match="broken"):
                await transfer.done
        assert device.queue.waiting == 0
        device.gate.set()
        assert await device.first.done == "first"
        assert await device.submit("later", Priority.GET).done == "later"

    on_device(scenario)


def test_where_the_loop_ends_in_the_middle_nothing_more_is_started() -> None:
    async def scenario(device: Device) -> None:
        waiting = device.submit("never", Priority.GET)
        (running,) = asyncio.all_tasks() - {asyncio.current_task()}
        running.cancel()  # as the end of asyncio.run does
        await asyncio.wait([running])
        assert not waiting.is_started
        assert device.queue.waiting == 1

    on_device(scenario)
