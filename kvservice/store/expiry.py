"""Blocks that nobody used for their namespace's time to live leave, in slices that hold nobody up.

A block counts as used as long as one behind it is: chains shrink from their ends.
"""

from __future__ import annotations

import numpy as np

from kvservice.blocks import NO_ROW, NO_SLOT, DropReason
from kvservice.index import State
from kvservice.store.namespace import Namespace

_ROWS_PER_SLICE = 65_536  # looked at per round of upkeep: a million blocks in under two seconds
_DROPS_PER_SLICE = 512


def expire_slice(namespace: Namespace, now_s: float) -> int:
    """Look at the next rows of the index and drop what is due; how many were dropped."""
    if not namespace.rule.ttl_s:
        return 0
    index, cutoff_s = namespace.index, now_s - namespace.rule.ttl_s
    first = namespace.expiry_cursor if namespace.expiry_cursor < len(index.state) else 0
    span = slice(first, first + _ROWS_PER_SLICE)
    due = (index.state[span] >= State.RESIDENT) & (index.first_child[span] == NO_ROW)
    due &= index.last_used_s[span] < cutoff_s
    dropped = 0
    for tip in (first + np.flatnonzero(due)).tolist():
        row = tip
        while row != NO_ROW and _is_due(namespace, row, cutoff_s):
            if dropped == _DROPS_PER_SLICE:
                return dropped  # the cursor stays: the rest is next
            parent = int(index.parent[row])
            namespace.drop(row, DropReason.EXPIRED, now_s)
            dropped, row = dropped + 1, parent
    namespace.expiry_cursor = span.stop
    return dropped


def _is_due(namespace: Namespace, row: int, cutoff_s: float) -> bool:
    index = namespace.index
    slot = int(index.slot[row])
    return bool(
        index.state[row] >= State.RESIDENT
        and index.first_child[row] == NO_ROW
        and index.last_used_s[row] < cutoff_s
        and (slot == NO_SLOT or namespace.pool.holders[slot] == 0)
        and not namespace.window.is_exempt(row)
    )
