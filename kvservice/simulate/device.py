"""device: a disk with one bandwidth, serving the most urgent transfer first, one at a time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kvservice.transfers import Priority


@dataclass(slots=True, eq=False)
class SimulatedTransfer:
    """So many bytes that somebody waits for."""

    priority: Priority
    order: float
    size_bytes: int
    on_done: Callable[[float], None]
    """Called with the time at which it ended."""
    is_started: bool = False
    is_cancelled: bool = False


class Device:
    """The queue of `transfers`, in simulated time: Gets before prefetches (by their order) before writes."""

    def __init__(self, bytes_per_s: float, *, at: Callable[[float, Callable[[float], None]], None]) -> None:
        """Args:
        at: calls something back at a time.
        """
        self.bytes_per_s = bytes_per_s
        self._at = at
        self._heap: list[tuple[Priority, float, int, SimulatedTransfer]] = []
        self._number = 0
        self._is_busy = False

    def submit(self, transfer: SimulatedTransfer, now_s: float) -> None:
        """Queue a transfer."""
        self._push(transfer)
        self._start(now_s)

    def hurry(self, transfer: SimulatedTransfer, priority: Priority, order: float) -> None:
        """A waiting transfer is more, or less, urgent now."""
        if not transfer.is_started and not transfer.is_cancelled and priority <= transfer.priority:
            transfer.priority, transfer.order = priority, order
            self._push(transfer)  # its older entry is passed over

    def cancel(self, transfer: SimulatedTransfer) -> bool:
        """Cancel a transfer that has not started; whether it had not."""
        transfer.is_cancelled = not transfer.is_started
        return transfer.is_cancelled

    def _push(self, transfer: SimulatedTransfer) -> None:
        self._number += 1
        heapq.heappush(self._heap, (transfer.priority, transfer.order, self._number, transfer))

    def _start(self, now_s: float) -> None:
        while self._heap and not self._is_busy:
            priority, order, _, transfer = heapq.heappop(self._heap)
            if transfer.is_started or transfer.is_cancelled or (priority, order) != (transfer.priority, transfer.order):
                continue
            transfer.is_started = self._is_busy = True
            self._at(now_s + transfer.size_bytes / self.bytes_per_s, partial(self._ended, transfer))

    def _ended(self, transfer: SimulatedTransfer, now_s: float) -> None:
        self._is_busy = False
        transfer.on_done(now_s)
        self._start(now_s)
