"""Calls that are wrong, or come at the wrong time: each is told so in the contract's words and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
import pytest

import kvservice_client as kv
from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.blocks import chain, contents, namespace
from tests.connections import CallFailed
from tests.integration.books import Code, books, refused
from tests.integration.conftest import MakeClient, MakeConnection, MakeDaemonThread
from tests.waiting import eventually

pytestmark = pytest.mark.integration

HASHES_MAX = 100
QUEUE_MAX = 20
INVALID = (Code.INVALID_ARGUMENT, pb.ERROR_REASON_INVALID_REQUEST)
NAMESPACE_UNKNOWN = (Code.FAILED_PRECONDITION, pb.ERROR_REASON_NAMESPACE_UNKNOWN)
LEASE_UNKNOWN = (Code.NOT_FOUND, pb.ERROR_REASON_LEASE_UNKNOWN)
LEASE_EXPIRED = (Code.ABORTED, pb.ERROR_REASON_LEASE_EXPIRED)
RESERVATION_LOST = (Code.ABORTED, pb.ERROR_REASON_RESERVATION_LOST)

Wrong = tuple[str, Any, tuple[grpc.StatusCode, pb.ErrorReason], str]


def packed(hashes: Sequence[bytes]) -> bytes:
    return b"".join(hashes)


def wrong_hashes() -> list[Wrong]:
    requests = {
        "Lookup": pb.LookupRequest,
        "Get": pb.GetRequest,
        "Put": pb.PutRequest,
        "Prefetch": pb.PrefetchRequest,
        "PlanLoad": pb.PlanLoadRequest,
    }
    bad = [b"", b"short", packed(chain("a", 2))[:-1], packed(chain("a", 2)) + b"x", packed(chain("a", HASHES_MAX + 1))]
    return [
        (method, request(namespace_id=1, hashes=hashes), INVALID, "hashes")
        for method, request in requests.items()
        for hashes in bad
    ]


def wrong_namespaces() -> list[Wrong]:
    one = packed(chain("a", 1))
    return [
        (method, request, NAMESPACE_UNKNOWN, "")
        for unknown in (0, 2, 2**32 - 1)
        for method, request in (
            ("Lookup", pb.LookupRequest(namespace_id=unknown, hashes=one)),
            ("Get", pb.GetRequest(namespace_id=unknown, hashes=one)),
            ("Put", pb.PutRequest(namespace_id=unknown, hashes=one)),
            ("Prefetch", pb.PrefetchRequest(namespace_id=unknown, hashes=one)),
            ("Forget", pb.ForgetRequest(namespace_id=unknown, session_id="s")),
            ("Forget", pb.ForgetRequest(namespace_id=unknown, whole_namespace=pb.WholeNamespace())),
        )
    ]


def wrong_otherwise() -> list[Wrong]:
    held, other = chain("held", 4), chain("other", 4)
    twice = packed([*chain("a", 3), *chain("a", 1)])
    long = "x" * 201
    return [
        ("Put", pb.PutRequest(namespace_id=1, hashes=packed(chain("a", 2)), parent=b"five."), INVALID, "parent"),
        ("Put", pb.PutRequest(namespace_id=1, hashes=twice), INVALID, "hashes"),
        ("Put", pb.PutRequest(namespace_id=1, hashes=packed(held[1:])), INVALID, "hashes"),
        ("Put", pb.PutRequest(namespace_id=1, hashes=packed([*other[:2], held[2]])), INVALID, "hashes"),
        ("Put", pb.PutRequest(namespace_id=1, hashes=packed(held[:1]), parent=held[1]), INVALID, "hashes"),
        ("Put", pb.PutRequest(namespace_id=1, hashes=packed([held[2], held[1]]), parent=held[0]), INVALID, "hashes"),
        ("Put", pb.PutRequest(namespace_id=1, hashes=packed(other), session_id=long), INVALID, "session_id"),
        ("Put", pb.PutRequest(namespace_id=1, hashes=packed(other), request_id=long), INVALID, "request_id"),
        ("Get", pb.GetRequest(namespace_id=1, hashes=packed(held), session_id=long), INVALID, "session_id"),
        ("Get", pb.GetRequest(namespace_id=1, hashes=packed(held), request_id=long), INVALID, "request_id"),
        ("Get", pb.GetRequest(namespace_id=1, hashes=packed([held[0], chain("second", 4)[1]])), INVALID, "hashes"),
        ("Release", pb.ReleaseRequest(request_id=long), INVALID, "request_id"),
        ("Release", pb.ReleaseRequest(lease_ids=range(1, HASHES_MAX + 2)), INVALID, "lease_ids"),
        ("Renew", pb.RenewRequest(lease_ids=range(1, HASHES_MAX + 2)), INVALID, "lease_ids"),
        ("Renew", pb.RenewRequest(reservation_ids=range(1, HASHES_MAX + 2)), INVALID, "reservation_ids"),
        ("Commit", pb.CommitRequest(reservation_id=1, positions=range(HASHES_MAX + 1)), INVALID, "positions"),
        ("Release", pb.ReleaseRequest(lease_ids=[7]), LEASE_UNKNOWN, ""),
        ("Release", pb.ReleaseRequest(lease_ids=[2**64 - 1]), LEASE_UNKNOWN, ""),
        ("Renew", pb.RenewRequest(lease_ids=[7]), LEASE_UNKNOWN, ""),
        ("Renew", pb.RenewRequest(reservation_ids=[7]), LEASE_UNKNOWN, ""),
        ("Commit", pb.CommitRequest(reservation_id=7), LEASE_UNKNOWN, ""),
        ("Commit", pb.CommitRequest(), LEASE_UNKNOWN, ""),
        ("Abort", pb.AbortRequest(reservation_id=7), LEASE_UNKNOWN, ""),
        ("Forget", pb.ForgetRequest(namespace_id=1), INVALID, "target"),
        ("Explain", pb.ExplainRequest(hash=b""), INVALID, "hash"),
        ("Explain", pb.ExplainRequest(hash=b"7 bytes"), INVALID, "hash"),
        ("Explain", pb.ExplainRequest(hash=bytes(65)), INVALID, "hash"),
    ]


def wrong_hints() -> list[Wrong]:
    long, hashes = "x" * 201, packed(chain("a", 1))
    entry = pb.QueueEntry(request_id="r", hashes=hashes)

    def snapshot(*entries: pb.QueueEntry, epoch: int = 1, namespace_id: int = 1) -> pb.UpdateQueueRequest:
        queue = pb.QueueSnapshot(entries=entries)
        return pb.UpdateQueueRequest(namespace_id=namespace_id, epoch=epoch, snapshot=queue)

    def hint(**of: Any) -> pb.HintSessionsRequest:
        return pb.HintSessionsRequest(namespace_id=1, hints=[pb.SessionHint(**of)])

    queues = [
        (snapshot(entry, epoch=0), "epoch"),
        (pb.UpdateQueueRequest(namespace_id=1, epoch=1), "update"),
        (pb.UpdateQueueRequest(namespace_id=1, epoch=1, delta=pb.QueueDelta()), "sequence"),
        (snapshot(pb.QueueEntry(hashes=hashes)), "request_id"),
        (snapshot(pb.QueueEntry(request_id=long)), "request_id"),
        (snapshot(pb.QueueEntry(request_id="r", session_id=long)), "session_id"),
        (snapshot(pb.QueueEntry(request_id="r", prefix_request_id=long)), "prefix_request_id"),
        (snapshot(pb.QueueEntry(request_id="r", hashes=b"short")), "hashes"),
        (snapshot(pb.QueueEntry(request_id="r", hashes=packed(chain("a", HASHES_MAX + 1)))), "hashes"),
        (snapshot(entry, entry), "request_id"),
        (snapshot(*(pb.QueueEntry(request_id=str(number)) for number in range(QUEUE_MAX + 1))), "entries"),
    ]
    sessions = [
        (pb.HintSessionsRequest(namespace_id=1), "number of hints"),
        (hint(session_id="s"), "hint"),
        (hint(typing=pb.Typing()), "session_id"),
        (hint(session_id=long, finished=pb.Finished()), "session_id"),
        (pb.HintSessionsRequest(namespace_id=1, hints=[pb.SessionHint(session_id="s")] * 257), "number of hints"),
    ]
    speeds = [float("nan"), float("inf"), -1.0]
    plans = [pb.PlanLoadRequest(namespace_id=1, hashes=hashes, prefill_tokens_per_s=speed) for speed in speeds]
    return [
        *(("UpdateQueue", request, INVALID, field) for request, field in queues),
        *(("HintSessions", request, INVALID, field) for request, field in sessions),
        *(("PlanLoad", request, INVALID, "prefill_tokens_per_s") for request in plans),
        ("UpdateQueue", snapshot(entry, namespace_id=2), NAMESPACE_UNKNOWN, ""),
        ("PlanLoad", pb.PlanLoadRequest(namespace_id=2, hashes=hashes), NAMESPACE_UNKNOWN, ""),
        (
            "HintSessions",
            pb.HintSessionsRequest(namespace_id=2, hints=[pb.SessionHint(session_id="s", typing=pb.Typing())]),
            NAMESPACE_UNKNOWN,
            "",
        ),
    ]


def test_a_wrong_call_is_refused_by_name_and_changes_nothing(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection
) -> None:
    daemon = make_daemon_thread(hashes_per_call_max=HASHES_MAX, queue_entries_max=QUEUE_MAX)
    connection = make_connection(daemon.socket_dir, namespace())
    connection.save(chain("held", 4))
    connection.save(chain("second", 4))
    before = books(daemon)
    wrong = [*wrong_hashes(), *wrong_namespaces(), *wrong_otherwise(), *wrong_hints()]
    for method, request, (code, reason), field in wrong:
        refused(lambda m=method, r=request: connection.call(m, r), code, reason, field=field)  # type: ignore[misc]  # bound now
        assert books(daemon) == before, (method, request)
    daemon.check()
    # The bounds themselves are allowed.
    assert connection.lookup(chain("held", HASHES_MAX)).hit_blocks == 4
    assert len(connection.put(chain("most", HASHES_MAX)).runs) == 1


def test_what_ended_cannot_be_ended_or_used_again(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection
) -> None:
    daemon = make_daemon_thread()
    connection = make_connection(daemon.socket_dir, namespace())
    aborted = connection.put(chain("aborted", 2)).reservation_id
    assert not connection.abort(aborted).expired
    refused(lambda: connection.commit(aborted), *LEASE_UNKNOWN, says=str(aborted))
    refused(lambda: connection.abort(aborted), *LEASE_UNKNOWN)
    assert connection.lookup(chain("aborted", 2)).hit_blocks == 0

    committed = connection.put(chain("a", 4)).reservation_id
    connection.commit(committed, [0, 1])
    for positions in ([0], [1, 2], [4], [2, 2], [2**32 - 1]):
        refused(lambda p=positions: connection.commit(committed, p), *INVALID, field="positions")  # type: ignore[misc]  # bound now
    assert connection.lookup(chain("a", 4)).hit_blocks == 2
    connection.commit(committed)
    assert connection.lookup(chain("a", 4)).hit_blocks == 4
    refused(lambda: connection.commit(committed), *LEASE_UNKNOWN)
    refused(lambda: connection.abort(committed), *LEASE_UNKNOWN)

    leased = connection.get(chain("a", 4)).lease_id
    refused(lambda: connection.release(leased, leased), *INVALID, field="lease_ids")
    refused(lambda: connection.release(leased, leased + 1), *LEASE_UNKNOWN)
    refused(lambda: connection.commit(leased), *LEASE_UNKNOWN, says="reservation")
    assert daemon.holds() == (1, 0, 0), "all or none: the lease that is ours must still be there"
    assert connection.release(leased).released == 1
    refused(lambda: connection.release(leased), *LEASE_UNKNOWN)
    refused(lambda: connection.call("Renew", pb.RenewRequest(lease_ids=[leased])), *LEASE_UNKNOWN)
    assert daemon.holds() == (0, 0, 0)


def test_an_expired_hold_is_told_apart_and_waits_for_its_holder(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection
) -> None:
    daemon = make_daemon_thread()
    connection = make_connection(daemon.socket_dir, namespace())
    connection.save(chain("held", 3))
    lease = connection.get(chain("held", 3), lease_ms=50, request_id="r").lease_id
    reservation = connection.put(chain("new", 2), lease_ms=50, request_id="r").reservation_id
    eventually(lambda: daemon.holds() == (1, 1, 5))
    refused(lambda: connection.call("Renew", pb.RenewRequest(lease_ids=[lease])), *LEASE_EXPIRED)
    refused(lambda: connection.call("Renew", pb.RenewRequest(reservation_ids=[reservation])), *RESERVATION_LOST)
    refused(lambda: connection.commit(reservation), *RESERVATION_LOST)
    assert connection.lookup(chain("new", 2)).hit_blocks == 0
    daemon.check()
    assert daemon.holds() == (1, 1, 5), "quarantine ends with Release and Abort, not with time"
    released = connection.release(lease)
    assert (released.released, released.expired) == (0, 1)
    assert connection.abort(reservation).expired
    assert daemon.holds() == (0, 0, 0)
    # By request: the same, for everything that it held.
    connection.get(chain("held", 3), lease_ms=50, request_id="q")
    connection.put(chain("new", 2), request_id="q")
    eventually(lambda: daemon.holds() == (1, 1, 3))
    released = connection.call("Release", pb.ReleaseRequest(request_id="q"))
    assert (released.released, released.expired) == (1, 1)
    assert daemon.holds() == (0, 0, 0)


def test_holds_of_another_instance_are_unknown_to_this_one(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection
) -> None:
    daemon = make_daemon_thread()
    owner = make_connection(daemon.socket_dir, namespace())
    thief = make_connection(daemon.socket_dir, namespace())
    owner.save(chain("held", 3))
    lease = owner.get(chain("held", 3), request_id="r").lease_id
    reservation = owner.put(chain("new", 2), request_id="r").reservation_id
    before = books(daemon)
    for method, request in (
        ("Release", pb.ReleaseRequest(lease_ids=[lease])),
        ("Renew", pb.RenewRequest(lease_ids=[lease])),
        ("Renew", pb.RenewRequest(reservation_ids=[reservation])),
        ("Commit", pb.CommitRequest(reservation_id=reservation)),
        ("Abort", pb.AbortRequest(reservation_id=reservation)),
    ):
        refused(lambda m=method, r=request: thief.call(m, r), *LEASE_UNKNOWN)  # type: ignore[misc]  # bound now
    assert thief.call("Release", pb.ReleaseRequest(request_id="r")) == pb.ReleaseResponse()
    assert books(daemon) == before
    assert owner.release(lease).released == 1
    assert owner.commit(reservation).runs[0].WhichOneof("outcome") == "published"


@pytest.mark.parametrize("method", ["Put", "Lookup"])
def test_a_message_above_the_limit_is_refused_before_it_is_read(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection, method: str
) -> None:
    daemon = make_daemon_thread(message_bytes_max=64 * 1024, hashes_per_call_max=HASHES_MAX)
    connection = make_connection(daemon.socket_dir, namespace())
    before = books(daemon)
    request = {"Put": pb.PutRequest, "Lookup": pb.LookupRequest}[method](namespace_id=1, hashes=bytes(1 << 20))
    with pytest.raises(CallFailed) as caught:
        connection.call(method, request)
    # The transport's own refusal, so without our detail.
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    assert books(daemon) == before
    assert connection.lookup(chain("a", 1)).hit_blocks == 0


def test_the_client_refuses_what_does_not_fit_before_it_asks(
    make_daemon_thread: MakeDaemonThread, make_client: MakeClient
) -> None:
    daemon = make_daemon_thread()
    client = make_client(daemon.socket_dir, namespace(block_size_bytes=5000))
    hashes = chain("a", 3)
    before = books(daemon)
    read_only = bytes(3 * 5000)
    for destination in (
        bytearray(3 * 5000 - 1),
        bytearray(3 * 5000 + 1),
        bytearray(3 * 4096),
        bytearray(0),
        [bytearray(5000)] * 2,
        [bytearray(5000), bytearray(5000), bytearray(4999)],
        [],
        read_only,
        memoryview(bytearray(6 * 5000))[::2],
        "text",
        None,
        kv.Memory(address=0, size_bytes=3),
    ):
        with pytest.raises(kv.InvalidRequest):
            client.load(hashes, destination)
        if destination is not read_only:
            with pytest.raises(kv.InvalidRequest):
                client.save(hashes, destination)
    for wrong in ([*hashes[:2], b"short"], [*hashes[:2], bytes(33)], [hashes[0] + hashes[1][:1], hashes[1][1:]]):
        for ask in (client.lookup, client.prefetch, client.get, client.put):
            with pytest.raises(kv.InvalidRequest):
                ask(wrong)
    assert books(daemon) == before
    assert client.save(hashes, contents(hashes, 5000)).saved == 3
