"""transfers: bounded, prioritised movement between tiers, one queue per device.

A transfer is a blocking piece of work for a thread (read these blocks, write that batch). The
queue starts the most urgent first, except that writes which wait have a share of the bytes (`Turns`,
which the simulator uses too), at most `depth` at a time, refuses more than its bound, lets a
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
from typing import Generic, Protocol, TypeVar

from kvservice.errors import Overloaded
from kvservice.tiers import Depth

Result = TypeVar("Result")


class Priority(IntEnum):
    """Smaller starts first."""

    GET = 0
    PREFETCH = 1
    WRITE = 2


_EARNED_BY = {Priority.GET: 0.25, Priority.PREFETCH: 1.0}
"""Bytes that waiting writes may move for each byte that goes before them: a fifth of the device against Gets, half of
it against prefetches. A block that waits to be written keeps its chain in DRAM: without a share, reads that fill the
device end with DRAM full of those, and nothing can be read into it or stored in it any more."""


class Queued(Protocol):
    """What takes turns."""

    priority: Priority
    urgency: float
    """Among those of the same priority the smallest goes first; among equals the first come."""
    size_bytes: int

    @property
    def is_waiting(self) -> bool:
        """Neither started nor cancelled."""
        ...


One = TypeVar("One", bound=Queued)


class Turns(Generic[One]):
    """In which order what waits for one device goes."""

    def __init__(self) -> None:
        self._heaps: dict[Priority, list[tuple[float, int, One]]] = {priority: [] for priority in Priority}
        self._number = 0
        self._earned_bytes = 0.0
        """That waiting writes may move before anything else."""

    def push(self, one: One) -> None:
        """It waits, or waits with another priority or urgency than it did; older entries are passed over."""
        self._number += 1
        heapq.heappush(self._heaps[one.priority], (one.urgency, self._number, one))

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return any(self._has(priority) for priority in Priority)

    def take(self) -> One:
        """Take out whose turn it is; somebody waits. The caller marks it started."""
        waiting = [priority for priority in Priority if self._has(priority)]
        chosen = waiting[0]
        if Priority.WRITE not in waiting or chosen is Priority.WRITE:
            self._earned_bytes = 0.0
        elif 0 < self._earned_bytes >= self._heaps[Priority.WRITE][0][2].size_bytes:
            chosen = Priority.WRITE
            self._earned_bytes -= self._heaps[chosen][0][2].size_bytes
        else:
            self._earned_bytes += _EARNED_BY[chosen] * self._heaps[chosen][0][2].size_bytes
        return heapq.heappop(self._heaps[chosen])[2]

    def waiting(self) -> list[One]:
        """Everything that waits, each once. For any thread; O(waiting)."""
        ones = {id(one): one for heap in self._heaps.values() for *_, one in list(heap)}
        return [one for one in ones.values() if one.is_waiting]

    def clear(self) -> None:
        """Nobody waits any more."""
        for heap in self._heaps.values():
            heap.clear()

    def _has(self, priority: Priority) -> bool:
        """Whether anybody of that priority waits, who is then in front."""
        heap = self._heaps[priority]
        while heap:
            urgency, _, one = heap[0]
            if one.is_waiting and (one.priority, one.urgency) == (priority, urgency):
                return True
            heapq.heappop(heap)
        return False


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

    @property
    def is_waiting(self) -> bool:
        """Neither started nor ended."""
        return not self.is_started and not self.done.done()


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
        self._turns: Turns[Transfer[object]] = Turns()
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
        self._turns.push(transfer)  # type: ignore[arg-type]  # the queue reads no results
        self._start_more()
        return transfer

    def hurry(self, transfer: Transfer[Result], priority: Priority) -> None:
        """Somebody more urgent wants a waiting transfer too."""
        if transfer.is_waiting and priority < transfer.priority:
            transfer.priority = priority
            self._turns.push(transfer)  # type: ignore[arg-type]

    def reorder(self, transfer: Transfer[Result], urgency: float) -> None:
        """A waiting transfer is more or less urgent than it was, among those of its priority."""
        if transfer.is_waiting and urgency != transfer.urgency:
            transfer.urgency = urgency
            self._turns.push(transfer)  # type: ignore[arg-type]

    def bytes_before(self, priority: Priority) -> int:
        """What moves before a transfer of that priority submitted now would start, writes' share aside; O(waiting)."""
        running = sum(transfer.size_bytes for transfer in self._started)
        return running + sum(one.size_bytes for one in self._turns.waiting() if one.priority <= priority)

    def cancel(self, transfer: Transfer[Result]) -> bool:
        """Cancel a transfer that has not started; whether it did."""
        if not transfer.is_waiting:
            return False
        transfer.done.cancel()
        self._waiting -= 1
        return True

    def depths(self) -> dict[Priority, Depth]:
        """How many transfers of each priority wait and run. For any thread; O(waiting)."""
        waiting = Counter(transfer.priority for transfer in self._turns.waiting())
        running = Counter(transfer.priority for transfer in list(self._started))
        return {priority: Depth(waiting[priority], running[priority]) for priority in Priority}

    def fail_waiting(self, error: BaseException) -> None:
        """The device does not work: everything that has not started ends with this error."""
        for transfer in self._turns.waiting():
            transfer.done.set_exception(error)
        self._turns.clear()
        self._waiting = 0

    async def close(self) -> None:
        """Cancel what waits, wait for what runs."""
        for transfer in self._turns.waiting():
            self.cancel(transfer)
        if self._running:
            await asyncio.wait(self._running)

    def _start_more(self) -> None:
        while len(self._running) < self._depth and self._turns:
            transfer = self._turns.take()
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
