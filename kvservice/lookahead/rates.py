"""How fast a device is, from what it did lately."""

from __future__ import annotations

_HALF_LIFE_S = 5.0  # of busy time: an older measurement counts half
_FORGOTTEN_S = 60.0  # of any time: nothing that ended longer ago says how fast the device is now


class Throughput:
    """Bytes per second of a device while it had something to do, and what is still before it."""

    def __init__(self) -> None:
        self.pending_bytes = 0
        """Begun and not ended."""
        self._pending = 0
        self._since_s = 0.0
        self._ended_s = float("-inf")
        self._bytes = 0.0
        self._seconds = 0.0

    @property
    def bytes_per_s(self) -> float:
        """The measured rate; 0.0: nothing was measured yet."""
        return self._bytes / self._seconds if self._seconds > 0 else 0.0

    @property
    def wait_s(self) -> float:
        """How long the device needs for what it has been given already; 0.0 where its rate is unknown."""
        rate = self.bytes_per_s
        return self.pending_bytes / rate if rate else 0.0

    def is_current(self, now_s: float) -> bool:
        """Whether the rate was measured lately."""
        return self.bytes_per_s > 0 and now_s - self._ended_s <= _FORGOTTEN_S

    def began(self, size_bytes: int, now_s: float) -> None:
        """The device was given a piece of work."""
        if not self._pending:
            self._since_s = now_s
        self._pending += 1
        self.pending_bytes += size_bytes

    def ended(self, size_bytes: int, moved_bytes: int, now_s: float) -> None:
        """A piece of `size_bytes` ended and moved so many of them; fewer if it failed or was cancelled."""
        self._pending -= 1
        self.pending_bytes -= size_bytes
        elapsed_s, self._since_s = max(0.0, now_s - self._since_s), now_s
        kept = 0.5 ** (elapsed_s / _HALF_LIFE_S) if self.is_current(now_s) or not moved_bytes else 0.0
        self._bytes = self._bytes * kept + moved_bytes
        self._seconds = self._seconds * kept + elapsed_s
        if moved_bytes:
            self._ended_s = now_s
