"""garbage: what no well-behaved client sends, and what must be left of it: nothing."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.waiting import DEADLINE_S, eventually


def framed(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def random_pieces(seed: int, count: int) -> Iterator[bytes]:
    chosen = random.Random(seed)
    for _ in range(count):
        yield chosen.randbytes(chosen.choice((1, 3, 4, 5, 50, 500, 70_000)))


def send_and_hang_up(path: str, pieces: Iterator[bytes] | list[bytes]) -> bytes:
    """Send the pieces, end our side, and return what came back until the daemon hung up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(DEADLINE_S)
        peer.connect(path)
        received = b""
        try:
            for piece in pieces:
                peer.sendall(piece)
            peer.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has heard enough; what it said first may still be there
        try:
            while part := peer.recv(65_536):
                received += part
        except ConnectionResetError:
            pass
        return received


def last_words(answer: bytes) -> pb.ErrorDetail:
    """The error in the one frame that the daemon sent before it hung up."""
    (size_bytes,) = struct.unpack(">I", answer[:4])
    assert len(answer) == 4 + size_bytes
    return pb.SocketResponse.FromString(answer[4:]).error


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Both ends are in this process: whatever either side forgets to close is still open here."""
    process = psutil.Process()
    before = process.num_fds()
    yield
    eventually(lambda: process.num_fds() <= before, what="every descriptor is closed")
