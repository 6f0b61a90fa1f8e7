"""Whatever arrives on the sockets, the daemon answers or hangs up, loses nothing, and serves everybody else."""

from __future__ import annotations

import logging
import os
import random
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import grpc
import pytest

from kvservice import fd_socket
from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.blocks import chain, namespace
from tests.connections import TOKEN_KEY, Connection, FrameSocket, call_failed, control_socket_path, memory_socket_path
from tests.daemons import DaemonThread
from tests.garbage import framed, last_words, no_descriptor_left, random_pieces, send_and_hang_up
from tests.integration.conftest import MakeConnection, MakeDaemon, MakeDaemonThread
from tests.waiting import DEADLINE_S, eventually

pytestmark = pytest.mark.integration

HELLO = pb.SocketRequest(hello=pb.SocketHello(protocol_version_min=1, protocol_version_max=1)).SerializeToString()
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


# --------------------------------------------------------------- memory socket


@pytest.mark.parametrize(
    ("said", "field"),
    [
        (struct.pack(">I", 2**32 - 1), "frame"),
        (struct.pack(">I", 64 * 1024 + 1) + b"x" * 100, "frame"),
        (framed(b""), "hello"),
        (framed(pb.SocketRequest(segment=pb.SegmentRequest(segment_id=1)).SerializeToString()), "hello"),
        (framed(b"\x0a\x04\x08\x09\x10\x09"), "protocol_version"),
    ],
    ids=["longest length", "length above the bound", "empty frame", "no hello", "another version"],
)
def test_a_first_frame_that_is_no_hello_is_told_so_and_cut_off(
    daemon_thread: DaemonThread, witness: Connection, said: bytes, field: str
) -> None:
    with no_descriptor_left():
        error = last_words(send_and_hang_up(memory_socket_path(daemon_thread.socket_dir), [said]))
        assert error.reason == pb.ERROR_REASON_INVALID_REQUEST
        assert error.field == field
        assert error.message


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\0",
        struct.pack(">I", 40),
        struct.pack(">I", 64 * 1024) + b"x" * 1000,
        framed(HELLO)[:-1],
        framed(b"\xff" * 100),
        framed(b"\x0a\xff\xff\xff\xff\x0f"),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[:4],
    ],
)
def test_half_a_frame_and_what_is_no_message_end_the_connection(
    daemon_thread: DaemonThread, witness: Connection, said: bytes
) -> None:
    with no_descriptor_left():
        answer = send_and_hang_up(memory_socket_path(daemon_thread.socket_dir), [said])
    assert answer == b"" or last_words(answer).reason == pb.ERROR_REASON_INVALID_REQUEST


def test_random_bytes_on_the_memory_socket(daemon_thread: DaemonThread, witness: Connection) -> None:
    with no_descriptor_left():
        for seed in range(150):
            send_and_hang_up(memory_socket_path(daemon_thread.socket_dir), random_pieces(seed, 3))
        for seed in range(50):  # behind a good hello: garbage from somebody who is known
            pieces = [framed(HELLO), *random_pieces(seed, 3)]
            assert send_and_hang_up(memory_socket_path(daemon_thread.socket_dir), pieces)


def test_a_hello_in_single_bytes_is_as_good_as_any(daemon_thread: DaemonThread, witness: Connection) -> None:
    pieces = [bytes([byte]) for byte in framed(HELLO)]
    answer = send_and_hang_up(memory_socket_path(daemon_thread.socket_dir), pieces)
    assert pb.SocketResponse.FromString(answer[4:]).welcome.token


def test_only_segment_requests_may_follow_the_hello(daemon_thread: DaemonThread, witness: Connection) -> None:
    with no_descriptor_left():
        for body in (HELLO, b""):
            frames = FrameSocket(daemon_thread.socket_dir)
            assert frames.hello().welcome.token
            frames.socket.sendall(framed(body))
            answer, _ = frames.receive()
            assert (answer.error.reason, answer.error.field) == (pb.ERROR_REASON_INVALID_REQUEST, "segment")
            with pytest.raises(EOFError):
                frames.receive()
            frames.close()


def test_who_says_nothing_is_cut_off_and_holds_up_nobody(
    daemon_thread: DaemonThread, witness: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fd_socket, "_HELLO_TIMEOUT_S", 0.2)
    with no_descriptor_left():
        silent = [FrameSocket(daemon_thread.socket_dir) for _ in range(50)]
        for frames in silent[::2]:
            frames.socket.sendall(framed(HELLO)[:7])
        assert witness.lookup(chain("witness", 5)).hit_blocks == 5
        for frames in silent:
            with pytest.raises(EOFError):
                frames.receive()
            frames.close()


def test_descriptors_sent_to_the_daemon_are_not_kept(daemon_thread: DaemonThread, witness: Connection) -> None:
    with no_descriptor_left():
        frames = FrameSocket(daemon_thread.socket_dir)
        descriptors = [os.memfd_create("unwanted") for _ in range(100)]
        socket.send_fds(frames.socket, [framed(HELLO)], descriptors)
        assert frames.receive()[0].welcome.token
        for descriptor in descriptors:
            os.close(descriptor)
        frames.close()


def test_who_asks_and_does_not_read_is_cut_off(daemon_thread: DaemonThread, witness: Connection) -> None:
    with no_descriptor_left(), Connection(daemon_thread.socket_dir) as greedy:
        segment_id = greedy.attach(namespace()).segment_ids[0]
        wanted = framed(pb.SocketRequest(segment=pb.SegmentRequest(segment_id=segment_id)).SerializeToString())

        def ask_for_ever() -> None:
            while True:
                greedy.frames.socket.sendall(wanted)

        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            ask_for_ever()
        assert witness.lookup(chain("witness", 5)).hit_blocks == 5


def test_more_connections_than_descriptors_do_not_end_the_daemon(
    make_daemon: MakeDaemon, make_connection: MakeConnection
) -> None:
    daemon = make_daemon(descriptors_max=64)
    connection = make_connection(daemon.socket_dir, namespace())
    connection.save(chain("a", 3))
    with ExitStack() as crowd:
        for path in (memory_socket_path(daemon.socket_dir), control_socket_path(daemon.socket_dir)):
            for _ in range(80):
                peer = crowd.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                peer.setblocking(False)
                try:
                    peer.connect(path)
                except BlockingIOError:
                    break  # the queue of those who wait is full
        daemon.wait_event("cannot_accept")
        assert connection.lookup(chain("a", 3)).hit_blocks == 3
    eventually(lambda: make_connection(daemon.socket_dir, namespace()).lookup(chain("a", 3)).hit_blocks == 3)
    assert daemon.get("/readyz") == (200, "ok\n")
    assert not daemon.errors


# -------------------------------------------------------------- control socket


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\0",
        b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /kvservice.v1.KVCacheService/Stats HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        PREFACE[:10],
        PREFACE,
        PREFACE + b"\xff" * 1000,
        PREFACE + bytes(9) + bytes(9),
        PREFACE + struct.pack(">I", 2**24 - 1)[1:] + b"\x01\x04\0\0\0\1" + b"\x80" * 5000,
        framed(HELLO),
    ],
)
def test_what_is_no_grpc_on_the_control_socket(daemon_thread: DaemonThread, witness: Connection, said: bytes) -> None:
    with no_descriptor_left():
        send_and_hang_up(control_socket_path(daemon_thread.socket_dir), [said])


def test_random_bytes_on_the_control_socket(daemon_thread: DaemonThread, witness: Connection) -> None:
    with no_descriptor_left():
        for seed in range(60):
            prefix = [PREFACE, bytes.fromhex("000000040000000000")] if seed % 2 else []
            send_and_hang_up(control_socket_path(daemon_thread.socket_dir), [*prefix, *random_pieces(seed, 3)])


def test_many_who_say_nothing_on_the_control_socket(daemon_thread: DaemonThread, witness: Connection) -> None:
    with no_descriptor_left():
        silent = []
        for _ in range(100):
            peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            peer.connect(control_socket_path(daemon_thread.socket_dir))
            silent.append(peer)
        assert witness.lookup(chain("witness", 5)).hit_blocks == 5
        for peer in silent:
            peer.close()


METHODS = sorted(pb.DESCRIPTOR.services_by_name["KVCacheService"].methods_by_name)


@pytest.mark.parametrize("method", [*METHODS, "Nonsense"])
def test_a_call_whose_message_is_garbage(
    daemon_thread: DaemonThread, witness: Connection, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    garbage = [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", random.Random(method).randbytes(300)]
    garbage = [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", random.Random(method).randbytes(300)]
    for body in garbage:
        with pytest.raises(grpc.RpcError) as caught:
            call(witness, method, body)
        failed = call_failed(caught.value)
        if method == "Nonsense":
            assert failed.code is grpc.StatusCode.UNIMPLEMENTED
        else:
            assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
            assert failed.detail.reason == pb.ERROR_REASON_INVALID_REQUEST
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def call(connection: Connection, method: str, body: bytes) -> None:
    """Call the method with these bytes in place of a message."""
    path = f"/kvservice.v1.KVCacheService/{method}"
    metadata = ((TOKEN_KEY, connection.token),)
    if method == "Attach":
        call_stream: Any = connection.channel.stream_stream(path)
        list(call_stream(iter([body]), timeout=DEADLINE_S, metadata=metadata))
    elif method == "Get":
        call_get: Any = connection.channel.unary_stream(path)
        list(call_get(body, timeout=DEADLINE_S, metadata=metadata))
    else:
        call_unary: Any = connection.channel.unary_unary(path)
        call_unary(body, timeout=DEADLINE_S, metadata=metadata)


def test_garbage_from_many_at_once_while_others_work(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection
) -> None:
    daemon = make_daemon_thread()
    connection = make_connection(daemon.socket_dir, namespace())
    stop = threading.Event()

    def pester(path: str, seed: int) -> Callable[[], None]:
        def run() -> None:
            while not stop.is_set():
                send_and_hang_up(path, random_pieces(seed, 2))

        return run

    paths = [memory_socket_path(daemon.socket_dir), control_socket_path(daemon.socket_dir)]
    threads = [threading.Thread(target=pester(paths[seed % 2], seed)) for seed in range(6)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(60):
            connection.save(chain(f"turn {turn}", 4))
            assert connection.lookup(chain(f"turn {turn}", 4)).hit_blocks == 4
    finally:
        stop.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    eventually(lambda: daemon.on_loop(lambda: len(daemon.store.instances)) == 1)
    daemon.check()
