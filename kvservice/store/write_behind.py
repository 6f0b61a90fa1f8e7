"""Makes committed blocks durable within seconds, without anybody waiting for it.

One task takes committed blocks in batches, fronts of chains first, and does for each batch: reserve
extents, write the payloads (several transfers side by side), flush, then record them in the journal.
Only then does the index say that the blocks are on NVMe; until then they are *dirty* and stay in
DRAM. Blocks that no disk takes (offline, full of what is warmer) stop being dirty: they live in DRAM
only, and leave the store from there.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvservice.blocks import NO_ROW, NO_SLOT, BlockHash, Rows, Slots
from kvservice.checksums import checksum_of
from kvservice.config import Config
from kvservice.errors import CapacityExhausted, Overloaded
from kvservice.index import Index, State
from kvservice.logs import event_log
from kvservice.metrics import Metrics
from kvservice.nvme import WriteJob
from kvservice.store.disk_space import DiskSpace
from kvservice.store.disks import Disk, Disks
from kvservice.store.journal import Journal
from kvservice.store.namespace import Namespace
from kvservice.transfers import Priority, Transfer

_BATCH_BYTES = 256 * 1024 * 1024
_FLUSH_BATCH_BYTES = 32 * 1024 * 1024
_TRANSFER_BYTES = 16 * 1024 * 1024
_BUSY_RETRY_S = 0.05

_log = event_log(__name__)


@dataclass(frozen=True, slots=True)
class _Block:
    """One block of a batch, as the writing threads need it."""

    row: int
    block_hash: BlockHash
    parent_hash: bytes
    slot: int
    extent: int
    known_checksum: int | None


class WriteBehind:
    """The queue of dirty blocks and the task that works it off."""

    def __init__(self, config: Config, disks: Disks, disk_space: DiskSpace, journal: Journal, metrics: Metrics) -> None:
        self._config = config
        self._disks = disks
        self._disk_space = disk_space
        self._journal = journal
        self._metrics = metrics
        self._queue: deque[tuple[float, Namespace, Rows]] = deque()
        self._wake = asyncio.Event()
        self._batch_bytes = _BATCH_BYTES
        self._is_hurried = False
        self.pausing = asyncio.Event()
        """Set while no batch is being written."""
        self.pausing.set()
        self._progress = asyncio.Condition()

    @property
    def queued_blocks(self) -> int:
        """Blocks that are not durable yet."""
        return sum(len(rows) for _, _, rows in self._queue)

    @property
    def is_busy(self) -> bool:
        """Whether a batch is being written."""
        return not self.pausing.is_set()

    def submit(self, namespace: Namespace, rows: Rows) -> None:
        """These rows were committed, or are worth writing now: those that are admitted will be. Never blocks."""
        if self._config.nvme_admission == "reused":
            rows = rows[namespace.index.uses[rows] > 0]
        if self._disks.can_write and len(rows):
            namespace.index.dirty[rows] = True
            self._queue.append((time.monotonic(), namespace, rows))
            self._wake.set()

    def used(self, namespace: Namespace, rows: Rows) -> None:
        """A Get used the bytes of these rows (chain order): what was not admitted before may be now."""
        if self._config.nvme_admission == "reused":
            self.submit(namespace, namespace.index.unwritten(rows))

    def submit_missing(self, namespace: Namespace) -> None:
        """Queue every block that is in DRAM only: committed while no disk took any."""
        index = namespace.index
        rows = index.unwritten(np.flatnonzero(index.state >= State.RESIDENT).astype(np.int32))
        if len(rows):
            self.submit(namespace, rows[np.argsort(index.depth[rows], kind="stable")])

    def give_up(self) -> None:
        """No disk takes blocks: what is queued lives in DRAM only, and may leave from there."""
        while self._queue:
            _, namespace, rows = self._queue.popleft()
            waiting = rows[namespace.index.dirty[rows]]
            namespace.index.dirty[waiting] = False
            self._metrics.nvme_given_up_blocks.inc(len(waiting))

    async def run(self) -> None:
        """Work the queue off until cancelled."""
        while True:
            await self._wait_for_batch()
            await self.write_batch()

    async def write_batch(self) -> None:
        """Make the oldest batch durable, or give it up. Wakes those who wait for progress."""
        batch = self._take_batch()
        self.pausing.clear()
        try:
            for namespace, rows in batch:
                await self._write(namespace, rows)
        finally:
            self.pausing.set()
        async with self._progress:
            self._progress.notify_all()

    async def flush(self, deadline_s: float) -> bool:
        """Write everything queued now, what is most likely to be needed first; whether all was by the deadline.

        Args:
            deadline_s: on time.monotonic's clock.
        """
        self._batch_bytes = _FLUSH_BATCH_BYTES  # the deadline cuts between batches
        self._put_in_order()
        try:
            while self._queue or self.is_busy:
                remaining_s = deadline_s - time.monotonic()
                if remaining_s <= 0 or not await self.wait_for_progress(remaining_s):
                    break
        finally:
            self._batch_bytes = _BATCH_BYTES
        return not self._queue and not self.is_busy

    def _put_in_order(self) -> None:
        """What waiting requests need comes first, the soonest before the others, then what was used last."""
        rows_of: dict[Namespace, list[Rows]] = {}
        for _, namespace, rows in self._queue:
            rows_of.setdefault(namespace, []).append(rows)
        pieces = []
        for namespace, parts in rows_of.items():
            ranked = _ranked(namespace, np.unique(np.concatenate(parts)))
            at_once = max(1, self._batch_bytes // namespace.stride_bytes)
            for start in range(0, len(ranked), at_once):
                piece = ranked[start : start + at_once]
                pieces.append((piece[0][:2], namespace, np.array([row for *_, row in piece], dtype=np.int32)))
        pieces.sort(key=lambda piece: piece[0])
        self._queue = deque((time.monotonic(), namespace, rows) for _, namespace, rows in pieces)

    async def wait_for_progress(self, timeout_s: float) -> bool:
        """Wait until a batch became durable or was given up; whether one did."""
        self._is_hurried = True
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s), self._progress:
                await self._progress.wait()
        except TimeoutError:
            return False
        return True

    async def _wait_for_batch(self) -> None:
        """Until the oldest block is due, or there is a batch's worth of bytes, or somebody hurries."""
        while True:
            self._wake.clear()
            if self._queue:
                # Half of the window, so that the other half remains for the writing itself.
                due_in_s = self._queue[0][0] + self._config.nvme_write_behind_s / 2 - time.monotonic()
                queued_bytes = sum(len(rows) * namespace.stride_bytes for _, namespace, rows in self._queue)
                if due_in_s <= 0 or queued_bytes >= self._batch_bytes or self._is_hurried:
                    self._is_hurried = False
                    return
                timeout_s: float | None = due_in_s
            else:
                self._is_hurried = False  # there is nothing to hurry with
                timeout_s = None
            try:
                async with asyncio.timeout(timeout_s):  # wait_for may swallow a cancellation
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _take_batch(self) -> list[tuple[Namespace, Rows]]:
        """The oldest rows by namespace: however many Commits they came in, they are flushed and recorded together."""
        batch: dict[int, tuple[Namespace, list[Rows]]] = {}
        size_bytes = 0
        while self._queue and size_bytes < self._batch_bytes:
            _, namespace, rows = self._queue.popleft()
            batch.setdefault(id(namespace), (namespace, []))[1].append(rows)
            size_bytes += len(rows) * namespace.stride_bytes
        return [(namespace, _distinct(np.concatenate(parts))) for namespace, parts in batch.values()]

    async def _write(self, namespace: Namespace, rows: Rows) -> None:
        index = namespace.index
        rows = rows[index.dirty[rows] & (index.slot[rows] != NO_SLOT) & (index.state[rows] >= State.RESIDENT)]
        if not len(rows):
            return
        slots: Slots = index.slot[rows]
        namespace.pool.hold(slots)
        extents: list[int] = []
        taken = 0
        try:
            disk, extents = await self._disk_space.reserve(namespace, len(rows))
            still_there = np.flatnonzero(namespace.pool.row_of[slots] == rows)
            chosen = still_there
            if len(extents) < len(still_there):
                # What does not fit is worth less than what does, and behind it.
                best = [row for *_, row in _ranked(namespace, rows[still_there])][: len(extents)]
                chosen = np.flatnonzero(np.isin(rows, best))
            self._disks.release(extents[len(chosen) :])
            extents = extents[: len(chosen)]
            blocks = self._blocks(namespace, rows[chosen], slots[chosen], extents)
            started_s = time.monotonic()
            checksums = await self._write_payloads(disk, namespace, blocks)
            write_s = time.monotonic() - started_s
            self._metrics.nvme_written_seconds.inc(write_s)
            disk.moved.write_s += write_s
            disk.moved.admitted_bytes += len(blocks) * namespace.spec.block_size_bytes
            self._file(namespace, blocks, checksums)
            extents, taken = [], len(blocks)
            await self._journal.append(disk)
        except (CapacityExhausted, Overloaded, OSError) as error:
            self._disks.release(extents)
            if isinstance(error, OSError):
                _log.warning("write_behind_failed", why=str(error), blocks=len(rows))
        finally:
            # Given up: these blocks live on in DRAM only, and may leave from there.
            self._metrics.nvme_given_up_blocks.inc(len(rows) - taken)
            owned = namespace.pool.row_of[slots] == rows
            index.dirty[rows[owned]] = False
            namespace.end_work(slots)

    def _blocks(self, namespace: Namespace, rows: Rows, slots: Slots, extents: Sequence[int]) -> list[_Block]:
        index = namespace.index
        return [
            _Block(
                row=row,
                block_hash=index.hash_of(row),
                parent_hash=self._parent_hash(index, row, parent),
                slot=slot,
                extent=extent,
                known_checksum=int(checksum) if is_known else None,
            )
            for row, parent, slot, extent, checksum, is_known in zip(
                rows.tolist(),
                index.parent[rows].tolist(),
                slots.tolist(),
                extents,
                index.checksum[rows].tolist(),
                index.checksummed[rows].tolist(),
                strict=True,
            )
        ]

    @staticmethod
    def _parent_hash(index: Index, row: int, parent: int) -> bytes:
        if index.state[row] == State.UNNAMED:
            return index.hash_of(row)  # behind itself: after a restart as unreachable by its name as now
        return b"" if parent == NO_ROW else index.hash_of(parent)

    async def _write_payloads(self, disk: Disk, namespace: Namespace, blocks: Sequence[_Block]) -> list[int]:
        """Write side by side, then flush; returns the checksums. Raises OSError, Overloaded."""
        at_once = max(1, _TRANSFER_BYTES // namespace.stride_bytes)
        groups = [blocks[start : start + at_once] for start in range(0, len(blocks), at_once)]
        epoch = disk.volume.epoch
        transfers: list[Transfer[list[int]]] = []
        size_bytes, moved_bytes = len(blocks) * namespace.stride_bytes, 0
        disk.writes.began(size_bytes, time.monotonic())
        try:
            for group in groups:
                write = partial(self._write_group, disk, namespace, group)
                group_bytes = len(group) * namespace.stride_bytes
                transfers.append(disk.transfers.submit(Priority.WRITE, write, size_bytes=group_bytes))
            written = await asyncio.gather(*(transfer.done for transfer in transfers))
            moved_bytes = size_bytes
            await disk.transfers.submit(Priority.WRITE, partial(self._flush, disk, epoch)).done
        except OSError as error:
            disk.health.refuse_writes(str(error))
            raise
        finally:
            # Nobody may free the slots or extents while a thread still writes from one to the other.
            await asyncio.gather(*(transfer.done for transfer in transfers), return_exceptions=True)
            disk.writes.ended(size_bytes, moved_bytes, time.monotonic())
        return [checksum for group in written for checksum in group]

    @staticmethod
    def _flush(disk: Disk, epoch: int) -> None:
        """In a thread."""
        with disk.health.working(0):
            disk.volume.flush(epoch)

    def _write_group(self, disk: Disk, namespace: Namespace, group: Sequence[_Block]) -> list[int]:
        """In a thread."""
        size_bytes = namespace.spec.block_size_bytes
        jobs = []
        with ExitStack() as stack:
            for block in group:
                memory = stack.enter_context(namespace.pool.memory(block.slot, namespace.stride_bytes))
                known = block.known_checksum
                checksum = checksum_of(memory[:size_bytes]) if known is None else known
                jobs.append(WriteJob(self._disks.local(block.extent), block.block_hash, memory, checksum))
            disk.throttle.wait(sum(len(job.memory) for job in jobs))
            with disk.health.working(0):
                disk.volume.write(namespace.spec, jobs)
        return [job.checksum for job in jobs]

    def _file(self, namespace: Namespace, blocks: Sequence[_Block], checksums: Sequence[int]) -> None:
        """The payloads are durable: the index knows, the journal will."""
        index = namespace.index
        filed = []
        for block, checksum in zip(blocks, checksums, strict=True):
            if namespace.pool.row_of[block.slot] != block.row:
                self._disks.release([block.extent])  # dropped while it was written
                continue
            index.attach_extent(block.row, block.extent)
            index.checksum[block.row] = checksum
            index.checksummed[block.row] = True
            filed.append(block.row)
            self._journal.stored(namespace, block.row, block.parent_hash, block.extent, checksum)
            self._journal.aliased(namespace, np.array(namespace.aliases.of_source(block.row), dtype=np.int32))
            for session in namespace.sessions.of_tip(block.row):
                self._journal.session(namespace, block.extent, session)
        # Their turn may have come, and passed, while they were in DRAM only.
        namespace.nvme_policy.released(np.array(filed, dtype=np.int32))
        self._metrics.nvme_written_bytes.inc(len(blocks) * namespace.spec.block_size_bytes)


def _distinct(rows: Rows) -> Rows:
    """Each row where it was queued last: one that was dropped and used again was queued for both of its blocks."""
    _, from_the_end = np.unique(rows[::-1], return_index=True)
    distinct: Rows = rows[np.sort(len(rows) - 1 - from_the_end)]
    return distinct


def _ranked(namespace: Namespace, rows: Rows) -> list[tuple[float, float, int, int]]:
    """Dirty rows as (order of the first request that waits, minus time of last use, depth, row), the best first.

    A block is worth as much as the best one behind it, and comes before that: without it nothing behind it is found.
    """
    index = namespace.index
    rows = rows[index.dirty[rows]]
    orders = dict(zip(rows.tolist(), namespace.window.order_of(rows).tolist(), strict=True))
    unused_s = dict(zip(rows.tolist(), (-index.last_used_s[rows]).tolist(), strict=True))
    for row in rows[np.argsort(-index.depth[rows], kind="stable")].tolist():
        parent = int(index.parent[row])
        if parent in orders:
            orders[parent] = min(orders[parent], orders[row])
            unused_s[parent] = min(unused_s[parent], unused_s[row])
    return sorted((orders[row], unused_s[row], int(index.depth[row]), row) for row in orders)
