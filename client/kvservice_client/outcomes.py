"""What the facade answers: named outcomes, never exceptions for a service failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from kvservice_client import errors


class Status(Enum):
    """How the client stands with its daemon."""

    ATTACHED = "attached"
    RECONNECTING = "reconnecting"
    REFUSED = "refused"  # the daemon is there and said no; see Client.refusal
    FORKED = "forked"
    CLOSED = "closed"


class Reason(Enum):
    """Why an outcome is less than everything that was asked for."""

    OK = "ok"
    NOT_HELD = "not_held"
    BEING_WRITTEN = "being_written"
    PARENT_MISSING = "parent_missing"
    CHANGED = "changed"  # a slot's generation moved while it was copied
    EXPIRED = "expired"
    CAPACITY = "capacity"
    OVERLOADED = "overloaded"
    DRAINING = "draining"
    TIMEOUT = "timeout"
    UNAVAILABLE = "unavailable"
    REFUSED = "refused"
    FORKED = "forked"
    CLOSED = "closed"
    INTERNAL = "internal"
    CORRUPT = "corrupt"
    TIER_OFFLINE = "tier_offline"
    OVER_LIMIT = "over_limit"
    OTHER_SESSION = "other_session"  # a truncated session's own blocks, which the call may not use


# Most derived first.
_BY_ERROR: tuple[tuple[type[errors.KVServiceError], Reason], ...] = (
    (errors.CapacityExhausted, Reason.CAPACITY),
    (errors.Draining, Reason.DRAINING),
    (errors.Overloaded, Reason.OVERLOADED),
    (errors.DeadlineExceeded, Reason.TIMEOUT),
    (errors.ForkedClient, Reason.FORKED),
    (errors.LeaseExpired, Reason.EXPIRED),
    (errors.ReservationLost, Reason.EXPIRED),
    (errors.LeaseUnknown, Reason.EXPIRED),
    (errors.LayoutMismatch, Reason.REFUSED),
    (errors.PermissionDenied, Reason.REFUSED),
    (errors.InternalError, Reason.INTERNAL),
)


def reason_of(error: errors.KVServiceError) -> Reason:
    """The reason that stands for an error."""
    for kind, reason in _BY_ERROR:
        if isinstance(error, kind):
            return reason
    return Reason.UNAVAILABLE


@dataclass(frozen=True, slots=True)
class LookupResult:
    """Lookup: how many leading blocks are held, and of these how many lead in DRAM."""

    blocks: int = 0
    dram_blocks: int = 0
    reason: Reason = Reason.OK


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Plan: how many leading blocks to load, of those held; the rest is better recomputed."""

    blocks: int = 0
    held_blocks: int = 0
    dram_blocks: int = 0
    """Of those held, how many lead in DRAM."""
    load_s: float = 0.0
    """Estimate for loading `blocks`; 0.0: unknown."""
    recompute_s: float = 0.0
    """Estimate for computing them instead; 0.0: unknown."""
    reason: Reason = Reason.OK
    """Why no more is held."""

    @property
    def wait_s(self) -> float:
        """For how long the load is worth waiting for: estimates are not exact. 0.0: unknown, without a limit."""
        return 1.25 * self.load_s + 0.05 * self.recompute_s if self.load_s and self.recompute_s else 0.0


@dataclass(frozen=True, slots=True)
class Resumption:
    """When an idle conversation goes on: made by `in_seconds`, `typing` or `finished`."""

    in_s: float | None = None
    is_typing: bool = False

    @classmethod
    def in_seconds(cls, seconds: float) -> Resumption:
        """In about so many seconds."""
        return cls(in_s=seconds)

    @classmethod
    def typing(cls) -> Resumption:
        """Its user is typing."""
        return cls(is_typing=True)

    @classmethod
    def finished(cls) -> Resumption:
        """Never."""
        return cls()


@dataclass(frozen=True, slots=True)
class ShiftedBlocks:
    """Blocks of a truncated conversation whose tokens stand elsewhere than when their keys were computed.

    Attributes:
        first_block: the first of them, in the call's hashes.
        shift_tokens: where the tokens stand now, less where they stood then: rotate the keys by as much.
    """

    first_block: int
    blocks: int
    shift_tokens: int


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Load: how many leading blocks were copied and verified; the rest of the destination is undefined.

    The keys of `shifted` blocks must be rotated before use; there are none unless `accepts_shifts` was given.
    """

    blocks: int = 0
    reason: Reason = Reason.OK
    shifted: tuple[ShiftedBlocks, ...] = ()


@dataclass(frozen=True, slots=True)
class KeptBlocks:
    """Blocks that stay: from `first_block` of the former chain on, from `new_first_block` of the new one on."""

    first_block: int
    blocks: int
    new_first_block: int


@dataclass(frozen=True, slots=True)
class TruncateResult:
    """Truncate: what stays of the former chain, and how many leading blocks of that a load would find now."""

    chain_blocks: int = 0
    kept: tuple[KeptBlocks, ...] = ()
    held_blocks: int = 0
    reason: Reason = Reason.OK


@dataclass(frozen=True, slots=True)
class SaveResult:
    """Save, in blocks: they add up to what was asked for."""

    saved: int = 0
    held: int = 0
    being_written: int = 0
    refused: int = 0
    reason: Reason = Reason.OK

    @classmethod
    def of_commit(cls, committed: Sequence[Committed]) -> SaveResult:
        """What Commit did: blocks that it dropped were refused."""
        dropped = sum(outcome is Committed.DROPPED for outcome in committed)
        return cls(saved=len(committed) - dropped, refused=dropped)

    def plus(self, other: SaveResult) -> SaveResult:
        """Both together."""
        return SaveResult(
            saved=self.saved + other.saved,
            held=self.held + other.held,
            being_written=self.being_written + other.being_written,
            refused=self.refused + other.refused,
        )

    def with_rest_refused(self, blocks: int, reason: Reason) -> SaveResult:
        """This, and whatever is missing to `blocks` refused for that reason."""
        refused = blocks - self.saved - self.held - self.being_written
        return SaveResult(self.saved, self.held, self.being_written, refused, reason)


@dataclass(frozen=True, slots=True)
class PrefetchResult:
    """Prefetch: leading blocks that are in DRAM, and those on their way."""

    dram_blocks: int = 0
    started_blocks: int = 0
    reason: Reason = Reason.OK


@dataclass(frozen=True, slots=True)
class ForgetResult:
    """Forget: blocks dropped, and how many of these are still leased by someone."""

    blocks_dropped: int = 0
    blocks_in_use: int = 0


class Committed(Enum):
    """What Commit did to a block."""

    PUBLISHED = "published"
    AWAITING_PARENT = "awaiting_parent"
    DROPPED = "dropped"
