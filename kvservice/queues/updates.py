"""What an engine says of its waiting queue: the whole of it, then what changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one queue may hold; more is refused with the bound's name."""

    entries_max: int
    blocks_max: int
    """Hashes of all its entries together."""
    hashes_per_entry_max: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A waiting request as told: its chain is the first blocks of one that was told before, then `packed`."""

    request_id: str
    packed: bytes = b""
    """Hashes back to back, root first."""
    prefix_request_id: str = ""
    """Whose chain this one begins with; the request may have started since. Empty: nobody's."""
    prefix_blocks: int = 0
    session_id: str = ""
    new_tokens: int = 0
    """Tokens that have to be computed whatever is held."""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """The whole queue, the next to start first. Epochs of one queue only grow."""

    epoch: int
    entries: Sequence[Entry] = ()


@dataclass(frozen=True, slots=True)
class Moved:
    """A request of the queue stands somewhere else now."""

    request_id: str
    position: int


@dataclass(frozen=True, slots=True)
class QueueDelta:
    """What changed since the message before it: first the started and removed leave, then the others take their places.

    Positions are those in the queue as it is after the whole delta.
    """

    epoch: int
    sequence: int
    """1 for the first delta after the snapshot of that epoch, then one more each."""
    started: Sequence[str] = ()
    removed: Sequence[str] = ()
    moved: Sequence[Moved] = ()
    added: Sequence[tuple[int, Entry]] = field(default=())
    """(position, entry)"""

    def names(self) -> Iterator[str]:
        """Every request that it says something about."""
        yield from self.started
        yield from self.removed
        yield from (moved.request_id for moved in self.moved)
        yield from (entry.request_id for _, entry in self.added)


QueueUpdate = QueueSnapshot | QueueDelta


class UpdateOutcome(Enum):
    """What became of an update."""

    APPLIED = "applied"
    OUTDATED = "outdated"  # seen before, or of an epoch that has passed: nothing to do
    SNAPSHOT_WANTED = "snapshot_wanted"  # one before it was lost, or the two sides disagree: send the whole queue
