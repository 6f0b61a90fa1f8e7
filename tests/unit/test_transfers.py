"""transfers: the most urgent first, in the order that the queue has now, and what is before one."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvservice.nvme import Throttle
from kvservice.transfers import Priority, TransferQueue

pytestmark = pytest.mark.unit


def run_behind_a_gate(arrange: Callable[[TransferQueue, Callable[[str], Callable[[], None]]], None]) -> list[str]:
    """What ran in which order on a device of depth one that is busy while `arrange` submits."""
    ran: list[str] = []
    gate = threading.Event()

    async def scenario() -> None:
        with ThreadPoolExecutor(1) as executor:
            queue = TransferQueue(executor, depth=1, waiting_max=100)
            queue.submit(Priority.GET, gate.wait, size_bytes=1)
            arrange(queue, lambda name: lambda: ran.append(name))
            last = queue.submit(Priority.WRITE, lambda: None, urgency=1e9)
            gate.set()
            await last.done
            await queue.close()

    asyncio.run(scenario())
    return ran


def test_urgency_orders_waiting_transfers_of_one_priority() -> None:
    def arrange(queue: TransferQueue, named: Callable[[str], Callable[[], None]]) -> None:
        queue.submit(Priority.PREFETCH, named("second"), urgency=2.0)
        queue.submit(Priority.PREFETCH, named("third"), urgency=2.0)
        queue.submit(Priority.PREFETCH, named("first"), urgency=-1.0)
        queue.submit(Priority.GET, named("get"), urgency=99.0)

    assert run_behind_a_gate(arrange) == ["get", "first", "second", "third"]


def test_a_reordered_transfer_runs_once_in_its_new_place() -> None:
    def arrange(queue: TransferQueue, named: Callable[[str], Callable[[], None]]) -> None:
        first = queue.submit(Priority.PREFETCH, named("was first"), urgency=1.0)
        queue.submit(Priority.PREFETCH, named("was second"), urgency=2.0)
        third = queue.submit(Priority.PREFETCH, named("was third"), urgency=3.0)
        queue.reorder(first, 5.0)
        queue.reorder(third, 0.0)
        queue.reorder(third, 4.0)

    assert run_behind_a_gate(arrange) == ["was second", "was third", "was first"]


def test_what_a_transfer_waits_behind() -> None:
    def arrange(queue: TransferQueue, named: Callable[[str], Callable[[], None]]) -> None:
        queue.submit(Priority.GET, named("get"), size_bytes=10)
        hurried = queue.submit(Priority.PREFETCH, named("hurried"), size_bytes=100)
        gone = queue.submit(Priority.PREFETCH, named("gone"), size_bytes=1000)
        queue.submit(Priority.WRITE, named("write"), size_bytes=10_000)
        queue.hurry(hurried, Priority.GET)
        assert queue.bytes_before(Priority.GET) == 111, "what runs, and each once"
        assert queue.bytes_before(Priority.PREFETCH) == 1111
        queue.cancel(gone)
        assert queue.bytes_before(Priority.PREFETCH) == 111

    assert run_behind_a_gate(arrange) == ["get", "hurried", "write"]


def test_a_throttle_bounds_all_threads_together() -> None:
    throttle = Throttle(10_000_000)
    threads = [threading.Thread(target=throttle.wait, args=(500_000,)) for _ in range(6)]
    started_s = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Less a burst of 50 ms; how much longer depends on the machine.
    assert time.monotonic() - started_s >= 0.25


def test_no_bound_waits_for_nothing() -> None:
    Throttle(0).wait(1 << 60)
