"""The errors of the contract, as the client raises them. Mirrors the daemon's one table.

The lower-level calls raise them; the facade (lookup, load, save, prefetch) turns all but
InvalidRequest into named outcomes, because for an engine a service failure is a miss.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import grpc

from kvservice_proto.v1 import kvservice_pb2 as pb

ERROR_KEY = "kvservice-error-bin"


class KVServiceError(Exception):
    """Base of everything that this library raises about the service.

    Attributes:
        retry_after_s: when another try makes sense; 0.0 where the daemon did not say.
        error_id: of an InternalError, to be found in the daemon's log.
    """

    def __init__(self, message: str, *, retry_after_s: float = 0.0, error_id: str = "") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.error_id = error_id


class InvalidRequest(KVServiceError):
    """Fix the call; the message names the field and the bound."""


class NamespaceUnknown(KVServiceError):
    """The attachment has ended (the daemon restarted, say). The client attaches again by itself."""


class LayoutMismatch(KVServiceError):
    """This fingerprint is held with other sizes: the engine is incompatible with what is stored."""


class LeaseUnknown(KVServiceError):
    """Never granted to this process, or ended before."""


class LeaseExpired(KVServiceError):
    """Start again at lookup."""


class ReservationLost(KVServiceError):
    """Expired before it was committed: save again, or skip."""


class CapacityExhausted(KVServiceError):
    """No space can be made: skip the save."""


class QuotaExceeded(CapacityExhausted):
    """The namespace's quota is in use: skip the save."""


class Overloaded(KVServiceError):
    """Back off, treat as a miss."""


class Draining(Overloaded):
    """The daemon is shutting down: treat as a miss."""


class Unauthenticated(KVServiceError):
    """The token ended. The client connects again by itself."""


class PermissionDenied(KVServiceError):
    """This process may not do that; see allowed_uids in the daemon's configuration."""


class InternalError(KVServiceError):
    """A bug in the daemon: report it with the error id."""


class DaemonUnreachable(KVServiceError):
    """No daemon answers; the message says what was tried and what to do."""


class ForkedClient(DaemonUnreachable):
    """This client belongs to the parent process: attach again in the child."""


class DeadlineExceeded(DaemonUnreachable):
    """The daemon did not answer in time."""


_BY_REASON: dict[int, type[KVServiceError]] = {
    pb.ERROR_REASON_INVALID_REQUEST: InvalidRequest,
    pb.ERROR_REASON_NAMESPACE_UNKNOWN: NamespaceUnknown,
    pb.ERROR_REASON_LAYOUT_MISMATCH: LayoutMismatch,
    pb.ERROR_REASON_LEASE_UNKNOWN: LeaseUnknown,
    pb.ERROR_REASON_LEASE_EXPIRED: LeaseExpired,
    pb.ERROR_REASON_RESERVATION_LOST: ReservationLost,
    pb.ERROR_REASON_CAPACITY_EXHAUSTED: CapacityExhausted,
    pb.ERROR_REASON_QUOTA_EXCEEDED: QuotaExceeded,
    pb.ERROR_REASON_OVERLOADED: Overloaded,
    pb.ERROR_REASON_DRAINING: Draining,
    pb.ERROR_REASON_UNAUTHENTICATED: Unauthenticated,
    pb.ERROR_REASON_PERMISSION_DENIED: PermissionDenied,
    pb.ERROR_REASON_INTERNAL: InternalError,
    pb.ERROR_REASON_DEADLINE_EXCEEDED: DeadlineExceeded,
}


def from_detail(detail: pb.ErrorDetail) -> KVServiceError:
    """The exception that a detail stands for; InternalError for a reason newer than this library."""
    kind = _BY_REASON.get(detail.reason, InternalError)
    return kind(detail.message, retry_after_s=detail.retry_after_ms / 1000, error_id=detail.error_id)


def deadline_exceeded() -> DeadlineExceeded:
    """The exception for a call that was not answered in time."""
    return DeadlineExceeded("the daemon did not answer within the deadline")


def from_rpc(error: grpc.RpcError) -> KVServiceError:
    """The exception for a failed call: by our own detail where there is one, else by its status."""
    trailing = cast(Iterable[tuple[str, Any]], error.trailing_metadata() or ())
    for key, value in trailing:
        if key == ERROR_KEY:
            return from_detail(pb.ErrorDetail.FromString(value))
    code = error.code()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return deadline_exceeded()
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequest(str(error.details()))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # gRPC's own: a message above the daemon's limit, or too many calls at once.
        return Overloaded(str(error.details()))
    return DaemonUnreachable(f"the daemon does not answer ({code.name}: {error.details()})")
