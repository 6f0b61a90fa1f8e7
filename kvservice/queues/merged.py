"""All instances' queues as one order that is fair: every queue's first before any queue's second.

A request's `order` is a number, given once and kept while it is about right, so that one start at
the head of a queue does not renumber everybody behind it. Positions would: instead each queue is
laid along a common clock that advances by one when every queue that has anything has started one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from kvservice.queues.updates import Bounds, QueueSnapshot, QueueUpdate, UpdateOutcome
from kvservice.queues.waiting import QueuedRequest, WaitingQueue

_TOLERANCE_MIN = 0.5  # an order that is off by less is kept
_TOLERANCE_SHARE = 0.125  # or by less than this share of the position: what is far need not be exact
_STEP = 2.0**-10  # between two requests of a queue whose orders would be equal


@dataclass(frozen=True, slots=True)
class Applied:
    """What an update changed."""

    outcome: UpdateOutcome
    epoch: int
    sequence: int
    started: Sequence[QueuedRequest] = ()
    left: Sequence[QueuedRequest] = ()
    """No longer waiting, the started ones among them."""


class Arranged(NamedTuple):
    """A request in the common order."""

    owner: Hashable
    request: QueuedRequest
    starts_at_s: float
    """An estimate."""


class MergedQueues:
    """The queues of all instances, by owner: one instance's queue of one namespace."""

    def __init__(self, *, bounds: Bounds) -> None:
        self._bounds = bounds
        self._queues: dict[Hashable, WaitingQueue] = {}
        self._clock = 0.0

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def apply(self, owner: Hashable, update: QueueUpdate, *, hash_size_bytes: int, now_s: float) -> Applied:
        """Take an update of one queue.

        Raises:
            InvalidRequest: see WaitingQueue; nothing changed.
        """
        queue = self._queues.get(owner)
        if queue is None:
            queue = WaitingQueue(hash_size_bytes=hash_size_bytes, bounds=self._bounds)
        before, starts = queue.requests, queue.starts
        if isinstance(update, QueueSnapshot):
            outcome, started_ids = queue.replace(update), frozenset[str]()
        else:
            outcome, started_ids = queue.change(update, now_s), frozenset(update.started)
        self._queues[owner] = queue
        if outcome is not UpdateOutcome.APPLIED:
            return Applied(outcome, queue.epoch, queue.sequence)
        waiting = set(map(id, queue.requests))
        left = [request for request in before if id(request) not in waiting]
        started = [request for request in left if request.request_id in started_ids]
        self._clock += (queue.starts - starts) / max(1, sum(1 for other in self._queues.values() if other.requests))
        return Applied(outcome, queue.epoch, queue.sequence, started, left)

    def remove(self, owner: Hashable) -> Sequence[QueuedRequest]:
        """The instance ended: its requests, which nobody waits for any more."""
        queue = self._queues.pop(owner, None)
        return queue.requests if queue is not None else ()

    def owners(self) -> Iterable[Hashable]:
        """Who has told of a queue."""
        return self._queues.keys()

    def requests(self, owner: Hashable) -> Sequence[QueuedRequest]:
        """What waits in one queue."""
        queue = self._queues.get(owner)
        return queue.requests if queue is not None else ()

    def arrange(self, owners: Sequence[Hashable], *, requests_max: int, now_s: float) -> tuple[list[Arranged], int]:
        """The requests of these owners in their common order, and how many were given another place in it.

        Args:
            requests_max: only so many, the same number from each queue.
        """
        depth = math.ceil(requests_max / max(1, len(owners)))
        moved = sum(self._place(self._queues[owner], depth) for owner in owners)
        merged = heapq.merge(*(self._head(owner, depth, now_s) for owner in owners), key=_rank)
        return list(islice(merged, requests_max)), moved

    def _head(self, owner: Hashable, depth: int, now_s: float) -> Iterator[Arranged]:
        queue = self._queues[owner]
        for position, request in enumerate(islice(queue.requests, depth)):
            yield Arranged(owner, request, queue.starts_at_s(position, now_s))

    def _place(self, queue: WaitingQueue, depth: int) -> int:
        moved, last = 0, -math.inf
        for position, request in enumerate(islice(queue.requests, depth)):
            wanted = self._clock + position
            tolerance = max(_TOLERANCE_MIN, _TOLERANCE_SHARE * position)
            if not (abs(request.order - wanted) <= tolerance and request.order > last):
                request.order = max(wanted, last + _STEP)
                moved += 1
            last = request.order
        return moved


def _rank(arranged: Arranged) -> tuple[float, int]:
    """Among equals the more important first (smaller is more important, as engines have it)."""
    return arranged.request.order, arranged.request.priority
