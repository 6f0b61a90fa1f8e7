"""What the index keeps of each row, the memory for it, and the states a row goes through."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvservice.blocks import NO_EXTENT, NO_ROW, NO_SLOT

NO_OWNER: Final = 0
"""In the column of owners: any session may use the block."""

COLUMNS: dict[str, tuple[type, int]] = {
    "parent": (np.int32, NO_ROW),
    "first_child": (np.int32, NO_ROW),
    "next_sibling": (np.int32, NO_ROW),
    "previous_sibling": (np.int32, NO_ROW),
    "depth": (np.int32, 0),
    "slot": (np.int32, NO_SLOT),
    "extent": (np.int64, NO_EXTENT),
    "source": (np.int32, NO_ROW),
    "owner": (np.uint64, NO_OWNER),
    "dram_children": (np.int32, 0),
    "nvme_children": (np.int32, 0),
    "arriving": (np.bool_, 0),
    "prefetched": (np.bool_, 0),
    "dirty": (np.bool_, 0),
    "state": (np.uint8, 0),
    "checksummed": (np.bool_, 0),
    "checksum": (np.uint64, 0),
    "uses": (np.uint32, 0),
    "last_used_s": (np.float64, 0),
    "committed_at_s": (np.float64, 0),
}


class State:
    """A row's state; see the module's diagram.

    Plain numbers: numpy takes ten times as long to compare a column with an IntEnum's member.
    """

    ABSENT: Final = 0
    RESERVED: Final = 1
    WRITTEN: Final = 2
    RESIDENT: Final = 3
    UNNAMED: Final = 4


class Columns:
    """One numpy array per thing that is kept of each row."""

    def __init__(self) -> None:
        self.parent: np.ndarray
        self.first_child: np.ndarray
        self.next_sibling: np.ndarray
        self.previous_sibling: np.ndarray
        self.depth: np.ndarray
        self.slot: np.ndarray
        self.extent: np.ndarray
        self.source: np.ndarray
        self.owner: np.ndarray
        self.dram_children: np.ndarray
        self.nvme_children: np.ndarray
        self.arriving: np.ndarray
        self.prefetched: np.ndarray
        self.dirty: np.ndarray
        self.state: np.ndarray
        self.checksummed: np.ndarray
        self.checksum: np.ndarray
        self.uses: np.ndarray
        self.last_used_s: np.ndarray
        self.committed_at_s: np.ndarray
        self._capacity = 0
        self._grow_to(1024)

    def _grow_to(self, capacity: int) -> None:
        for name, (dtype, blank) in COLUMNS.items():
            grown: np.ndarray = np.full(capacity, blank, dtype=dtype) if blank else np.zeros(capacity, dtype=dtype)
            if self._capacity:
                grown[: self._capacity] = getattr(self, name)
            setattr(self, name, grown)
        self._capacity = capacity
