"""What the disks remember, made into namespaces again.

The heavy part (a million records into an index) runs in a thread on data that nobody shares; the
event loop only swaps the finished index in. An engine that attached meanwhile keeps its blocks:
they are few, and are carried over into the recovered index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvservice.blocks import NO_ROW, NO_SLOT, BlockHash, DropReason, NamespaceSpec, Rows
from kvservice.index import Index, State
from kvservice.nvme import Recovered
from kvservice.policies import nothing_remembered
from kvservice.store.disks import Disk, Disks
from kvservice.store.namespace import Namespace


@dataclass(frozen=True, slots=True)
class Restored:
    """One namespace as the disks remember it."""

    spec: NamespaceSpec
    index: Index
    coldest_first: Rows
    """All rows, in the order in which they would be evicted."""
    tips: list[tuple[bytes, int]]
    """(session key, row)."""
    orphans: list[int]
    """Extents whose block cannot be reached any more, or stands twice."""


def restore(
    disks: Disks, found: Sequence[tuple[Disk, Recovered]], *, now_s: float, wall_now_s: float
) -> list[Restored]:
    """Indexes of everything that can be reached from a root. In a thread; about 3 s a million.

    Args:
        now_s, wall_now_s: the same moment by the store's clock and by the one that the disks remember. Where the
            latter was set back, the latest use that they remember stands for now: the order is kept.
    """
    latest_s = max((float(recovered.last_used_s.max(initial=0.0)) for _, recovered in found), default=0.0)
    to_clock_s = now_s - max(wall_now_s, latest_s)
    specs: dict[object, NamespaceSpec] = {}
    for _, recovered in found:
        specs.update({spec.key: spec for spec in recovered.namespaces})
    return [_restore_one(disks, spec, found, to_clock_s) for spec in specs.values()]


def _restore_one(
    disks: Disks, spec: NamespaceSpec, found: Sequence[tuple[Disk, Recovered]], to_clock_s: float
) -> Restored:
    hashes: list[BlockHash] = []
    parents: list[bytes] = []
    columns: list[tuple[np.ndarray, ...]] = []
    tip_extents: list[tuple[bytes, int]] = []
    for disk, recovered in found:
        position = next((at for at, other in enumerate(recovered.namespaces) if other.key == spec.key), None)
        if position is None:
            continue
        mine = np.flatnonzero(recovered.namespace_index == position)
        chosen = mine.tolist()
        hashes.extend(BlockHash(recovered.hashes[at]) for at in chosen)
        parents.extend(recovered.parent_hashes[at] for at in chosen)
        columns.append(
            (
                disks.extents(disk, recovered.extent[mine]),
                recovered.checksum[mine],
                recovered.uses[mine],
                recovered.last_used_s[mine] + to_clock_s,
                recovered.depth[mine],
            )
        )
        tip_extents += [
            (session, disks.extent(disk, extent)) for of, session, extent in recovered.sessions if of == position
        ]
    extents, checksums, uses, last_used_s, depths = (
        np.concatenate([column[at] for column in columns]) for at in range(5)
    )
    order, parent_positions = _reachable(hashes, parents, depths)
    index = Index()
    index.restore(
        [hashes[at] for at in order.tolist()],
        parent_positions,
        extents[order],
        checksums[order],
        uses[order],
        last_used_s[order],
    )
    _spread_recency(index, len(order))
    by_extent = {extent: row for row, extent in enumerate(extents[order].tolist())} if tip_extents else {}
    count = len(order)
    coldest_first = np.lexsort((-index.depth[:count].astype(np.int64), index.last_used_s[:count])).astype(np.int32)
    orphans = np.delete(extents, order).tolist()
    tips = [(session, by_extent[extent]) for session, extent in tip_extents if extent in by_extent]
    return Restored(spec, index, coldest_first, tips, orphans)


def _spread_recency(index: Index, count: int) -> None:
    """A chain's use was recorded at its end only: what is in front of it was used then too."""
    last_used_s, parents = index.last_used_s[:count].tolist(), index.parent[:count].tolist()
    for row in range(count - 1, -1, -1):  # fronts have smaller numbers
        parent = parents[row]
        if parent != NO_ROW and last_used_s[parent] < last_used_s[row]:
            last_used_s[parent] = last_used_s[row]
    index.last_used_s[:count] = last_used_s


def _reachable(
    hashes: Sequence[BlockHash], parents: Sequence[bytes], depths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the blocks whose whole prefix is there, fronts first, and their parents' new positions."""
    position_of = dict(zip(hashes, range(len(hashes)), strict=True))
    parent_of = [position_of.get(BlockHash(parent), NO_ROW) if parent else NO_ROW for parent in parents]
    by_depth = np.argsort(depths, kind="stable")
    new_position = [NO_ROW] * len(hashes)
    order: list[int] = []
    new_parents: list[int] = []
    for at in by_depth.tolist():
        if position_of[hashes[at]] != at:
            continue  # stands twice; the later record counts
        parent = parent_of[at]
        if parents[at] and (parent == NO_ROW or new_position[parent] == NO_ROW):
            continue  # something in front of it is lost
        new_position[at] = len(order)
        order.append(at)
        new_parents.append(NO_ROW if not parents[at] else new_position[parent])
    return np.array(order, dtype=np.int64), np.array(new_parents, dtype=np.int32)


def adopt(namespace: Namespace, restored: Restored, now_s: float) -> None:
    """Give the namespace its recovered index; what it stored meanwhile is carried over."""
    unfinished = np.flatnonzero((namespace.index.state == State.RESERVED) | (namespace.index.state == State.WRITTEN))
    namespace.drop_subtrees(unfinished.tolist(), DropReason.ABORTED, now_s)
    old, new, pool = namespace.index, restored.index, namespace.pool
    present = np.flatnonzero(old.state == State.RESIDENT)
    moved: dict[int, int] = {}
    for row in present[np.argsort(old.depth[present], kind="stable")].tolist():
        slot, block_hash = int(old.slot[row]), old.hash_of(row)
        target = new.row_of(block_hash)
        if target == NO_ROW:
            parent = int(old.parent[row])
            slots = np.array([slot], dtype=np.int32)
            target = int(new.insert(moved[parent] if parent != NO_ROW else NO_ROW, [block_hash], slots)[0])
            new.state[target] = State.RESIDENT
            new.checksum[target], new.checksummed[target] = old.checksum[row], old.checksummed[row]
        elif slot != NO_SLOT:
            new.attach_slots(np.array([target], dtype=np.int32), np.array([slot], dtype=np.int32))
            new.arriving[target] = False
        new.uses[target] += old.uses[row]
        new.last_used_s[target] = old.last_used_s[row]
        new.committed_at_s[target] = old.committed_at_s[row]
        pool.row_of[slot] = target
        moved[row] = target
    namespace.swap_index(new, moved)
    recovered = restored.coldest_first[::-1]
    namespace.nvme_policy.stored(recovered, new.parent[recovered], now_s, nothing_remembered(recovered))
    carried = np.array(list(moved.values()), dtype=np.int32)
    namespace.policy.stored(carried, new.parent[carried], now_s, nothing_remembered(carried))
    namespace.nvme_policy.touch(carried, now_s)
    for session, tip in restored.tips:
        namespace.sessions.extend(session, np.zeros(0, dtype=np.int32), tip)
