"""How room is made on disk: within the namespace's quota, then a fair share of each disk, then eviction.

Sharing is max-min fair, as in DRAM: while a disk is full, a namespace below an equal share takes the coldest segment
of the one furthest above it. Nothing is copied: the segment's blocks leave (those in DRAM live on there), and its file
gets another header. Whatever cannot be had is refused; the caller keeps those blocks in DRAM.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from kvservice.blocks import NO_EXTENT, NO_SLOT, DropReason, NamespaceKey
from kvservice.errors import CapacityExhausted
from kvservice.index import State
from kvservice.nvme import SegmentUse
from kvservice.nvme.format import extent_stride_bytes
from kvservice.store.disks import Disk, Disks
from kvservice.store.namespace import Namespace

_SLICE_BLOCKS = 512  # dropped at a time: a few milliseconds of the event loop


class DiskSpace:
    """Makes room for namespaces on the disks. One caller at a time: the write-behind task."""

    def __init__(
        self, disks: Disks, namespaces: Mapping[NamespaceKey, Namespace], *, clock: Callable[[], float]
    ) -> None:
        self._disks = disks
        self._clock = clock
        self._namespaces = namespaces

    async def reserve(self, namespace: Namespace, count: int) -> tuple[Disk, list[int]]:
        """Extents for up to `count` blocks, at least one; as many as can be had on one disk.

        Raises:
            CapacityExhausted: not one, or no disk takes blocks.
        """
        count = self._within_quota(namespace, count)
        may_reclaim = may_evict = self._disks.can_write
        while True:
            try:
                return self._disks.reserve(namespace.spec, count)
            except CapacityExhausted:
                if may_reclaim:
                    may_reclaim = await self._reclaim_segment(namespace)
                elif may_evict:
                    namespace.evict_from_nvme(count, DropReason.CAPACITY, self._clock())
                    may_evict = False
                elif count > 1:
                    count //= 2
                else:
                    raise

    def keep_up(self, namespace: Namespace) -> None:
        """A slice of what is above the namespace's quota leaves (a quota may be lower than at the last start)."""
        excess = self._held_extents(namespace) - self._quota_extents(namespace)
        if namespace.rule.nvme_quota_bytes and excess > 0:
            namespace.evict_from_nvme(min(excess, _SLICE_BLOCKS), DropReason.QUOTA, self._clock())

    def held_bytes(self, namespace: Namespace) -> int:
        """Bytes on disk of the namespace's blocks, headers included."""
        return self._held_extents(namespace) * extent_stride_bytes(namespace.spec.block_size_bytes)

    def _held_extents(self, namespace: Namespace) -> int:
        return sum(
            segment.extents_in_use for disk in self._disks.disks for segment in disk.volume.segments_of(namespace.spec)
        )

    @staticmethod
    def _quota_extents(namespace: Namespace) -> int:
        return namespace.rule.nvme_quota_bytes // extent_stride_bytes(namespace.spec.block_size_bytes)

    def _within_quota(self, namespace: Namespace, count: int) -> int:
        if not namespace.rule.nvme_quota_bytes:
            return count
        room = self._quota_extents(namespace) - self._held_extents(namespace)
        if room < count:
            room += namespace.evict_from_nvme(count - room, DropReason.QUOTA, self._clock())
        if room < 1:
            raise CapacityExhausted(f"the namespace's quota of {namespace.rule.nvme_quota_bytes} bytes on NVMe is full")
        return min(count, room)

    async def _reclaim_segment(self, taker: Namespace) -> bool:
        """Empty a segment that the taker's share entitles it to; whether there was one."""
        for disk in self._disks.disks:
            if disk.health.can_write:
                for donor, segment in self._reclaimable(disk, taker):
                    await self._empty(donor, disk, segment.segment_id)
                    return True
        return False

    def _reclaimable(self, disk: Disk, taker: Namespace) -> Iterator[tuple[Namespace, SegmentUse]]:
        """Segments for the taker, the best first: the coldest of the namespace furthest above its share.

        Only where the taker ends up with no more than the donor keeps, or has nothing at all: else two namespaces
        would take the same segment from each other for ever.
        """
        segments = {id(namespace): disk.volume.segments_of(namespace.spec) for namespace in self._namespaces.values()}
        owned = {key: sum(segment.size_bytes for segment in some) for key, some in segments.items()}
        mine = owned.get(id(taker), 0)
        sharing = sum(1 for key, size_bytes in owned.items() if size_bytes or key == id(taker))
        share_bytes = disk.volume.data_bytes // max(1, sharing)
        if mine >= share_bytes:
            return
        donors = [other for other in self._namespaces.values() if other is not taker and owned[id(other)] > share_bytes]
        needed_bytes = extent_stride_bytes(taker.spec.block_size_bytes)
        for donor in sorted(donors, key=lambda other: owned[id(other)], reverse=True):
            for segment in self._coldest_first(donor, disk, segments[id(donor)]):
                kept_bytes = owned[id(donor)] - segment.size_bytes
                if segment.size_bytes > needed_bytes and (kept_bytes > mine or not mine):
                    yield donor, segment

    def _coldest_first(self, namespace: Namespace, disk: Disk, segments: Iterable[SegmentUse]) -> list[SegmentUse]:
        """Segments that nobody writes, reads or waits for, by mean time of last use; the deepest first
        among equals: a segment of roots would take whole chains with it.
        """
        index = namespace.index
        rows = np.flatnonzero(index.extent != NO_EXTENT)
        owners = self._disks.segments(disk, index.extent[rows])
        temperatures = []
        for segment in segments:
            inside = rows[owners == segment.segment_id]
            if namespace.window.exempt(inside).any() or index.arriving[inside].any():
                continue
            if len(inside) == segment.extents_in_use:
                coldness = (
                    (float(np.mean(index.last_used_s[inside])), -float(np.mean(index.depth[inside])))
                    if len(inside)
                    else (float("-inf"), 0.0)
                )
                temperatures.append((coldness, segment.segment_id, segment))
        return [segment for *_, segment in sorted(temperatures, key=lambda entry: entry[:2])]

    async def _empty(self, donor: Namespace, disk: Disk, segment_id: int) -> None:
        index = donor.index
        rows = np.flatnonzero(index.extent != NO_EXTENT)
        rows = rows[self._disks.segments(disk, index.extent[rows]) == segment_id]
        rows = rows[np.argsort(-index.depth[rows], kind="stable")]
        extents = index.extent[rows].tolist()
        for number, (row, extent) in enumerate(zip(rows.tolist(), extents, strict=True)):
            if number % _SLICE_BLOCKS == _SLICE_BLOCKS - 1:
                await asyncio.sleep(0)  # others' calls; what they changed is looked at again
            if index.extent[row] != extent or index.state[row] < State.RESIDENT:
                continue  # left meanwhile, by itself or behind another one
            if index.slot[row] == NO_SLOT or index.arriving[row]:
                donor.drop_subtrees([row], DropReason.RECLAIMED, self._clock())
            else:
                donor.leave_nvme(row)
