"""Put and Commit: space for blocks that are not held, and their publication."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvservice.blocks import NO_ROW, DropReason, Rows
from kvservice.config import Config
from kvservice.index import State
from kvservice.leases import HoldKind
from kvservice.metrics import Metrics
from kvservice.sessions import session_key
from kvservice.store import requests
from kvservice.store.checksummer import Checksummer
from kvservice.store.holds import Holds
from kvservice.store.namespace import Namespace, Peer
from kvservice.store.outcomes import Committed, Reserved, Written, runs
from kvservice.store.space import Space, sparing
from kvservice.store.write_behind import WriteBehind


class Writing:
    """The writing calls of the store."""

    def __init__(
        self,
        config: Config,
        holds: Holds,
        space: Space,
        checksummer: Checksummer,
        write_behind: WriteBehind,
        metrics: Metrics,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._holds = holds
        self._space = space
        self._checksummer = checksummer
        self._write_behind = write_behind
        self._metrics = metrics
        self._clock = clock

    async def put(
        self,
        instance: Peer,
        namespace_of: Callable[[], Namespace],
        parent: bytes,
        packed: bytes,
        *,
        session_id: str,
        request_id: str,
        duration_s: float,
        attempt_id: int,
    ) -> Reserved:
        """Reserve slots for the blocks of a chain that are not held yet, all or none.

        Raises:
            InvalidRequest, NamespaceUnknown, CapacityExhausted, QuotaExceeded, Overloaded, Draining.
        """
        while True:
            namespace = namespace_of()
            hashes = requests.chain(namespace, packed, hashes_max=self._config.hashes_per_call_max).hashes()
            requests.require_distinct(hashes)
            self._holds.leases.require_room(HoldKind.WRITE, instance.instance_id, attempt_id=attempt_id)
            parent_row = requests.parent_row(namespace, parent)
            if parent and parent_row == NO_ROW:
                return Reserved(0, 0.0, [(len(hashes), Written.PARENT_MISSING)], namespace.pool, np.zeros(0, np.int32))
            rows = namespace.index.rows_of(hashes, parent=parent_row)
            last = rows[-1:] if len(rows) else np.array([parent_row] * (parent_row != NO_ROW), dtype=np.int32)
            if requests.own_length(namespace, last, session_id) < len(last):
                return Reserved(0, 0.0, [(len(hashes), Written.OTHER_SESSION)], namespace.pool, np.zeros(0, np.int32))
            missing = len(hashes) - len(rows)
            if missing <= namespace.pool.free_slots:
                break
            front = int(rows[-1]) if len(rows) else parent_row
            await self._make_room(namespace, missing, front)
        known = requests.known_runs(namespace, rows)
        if not missing:
            return Reserved(0, 0.0, known, namespace.pool, np.zeros(0, np.int32))
        slots = namespace.pool.allocate(missing)
        behind = int(rows[-1]) if len(rows) else parent_row
        inserted = namespace.index.insert(behind, hashes[len(rows) :], slots)
        namespace.index.last_used_s[inserted] = self._clock()
        namespace.pool.row_of[slots] = inserted
        hold_id, lease_s = self._holds.grant(
            HoldKind.WRITE,
            instance,
            namespace,
            slots,
            session_id=session_id,
            request_id=request_id,
            asked_s=duration_s,
            attempt_id=attempt_id,
        )
        return Reserved(hold_id, lease_s, known, namespace.pool, slots)

    def commit(
        self, instance: Peer, reservation_id: int, positions: Sequence[int]
    ) -> list[tuple[int, Committed | DropReason]]:
        """Publish written blocks; the outcomes as runs, in chain order.

        Args:
            positions: places among the slots that the Put reserved; empty: all still reserved.

        Raises:
            LeaseUnknown, ReservationLost, InvalidRequest.
        """
        hold = self._holds.find(instance, HoldKind.WRITE, [reservation_id])[0]
        now_s = self._clock()
        self._holds.leases.require_live(hold, now_s)
        chosen = requests.chosen_positions(hold, positions)
        namespace = self._holds.namespace(hold)
        slots = hold.slots[chosen]
        rows = namespace.pool.row_of[slots]
        alive = rows[rows != NO_ROW]
        if len(alive):
            resident = namespace.index.publish(alive, now_s)
            namespace.stored(resident, now_s)
            namespace.counters.committed += len(alive)
            self._metrics.committed_blocks.inc(len(alive))
            self._metrics.committed_bytes.inc(len(alive) * namespace.spec.block_size_bytes)
            self._checksummer.submit(namespace, slots)
            self._write_behind.submit(namespace, resident)
            if hold.session_id:
                namespace.sessions.extend(
                    session_key(hold.session_id),
                    np.append(alive, namespace.index.parent[alive[0]]),
                    int(alive[-1]),
                )
        outcomes = _outcomes(namespace, rows)
        namespace.pool.unhold(slots)
        hold.slots, hold.positions = hold.slots[~chosen], hold.positions[~chosen]
        if not len(hold.slots):
            self._holds.leases.end(hold)
            self._metrics.operations.put.observe(now_s - hold.granted_at_s)
        return outcomes

    async def _make_room(self, namespace: Namespace, slots_wanted: int, front: int) -> None:
        followed = np.array([front] * (front != NO_ROW), dtype=np.int32)
        with sparing(namespace, followed):
            await self._space.make_room(namespace, slots_wanted)


def _outcomes(namespace: Namespace, rows: Rows) -> list[tuple[int, Committed | DropReason]]:
    """What became of committed rows (NO_ROW: gone before), as runs."""
    states = namespace.index.state[rows]
    if (states == State.RESIDENT).all() and (rows != NO_ROW).all():  # nearly always
        return [(len(rows), Committed.PUBLISHED)]
    return runs(
        DropReason.PREFIX_LOST
        if row == NO_ROW
        else (Committed.PUBLISHED if state == State.RESIDENT else Committed.AWAITING_PARENT)
        for row, state in zip(rows.tolist(), states.tolist(), strict=True)
    )
