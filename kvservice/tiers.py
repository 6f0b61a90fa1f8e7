"""tiers: what every memory or disk level says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierUsage:
    """How full a tier is, in bytes; `state` is "online" or "offline: why"."""

    capacity_bytes: int
    used_bytes: int
    state: str


@dataclass(frozen=True, slots=True)
class Depth:
    """Transfers of one priority: waiting, and under way."""

    waiting: int
    running: int


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """One directory of the NVMe tier: how full, how busy, how worn. Counts and sums since the start."""

    directory: str
    state: str
    """"recovering", "online", "read-only" or "offline"."""
    why: str
    """Why it is not online."""
    capacity_bytes: int
    used_bytes: int
    device_bytes: int
    """Size of its file system."""
    read_bytes: int
    read_s: float
    written_bytes: int
    """Everything, index included."""
    admitted_bytes: int
    """Of blocks that it took."""
    write_s: float
    checksum_failures: int
    writes_per_day: float
    """Drive writes per day since the start: written_bytes over device_bytes."""
    writes_per_day_lately: float
    """Over the last hour."""
    depths: Mapping[str, Depth]
    """Transfers by priority."""

    @property
    def write_amplification(self) -> float:
        """Bytes written per byte of blocks admitted; 0.0 before the first."""
        return self.written_bytes / self.admitted_bytes if self.admitted_bytes else 0.0
