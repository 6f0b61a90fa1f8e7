"""What the disks remember, made into namespaces again.

The heavy part (a million records into an index) runs in a thread on data that nobody shares; the
event loop only swaps the finished index in. An engine that attached meanwhile keeps its blocks:
they are few, and are carried over into the recovered index.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np

from kvservice.aliases import NO_INSTANCE
from kvservice.blocks import NO_EXTENT, NO_ROW, NO_SLOT, BlockHash, DropReason, NamespaceSpec, Rows
from kvservice.index import NO_OWNER, Index, State
from kvservice.nvme import Recovered, RecoveredAlias
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
    blocks = len(hashes)
    at_extent: dict[int, int] = {}
    if tip_extents or any(recovered.aliases for _, recovered in found):
        at_extent = dict(zip(extents.tolist(), range(blocks), strict=True))
    aliases = _plausible_aliases(disks, spec, found, at_extent, depths, hashes)
    names = [*hashes, *(BlockHash(alias.block_hash) for alias in aliases)]
    order, parent_positions = _reachable(
        names,
        [*parents, *(alias.parent_hash for alias in aliases)],
        np.concatenate((depths, np.array([alias.depth for alias in aliases], dtype=np.int64))),
    )
    alias_rows = np.flatnonzero(order >= blocks).astype(np.int32)
    reached = [aliases[at - blocks] for at in order[alias_rows].tolist()]
    # What only an alias reaches has bytes and no name.
    is_named = np.zeros(len(names), dtype=bool)
    is_named[order] = True
    sources_at = np.unique(np.array([at_extent[alias.extent] for alias in reached], dtype=np.int64))
    unnamed = sources_at[~is_named[sources_at]]
    positions = np.concatenate((order, unnamed))
    index = _index_of(names, positions, parent_positions, (extents, checksums, uses, last_used_s, depths))
    row_of = {at: row for row, at in enumerate(positions.tolist())} if at_extent else {}
    if reached:
        sources = np.array([row_of[at_extent[alias.extent]] for alias in reached], dtype=np.int32)
        index.restore_aliases(alias_rows, sources, np.array([alias.owner for alias in reached], dtype=np.uint64))
    _spread_recency(index, len(positions))
    with_bytes = np.flatnonzero((index.state != State.ABSENT) & (index.source == NO_ROW))
    coldest = np.lexsort((-index.depth[with_bytes].astype(np.int64), index.last_used_s[with_bytes]))
    orphans = np.delete(extents, positions[positions < blocks]).tolist()
    ends = [(session, row_of.get(at_extent.get(extent, NO_ROW), NO_ROW)) for session, extent in tip_extents]
    tips = [(session, row) for session, row in ends if 0 <= row < len(order)]
    return Restored(spec, index, with_bytes[coldest].astype(np.int32), tips, orphans)


def _plausible_aliases(
    disks: Disks,
    spec: NamespaceSpec,
    found: Sequence[tuple[Disk, Recovered]],
    at_extent: Mapping[int, int],
    depths: np.ndarray,
    hashes: Sequence[bytes],
) -> list[RecoveredAlias]:
    """Aliases of blocks that are there, with their extents as the index numbers them; a hash's own block goes first."""
    plausible = []
    known = set(hashes) if at_extent else set()
    for disk, recovered in found:
        for alias in recovered.aliases:
            at = at_extent.get(disks.extent(disk, alias.extent))
            is_mine = recovered.namespaces[alias.namespace_index].key == spec.key
            if not is_mine or at is None or alias.owner == NO_OWNER or alias.block_hash in known:
                continue
            # A source elsewhere than when it was named is another block: the shift would be wrong.
            if depths[at] == alias.source_depth:
                plausible.append(replace(alias, extent=disks.extent(disk, alias.extent)))
    return plausible


def _index_of(
    hashes: Sequence[BlockHash], chosen: np.ndarray, parents: np.ndarray, columns: tuple[np.ndarray, ...]
) -> Index:
    """An index of the chosen positions: those in the tree first, then unnamed ones.

    Args:
        hashes: of all blocks, then of all aliases.
        columns: extents, checksums, uses, times of last use and depths of the blocks.
    """
    extents, checksums, uses, last_used_s, depths = columns
    aliases = len(hashes) - len(extents)
    unnamed = chosen[len(parents) :]
    index = Index()
    index.restore(
        [hashes[at] for at in chosen.tolist()],
        np.append(parents, np.full(len(unnamed), NO_ROW, dtype=np.int32)),
        np.append(extents, np.full(aliases, NO_EXTENT))[chosen],
        np.append(checksums, np.zeros(aliases, dtype=checksums.dtype))[chosen],
        np.append(uses, np.zeros(aliases, dtype=uses.dtype))[chosen],
        np.append(last_used_s, np.full(aliases, -np.inf))[chosen],
        unnamed_depths=depths[unnamed].tolist(),
    )
    return index


def _spread_recency(index: Index, count: int) -> None:
    """A chain's use was recorded at its end only: what is in front of it was used then too."""
    last_used_s, parents = index.last_used_s[:count].tolist(), index.parent[:count].tolist()
    for row in range(count - 1, -1, -1):  # fronts have smaller numbers
        parent = parents[row]
        if parent != NO_ROW and last_used_s[parent] < last_used_s[row]:
            last_used_s[parent] = last_used_s[row]
    for row in np.flatnonzero(index.source[:count] != NO_ROW).tolist():
        source = int(index.source[row])
        last_used_s[source] = max(last_used_s[source], last_used_s[row])
    index.last_used_s[:count] = last_used_s


def _reachable(
    hashes: Sequence[BlockHash], parents: Sequence[bytes], depths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the blocks whose whole prefix is there, fronts first, and their parents' new positions."""
    position_of: dict[bytes, int] = dict(zip(hashes, range(len(hashes)), strict=True))

    def positions(of: Iterable[bytes]) -> np.ndarray:
        return np.fromiter(map(position_of.get, of, repeat(NO_ROW)), dtype=np.int64, count=len(hashes))

    is_last = np.ones(len(hashes), dtype=bool)
    if len(position_of) < len(hashes):
        is_last = positions(hashes) == np.arange(len(hashes))  # of a block that stands twice, the later record counts
    parent_of = positions(parents)
    is_root = ~np.fromiter(map(bool, parents), dtype=bool, count=len(hashes))
    by_depth = np.argsort(depths, kind="stable")
    is_reachable = np.zeros(len(hashes) + 1, dtype=bool)  # the last stands for a block that is not there: NO_ROW
    for level in np.split(by_depth, np.flatnonzero(np.diff(depths[by_depth])) + 1):
        is_reachable[level] = is_last[level] & (is_root[level] | is_reachable[parent_of[level]])
    order = by_depth[is_reachable[by_depth]]
    new_position = np.full(len(hashes), NO_ROW, dtype=np.int32)
    new_position[order] = np.arange(len(order), dtype=np.int32)
    return order, np.where(is_root[order], NO_ROW, new_position[parent_of[order]]).astype(np.int32)


def adopt(namespace: Namespace, restored: Restored, now_s: float) -> None:
    """Give the namespace its recovered index; what it stored meanwhile is carried over."""
    unfinished = np.flatnonzero((namespace.index.state == State.RESERVED) | (namespace.index.state == State.WRITTEN))
    namespace.drop_subtrees(unfinished.tolist(), DropReason.ABORTED, now_s)
    # Truncated meanwhile: few, and a truncation can be asked for again.
    namespace.drop_subtrees(np.flatnonzero(namespace.index.source != NO_ROW).tolist(), DropReason.ABORTED, now_s)
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
            if new.source[target] != NO_ROW:  # computed meanwhile: its own bytes now
                new.source[target] = NO_ROW
                new.checksum[target], new.checksummed[target] = old.checksum[row], old.checksummed[row]
            new.attach_slots(np.array([target], dtype=np.int32), np.array([slot], dtype=np.int32))
            new.arriving[target] = False
        new.uses[target] += old.uses[row]
        new.last_used_s[target] = old.last_used_s[row]
        new.committed_at_s[target] = old.committed_at_s[row]
        pool.row_of[slot] = target
        moved[row] = target
    namespace.swap_index(new, moved)
    _adopt_aliases(namespace, now_s)
    recovered = restored.coldest_first[::-1]
    recovered = recovered[new.state[recovered] != State.ABSENT]
    namespace.nvme_policy.stored(recovered, new.parent[recovered], now_s, nothing_remembered(recovered))
    carried = np.array(list(moved.values()), dtype=np.int32)
    namespace.policy.stored(carried, new.parent[carried], now_s, nothing_remembered(carried))
    namespace.nvme_policy.touch(carried, now_s)
    for session, tip in restored.tips:
        namespace.sessions.extend(session, np.zeros(0, dtype=np.int32), tip)


def _adopt_aliases(namespace: Namespace, now_s: float) -> None:
    """Enter the recovered index's aliases in the books, as many as there may be."""
    index, aliases = namespace.index, namespace.aliases
    rows = np.flatnonzero(index.source != NO_ROW).astype(np.int32)
    for row, source, owner in zip(rows.tolist(), index.source[rows].tolist(), index.owner[rows].tolist(), strict=True):
        aliases.add([row], [source], owner, NO_INSTANCE)
    for owner in set(index.owner[rows].tolist()):
        while (oldest := aliases.row_over_bounds(owner, NO_INSTANCE, 0)) != NO_ROW:
            namespace.drop_subtrees([oldest], DropReason.ALIAS_LIMIT, now_s)
    unnamed = np.flatnonzero(index.state == State.UNNAMED).tolist()
    namespace.drop_subtrees([row for row in unnamed if not aliases.of_source(row)], DropReason.PREFIX_LOST, now_s)
