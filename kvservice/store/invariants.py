"""What must hold between the store's rooms, asserted by tests after every step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvservice.blocks import NO_ROW, NO_SLOT, NamespaceKey
from kvservice.index import State
from kvservice.instances import Instances
from kvservice.leases import Leases
from kvservice.store.namespace import Namespace
from kvservice.store.space import Space


def check_namespace(namespace: Namespace) -> None:
    """Raise AssertionError naming which of one namespace's books disagree. O(n)."""
    index, pool = namespace.index, namespace.pool
    index.check()
    pool.check()
    namespace.sessions.check()
    aliases = np.flatnonzero(index.source != NO_ROW)
    namespace.aliases.check(aliases.tolist(), index.source[aliases].tolist())
    unnamed = np.flatnonzero(index.state == State.UNNAMED).tolist()
    assert all(map(namespace.aliases.of_source, unnamed)), "bytes that nothing names"
    present = np.flatnonzero(index.state != State.ABSENT)
    present = present[index.slot[present] != NO_SLOT]
    slots = index.slot[present]
    assert (pool.row_of[slots] == present).all(), "a row's slot belongs to another row"
    owned = np.flatnonzero(pool.row_of != NO_ROW)
    assert len(owned) == len(present), "a slot belongs to a row that is absent or not in DRAM"
    reserved = index.state[present] == State.RESERVED
    assert (pool.holders[slots[reserved]] > 0).all(), "a reserved block without its writer"


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
        check_namespace(namespace)
        # While bytes move: a checksum, a write to NVMe and a read from there hold a slot each.
        extra = namespace.pool.holders - holders[key]
        assert ((extra >= 0) & (extra <= 3)).all(), f"{namespace.spec.label}: holders without a lease"
    used_bytes = sum(namespace.pool.size_bytes for namespace in namespaces.values())
    used_bytes += space.in_flight_bytes
    assert used_bytes == space.arena.used_bytes, "the arena's bytes are not those of the segments"
    connected = {instance.instance_id for instance in instances}
    assert all(hold.instance_id in connected for hold in leases), "a hold outlives its process"
