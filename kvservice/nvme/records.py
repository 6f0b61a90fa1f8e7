"""records: what the journal remembers of a volume, and what a restart gets back.

    StoreRecord          a block is in that extent; its payload was flushed before
    TouchRecord          the block there, and every block before it in its chain, was used
    DropRecord           whatever was in that extent is gone for good
    SessionRecord        a conversation ends at the block in that extent
    ForgetSessionRecord  that conversation is no longer known

Records are applied in the order in which they were appended; the later one wins. A StoreRecord ends
what was in its extent before, and what the same block's earlier extent held.
Times are seconds of the wall clock: they must mean the same after a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import NO_ROW, NamespaceSpec

SESSION_ID_BYTES_MAX = 800
"""In UTF-8: 200 characters of any script."""


@dataclass(frozen=True, slots=True)
class StoreRecord:
    """A block is durable in an extent. `parent_hash` is b"" at the root; `checksum` is the payload's xxh3-64."""

    namespace: NamespaceSpec
    block_hash: bytes
    parent_hash: bytes
    depth: int
    extent: int
    checksum: int
    uses: int
    last_used_s: float


@dataclass(frozen=True, slots=True)
class TouchRecord:
    """The block there was last used then, `uses` times in all; so was, at least, every block before it."""

    extent: int
    uses: int
    last_used_s: float


@dataclass(frozen=True, slots=True)
class DropRecord:
    """The block there was forgotten or evicted."""

    extent: int


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A conversation of the namespace ends at the block there (several records: it has several ends)."""

    namespace: NamespaceSpec
    session_id: str
    tip_extent: int


@dataclass(frozen=True, slots=True)
class ForgetSessionRecord:
    """Earlier SessionRecords of this conversation no longer count."""

    namespace: NamespaceSpec
    session_id: str


Record = StoreRecord | TouchRecord | DropRecord | SessionRecord | ForgetSessionRecord


class ReadResult(Enum):
    """What reading an extent found."""

    OK = "ok"
    CORRUPT = "corrupt"
    """Not that block, or not whole: a miss. The memory read into holds nothing of use."""


@dataclass(frozen=True, slots=True, eq=False)
class NamespaceSnapshot:
    """One namespace's part of a checkpoint: columns by index row, as the index has them.

    Attributes:
        hashes: by row; other rows than those named may hold None.
        rows: the rows that have an extent, in any order.
        parent: int32 by row: the row of the block before it, NO_ROW at the root.
        depth, extent, checksum, uses, last_used_s: by row.
        sessions: (session id, extent of its tip), the one used longest ago first.
    """

    namespace: NamespaceSpec
    hashes: Sequence[bytes | None]
    rows: NDArray[np.integer]
    parent: NDArray[np.integer]
    depth: NDArray[np.integer]
    extent: NDArray[np.int64]
    checksum: NDArray[np.uint64]
    uses: NDArray[np.integer]
    last_used_s: NDArray[np.float64]
    sessions: Sequence[tuple[str, int]]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """All that the journal must remember at one moment.

    Attributes:
        first_log: what `Volume.roll_log` returned at that same moment.
        parts: one per namespace.
    """

    first_log: int
    parts: Sequence[NamespaceSnapshot]


@dataclass(frozen=True, slots=True)
class Losses:
    """What a recovery could not keep, in pages of the journal and in blocks.

    Attributes:
        unreadable_pages: damaged or torn: only what they recorded is lost.
        unknown_namespaces: blocks whose namespace's own record is among the lost.
        out_of_place: blocks in segments that are gone, shorter, or another namespace's by now.
        over_capacity: blocks in the segments that had to go because the byte cap is lower than it was.
        orphans: blocks that cannot be reached because one before them is missing.
    """

    unreadable_pages: int = 0
    unknown_namespaces: int = 0
    out_of_place: int = 0
    over_capacity: int = 0
    orphans: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Recovered:
    """What a restart finds: blocks as parallel columns, whole chains only.

    Attributes:
        namespaces: those that have blocks.
        namespace_index: int32, into `namespaces`; ascending.
        hashes: of the blocks; within a namespace by depth, so a block comes after the one before it in its chain.
        parent_hashes: b"" at the root.
        parent: int32, the row in these columns of the block before it; NO_ROW at the root.
        depth: uint32. extent: int64. checksum: uint64, xxh3-64 of the payload. uses: uint32. last_used_s: float64.
        sessions: (namespace index, session id, extent of a tip), the one recorded longest ago first.
        losses: what was dropped, and why.
    """

    namespaces: list[NamespaceSpec]
    namespace_index: NDArray[np.int32]
    hashes: list[bytes]
    parent_hashes: list[bytes]
    parent: NDArray[np.int32]
    depth: NDArray[np.uint32]
    extent: NDArray[np.int64]
    checksum: NDArray[np.uint64]
    uses: NDArray[np.uint32]
    last_used_s: NDArray[np.float64]
    sessions: list[tuple[int, str, int]]
    losses: Losses

    def __len__(self) -> int:
        return len(self.hashes)

    def as_checkpoint(self, first_log: int) -> Checkpoint:
        """The same as a checkpoint, for a volume whose state has not changed since."""
        parts = []
        for number, namespace in enumerate(self.namespaces):
            first, end = np.searchsorted(self.namespace_index, (number, number + 1)).tolist()
            parent = self.parent[first:end]
            parts.append(
                NamespaceSnapshot(
                    namespace,
                    self.hashes[first:end],
                    np.arange(end - first),
                    np.where(parent == NO_ROW, NO_ROW, parent - first),
                    self.depth[first:end],
                    self.extent[first:end],
                    self.checksum[first:end],
                    self.uses[first:end],
                    self.last_used_s[first:end],
                    [(session_id, tip) for of, session_id, tip in self.sessions if of == number],
                )
            )
        return Checkpoint(first_log, parts)
