"""The one table of errors is complete, agrees with the client's, and tells nobody what an unexpected exception said."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterator
from typing import Any, NoReturn

import grpc
import pytest

import kvservice_client.errors as client_errors
from kvservice import errors
from kvservice.metrics import Metrics
from kvservice.service.calls import ERROR_KEY, TOKEN_KEY, abort, error_detail, token_of, unary
from kvservice.service.control import PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MIN, agreed_version
from kvservice_client import outcomes as client_outcomes
from kvservice_proto.v1 import kvservice_pb2 as pb

pytestmark = pytest.mark.unit

CODES = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NamespaceUnknown: grpc.StatusCode.FAILED_PRECONDITION,
    errors.LayoutMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.LeaseUnknown: grpc.StatusCode.NOT_FOUND,
    errors.LeaseExpired: grpc.StatusCode.ABORTED,
    errors.ReservationLost: grpc.StatusCode.ABORTED,
    errors.CapacityExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Overloaded: grpc.StatusCode.UNAVAILABLE,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
}
SECRET = "/home/someone/.ssh/id_ed25519"


def derived(kind: type[Exception]) -> Iterator[type[Exception]]:
    for below in kind.__subclasses__():
        yield below
        yield from derived(below)


class Aborted(Exception):
    """As grpc.aio ends a handler after context.abort."""


class CallContext:
    """The part of grpc.aio's context that handlers use; keeps what they sent."""

    def __init__(self, metadata: tuple[tuple[str, str | bytes], ...] = ()) -> None:
        self._metadata = metadata
        self.code: grpc.StatusCode | None = None
        self.text = ""
        self.detail = pb.ErrorDetail()

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._metadata

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> NoReturn:
        self.code, self.text = code, details
        ((key, value),) = trailing_metadata
        assert key == ERROR_KEY
        self.detail = pb.ErrorDetail.FromString(value)
        raise Aborted


# ------------------------------------------------------------------------- the table


def test_every_error_has_a_row_of_the_table() -> None:
    assert set(derived(errors.KVServiceError)) == set(CODES)


@pytest.mark.parametrize("kind", CODES)
def test_each_error_has_its_status_and_its_reason(kind: type[errors.KVServiceError]) -> None:
    code, detail = error_detail(kind("what went wrong"), where="Test")
    assert code is CODES[kind]
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).upper()
    assert pb.ErrorReason.Name(detail.reason) == f"ERROR_REASON_{snake}"
    assert detail.message == "what went wrong"
    assert detail.error_id == ""


@pytest.mark.parametrize("kind", CODES)
def test_the_client_raises_the_error_of_the_same_name(kind: type[errors.KVServiceError]) -> None:
    _, detail = error_detail(kind("what went wrong"), where="Test")
    raised = client_errors.from_detail(detail)
    assert type(raised).__name__ == kind.__name__
    assert str(raised) == "what went wrong"
    assert isinstance(raised, client_errors.KVServiceError)
    # For an engine's facade each of them is one of the named reasons.
    assert isinstance(client_outcomes.reason_of(raised), client_outcomes.Reason)


def test_the_client_knows_every_reason_of_the_contract() -> None:
    for name in list(pb.ErrorReason.keys()):
        raised = client_errors.from_detail(pb.ErrorDetail(reason=name))
        internal = name in ("ERROR_REASON_UNSPECIFIED", "ERROR_REASON_INTERNAL")
        assert isinstance(raised, client_errors.InternalError) is internal


def test_kinds_of_errors_are_kinds_of_each_other_on_both_sides() -> None:
    for kind in CODES:
        of_client: type[Exception] = getattr(client_errors, kind.__name__)
        above = [base.__name__ for base in kind.__mro__ if base in CODES]
        assert [base.__name__ for base in of_client.__mro__ if base.__name__ in {at.__name__ for at in CODES}] == above


def test_an_invalid_request_names_its_field() -> None:
    _, detail = error_detail(errors.InvalidRequest("too many", field="hashes"), where="Test")
    assert detail.field == "hashes"


@pytest.mark.parametrize("kind", [errors.Overloaded, errors.Draining])
def test_what_is_over_soon_says_when(kind: type[errors.Overloaded]) -> None:
    _, detail = error_detail(kind("later", retry_after_s=1.25), where="Test")
    assert detail.retry_after_ms == 1_250
    assert client_errors.from_detail(detail).retry_after_s == 1.25


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(SECRET),
        KeyError(SECRET),
        AssertionError(SECRET),
        OSError(2, SECRET),
        errors.StartupError(SECRET),
        errors.KVServiceError(SECRET),
    ],
)
def test_an_unexpected_exception_is_told_to_the_log_and_not_to_the_caller(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        code, detail = error_detail(error, where="Lookup")
    assert code is grpc.StatusCode.INTERNAL
    assert detail.reason == pb.ERROR_REASON_INTERNAL
    assert SECRET.encode() not in detail.SerializeToString()
    assert re.fullmatch(r"[0-9a-f]{16}", detail.error_id)
    assert detail.error_id in detail.message
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert vars(record)["kvservice_fields"] == {"where": "Lookup", "error_id": detail.error_id}


def test_two_unexpected_exceptions_have_two_ids() -> None:
    ids = {error_detail(RuntimeError(), where="Test")[1].error_id for _ in range(50)}
    assert len(ids) == 50


# ------------------------------------------------------------------------- the calls


def test_the_detail_travels_in_the_trailing_metadata() -> None:
    context = CallContext()
    code, detail = error_detail(errors.LeaseUnknown("no lease 7"), where="Release")
    with pytest.raises(Aborted):
        asyncio.run(abort(context, code, detail))  # type: ignore[arg-type]  # the part of it that is used
    assert (context.code, context.text) == (grpc.StatusCode.NOT_FOUND, "no lease 7")
    assert context.detail == detail


def test_the_token_is_taken_from_the_metadata() -> None:
    context = CallContext((("user-agent", "x"), (TOKEN_KEY, b"\0secret")))
    assert token_of(context) == b"\0secret"  # type: ignore[arg-type]  # the part of it that is used


@pytest.mark.parametrize("metadata", [(), (("user-agent", "x"),), (("kvservice-token", "x"),)])
def test_a_call_without_a_token_is_refused(metadata: tuple[tuple[str, str | bytes], ...]) -> None:
    with pytest.raises(errors.Unauthenticated, match=TOKEN_KEY):
        token_of(CallContext(metadata))  # type: ignore[arg-type]  # the part of it that is used


def call(answer: Any) -> tuple[CallContext, Any, Metrics]:
    """One unary call through the wrapper: (context, the answer or None, metrics)."""
    context, metrics = CallContext(), Metrics(version="0")
    handle: Any = unary(metrics.rpc("Test"), "Test", answer).handle
    try:
        return context, asyncio.run(handle("request", context)), metrics
    except Aborted:
        return context, None, metrics


def observed(metrics: Metrics, code: str) -> float | None:
    labels = {"method": "Test", "code": code}
    return metrics.registry.get_sample_value("kvservice_rpc_duration_seconds_count", labels)


def test_a_handler_may_answer_at_once_or_later() -> None:
    async def later(request: str, context: Any) -> str:
        await asyncio.sleep(0)
        return f"{request} later"

    for answer, expected in ((lambda request, context: f"{request} now", "request now"), (later, "request later")):
        context, answered, metrics = call(answer)
        assert answered == expected
        assert context.code is None
        assert observed(metrics, "OK") == 1


def test_a_handler_that_fails_at_once_or_later_ends_the_call_with_its_status() -> None:
    def now(request: str, context: Any) -> str:
        raise errors.QuotaExceeded("full")

    async def later(request: str, context: Any) -> str:
        await asyncio.sleep(0)
        raise errors.QuotaExceeded("full")

    for answer in (now, later):
        context, answered, metrics = call(answer)
        assert answered is None
        assert (context.code, context.text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        assert context.detail.reason == pb.ERROR_REASON_QUOTA_EXCEEDED
        assert observed(metrics, "RESOURCE_EXHAUSTED") == 1
        assert observed(metrics, "OK") == 0


def test_a_handler_with_a_bug_tells_the_caller_an_id_only() -> None:
    def broken(request: str, context: Any) -> str:
        raise ZeroDivisionError(SECRET)

    context, _, metrics = call(broken)
    assert context.code is grpc.StatusCode.INTERNAL
    assert SECRET not in context.text
    assert context.detail.error_id in context.text
    assert observed(metrics, "INTERNAL") == 1


# ------------------------------------------------------------------ protocol versions


def test_the_newest_version_of_both_sides_is_agreed_on() -> None:
    assert agreed_version(PROTOCOL_VERSION_MIN, PROTOCOL_VERSION_MAX) == PROTOCOL_VERSION_MAX
    assert agreed_version(0, PROTOCOL_VERSION_MAX + 5) == PROTOCOL_VERSION_MAX
    assert agreed_version(PROTOCOL_VERSION_MAX, PROTOCOL_VERSION_MAX + 1) == PROTOCOL_VERSION_MAX


@pytest.mark.parametrize(
    ("lowest", "highest"),
    [
        (PROTOCOL_VERSION_MAX + 1, PROTOCOL_VERSION_MAX + 3),
        (0, PROTOCOL_VERSION_MIN - 1),
        (PROTOCOL_VERSION_MAX + 1, PROTOCOL_VERSION_MIN),
        (0, 0),
    ],
)
def test_no_common_version_is_an_error_with_both_ranges(lowest: int, highest: int) -> None:
    with pytest.raises(errors.InvalidRequest, match=f"{lowest} to {highest} offered, this daemon speaks") as refusal:
        agreed_version(lowest, highest)
    assert refusal.value.field == "protocol_version"
