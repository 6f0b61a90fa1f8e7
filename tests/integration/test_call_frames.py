"""Call connections frame by frame: who gets one, what ends it, and that whatever arrives on it hurts nobody else."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from kvservice import call_socket
from kvservice.errors import Unauthenticated
from kvservice.instances import Identity
from kvservice.service.calls import UnaryMethod
from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.blocks import chain, namespace
from tests.connections import CallFrames, Connection, memory_socket_path
from tests.daemons import DaemonThread
from tests.garbage import framed, no_descriptor_left, random_pieces, send_and_hang_up
from tests.integration.conftest import MakeConnection
from tests.waiting import eventually

pytestmark = pytest.mark.integration

FRAME_BYTES_MAX = 8 * 1024 * 1024 + 1024
LOOKUP = pb.LookupRequest(namespace_id=1, hashes=chain("witness", 5)[0])
LOOKUP_CALL = pb.SocketCall(method="Lookup", request=LOOKUP.SerializeToString()).SerializeToString()
UNARY = sorted(
    method.name
    for method in pb.DESCRIPTOR.services_by_name["KVCacheService"].methods
    if not method.client_streaming and not method.server_streaming
)


@pytest.fixture
def calls(daemon_thread: DaemonThread, witness: Connection) -> Iterator[CallFrames]:
    """A call connection of the witness."""
    frames = CallFrames(daemon_thread.socket_dir, witness.token)
    assert frames.welcome.WhichOneof("message") == "call_welcome"
    yield frames
    frames.close()


@pytest.fixture(autouse=True)
def first_stream(daemon_thread: DaemonThread, witness: Connection) -> None:
    """With its first stream the event loop opens a descriptor for itself, and keeps it."""
    frames = CallFrames(daemon_thread.socket_dir, witness.token)
    frames.close()
    none_is_left(daemon_thread)


def none_is_left(daemon: DaemonThread) -> None:
    eventually(lambda: daemon.on_loop(lambda: len(daemon.daemon._calls)) == 0, what="no call connection is left")


def hello(token: bytes) -> bytes:
    return framed(pb.SocketRequest(call_hello=pb.CallHello(token=token)).SerializeToString())


def ends(frames: CallFrames) -> None:
    """The daemon has hung up."""
    with pytest.raises((EOFError, ConnectionResetError)):
        frames.answer()
    frames.close()


# ------------------------------------------------------------------ who gets one


@pytest.mark.parametrize("token", [b"", b"x" * 32, bytes(100)])
def test_a_token_that_nobody_was_issued_is_refused(
    daemon_thread: DaemonThread, witness: Connection, token: bytes
) -> None:
    with no_descriptor_left():
        frames = CallFrames(daemon_thread.socket_dir, token)
        assert frames.welcome.error.reason == pb.ERROR_REASON_UNAUTHENTICATED
        ends(frames)


def test_a_token_is_its_own_user_s(daemon_thread: DaemonThread, witness: Connection) -> None:
    admit = daemon_thread.daemon._calls.admit
    own = daemon_thread.store.instances.of_token(witness.token).identity
    daemon_thread.on_loop(lambda: daemon_thread.daemon._calls.left(admit(own, witness.token)))
    with pytest.raises(Unauthenticated):
        daemon_thread.on_loop(lambda: admit(Identity("uid:54321", own.process_id), witness.token))


def test_the_token_ends_with_the_memory_socket_and_so_do_its_connections(
    daemon_thread: DaemonThread, make_connection: MakeConnection
) -> None:
    connection = make_connection(daemon_thread.socket_dir, namespace())
    frames = [CallFrames(daemon_thread.socket_dir, connection.token) for _ in range(3)]
    assert frames[0].call("Stats", pb.StatsRequest()).response
    connection.frames.close()
    for each in frames:
        ends(each)
    late = CallFrames(daemon_thread.socket_dir, connection.token)
    assert late.welcome.error.reason == pb.ERROR_REASON_UNAUTHENTICATED
    late.close()


def test_a_process_has_a_bounded_number_of_them(
    daemon_thread: DaemonThread, witness: Connection, make_connection: MakeConnection
) -> None:
    with no_descriptor_left():
        most = call_socket.CONNECTIONS_PER_INSTANCE_MAX
        frames = [CallFrames(daemon_thread.socket_dir, witness.token) for _ in range(most)]
        assert all(each.call("Lookup", LOOKUP).response for each in frames)
        for _ in range(2):
            one_more = CallFrames(daemon_thread.socket_dir, witness.token)
            assert one_more.welcome.error.reason == pb.ERROR_REASON_OVERLOADED
            ends(one_more)
        with Connection(daemon_thread.socket_dir) as other:
            others = CallFrames(daemon_thread.socket_dir, other.token)
            assert others.call("Stats", pb.StatsRequest()).response
            others.close()
        for each in frames:
            each.close()
        none_is_left(daemon_thread)


def test_a_call_connection_has_no_way_to_the_memory(daemon_thread: DaemonThread, calls: CallFrames) -> None:
    calls.send(pb.SocketRequest(segment=pb.SegmentRequest(segment_id=1)))
    answer = calls.answer()
    # Read as a call it names no method that there is.
    assert answer.error.reason == pb.ERROR_REASON_INVALID_REQUEST


# ------------------------------------------------------------------ what ends one


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (struct.pack(">I", 2**32 - 1), pb.ERROR_REASON_OVERLOADED),
        (struct.pack(">I", FRAME_BYTES_MAX + 1) + b"x" * 100, pb.ERROR_REASON_OVERLOADED),
        (struct.pack(">I", FRAME_BYTES_MAX + 1) + bytes(FRAME_BYTES_MAX + 1), pb.ERROR_REASON_OVERLOADED),
        (framed(b"\xff" * 100), pb.ERROR_REASON_INVALID_REQUEST),
        (framed(b"\x0a\xff\xff\xff\xff\x0f"), pb.ERROR_REASON_INVALID_REQUEST),
        (2 * framed(pb.SocketCall(method="Stats").SerializeToString()), pb.ERROR_REASON_INVALID_REQUEST),
    ],
    ids=["longest length", "above the bound", "all of it above the bound", "no message", "bad length", "two calls"],
)
def test_a_frame_that_is_no_call_is_told_so_and_cut_off(
    daemon_thread: DaemonThread, witness: Connection, said: bytes, reason: int
) -> None:
    with no_descriptor_left():
        frames = CallFrames(daemon_thread.socket_dir, witness.token)
        with suppress(BrokenPipeError, ConnectionResetError):  # it has heard enough
            frames.socket.sendall(said)
        answer = frames.answer()
        assert (answer.error.reason, answer.last) == (reason, True)
        assert answer.error.message
        ends(frames)


@pytest.mark.parametrize(
    "said", [b"", b"\0", struct.pack(">I", 40), struct.pack(">I", FRAME_BYTES_MAX) + bytes(10_000)]
)
def test_half_a_frame_ends_with_its_connection(daemon_thread: DaemonThread, witness: Connection, said: bytes) -> None:
    with no_descriptor_left():
        frames = CallFrames(daemon_thread.socket_dir, witness.token)
        frames.socket.sendall(said)
        frames.close()
        none_is_left(daemon_thread)


def test_random_bytes_behind_a_good_hello(daemon_thread: DaemonThread, witness: Connection) -> None:
    with no_descriptor_left():
        for seed in range(150):
            pieces = [hello(witness.token), *random_pieces(seed, 3)]
            assert send_and_hang_up(memory_socket_path(daemon_thread.socket_dir), pieces)


def test_who_asks_and_does_not_read_is_cut_off(daemon_thread: DaemonThread, witness: Connection) -> None:
    with no_descriptor_left():
        frames = CallFrames(daemon_thread.socket_dir, witness.token)

        def ask_for_ever() -> None:
            while True:
                frames.begin("Lookup", LOOKUP)

        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            ask_for_ever()
        frames.close()
        assert witness.lookup(chain("witness", 5)).hit_blocks == 5


def test_descriptors_sent_to_the_daemon_are_not_kept(daemon_thread: DaemonThread, calls: CallFrames) -> None:
    with no_descriptor_left():
        descriptors = [os.memfd_create("unwanted") for _ in range(100)]
        socket.send_fds(calls.socket, [framed(LOOKUP_CALL)], descriptors)
        assert calls.answer().response
        for descriptor in descriptors:
            os.close(descriptor)


# -------------------------------------------------------------------- what does not


def test_a_call_in_single_bytes_is_as_good_as_any(calls: CallFrames) -> None:
    for byte in framed(LOOKUP_CALL):
        calls.socket.sendall(bytes([byte]))
    assert pb.LookupResponse.FromString(calls.answer().response).hit_blocks == 1


def test_a_call_may_come_in_one_piece_with_the_hello(daemon_thread: DaemonThread, witness: Connection) -> None:
    frames = CallFrames(daemon_thread.socket_dir, witness.token, behind=framed(LOOKUP_CALL))
    assert pb.LookupResponse.FromString(frames.answer().response).hit_blocks == 1
    frames.close()


@pytest.mark.parametrize("method", ["", "Nonsense", "Get", "Attach", "x" * 100_000])
def test_a_method_that_is_not_there_is_refused_and_nothing_else(calls: CallFrames, method: str) -> None:
    answer = calls.call(method, LOOKUP)
    assert (answer.error.reason, answer.error.field, answer.last) == (pb.ERROR_REASON_INVALID_REQUEST, "method", False)
    assert len(answer.error.message) < 300
    assert calls.call("Lookup", LOOKUP).response


@pytest.mark.parametrize("method", UNARY)
def test_a_call_whose_message_is_garbage(calls: CallFrames, method: str, caplog: pytest.LogCaptureFixture) -> None:
    for body in (b"\xff", b"\x0a\xff\xff\xff\xff\x0f", random.Random(method).randbytes(300)):
        answer = calls.call(method, body)
        assert (answer.error.reason, answer.error.field) == (pb.ERROR_REASON_INVALID_REQUEST, "message")
    assert calls.call("Lookup", LOOKUP).response
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_every_unary_method_of_the_contract_is_served(daemon_thread: DaemonThread) -> None:
    assert sorted(daemon_thread.daemon._control.unary) == UNARY


def test_a_call_that_takes_longer_than_it_may_is_cancelled(
    daemon_thread: DaemonThread, calls: CallFrames, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled: list[str] = []

    async def never(request: Any, context: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append("it was")
            raise

    with monkeypatch.context() as patched:
        patched.setitem(daemon_thread.daemon._control.unary, "Stats", UnaryMethod(never, waits=True))
        answer = calls.call("Stats", pb.StatsRequest(), timeout_ms=50)
    assert (answer.error.reason, answer.last) == (pb.ERROR_REASON_DEADLINE_EXCEEDED, False)
    assert cancelled == ["it was"]
    assert calls.call("Lookup", LOOKUP, timeout_ms=60_000).response


def test_a_frame_that_does_not_become_whole_is_cut_off(
    daemon_thread: DaemonThread, witness: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_socket, "FRAME_S", 0.02)
    with no_descriptor_left():
        for said in (b"\0", struct.pack(">I", 1000) + b"half of it"):
            frames = CallFrames(daemon_thread.socket_dir, witness.token)
            assert frames.call("Lookup", LOOKUP).response
            frames.socket.sendall(said)
            answer = frames.answer()
            assert (answer.error.reason, answer.last) == (pb.ERROR_REASON_OVERLOADED, True)
            ends(frames)
        none_is_left(daemon_thread)


def test_calls_that_wait_are_bounded(calls: CallFrames, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_socket, "CALLS_MAX", 0)
    assert calls.call("Release", pb.ReleaseRequest()).error.reason == pb.ERROR_REASON_OVERLOADED
    assert calls.call("Lookup", LOOKUP).response
    monkeypatch.setattr(call_socket, "CALLS_MAX", 1)
    for _ in range(3):
        assert calls.call("Release", pb.ReleaseRequest()).WhichOneof("outcome") == "response"


def test_who_is_hung_up_on_before_the_socket_is_taken_over_stays_so(
    daemon_thread: DaemonThread, witness: Connection
) -> None:
    connections = daemon_thread.daemon._calls

    def race() -> tuple[bool, int]:
        instance = connections.store.instances.of_token(witness.token)
        connection = connections.admit(instance.identity, witness.token)
        connections.hang_up(instance)
        transport = ClosedOrNot()
        connection.connection_made(transport)
        return transport.closed, len(connections)

    assert daemon_thread.on_loop(race) == (True, 0)


class ClosedOrNot(asyncio.BaseTransport):
    """A transport of no socket."""

    closed = False

    def close(self) -> None:
        self.closed = True
