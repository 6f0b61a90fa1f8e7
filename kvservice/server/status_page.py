"""What the status page shows, read from the store on the event loop."""

from __future__ import annotations

from kvservice import __version__
from kvservice.leases import HoldKind
from kvservice.service.block_requests import BlockRequests
from kvservice.status import InstanceLine, NamespaceLine, Status, TierLine
from kvservice.status.board import INSTANCES_MAX, NAMESPACES_MAX
from kvservice.store import Store


def gather(store: Store, requests: BlockRequests, *, state: str) -> Status:
    """The status now. Of namespaces and instances, those with the most traffic and the newest."""
    attached = [instance for instance in store.instances if instance.is_attached]
    namespaces = sorted(store.namespaces.values(), key=lambda namespace: -namespace.counters.requested)
    now_s = store.clock()
    return Status(
        at_s=now_s,
        state=state,
        version=__version__,
        uptime_s=now_s - requests.started_at_s,
        tiers=[
            TierLine(tier.value, usage.state, usage.capacity_bytes, usage.used_bytes) for tier, usage in store.tiers()
        ],
        instances=[
            InstanceLine(
                instance.instance_id,
                instance.name,
                now_s - instance.connected_at_s,
                store.leases.count(HoldKind.READ, instance_id=instance.instance_id),
                store.leases.count(HoldKind.WRITE, instance_id=instance.instance_id),
            )
            for instance in attached[: -INSTANCES_MAX - 1 : -1]
        ],
        instances_attached=len(attached),
        namespaces=[
            NamespaceLine(
                namespace.spec.label,
                len(namespace.index),
                namespace.pool.size_bytes,
                namespace.counters.requested,
                namespace.counters.dram_hits + namespace.counters.nvme_hits,
            )
            for namespace in namespaces[:NAMESPACES_MAX]
        ],
        namespaces_known=len(namespaces),
        counts=requests.counts(),
        misses=tuple(reversed(requests.recent)),
    )
