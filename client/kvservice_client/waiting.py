"""The engine's waiting queue as the daemon is told of it: what to send so that it knows the same.

Pure: the wanted queue in, messages out. Who sends them says whether they arrived.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from kvservice_proto.v1 import kvservice_pb2 as pb

_MESSAGE_HASH_BYTES = 1024 * 1024
_TEXT_LENGTH_MAX = 200
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class WaitingRequest:
    """A request that an engine has not started."""

    request_id: str
    """At most 200 characters; no two waiting requests have the same."""
    hashes: Sequence[bytes]
    """The chain that it needs, root first. Keep the object: an equal one need not be compared."""
    session_id: str = ""
    new_tokens: int = 0
    """Tokens to compute whatever is held."""
    priority: int = 0
    """Smaller is more important; breaks ties between instances."""

    def same_chain(self, other: WaitingRequest) -> bool:
        """Whether both need the same blocks."""
        return self.hashes is other.hashes or list(self.hashes) == list(other.hashes)


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What the daemon takes of one queue."""

    entries_max: int
    blocks_max: int
    hashes_per_entry_max: int


class QueueMirror:
    """What the daemon knows of one queue, if everything that was sent arrived."""

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._epoch = 0
        self._sequence = 0
        self._known: dict[str, WaitingRequest] | None = None  # in order; None: unknown, send everything
        self._left: OrderedDict[str, WaitingRequest] = OrderedDict()
        self._last_of_session: dict[str, str] = {}

    def lost(self) -> None:
        """Something did not arrive or was not understood: begin anew."""
        self._known = None
        self._left.clear()
        self._last_of_session.clear()

    def updates(
        self, waiting: Sequence[WaitingRequest], started: Collection[str] = ()
    ) -> Iterator[pb.UpdateQueueRequest]:
        """The messages that make the daemon know this queue, each valid after the ones before it.

        Args:
            waiting: the next to start first. What is beyond the daemon's limits is left out, or its chain cut.
            started: requests that waited and run now.
        """
        wanted = self._within_limits(waiting)
        known = self._known
        if known is None or any(
            request_id in known and not known[request_id].same_chain(request) for request_id, request in wanted.items()
        ):
            self._epoch, self._sequence = self._epoch + 1, 0
            known, gone = {}, []
        else:
            gone = [request_id for request_id in known if request_id not in wanted]
        added = [request_id for request_id in wanted if request_id not in known]
        moved = _moved([request_id for request_id in known if request_id in wanted], list(wanted))
        is_snapshot = not self._sequence
        if not is_snapshot and not (gone or added or moved):
            return
        groups = self._groups(wanted, added)
        for number, group in enumerate(groups):
            later = {request_id for of_group in groups[number + 1 :] for request_id in of_group}
            place = {request_id: at for at, request_id in enumerate(name for name in wanted if name not in later)}
            message = pb.UpdateQueueRequest(epoch=self._epoch)
            if is_snapshot and number == 0:
                message.snapshot.entries.extend(self._entry(wanted[request_id]) for request_id in group)
            else:
                delta = message.delta
                delta.sequence = self._sequence
                if number == 0:
                    delta.started_ids.extend(request_id for request_id in gone if request_id in started)
                    delta.removed_ids.extend(request_id for request_id in gone if request_id not in started)
                    delta.moves.extend(
                        pb.QueueMove(request_id=request_id, position=place[request_id]) for request_id in moved
                    )
                delta.additions.extend(
                    pb.QueueAddition(position=place[request_id], entry=self._entry(wanted[request_id]))
                    for request_id in group
                )
            self._sequence += 1
            yield message
        self._remember_left([known[request_id] for request_id in gone], wanted)
        self._known = wanted

    def _within_limits(self, waiting: Sequence[WaitingRequest]) -> dict[str, WaitingRequest]:
        wanted: dict[str, WaitingRequest] = {}
        blocks_left = self._limits.blocks_max
        for request in waiting:
            if len(wanted) == self._limits.entries_max:
                break
            if not 1 <= len(request.request_id) <= _TEXT_LENGTH_MAX or request.request_id in wanted:
                continue  # the daemon would refuse the whole message for it
            blocks = min(len(request.hashes), self._limits.hashes_per_entry_max, blocks_left)
            blocks_left -= blocks
            if blocks < len(request.hashes):
                request = self._cut(request, blocks)  # noqa: PLW2901  # what the daemon is told of it
            wanted[request.request_id] = request
        return wanted

    def _cut(self, request: WaitingRequest, blocks: int) -> WaitingRequest:
        return WaitingRequest(
            request.request_id, request.hashes[:blocks], request.session_id, request.new_tokens, request.priority
        )

    def _groups(self, wanted: dict[str, WaitingRequest], added: Sequence[str]) -> list[list[str]]:
        """The added requests in messages of a bounded size; at least one group, which may be empty."""
        groups: list[list[str]] = [[]]
        size_bytes = 0
        for request_id in added:
            hashes = wanted[request_id].hashes
            entry_bytes = len(hashes) * (len(hashes[0]) if hashes else 0)
            if groups[-1] and size_bytes + entry_bytes > _MESSAGE_HASH_BYTES:
                groups.append([])
                size_bytes = 0
            groups[-1].append(request_id)
            size_bytes += entry_bytes
        return groups

    def _entry(self, request: WaitingRequest) -> pb.QueueEntry:
        entry = pb.QueueEntry(
            request_id=request.request_id,
            session_id=request.session_id[:_TEXT_LENGTH_MAX],
            new_tokens=max(0, min(request.new_tokens, _INT32_MAX)),
            priority=max(-_INT32_MAX, min(request.priority, _INT32_MAX)),
        )
        before = self._left.get(request.request_id) or self._left.get(self._last_of_session.get(request.session_id, ""))
        shared = _shared(before.hashes, request.hashes) if before is not None else 0
        if before is not None and shared:
            entry.prefix_request_id, entry.prefix_blocks = before.request_id, shared
        entry.hashes = b"".join(request.hashes[shared:])
        return entry

    def _remember_left(self, left: Sequence[WaitingRequest], wanted: Collection[str]) -> None:
        # A quarter of what the daemon remembers: what is referred to here is never forgotten there.
        for request in left:
            self._left[request.request_id] = request
            if request.session_id:
                self._last_of_session[request.session_id] = request.request_id
        for request_id in wanted:
            self._left.pop(request_id, None)
        blocks = sum(len(request.hashes) for request in self._left.values())
        while self._left and (
            blocks > self._limits.blocks_max // 4 or len(self._left) > max(1, self._limits.entries_max // 4)
        ):
            request_id, request = self._left.popitem(last=False)
            blocks -= len(request.hashes)
            if self._last_of_session.get(request.session_id) == request_id:
                del self._last_of_session[request.session_id]


def _shared(before: Sequence[bytes], now: Sequence[bytes]) -> int:
    """How many leading hashes are the same."""
    shared = min(len(before), len(now))
    for position, (one, other) in enumerate(zip(before, now, strict=False)):
        if one != other:
            return position
    return shared


def _moved(before: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The fewest requests that have to move so that those of `before` stand in the wanted order."""
    place = {request_id: position for position, request_id in enumerate(wanted)}
    places = [place[request_id] for request_id in before]
    if all(one < other for one, other in itertools.pairwise(places)):
        return []
    # The longest increasing subsequence stays where it is: patience sorting.
    tops: list[int] = []
    piles: list[int] = []
    for position in places:
        pile = bisect.bisect_left(tops, position)
        tops[pile : pile + 1] = [position]
        piles.append(pile)
    staying: set[str] = set()
    last, pile = math.inf, len(tops) - 1
    for request_id, of_request in zip(reversed(before), reversed(piles), strict=True):
        if of_request == pile and place[request_id] < last:
            staying.add(request_id)
            last, pile = place[request_id], pile - 1
    return [request_id for request_id in before if request_id not in staying]
