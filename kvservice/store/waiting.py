"""The waiting requests and what of their chains is held: told to the eviction order, ready for the planner."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvservice.blocks import NO_EXTENT, NO_SLOT, Rows
from kvservice.config import Config
from kvservice.errors import InvalidRequest
from kvservice.index import Index
from kvservice.lookahead import Job, Windows, window_lengths
from kvservice.metrics import Metrics
from kvservice.queues import Applied, Arranged, Bounds, MergedQueues, QueuedRequest, QueueUpdate
from kvservice.sessions import session_key
from kvservice.store.disks import Disks
from kvservice.store.namespace import Namespace, Peer
from kvservice.store.space import Space

_HINT_SLICE_BLOCKS = 4096  # between two turns of the event loop
_REQUESTS_MAX = 1024  # per namespace, those that start first: looked at in every round


class Owner(NamedTuple):
    """Whose queue it is."""

    instance_id: int
    namespace: Namespace


@dataclass(slots=True, eq=False)
class Need:
    """What one waiting request needs, as far as it is held."""

    request: QueuedRequest
    namespace: Namespace
    index: Index
    """That the rows are of: another one is in use after a recovery."""
    hit: int
    rows: Rows
    order: float
    own_blocks: int
    """Blocks, held or not, that no earlier request needs."""
    starts_at_s: float
    fetched_at_s: float = math.nan
    """When the last fetch for it ended."""

    def is_current(self, index: Index, hit: int) -> bool:
        """Whether it still says what the request needs; blocks that left and came back have to be told again."""
        if (self.index, self.hit, self.order) != (index, hit, self.request.order):
            return False
        return not len(self.rows) or bool(self.namespace.window.order_of(self.rows[-1:])[0] < math.inf)


@dataclass(slots=True)
class Ahead:
    """One namespace's windows, as of the last round."""

    windows: Windows = field(default_factory=lambda: Windows(0, 0))
    waiting: list[Need] = field(default_factory=list)
    """In order, the next to start first."""
    memory_blocks: int = 0
    """C_mem: what DRAM could hold for the queue."""
    needed_blocks: int = 0
    """Held blocks that the requests of the prefetch window need, shared ones counted each time."""
    dram_blocks: int = 0
    """Of these, those in DRAM."""

    @property
    def prefetch(self) -> Sequence[Need]:
        """The requests of the prefetch window: no more than DRAM can hold at once."""
        room = self.memory_blocks
        for position, need in enumerate(self.waiting[: self.windows.prefetch]):
            room -= need.own_blocks
            if room < 0:
                return self.waiting[:position]
        return self.waiting[: self.windows.prefetch]


class WaitingRequests:
    """All queues of one store. The event loop owns it."""

    def __init__(
        self, config: Config, space: Space, disks: Disks, metrics: Metrics, *, clock: Callable[[], float]
    ) -> None:
        self.changed = asyncio.Event()
        self.ahead: dict[Namespace, Ahead] = {}
        self._space = space
        self._disks = disks
        self._metrics = metrics
        self._clock = clock
        self._queues = MergedQueues(
            bounds=Bounds(config.queue_entries_max, config.queue_blocks_max, config.hashes_per_call_max)
        )
        self._needs: dict[QueuedRequest, Need] = {}

    def __len__(self) -> int:
        return len(self._queues)

    def update(self, instance: Peer, namespace: Namespace, update: QueueUpdate) -> Applied:
        """Take what an instance says of its queue of that namespace.

        Raises:
            InvalidRequest: it breaks a bound or contradicts itself; nothing changed.
        """
        owner = Owner(instance.instance_id, namespace)
        size = namespace.spec.hash_size_bytes
        applied = self._queues.apply(owner, update, hash_size_bytes=size, now_s=self._clock())
        self.ahead.setdefault(namespace, Ahead())
        for request in applied.started:
            self._count_start(namespace, request)
        self._forget(namespace, applied.left)
        self.changed.set()
        return applied

    def instance_left(self, instance: Peer) -> None:
        """Nobody waits for the instance's requests any more."""
        for owner in [owner for owner in self._owners() if owner.instance_id == instance.instance_id]:
            self._forget(owner.namespace, self._queues.remove(owner))
            self.changed.set()

    async def hint(self, namespace_of: Callable[[], Namespace], hints: Sequence[tuple[str, float]]) -> int:
        """Tell the eviction order when idle conversations resume; how many of them are known.

        Args:
            namespace_of: asked again after every pause; raises where the attachment ended.
            hints: (session id, seconds until it resumes; infinite: never).
        """
        known = blocks = 0
        for session_id, resumes_in_s in hints:
            namespace = namespace_of()
            tips = namespace.sessions.tips(session_key(session_id))
            known += bool(tips)
            for tip in tips:
                rows = np.array(list(namespace.index.ancestors(tip))[::-1], dtype=np.int32)
                namespace.expect(rows, self._clock() + resumes_in_s)
                blocks += len(rows)
            if blocks > _HINT_SLICE_BLOCKS:
                blocks = 0
                await asyncio.sleep(0)
        return known

    def length(self, instance: Peer) -> int:
        """How many requests wait in that instance."""
        owners = [owner for owner in self._owners() if owner.instance_id == instance.instance_id]
        return sum(len(self._queues.requests(owner)) for owner in owners)

    def length_of(self, namespace: Namespace) -> int:
        """How many requests wait in all of the namespace's queues."""
        return sum(len(self._queues.requests(owner)) for owner in self._owners() if owner.namespace is namespace)

    def fetched(self, request: QueuedRequest) -> None:
        """A fetch for the request ended."""
        need = self._needs.get(request)
        if need is not None:
            need.fetched_at_s = self._clock()
        self.changed.set()

    def refresh(self, namespace: Namespace) -> None:
        """Bring one namespace's windows and its eviction order up to date."""
        owners = [owner for owner in self._owners() if owner.namespace is namespace]
        arranged, _ = self._queues.arrange(owners, requests_max=_REQUESTS_MAX, now_s=self._clock())
        if not owners:
            self._forget(namespace, [need.request for need in self.ahead.pop(namespace).waiting])
            return
        waiting = [self._need(namespace, one) for one in arranged]
        kept = set(map(id, waiting))
        for need in self.ahead[namespace].waiting:
            if id(need) not in kept and self._needs.get(need.request) is need:
                self._forget(namespace, [need.request])  # pushed back too far to be looked at
        memory_blocks = self._memory_blocks(namespace)
        mean = sum(need.own_blocks for need in waiting) / max(1, len(waiting))
        windows = window_lengths(memory_blocks, self._disk_blocks(namespace), mean)
        self.ahead[namespace] = Ahead(windows, waiting, memory_blocks)
        if windows.eviction >= len(waiting):
            namespace.exempt_until(math.inf)
        else:
            namespace.exempt_until(waiting[windows.eviction - 1].order if windows.eviction else -math.inf)

    def jobs(self, namespace: Namespace) -> list[Job]:
        """What the prefetch window needs that is not in DRAM."""
        index, ahead, jobs = namespace.index, self.ahead[namespace], []
        ahead.needed_blocks = ahead.dram_blocks = 0
        for need in ahead.prefetch:
            rows = need.rows if need.index is index else need.rows[:0]
            is_missing = (index.slot[rows] == NO_SLOT) & (index.extent[rows] != NO_EXTENT)
            missing, arriving = rows[is_missing], rows[index.arriving[rows]]
            ahead.needed_blocks += len(rows)
            ahead.dram_blocks += len(rows) - len(missing) - len(arriving)
            if not self._disks.can_read_all:
                missing = missing[self._disks.readable(index.extent[missing])]
            if len(missing) or len(arriving):
                block_bytes = namespace.spec.block_size_bytes
                jobs.append(Job(need.request, namespace, need.order, need.starts_at_s, missing, arriving, block_bytes))
        return jobs

    def window_rows(self, namespace: Namespace) -> Rows:
        """The rows in DRAM that the prefetch window needs, each once."""
        index = namespace.index
        rows = [need.rows for need in self.ahead[namespace].prefetch if need.index is index]
        if not rows:
            return np.zeros(0, dtype=np.int32)
        together = np.unique(np.concatenate(rows)).astype(np.int32)
        in_dram: Rows = together[index.slot[together] != NO_SLOT]
        return in_dram

    def check(self) -> None:
        """Assert that nothing is remembered of requests that do not wait. For tests."""
        queued = {request for owner in self._owners() for request in self._queues.requests(owner)}
        assert self._needs.keys() <= queued, "a need of a request that does not wait"
        for namespace in self.ahead:
            in_window = sum(1 for need in self._needs.values() if need.namespace is namespace and len(need.rows))
            assert len(namespace.window) == in_window, "the eviction order knows other requests"

    def _owners(self) -> list[Owner]:
        return [owner for owner in self._queues.owners() if isinstance(owner, Owner)]

    def _need(self, namespace: Namespace, arranged: Arranged) -> Need:
        """The request's need, told to the eviction order if it changed."""
        request, index = arranged.request, namespace.index
        hit = index.hit_length(request.chain) if len(request.chain) else 0
        before = self._needs.get(request)
        if before is not None and before.is_current(index, hit):
            before.starts_at_s = arranged.starts_at_s
            return before
        try:
            rows = index.bytes_rows(index.hit_rows(request.chain, hit))
        except InvalidRequest:
            rows = np.zeros(0, dtype=np.int32)  # its hashes are no chain: a Get would be refused
        namespace.queue(request, rows, request.order)
        shared = int(np.count_nonzero(namespace.window.order_of(rows) < request.order))
        own_blocks = len(request.chain) - shared
        need = Need(request, namespace, index, hit, rows, request.order, own_blocks, arranged.starts_at_s)
        if before is not None:
            need.fetched_at_s = before.fetched_at_s
        self._needs[request] = need
        return need

    def _forget(self, namespace: Namespace, requests: Sequence[QueuedRequest]) -> None:
        for request in requests:
            self._needs.pop(request, None)
            namespace.unqueue(request)

    def _count_start(self, namespace: Namespace, request: QueuedRequest) -> None:
        index, need = namespace.index, self._needs.get(request)
        state = "nothing_held"
        if need is not None and len(need.rows) and need.index is index:
            if (index.slot[need.rows] == NO_SLOT).any():
                state = "absent"
            else:
                state = "late" if index.arriving[need.rows].any() else "ready"
            if not math.isnan(need.fetched_at_s):
                self._metrics.prefetches.lead_seconds.observe(self._clock() - need.fetched_at_s)
        self._metrics.prefetches.request_starts[state].inc()

    def _memory_blocks(self, namespace: Namespace) -> int:
        """C_mem: slots that nobody holds, made or still to be made, and those that hold what is on its way."""
        pool = namespace.pool
        held = int(np.count_nonzero(pool.holders > 0)) - int(np.count_nonzero(namespace.index.arriving))
        return pool.total_slots - max(0, held) + self._space.growable_slots(namespace)

    def _disk_blocks(self, namespace: Namespace) -> int:
        """C_disk."""
        return self._disks.usage().capacity_bytes // namespace.stride_bytes if self._disks else 0
