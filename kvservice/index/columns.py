"""What the index keeps of each row, and the states a row goes through."""

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
