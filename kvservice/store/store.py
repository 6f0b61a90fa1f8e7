"""The single owner of mutable state: every call of the contract as one method on nouns.

Runs on the event loop and nowhere else. A method either changes all its books or raises before
the first change; between two awaits nothing else runs. Only `attach` and `put` wait (for memory
being made); both look again at everything after waiting.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence

from kvservice.blocks import DropReason, NamespaceKey, NamespaceSpec, Tier
from kvservice.config import Config
from kvservice.dram import Arena
from kvservice.errors import Draining
from kvservice.instances import DrainNotice, HungUp, Identity, Instances
from kvservice.leases import HoldKind, Leases
from kvservice.lookahead import Speeds
from kvservice.metrics import Metrics
from kvservice.nvme import Files, RealFiles
from kvservice.sessions import session_key
from kvservice.store import invariants
from kvservice.store.checksummer import Checksummer
from kvservice.store.device_copies import DeviceCopies
from kvservice.store.disk_space import DiskSpace
from kvservice.store.disks import Disks
from kvservice.store.durability import Durability
from kvservice.store.expiry import expire_slice
from kvservice.store.holds import Holds
from kvservice.store.journal import Journal
from kvservice.store.namespace import Namespace, Peer
from kvservice.store.outcomes import (
    Committed,
    Ended,
    Forgotten,
    Granted,
    Looked,
    PlannedLoad,
    Prefetched,
    Renewed,
    Reserved,
    Truncated,
)
from kvservice.store.prefetching import Prefetching
from kvservice.store.promotion import Promotion
from kvservice.store.reading import Reading
from kvservice.store.registry import Registry
from kvservice.store.space import Space
from kvservice.store.truncating import DropOldest, KeepRanges, Truncating
from kvservice.store.waiting import WaitingRequests
from kvservice.store.write_behind import WriteBehind
from kvservice.store.writing import Writing
from kvservice.tiers import TierUsage
from kvservice_cuda.driver import Driver


class Store:
    """All namespaces, instances, leases and memory of one daemon."""

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        files: Files | None = None,
        driver: Driver | None = None,
    ) -> None:
        """Args:
        clock: seconds, for everything that lasts; never goes back.
        wall_clock: seconds since 1970, for what must be understood after a restart.
        files, driver: what NVMe tier and device plane stand on; None: the operating system's files, no device plane.
        """
        self.config = config
        self.metrics = metrics
        self.clock = clock
        self.is_draining = False
        self.namespaces: dict[NamespaceKey, Namespace] = {}
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
        self._holds = Holds(self.leases, self.namespaces, config, metrics, clock=clock)
        self.disks = Disks([])
        self.journal = Journal(self.disks, clock=clock, wall_clock=wall_clock)
        self.disk_space = DiskSpace(self.disks, self.namespaces, clock=clock)
        self.write_behind = WriteBehind(config, self.disks, self.disk_space, self.journal, metrics)
        self.checksummer = Checksummer(metrics, threads=config.checksum_threads, may_work=self.write_behind.pausing)
        self.arena = Arena(
            capacity_bytes=config.dram_bytes, huge_pages=config.dram_huge_pages, numa_node=config.dram_numa_node
        )
        self._space = Space(
            self.arena, self.namespaces, self.instances, config, clock=clock, until_settled=self._until_settled
        )
        self._registry = Registry(
            self.namespaces, self.instances, self.disks, self.journal, self._space, config, metrics, clock=clock
        )
        self.device_copies = DeviceCopies(driver, self._holds, metrics, clock=clock)
        self.durability = Durability(
            config,
            self.disks,
            self.journal,
            self.write_behind,
            self._registry,
            clock=clock,
            wall_clock=wall_clock,
            files=files or RealFiles(),
        )
        promotion = Promotion(self.disks, metrics, clock=clock)
        self.waiting = WaitingRequests(config, self._space, self.disks, metrics, clock=clock)
        self.prefetching = Prefetching(self.waiting, self._space, self.disks, promotion, clock=clock)
        self._reading = Reading(
            config, self._holds, self._space, self.disks, promotion, self.journal, self.write_behind, clock=clock
        )
        self._writing = Writing(
            config, self._holds, self._space, self.checksummer, self.write_behind, metrics, clock=clock
        )
        self._truncating = Truncating(config, self.journal, clock=clock)

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
        return await self._registry.attach(instance, name, specs)

    def detach(self, instance: Peer) -> None:
        """The instance's stream broke: its holds expire; its slots wait for the process."""
        if instance.is_attached:
            self.instances.detach(instance)
            self.waiting.instance_left(instance)
            self.device_copies.forget(instance)
            self._reading.give_up(instance)
            self._holds.expire(self.leases.expire_instance(instance.instance_id))

    def hang_up(self, instance: Peer) -> None:
        """The process is gone: all that it held is free."""
        instance.notify(HungUp())
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
        return self._registry.attached(instance, namespace_id)

    # ---------------------------------------------------- lookup, get, release

    def lookup(self, instance: Peer, namespace_id: int, packed: bytes) -> Looked:
        """How many leading blocks are held. No side effect."""
        return self._reading.lookup(self.namespace(instance, namespace_id), packed)

    async def get(
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
        accepts_shifts: bool = False,
    ) -> Granted:
        """Lease the longest held prefix of at most `max_blocks` blocks (0: all).

        What is on NVMe only is being read when this returns. Blocks of a truncated session are handed
        out to a caller that names it and rotates keys.
        """
        self._refuse_while_draining()
        return await self._reading.get(
            instance,
            lambda: self.namespace(instance, namespace_id),
            packed,
            session_id=session_id,
            request_id=request_id,
            duration_s=duration_s,
            max_blocks=max_blocks,
            attempt_id=attempt_id,
            accepts_shifts=accepts_shifts,
        )

    def truncate(
        self,
        instance: Peer,
        namespace_id: int,
        packed_source: bytes,
        keep: KeepRanges | DropOldest,
        packed: bytes,
        *,
        session_id: str,
    ) -> Truncated:
        """Name the kept blocks of a session's chain a second time, as far as these are held; no copy.

        Args:
            packed_source: the chain; empty: what the session used last.
            packed: one new hash per kept block; empty: only say what would stay.

        Raises:
            InvalidRequest: no session, bad ranges, hashes that do not match the plan or are not salted.
        """
        self._refuse_while_draining()
        namespace = self.namespace(instance, namespace_id)
        return self._truncating.truncate(instance, namespace, packed_source, keep, packed, session_id=session_id)

    def prefetch(self, instance: Peer, namespace_id: int, packed: bytes, request_id: str = "") -> Prefetched:
        """Start reading what is on NVMe only; nobody waits. Release of the request cancels what has not begun."""
        self._refuse_while_draining()
        return self._reading.prefetch(instance, self.namespace(instance, namespace_id), packed, request_id=request_id)

    def renew(
        self, instance: Peer, lease_ids: Sequence[int], reservation_ids: Sequence[int], duration_s: float
    ) -> Renewed:
        """Extend holds; all or none.

        Raises:
            LeaseUnknown, LeaseExpired, ReservationLost.
        """
        return Renewed(self._holds.renew(instance, lease_ids, reservation_ids, duration_s))

    def release(
        self, instance: Peer, lease_ids: Sequence[int], request_id: str = "", attempt_ids: Sequence[int] = ()
    ) -> Ended:
        """End leases, all holds of a request, and what attempts were granted; all or none.

        Raises:
            LeaseUnknown: a lease id is not this instance's. InvalidRequest: one is named twice.
        """
        released = self._holds.release(instance, lease_ids, request_id, attempt_ids)
        if request_id:
            self._reading.give_up(instance, request_id)
        return released

    def plan_load(self, instance: Peer, namespace_id: int, packed: bytes, engine: Speeds) -> PlannedLoad:
        """How many leading blocks to load rather than to recompute. No side effect."""
        return self._reading.plan_load(self.namespace(instance, namespace_id), packed, engine)

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
        return await self._writing.put(
            instance,
            lambda: self.namespace(instance, namespace_id),
            parent,
            packed,
            session_id=session_id,
            request_id=request_id,
            duration_s=duration_s,
            attempt_id=attempt_id,
        )

    def commit(
        self, instance: Peer, reservation_id: int, positions: Sequence[int]
    ) -> list[tuple[int, Committed | DropReason]]:
        """Publish written blocks; the outcomes as runs, in chain order.

        Args:
            positions: places among the slots that the Put reserved; empty: all still reserved.

        Raises:
            LeaseUnknown, ReservationLost, InvalidRequest.
        """
        return self._writing.commit(instance, reservation_id, positions)

    def abort(self, instance: Peer, reservation_id: int) -> bool:
        """Give a reservation back; whether it had expired. Raises LeaseUnknown."""
        hold = self._holds.find(instance, HoldKind.WRITE, [reservation_id])[0]
        self._holds.end(hold)
        return hold.expired

    # ---------------------------------------------------------------- the rest

    def forget_session(self, instance: Peer, namespace_id: int, session_id: str) -> Forgotten:
        """Drop the blocks that only this session needs: not those before another's end."""
        namespace = self.namespace(instance, namespace_id)
        # Of a session that the books do not know (any more), too: a disk may remember it after a restart.
        self.journal.forgotten(namespace, session_key(session_id))
        return Forgotten(*namespace.forget_session(session_id, self.clock()))

    def forget_namespace(self, instance: Peer, namespace_id: int) -> Forgotten:
        """Drop every block of the namespace; what is leased is unreachable now, freed at release."""
        return Forgotten(*self.namespace(instance, namespace_id).forget_all(self.clock()))

    async def upkeep(self) -> None:
        """One round of what nobody asks for: expiries, memory ahead of need, watermarks."""
        self._holds.expire(self.leases.expire(self.clock()))
        attached = {id(namespace) for instance in self.instances for namespace in instance.namespaces}
        for namespace in list(self.namespaces.values()):
            expire_slice(namespace, self.clock())
            self.disk_space.keep_up(namespace)
            await self._space.keep_up(namespace, may_grow=id(namespace) in attached and not self.is_draining)

    def tiers(self) -> list[tuple[Tier, TierUsage]]:
        """Occupancy of each tier that there is."""
        nvme = [(self.disks.tier, self.disks.usage())] if self.disks else []
        return [(self.arena.tier, self.arena.usage()), *nvme]

    def drain(self) -> None:
        """Take no new work and tell the instances. Holds end as their requests do."""
        self.is_draining = True
        self.instances.tell(DrainNotice(self.config.drain_s))

    @property
    def is_idle(self) -> bool:
        """Whether nobody reads or writes: no live holds, no copies to or from GPUs."""
        return all(hold.expired for hold in self.leases) and not self.device_copies.plane.copies_in_flight

    def close(self) -> None:
        """Give all memory back. Blocks until threads are done."""
        self.device_copies.plane.close()
        self.checksummer.close()
        self._space.close()

    def check(self) -> None:
        """Assert every invariant that spans rooms. For tests; O(n)."""
        self.waiting.check()
        invariants.check(self.namespaces, self.leases, self._space, self.instances)

    # ---------------------------------------------------------------- privately

    async def _until_settled(self, namespace: Namespace, timeout_s: float) -> bool:
        if self.checksummer.is_holding(namespace):
            return await self.checksummer.wait_for_batch(timeout_s)
        return bool(namespace.index.dirty.any()) and await self.write_behind.wait_for_progress(timeout_s)

    def _refuse_while_draining(self) -> None:
        if self.is_draining:
            raise Draining("the daemon is shutting down", retry_after_s=self.config.drain_s)
