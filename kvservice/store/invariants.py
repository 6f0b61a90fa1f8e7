"""What must hold between the store's rooms, asserted by tests after every step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvservice.blocks import NamespaceKey
from kvservice.instances import Instances
from kvservice.leases import Leases
from kvservice.store.namespace import Namespace
from kvservice.store.space import Space


def check(
    namespaces: Mapping[NamespaceKey, Namespace], leases: Leases, space: Space, instances: Instances[Namespace]
) -> None:
    """Raise AssertionError naming what is broken. O(n)."""
    holders: dict[NamespaceKey, np.ndarray] = {
        key: np.zeros(len(namespace.pool.holders), dtype=np.int32) for key, namespace in namespaces.items()
    }
    for hold in leases:
        holders[hold.namespace][hold.slots] += 1
    for key, namespace in namespaces.items():
        namespace.check()
        # While bytes move: a checksum, a write to NVMe and a read from there hold a slot each.
        extra = namespace.pool.holders - holders[key]
        assert ((extra >= 0) & (extra <= 3)).all(), f"{namespace.spec.label}: holders without a lease"
    used_bytes = sum(namespace.pool.size_bytes for namespace in namespaces.values())
    used_bytes += space.in_flight_bytes
    assert used_bytes == space.arena.used_bytes, "the arena's bytes are not those of the segments"
    connected = {instance.instance_id for instance in instances}
    assert all(hold.instance_id in connected for hold in leases), "a hold outlives its process"
