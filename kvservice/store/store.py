"""The single owner of mutable state: every call of the contract as one method on nouns.

Runs on the event loop and nowhere else. A method either changes all its books or raises before
the first change; between two awaits nothing else runs. Only `attach` and `put` wait (for memory
being made); both look again at everything after waiting.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from kvservice.blocks import NO_ROW, Chain, DropReason, NamespaceKey, NamespaceSpec
from kvservice.config import Config
from kvservice.dram import Arena
from kvservice.errors import Draining, NamespaceUnknown
from kvservice.index import State
from kvservice.instances import DrainNotice, Identity, Instances, SegmentsChanged
from kvservice.leases import HoldKind, Leases
from kvservice.metrics import Metrics
from kvservice.store import invariants, requests
from kvservice.store.checksummer import Checksummer
from kvservice.store.holds import Holds
from kvservice.store.namespace import Namespace, Peer
from kvservice.store.outcomes import (
    Committed,
    Ended,
    Forgotten,
    Granted,
    Looked,
    Miss,
    Renewed,
    Reserved,
    Written,
    runs,
)
from kvservice.store.registry import Registry
from kvservice.store.space import Space


class Store:
    """All namespaces, instances, leases and memory of one daemon."""

    def __init__(self, config: Config, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.metrics = metrics
        self.clock = clock
        self.is_draining = False
        self.instances: Instances[Namespace] = Instances(
            connections_max=config.connections_max, instances_max=config.instances_max
        )
        self.leases = Leases(
            first_id=secrets.randbits(62) + 1,
            per_instance_max={
                HoldKind.READ: config.leases_per_instance_max,
                HoldKind.WRITE: config.reservations_per_instance_max,
            },
        )
        self.arena = Arena(
            capacity_bytes=config.dram_bytes, huge_pages=config.dram_huge_pages, numa_node=config.dram_numa_node
        )
        self.checksummer = Checksummer(metrics, threads=config.checksum_threads)
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="memory")
        self._space = Space(
            self.arena,
            config,
            executor=self._executor,
            clock=clock,
            namespaces=lambda: self.namespaces.values(),  # noqa: PLW0108  # assigned below
            on_segments_changed=self._tell_segments_changed,
        )
        self._registry = Registry(config, self._space, metrics, clock=clock, is_idle=self._is_idle_namespace)
        self.namespaces: dict[NamespaceKey, Namespace] = self._registry.namespaces
        self._holds = Holds(
            self.leases,
            self.namespaces,
            metrics,
            clock=clock,
            duration_s=config.lease_s,
            duration_s_max=config.lease_s_max,
        )

    # ------------------------------------------------------------ connections

    def connect(self, identity: Identity) -> Peer:
        """A process proved who it is; it gets a token, also while draining (it may only ask). Raises Overloaded."""
        return self.instances.connect(identity, identity.tenant(self.config.tenants), self.clock())

    async def attach(self, instance: Peer, name: str, specs: Sequence[NamespaceSpec]) -> list[int]:
        """The process becomes an instance of these namespaces, each with memory to write to.

        Returns:
            The ids of the segments to map.

        Raises:
            InvalidRequest, LayoutMismatch, CapacityExhausted, Overloaded, Draining.
        """
        self._refuse_while_draining()
        for spec in specs:
            self._registry.require_fits(spec)
        self.instances.attach(instance, name)
        instance.namespaces.clear()  # of an earlier attachment: its ids must not answer for these
        try:
            for spec in specs:
                instance.namespaces.append(await self._registry.namespace_for(spec))
        except BaseException:
            instance.namespaces.clear()
            self.instances.detach(instance)
            raise
        segments = [segment for namespace in instance.namespaces for _, segment in namespace.pool.live_segments()]
        return [segment.segment_id for segment in segments]

    def detach(self, instance: Peer) -> None:
        """The instance's stream broke: its holds expire; its slots wait for the process."""
        if instance.is_attached:
            self.instances.detach(instance)
            self._holds.expire(self.leases.expire_instance(instance.instance_id))

    def hang_up(self, instance: Peer) -> None:
        """The process is gone: all that it held is free."""
        self.detach(instance)
        for hold in self.leases.of_instance(instance.instance_id):
            self._holds.end(hold)
        self.leases.forget_instance(instance.instance_id)
        self.instances.hang_up(instance)

    def namespace(self, instance: Peer, namespace_id: int) -> Namespace:
        """The attached namespace of that wire id.

        Raises:
            NamespaceUnknown: not of this attachment.
        """
        if not instance.is_attached or not 1 <= namespace_id <= len(instance.namespaces):
            raise NamespaceUnknown(f"namespace id {namespace_id} is not of this attachment: attach again")
        return instance.namespaces[namespace_id - 1]

    # ---------------------------------------------------- lookup, get, release

    def lookup(self, instance: Peer, namespace_id: int, packed: bytes) -> Looked:
        """How many leading blocks are held. No side effect."""
        namespace = self.namespace(instance, namespace_id)
        chain = self._chain(namespace, packed)
        hit = namespace.index.hit_length(chain)
        return Looked(hit, len(chain), requests.miss_after(namespace, chain, hit))

    def get(
        self,
        instance: Peer,
        namespace_id: int,
        packed: bytes,
        *,
        session_id: str,
        request_id: str,
        duration_s: float,
        max_blocks: int,
        attempt_id: int = 0,
    ) -> Granted:
        """Lease the longest held prefix of at most `max_blocks` blocks (0: all)."""
        self._refuse_while_draining()
        namespace = self.namespace(instance, namespace_id)
        chain = self._chain(namespace, packed)
        self.leases.require_room(HoldKind.READ, instance.instance_id, attempt_id=attempt_id)
        hit = namespace.index.hit_length(chain)
        leased = min(hit, max_blocks) if max_blocks else hit
        rows = namespace.index.rows_of(chain.hashes(count=leased))
        slots = namespace.index.slot[rows]
        counters = namespace.counters
        counters.requested += len(chain)
        counters.dram_hits += leased
        counters.misses += len(chain) - leased
        hold_id, lease_s = 0, 0.0
        if leased:
            namespace.pool.hold(slots)
            namespace.touch(rows, self.clock())
            namespace.index.uses[rows] += 1
            if session_id:
                namespace.sessions.extend(session_id, rows, int(rows[-1]))
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
        miss = Miss.OVER_LIMIT if leased < hit else requests.miss_after(namespace, chain, hit)
        return Granted(hold_id, lease_s, namespace.pool, slots, len(chain) - leased, miss)

    def renew(
        self, instance: Peer, lease_ids: Sequence[int], reservation_ids: Sequence[int], duration_s: float
    ) -> Renewed:
        """Extend holds; all or none.

        Raises:
            LeaseUnknown, LeaseExpired, ReservationLost.
        """
        now_s, duration_s = self.clock(), self._holds.duration_s(duration_s)
        holds = self._holds.find(instance, HoldKind.READ, lease_ids)
        holds += self._holds.find(instance, HoldKind.WRITE, reservation_ids)
        for hold in holds:
            self.leases.require_live(hold, now_s)
        for hold in holds:
            self.leases.renew(hold, now_s=now_s, duration_s=duration_s)
        return Renewed(duration_s)

    def release(
        self, instance: Peer, lease_ids: Sequence[int], request_id: str = "", attempt_ids: Sequence[int] = ()
    ) -> Ended:
        """End leases, all holds of a request, and what attempts were granted; all or none.

        Raises:
            LeaseUnknown: a lease id is not this instance's. InvalidRequest: one is named twice.
        """
        holds = self._holds.find(instance, HoldKind.READ, lease_ids)
        if request_id:
            holds += [hold for hold in self.leases.of_request(instance.instance_id, request_id) if hold not in holds]
        if attempt_ids:
            holds += [hold for hold in self.leases.give_up(instance.instance_id, attempt_ids) if hold not in holds]
        for hold in holds:
            self._holds.end(hold)
        now_s = self.clock()
        expired = sum(hold.expired or hold.expires_at_s <= now_s for hold in holds)
        return Ended(len(holds) - expired, expired)

    # ------------------------------------------------------ put, commit, abort

    async def put(
        self,
        instance: Peer,
        namespace_id: int,
        parent: bytes,
        packed: bytes,
        *,
        session_id: str,
        request_id: str,
        duration_s: float,
        attempt_id: int = 0,
    ) -> Reserved:
        """Reserve slots for the blocks of a chain that are not held yet, all or none.

        Raises:
            InvalidRequest, NamespaceUnknown, CapacityExhausted, QuotaExceeded, Overloaded, Draining.
        """
        self._refuse_while_draining()
        while True:
            namespace = self.namespace(instance, namespace_id)
            hashes = self._chain(namespace, packed).hashes()
            requests.require_distinct(hashes)
            self.leases.require_room(HoldKind.WRITE, instance.instance_id, attempt_id=attempt_id)
            parent_row = requests.parent_row(namespace, parent)
            if parent and parent_row == NO_ROW:
                return Reserved(0, 0.0, [(len(hashes), Written.PARENT_MISSING)], namespace.pool, np.zeros(0, np.int32))
            rows = namespace.index.rows_of(hashes, parent=parent_row)
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
        namespace.index.last_used_s[inserted] = self.clock()
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
        now_s = self.clock()
        self.leases.require_live(hold, now_s)
        chosen = requests.chosen_positions(hold, positions)
        namespace = self.namespaces[hold.namespace]
        slots = hold.slots[chosen]
        rows = namespace.pool.row_of[slots]
        alive = rows[rows != NO_ROW]
        if len(alive):
            resident = namespace.index.publish(alive, now_s)
            namespace.touch(resident, now_s)
            namespace.counters.committed += len(alive)
            self.metrics.committed_blocks.inc(len(alive))
            self.metrics.committed_bytes.inc(len(alive) * namespace.spec.block_size_bytes)
            self.checksummer.submit(namespace, slots)
            if hold.session_id:
                namespace.sessions.extend(
                    hold.session_id,
                    np.append(alive, namespace.index.parent[alive[0]]),
                    int(alive[-1]),
                )
        states = namespace.index.state[rows]
        outcomes: list[Committed | DropReason] = [
            DropReason.PREFIX_LOST
            if row == NO_ROW
            else (Committed.PUBLISHED if state == State.RESIDENT else Committed.AWAITING_PARENT)
            for row, state in zip(rows.tolist(), states.tolist(), strict=True)
        ]
        namespace.pool.unhold(slots)
        hold.slots, hold.positions = hold.slots[~chosen], hold.positions[~chosen]
        if not len(hold.slots):
            self.leases.end(hold)
        return runs(outcomes)

    def abort(self, instance: Peer, reservation_id: int) -> bool:
        """Give a reservation back; whether it had expired. Raises LeaseUnknown."""
        hold = self._holds.find(instance, HoldKind.WRITE, [reservation_id])[0]
        self._holds.end(hold)
        return hold.expired

    # ---------------------------------------------------------------- the rest

    def forget_session(self, instance: Peer, namespace_id: int, session_id: str) -> Forgotten:
        """Drop the blocks that only this session needs: not those before another's end."""
        return Forgotten(*self.namespace(instance, namespace_id).forget_session(session_id, self.clock()))

    def forget_namespace(self, instance: Peer, namespace_id: int) -> Forgotten:
        """Drop every block of the namespace; what is leased is unreachable now, freed at release."""
        return Forgotten(*self.namespace(instance, namespace_id).forget_all(self.clock()))

    async def upkeep(self) -> None:
        """One round of what nobody asks for: expiries, memory ahead of need, watermarks."""
        self._holds.expire(self.leases.expire(self.clock()))
        attached = {id(namespace) for instance in self.instances for namespace in instance.namespaces}
        for namespace in list(self.namespaces.values()):
            await self._space.keep_up(namespace, may_grow=id(namespace) in attached and not self.is_draining)

    def drain(self) -> None:
        """Take no new work and tell the instances. Holds end as their requests do."""
        self.is_draining = True
        for instance in self.instances:
            instance.notify(DrainNotice(self.config.drain_s))

    @property
    def is_idle(self) -> bool:
        """Whether nobody reads or writes: no live holds."""
        return all(hold.expired for hold in self.leases)

    def close(self) -> None:
        """Give all memory back. Blocks until threads are done."""
        self.checksummer.close()
        self._executor.shutdown(wait=True, cancel_futures=True)
        for namespace in self.namespaces.values():
            for _, segment in namespace.pool.live_segments():
                segment.close()

    def check(self) -> None:
        """Assert every invariant that spans rooms. For tests; O(n)."""
        invariants.check(self.namespaces, self.leases, self._space, self.instances)

    # ---------------------------------------------------------------- privately

    def _is_idle_namespace(self, namespace: Namespace) -> bool:
        is_attached = any(namespace in instance.namespaces for instance in self.instances)
        return not is_attached and not (namespace.pool.holders > 0).any()

    def _refuse_while_draining(self) -> None:
        if self.is_draining:
            raise Draining("the daemon is shutting down", retry_after_s=self.config.drain_s)

    async def _make_room(self, namespace: Namespace, slots_wanted: int, front: int) -> None:
        # The block that the new ones will follow must not be evicted to make room for them.
        pinned = namespace.index.slot[[front]] if front != NO_ROW else np.zeros(0, np.int32)
        namespace.pool.hold(pinned)
        try:
            await self._space.make_room(namespace, slots_wanted)
        finally:
            namespace.end_hold(pinned)

    def _chain(self, namespace: Namespace, packed: bytes) -> Chain:
        return requests.chain(namespace, packed, hashes_max=self.config.hashes_per_call_max)

    def _tell_segments_changed(self, namespace: Namespace, added: list[int], retired: list[int]) -> None:
        notice = SegmentsChanged(tuple(added), tuple(retired))
        for instance in self.instances:
            if namespace in instance.namespaces:
                instance.notify(notice)
