"""Whether a disk can be used: what takes it offline, or for writing only, and when it is tried again. Says so once.

State::

    RECOVERING --recovered--> ONLINE --a write fails--> READ_ONLY
                                 |  <--probe succeeds--'   |
                                 '--a read fails, is far---'--> OFFLINE --probe succeeds--> ONLINE
                                    too slow, or the directory is gone

On the event loop; only `working` is entered by threads.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum

from kvservice.logs import event_log

_SLOW_FACTOR = 100.0
_SLOW_S_MIN = 2.0
_STALLED_S = 30.0
_SMOOTHING = 0.1
_PROBE_INTERVAL_S = 5.0
_PROBE_INTERVAL_S_MAX = 300.0
_RELAPSE_S = 60.0

_log = event_log(__name__)

Identity = tuple[int, int]
"""Device and inode of a file."""


class DiskState(Enum):
    """What a disk can be used for."""

    RECOVERING = "recovering"
    ONLINE = "online"
    READ_ONLY = "read-only"
    OFFLINE = "offline"


class Place(Enum):
    """What is at a directory's path."""

    OURS = "ours"
    ANOTHER = "another"  # on the same file system: somebody emptied or replaced it


class Health:
    """One disk's. Everything but `working` belongs to the event loop."""

    def __init__(self, directory: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = DiskState.RECOVERING
        self.why = ""
        self.is_recovered = False
        """Whether the books know what is on the disk; one that failed to say so begins anew when it comes back."""
        self.on_offline: set[Callable[[], None]] = set()
        """Called when it goes offline: whoever waits for it need not wait any longer."""
        self._directory = directory
        self._clock = clock
        self._identity = identity_of(directory)
        self._usual_s_per_byte = 0.0
        self._working: dict[object, tuple[float, int]] = {}
        self._probe_at_s = 0.0
        self._probe_interval_s = _PROBE_INTERVAL_S
        self._came_back_at_s = float("-inf")

    @property
    def can_read(self) -> bool:
        """Whether its blocks can be had."""
        return self.state in (DiskState.ONLINE, DiskState.READ_ONLY)

    @property
    def can_write(self) -> bool:
        """Whether it takes blocks."""
        return self.state is DiskState.ONLINE

    def recovered(self) -> None:
        """What is on it is known."""
        self.is_recovered = True
        self.state, self.why = DiskState.ONLINE, ""

    def fail(self, why: str) -> None:
        """Nothing can be had from it."""
        if self.state is not DiskState.OFFLINE:
            self._turn(DiskState.OFFLINE, why)
            _log.error("nvme_offline", directory=self._directory, why=why)
            for tell in list(self.on_offline):
                tell()

    def refuse_writes(self, why: str) -> None:
        """It takes no more blocks (full, worn out, a quota); those that it has can be read."""
        if self.state is DiskState.ONLINE:
            self._turn(DiskState.READ_ONLY, why)
            _log.error("nvme_read_only", directory=self._directory, why=why)

    def come_back(self) -> None:
        """It works again."""
        self.state, self.why = DiskState.ONLINE, ""
        self._usual_s_per_byte = 0.0
        self._came_back_at_s = self._clock()
        _log.info("nvme_online", directory=self._directory)

    # ------------------------------------------------------------------- speed

    @contextmanager
    def working(self, size_bytes: int) -> Iterator[None]:
        """Around an access to the device, in the thread that makes it. `size_bytes`: 0 where no rate is usual."""
        token = object()
        self._working[token] = (self._clock(), size_bytes)
        try:
            yield
        finally:
            del self._working[token]

    def took(self, seconds: float, size_bytes: int) -> None:
        """A read of so many bytes took so long; one far slower than usual takes the disk offline."""
        if not size_bytes:
            return
        if seconds > self._bearable_s(size_bytes):
            self._too_slow(seconds)
            return
        rate, usual = seconds / size_bytes, self._usual_s_per_byte
        # A slow one counts as twice the usual: it must not make slowness usual.
        self._usual_s_per_byte = usual + _SMOOTHING * (min(rate, 2 * usual) - usual) if usual else rate

    def watch(self) -> None:
        """What is still under way counts too: a device that hangs ends nothing."""
        hanging_s = self.hanging_s
        if hanging_s:
            self._too_slow(hanging_s)

    @property
    def hanging_s(self) -> float:
        """How long the longest access has been under way, if that is longer than bearable; else 0.0."""
        now_s = self._clock()
        under_way = [(now_s - started_s, size_bytes) for started_s, size_bytes in list(self._working.values())]
        return max(
            (seconds for seconds, size_bytes in under_way if seconds > self._bearable_s(size_bytes)), default=0.0
        )

    def _bearable_s(self, size_bytes: int) -> float:
        usual_s = self._usual_s_per_byte * size_bytes
        return max(_SLOW_S_MIN, _SLOW_FACTOR * usual_s) if usual_s else _STALLED_S

    def _too_slow(self, seconds: float) -> None:
        self.fail(f"an access took {seconds:.1f} s, more than {_SLOW_FACTOR:.0f} times as long as usual")

    # ----------------------------------------------------------------- probing

    def place(self) -> Place:
        """What is at the directory's path. Blocks.

        Raises:
            OSError: nothing, or another file system: writing there would fill one that was never meant.
        """
        if os.stat(self._directory).st_dev != self._identity[0]:
            raise OSError(errno.ENODEV, "another file system is there: is the device mounted?")
        try:
            return Place.OURS if identity_of(self._directory) == self._identity else Place.ANOTHER
        except FileNotFoundError:
            return Place.ANOTHER

    def look(self) -> None:
        """Take note of the directory as it is now: it was opened anew. Blocks. Raises OSError."""
        self._identity = identity_of(self._directory)

    @property
    def is_probe_due(self) -> bool:
        """Whether to try a disk that failed."""
        return self.state in (DiskState.OFFLINE, DiskState.READ_ONLY) and self._clock() >= self._probe_at_s

    def probe_failed(self, why: str) -> None:
        """It does not work yet; try less often."""
        self.why = f"{self.why.split('; probe: ')[0]}; probe: {why}"
        self._probe_interval_s = min(2 * self._probe_interval_s, _PROBE_INTERVAL_S_MAX)
        self._probe_at_s = self._clock() + self._probe_interval_s

    def _turn(self, state: DiskState, why: str) -> None:
        # One that passes its probes and fails again (a full disk has room for a page) is tried less and less often.
        has_relapsed = self._clock() - self._came_back_at_s < _RELAPSE_S
        interval_s = 2 * self._probe_interval_s if has_relapsed else _PROBE_INTERVAL_S
        self._probe_interval_s = min(interval_s, _PROBE_INTERVAL_S_MAX)
        self._probe_at_s = self._clock() + self._probe_interval_s
        self.state, self.why = state, why


def identity_of(directory: str) -> Identity:
    """What tells this directory from another one of the same name. Blocks. Raises OSError."""
    status = os.stat(os.path.join(directory, "LOCK"))
    return status.st_dev, status.st_ino
