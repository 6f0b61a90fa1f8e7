"""explaining: what the store answers when it is asked why."""

from __future__ import annotations

from kvservice.blocks import Tenant
from kvservice.store import explain
from kvservice.store.outcomes import Explanation, Finding
from tests.stores import Workplace


def explanations(
    workplace: Workplace, block_hash: bytes, *, tenant: str = "uid:1", fingerprint: bytes = b""
) -> list[Explanation]:
    """Everything that a tenant is told about a hash."""
    store = workplace.store
    return explain(store.namespaces.values(), Tenant(tenant), block_hash, fingerprint, store.clock())


def finding(workplace: Workplace, block_hash: bytes, *, tenant: str = "uid:1", fingerprint: bytes = b"") -> Finding:
    """The only thing that a tenant is told about a hash."""
    (explanation,) = explanations(workplace, block_hash, tenant=tenant, fingerprint=fingerprint)
    return explanation.finding
