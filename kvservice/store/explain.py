"""Why a hash is a hit or a miss, from the tenant's own namespaces only."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from kvservice.blocks import NO_EXTENT, NO_ROW, NO_SLOT, BlockHash, Tenant, Tier
from kvservice.errors import InvalidRequest
from kvservice.index import State
from kvservice.store.namespace import Namespace
from kvservice.store.outcomes import (
    BeingStored,
    Dropped,
    Elsewhere,
    Explanation,
    Finding,
    Held,
    NotRemembered,
    Offline,
)

HASH_SIZE_BYTES_MIN, HASH_SIZE_BYTES_MAX = 8, 64


def explain(
    namespaces: Iterable[Namespace],
    tenant: Tenant,
    block_hash: bytes,
    fingerprint: bytes,
    now_s: float,
    *,
    why_unreadable: Callable[[int], str] = lambda extent: "",
) -> list[Explanation]:
    """One explanation for each namespace that knows the hash, or a single one if none does.

    Args:
        fingerprint: ask about this namespace only; empty: all of the tenant's.
        why_unreadable: what keeps an extent from being read; empty: nothing.

    Raises:
        InvalidRequest: the hash has no possible length.
    """
    if not HASH_SIZE_BYTES_MIN <= len(block_hash) <= HASH_SIZE_BYTES_MAX:
        raise InvalidRequest(
            f"a hash has {HASH_SIZE_BYTES_MIN} to {HASH_SIZE_BYTES_MAX} bytes, not {len(block_hash)}", field="hash"
        )
    mine = [namespace for namespace in namespaces if namespace.spec.key.tenant == tenant]
    asked = [namespace for namespace in mine if not fingerprint or namespace.spec.key.fingerprint == fingerprint]
    found = [
        Explanation(namespace.spec, finding)
        for namespace in asked
        if not isinstance(finding := _finding(namespace, BlockHash(block_hash), now_s, why_unreadable), NotRemembered)
    ]
    if found:
        return found
    elsewhere = tuple(
        namespace.spec.label
        for namespace in mine
        if namespace not in asked and namespace.index.row_of(BlockHash(block_hash)) != NO_ROW
    )
    spec = asked[0].spec if len(asked) == 1 else None
    if elsewhere:
        return [Explanation(spec, Elsewhere(elsewhere))]
    remembered = sum(namespace.history.blocks_max for namespace in asked)
    horizon_s = min((namespace.history.horizon_s(now_s) for namespace in asked), default=0.0)
    return [Explanation(spec, NotRemembered(remembered, horizon_s))]


def _finding(
    namespace: Namespace, block_hash: BlockHash, now_s: float, why_unreadable: Callable[[int], str]
) -> Finding:
    index = namespace.index
    row = index.row_of(block_hash)
    if row != NO_ROW and index.state[row] == State.RESIDENT:
        of_bytes = int(index.bytes_rows(np.array([row]))[0])
        slot = NO_SLOT if index.arriving[of_bytes] else int(index.slot[of_bytes])
        if slot == NO_SLOT and (why := why_unreadable(int(index.extent[of_bytes]))):
            return Offline(Tier.NVME, why)
        # Written, flushed and recorded.
        is_durable = bool(index.extent[of_bytes] != NO_EXTENT and not index.dirty[of_bytes])
        tiers = (Tier.DRAM,) * (slot != NO_SLOT) + (Tier.NVME,) * is_durable
        return Held(
            tiers=tiers,
            depth=int(index.depth[row]),
            children=sum(1 for _ in index.children(row)),
            idle_s=max(0.0, now_s - float(index.last_used_s[row])),
            uses=int(index.uses[row]),
            holders=0 if slot == NO_SLOT else int(namespace.pool.holders[slot]),
            is_checksummed=bool(index.checksummed[of_bytes]),
        )
    if row != NO_ROW:
        age_s = max(0.0, now_s - float(index.last_used_s[row]))
        return BeingStored(age_s=age_s, is_written=bool(index.state[row] == State.WRITTEN))
    departure = namespace.history.find(block_hash)
    if departure is not None:
        return Dropped(departure.reason, now_s - departure.at_s, departure.idle_s)
    return NotRemembered(namespace.history.blocks_max, namespace.history.horizon_s(now_s))
