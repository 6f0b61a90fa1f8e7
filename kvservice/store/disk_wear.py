"""How fast a device is worn out: its size written how often a day, since the start and lately."""

from __future__ import annotations

from collections import deque

WINDOW_S = 3600.0
"""What "lately" means."""

_SAMPLE_S = 60.0
_DAY_S = 86_400.0


class Wear:
    """Drive writes per day of one device. Pure: bytes written and the time are arguments.

    Args:
        device_bytes: size of the file system, which stands for that of the drive.
    """

    def __init__(self, device_bytes: int, now_s: float) -> None:
        self._device_bytes = device_bytes
        self._started_at_s = now_s
        self._samples: deque[tuple[float, int]] = deque([(now_s, 0)])

    def note(self, written_bytes: int, now_s: float) -> None:
        """So many bytes were written since the start. To be called every now and then."""
        if now_s - self._samples[-1][0] >= _SAMPLE_S:
            self._samples.append((now_s, written_bytes))
        # The oldest kept is the youngest that is at least a window old: the window is never shorter.
        while len(self._samples) > 1 and now_s - self._samples[1][0] >= WINDOW_S:
            self._samples.popleft()

    def per_day(self, written_bytes: int, now_s: float) -> float:
        """Drive writes per day since the start."""
        return self._rate(written_bytes, now_s - self._started_at_s)

    def per_day_lately(self, written_bytes: int, now_s: float) -> float:
        """Drive writes per day over the last hour, or since the start where that is less."""
        at_s, earlier_bytes = self._samples[0]
        return self._rate(written_bytes - earlier_bytes, now_s - at_s)

    def _rate(self, written_bytes: int, seconds: float) -> float:
        # A start's first minute says nothing of a day.
        return written_bytes / self._device_bytes * _DAY_S / max(seconds, _SAMPLE_S) if self._device_bytes else 0.0
