"""What every RPC goes through: authentication, timing, and the one table of errors.

The table is the only place where domain errors and gRPC codes meet. Anything that is not in it
is a bug in the daemon: the caller gets an opaque text and an id, the log gets the traceback
(grpc.aio would send the exception's text to the client).
"""

from __future__ import annotations

import inspect
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

import grpc

from kvservice import errors
from kvservice.logs import event_log
from kvservice.metrics import Calls
from kvservice_proto.v1 import kvservice_pb2 as pb

CALLS_MAX = 4096
"""Calls under way at a time that are taken, over gRPC and over call connections."""
ERROR_KEY = "kvservice-error-bin"
TOKEN_KEY = "kvservice-token-bin"

GrpcContext = grpc.aio.ServicerContext[Any, Any]
Metadata = Iterable[tuple[str, str | bytes]]


class Context(Protocol):
    """What a unary call asks of whatever it came over: a part of gRPC's context."""

    def invocation_metadata(self) -> Metadata | None: ...

    async def abort(self, code: grpc.StatusCode, details: str = ..., trailing_metadata: Any = ...) -> NoReturn: ...


Request = TypeVar("Request")
Response = TypeVar("Response")
ContextT = TypeVar("ContextT", bound=Context)

_log = event_log(__name__)

# Most derived first: the first row whose class matches wins.
_TABLE: tuple[tuple[type[errors.KVServiceError], grpc.StatusCode, pb.ErrorReason], ...] = (
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT, pb.ERROR_REASON_INVALID_REQUEST),
    (errors.NamespaceUnknown, grpc.StatusCode.FAILED_PRECONDITION, pb.ERROR_REASON_NAMESPACE_UNKNOWN),
    (errors.LayoutMismatch, grpc.StatusCode.FAILED_PRECONDITION, pb.ERROR_REASON_LAYOUT_MISMATCH),
    (errors.LeaseUnknown, grpc.StatusCode.NOT_FOUND, pb.ERROR_REASON_LEASE_UNKNOWN),
    (errors.LeaseExpired, grpc.StatusCode.ABORTED, pb.ERROR_REASON_LEASE_EXPIRED),
    (errors.ReservationLost, grpc.StatusCode.ABORTED, pb.ERROR_REASON_RESERVATION_LOST),
    (errors.QuotaExceeded, grpc.StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_QUOTA_EXCEEDED),
    (errors.CapacityExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED, pb.ERROR_REASON_CAPACITY_EXHAUSTED),
    (errors.Draining, grpc.StatusCode.UNAVAILABLE, pb.ERROR_REASON_DRAINING),
    (errors.Overloaded, grpc.StatusCode.UNAVAILABLE, pb.ERROR_REASON_OVERLOADED),
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED, pb.ERROR_REASON_UNAUTHENTICATED),
    (errors.PermissionDenied, grpc.StatusCode.PERMISSION_DENIED, pb.ERROR_REASON_PERMISSION_DENIED),
)


def error_detail(error: BaseException, *, where: str) -> tuple[grpc.StatusCode, pb.ErrorDetail]:
    """The status and the detail to send for an exception; logs what is not in the table."""
    for kind, code, reason in _TABLE:
        if isinstance(error, kind):
            detail = pb.ErrorDetail(reason=reason, message=str(error))
            if isinstance(error, errors.InvalidRequest):
                detail.field = error.field
            if isinstance(error, errors.Overloaded):
                detail.retry_after_ms = int(error.retry_after_s * 1000)
            return code, detail
    error_id = secrets.token_hex(8)
    _log.exception("internal_error", error, where=where, error_id=error_id)
    message = f"internal error {error_id}; the daemon's log has the details"
    return grpc.StatusCode.INTERNAL, pb.ErrorDetail(reason=pb.ERROR_REASON_INTERNAL, message=message, error_id=error_id)


async def abort(context: Context, code: grpc.StatusCode, detail: pb.ErrorDetail) -> NoReturn:
    """End the call with that status; the detail travels in the trailing metadata."""
    await context.abort(code, detail.message, trailing_metadata=((ERROR_KEY, detail.SerializeToString()),))
    raise AssertionError("context.abort returns never")


@dataclass(frozen=True, slots=True)
class Malformed:
    """Takes the place of a request that could not be parsed."""

    why: str


def well_formed(request: Request | Malformed) -> Request:
    """The request.

    Raises:
        InvalidRequest: what came was no message of its type.
    """
    if isinstance(request, Malformed):
        raise errors.InvalidRequest(f"the request is not a message of its type: {request.why}", field="message")
    return request


def token_of(context: Context) -> bytes:
    """The token that the call carries.

    Raises:
        Unauthenticated: none.
    """
    for key, value in context.invocation_metadata() or ():
        if key == TOKEN_KEY:
            return bytes(value) if isinstance(value, bytes) else value.encode()
    raise errors.Unauthenticated(f"no token in the metadata key {TOKEN_KEY}: connect to the memory socket first")


@dataclass(frozen=True, slots=True)
class UnaryMethod:
    """The handler of one unary RPC, whatever it comes over: with a request, or `Malformed`, and a context."""

    handle: Callable[[Any, Any], Coroutine[Any, Any, Any]]
    waits: bool
    """Whether it may have to wait; one that never has ends in its first step."""


def unary(
    calls: Calls, method: str, answer: Callable[[Request, ContextT], Response | Awaitable[Response]]
) -> UnaryMethod:
    """Wrap the handler of a unary RPC, a function or a coroutine function, with timing and the table of errors."""
    waits = inspect.iscoroutinefunction(answer)

    async def handle(request: Request | Malformed, context: ContextT) -> Response:
        started_s = time.perf_counter()
        try:
            answered: Any = answer(well_formed(request), context)
            response: Response = await answered if waits else answered
        except Exception as error:  # noqa: BLE001  # the one boundary where everything must become a status
            code, detail = error_detail(error, where=method)
            calls.observe(time.perf_counter() - started_s, code.name)
            return await abort(context, code, detail)
        calls.observe(time.perf_counter() - started_s, "OK")
        return response

    return UnaryMethod(handle, waits)
