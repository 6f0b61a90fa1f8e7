"""What to fetch now, so that what is needed first arrives first.

The planner keeps the device busy and no more: a bounded number of bytes is on its way, chosen anew
whenever the queue or the device changes, so that a request that becomes urgent overtakes at once
and what nobody needs any more is cancelled before it is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[np.int32] | NDArray[np.int64]

_CAN_WAIT = 2.0**32  # above every order of the queue; leaves 20 bits behind the point


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A waiting request inside the prefetch window, and what it needs that is not in DRAM."""

    key: Hashable
    """The request."""
    group: Hashable
    """What block numbers and room are counted in: the namespace."""
    order: float
    """Its place in the queue, smaller is sooner."""
    starts_at_s: float
    """When it is likely to start."""
    missing: Blocks
    """On NVMe only and not on their way, in chain order."""
    arriving: Blocks
    """On their way already, on whosever behalf."""
    block_bytes: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """An instruction: read these blocks of one chain into DRAM."""

    number: int
    group: Hashable
    blocks: tuple[int, ...]
    size_bytes: int
    order: float
    """Among waiting fetches the smallest is read first."""
    key: Hashable
    """The first request that needs them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, in this order: cancel, reorder, start."""

    cancel: Sequence[int] = ()
    """Fetches that nobody in the window needs any more; one that is being read already may go on."""
    reorder: Sequence[tuple[int, float]] = ()
    """(fetch, order) where that changed."""
    start: Sequence[Fetch] = ()
    """In the order in which to submit them."""


class Planner:
    """See the module. One per device tier."""

    def __init__(
        self,
        *,
        fetch_bytes_max: int = 8 * 1024 * 1024,
        ahead_s: float = 1.0,
        bytes_ahead_min: int = 32 * 1024 * 1024,
    ) -> None:
        """Args:
        fetch_bytes_max: of one fetch; small enough that an urgent one need not wait long for it.
        ahead_s: so many seconds of the device's work are on their way at most.
        bytes_ahead_min: but never fewer bytes than this, or a fast device would run dry between two plans.
        """
        self.in_flight_bytes = 0
        self._fetch_bytes_max = fetch_bytes_max
        self._ahead_s = ahead_s
        self._bytes_ahead_min = bytes_ahead_min
        self._next_number = 1
        self._fetches: dict[int, Fetch] = {}
        self._orders: dict[int, float] = {}
        self._fetch_of: dict[tuple[Hashable, int], int] = {}

    def ended(self, number: int) -> None:
        """The fetch landed, failed or was cancelled: its blocks are in DRAM, or may be asked for again."""
        fetch = self._fetches.pop(number)
        del self._orders[number]
        self.in_flight_bytes -= fetch.size_bytes
        for block in fetch.blocks:
            del self._fetch_of[fetch.group, block]

    def plan(self, jobs: Sequence[Job], *, room: Mapping[Hashable, int], bytes_per_s: float, now_s: float) -> Plan:
        """What to cancel, reorder and start.

        Args:
            jobs: the requests of the prefetch window, in any order.
            room: per group, how many more blocks DRAM can take without losing what the window needs.
            bytes_per_s: the device's measured rate; 0.0: not known yet.
        """
        ranked = sorted(((self._urgency(job, bytes_per_s, now_s), job) for job in jobs), key=itemgetter(0))
        orders = self._wanted(ranked)
        reorder = [(number, order) for number, order in orders.items() if self._orders[number] != order]
        self._orders.update(reorder)
        ahead_bytes = max(self._bytes_ahead_min, int(self._ahead_s * bytes_per_s))
        unwanted = [number for number in self._fetches if number not in orders]
        start = self._start(ranked, orders, ahead_bytes, dict(room))
        return Plan(unwanted + self._overtaken(orders, 2 * ahead_bytes), reorder, start)

    def _urgency(self, job: Job, bytes_per_s: float, now_s: float) -> float:
        """The queue's order, but who can wait for all the others lets pass those who cannot.

        A request can wait if it would still be ready in time were its fetch begun `ahead_s` from now.
        """
        fetch_s = len(job.missing) * job.block_bytes / bytes_per_s if bytes_per_s else 0.0
        can_wait = job.starts_at_s - fetch_s > now_s + self._ahead_s
        return job.order + _CAN_WAIT if can_wait else job.order

    def _wanted(self, ranked: Iterable[tuple[float, Job]]) -> dict[int, float]:
        """The fetches on their way that somebody in the window needs, and how urgent that makes them."""
        orders: dict[int, float] = {}
        for order, job in ranked:
            for block in job.arriving.tolist():
                number = self._fetch_of.get((job.group, block))
                if number is not None:
                    orders.setdefault(number, order)
        return orders

    def _overtaken(self, orders: Mapping[int, float], bytes_max: int) -> list[int]:
        """The least urgent fetches above so many bytes: they gave way, and may as well give back their room."""
        overtaken, excess_bytes = [], self.in_flight_bytes - bytes_max
        for number in sorted(orders, key=lambda number: orders[number], reverse=True):
            if excess_bytes <= 0:
                break
            overtaken.append(number)
            excess_bytes -= self._fetches[number].size_bytes
        return overtaken

    def _start(
        self,
        ranked: Iterable[tuple[float, Job]],
        orders: Mapping[int, float],
        ahead_bytes: int,
        room: dict[Hashable, int],
    ) -> list[Fetch]:
        """Fetches for the most urgent jobs, as long as not enough that is as urgent is on its way."""
        on_their_way = deque(sorted((order, self._fetches[number].size_bytes) for number, order in orders.items()))
        started: list[Fetch] = []
        for order, job in ranked:
            while on_their_way and on_their_way[0][0] <= order:
                ahead_bytes -= on_their_way.popleft()[1]
            if ahead_bytes <= 0:
                break
            blocks = [block for block in job.missing.tolist() if (job.group, block) not in self._fetch_of]
            blocks = blocks[: max(0, room.get(job.group, 0))]
            at_once = max(1, self._fetch_bytes_max // job.block_bytes)
            for first in range(0, len(blocks), at_once):
                if ahead_bytes <= 0:
                    break
                fetch = self._fetch(job, order, tuple(blocks[first : first + at_once]))
                ahead_bytes -= fetch.size_bytes
                room[job.group] -= len(fetch.blocks)
                started.append(fetch)
        return started

    def _fetch(self, job: Job, order: float, blocks: tuple[int, ...]) -> Fetch:
        fetch = Fetch(self._next_number, job.group, blocks, len(blocks) * job.block_bytes, order, job.key)
        self._next_number += 1
        self._fetches[fetch.number] = fetch
        self._orders[fetch.number] = order
        self._fetch_of.update(dict.fromkeys([(job.group, block) for block in blocks], fetch.number))
        self.in_flight_bytes += fetch.size_bytes
        return fetch
