"""Lookup, Get and Prefetch: the longest prefix that can be read, from DRAM or on its way there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kvservice.blocks import NO_EXTENT, NO_SLOT, Chain, Rows
from kvservice.config import Config
from kvservice.errors import CapacityExhausted
from kvservice.leases import HoldKind
from kvservice.lookahead import Speeds, load_or_recompute
from kvservice.sessions import session_key
from kvservice.store import requests
from kvservice.store.arrivals import Arrival
from kvservice.store.disks import Disks
from kvservice.store.holds import Holds
from kvservice.store.journal import Journal
from kvservice.store.namespace import Namespace, Peer
from kvservice.store.outcomes import Granted, Looked, Miss, PlannedLoad, Prefetched
from kvservice.store.promotion import Promotion
from kvservice.store.space import Space, sparing
from kvservice.store.write_behind import WriteBehind
from kvservice.transfers import Priority

_REQUESTS_AHEAD_MAX = 4096
_MEASURED_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """What a Get can have at this moment of the event loop."""

    namespace: Namespace
    asked: int
    """Blocks asked for."""
    rows: Rows
    of_bytes: Rows
    """The rows that have the bytes of `rows`."""
    on_nvme: np.ndarray
    """bool: which of them are not in DRAM."""
    miss: Miss
    """Why `rows` ends."""


class Reading:
    """The reading calls of the store."""

    def __init__(
        self,
        config: Config,
        holds: Holds,
        space: Space,
        disks: Disks,
        promotion: Promotion,
        journal: Journal,
        write_behind: WriteBehind,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._holds = holds
        self._space = space
        self._disks = disks
        self._promotion = promotion
        self._journal = journal
        self._write_behind = write_behind
        self._clock = clock
        self._ahead: dict[tuple[int, str], list[tuple[Namespace, Arrival]]] = {}

    def lookup(self, namespace: Namespace, packed: bytes) -> Looked:
        """How many leading blocks are held, and how many of those lead in DRAM."""
        chain = self._chain(namespace, packed)
        hit = namespace.index.hit_length(chain)
        miss = requests.miss_after(namespace, chain, hit)
        if not self._disks.can_read_all:
            readable = self._readable(namespace, namespace.index.hit_rows(chain, hit))
            hit, miss = (readable, Miss.TIER_OFFLINE) if readable < hit else (hit, miss)
        shifts = requests.held_shift_tokens(namespace, chain, hit)
        return Looked(namespace.index.dram_length(chain, hit), hit, len(chain), miss, shifts)

    def plan_load(self, namespace: Namespace, packed: bytes, engine: Speeds) -> PlannedLoad:
        """How many leading blocks to load rather than to recompute.

        No side effect, like a lookup, but one: where it says to recompute on the word of an old measurement, or of
        writes, a few blocks are prefetched. What is never read is never measured: a wrong rate would stay for good.

        Args:
            engine: the engine's own speeds; the disks' are put in.
        """
        chain = self._chain(namespace, packed)
        rows, miss = self._prefix_bytes(namespace, chain)
        index = namespace.index
        to_read = (index.slot[rows] == NO_SLOT) | index.arriving[rows]
        in_dram = int(np.argmax(to_read)) if to_read.any() else len(rows)
        rate, wait_s = self._disks.read_speed(index.extent[rows[to_read]]) if to_read.any() else (0.0, 0.0)
        plan = load_or_recompute(
            in_dram,
            len(rows),
            block_bytes=namespace.spec.block_size_bytes,
            tokens_per_block=namespace.spec.tokens_per_block,
            speeds=replace(engine, nvme_bytes_per_s=rate, nvme_wait_s=wait_s),
        )
        if plan.blocks < len(rows) and not self._disks.is_measured(index.extent[rows[to_read]]):
            self._measure(namespace, rows, in_dram)
        return PlannedLoad(Looked(in_dram, len(rows), len(chain), miss), plan)

    async def get(
        self,
        instance: Peer,
        namespace_of: Callable[[], Namespace],
        packed: bytes,
        *,
        session_id: str,
        request_id: str,
        duration_s: float,
        max_blocks: int,
        attempt_id: int,
        accepts_shifts: bool,
    ) -> Granted:
        """Lease the longest prefix; what is on NVMe only is being read when this returns.

        Args:
            namespace_of: asked again after every wait; raises where the attachment ended.
        """
        found = await self._find(
            instance,
            namespace_of,
            packed,
            session_id=session_id if accepts_shifts else "",
            max_blocks=max_blocks,
            attempt_id=attempt_id,
        )
        namespace, rows, of_bytes, miss = found.namespace, found.rows, found.of_bytes, found.miss
        missed = found.asked - len(rows)
        from_nvme = found.on_nvme
        if namespace.arrivals:
            # One that is being read already is not in DRAM yet: whoever began that did this Get a favour.
            from_nvme = from_nvme | namespace.index.arriving[of_bytes]
        nvme_hits = int(np.count_nonzero(from_nvme))
        namespace.counters.requested += found.asked
        namespace.counters.dram_hits += len(rows) - nvme_hits
        namespace.counters.nvme_hits += nvme_hits
        namespace.counters.misses += missed
        if not len(rows):
            return Granted(0, 0.0, namespace.pool, rows, rows, {}, from_nvme, missed, miss)
        slots = self._fetch(namespace, of_bytes, found.on_nvme, Priority.GET)
        self._note_use(namespace, rows, of_bytes, session_id)
        shifts = requests.shift_tokens(namespace, rows)
        namespace.counters.shifted_hits += len(shifts) - shifts.count(0)
        hold_id, lease_s = self._holds.grant(
            HoldKind.READ,
            instance,
            namespace,
            slots,
            session_id=session_id,
            request_id=request_id,
            asked_s=duration_s,
            attempt_id=attempt_id,
        )
        pending = {
            int(position): namespace.arrivals[int(of_bytes[position])]
            for position in (np.flatnonzero(namespace.index.arriving[of_bytes]) if nvme_hits else ())
        }
        return Granted(hold_id, lease_s, namespace.pool, of_bytes, slots, pending, from_nvme, missed, miss, shifts)

    def prefetch(self, instance: Peer, namespace: Namespace, packed: bytes, *, request_id: str) -> Prefetched:
        """Start reading what is on NVMe only into free or evictable DRAM; neither caller nor memory is waited for.

        Args:
            request_id: `give_up` of the same cancels what has not begun by then; empty: nothing does.
        """
        chain = self._chain(namespace, packed)
        rows, miss = self._prefix_bytes(namespace, chain)
        on_nvme = namespace.index.slot[rows] == NO_SLOT
        with sparing(namespace, rows):
            self._space.evict_for_hint(namespace, int(np.count_nonzero(on_nvme)))
        fitting = int(np.searchsorted(np.cumsum(on_nvme), namespace.pool.free_slots, side="right"))
        if fitting < len(rows):
            rows, on_nvme, miss = rows[:fitting], on_nvme[:fitting], Miss.OVER_LIMIT
        started = int(np.count_nonzero(on_nvme))
        slots = self._fetch(namespace, rows, on_nvme, Priority.PREFETCH)
        if request_id and started:
            arrivals = {namespace.arrivals[row] for row in rows[on_nvme].tolist() if row in namespace.arrivals}
            self._ahead.setdefault((instance.instance_id, request_id), []).extend(
                (namespace, arrival) for arrival in arrivals
            )
            if len(self._ahead) > _REQUESTS_AHEAD_MAX:
                del self._ahead[next(iter(self._ahead))]  # the oldest can no longer be cancelled
        # The transfers hold what they read; the caller of a Prefetch holds nothing.
        namespace.end_hold(slots)
        return Prefetched(len(rows) - started, started, len(chain) - len(rows), miss)

    def give_up(self, instance: Peer, request_id: str = "") -> None:
        """The request ended (empty: the instance left): what it prefetched and nobody waits for need not be read."""
        keys = [(instance.instance_id, request_id)]
        if not request_id:
            keys = [key for key in self._ahead if key[0] == instance.instance_id]
        for key in keys:
            for namespace, arrival in self._ahead.pop(key, ()):
                self._promotion.cancel(namespace, arrival)

    async def _find(
        self,
        instance: Peer,
        namespace_of: Callable[[], Namespace],
        packed: bytes,
        *,
        session_id: str,
        max_blocks: int,
        attempt_id: int,
    ) -> _Found:
        """The longest prefix that may be leased and that the namespace has free slots for now.

        Args:
            session_id: the session whose own blocks may be handed out; empty: nobody's.
        """
        limit = max_blocks
        while True:
            namespace = namespace_of()
            chain = self._chain(namespace, packed)
            self._holds.leases.require_room(HoldKind.READ, instance.instance_id, attempt_id=attempt_id)
            rows, miss = self._prefix(namespace, chain, limit)
            allowed = requests.own_length(namespace, rows, session_id)
            if allowed < len(rows):
                rows, miss = rows[:allowed], Miss.OTHER_SESSION
            of_bytes = namespace.index.bytes_rows(rows)
            on_nvme = namespace.index.slot[of_bytes] == NO_SLOT
            wanted = int(np.count_nonzero(on_nvme))
            if wanted <= namespace.pool.free_slots:
                return _Found(namespace, len(chain), rows, of_bytes, on_nvme, miss)
            try:
                with sparing(namespace, of_bytes):
                    await self._space.make_room(namespace, wanted)
            except CapacityExhausted:
                # DRAM in use leaves room for a shorter prefix only; a limit of zero would mean all.
                fitting = int(np.searchsorted(np.cumsum(on_nvme), namespace.pool.free_slots, side="right"))
                limit = min(fitting, len(rows) - 1)
                if limit == 0:
                    return _Found(namespace, len(chain), rows[:0], of_bytes[:0], on_nvme[:0], Miss.OVER_LIMIT)

    def _note_use(self, namespace: Namespace, rows: Rows, of_bytes: Rows, session_id: str) -> None:
        """These rows, whose bytes those have, are used now: for the eviction order, the session and the journal."""
        self._promotion.used(namespace, of_bytes)
        namespace.touch(rows, self._clock())
        namespace.index.uses[of_bytes.astype(np.intp)] += 1
        self._write_behind.used(namespace, of_bytes)
        if session_id:
            namespace.sessions.extend(session_key(session_id), rows, int(rows[-1]))
        self._journal.touched(namespace, of_bytes, session_id)

    def _measure(self, namespace: Namespace, rows: Rows, first: int) -> None:
        """Prefetch a transfer's worth of the chain `rows`, whose blocks before `first` are in DRAM."""
        blocks = max(1, _MEASURED_BYTES // namespace.stride_bytes)
        chosen = rows[first : first + blocks]
        chosen = chosen[namespace.index.slot[chosen] == NO_SLOT]
        with sparing(namespace, rows[:first]):
            self._space.evict_for_hint(namespace, len(chosen))
        chosen = chosen[: namespace.pool.free_slots]
        namespace.end_hold(self._fetch(namespace, chosen, np.ones(len(chosen), dtype=bool), Priority.PREFETCH))

    def _fetch(self, namespace: Namespace, rows: Rows, on_nvme: np.ndarray, priority: Priority) -> np.ndarray:
        """The slots of all rows, each with one more holder; those on NVMe are being read into new ones."""
        slots: np.ndarray = namespace.index.slot[rows]
        is_any_on_nvme = on_nvme.any()
        namespace.pool.hold(slots[~on_nvme] if is_any_on_nvme else slots)
        if priority is Priority.GET and namespace.arrivals:
            self._promotion.join(namespace, rows[namespace.index.arriving[rows]].tolist())
        if is_any_on_nvme:
            slots[on_nvme] = namespace.pool.allocate(int(np.count_nonzero(on_nvme)))
            self._promotion.start(namespace, rows[on_nvme], slots[on_nvme], priority)
        return slots

    def _prefix(self, namespace: Namespace, chain: Chain, limit: int) -> tuple[Rows, Miss]:
        """Rows of the longest readable prefix of at most `limit` blocks (0: all), and why it ends."""
        index = namespace.index
        hit = index.hit_length(chain)
        leased = min(hit, limit) if limit else hit
        rows = index.hit_rows(chain, leased)
        readable = self._readable(namespace, rows)
        if readable < leased:
            return rows[:readable], Miss.TIER_OFFLINE
        return rows, Miss.OVER_LIMIT if leased < hit else requests.miss_after(namespace, chain, hit)

    def _prefix_bytes(self, namespace: Namespace, chain: Chain) -> tuple[Rows, Miss]:
        rows, miss = self._prefix(namespace, chain, 0)
        return namespace.index.bytes_rows(rows), miss

    def _readable(self, namespace: Namespace, rows: Rows) -> int:
        """How many leading rows are in DRAM or on a disk that is online."""
        if self._disks.can_read_all:
            return len(rows)
        index = namespace.index
        rows = index.bytes_rows(rows)
        extents = index.extent[rows]
        lost = ((index.slot[rows] == NO_SLOT) | index.arriving[rows]) & (extents != NO_EXTENT)
        lost[lost] = ~self._disks.readable(extents[lost])
        return int(np.argmax(lost)) if lost.any() else len(rows)

    def _chain(self, namespace: Namespace, packed: bytes) -> Chain:
        return requests.chain(namespace, packed, hashes_max=self._config.hashes_per_call_max)
