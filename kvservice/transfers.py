"""transfers: bounded, prioritised movement between tiers, one queue per device.

A transfer is a blocking piece of work for a thread (read these blocks, write that batch). The
queue starts the most urgent first, at most `depth` at a time, refuses more than its bound, lets a
waiting one be made more urgent or cancelled, and never loses one: every transfer ends with its
result, its error, or cancelled. State lives on the event loop.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from enum import IntEnum
from typing import Generic, TypeVar

from kvservice.errors import Overloaded
from kvservice.tiers import Depth

Result = TypeVar("Result")


class Priority(IntEnum):
    """Smaller starts first."""

    GET = 0
    PREFETCH = 1
    WRITE = 2


class Transfer(Generic[Result]):
    """One queued piece of work; `done` resolves to its result."""

    __slots__ = ("done", "is_started", "priority", "size_bytes", "urgency", "work")

    def __init__(
        self,
        priority: Priority,
        work: Callable[[], Result],
        done: asyncio.Future[Result],
        *,
        urgency: float,
        size_bytes: int,
    ) -> None:
        self.priority = priority
        self.urgency = urgency
        self.size_bytes = size_bytes
        self.work = work
        self.done = done
        self.is_started = False


class TransferQueue:
    """The transfers of one device."""

    def __init__(self, executor: Executor, *, depth: int, waiting_max: int) -> None:
        """Args:
        executor: has at least `depth` threads for this queue.
        depth: how many run at once.
        waiting_max: bound on transfers that have not started.
        """
        self._executor = executor
        self._depth = depth
        self._waiting_max = waiting_max
        self._heap: list[tuple[Priority, float, int, Transfer[object]]] = []
        self._order = 0
        self._waiting = 0
        self._running: set[asyncio.Task[None]] = set()
        self._started: set[Transfer[object]] = set()

    @property
    def waiting(self) -> int:
        """Transfers that have not started."""
        return self._waiting

    @property
    def running(self) -> int:
        """Transfers under way."""
        return len(self._running)

    def submit(
        self, priority: Priority, work: Callable[[], Result], *, urgency: float = 0.0, size_bytes: int = 0
    ) -> Transfer[Result]:
        """Queue a piece of work.

        Args:
            urgency: among waiting ones of the same priority the smallest starts first; among equals the first come.
            size_bytes: what it moves, for `bytes_before`.

        Raises:
            Overloaded: as many are waiting as may.
        """
        if self._waiting >= self._waiting_max:
            raise Overloaded(f"{self._waiting_max} transfers are waiting for this device")
        transfer: Transfer[Result] = Transfer(
            priority, work, asyncio.get_running_loop().create_future(), urgency=urgency, size_bytes=size_bytes
        )
        self._waiting += 1
        self._push(transfer)
        self._start_more()
        return transfer

    def hurry(self, transfer: Transfer[Result], priority: Priority) -> None:
        """Somebody more urgent wants a waiting transfer too."""
        if not transfer.is_started and not transfer.done.done() and priority < transfer.priority:
            transfer.priority = priority
            self._push(transfer)  # its older entry is passed over

    def reorder(self, transfer: Transfer[Result], urgency: float) -> None:
        """A waiting transfer is more or less urgent than it was, among those of its priority."""
        if not transfer.is_started and not transfer.done.done() and urgency != transfer.urgency:
            transfer.urgency = urgency
            self._push(transfer)  # its older entry is passed over

    def bytes_before(self, priority: Priority) -> int:
        """What moves before a transfer of that priority submitted now would start; O(waiting)."""
        running = sum(transfer.size_bytes for transfer in self._started)
        waiting = {
            id(transfer): transfer.size_bytes
            for _, _, _, transfer in self._heap
            if not transfer.is_started and not transfer.done.done() and transfer.priority <= priority
        }
        return running + sum(waiting.values())

    def cancel(self, transfer: Transfer[Result]) -> bool:
        """Cancel a transfer that has not started; whether it did."""
        if transfer.is_started or transfer.done.done():
            return False
        transfer.done.cancel()
        self._waiting -= 1
        return True

    def depths(self) -> dict[Priority, Depth]:
        """How many transfers of each priority wait and run. For any thread; O(waiting)."""
        queued = {id(transfer): transfer for *_, transfer in list(self._heap)}.values()
        waiting = Counter(
            transfer.priority for transfer in queued if not transfer.is_started and not transfer.done.done()
        )
        running = Counter(transfer.priority for transfer in list(self._started))
        return {priority: Depth(waiting[priority], running[priority]) for priority in Priority}

    def fail_waiting(self, error: BaseException) -> None:
        """The device does not work: everything that has not started ends with this error."""
        for *_, transfer in self._heap:
            if not transfer.is_started and not transfer.done.done():
                transfer.done.set_exception(error)
        self._heap.clear()
        self._waiting = 0

    async def close(self) -> None:
        """Cancel what waits, wait for what runs."""
        for _, _, _, transfer in self._heap:
            self.cancel(transfer)
        if self._running:
            await asyncio.wait(self._running)

    def _push(self, transfer: Transfer[Result]) -> None:
        self._order += 1
        heapq.heappush(self._heap, (transfer.priority, transfer.urgency, self._order, transfer))  # type: ignore[misc]

    def _start_more(self) -> None:
        while len(self._running) < self._depth and self._heap:
            priority, urgency, _, transfer = heapq.heappop(self._heap)
            is_current = (priority, urgency) == (transfer.priority, transfer.urgency)
            if transfer.is_started or transfer.done.done() or not is_current:
                continue
            transfer.is_started = True
            self._started.add(transfer)
            self._waiting -= 1
            task = asyncio.create_task(self._run(transfer))
            self._running.add(task)

    async def _run(self, transfer: Transfer[object]) -> None:
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._executor, transfer.work)
        except Exception as error:  # noqa: BLE001  # whoever waits for the transfer gets it
            if not transfer.done.done():
                transfer.done.set_exception(error)
        else:
            if not transfer.done.done():
                transfer.done.set_result(result)
        # Not where this is cancelled: then the loop is ending, and what were started now would never run.
        task = asyncio.current_task()
        assert task is not None
        self._running.discard(task)
        self._started.discard(transfer)
        self._start_more()
