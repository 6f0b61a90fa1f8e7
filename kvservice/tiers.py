"""tiers: what a memory or disk level promises to the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvservice.blocks import Tier


@dataclass(frozen=True, slots=True)
class TierUsage:
    """How full a tier is, in bytes; `state` is "online" or "offline: why"."""

    capacity_bytes: int
    used_bytes: int
    state: str


class BlockTier(Protocol):
    """A place that keeps blocks' bytes: bounded, and honest about its state."""

    tier: Tier

    def usage(self) -> TierUsage:
        """Occupancy now. Never blocks."""
        ...

    def close(self) -> None:
        """Give everything back. Blocks until no byte moves any more."""
        ...
