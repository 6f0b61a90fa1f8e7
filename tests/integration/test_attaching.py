"""The handshakes: what is refused, which bounds hold, and what a second attachment of one process means."""

from __future__ import annotations

import threading
from hashlib import sha256

import pytest

import kvservice_client as kv
from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.blocks import chain, namespace
from tests.connections import Connection, FrameSocket
from tests.daemons import MIB, DaemonThread
from tests.integration.books import Code, books, refused
from tests.integration.conftest import MakeClient, MakeConnection, MakeDaemonThread
from tests.waiting import eventually

pytestmark = pytest.mark.integration

INVALID = (Code.INVALID_ARGUMENT, pb.ERROR_REASON_INVALID_REQUEST)
MISMATCH = (Code.FAILED_PRECONDITION, pb.ERROR_REASON_LAYOUT_MISMATCH)
OVERLOADED = (Code.UNAVAILABLE, pb.ERROR_REASON_OVERLOADED)
CAPACITY = (Code.RESOURCE_EXHAUSTED, pb.ERROR_REASON_CAPACITY_EXHAUSTED)

GOOD = pb.Namespace(
    fingerprint=bytes(range(32)), label="good", block_size_bytes=4096, tokens_per_block=16, hash_size_bytes=32
)


def good_but(**changes: object) -> pb.Namespace:
    changed = pb.Namespace()
    changed.CopyFrom(GOOD)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (good_but(fingerprint=bytes(15)), "fingerprint length"),
        (good_but(fingerprint=bytes(65)), "fingerprint length"),
        (good_but(label="x" * 201), "label"),
        (good_but(block_size_bytes=0), "block_size_bytes"),
        (good_but(block_size_bytes=(1 << 30) + 1), "block_size_bytes"),
        (good_but(block_size_bytes=2**64 - 1), "block_size_bytes"),
        (good_but(tokens_per_block=0), "tokens_per_block"),
        (good_but(tokens_per_block=2**32 - 1), "tokens_per_block"),
        (good_but(hash_size_bytes=7), "hash_size_bytes"),
        (good_but(hash_size_bytes=65), "hash_size_bytes"),
        (pb.Namespace(), "fingerprint length"),
    ],
)
def test_a_malformed_namespace_is_refused_naming_the_field(
    daemon_thread: DaemonThread, make_connection: MakeConnection, wrong: pb.Namespace, field: str
) -> None:
    connection = make_connection(daemon_thread.socket_dir)
    before = books(daemon_thread)
    refused(lambda: connection.hello([GOOD, wrong]), *INVALID, field=field)
    assert books(daemon_thread) == before
    # The same process may do better.
    assert connection.hello([GOOD]).namespace_ids == [1]


def test_a_stream_must_start_with_one_hello_of_at_least_one_namespace(
    daemon_thread: DaemonThread, make_connection: MakeConnection
) -> None:
    connection = make_connection(daemon_thread.socket_dir)
    before = books(daemon_thread)
    refused(lambda: connection.hello([]), *INVALID, field="namespaces")
    refused(lambda: connection.hello([GOOD] * 65), *INVALID, field="namespaces")
    refused(lambda: connection.open_stream(pb.AttachRequest(ping=pb.Ping())), *INVALID, field="hello")
    refused(lambda: connection.open_stream(pb.AttachRequest()), *INVALID, field="hello")
    named = pb.Hello(protocol_version_min=1, protocol_version_max=1, namespaces=[GOOD], instance_name="x" * 101)
    refused(lambda: connection.open_stream(pb.AttachRequest(hello=named)), *INVALID, field="instance_name")
    assert books(daemon_thread) == before
    connection.hello([GOOD])
    assert connection.ping().WhichOneof("message") == "pong"
    second = Connection.__new__(Connection)
    second.__dict__ |= connection.__dict__
    refused(lambda: second.hello([GOOD]), *INVALID, says="attached already")
    assert connection.ping().WhichOneof("message") == "pong"


@pytest.mark.parametrize(("lowest", "highest"), [(0, 0), (2, 2), (2, 9), (3, 1), (2**32 - 1, 2**32 - 1)])
def test_a_protocol_version_that_we_do_not_speak_is_refused_on_both_sockets(
    daemon_thread: DaemonThread, make_connection: MakeConnection, lowest: int, highest: int
) -> None:
    connection = make_connection(daemon_thread.socket_dir)
    before = books(daemon_thread)
    says = f"{lowest} to {highest}"
    refused(
        lambda: connection.hello([GOOD], lowest=lowest, highest=highest), *INVALID, field="protocol_version", says=says
    )
    frames = FrameSocket(daemon_thread.socket_dir)
    answer = frames.hello(lowest, highest)
    assert answer.error.reason == pb.ERROR_REASON_INVALID_REQUEST
    assert answer.error.field == "protocol_version"
    assert says in answer.error.message
    with pytest.raises(EOFError):
        frames.receive()
    frames.close()
    assert books(daemon_thread) == before


@pytest.mark.parametrize(("lowest", "highest"), [(1, 1), (0, 1), (1, 7), (0, 2**32 - 1)])
def test_a_range_of_versions_that_contains_ours_agrees_on_ours(
    daemon_thread: DaemonThread, make_connection: MakeConnection, lowest: int, highest: int
) -> None:
    frames = FrameSocket(daemon_thread.socket_dir)
    assert frames.hello(lowest, highest).WhichOneof("message") == "welcome"
    frames.close()
    connection = make_connection(daemon_thread.socket_dir)
    assert connection.hello([GOOD], lowest=lowest, highest=highest).protocol_version == 1


@pytest.mark.parametrize(
    "other",
    [good_but(block_size_bytes=8192), good_but(tokens_per_block=32), good_but(hash_size_bytes=16)],
    ids=["block size", "tokens per block", "hash size"],
)
def test_one_fingerprint_means_one_geometry(
    daemon_thread: DaemonThread, make_connection: MakeConnection, other: pb.Namespace
) -> None:
    first = make_connection(daemon_thread.socket_dir)
    first.hello([GOOD])
    first.save(chain("a", 3))
    second = make_connection(daemon_thread.socket_dir)
    before = books(daemon_thread)
    refused(lambda: second.hello([other]), *MISMATCH, says="fingerprint")
    refused(lambda: second.hello([good_but(fingerprint=bytes(32), label="new"), other]), *MISMATCH)
    after = books(daemon_thread)
    assert after["instances"] == before["instances"]
    assert after["namespaces"]["good"][0] == 3
    # A label is only for people.
    assert second.hello([good_but(label="another")]).namespace_ids == [1]
    assert second.lookup(chain("a", 3)).hit_blocks == 3
    with pytest.raises(kv.LayoutMismatch):
        kv.attach(
            kv.Namespace(other.fingerprint, "x", other.block_size_bytes, other.tokens_per_block, other.hash_size_bytes),
            socket_dir=daemon_thread.socket_dir,
        )


def test_a_second_attachment_of_the_same_process_means_what_it_says(
    daemon_thread: DaemonThread, make_connection: MakeConnection
) -> None:
    one, other = namespace("one"), namespace("other")
    connection = make_connection(daemon_thread.socket_dir, one)
    connection.save(chain("a", 3))
    kept = connection.put(chain("b", 2)).reservation_id
    connection.detach()
    eventually(lambda: daemon_thread.holds() == (0, 1, 2), what="the holds of a broken stream are in quarantine")
    refused(lambda: connection.lookup(chain("a", 3)), Code.FAILED_PRECONDITION, pb.ERROR_REASON_NAMESPACE_UNKNOWN)
    assert connection.attach(other).namespace_ids == [1]
    assert connection.lookup(chain("a", 3)).hit_blocks == 0, "namespace 1 must be the one just attached"
    refused(
        lambda: connection.lookup(chain("a", 3), namespace_id=2),
        Code.FAILED_PRECONDITION,
        pb.ERROR_REASON_NAMESPACE_UNKNOWN,
    )
    # The process is the same, so what it held before waits for it still.
    assert connection.abort(kept).expired
    assert daemon_thread.holds() == (0, 0, 0)


def test_an_attachment_given_up_at_any_moment_is_over(
    daemon_thread: DaemonThread, make_connection: MakeConnection
) -> None:
    connection = make_connection(daemon_thread.socket_dir)
    for pause_s in range(40):
        stream = connection.start_stream(good_but(fingerprint=pause_s.to_bytes(16, "big"), label=f"n{pause_s}"))
        # From before the daemon has heard of it until after it has answered.
        threading.Event().wait(pause_s / 10_000)
        stream.cancel()
    eventually(lambda: daemon_thread.on_loop(lambda: daemon_thread.store.instances.attached) == 0)
    assert connection.attach_again(namespace("at last")).namespace_ids == [1]
    connection.save(chain("a", 2))
    daemon_thread.check()


def test_a_stream_that_says_nothing_is_ended(
    daemon_thread: DaemonThread, make_connection: MakeConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvservice.service.control._HELLO_TIMEOUT_S", 0.1)
    connection = make_connection(daemon_thread.socket_dir)
    refused(connection.open_stream, *INVALID, field="hello")
    connection.hello([GOOD])


def test_instances_connections_and_namespaces_are_bounded(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection
) -> None:
    daemon = make_daemon_thread(instances_max=2, connections_max=4, namespaces_max=2)
    first, second = (make_connection(daemon.socket_dir, namespace(name)) for name in ("one", "two"))
    third = make_connection(daemon.socket_dir)
    detail = refused(lambda: third.attach(namespace("one")), *OVERLOADED, says="instances_max")
    assert detail.retry_after_ms > 0
    second.detach()
    eventually(lambda: daemon.on_loop(lambda: daemon.store.instances.attached) == 1)
    # Both namespaces are in use by processes that are here, so a third finds no place.
    refused(lambda: third.attach(namespace("three")), *CAPACITY, says="namespaces_max")
    make_connection(daemon.socket_dir)
    frames = FrameSocket(daemon.socket_dir)
    answer = frames.hello()
    assert answer.error.reason == pb.ERROR_REASON_OVERLOADED
    assert "connections_max" in answer.error.message
    assert answer.error.retry_after_ms > 0
    frames.close()
    second.close()
    eventually(lambda: len(daemon.store.instances) == 3)
    # The namespace that nobody uses any more makes place for the new one.
    third.attach(namespace("three"))
    third.save(chain("a", 2))
    first.save(chain("a", 2))
    daemon.check()


def test_holds_per_instance_are_bounded(make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection) -> None:
    daemon = make_daemon_thread(leases_per_instance_max=3, reservations_per_instance_max=2)
    connection = make_connection(daemon.socket_dir, namespace())
    connection.save(chain("held", 2))
    leases = [connection.get(chain("held", 2)).lease_id for _ in range(3)]
    before = books(daemon)
    refused(lambda: connection.get(chain("held", 2)), *OVERLOADED, says="3 leases")
    assert books(daemon) == before
    reservations = [connection.put(chain(f"new-{n}", 1)).reservation_id for n in range(2)]
    before = books(daemon)
    refused(lambda: connection.put(chain("new-3", 1)), *OVERLOADED, says="2 reservations")
    assert books(daemon) == before
    # Another instance has bounds of its own.
    other = make_connection(daemon.socket_dir, namespace())
    assert other.get(chain("held", 2)).lease_id
    connection.release(leases.pop())
    connection.abort(reservations.pop())
    assert connection.get(chain("held", 2)).lease_id
    assert connection.put(chain("new-3", 1)).reservation_id


def test_an_arena_smaller_than_one_block_says_so(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection, make_client: MakeClient
) -> None:
    daemon = make_daemon_thread(dram_bytes=1 * MIB)
    connection = make_connection(daemon.socket_dir)
    too_large = namespace("large", block_size_bytes=1 * MIB + 1)
    before = books(daemon)
    refused(lambda: connection.attach(too_large), *INVALID, field="block_size_bytes", says="dram_bytes is 1048576")
    assert books(daemon) == before
    with pytest.raises(kv.InvalidRequest, match="dram_bytes is 1048576"):
        kv.attach(too_large, socket_dir=daemon.socket_dir)
    # One that fits exactly is an arena of one block.
    client = make_client(daemon.socket_dir, namespace("fits", block_size_bytes=1 * MIB))
    assert client.save([sha256(b"1").digest()], bytes(1 * MIB)).saved == 1
    daemon.wait_checksummed()  # until then the only block is in use
    assert client.save([sha256(b"2").digest()], bytes(1 * MIB)).saved == 1
    assert client.lookup([sha256(b"1").digest()]).blocks == 0


def test_the_stream_ends_when_the_memory_socket_hangs_up(
    daemon_thread: DaemonThread, make_connection: MakeConnection
) -> None:
    connection = make_connection(daemon_thread.socket_dir, namespace())
    connection.frames.close()

    def until_the_end() -> None:
        while True:
            connection.ping()

    with pytest.raises(StopIteration):
        until_the_end()
