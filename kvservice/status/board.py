"""What the page shows: frozen lines, and a bounded ring of counts for the last hour.

The event loop publishes, HTTP threads read: what is published never changes, so nobody waits for anybody, and a
loop that is stuck still has a page, which says how old it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

HOUR_S = 3600.0
SAMPLE_S = 60.0
SAMPLES_MAX = int(HOUR_S / SAMPLE_S)
INSTANCES_MAX = 32
NAMESPACES_MAX = 32


@dataclass(frozen=True, slots=True)
class HitCounts:
    """Blocks that Gets asked for since the daemon started, by what became of them."""

    dram: int = 0
    nvme: int = 0
    misses: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """By reason, as in the contract."""

    @property
    def missed(self) -> int:
        """Misses, whatever the reason."""
        return sum(self.misses.values())

    @property
    def requested(self) -> int:
        """All that was asked for."""
        return self.dram + self.nvme + self.missed

    def since(self, earlier: HitCounts) -> HitCounts:
        """What came after `earlier`."""
        misses = {reason: count - earlier.misses.get(reason, 0) for reason, count in self.misses.items()}
        return HitCounts(self.dram - earlier.dram, self.nvme - earlier.nvme, MappingProxyType(misses))


@dataclass(frozen=True, slots=True)
class Sample:
    """The counts of one minute that began `at_s` (monotonic)."""

    at_s: float
    counts: HitCounts


@dataclass(frozen=True, slots=True)
class TierLine:
    """One tier; `state` is "online" or says what is wrong."""

    name: str
    state: str
    capacity_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class InstanceLine:
    """One attached engine process. The name is its own choice."""

    instance_id: int
    name: str
    attached_s: float
    leases: int
    reservations: int


@dataclass(frozen=True, slots=True)
class NamespaceLine:
    """One namespace. The label is an engine's choice; nothing else of it identifies a tenant or a prompt."""

    label: str
    blocks: int
    dram_bytes: int
    requested_blocks: int
    hit_blocks: int


@dataclass(frozen=True, slots=True)
class MissLine:
    """One Get that did not get all it asked for, and why the first missing block was missing."""

    at_s: float
    instance_id: int
    label: str
    missed_blocks: int
    requested_blocks: int
    reason: str


@dataclass(frozen=True, slots=True)
class Status:
    """All that the page shows, as of `at_s` (monotonic)."""

    at_s: float
    state: str
    version: str
    uptime_s: float
    tiers: Sequence[TierLine]
    instances: Sequence[InstanceLine]
    instances_attached: int
    """May be more than there are lines."""
    namespaces: Sequence[NamespaceLine]
    namespaces_known: int
    counts: HitCounts
    """Since the daemon started."""
    misses: Sequence[MissLine]
    """Newest first."""


class Board:
    """The latest status, and the minutes of the last hour."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._closed: deque[tuple[float, HitCounts]] = deque(maxlen=SAMPLES_MAX + 1)  # start of a minute, counts then
        self._latest: tuple[Status, tuple[Sample, ...]] | None = None

    @property
    def latest(self) -> tuple[Status, tuple[Sample, ...]] | None:
        """The status, and its minutes, oldest first; None before the first was published. For any thread."""
        return self._latest

    def publish(self, status: Status) -> None:
        """Show this from now on. On the event loop."""
        if not self._closed or status.at_s - self._closed[-1][0] >= SAMPLE_S:
            self._closed.append((status.at_s, status.counts))
        while status.at_s - self._closed[0][0] > HOUR_S and len(self._closed) > 1:
            self._closed.popleft()
        starts = list(self._closed)
        ends = [counts for _, counts in starts[1:]] + [status.counts]
        minutes = tuple(Sample(at_s, later.since(counts)) for (at_s, counts), later in zip(starts, ends, strict=True))
        self._latest = status, minutes
