"""Unary calls over connections of the second Unix socket: the calling thread itself sends and receives.

gRPC in Python hands every call from thread to thread. Here a call is one frame and its answer on a connection that
nobody else uses meanwhile; there are as many connections as threads that ever called at the same time.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
import weakref

from google.protobuf.message import DecodeError

from kvservice_client.errors import (
    DaemonUnreachable,
    InvalidRequest,
    KVServiceError,
    Overloaded,
    deadline_exceeded,
    from_detail,
)
from kvservice_client.memory_socket import LENGTH, MEMORY_SOCKET, framed
from kvservice_proto.v1 import kvservice_pb2 as pb

CONNECTIONS_MAX = 32

_ANSWER_BYTES_MAX = 64 * 1024 * 1024
_RECEIVE_BYTES = 64 * 1024
_TIMEOUT_S_MAX = 1e6

_call_sockets: weakref.WeakSet[CallSocket] = weakref.WeakSet()


class NotOffered(Exception):
    """Nothing of the call was sent: make it over gRPC."""


class CallSocket:
    """The call connections of one link, made on demand; the last one used is the next. Thread-safe."""

    def __init__(self, socket_dir: str, token: bytes, *, connections_max: int = CONNECTIONS_MAX) -> None:
        """Connects nothing yet. `connections_max`: 0 where every call is to go over gRPC."""
        self._path = os.path.join(socket_dir, MEMORY_SOCKET)
        self._hello = pb.SocketRequest(call_hello=pb.CallHello(token=token))
        self._connections_max = connections_max
        self._is_closed = False
        self._lock = threading.Lock()
        self._connections: set[_Connection] = set()
        self._idle: list[_Connection] = []
        _call_sockets.add(self)

    def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        """The method's response, packed as the request is. Blocks.

        Raises:
            NotOffered: use gRPC. DeadlineExceeded, DaemonUnreachable: it is not known what became of the call.
            KVServiceError: the daemon's answer.
        """
        ends_at_s = time.monotonic() + timeout_s
        timeout_ms = math.ceil(1000 * min(max(timeout_s, 0.001), _TIMEOUT_S_MAX))
        frame = framed(pb.SocketCall(method=method, request=request, timeout_ms=timeout_ms))
        connection = self._take() or self._connect(ends_at_s)
        try:
            try:
                sent_bytes = connection.begin(frame, ends_at_s)
            except (BrokenPipeError, ConnectionResetError):
                # It ended while it was idle, and took nothing of the call.
                self._drop(connection)
                connection = self._connect(ends_at_s)
                sent_bytes = connection.begin(frame, ends_at_s)
            answer = pb.SocketAnswer.FromString(connection.finish(frame, sent_bytes, ends_at_s))
        except BaseException as error:
            # Whatever arrives on it from now on must not be taken for another call's answer.
            self._drop(connection)
            if isinstance(error, TimeoutError):
                raise deadline_exceeded() from None
            if isinstance(error, (OSError, DecodeError)):
                raise DaemonUnreachable(f"the daemon does not answer ({error})") from None
            raise
        if answer.last:
            self._drop(connection)
        else:
            self._give_back(connection)
        if answer.WhichOneof("outcome") == "error":
            raise from_detail(answer.error)
        return answer.response

    def close(self) -> None:
        """Hang up. Calls under way end as unanswered; later ones are not offered. May be called twice."""
        with self._lock:
            self._is_closed = True
            for connection in self._idle:
                connection.close()
            for connection in self._connections.difference(self._idle):
                connection.hang_up()  # closed by who uses it
            self._connections.difference_update(self._idle)
            self._idle.clear()

    def disown_after_fork(self) -> None:
        """In a forked child: the connections are the parent's, and so may be whoever held the lock."""
        self._lock = threading.Lock()
        self._is_closed, self._idle = True, []
        for connection in list(self._connections):
            connection.close()

    # ---------------------------------------------------------------- privately

    def _take(self) -> _Connection | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _give_back(self, connection: _Connection) -> None:
        with self._lock:
            if not self._is_closed:
                self._idle.append(connection)
                return
        self._drop(connection)

    def _connect(self, ends_at_s: float) -> _Connection:
        """Another connection.

        Raises:
            NotOffered: there are as many as there may be, or none can be made. DeadlineExceeded.
        """
        with self._lock:
            if self._is_closed or len(self._connections) >= self._connections_max:
                raise NotOffered
            try:
                connection = _Connection()
            except OSError:  # no descriptor is left
                raise NotOffered from None
            self._connections.add(connection)
        try:
            refusal = connection.open(self._path, self._hello, ends_at_s)
        except TimeoutError:
            self._drop(connection)
            raise deadline_exceeded() from None
        except (OSError, DecodeError):
            # Nobody answers: gRPC, whose connection is there already, says what is wrong, or goes on.
            self._drop(connection)
            raise NotOffered from None
        except BaseException:
            self._drop(connection)
            raise
        if refusal is None:
            return connection
        self._drop(connection)
        if isinstance(refusal, InvalidRequest):
            self._connections_max = 0  # a daemon from before there were call connections
        elif isinstance(refusal, Overloaded):
            self._connections_max = len(self._connections)  # no more than these, for as long as the link lasts
        else:
            raise refusal
        raise NotOffered

    def _drop(self, connection: _Connection) -> None:
        # Not while `close` hangs up on it: its descriptor's number may be another's as soon as it is closed.
        with self._lock:
            connection.close()
            self._connections.discard(connection)


class _Connection:
    """One connection; one thread at a time. What it raises leaves it broken."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)

    def open(self, path: str, hello: pb.SocketRequest, ends_at_s: float) -> KVServiceError | None:
        """Connect and say hello; the daemon's refusal, or None.

        Raises:
            OSError, TimeoutError, DecodeError.
        """
        self._wait_until(ends_at_s)
        self._socket.connect(path)
        frame = framed(hello)
        response = pb.SocketResponse.FromString(self.finish(frame, self.begin(frame, ends_at_s), ends_at_s))
        return from_detail(response.error) if response.WhichOneof("message") == "error" else None

    def begin(self, frame: bytes, ends_at_s: float) -> int:
        """Send the frame, or a part of it; how many bytes. After an error none were.

        Raises:
            OSError, TimeoutError.
        """
        self._wait_until(ends_at_s)
        return self._socket.send(frame, socket.MSG_NOSIGNAL)

    def finish(self, frame: bytes, sent_bytes: int, ends_at_s: float) -> bytes:
        """Send the rest; the frame that comes back.

        Raises:
            OSError, TimeoutError.
        """
        # What was begun set the socket's timeout; it is set anew only where more than one piece is sent or comes.
        try:
            while sent_bytes < len(frame):
                self._wait_until(ends_at_s)
                sent_bytes += self._socket.send(memoryview(frame)[sent_bytes:], socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the daemon has hung up; what it said before tells why
        received = b""
        missing_bytes = LENGTH.size
        while missing_bytes > 0:
            part = self._socket.recv(max(missing_bytes, _RECEIVE_BYTES))
            if not part:
                raise ConnectionResetError("it hung up")
            received += part
            missing_bytes = _missing_bytes(received)
            if missing_bytes > 0:
                self._wait_until(ends_at_s)
        if missing_bytes < 0:
            raise ConnectionAbortedError("it sent more than an answer")
        return received[LENGTH.size :]

    def hang_up(self) -> None:
        """From any thread: whoever waits on it waits no longer."""
        with contextlib.suppress(OSError):  # it is not connected, or closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _wait_until(self, ends_at_s: float) -> None:
        remaining_s = ends_at_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError
        self._socket.settimeout(remaining_s)


def _missing_bytes(received: bytes) -> int:
    """How much of the frame is still to come; negative where there is more than a frame."""
    if len(received) < LENGTH.size:
        return LENGTH.size - len(received)
    (size_bytes,) = LENGTH.unpack_from(received)
    if size_bytes > _ANSWER_BYTES_MAX:
        raise ConnectionAbortedError(f"an answer of {size_bytes} bytes")
    return LENGTH.size + int(size_bytes) - len(received)


def _disown_after_fork() -> None:
    for each in list(_call_sockets):
        each.disown_after_fork()


os.register_at_fork(after_in_child=_disown_after_fork)
