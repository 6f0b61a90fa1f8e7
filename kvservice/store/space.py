"""How room is made: a new segment, else eviction, else a segment of a namespace above its share.

Sharing is max-min fair: while the arena is full, a namespace below an equal share may take a
segment from the one that is furthest above it. A segment changes hands as bytes of the budget
only: its memory is punched out and closed, and the other namespace gets fresh, zeroed memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from kvservice.blocks import NO_EXTENT, NO_ROW, NO_SLOT, DropReason, NamespaceKey, Rows, Slots
from kvservice.config import Config
from kvservice.dram import Arena, Segment
from kvservice.errors import CapacityExhausted, QuotaExceeded
from kvservice.instances import Instances, SegmentsChanged
from kvservice.logs import event_log
from kvservice.store.namespace import Namespace

_REFUSAL_PAUSE_S = 10.0
_EVICTION_SLICE = 512  # blocks per round of upkeep: about a millisecond of the event loop

_SETTLE_WAIT_S = 5.0

_log = event_log(__name__)


class Space:
    """Makes room in namespaces' pools out of one arena."""

    def __init__(
        self,
        arena: Arena,
        namespaces: Mapping[NamespaceKey, Namespace],
        instances: Instances[Namespace],
        config: Config,
        *,
        clock: Callable[[], float],
        until_settled: Callable[[Namespace, float], Awaitable[bool]],
    ) -> None:
        """Args:
        instances: told of segments that come and go.
        until_settled: where the daemon itself holds slots of a namespace for a moment (a checksum, a
            write to NVMe), waits at most so many seconds until it let some go; whether it did.
        """
        self.arena = arena
        self._config = config
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="memory")
        self._clock = clock
        self._namespaces = namespaces
        self._instances = instances
        self._refused_until_s = float("-inf")
        self.in_flight_bytes = 0
        """Of the arena's used bytes, those of segments being made or closed: in no pool."""
        self._until_settled = until_settled

    def slots_per_segment(self, stride_bytes: int) -> int:
        """How many slots a full segment of that stride has; at least one."""
        return max(1, self._config.dram_segment_bytes // stride_bytes)

    async def make_room(self, namespace: Namespace, slots_wanted: int) -> None:
        """Do one step towards `slots_wanted` free slots; call again until there are enough.

        Raises:
            QuotaExceeded, CapacityExhausted: everything that could leave is in use. Nothing was
                evicted.
        """
        if await self.grow(namespace):
            return
        if namespace.is_retired:
            raise CapacityExhausted("the namespace was dropped meanwhile: attach again")
        if namespace.growth:
            # Memory is on its way, asked for by somebody else: nothing need be evicted or refused before it is there.
            await asyncio.wait(namespace.growth, return_when=asyncio.FIRST_COMPLETED)
            return
        missing = slots_wanted - namespace.pool.free_slots
        if namespace.pool.size_bytes < self._share_bytes(namespace) and not self._is_at_quota(namespace):
            donor, position = self._segment_to_reclaim(namespace)
            if donor is not None:
                await self._reclaim(donor, position)
                return
        evictable = namespace.evictable_slots(missing)
        if missing > evictable:
            if await self._until_settled(namespace, _SETTLE_WAIT_S):
                return
            raise self._refusal(namespace, slots_wanted, evictable)
        reason = DropReason.QUOTA if self._is_at_quota(namespace) else DropReason.CAPACITY
        if namespace.evict(missing, reason, self._clock()) >= missing:
            return
        if await self._until_settled(namespace, _SETTLE_WAIT_S):
            return
        if namespace.index.dirty.any():
            namespace.index.dirty[:] = False  # no disk keeps up: what leaves now is lost, as without one
            return
        raise self._refusal(namespace, slots_wanted, namespace.pool.free_slots)

    async def grow(self, namespace: Namespace) -> bool:
        """Add a segment if arena, quota and system have room for at least one slot; whether it did."""
        stride_bytes = namespace.stride_bytes
        slots = min(namespace.pool.slots_per_segment, self.growable_slots(namespace))
        if slots < 1 or self._clock() < self._refused_until_s:
            return False
        size_bytes = slots * stride_bytes
        segment_id = self.arena.promise(size_bytes)
        namespace.growing_bytes += size_bytes
        self.in_flight_bytes += size_bytes
        # To its end even if the caller is cancelled meanwhile: the memory is being made.
        growth = asyncio.create_task(self._add_segment(namespace, segment_id, slots))
        namespace.growth.add(growth)
        growth.add_done_callback(namespace.growth.discard)
        return await asyncio.shield(growth)

    def growable_slots(self, namespace: Namespace) -> int:
        """How many slots more arena and quota have room for."""
        room_bytes = self.arena.unused_bytes
        if namespace.rule.dram_quota_bytes:
            owned_bytes = namespace.pool.size_bytes + namespace.growing_bytes
            room_bytes = min(room_bytes, namespace.rule.dram_quota_bytes - owned_bytes)
        return max(0, room_bytes) // namespace.stride_bytes

    async def make_room_for_hint(self, namespace: Namespace, slots_wanted: int) -> bool:
        """Make room as far as that waits for nobody and takes nothing from other namespaces; whether it made any."""
        return await self.grow(namespace) or self.evict_for_hint(namespace, slots_wanted)

    def evict_for_hint(self, namespace: Namespace, slots_wanted: int) -> bool:
        """Evict as far as that helps and takes nothing from other namespaces; whether it made room."""
        missing = slots_wanted - namespace.pool.free_slots
        reason = DropReason.QUOTA if self._is_at_quota(namespace) else DropReason.CAPACITY
        return namespace.evict(missing, reason, self._clock()) > 0

    async def _add_segment(self, namespace: Namespace, segment_id: int, slots: int) -> bool:
        size_bytes = slots * namespace.stride_bytes
        is_added = False
        try:
            segment = await asyncio.get_running_loop().run_in_executor(
                self._executor,
                lambda: self.arena.make_segment(segment_id, stride_bytes=namespace.stride_bytes, slots=slots),
            )
            if namespace.is_retired:
                segment.close()
            else:
                namespace.pool.add(segment)
                self._instances.tell(SegmentsChanged(added_ids=(segment.segment_id,)), attached_to=namespace)
                is_added = True
        except OSError as error:
            # Less memory than dram_bytes promises: make do with what there is, and ask again later.
            self._refused_until_s = self._clock() + _REFUSAL_PAUSE_S
            _log.warning(
                "system_refused_memory", size_bytes=size_bytes, why=str(error), used_bytes=self.arena.used_bytes
            )
        finally:
            namespace.growing_bytes -= size_bytes
            self.in_flight_bytes -= size_bytes
            if not is_added:
                self.arena.give_back(size_bytes)
        return is_added

    async def keep_up(self, namespace: Namespace, *, may_grow: bool) -> None:
        """One step ahead of need: a segment while few slots are free, else the watermarks."""
        is_short = namespace.pool.free_slots * namespace.stride_bytes < self._config.dram_grow_ahead_bytes
        if may_grow and is_short and await self.grow(namespace):
            return
        self._keep_watermarks(namespace)

    async def release_all(self, namespace: Namespace) -> None:
        """Give every segment back; all slots must be free."""
        dropped = [namespace.pool.drop(position) for position, _ in namespace.pool.live_segments()]
        # All of them even if the caller is cancelled meanwhile: nobody else knows them any more.
        closing = [self._start_closing(namespace, segment) for segment in dropped]
        if closing:
            await asyncio.wait(closing)

    def close(self) -> None:
        """Give all memory back. Blocks until the threads that make and close segments are done."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        for namespace in self._namespaces.values():
            for _, segment in namespace.pool.live_segments():
                segment.close()

    def _keep_watermarks(self, namespace: Namespace) -> None:
        # Only memory that cannot grow is kept partly free: evicting earlier would lose hits.
        total, free = namespace.pool.total_slots, namespace.pool.free_slots
        has_room = self.arena.unused_bytes >= namespace.stride_bytes and not self._is_at_quota(namespace)
        may_grow = has_room and self._clock() >= self._refused_until_s
        if may_grow or total - free <= self._config.high_watermark * total:
            return
        wanted = int((1.0 - self._config.low_watermark) * total) - free
        reason = DropReason.QUOTA if self._is_at_quota(namespace) else DropReason.CAPACITY
        namespace.evict(min(wanted, _EVICTION_SLICE), reason, self._clock())

    def _share_bytes(self, taker: Namespace) -> int:
        sharing = sum(1 for namespace in self._namespaces.values() if namespace is taker or namespace.pool.size_bytes)
        return self.arena.capacity_bytes // sharing

    def _is_at_quota(self, namespace: Namespace) -> bool:
        quota_bytes = namespace.rule.dram_quota_bytes
        return quota_bytes > 0 and namespace.pool.size_bytes + namespace.stride_bytes > quota_bytes

    def _refusal(self, namespace: Namespace, wanted: int, available: int) -> CapacityExhausted:
        if self._is_at_quota(namespace):
            return QuotaExceeded(
                f"{wanted} blocks wanted, {available} could leave: the rest of the namespace's quota of "
                f"{namespace.rule.dram_quota_bytes} bytes is in use (leased, being written or quarantined)"
            )
        return CapacityExhausted(
            f"{wanted} blocks wanted, {available} could leave: the rest of the arena is in use "
            "(leased, being written or quarantined); raise dram_bytes or hold leases for a shorter time"
        )

    def _segment_to_reclaim(self, taker: Namespace) -> tuple[Namespace | None, int]:
        """The coldest segment without holders in the namespace furthest above its share.

        Only where the taker ends up with no more than the donor keeps, or has nothing at all:
        else two namespaces would take the same segment from each other for ever.
        """
        share_bytes = self._share_bytes(taker)
        above = [
            other for other in self._namespaces.values() if other is not taker and other.pool.size_bytes > share_bytes
        ]
        for donor in sorted(above, key=lambda other: other.pool.size_bytes, reverse=True):
            coldest = min(self._temperatures(donor), default=None)
            if coldest is None:
                continue
            segment = donor.pool.segments[coldest[-1]]
            kept_bytes = donor.pool.size_bytes - (segment.size_bytes if segment else 0)
            if kept_bytes > taker.pool.size_bytes or not taker.pool.size_bytes:
                return donor, coldest[-1]
        return None, 0

    def _temperatures(self, namespace: Namespace) -> Iterable[tuple[float, float, int]]:
        """(mean time of last use, minus mean depth, position) of the segments that nobody holds slots of.

        Among equally cold ones the deepest: a segment of roots would take whole chains with it.
        """
        pool, index = namespace.pool, namespace.index
        for position, segment in pool.live_segments():
            first = position * pool.slots_per_segment
            slots = slice(first, first + segment.slots)
            if not pool.holders[slots].any():
                rows = pool.row_of[slots]
                rows = rows[rows != NO_ROW]
                depth = float(np.mean(index.depth[rows])) if len(rows) else 0.0
                yield (float(np.sum(index.last_used_s[rows])) / segment.slots, -depth, position)

    async def _reclaim(self, donor: Namespace, position: int) -> None:
        pool = donor.pool
        first = position * pool.slots_per_segment
        rows = pool.row_of[first : first + pool.slots_per_segment]
        for row in rows[rows != NO_ROW].tolist():
            if pool.row_of[donor.index.slot[row]] != row:
                continue  # went with the subtree of one before it
            if donor.index.extent[row] != NO_EXTENT:
                donor.demote(row)
            else:
                donor.drop_subtrees([row], DropReason.RECLAIMED, self._clock())
        await asyncio.shield(self._start_closing(donor, pool.drop(position)))

    def _start_closing(self, namespace: Namespace, segment: Segment) -> asyncio.Task[None]:
        # Holders of the mapping hear of it before the memory is punched out under it.
        self._instances.tell(SegmentsChanged(retired_ids=(segment.segment_id,)), attached_to=namespace)
        self.in_flight_bytes += segment.size_bytes
        return asyncio.create_task(self._close(segment))

    async def _close(self, segment: Segment) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, segment.close)
        self.in_flight_bytes -= segment.size_bytes
        self.arena.give_back(segment.size_bytes)


@contextmanager
def sparing(namespace: Namespace, rows: Rows) -> Iterator[None]:
    """Room is made meanwhile, but not by what of these rows is in DRAM."""
    slots: Slots = namespace.index.slot[rows]
    slots = slots[slots != NO_SLOT]
    namespace.pool.hold(slots)
    try:
        yield
    finally:
        namespace.end_hold(slots)
