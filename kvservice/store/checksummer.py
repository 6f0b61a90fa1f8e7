"""Makes the checksums of committed blocks off the critical path.

Commit only queues; one background task hashes small batches in threads of low priority, holding
the slots meanwhile. Who moves bytes out of DRAM before that makes the checksum itself; while
write-behind does so, this waits, so that no block is hashed twice.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kvservice.blocks import NO_ROW, Slots
from kvservice.checksums import checksum_of
from kvservice.dram import SlotPool
from kvservice.index import State
from kvservice.metrics import Metrics
from kvservice.store.namespace import Namespace

_BATCH_BYTES = 64 * 1024 * 1024
_NICENESS = 10


class Checksummer:
    """The queue of blocks without a checksum, and the task that works it off."""

    def __init__(self, metrics: Metrics, *, threads: int, may_work: asyncio.Event | None = None) -> None:
        """Args:
        may_work: cleared while somebody else makes checksums; None: nobody does.
        """
        self._metrics = metrics
        self._may_work = may_work or asyncio.Event()
        if may_work is None:
            self._may_work.set()
        self._queue: deque[tuple[Namespace, Slots]] = deque()
        self._wake = asyncio.Event()
        self._at_work_on: Namespace | None = None
        self._batch_done = asyncio.Event()
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="checksum", initializer=_lower_priority)

    @property
    def queued_blocks(self) -> int:
        """Blocks waiting for their checksum."""
        return sum(len(slots) for _, slots in self._queue)

    def is_holding(self, namespace: Namespace) -> bool:
        """Whether slots of the namespace are held by the batch at work."""
        return self._at_work_on is namespace

    async def wait_for_batch(self, timeout_s: float) -> bool:
        """Wait until the batch at work lets go of its slots; whether it did in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._batch_done.wait()
        except TimeoutError:
            return False
        return True

    def submit(self, namespace: Namespace, slots: Slots) -> None:
        """Queue freshly committed slots. Never blocks."""
        at_once = max(1, _BATCH_BYTES // namespace.spec.block_size_bytes)
        for start in range(0, len(slots), at_once):
            self._queue.append((namespace, slots[start : start + at_once]))
        self._wake.set()

    async def run(self) -> None:
        """Work the queue off until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                await self._may_work.wait()
                namespace, slots = self._queue.popleft()
                slots = _still_waiting(namespace, slots)
                if len(slots):
                    size_bytes = namespace.spec.block_size_bytes
                    namespace.pool.hold(slots)
                    self._at_work_on = namespace
                    self._batch_done.clear()
                    try:
                        sums = await loop.run_in_executor(self._executor, _checksums, namespace.pool, slots, size_bytes)
                        _record(namespace, slots, sums)
                    finally:
                        namespace.end_work(slots)
                        self._at_work_on = None
                        self._batch_done.set()
                    self._metrics.checksummed_blocks.inc(len(slots))

    def close(self) -> None:
        """Stop the threads. Blocks until the batch in progress is done."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _still_waiting(namespace: Namespace, slots: Slots) -> Slots:
    """Those that still hold a committed block without a checksum.

    A slot may have been evicted since it was queued, and even be under a writer's hands again.
    """
    rows = namespace.pool.row_of[slots]
    slots, rows = slots[rows != NO_ROW], rows[rows != NO_ROW]
    is_committed = namespace.index.state[rows] >= State.WRITTEN
    waiting: Slots = slots[is_committed & ~namespace.index.checksummed[rows]]
    return waiting


def _checksums(pool: SlotPool, slots: Slots, size_bytes: int) -> np.ndarray:
    return np.array([checksum_of(pool.memory(slot, size_bytes)) for slot in slots.tolist()], dtype=np.uint64)


def _record(namespace: Namespace, slots: Slots, sums: np.ndarray) -> None:
    rows = namespace.pool.row_of[slots]
    stayed = rows != NO_ROW  # a forgotten block's slot is still held here, but nobody's
    namespace.index.checksum[rows[stayed]] = sums[stayed]
    namespace.index.checksummed[rows[stayed]] = True


def _lower_priority() -> None:
    # Engines' copies go first. Linux gives every thread a niceness of its own.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
