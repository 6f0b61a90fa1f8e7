"""saving: the background thread that hands new blocks to the service, and its bounded queue.

The engine's thread has blocks copied out of the cache (which may be overwritten as soon as `offer`
returns); the rest of their way happens here. The queue is bounded: when it is full the engine does
not wait, it offers the same blocks again later.
"""

import enum
import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import kvservice_client
from kvservice_adapters.transformers.counters import AdapterCounters
from kvservice_adapters.transformers.layout import KVRows
from kvservice_adapters.transformers.paths import BlockPath, Outgoing
from kvservice_adapters.transformers.sequence import TrackedSequence

_log = logging.getLogger(__name__)


class DrainOutcome(enum.Enum):
    """How waiting for queued saves ended."""

    DRAINED = "drained"
    TIMED_OUT = "timed out"


@dataclass(frozen=True)
class _SaveJob:
    sequence: TrackedSequence
    first_block: int
    hashes: Sequence[bytes]
    parent: bytes
    outgoing: Outgoing


class BackgroundSaver:
    """Queue and thread. `offer` belongs to the engine's thread, the rest to any thread."""

    def __init__(self, path: BlockPath, counters: AdapterCounters, *, deadline_s: float) -> None:
        self._path = path
        self._counters = counters
        self._deadline_s = deadline_s
        self._changed = threading.Condition()
        self._jobs: deque[_SaveJob] = deque()
        self._queued_blocks = 0
        self._pending: set[bytes] = set()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kvservice-saver", daemon=True)
        self._thread.start()

    def offer(self, sequence: TrackedSequence, rows: KVRows, *, end_block: int) -> None:
        """Queue copies of the sequence's unsaved blocks before `end_block`, as many as the queue takes."""
        first = sequence.next_save_block
        with self._changed:
            room = 0 if self._stopping else self._path.outgoing_blocks_max - self._queued_blocks
        count = min(end_block - first, room)
        outgoing = self._path.copy_out(rows, first, count) if count > 0 else None
        if outgoing is None:
            return
        end = first + outgoing.blocks
        hashes = tuple(sequence.chain.hashes[first:end])
        parent = sequence.chain.hashes[first - 1] if first else b""
        sequence.save_started(first, end)
        with self._changed:
            self._queued_blocks += len(hashes)
            self._pending.update(hashes)
            self._jobs.append(_SaveJob(sequence, first, hashes, parent, outgoing))
            self._changed.notify_all()

    def settle(self, hashes: Sequence[bytes], timeout_s: float) -> DrainOutcome:
        """Wait until none of these blocks is on its way to the service any more."""
        wanted = set(hashes)
        with self._changed:
            done = self._changed.wait_for(lambda: wanted.isdisjoint(self._pending), timeout_s)
        return DrainOutcome.DRAINED if done else DrainOutcome.TIMED_OUT

    def drain(self, timeout_s: float) -> DrainOutcome:
        """Wait until the queue is empty and nothing is in flight."""
        with self._changed:
            done = self._changed.wait_for(lambda: self._queued_blocks == 0, timeout_s)
        return DrainOutcome.DRAINED if done else DrainOutcome.TIMED_OUT

    def stop(self, timeout_s: float) -> DrainOutcome:
        """Take nothing more, finish what is queued, end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return DrainOutcome.TIMED_OUT if self._thread.is_alive() else DrainOutcome.DRAINED

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._stopping)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
            try:
                self._save(job)
            except Exception as error:  # noqa: BLE001
                # A fault in the client or the driver costs these blocks only: an engine that goes on
                # without saving, and without a word, would be worse than one with a traceback in its log.
                _log.exception("saving %d blocks failed", len(job.hashes))
                self._counters.add("unsaved_blocks", len(job.hashes), reason=type(error).__name__)
                job.sequence.save_failed(job.first_block)
            finally:
                self._finished(job.hashes)

    def _finished(self, hashes: Sequence[bytes]) -> None:
        with self._changed:
            self._queued_blocks -= len(hashes)
            self._pending.difference_update(hashes)
            self._changed.notify_all()

    def _save(self, job: _SaveJob) -> None:
        try:
            done = job.outgoing.save(
                job.hashes,
                parent=job.parent,
                session_id=job.sequence.session_id,
                request_id=job.sequence.request_id,
                deadline_s=self._deadline_s,
            )
        except kvservice_client.KVServiceError as error:
            self._counters.add("unsaved_blocks", len(job.hashes), reason=type(error).__name__)
            job.sequence.save_failed(job.first_block)
            return
        self._counters.add("saved_blocks", done.saved)
        self._counters.add("already_held_blocks", done.held + done.being_written)
        unsaved = len(job.hashes) - done.saved - done.held - done.being_written
        if unsaved == 0:
            job.sequence.save_succeeded()
            return
        # A block before these is not held any more (OK: it left between reservation and commit), so the
        # chain must be saved from its root; any other reason says nothing against what was saved before.
        prefix_lost = done.reason in {kvservice_client.Reason.PARENT_MISSING, kvservice_client.Reason.OK}
        self._counters.add("unsaved_blocks", unsaved, reason="PARENT_MISSING" if prefix_lost else done.reason.name)
        job.sequence.save_failed(0 if prefix_lost else job.first_block)
