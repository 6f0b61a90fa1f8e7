"""What a volume answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from kvservice.blocks import NamespaceSpec


class ReadResult(Enum):
    """Whether the memory now has the block's bytes."""

    OK = "ok"
    CORRUPT = "corrupt"


@dataclass(frozen=True, slots=True)
class SegmentUse:
    """A segment file as its namespace fills it."""

    segment_id: int
    size_bytes: int
    stride_bytes: int
    extents_in_use: int


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
    damaged_pages: int
