"""fd_socket: the second Unix socket: who a process is, its token, and its segments' descriptors.

gRPC shows no Unix peer's uid and carries no descriptors; this socket does both. It stays open for
the life of the client: its hang-up is the proof that the process touches no memory any more, and
only then do the slots of what it held come back. A connection that begins with CallHello is
one for calls instead, and goes to `call_socket`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct

from google.protobuf.message import DecodeError

from kvservice.call_socket import LENGTH, CallConnections, framed
from kvservice.config import Config
from kvservice.dram import Segment
from kvservice.errors import InvalidRequest, KVServiceError, PermissionDenied
from kvservice.instances import Identity
from kvservice.logs import event_log
from kvservice.metrics import Metrics
from kvservice.service.calls import error_detail
from kvservice.service.control import agreed_version
from kvservice.store import Peer, Store
from kvservice_proto.v1 import kvservice_pb2 as pb

_HELLO_TIMEOUT_S = 5.0
_ACCEPT_RETRY_S = 0.1
_FRAME_BYTES_MAX = 64 * 1024
_PEERCRED = struct.Struct("3i")

_log = event_log(__name__)


class FdSocket:
    """Listens on a path; one task for each connected process."""

    def __init__(
        self, path: str, store: Store, config: Config, metrics: Metrics, calls: CallConnections, *, epoch: str
    ) -> None:
        self._path = path
        self._store = store
        self._calls = calls
        self._metrics = metrics
        self._epoch = epoch
        self._allowed_uids = frozenset(config.allowed_uids) or frozenset({os.getuid()})
        self._allowed_gids = frozenset(config.allowed_gids)
        self._connections: set[asyncio.Task[None]] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._listener.setblocking(False)  # noqa: FBT003  # the standard library's signature

    def listen(self) -> None:
        """Bind and listen. Raises OSError."""
        self._listener.bind(self._path)
        self._listener.listen(128)

    async def run(self) -> None:
        """Accept until cancelled; then hang up on everybody."""
        try:
            while True:
                peer = await self._accept()
                connection = asyncio.create_task(self._serve(peer))
                self._connections.add(connection)
                connection.add_done_callback(self._connections.discard)
        finally:
            self._listener.close()
            for connection in self._connections:
                connection.cancel()

    async def _accept(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        while True:
            try:
                peer, _ = await loop.sock_accept(self._listener)
            except OSError as error:
                # Out of descriptors, say: no reason to hang up on those who are connected.
                _log.warning("cannot_accept", why=str(error), retry_s=_ACCEPT_RETRY_S)
                await asyncio.sleep(_ACCEPT_RETRY_S)
            else:
                return peer

    async def _serve(self, peer: socket.socket) -> None:
        instance: Peer | None = None
        try:
            with peer:
                peer.setblocking(False)  # noqa: FBT003  # the standard library's signature
                identity = self._identify(peer)
                async with asyncio.timeout(_HELLO_TIMEOUT_S):
                    request = await _receive(peer)
                if request is not None and request.WhichOneof("message") == "call_hello":
                    await self._welcome_calls(peer, identity, request.call_hello.token)
                    return
                instance = self._welcome(peer, identity, request)
                while (request := await _receive(peer)) is not None:
                    self._grant(peer, instance, request)
        except KVServiceError:
            pass  # it has been told
        except (OSError, EOFError, TimeoutError, DecodeError) as error:
            _log.info("connection_broken", why=str(error) or type(error).__name__)
        finally:
            if instance is not None:
                self._store.hang_up(instance)
                self._calls.hang_up(instance)

    def _identify(self, peer: socket.socket) -> Identity:
        """Whom the kernel says it is, if that may connect.

        Raises:
            PermissionDenied: told to the peer, counted and logged.
        """
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        process_id, uid, gid = _PEERCRED.unpack(credentials)
        if uid in self._allowed_uids or gid in self._allowed_gids:
            return Identity(f"uid:{uid}", process_id)
        self._metrics.refused_peers.inc()
        _log.warning("peer_refused", uid=uid, gid=gid, process_id=process_id)
        raise _tell(peer, PermissionDenied(f"uid {uid} and gid {gid} are not in allowed_uids / allowed_gids"))

    def _welcome(self, peer: socket.socket, identity: Identity, request: pb.SocketRequest | None) -> Peer:
        if request is None or request.WhichOneof("message") != "hello":
            raise _tell(peer, InvalidRequest("the first frame must be SocketHello or CallHello", field="hello"))
        try:
            agreed_version(request.hello.protocol_version_min, request.hello.protocol_version_max)
            instance = self._store.connect(identity)
        except KVServiceError as error:
            raise _tell(peer, error) from None
        welcome = pb.SocketWelcome(token=instance.token, daemon_epoch=self._epoch)
        _send(peer, pb.SocketResponse(welcome=welcome))
        return instance

    async def _welcome_calls(self, peer: socket.socket, identity: Identity, token: bytes) -> None:
        """Make it a call connection, which from then on has the socket."""
        try:
            connection = self._calls.admit(identity, token)
        except KVServiceError as error:
            raise _tell(peer, error) from None
        try:
            _send(peer, pb.SocketResponse(call_welcome=pb.CallWelcome()))
        except OSError:
            self._calls.left(connection)
            raise
        await connection.take_over(socket.socket(fileno=peer.detach()))

    def _grant(self, peer: socket.socket, instance: Peer, request: pb.SocketRequest) -> None:
        match request.WhichOneof("message"):
            case "segment":
                self._grant_segment(peer, instance, request)
            case "device_progress":
                self._grant_progress(peer, instance, request.device_progress.registration_id)
            case _:
                raise _tell(
                    peer,
                    InvalidRequest(
                        "only SegmentRequest and DeviceProgressRequest may follow the hello", field="segment"
                    ),
                )

    def _grant_progress(self, peer: socket.socket, instance: Peer, registration_id: int) -> None:
        try:
            registration = self._store.device_copies.plane.find(instance.instance_id, registration_id)
        except KVServiceError as error:
            _send(peer, pb.SocketResponse(error=error_detail(error, where="fd_socket")[1]))
            return
        progress = registration.progress
        grant = pb.DeviceProgressGrant(registration_id=registration_id, size_bytes=progress.size_bytes)
        _send(peer, pb.SocketResponse(device_progress=grant), fds=(progress.descriptor,))

    def _grant_segment(self, peer: socket.socket, instance: Peer, request: pb.SocketRequest) -> None:
        found = self._find_segment(instance, request.segment.segment_id)
        if found is None:
            # Also where it belongs to someone else, or was retired while the request was under way.
            error = InvalidRequest(f"no segment {request.segment.segment_id} in your namespaces", field="segment_id")
            _send(peer, pb.SocketResponse(error=error_detail(error, where="fd_socket")[1]))
            return
        namespace_id, segment = found
        grant = pb.SegmentGrant(
            segment_id=segment.segment_id,
            namespace_id=namespace_id,
            size_bytes=segment.size_bytes,
            slot_stride_bytes=segment.stride_bytes,
            slots=segment.slots,
            generations_size_bytes=segment.slots * 8,
        )
        _send(peer, pb.SocketResponse(segment=grant), fds=(segment.memory_fd, segment.generations_fd))

    def _find_segment(self, instance: Peer, segment_id: int) -> tuple[int, Segment] | None:
        for namespace_id, namespace in enumerate(instance.namespaces, start=1):
            for _, segment in namespace.pool.live_segments():
                if segment.segment_id == segment_id:
                    return namespace_id, segment
        return None


async def _receive(peer: socket.socket) -> pb.SocketRequest | None:
    """The next frame; None when the peer hung up between frames.

    Raises:
        EOFError: it hung up in a frame. InvalidRequest: told to the peer. DecodeError, OSError.
    """
    header = await _receive_exactly(peer, LENGTH.size, or_nothing=True)
    if header is None:
        return None
    (size_bytes,) = LENGTH.unpack(header)
    if size_bytes > _FRAME_BYTES_MAX:
        raise _tell(peer, InvalidRequest(f"a frame of {size_bytes} bytes, at most {_FRAME_BYTES_MAX}", field="frame"))
    body = await _receive_exactly(peer, size_bytes)
    return pb.SocketRequest.FromString(body or b"")


async def _receive_exactly(peer: socket.socket, size_bytes: int, *, or_nothing: bool = False) -> bytes | None:
    loop = asyncio.get_running_loop()
    received = bytearray()
    while len(received) < size_bytes:
        part = await loop.sock_recv(peer, size_bytes - len(received))
        if not part:
            if or_nothing and not received:
                return None
            raise EOFError("the peer hung up in the middle of a frame")
        received += part
    return bytes(received)


def _send(peer: socket.socket, response: pb.SocketResponse, *, fds: tuple[int, ...] = ()) -> None:
    """One small frame; a peer that lets them pile up until the socket is full is cut off (OSError)."""
    frame = framed(response)
    if socket.send_fds(peer, [frame], fds) != len(frame):
        raise OSError("the peer does not read what it asks for")


def _tell(peer: socket.socket, error: KVServiceError) -> KVServiceError:
    """Send the error to the peer as its last frame; returns it to be raised."""
    try:
        _send(peer, pb.SocketResponse(error=error_detail(error, where="fd_socket")[1]))
    except OSError:
        _log.info("peer_left_before_its_error", error=str(error))
    return error
