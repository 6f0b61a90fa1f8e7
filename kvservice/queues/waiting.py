"""One engine's waiting queue, kept in step with the engine by epoch and sequence."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from kvservice.blocks import Chain
from kvservice.errors import InvalidRequest
from kvservice.queues.updates import Bounds, Entry, QueueDelta, QueueSnapshot, UpdateOutcome

_PACE_SMOOTHING = 0.2
_PACE_S_DEFAULT = 1.0  # between two starts, before any was seen
_PACE_S_MIN, _PACE_S_MAX = 1e-3, 600.0


@dataclass(slots=True, eq=False)
class QueuedRequest:
    """A waiting request. The same object for as long as it waits with the same chain."""

    request_id: str
    session_id: str
    chain: Chain
    new_tokens: int
    priority: int
    order: float = math.nan
    """Its place among all instances' requests, smaller is sooner; nan: not given yet."""

    def says_the_same(self, other: QueuedRequest) -> bool:
        """Whether both are the same request with the same chain."""
        return (self.request_id, self.session_id, self.chain, self.new_tokens, self.priority) == (
            other.request_id,
            other.session_id,
            other.chain,
            other.new_tokens,
            other.priority,
        )


class WaitingQueue:
    """See the module.

    A queue that missed a message keeps what it knew, which is a hint still, until a snapshot comes.
    """

    def __init__(self, *, hash_size_bytes: int, bounds: Bounds) -> None:
        self.requests: list[QueuedRequest] = []
        """The next to start first."""
        self.starts = 0
        """How many have started."""
        self.epoch = 0
        self.sequence = 0
        self._hash_size_bytes = hash_size_bytes
        self._bounds = bounds
        self._by_id: dict[str, QueuedRequest] = {}
        self._is_lost = True  # until the first snapshot
        # Chains of requests that left: later ones begin with them. As bounded as the queue itself.
        self._left: OrderedDict[str, Chain] = OrderedDict()
        self._left_blocks = 0
        self._pace_s = 0.0
        self._started_at_s = math.nan

    def __len__(self) -> int:
        return len(self.requests)

    def replace(self, snapshot: QueueSnapshot) -> UpdateOutcome:
        """The whole queue at once; what stays the same stays the same object.

        Raises:
            InvalidRequest: a bound is broken, or a request is named twice. Nothing changed.
        """
        if snapshot.epoch <= self.epoch:
            return UpdateOutcome.OUTDATED
        _require_distinct([entry.request_id for entry in snapshot.entries])
        requests = self._made(snapshot.entries)
        if requests is None:
            return UpdateOutcome.SNAPSHOT_WANTED
        self._require_room(requests)
        kept = {request.request_id for request in requests}
        for request in self.requests:
            if request.request_id not in kept:
                self._remember_left(request)
        self.epoch, self.sequence, self._is_lost = snapshot.epoch, 0, False
        self._take(requests)
        return UpdateOutcome.APPLIED

    def change(self, delta: QueueDelta, now_s: float) -> UpdateOutcome:
        """A few changes; all of them or none.

        Raises:
            InvalidRequest: the delta contradicts itself, or a bound is broken. Nothing changed.
        """
        if delta.epoch < self.epoch or (delta.epoch == self.epoch and delta.sequence <= self.sequence):
            return UpdateOutcome.OUTDATED
        self._is_lost |= delta.epoch > self.epoch or delta.sequence != self.sequence + 1
        if self._is_lost:
            return UpdateOutcome.SNAPSHOT_WANTED
        _require_distinct(list(delta.names()))
        requests = self._changed(delta)
        if requests is None:
            self._is_lost = True
            return UpdateOutcome.SNAPSHOT_WANTED
        self._require_room(requests)
        for request_id in (*delta.started, *delta.removed):
            self._remember_left(self._by_id[request_id])
        self.sequence = delta.sequence
        self._take(requests)
        if delta.started:
            self._count_starts(len(delta.started), now_s)
        return UpdateOutcome.APPLIED

    def starts_at_s(self, position: int, now_s: float) -> float:
        """When the request at that position is likely to start, from how fast the queue moved so far."""
        since_s = now_s if math.isnan(self._started_at_s) else self._started_at_s
        return max(now_s, since_s + (position + 1) * (self._pace_s or _PACE_S_DEFAULT))

    def _changed(self, delta: QueueDelta) -> list[QueuedRequest] | None:
        """The queue after the delta; None: it speaks of requests that are not here."""
        leaving = {*delta.started, *delta.removed, *(moved.request_id for moved in delta.moved)}
        added = self._made([entry for _, entry in delta.added])
        if added is None or not leaving <= self._by_id.keys():
            return None
        if any(entry.request_id in self._by_id for _, entry in delta.added):
            return None
        places = {position: request for (position, _), request in zip(delta.added, added, strict=True)}
        places |= {moved.position: self._by_id[moved.request_id] for moved in delta.moved}
        requests = [request for request in self.requests if request.request_id not in leaving]
        if len(places) != len(added) + len(delta.moved):
            raise InvalidRequest("two requests have the same position", field="position")
        if places and not 0 <= min(places) <= max(places) < len(requests) + len(places):
            raise InvalidRequest(
                f"position {max(places)} in a queue of {len(requests) + len(places)}", field="position"
            )
        for position in sorted(places):
            requests.insert(position, places[position])
        return requests

    def _made(self, entries: Sequence[Entry]) -> list[QueuedRequest] | None:
        """Requests of these entries; None: one begins with a chain that is not known here."""
        requests = []
        for entry in entries:
            chain = self._chain(entry)
            if chain is None:
                return None
            made = QueuedRequest(entry.request_id, entry.session_id, chain, entry.new_tokens, entry.priority)
            before = self._by_id.get(entry.request_id)
            requests.append(before if before is not None and made.says_the_same(before) else made)
        return requests

    def _chain(self, entry: Entry) -> Chain | None:
        size = self._hash_size_bytes
        if not entry.request_id:
            raise InvalidRequest("a waiting request has no id", field="request_id")
        if len(entry.packed) % size:
            raise InvalidRequest(
                f"{len(entry.packed)} bytes are not a multiple of the {size}-byte hash", field="hashes"
            )
        packed = entry.packed
        if entry.prefix_request_id:
            known = self._by_id.get(entry.prefix_request_id)
            prefix = known.chain if known is not None else self._left.get(entry.prefix_request_id)
            if prefix is None or len(prefix) < entry.prefix_blocks:
                return None
            packed = prefix.packed[: entry.prefix_blocks * size] + packed
        elif entry.prefix_blocks:
            raise InvalidRequest("prefix_blocks without prefix_request_id", field="prefix_request_id")
        if len(packed) > self._bounds.hashes_per_entry_max * size:
            raise InvalidRequest(
                f"{len(packed) // size} hashes in one entry, at most {self._bounds.hashes_per_entry_max}",
                field="hashes",
            )
        return Chain(packed, size)

    def _require_room(self, requests: Sequence[QueuedRequest]) -> None:
        if len(requests) > self._bounds.entries_max:
            raise InvalidRequest(
                f"{len(requests)} waiting requests, at most {self._bounds.entries_max} (queue_entries_max): "
                "send those that start first",
                field="entries",
            )
        blocks = sum(len(request.chain) for request in requests)
        if blocks > self._bounds.blocks_max:
            raise InvalidRequest(
                f"{blocks} hashes in the queue, at most {self._bounds.blocks_max} (queue_blocks_max): "
                "send those of the requests that start first",
                field="hashes",
            )

    def _take(self, requests: list[QueuedRequest]) -> None:
        self.requests = requests
        self._by_id = {request.request_id: request for request in requests}
        for request_id in self._by_id:
            self._forget_left(request_id)

    def _remember_left(self, request: QueuedRequest) -> None:
        self._forget_left(request.request_id)
        self._left[request.request_id] = request.chain
        self._left_blocks += len(request.chain)
        while self._left_blocks > self._bounds.blocks_max or len(self._left) > self._bounds.entries_max:
            self._forget_left(next(iter(self._left)))

    def _forget_left(self, request_id: str) -> None:
        chain = self._left.pop(request_id, None)
        if chain is not None:
            self._left_blocks -= len(chain)

    def _count_starts(self, count: int, now_s: float) -> None:
        self.starts += count
        if not math.isnan(self._started_at_s):
            seen_s = min(max((now_s - self._started_at_s) / count, _PACE_S_MIN), _PACE_S_MAX)
            self._pace_s += (_PACE_SMOOTHING if self._pace_s else 1.0) * (seen_s - self._pace_s)
        self._started_at_s = now_s


def _require_distinct(request_ids: Sequence[str]) -> None:
    if len(set(request_ids)) != len(request_ids):
        raise InvalidRequest("a request is named twice", field="request_id")
