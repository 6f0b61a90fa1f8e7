"""Bringing blocks from NVMe into DRAM: split into transfers, coalesced, settled on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvservice.blocks import NO_ROW, DropReason, Rows, Slots
from kvservice.errors import Overloaded
from kvservice.metrics import Metrics
from kvservice.nvme import ReadJob, ReadResult
from kvservice.store.arrivals import Arrival, Landing
from kvservice.store.disks import Disk, Disks
from kvservice.store.namespace import Namespace
from kvservice.transfers import Priority

_TRANSFER_BYTES_MAX = 8 * 1024 * 1024
_FAILED_EXTENTS_MAX = 65_536


@dataclass(frozen=True, slots=True)
class _Read:
    """What a transfer brought, and how long the disk took."""

    landings: list[Landing]
    seconds: float


class Promotion:
    """Starts reads and files their results."""

    def __init__(self, disks: Disks, metrics: Metrics, *, clock: Callable[[], float]) -> None:
        self._disks = disks
        self._metrics = metrics
        self._clock = clock
        self._failed_once: set[int] = set()

    def start(
        self, namespace: Namespace, rows: Rows, slots: Slots, priority: Priority, *, urgency: float = 0.0
    ) -> list[Arrival]:
        """Read the blocks of `rows` (chain order, on readable extents) into `slots`.

        The slots are the caller's (one holder each); the transfers hold them besides. What the
        queue has no room for is settled as offline at once.

        Args:
            urgency: among transfers of the same priority; see TransferQueue.
        """
        if priority is Priority.PREFETCH:
            self._metrics.prefetches.started.inc(len(rows))
        namespace.index.attach_slots(rows, slots)
        namespace.pool.row_of[slots] = rows
        namespace.pool.hold(slots)
        return [
            self._submit(namespace, rows[run], slots[run], priority, urgency) for run in self._runs(namespace, rows)
        ]

    def join(self, namespace: Namespace, rows: Sequence[int]) -> None:
        """Somebody waits for these arriving blocks: their transfers become as urgent as a Get's."""
        for row in rows:
            arrival = namespace.arrivals.get(row)
            if arrival is None:
                continue
            if arrival.is_hinted and row not in arrival.awaited:
                self._metrics.prefetches.late.inc()
            arrival.awaited.add(row)
            if arrival.transfer is not None:
                disk = self._disks.of(int(namespace.index.extent[row]))
                disk.transfers.hurry(arrival.transfer, Priority.GET)

    def used(self, namespace: Namespace, rows: Rows) -> None:
        """A Get hands these out: those that were prefetched have proved useful."""
        prefetched = int(np.count_nonzero(namespace.index.prefetched[rows]))
        if prefetched:
            self._metrics.prefetches.useful.inc(prefetched)
            namespace.index.prefetched[rows] = False

    def reorder(self, namespace: Namespace, arrival: Arrival, urgency: float) -> None:
        """A hinted read is more or less urgent than it was."""
        if arrival.transfer is not None and not arrival.landed.done():
            disk = self._disks.of(int(namespace.index.extent[arrival.rows[0]]))
            disk.transfers.reorder(arrival.transfer, urgency)

    def cancel(self, namespace: Namespace, arrival: Arrival) -> None:
        """Nobody needs a hinted read any more; what is being read, or awaited by a Get, goes on."""
        is_gone = namespace.arrivals.get(arrival.rows[0]) is not arrival
        if arrival.transfer is None or arrival.landed.done() or arrival.awaited or is_gone:
            return
        disk = self._disks.of(int(namespace.index.extent[arrival.rows[0]]))
        if disk.transfers.cancel(arrival.transfer):
            self._metrics.prefetches.cancelled.inc(len(arrival.rows))

    def _runs(self, namespace: Namespace, rows: Rows) -> list[slice]:
        """Consecutive blocks of one disk, a few MiB each; the very first block goes alone."""
        at_once = max(1, _TRANSFER_BYTES_MAX // namespace.stride_bytes)
        disks = [id(self._disks.of(extent)) for extent in namespace.index.extent[rows].tolist()]
        runs, start = [], 0
        for position in range(1, len(rows) + 1):
            is_full = position - start == (1 if start == 0 else at_once)
            if position == len(rows) or is_full or disks[position] != disks[start]:
                runs.append(slice(start, position))
                start = position
        return runs

    def _submit(self, namespace: Namespace, rows: Rows, slots: Slots, priority: Priority, urgency: float) -> Arrival:
        index, size_bytes = namespace.index, namespace.spec.block_size_bytes
        disk = self._disks.of(int(index.extent[rows[0]]))
        jobs = [
            ReadJob(self._disks.local(extent), index.hash_of(row), namespace.pool.memory(slot, namespace.stride_bytes))
            for extent, row, slot in zip(index.extent[rows].tolist(), rows.tolist(), slots.tolist(), strict=True)
        ]
        arrival = Arrival(
            rows.tolist(), asyncio.get_running_loop().create_future(), is_hinted=priority is Priority.PREFETCH
        )
        for row in arrival.rows:
            namespace.arrivals[row] = arrival

        def give_up() -> None:
            # The thread may hang for ever; its slots are its own until it ends, but nobody need wait for them.
            if not arrival.landed.done():
                arrival.landed.set_result(dict.fromkeys(arrival.rows, Landing.TIER_OFFLINE))

        disk.health.on_offline.add(give_up)

        def settle(outcome: Sequence[Landing] | BaseException) -> None:
            disk.health.on_offline.discard(give_up)
            landings = outcome if isinstance(outcome, Sequence) else [Landing.TIER_OFFLINE] * len(rows)
            if isinstance(outcome, OSError):
                if disk.health.can_read:
                    landings = self._unreadable(namespace, rows)
                disk.health.fail(str(outcome))
            self._settle(namespace, arrival, slots, landings)

        try:
            transfer = disk.transfers.submit(
                priority,
                lambda: self._read(disk, namespace, jobs),
                urgency=urgency,
                size_bytes=len(rows) * namespace.stride_bytes,
            )
        except Overloaded:
            settle([Landing.TIER_OFFLINE] * len(rows))
            return arrival
        disk.reads.began(len(rows) * size_bytes, time.monotonic())
        arrival.transfer = transfer
        submitted_at_s = self._clock()

        def done(future: asyncio.Future[_Read]) -> None:
            is_read = not future.cancelled() and future.exception() is None
            disk.reads.ended(len(rows) * size_bytes, len(rows) * size_bytes * is_read, time.monotonic())
            if future.cancelled():
                settle([Landing.GONE] * len(rows))
            elif (error := future.exception()) is not None:
                settle(error)
            else:
                read = future.result()
                disk.health.took(read.seconds, len(rows) * size_bytes)
                disk.moved.read_s += read.seconds
                disk.moved.read_bytes += read.landings.count(Landing.OK) * size_bytes
                disk.moved.checksum_failures += read.landings.count(Landing.CORRUPT)
                self._metrics.nvme_read_seconds.inc(read.seconds)
                if priority is Priority.PREFETCH:
                    self._metrics.operations.prefetch.observe(self._clock() - submitted_at_s)
                settle(read.landings)

        transfer.done.add_done_callback(done)
        return arrival

    def _read(self, disk: Disk, namespace: Namespace, jobs: Sequence[ReadJob]) -> _Read:
        """In a thread: the blocks of one transfer."""
        try:
            disk.throttle.wait(sum(len(job.memory) for job in jobs))
            started_s = time.monotonic()  # now: a disk that is held back is not a slow one
            with disk.health.working(len(jobs) * namespace.stride_bytes):
                results = disk.volume.read(namespace.spec, jobs)
        finally:
            for job in jobs:
                job.memory.release()
        landings = [Landing.OK if result is ReadResult.OK else Landing.CORRUPT for result in results]
        return _Read(landings, time.monotonic() - started_s)

    def _unreadable(self, namespace: Namespace, rows: Rows) -> list[Landing]:
        """A read failed while the disk worked: what fails for the second time is lost, or it would fail for ever."""
        extents = namespace.index.extent[rows].tolist()
        landings = [Landing.CORRUPT if extent in self._failed_once else Landing.TIER_OFFLINE for extent in extents]
        self._failed_once.symmetric_difference_update(extents)
        if len(self._failed_once) > _FAILED_EXTENTS_MAX:
            self._failed_once.clear()
        return landings

    def _settle(self, namespace: Namespace, arrival: Arrival, slots: Slots, landings: Sequence[Landing]) -> None:
        """On the event loop: the bytes are there, or are not going to be."""
        index, pool = namespace.index, namespace.pool
        by_row: dict[int, Landing] = {}
        for row, slot, landing in zip(arrival.rows, slots.tolist(), landings, strict=True):
            by_row[row] = landing
            if namespace.arrivals.get(row) is not arrival or pool.row_of[slot] != row:
                by_row[row] = Landing.GONE  # dropped while it was read
                continue
            del namespace.arrivals[row]
            if landing is Landing.OK:
                index.arriving[row] = False
                namespace.nvme_policy.exposed(row)  # passed over, maybe, while it was read
                index.prefetched[row] = arrival.is_hinted and row not in arrival.awaited
            elif landing is Landing.CORRUPT:
                self._metrics.checksum_failures.inc()
                namespace.drop_subtrees([row], DropReason.CORRUPT, self._clock())
            else:
                pool.row_of[slot] = NO_ROW
                index.detach_slot(row)
        namespace.end_hold(slots)
        arrived = np.array([row for row, landing in by_row.items() if landing is Landing.OK], dtype=np.int32)
        self._metrics.nvme_read_bytes.inc(len(arrived) * namespace.spec.block_size_bytes)
        if not arrival.landed.done():
            arrival.landed.set_result(by_row)
