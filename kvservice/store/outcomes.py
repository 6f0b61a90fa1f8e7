"""What the store answers: per-block outcomes as runs, so that a thousand equal ones are one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import DropReason, NamespaceSpec, Rows, Slots, Tier
from kvservice.dram import SlotPool
from kvservice.lookahead import LoadPlan
from kvservice.store.arrivals import Arrival


class Miss(Enum):
    """Why a block was not handed out."""

    NOT_HELD = "not_held"
    BEING_WRITTEN = "being_written"
    PREFIX_MISSING = "prefix_missing"
    OVER_LIMIT = "over_limit"
    CORRUPT = "corrupt"
    TIER_OFFLINE = "tier_offline"
    OTHER_SESSION = "other_session"
    """The blocks are another session's own, or the caller does not rotate keys."""


class Written(Enum):
    """Why there is nothing to write for a block of a Put, or why it may not be."""

    HELD = "held"
    BEING_WRITTEN = "being_written"
    PARENT_MISSING = "parent_missing"
    OTHER_SESSION = "other_session"


class Committed(Enum):
    """What Commit did to a block; a DropReason where it was gone."""

    PUBLISHED = "published"
    AWAITING_PARENT = "awaiting_parent"


def runs(outcomes: Iterable[Committed | DropReason]) -> list[tuple[int, Committed | DropReason]]:
    """Equal neighbours as one: (blocks, outcome)."""
    return [(sum(1 for _ in group), outcome) for outcome, group in groupby(outcomes)]


@dataclass(frozen=True, slots=True)
class Looked:
    """Lookup: of `blocks`, `hit_blocks` lead, `dram_blocks` of those in DRAM; then misses for `miss`."""

    dram_blocks: int
    hit_blocks: int
    blocks: int
    miss: Miss
    shifts: Sequence[int] = ()
    """See Granted."""


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """PlanLoad: what Lookup would say, and how much of it to load."""

    looked: Looked
    plan: LoadPlan


@dataclass(frozen=True, slots=True)
class Granted:
    """Get: the leading `slots` are leased (hold 0: none), `missed` blocks follow.

    `pending` has the blocks that are still being read, by position; their slots hold no bytes yet.
    """

    hold_id: int
    duration_s: float
    pool: SlotPool
    rows: Rows
    """Those that have the blocks' bytes."""
    slots: Slots
    pending: Mapping[int, Arrival]
    from_nvme: NDArray[np.bool_]
    """Which of the slots' blocks had to be read from NVMe, or were being read."""
    missed: int
    miss: Miss
    shifts: Sequence[int] = ()
    """By how many tokens each block's keys must be rotated; empty: none of them."""

    @property
    def asked(self) -> int:
        """Blocks asked for."""
        return len(self.slots) + self.missed


@dataclass(frozen=True, slots=True)
class KeptRun:
    """Truncate: `blocks` from `first_block` of the former chain on stay, at places from `new_first_block` on."""

    first_block: int
    blocks: int
    new_first_block: int


@dataclass(frozen=True, slots=True)
class Truncated:
    """Truncate: what stays of the chain's `chain_blocks`; the leading `held_blocks` of it can be read now.

    `miss` says why the next one cannot.
    """

    chain_blocks: int
    kept: Sequence[KeptRun]
    held_blocks: int
    miss: Miss


@dataclass(frozen=True, slots=True)
class Prefetched:
    """Prefetch: blocks that lead in DRAM, that are on their way, and that are misses."""

    dram_blocks: int
    started_blocks: int
    missed: int
    miss: Miss


@dataclass(frozen=True, slots=True)
class Reserved:
    """Put: `known` outcomes of leading blocks as runs, then `slots` to write."""

    hold_id: int
    duration_s: float
    known: list[tuple[int, Written]]
    pool: SlotPool
    slots: Slots


@dataclass(frozen=True, slots=True)
class Renewed:
    """Renew: how long the holds now last."""

    duration_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """Release: holds that were live, and that had expired."""

    live: int
    expired: int


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Forget: blocks dropped, and how many of them are still leased."""

    dropped: int
    in_use: int


@dataclass(frozen=True, slots=True)
class Held:
    """Explain: the block is a hit."""

    tiers: tuple[Tier, ...]
    depth: int
    children: int
    idle_s: float
    uses: int
    holders: int
    is_checksummed: bool


@dataclass(frozen=True, slots=True)
class Offline:
    """Explain: held on a tier that cannot be read now."""

    tier: Tier
    why: str


@dataclass(frozen=True, slots=True)
class BeingStored:
    """Explain: reserved, or committed and waiting for the block before it."""

    age_s: float
    is_written: bool


@dataclass(frozen=True, slots=True)
class Dropped:
    """Explain: it was here."""

    reason: DropReason
    ago_s: float
    idle_s: float


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Explain: not in this namespace, but in others of the tenant."""

    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NotRemembered:
    """Explain: never stored, or dropped before the horizon."""

    history_blocks: int
    horizon_s: float


Finding = Held | Offline | BeingStored | Dropped | Elsewhere | NotRemembered


@dataclass(frozen=True, slots=True)
class Explanation:
    """One namespace's finding; `spec` is None where no namespace knows the hash."""

    spec: NamespaceSpec | None
    finding: Finding = field(default_factory=lambda: NotRemembered(0, 0.0))
