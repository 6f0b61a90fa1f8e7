"""Leases and reservations together with the slots and blocks they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvservice.blocks import NO_ROW, DropReason, NamespaceKey, Slots
from kvservice.config import Config
from kvservice.errors import InvalidRequest
from kvservice.leases import Hold, HoldKind, Leases
from kvservice.metrics import Metrics
from kvservice.store.namespace import Namespace, Peer
from kvservice.store.outcomes import Ended


class Holds:
    """Grants and ends holds, and lets go of what they held."""

    def __init__(
        self,
        leases: Leases,
        namespaces: Mapping[NamespaceKey, Namespace],
        config: Config,
        metrics: Metrics,
        *,
        clock: Callable[[], float],
    ) -> None:
        self.leases = leases
        self._namespaces = namespaces
        self._metrics = metrics
        self._clock = clock
        self._duration_s = config.lease_s
        self._duration_s_max = config.lease_s_max

    def grant(
        self,
        kind: HoldKind,
        instance: Peer,
        namespace: Namespace,
        slots: Slots,
        *,
        session_id: str,
        request_id: str,
        asked_s: float,
        attempt_id: int,
    ) -> tuple[int, float]:
        """A new hold on slots that are held already; its id and how long it lasts in seconds."""
        duration_s = self.duration_s(asked_s)
        hold = self.leases.grant(
            kind,
            instance_id=instance.instance_id,
            request_id=request_id,
            session_id=session_id,
            namespace=namespace.spec.key,
            slots=slots,
            now_s=self._clock(),
            duration_s=duration_s,
            attempt_id=attempt_id,
        )
        return hold.hold_id, duration_s

    def duration_s(self, asked_s: float) -> float:
        """What is granted for an asked time; 0.0 asks for the default."""
        return min(asked_s or self._duration_s, self._duration_s_max)

    def namespace(self, hold: Hold) -> Namespace:
        """The namespace that the hold's slots belong to."""
        return self._namespaces[hold.namespace]

    def find(self, instance: Peer, kind: HoldKind, hold_ids: Sequence[int]) -> list[Hold]:
        """The instance's holds of these ids, live or expired.

        Raises:
            LeaseUnknown: one is not its. InvalidRequest: one is named twice.
        """
        found = [self.leases.find(kind, instance_id=instance.instance_id, hold_id=hold_id) for hold_id in hold_ids]
        if len({hold.hold_id for hold in found}) != len(found):
            raise InvalidRequest(f"a {kind.value} is named twice", field=f"{kind.value}_ids")
        return found

    def renew(self, instance: Peer, lease_ids: Sequence[int], reservation_ids: Sequence[int], asked_s: float) -> float:
        """Extend holds, all or none; how long they last now, in seconds.

        Raises:
            LeaseUnknown, LeaseExpired, ReservationLost.
        """
        now_s, duration_s = self._clock(), self.duration_s(asked_s)
        holds = self.find(instance, HoldKind.READ, lease_ids) + self.find(instance, HoldKind.WRITE, reservation_ids)
        for hold in holds:
            self.leases.require_live(hold, now_s)
        for hold in holds:
            self.leases.renew(hold, now_s=now_s, duration_s=duration_s)
        return duration_s

    def release(self, instance: Peer, lease_ids: Sequence[int], request_id: str, attempt_ids: Sequence[int]) -> Ended:
        """End leases, all holds of a request, and what attempts were granted; all or none.

        Raises:
            LeaseUnknown, InvalidRequest: see `find`.
        """
        holds = self.find(instance, HoldKind.READ, lease_ids)
        if request_id:
            holds += [hold for hold in self.leases.of_request(instance.instance_id, request_id) if hold not in holds]
        if attempt_ids:
            holds += [hold for hold in self.leases.give_up(instance.instance_id, attempt_ids) if hold not in holds]
        for hold in holds:
            self.end(hold)
        now_s = self._clock()
        expired = sum(hold.expired or hold.expires_at_s <= now_s for hold in holds)
        return Ended(len(holds) - expired, expired)

    def expire(self, holds: Sequence[Hold]) -> None:
        """These were marked as expired: others may write the blocks, but nobody may have the slots."""
        for hold in holds:
            if hold.kind is HoldKind.WRITE:
                self._metrics.expired_reservations.inc()
                self._drop_unwritten(hold)
            else:
                self._metrics.expired_leases.inc()

    def end(self, hold: Hold) -> None:
        """The holder let go of its slots, or is gone."""
        if hold.kind is HoldKind.WRITE:
            self._drop_unwritten(hold)
        self.leases.end(hold)
        self._namespaces[hold.namespace].end_hold(hold.slots)

    def hand_over(self, hold: Hold) -> None:
        """Forget a lease whose slots somebody else lets go of from now on."""
        assert hold.kind is HoldKind.READ, "what a reservation did not write goes with it"
        self.leases.end(hold)

    def _drop_unwritten(self, hold: Hold) -> None:
        namespace = self._namespaces[hold.namespace]
        # The deepest first: each of these is dropped for its own reason, what others put behind lost its prefix.
        rows = namespace.pool.row_of[hold.slots][::-1]
        namespace.drop_subtrees(rows[rows != NO_ROW].tolist(), DropReason.ABORTED, self._clock())
