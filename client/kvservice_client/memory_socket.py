"""The second Unix socket: who this process is, its token, and the segments it may map."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import weakref

from google.protobuf.message import DecodeError

from kvservice_client.errors import DaemonUnreachable, InvalidRequest, KVServiceError, from_detail
from kvservice_client.memory import Segment
from kvservice_proto.v1 import kvservice_pb2 as pb

MEMORY_SOCKET = "memory.sock"
PROTOCOL_VERSION_MIN = 1
PROTOCOL_VERSION_MAX = 1

LENGTH = struct.Struct(">I")
"""What a frame begins with: how many bytes its message has."""


_open_sockets: weakref.WeakSet[MemorySocket] = weakref.WeakSet()
"""Every one of this process, also of links that are being made or are over and still in use."""


class MemorySocket:
    """The second Unix socket: requests one at a time, from any thread."""

    def __init__(self, socket_dir: str, *, timeout_s: float) -> None:
        """Connect and shake hands.

        Raises:
            DaemonUnreachable: nothing listens there. PermissionDenied, Overloaded, Draining.
        """
        path = os.path.join(socket_dir, MEMORY_SOCKET)
        self.is_broken = False
        """Whether an exchange was cut short: an answer that comes late would be taken for the next one's."""
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout_s)
        _open_sockets.add(self)
        try:
            self._socket.connect(path)
            hello = pb.SocketHello(protocol_version_min=PROTOCOL_VERSION_MIN, protocol_version_max=PROTOCOL_VERSION_MAX)
            response, _ = self._exchange(pb.SocketRequest(hello=hello))
        except OSError as error:
            self._socket.close()
            raise DaemonUnreachable(
                f"no daemon answers at {path} ({error}); start one with `kvservice serve --socket-dir {socket_dir}`, "
                "or name its directory"
            ) from error
        except KVServiceError:
            self._socket.close()
            raise
        except DecodeError as error:
            self._socket.close()
            raise DaemonUnreachable(f"what listens at {path} is no kvservice daemon") from error
        self.token = response.welcome.token

    def segment(self, segment_id: int) -> Segment:
        """Fetch and map a segment. Blocks.

        Raises:
            DaemonUnreachable: it was retired meanwhile, the daemon does not answer, or the system does not map it.
        """
        try:
            response, fds = self._exchange(pb.SocketRequest(segment=pb.SegmentRequest(segment_id=segment_id)))
            return _map(response.segment, fds, segment_id)
        except (InvalidRequest, OSError, DecodeError) as error:
            raise DaemonUnreachable(f"segment {segment_id} of the daemon's memory cannot be used: {error}") from error

    def device_progress(self, registration_id: int) -> tuple[int, int]:
        """The descriptor, the caller's from now on, and the size of a registration's progress words. Blocks.

        Raises:
            KVServiceError: the registration is gone. DaemonUnreachable: the daemon does not answer.
        """
        request = pb.SocketRequest(device_progress=pb.DeviceProgressRequest(registration_id=registration_id))
        try:
            response, fds = self._exchange(request)
        except (OSError, DecodeError) as error:
            raise DaemonUnreachable(f"the daemon does not hand out its progress words: {error}") from error
        if len(fds) != 1:
            for descriptor in fds:
                os.close(descriptor)
            raise DaemonUnreachable(f"the daemon sent {len(fds)} descriptors for its progress words")
        return fds[0], response.device_progress.size_bytes

    @property
    def is_hung_up(self) -> bool:
        """Whether the daemon's process has ended, or has hung up on this one."""
        if self._socket.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Hang up: this process touches the daemon's memory no more."""
        self._socket.close()

    def _exchange(self, request: pb.SocketRequest) -> tuple[pb.SocketResponse, list[int]]:
        fds: list[int] = []
        with self._lock:
            if self.is_broken:
                raise ConnectionResetError("an earlier exchange was cut short")
            self.is_broken = True  # until this one is complete
            # Where the daemon has hung up on us already, what it said before tells why.
            with contextlib.suppress(BrokenPipeError):
                self._socket.sendall(framed(request))
            try:
                header, fds, _, _ = socket.recv_fds(self._socket, LENGTH.size, 2, socket.MSG_CMSG_CLOEXEC)
                header += self._receive(LENGTH.size - len(header))
                response = pb.SocketResponse.FromString(self._receive(LENGTH.unpack(header)[0]))
            except BaseException:
                for descriptor in fds:
                    os.close(descriptor)
                raise
            self.is_broken = False
        if response.WhichOneof("message") == "error":
            raise from_detail(response.error)
        return response, list(fds)

    def _receive(self, size_bytes: int) -> bytes:
        received = b""
        while len(received) < size_bytes:
            part = self._socket.recv(size_bytes - len(received))
            if not part:
                raise ConnectionResetError("the daemon hung up")
            received += part
        return received


def framed(message: pb.SocketRequest | pb.SocketCall) -> bytes:
    """The message as this socket carries it."""
    body = message.SerializeToString()
    return LENGTH.pack(len(body)) + body


def _map(grant: pb.SegmentGrant, fds: list[int], segment_id: int) -> Segment:
    if len(fds) != 2 or grant.segment_id != segment_id:
        for descriptor in fds:
            os.close(descriptor)
        raise OSError(f"the daemon sent {len(fds)} descriptors of segment {grant.segment_id}")
    return Segment(
        segment_id, fds=fds, size_bytes=grant.size_bytes, stride_bytes=grant.slot_stride_bytes, slots=grant.slots
    )


def _hang_up_after_fork() -> None:
    # A child that kept one open would keep its parent alive in the daemon's eyes.
    for each in list(_open_sockets):
        each.close()


os.register_at_fork(after_in_child=_hang_up_after_fork)
