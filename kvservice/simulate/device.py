"""device: a disk with one bandwidth, serving one transfer at a time in the daemon's order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kvservice.transfers import Priority, Turns


@dataclass(slots=True, eq=False)
class SimulatedTransfer:
    """So many bytes that somebody waits for."""

    priority: Priority
    urgency: float
    size_bytes: int
    on_done: Callable[[float], None]
    """Called with the time at which it ended."""
    is_started: bool = False
    is_cancelled: bool = False

    @property
    def is_waiting(self) -> bool:
        """Neither started nor cancelled."""
        return not self.is_started and not self.is_cancelled


class Device:
    """The queue of `transfers`, in simulated time."""

    def __init__(self, bytes_per_s: float, *, at: Callable[[float, Callable[[float], None]], None]) -> None:
        """Args:
        at: calls something back at a time.
        """
        self.bytes_per_s = bytes_per_s
        self._at = at
        self._turns: Turns[SimulatedTransfer] = Turns()
        self._running_bytes = 0

    def submit(self, transfer: SimulatedTransfer, now_s: float) -> None:
        """Queue a transfer."""
        self._turns.push(transfer)
        self._start(now_s)

    def hurry(self, transfer: SimulatedTransfer, priority: Priority, urgency: float) -> None:
        """A waiting transfer is more, or less, urgent now."""
        if transfer.is_waiting and priority <= transfer.priority:
            transfer.priority, transfer.urgency = priority, urgency
            self._turns.push(transfer)

    def wait_s(self, priority: Priority) -> float:
        """How long a transfer of that priority waits that is submitted now, as the daemon reckons it."""
        waiting = sum(one.size_bytes for one in self._turns.waiting() if one.priority <= priority)
        return (waiting + self._running_bytes) / self.bytes_per_s

    def cancel(self, transfer: SimulatedTransfer) -> bool:
        """Cancel a transfer that has not started; whether it had not."""
        transfer.is_cancelled = not transfer.is_started
        return transfer.is_cancelled

    def _start(self, now_s: float) -> None:
        if not self._running_bytes and self._turns:
            transfer = self._turns.take()
            transfer.is_started, self._running_bytes = True, transfer.size_bytes
            self._at(now_s + transfer.size_bytes / self.bytes_per_s, partial(self._ended, transfer))

    def _ended(self, transfer: SimulatedTransfer, now_s: float) -> None:
        self._running_bytes = 0
        transfer.on_done(now_s)
        self._start(now_s)
