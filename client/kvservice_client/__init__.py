"""kvservice_client: what an engine imports to keep its KV blocks in the node's kvservice daemon.

    import kvservice_client as kv
    client = kv.attach(kv.Namespace(fingerprint, "llama-3-8b bf16", block_size_bytes, tokens_per_block=16))
    loaded = client.load(hashes, buffer)    # leading blocks copied and verified; the rest: recompute
    client.save(hashes, buffer)             # readable by every engine of the namespace

Needs grpcio and protobuf only. Thread-safe; a forked child gets misses and attaches for itself.
"""

from kvservice_client.admin import Admin, admin
from kvservice_client.client import Client, attach
from kvservice_client.errors import (
    CapacityExhausted,
    DaemonUnreachable,
    DeadlineExceeded,
    Draining,
    ForkedClient,
    InternalError,
    InvalidRequest,
    KVServiceError,
    LayoutMismatch,
    LeaseExpired,
    LeaseUnknown,
    NamespaceUnknown,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    ReservationLost,
    Unauthenticated,
)
from kvservice_client.holds import BlockView, Lease, Reservation
from kvservice_client.memory import Memory
from kvservice_client.namespace import Namespace, default_socket_dir
from kvservice_client.outcomes import (
    Committed,
    ForgetResult,
    KeptBlocks,
    LoadPlan,
    LoadResult,
    LookupResult,
    PrefetchResult,
    Reason,
    Resumption,
    SaveResult,
    ShiftedBlocks,
    Status,
    TruncateResult,
)
from kvservice_client.waiting import WaitingRequest

__all__ = [
    "Admin",
    "BlockView",
    "CapacityExhausted",
    "Client",
    "Committed",
    "DaemonUnreachable",
    "DeadlineExceeded",
    "Draining",
    "ForgetResult",
    "ForkedClient",
    "InternalError",
    "InvalidRequest",
    "KVServiceError",
    "KeptBlocks",
    "LayoutMismatch",
    "Lease",
    "LeaseExpired",
    "LeaseUnknown",
    "LoadPlan",
    "LoadResult",
    "LookupResult",
    "Memory",
    "Namespace",
    "NamespaceUnknown",
    "Overloaded",
    "PermissionDenied",
    "PrefetchResult",
    "QuotaExceeded",
    "Reason",
    "Reservation",
    "ReservationLost",
    "Resumption",
    "SaveResult",
    "ShiftedBlocks",
    "Status",
    "TruncateResult",
    "Unauthenticated",
    "WaitingRequest",
    "admin",
    "attach",
    "default_socket_dir",
]
