"""transfers: loads and saves in threads, between the engine's blocks and the service.

A load that is ordered ends exactly once, with the engine's blocks that it could not fill, and not before nobody writes
into these any more: they are the next request's at once. A save is best effort; what matters is that nothing is stored
that was read from an engine block after it may have become another request's (see `Saves.stop_reading`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import kvservice_client as kv
from kvservice_adapters.vllm.blocks import BlockMemory, Fence, Filled, SaveCall, Source
from kvservice_adapters.vllm.counters import Counters
from kvservice_adapters.vllm.orders import LoadOrder, SaveOrder
from kvservice_client.outcomes import reason_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadsEnded:
    """Requests whose load is over, and the engine's blocks that were not filled."""

    request_ids: set[str]
    failed_block_ids: set[int]


class Loads:
    """Fills the engine's blocks. `order` and `ended` belong to the engine's thread."""

    def __init__(self, memory: BlockMemory, counters: Counters, *, threads: int, timeout_s: float) -> None:
        self._memory = memory
        self._counters = counters
        self._timeout_s = timeout_s
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="kvservice-load")
        self._lock = threading.Lock()
        self._begun: set[str] = set()
        self._ended: set[str] = set()
        self._failed: set[int] = set()
        self._unquiet: list[tuple[LoadOrder, Filled]] = []

    def order(self, order: LoadOrder, after: Fence | None = None) -> None:
        """Begin a load; it ends by itself.

        Args:
            after: what the engine may still do with these blocks; None: nothing.
        """
        self._executor.submit(self._load, order, after)
        self._begun.add(order.request_id)

    def ended(self) -> LoadsEnded:
        """What ended since the last call."""
        with self._lock:
            unquiet, self._unquiet = self._unquiet, []
        for order, filled in unquiet:
            self._end(order, filled)
        with self._lock:
            ended, self._ended = self._ended, set()
            self._begun -= ended
            failed, self._failed = self._failed, set()
        return LoadsEnded(ended, failed)

    def give_up(self, orders: Sequence[LoadOrder]) -> None:
        """End those that were not even begun."""
        for order in orders:
            if order.request_id not in self._begun:
                self._end(order, Filled(0, "not_begun"))

    def stop(self) -> None:
        """Begin no more; wait for what copies."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _load(self, order: LoadOrder, after: Fence | None) -> None:
        started_s = time.monotonic()
        filled = Filled(0, "internal")
        try:
            filled = self._memory.fill(order, after, self._timeout_s) if order.hashes else Filled(0, "not_begun")
        except kv.KVServiceError as error:
            filled = Filled(0, reason_of(error).value)
        except Exception as error:  # noqa: BLE001  # whatever it was: the engine waits for this load's end and computes
            _log.exception("a load failed in an unexpected way")
            self._counters.add("hook_errors", reason=type(error).__name__)
        finally:
            self._counters.add("load_seconds", time.monotonic() - started_s)
            self._end(order, filled)

    def _end(self, order: LoadOrder, filled: Filled) -> None:
        missing = order.block_ids[filled.blocks :]
        if not filled.is_quiet():
            # The engine computes into these blocks, or gives them away, as soon as it hears of this: not yet.
            with self._lock:
                self._unquiet.append((order, filled))
            return
        self._counters.add("loaded_blocks", filled.blocks)
        self._counters.add("loaded_bytes", filled.blocks * self._memory.layout.block_size_bytes)
        self._counters.add("shifted_blocks", filled.moved)
        self._counters.add("unloaded_blocks", len(missing), reason=filled.reason)
        with self._lock:
            self._failed.update(missing)
            self._ended.add(order.request_id)


@dataclass(slots=True, eq=False)
class _Chain:
    """What a request's saves are about, root first; lives until its last save is over. An Owner of blocks.

    Attributes:
        waiting: saves that still need the engine's blocks.
        is_being_saved: whether a thread is at one of its saves; the next waits for its end, as it hangs on it.
    """

    changed: threading.Condition
    hashes: list[bytes] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    waiting: int = 0
    keeps_blocks: bool = True
    is_read: bool = False
    is_being_saved: bool = False

    @contextmanager
    def reading(self) -> Iterator[bool]:
        """See Owner."""
        with self.changed:
            is_allowed = self.is_read = self.keeps_blocks
        try:
            yield is_allowed
        finally:
            with self.changed:
                self.is_read = False
                self.changed.notify_all()


@dataclass(frozen=True, slots=True)
class _Save:
    request_id: str
    session_id: str
    chain: _Chain
    first: int
    end: int


class Saves:
    """Threads that have full blocks stored; a request's one after the other, in the order in which they were filled."""

    def __init__(
        self, memory: BlockMemory, counters: Counters, *, threads: int, waiting_max: int, timeout_s: float
    ) -> None:
        self._memory = memory
        self._counters = counters
        self._waiting_max = waiting_max
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._chains: dict[str, _Chain] = {}
        self._queue: deque[tuple[_Save, Source]] = deque()
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._run, name=f"kvservice-save-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def order(self, orders: Sequence[SaveOrder]) -> None:
        """Save these blocks after the step that was just launched."""
        with self._changed:
            room = 0 if self._stopping else self._waiting_max - len(self._queue)
            saves = self._accepted(orders, room)
        sources = self._memory.sources([(save.chain.block_ids[save.first : save.end], save.chain) for save in saves])
        with self._changed:
            for save, source in zip(saves, sources, strict=True):
                save.chain.waiting += source.needs_blocks
                self._queue.append((save, source))
            self._changed.notify_all()

    def stop_reading(self, request_ids: Sequence[str]) -> None:
        """Their blocks are about to be overwritten: nothing that is read from them from now on is stored.

        What waits is forgotten, and a copy by this process's threads that is under way is waited for (milliseconds).
        """
        with self._changed:
            for request_id in request_ids:
                chain = self._chains.pop(request_id, None)
                if chain is not None:
                    chain.keeps_blocks = False
                    self._changed.wait_for(lambda chain=chain: not chain.is_read)  # type: ignore[misc]

    def take_done(self, request_ids: set[str]) -> set[str]:
        """Those of these requests that have no save left which needs their blocks; they are forgotten."""
        with self._changed:
            done = {name for name in request_ids if name not in self._chains or not self._chains[name].waiting}
        self.stop_reading(sorted(done))
        return done

    def stop(self) -> None:
        """Save what waits, then end the threads."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        ends_at_s = time.monotonic() + self._timeout_s
        for thread in self._threads:
            thread.join(max(0.0, ends_at_s - time.monotonic()))

    def _accepted(self, orders: Sequence[SaveOrder], room: int) -> list[_Save]:
        saves: list[_Save] = []
        for order in orders:
            if order.first == 0:
                self._chains[order.request_id] = _Chain(self._changed)
            chain = self._chains.setdefault(order.request_id, _Chain(self._changed))
            if order.first != len(chain.hashes):
                self._counters.add("unsaved_blocks", len(order.hashes), reason="gap")
                continue
            chain.hashes.extend(order.hashes)
            chain.block_ids.extend(order.block_ids)
            if len(saves) >= room:
                # The request's next save finds that these are missing, and saves them as well.
                self._counters.add("unsaved_blocks", len(order.hashes), reason="queue_full")
                continue
            saves.append(_Save(order.request_id, order.session_id, chain, order.first, len(chain.hashes)))
        return saves

    # --------------------------------------------------------------- the threads

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            save, source = taken
            needed_blocks = source.needs_blocks
            try:
                self._save(save, source)
            except Exception as error:  # noqa: BLE001  # whatever it was costs these blocks only, and is told
                _log.exception("a save failed in an unexpected way")
                self._counters.add("hook_errors", reason=type(error).__name__)
            finally:
                with self._changed:
                    save.chain.waiting -= needed_blocks
                    save.chain.is_being_saved = False
                    self._changed.notify_all()

    def _take(self) -> tuple[_Save, Source] | None:
        """The first save that no other has to precede; None: there will be none. Blocks until either is so."""
        with self._changed:
            while self._queue or not self._stopping:
                for at, (save, source) in enumerate(self._queue):
                    if not save.chain.is_being_saved:
                        save.chain.is_being_saved = True
                        del self._queue[at]
                        return save, source
                self._changed.wait()
        return None

    def _save(self, save: _Save, source: Source) -> None:
        if source.needs_blocks and not save.chain.keeps_blocks:
            source.discard()
            return
        ends_at_s = time.monotonic() + self._timeout_s
        first = save.first
        result = source.save(self._call(save, first, ends_at_s))
        if result.reason is kv.Reason.PARENT_MISSING and save.chain.keeps_blocks:
            # A block before these has left the store: save the chain from its root.
            first = 0
            again = self._memory.later_source(save.chain.block_ids[: save.end], save.chain)
            result = again.save(self._call(save, first, ends_at_s))
        self._counters.add("held_blocks", result.held + result.being_written)
        self._counters.add("saved_blocks", result.saved)
        self._counters.add("saved_bytes", result.saved * self._memory.layout.block_size_bytes)
        reason = "dropped" if result.reason is kv.Reason.OK else result.reason.value
        self._counters.add("unsaved_blocks", result.refused, reason=reason)

    def _call(self, save: _Save, first: int, ends_at_s: float) -> SaveCall:
        hashes = save.chain.hashes
        return SaveCall(
            hashes[first : save.end],
            parent=hashes[first - 1] if first else b"",
            session_id=save.session_id,
            request_id=save.request_id,
            deadline_s=max(0.1, ends_at_s - time.monotonic()),
        )
