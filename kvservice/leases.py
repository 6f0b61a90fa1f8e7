"""leases: who may not be disturbed until when.

A *hold* is a lease (READ) or a reservation (WRITE): slots that a client process may touch. It
belongs to an instance and a request. Passing its expiry does not free the slots: a stopped
process may go on copying when it continues. The hold is then *expired*: it cannot be renewed or
committed, and its slots stay out of use (quarantine) until the holder acknowledges with Release
or Abort, or its process is known to be gone.

Pure: no I/O, time is an argument.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np

from kvservice.blocks import NamespaceKey, Slots
from kvservice.errors import LeaseExpired, LeaseUnknown, Overloaded, ReservationLost

GIVEN_UP_MAX = 1024
"""Attempts remembered per instance, so that one granted late is refused."""


class HoldKind(Enum):
    """What the holder does with the slots."""

    READ = "lease"
    WRITE = "reservation"


@dataclass(slots=True, eq=False)
class Hold:
    """Slots promised to one request of one instance."""

    hold_id: int
    kind: HoldKind
    instance_id: int
    request_id: str
    session_id: str
    namespace: NamespaceKey
    slots: Slots
    """The slots still held, in chain order; Commit takes published ones out."""
    positions: Slots
    """Their places among the slots first granted."""
    granted_at_s: float
    expires_at_s: float
    attempt_id: int = 0
    """The caller's own name for the call; 0: none."""
    expired: bool = False


class Leases:
    """Every hold of the daemon, by id, by instance and by expiry."""

    def __init__(self, *, first_id: int, per_instance_max: dict[HoldKind, int]) -> None:
        """Args:
        first_id: where ids start; random, so that ids of an earlier daemon are unknown.
        per_instance_max: bound on holds of each kind, expired ones included.
        """
        self._next_id = first_id
        self._per_instance_max = per_instance_max
        self._holds: dict[int, Hold] = {}
        self._by_instance: dict[int, dict[int, Hold]] = {}
        self._counts: Counter[tuple[HoldKind, int]] = Counter()
        self._given_up: dict[int, OrderedDict[int, None]] = {}  # attempts by instance, oldest first
        self._expiries: list[tuple[float, int]] = []

    def __iter__(self) -> Iterator[Hold]:
        return iter(list(self._holds.values()))

    def grant(
        self,
        kind: HoldKind,
        *,
        instance_id: int,
        request_id: str,
        session_id: str,
        namespace: NamespaceKey,
        slots: Slots,
        now_s: float,
        duration_s: float,
        attempt_id: int = 0,
    ) -> Hold:
        """A new hold.

        Raises:
            Overloaded: the instance has as many as it may.
        """
        self.require_room(kind, instance_id, attempt_id=attempt_id)
        hold_id = self._next_id
        self._next_id += 1
        expires_at_s = now_s + duration_s
        hold = Hold(
            hold_id=hold_id,
            kind=kind,
            instance_id=instance_id,
            request_id=request_id,
            session_id=session_id,
            namespace=namespace,
            slots=slots,
            positions=np.arange(len(slots), dtype=np.int32),
            granted_at_s=now_s,
            expires_at_s=expires_at_s,
            attempt_id=attempt_id,
        )
        self._holds[hold_id] = hold
        self._by_instance.setdefault(instance_id, {})[hold_id] = hold
        self._counts[kind, instance_id] += 1
        heapq.heappush(self._expiries, (expires_at_s, hold_id))
        return hold

    def require_room(self, kind: HoldKind, instance_id: int, *, attempt_id: int = 0) -> None:
        """Whether the instance may have another hold of that kind.

        Raises:
            Overloaded: it has as many as it may.
            LeaseExpired: the caller gave this attempt up already.
        """
        if attempt_id and attempt_id in self._given_up.get(instance_id, ()):
            raise LeaseExpired(f"attempt {attempt_id} was released before it was granted")
        bound = self._per_instance_max[kind]
        if self._counts[kind, instance_id] >= bound:
            raise Overloaded(f"this instance already has {bound} {kind.value}s; release some first")

    def find(self, kind: HoldKind, *, instance_id: int, hold_id: int) -> Hold:
        """The hold of that kind and id if it belongs to the instance; expired ones too.

        Raises:
            LeaseUnknown: it does not exist, or is another's.
        """
        hold = self._holds.get(hold_id)
        if hold is None or hold.instance_id != instance_id or hold.kind is not kind:
            raise LeaseUnknown(f"no {kind.value} {hold_id} for this instance: never granted, or ended before")
        return hold

    def renew(self, hold: Hold, *, now_s: float, duration_s: float) -> None:
        """Move the expiry.

        Raises:
            LeaseExpired, ReservationLost: too late.
        """
        self.require_live(hold, now_s)
        hold.expires_at_s = now_s + duration_s
        heapq.heappush(self._expiries, (hold.expires_at_s, hold.hold_id))
        self._keep_heap_in_proportion()

    def require_live(self, hold: Hold, now_s: float) -> None:
        """Raise LeaseExpired or ReservationLost if the hold's time has passed."""
        if not hold.expired and now_s < hold.expires_at_s:
            return
        error = LeaseExpired if hold.kind is HoldKind.READ else ReservationLost
        passed_s = now_s - hold.expires_at_s
        when = f"{passed_s:.1f} s ago" if passed_s >= 0 else "with the attachment that it was granted to"
        raise error(f"{hold.kind.value} {hold.hold_id} expired {when}; release it")

    def expire(self, now_s: float) -> list[Hold]:
        """Mark and return the holds whose time has passed since the last call."""
        passed = []
        while self._expiries and self._expiries[0][0] <= now_s:
            _, hold_id = heapq.heappop(self._expiries)
            hold = self._holds.get(hold_id)
            if hold is not None and not hold.expired and hold.expires_at_s <= now_s:
                hold.expired = True
                passed.append(hold)
        return passed

    def expire_instance(self, instance_id: int) -> list[Hold]:
        """Mark and return every live hold of an instance whose stream broke."""
        passed = [hold for hold in self._by_instance.get(instance_id, {}).values() if not hold.expired]
        for hold in passed:
            hold.expired = True
        return passed

    def of_request(self, instance_id: int, request_id: str) -> list[Hold]:
        """The holds of one request."""
        holds = self._by_instance.get(instance_id, {}).values()
        return [hold for hold in holds if hold.request_id == request_id]

    def give_up(self, instance_id: int, attempt_ids: Collection[int]) -> list[Hold]:
        """The holds that these attempts were granted; attempts not granted yet never will be."""
        wanted = set(attempt_ids) - {0}  # 0 is no attempt: it must not end every hold that has none
        found = [hold for hold in self._by_instance.get(instance_id, {}).values() if hold.attempt_id in wanted]
        given_up = self._given_up.setdefault(instance_id, OrderedDict())
        given_up.update(dict.fromkeys(wanted - {hold.attempt_id for hold in found}))
        while len(given_up) > GIVEN_UP_MAX:
            given_up.popitem(last=False)
        return found

    def forget_instance(self, instance_id: int) -> None:
        """The instance is gone, and its holds were ended."""
        self._given_up.pop(instance_id, None)

    def of_instance(self, instance_id: int) -> list[Hold]:
        """The holds of one instance."""
        return list(self._by_instance.get(instance_id, {}).values())

    def end(self, hold: Hold) -> None:
        """Forget the hold. Its slots are the caller's business."""
        del self._holds[hold.hold_id]
        of_instance = self._by_instance[hold.instance_id]
        del of_instance[hold.hold_id]
        self._counts[hold.kind, hold.instance_id] -= 1
        if not of_instance:
            del self._by_instance[hold.instance_id]
            for kind in HoldKind:
                self._counts.pop((kind, hold.instance_id), None)
        self._keep_heap_in_proportion()

    def count(self, kind: HoldKind, *, instance_id: int | None = None) -> int:
        """How many holds of that kind, of one instance or of all."""
        if instance_id is not None:
            return self._counts[kind, instance_id]
        return sum(count for (of_kind, _), count in self._counts.items() if of_kind is kind)

    def quarantined_slots(self, *, instance_id: int | None = None) -> int:
        """Slots of expired holds that nobody may use yet."""
        holds = self._holds if instance_id is None else self._by_instance.get(instance_id, {})
        return sum(len(hold.slots) for hold in holds.values() if hold.expired)

    def _keep_heap_in_proportion(self) -> None:
        """Renewals and early releases leave entries behind."""
        if len(self._expiries) > 2 * len(self._holds) + 1024:
            self._expiries = [(hold.expires_at_s, hold.hold_id) for hold in self._holds.values() if not hold.expired]
            heapq.heapify(self._expiries)
