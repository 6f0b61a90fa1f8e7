"""Look-ahead in the background: windows kept up to date, and what the planner says done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvservice.lookahead import Fetch, Planner
from kvservice.queues import QueuedRequest
from kvservice.store.arrivals import Arrival
from kvservice.store.disks import Disks
from kvservice.store.namespace import Namespace
from kvservice.store.promotion import Promotion
from kvservice.store.space import Space, sparing
from kvservice.store.waiting import WaitingRequests
from kvservice.transfers import Priority

_ROUND_S_MIN = 0.005  # a burst of messages is one round
_ROUND_S_MAX = 0.25  # while somebody waits: blocks come and go without a message
_AHEAD_BYTES_MIN = 32 * 1024 * 1024


@dataclass(slots=True, eq=False)
class _Running:
    """A fetch under way."""

    namespace: Namespace
    request: QueuedRequest
    arrivals: list[Arrival]
    pending: int


class Prefetching:
    """The background task, and the books of its fetches."""

    def __init__(
        self,
        waiting: WaitingRequests,
        space: Space,
        disks: Disks,
        promotion: Promotion,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._waiting = waiting
        self._space = space
        self._disks = disks
        self._promotion = promotion
        self._clock = clock
        self._planner = Planner(bytes_ahead_min=_AHEAD_BYTES_MIN)
        self._running: dict[int, _Running] = {}

    @property
    def in_flight(self) -> int:
        """Fetches under way."""
        return len(self._running)

    async def run(self) -> None:
        """Look ahead until cancelled."""
        while True:
            try:
                async with asyncio.timeout(_ROUND_S_MAX if self._waiting.ahead else None):
                    await self._waiting.changed.wait()
            except TimeoutError:
                pass
            self._waiting.changed.clear()
            await self.round()
            await asyncio.sleep(_ROUND_S_MIN)

    async def round(self) -> None:
        """Bring the windows up to date, then cancel, reorder and start fetches."""
        for namespace in list(self._waiting.ahead):
            if namespace in self._waiting.ahead:
                self._waiting.refresh(namespace)
                await self._make_room(namespace)
            await asyncio.sleep(0)  # a long queue is looked at in pieces
        # From here on nothing waits: rows and free slots are what the plan was made for.
        jobs = [job for namespace in self._waiting.ahead for job in self._waiting.jobs(namespace)]
        plan = self._planner.plan(
            jobs,
            room={namespace: namespace.pool.free_slots for namespace in self._waiting.ahead},
            bytes_per_s=self._disks.read_bytes_per_s,
            now_s=self._clock(),
        )
        for number in plan.cancel:
            running = self._running[number]
            for arrival in running.arrivals:
                self._promotion.cancel(running.namespace, arrival)
        for number, order in plan.reorder:
            running = self._running[number]
            for arrival in running.arrivals:
                self._promotion.reorder(running.namespace, arrival, order)
        for fetch in plan.start:
            self._start(fetch)

    def _start(self, fetch: Fetch) -> None:
        namespace, request = fetch.group, fetch.key
        assert isinstance(namespace, Namespace)
        assert isinstance(request, QueuedRequest)
        rows = np.array(fetch.blocks, dtype=np.int32)
        slots = namespace.pool.allocate(len(rows))
        arrivals = self._promotion.start(namespace, rows, slots, Priority.PREFETCH, urgency=fetch.order)
        namespace.end_hold(slots)  # the transfers hold what they read
        self._running[fetch.number] = _Running(namespace, request, arrivals, len(arrivals))
        for arrival in arrivals:
            arrival.landed.add_done_callback(partial(self._landed, fetch.number))

    def _landed(self, number: int, _landed: object) -> None:
        running = self._running[number]
        running.pending -= 1
        if running.pending == 0:
            del self._running[number]
            self._planner.ended(number)
            self._waiting.fetched(running.request)

    async def _make_room(self, namespace: Namespace) -> None:
        """Let go what no request of the window needs, where what they need does not fit."""
        if namespace not in self._waiting.ahead:
            return
        missing = sum(len(job.missing) for job in self._waiting.jobs(namespace))
        ahead_bytes = max(_AHEAD_BYTES_MIN, int(self._disks.read_bytes_per_s))
        wanted = min(missing, max(1, ahead_bytes // namespace.stride_bytes))
        if wanted <= namespace.pool.free_slots or namespace.is_retired:
            return
        with sparing(namespace, self._waiting.window_rows(namespace)):
            while wanted > namespace.pool.free_slots:
                if not await self._space.make_room_for_hint(namespace, wanted):
                    return  # the window is in DRAM, or in use
