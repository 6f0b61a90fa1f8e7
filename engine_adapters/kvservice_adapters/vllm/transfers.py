"""transfers: loads and saves in threads, between the engine's blocks and the daemon's memory.

A load that is ordered ends exactly once, with the engine's blocks that it could not fill. A save is best effort; what
matters is that nobody reads an engine block after it may have become another request's (see `Saves.stop_reading`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import kvservice_client as kv
from kvservice_adapters.vllm.counters import Counters
from kvservice_adapters.vllm.keys import KeyTurner
from kvservice_adapters.vllm.layout import BlockMemory, Fence
from kvservice_adapters.vllm.orders import LoadOrder, SaveOrder
from kvservice_client.outcomes import reason_of

_log = logging.getLogger(__name__)

_BLOCKS_PER_PUT_MAX = 512


@dataclass(frozen=True, slots=True)
class LoadsEnded:
    """Requests whose load is over, and the engine's blocks that were not filled."""

    request_ids: set[str]
    failed_block_ids: set[int]


class Loads:
    """Fills the engine's blocks. `order` and `ended` belong to the engine's thread."""

    def __init__(
        self,
        client: kv.Client,
        memory: BlockMemory,
        counters: Counters,
        *,
        threads: int,
        timeout_s: float,
        keys: KeyTurner | None = None,
    ) -> None:
        self._client = client
        self._memory = memory
        self._counters = counters
        self._timeout_s = timeout_s
        self._keys = keys
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="kvservice-load")
        self._lock = threading.Lock()
        self._begun: set[str] = set()
        self._ended: set[str] = set()
        self._failed: set[int] = set()

    def order(self, order: LoadOrder) -> None:
        """Begin a load; it ends by itself."""
        self._executor.submit(self._load, order)
        self._begun.add(order.request_id)

    def ended(self) -> LoadsEnded:
        """What ended since the last call."""
        with self._lock:
            ended, self._ended = self._ended, set()
            self._begun -= ended
            failed, self._failed = self._failed, set()
        return LoadsEnded(ended, failed)

    def give_up(self, orders: Sequence[LoadOrder]) -> None:
        """End those that were not even begun."""
        for order in orders:
            if order.request_id not in self._begun:
                self._end(order, filled=0, reason="not_begun")

    def stop(self) -> None:
        """Begin no more; wait for what copies."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _load(self, order: LoadOrder) -> None:
        started_s = time.monotonic()
        filled, reason = 0, "internal"
        try:
            filled, reason = self._fill(order)
        except kv.KVServiceError as error:
            reason = reason_of(error).value
        except Exception as error:  # noqa: BLE001  # whatever it was: the engine waits for this load's end and computes
            _log.exception("a load failed in an unexpected way")
            self._counters.add("hook_errors", reason=type(error).__name__)
        finally:
            self._counters.add("load_seconds", time.monotonic() - started_s)
            self._end(order, filled=filled, reason=reason)

    def _fill(self, order: LoadOrder) -> tuple[int, str]:
        """How many of the order's blocks hold their bytes now, and why not all."""
        if not order.hashes:
            return 0, "not_begun"
        with self._client.get(
            order.hashes,
            session_id=order.session_id,
            request_id=order.request_id,
            deadline_s=self._timeout_s,
            accepts_shifts=order.is_truncated and self._keys is not None,
        ) as lease:
            wanted = lease.blocks[order.first :]
            self._memory.write(order.block_ids[: len(wanted)], [view.address for view in wanted])
            # Asked after copying: what was current before and after was these blocks' bytes.
            filled = max(0, lease.valid_prefix() - order.first)
            shifts = lease.shifts[order.first : order.first + filled]
        if self._keys is not None:
            places = range(order.first, order.first + filled)
            self._counters.add("shifted_blocks", self._keys.turn(order.block_ids[:filled], places, shifts))
        return filled, "changed" if filled < len(wanted) else "not_held"

    def _end(self, order: LoadOrder, *, filled: int, reason: str) -> None:
        missing = order.block_ids[filled:]
        self._counters.add("loaded_blocks", filled)
        self._counters.add("loaded_bytes", filled * self._memory.layout.block_size_bytes)
        self._counters.add("unloaded_blocks", len(missing), reason=reason)
        with self._lock:
            self._failed.update(missing)
            self._ended.add(order.request_id)


@dataclass(slots=True, eq=False)
class _Chain:
    """What a request's saves are about, root first; lives until its last save is over."""

    hashes: list[bytes] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    waiting: int = 0
    is_stopped: bool = False


@dataclass(frozen=True, slots=True)
class _Save:
    request_id: str
    session_id: str
    chain: _Chain
    first: int
    end: int
    after: Fence | None


class Saves:
    """One thread that copies full blocks into the daemon's memory, in the order in which they were filled."""

    def __init__(
        self, client: kv.Client, memory: BlockMemory, counters: Counters, *, waiting_max: int, timeout_s: float
    ) -> None:
        self._client = client
        self._memory = memory
        self._counters = counters
        self._waiting_max = waiting_max
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._chains: dict[str, _Chain] = {}
        self._queue: deque[_Save] = deque()
        self._reading: _Chain | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kvservice-save", daemon=True)
        self._thread.start()

    def order(self, orders: Sequence[SaveOrder]) -> None:
        """Save these blocks after the step that was just launched."""
        after = self._memory.fence()
        with self._changed:
            for order in orders:
                self._order(order, after)
            self._changed.notify_all()

    def stop_reading(self, request_ids: Sequence[str]) -> None:
        """Their blocks are about to be overwritten: forget what waits, and wait for a copy under way (milliseconds)."""
        with self._changed:
            for request_id in request_ids:
                chain = self._chains.pop(request_id, None)
                if chain is not None:
                    chain.is_stopped = True
                    self._changed.wait_for(lambda chain=chain: self._reading is not chain)  # type: ignore[misc]

    def take_done(self, request_ids: set[str]) -> set[str]:
        """Those of these requests that have no save left; they are forgotten."""
        with self._changed:
            done = {name for name in request_ids if name not in self._chains or not self._chains[name].waiting}
            for name in done:
                self._chains.pop(name, None)
            return done

    def stop(self) -> None:
        """Save what waits, then end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(self._timeout_s)

    def _order(self, order: SaveOrder, after: Fence | None) -> None:
        if order.first == 0:
            self._chains[order.request_id] = _Chain()
        chain = self._chains.setdefault(order.request_id, _Chain())
        if order.first != len(chain.hashes):
            self._counters.add("unsaved_blocks", len(order.hashes), reason="gap")
            return
        chain.hashes.extend(order.hashes)
        chain.block_ids.extend(order.block_ids)
        if len(self._queue) >= self._waiting_max or self._stopping:
            # The request's next save finds that these are missing, and saves them as well.
            self._counters.add("unsaved_blocks", len(order.hashes), reason="queue_full")
            return
        chain.waiting += 1
        self._queue.append(_Save(order.request_id, order.session_id, chain, order.first, len(chain.hashes), after))

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopping)
                if not self._queue:
                    return
                save = self._queue.popleft()
            try:
                self._save(save)
            except kv.KVServiceError as error:
                self._counters.add("unsaved_blocks", save.end - save.first, reason=reason_of(error).value)
            except Exception as error:  # noqa: BLE001  # whatever it was costs these blocks only, and is told
                _log.exception("a save failed in an unexpected way")
                self._counters.add("hook_errors", reason=type(error).__name__)
            finally:
                with self._changed:
                    save.chain.waiting -= 1
                    self._changed.notify_all()

    def _save(self, save: _Save) -> None:
        ends_at_s = time.monotonic() + self._timeout_s
        start = save.first
        is_first_try = True
        at_once = _BLOCKS_PER_PUT_MAX
        while start < save.end and not save.chain.is_stopped:
            end = min(start + at_once, save.end)
            try:
                with self._put(save, start, end, ends_at_s) as reservation:
                    if reservation.refused:
                        if not is_first_try:
                            reason = reservation.refused_reason.value
                            self._counters.add("unsaved_blocks", save.end - start, reason=reason)
                            return
                        # A block before these has left the store: save the chain from its root.
                        start, is_first_try = 0, False
                        continue
                    self._copy(save, start, reservation, ends_at_s)
            except kv.CapacityExhausted:
                if end - start == 1:
                    raise
                at_once = max(1, (end - start) // 8)
                continue
            start = end

    def _put(self, save: _Save, start: int, end: int, ends_at_s: float) -> kv.Reservation:
        hashes = save.chain.hashes
        return self._client.put(
            hashes[start:end],
            parent=hashes[start - 1] if start else b"",
            session_id=save.session_id,
            request_id=save.request_id,
            deadline_s=max(0.1, ends_at_s - time.monotonic()),
        )

    def _copy(self, save: _Save, start: int, reservation: kv.Reservation, ends_at_s: float) -> None:
        self._counters.add("held_blocks", reservation.held + reservation.being_written)
        if not reservation.reserved:
            return
        with self._changed:
            if save.chain.is_stopped:
                return
            self._reading = save.chain
        try:
            self._memory.read(
                [save.chain.block_ids[start + position] for position, _ in reservation.reserved],
                [view.address for _, view in reservation.reserved],
                save.after,
            )
        finally:
            with self._changed:
                self._reading = None
                self._changed.notify_all()
        committed = reservation.commit(timeout_s=max(0.1, ends_at_s - time.monotonic()))
        dropped = sum(outcome is kv.Committed.DROPPED for outcome in committed)
        self._counters.add("saved_blocks", len(committed) - dropped)
        self._counters.add("saved_bytes", (len(committed) - dropped) * self._memory.layout.block_size_bytes)
        self._counters.add("unsaved_blocks", dropped, reason="dropped")
