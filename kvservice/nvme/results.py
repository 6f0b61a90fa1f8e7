"""What a volume is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from kvservice.blocks import BlockHash, NamespaceSpec


class ReadResult(Enum):
    """Whether the memory now has the block's bytes, and if not, what is wrong with the extent."""

    OK = "ok"
    ENDS_EARLY = "the file ends before the extent does"
    HEADER_DAMAGED = "its header is damaged"
    OTHER_BLOCK = "it has another block"
    PAYLOAD_DAMAGED = "its bytes do not have their checksum"


@dataclass(frozen=True, slots=True)
class ReadJob:
    """A block to read."""

    extent: int
    block_hash: BlockHash
    memory: memoryview
    """Page-aligned; the block padded to whole pages."""


@dataclass(frozen=True, slots=True)
class WriteJob:
    """A block to write."""

    extent: int
    block_hash: BlockHash
    memory: memoryview
    """Page-aligned; the block padded to whole pages."""
    checksum: int
    """Of the block without its padding."""


@dataclass(frozen=True, slots=True)
class SegmentUse:
    """A segment file as its namespace fills it."""

    segment_id: int
    size_bytes: int
    stride_bytes: int
    extents_in_use: int


@dataclass(frozen=True, slots=True)
class RecoveredAlias:
    """A second name of an extent's block, for one session only."""

    namespace_index: int
    block_hash: bytes
    parent_hash: bytes
    depth: int
    extent: int
    source_depth: int
    owner: int


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a volume remembers, as parallel columns; order means nothing."""

    namespaces: list[NamespaceSpec]
    namespace_index: np.ndarray
    hashes: list[bytes]
    parent_hashes: list[bytes]
    depth: np.ndarray
    extent: np.ndarray
    checksum: np.ndarray
    uses: np.ndarray
    last_used_s: np.ndarray
    sessions: list[tuple[int, bytes, int]]
    aliases: list[RecoveredAlias]
    damaged_pages: int
    """Of the index."""
    lost_blocks: int
    """Records of blocks that are not on the volume, or not known whose they are."""

    @property
    def is_damaged(self) -> bool:
        """Whether more is missing than a crash may cost: the records of a segment that had just changed hands."""
        return self.damaged_pages > 0 or (self.lost_blocks > 0 and not self.hashes)
