"""Stats and Explain: the state of the daemon, and of the caller's tenant, as messages."""

from __future__ import annotations

from kvservice import __version__
from kvservice.blocks import DropReason, Tenant, Tier
from kvservice.leases import HoldKind
from kvservice.service.messages import TIERS, explain_response
from kvservice.store import Namespace, Peer, Store, explain
from kvservice.tiers import DiskUsage
from kvservice_proto.v1 import kvservice_pb2 as pb

_EVICTIONS = (DropReason.CAPACITY, DropReason.QUOTA, DropReason.RECLAIMED)


def stats(store: Store, tenant: Tenant, *, epoch: str, started_at_s: float, state: str) -> pb.StatsResponse:
    """Totals of the daemon; namespaces and instances of the tenant only."""
    leases = store.leases
    return pb.StatsResponse(
        daemon_version=__version__,
        daemon_epoch=epoch,
        uptime_s=store.clock() - started_at_s,
        state=state,
        planes=store.device_copies.planes,
        instances=store.instances.attached,
        leases=leases.count(HoldKind.READ),
        reservations=leases.count(HoldKind.WRITE),
        quarantined_slots=leases.quarantined_slots(),
        tiers=[
            pb.TierStats(
                tier=TIERS[tier],
                state=usage.state,
                capacity_bytes=usage.capacity_bytes,
                used_bytes=usage.used_bytes,
                disks=[_disk_stats(disk.usage()) for disk in store.disks.disks] if tier is Tier.NVME else [],
            )
            for tier, usage in store.tiers()
        ],
        namespaces=[
            _namespace_stats(store, namespace)
            for namespace in store.namespaces.values()
            if namespace.spec.key.tenant == tenant
        ],
        attached_instances=[
            _instance_stats(store, instance)
            for instance in store.instances
            if instance.is_attached and instance.tenant == tenant
        ],
        devices=[
            pb.DeviceStats(
                name=usage.name,
                uuid=usage.uuid,
                state=usage.state,
                registrations=usage.registrations,
                registered_bytes=usage.registered_bytes,
            )
            for usage in store.device_copies.plane.usage()
        ],
    )


def _disk_stats(disk: DiskUsage) -> pb.DiskStats:
    return pb.DiskStats(
        directory=disk.directory,
        state=disk.state,
        why=disk.why,
        capacity_bytes=disk.capacity_bytes,
        used_bytes=disk.used_bytes,
        device_bytes=disk.device_bytes,
        read_bytes=disk.read_bytes,
        read_s=disk.read_s,
        admitted_bytes=disk.admitted_bytes,
        write_s=disk.write_s,
        written_bytes=disk.written_bytes,
        write_amplification=disk.write_amplification,
        checksum_failures=disk.checksum_failures,
        writes_per_day=disk.writes_per_day,
        writes_per_day_lately=disk.writes_per_day_lately,
        transfers=[
            pb.TransferDepth(priority=priority, waiting=depth.waiting, running=depth.running)
            for priority, depth in disk.depths.items()
        ],
    )


def explanation(store: Store, tenant: Tenant, request: pb.ExplainRequest) -> pb.ExplainResponse:
    """What became of one block in the tenant's namespaces. Raises InvalidRequest."""
    found = explain(
        store.namespaces.values(),
        tenant,
        request.hash,
        request.fingerprint,
        store.clock(),
        why_unreadable=store.disks.why_unreadable,
    )
    return explain_response(found)


def _namespace_stats(store: Store, namespace: Namespace) -> pb.NamespaceStats:
    spec, counters = namespace.spec, namespace.counters
    return pb.NamespaceStats(
        label=spec.label,
        fingerprint=spec.key.fingerprint,
        tenant=spec.key.tenant,
        block_size_bytes=spec.block_size_bytes,
        tokens_per_block=spec.tokens_per_block,
        dram_bytes=namespace.pool.size_bytes,
        quota_bytes=namespace.rule.dram_quota_bytes,
        blocks=len(namespace.index),
        slots_free=namespace.pool.free_slots,
        sessions=len(namespace.sessions),
        requested_blocks=counters.requested,
        dram_hit_blocks=counters.dram_hits,
        nvme_hit_blocks=counters.nvme_hits,
        miss_blocks=counters.misses,
        committed_blocks=counters.committed,
        evicted_blocks=sum(counters.dropped.get(reason, 0) for reason in _EVICTIONS),
        policy=namespace.policy.name,
        nvme_bytes=store.disk_space.held_bytes(namespace),
        nvme_quota_bytes=namespace.rule.nvme_quota_bytes,
        ttl_s=namespace.rule.ttl_s,
        expired_blocks=counters.dropped.get(DropReason.EXPIRED, 0),
        aliases=len(namespace.aliases),
        shifted_hit_blocks=counters.shifted_hits,
        queue=_queue_stats(store, namespace),
    )


def _queue_stats(store: Store, namespace: Namespace) -> pb.QueueStats | None:
    ahead = store.waiting.ahead.get(namespace)
    if ahead is None:
        return None
    return pb.QueueStats(
        requests=store.waiting.length_of(namespace),
        prefetch_window_requests=min(ahead.windows.prefetch, len(ahead.waiting)),
        eviction_window_requests=min(ahead.windows.eviction, len(ahead.waiting)),
        needed_blocks=ahead.needed_blocks,
        dram_blocks=ahead.dram_blocks,
    )


def _instance_stats(store: Store, instance: Peer) -> pb.InstanceStats:
    instance_id, leases = instance.instance_id, store.leases
    return pb.InstanceStats(
        instance_id=instance_id,
        name=instance.name,
        tenant=instance.tenant,
        process_id=instance.identity.process_id,
        attached_s=store.clock() - instance.connected_at_s,
        leases=leases.count(HoldKind.READ, instance_id=instance_id),
        reservations=leases.count(HoldKind.WRITE, instance_id=instance_id),
        quarantined_slots=leases.quarantined_slots(instance_id=instance_id),
        queued_requests=store.waiting.length(instance),
        plane=store.device_copies.plane_of(instance),
    )
