"""A bound on a directory's bandwidth, for devices that are shared with others."""

from __future__ import annotations

import threading
import time

_BURST_S = 0.05  # so much of the bandwidth may be used at once after a pause


class Throttle:
    """Makes threads wait so that together they move no more than so many bytes per second."""

    def __init__(self, bytes_per_s_max: int) -> None:
        """`bytes_per_s_max` of 0: no bound."""
        self._bytes_per_s_max = bytes_per_s_max
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def wait(self, size_bytes: int) -> None:
        """Before moving so many bytes. Blocks."""
        if not self._bytes_per_s_max:
            return
        with self._lock:
            now_s = time.monotonic()
            self._free_at_s = max(self._free_at_s, now_s - _BURST_S) + size_bytes / self._bytes_per_s_max
            wait_s = self._free_at_s - now_s
        if wait_s > 0:
            time.sleep(wait_s)
