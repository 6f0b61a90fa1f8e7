"""tiers: what every memory or disk level says of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TierUsage:
    """How full a tier is, in bytes; `state` is "online" or "offline: why"."""

    capacity_bytes: int
    used_bytes: int
    state: str
