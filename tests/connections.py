"""connections: the contract spoken by hand, so that a test can say what no well-behaved client would."""

from __future__ import annotations

import os
import queue
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc

import kvservice_client as kv
from kvservice_proto.v1 import kvservice_pb2 as pb
from kvservice_proto.v1 import kvservice_pb2_grpc

TOKEN_KEY = "kvservice-token-bin"
ERROR_KEY = "kvservice-error-bin"
TIMEOUT_S = 10.0
_LENGTH = struct.Struct(">I")


class CallFailed(Exception):
    """A call ended with a status; the detail is from the trailing metadata."""

    def __init__(self, code: grpc.StatusCode, detail: pb.ErrorDetail) -> None:
        super().__init__(f"{code.name}: {pb.ErrorReason.Name(detail.reason)}: {detail.message}")
        self.code = code
        self.detail = detail

    @property
    def is_ours(self) -> bool:
        """Whether it carried an ErrorDetail."""
        return self.detail.reason != pb.ERROR_REASON_UNSPECIFIED


def call_failed(error: grpc.RpcError) -> CallFailed:
    """What a failed RPC says."""
    details = [bytes(datum.value) for datum in error.trailing_metadata() or () if datum.key == ERROR_KEY]
    return CallFailed(error.code(), pb.ErrorDetail.FromString(details[0] if details else b""))


def memory_socket_path(socket_dir: str) -> str:
    return os.path.join(socket_dir, "memory.sock")


def control_socket_path(socket_dir: str) -> str:
    return os.path.join(socket_dir, "control.sock")


class FrameSocket:
    """The second Unix socket, frame by frame. Closing it is the hang-up."""

    def __init__(self, socket_dir: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(memory_socket_path(socket_dir))

    def send(self, request: pb.SocketRequest) -> None:
        body = request.SerializeToString()
        self.socket.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self) -> tuple[pb.SocketResponse, list[int]]:
        """The next frame and its descriptors. EOFError when the daemon hung up."""
        header, descriptors, _, _ = socket.recv_fds(self.socket, _LENGTH.size, 4)
        header += self._receive_exactly(_LENGTH.size - len(header))
        body = self._receive_exactly(_LENGTH.unpack(header)[0])
        return pb.SocketResponse.FromString(body), list(descriptors)

    def hello(self, lowest: int = 1, highest: int = 1) -> pb.SocketResponse:
        self.send(
            pb.SocketRequest(hello=pb.SocketHello(protocol_version_min=lowest, protocol_version_max=highest)),
        )
        return self.receive()[0]

    def segment(self, segment_id: int) -> tuple[pb.SocketResponse, list[int]]:
        self.send(pb.SocketRequest(segment=pb.SegmentRequest(segment_id=segment_id)))
        return self.receive()

    def close(self) -> None:
        self.socket.close()

    def _receive_exactly(self, size_bytes: int) -> bytes:
        received = b""
        while len(received) < size_bytes:
            part = self.socket.recv(size_bytes - len(received))
            if not part:
                raise EOFError("the daemon hung up")
            received += part
        return received


class CallFrames(FrameSocket):
    """A call connection of the process with that token, frame by frame.

    Args:
        behind: what to send in one piece with the hello.
    """

    def __init__(self, socket_dir: str, token: bytes, *, behind: bytes = b"") -> None:
        super().__init__(socket_dir)
        body = pb.SocketRequest(call_hello=pb.CallHello(token=token)).SerializeToString()
        self.socket.sendall(_LENGTH.pack(len(body)) + body + behind)
        self.welcome = self.receive()[0]

    def begin(self, method: str, request: Any, *, timeout_ms: int = 0) -> None:
        """Send a call; `request` may be bytes that are no message."""
        packed = request if isinstance(request, bytes) else request.SerializeToString()
        body = pb.SocketCall(method=method, request=packed, timeout_ms=timeout_ms).SerializeToString()
        self.socket.sendall(_LENGTH.pack(len(body)) + body)

    def answer(self) -> pb.SocketAnswer:
        """The next answer. EOFError when the daemon hung up."""
        (size_bytes,) = _LENGTH.unpack(self._receive_exactly(_LENGTH.size))
        return pb.SocketAnswer.FromString(self._receive_exactly(size_bytes))

    def call(self, method: str, request: Any, *, timeout_ms: int = 0) -> pb.SocketAnswer:
        """One call."""
        self.begin(method, request, timeout_ms=timeout_ms)
        return self.answer()


@dataclass
class Grant:
    """A mapped segment's descriptors and what the daemon says about it."""

    message: pb.SegmentGrant
    memory_fd: int
    generations_fd: int

    def close(self) -> None:
        os.close(self.memory_fd)
        os.close(self.generations_fd)


class Connection:
    """One process as the daemon sees it: a token, and at most one attachment. A context manager."""

    def __init__(self, socket_dir: str) -> None:
        self.frames = FrameSocket(socket_dir)
        self.token = self.frames.hello().welcome.token
        self.channel = grpc.insecure_channel(
            f"unix:{control_socket_path(socket_dir)}", options=(("grpc.use_local_subchannel_pool", 1),)
        )
        self.stub = kvservice_pb2_grpc.KVCacheServiceStub(self.channel)
        self._outgoing: queue.SimpleQueue[pb.AttachRequest | None] = queue.SimpleQueue()
        self.stream: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detach and hang up."""
        self.detach()
        self.channel.close()
        self.frames.close()

    def call(self, method: str, request: Any, *, token: bytes | None = None, timeout_s: float = TIMEOUT_S) -> Any:
        """One call; a stream's answers as a list. `token`: another one than ours; b"": none.

        Raises:
            CallFailed.
        """
        shown = self.token if token is None else token
        metadata = ((TOKEN_KEY, shown),) if shown else ()
        try:
            response = getattr(self.stub, method)(request, timeout=timeout_s, metadata=metadata)
            return list(response) if method == "Get" else response
        except grpc.RpcError as error:
            raise call_failed(error) from None

    def hello(self, namespaces: Sequence[pb.Namespace], *, lowest: int = 1, highest: int = 1) -> pb.Welcome:
        """Open the Attach stream with this hello.

        Raises:
            CallFailed.
        """
        message = pb.Hello(
            protocol_version_min=lowest,
            protocol_version_max=highest,
            instance_name="connection",
            namespaces=namespaces,
        )
        return self.open_stream(pb.AttachRequest(hello=message))

    def attach(self, *namespaces: kv.Namespace) -> pb.Welcome:
        """Attach to these. Raises CallFailed."""
        return self.hello([namespace.to_message() for namespace in namespaces])

    def attach_again(self, *namespaces: kv.Namespace) -> pb.Welcome:
        """End the stream, and attach to these as soon as the daemon has noticed."""
        self.detach()
        ends_at_s = time.monotonic() + TIMEOUT_S
        while True:
            try:
                return self.attach(*namespaces)
            except CallFailed as failed:
                if "attached already" not in failed.detail.message or time.monotonic() > ends_at_s:
                    raise

    def open_stream(self, *first: pb.AttachRequest) -> pb.Welcome:
        """Open the Attach stream with these messages, and wait for the welcome. Raises CallFailed."""
        self._outgoing = queue.SimpleQueue()
        for request in first:
            self._outgoing.put(request)
        self.stream = self._open(self._outgoing)
        try:
            response: pb.AttachResponse = next(self.stream)
        except grpc.RpcError as error:
            raise call_failed(error) from None
        return response.welcome

    def start_stream(self, namespace: pb.Namespace) -> Any:
        """Say hello on an Attach stream of its own, and wait for nothing; the call."""
        message = pb.Hello(protocol_version_min=1, protocol_version_max=1, namespaces=[namespace])
        outgoing: queue.SimpleQueue[pb.AttachRequest | None] = queue.SimpleQueue()
        outgoing.put(pb.AttachRequest(hello=message))
        call = self._open(outgoing)
        call.add_callback(lambda: outgoing.put(None))
        return call

    def _open(self, outgoing: queue.SimpleQueue[pb.AttachRequest | None]) -> Any:
        metadata = ((TOKEN_KEY, self.token),) if self.token else ()
        return self.stub.Attach(_until_none(outgoing), metadata=metadata)

    def ping(self) -> pb.AttachResponse:
        """Send a ping; the next message of the stream."""
        self._outgoing.put(pb.AttachRequest(ping=pb.Ping()))
        return self.next_message()

    def next_message(self) -> pb.AttachResponse:
        """Wait for the next message of the stream."""
        response: pb.AttachResponse = next(self.stream)
        return response

    def detach(self) -> None:
        """End the stream."""
        self._outgoing.put(None)
        if self.stream is not None:
            self.stream.cancel()
            self.stream = None

    def segment(self, segment_id: int) -> Grant:
        """A segment's descriptors."""
        response, descriptors = self.frames.segment(segment_id)
        assert response.WhichOneof("message") == "segment", response
        memory_fd, generations_fd = descriptors
        return Grant(response.segment, memory_fd, generations_fd)

    # ----------------------------------------------------- the calls in one line

    def put(
        self, hashes: Sequence[bytes], *, namespace_id: int = 1, parent: bytes = b"", **more: Any
    ) -> pb.PutResponse:
        request = pb.PutRequest(namespace_id=namespace_id, parent=parent, hashes=b"".join(hashes), **more)
        response: pb.PutResponse = self.call("Put", request)
        return response

    def commit(self, reservation_id: int, positions: Sequence[int] = ()) -> pb.CommitResponse:
        request = pb.CommitRequest(reservation_id=reservation_id, positions=positions)
        response: pb.CommitResponse = self.call("Commit", request)
        return response

    def abort(self, reservation_id: int) -> pb.AbortResponse:
        response: pb.AbortResponse = self.call("Abort", pb.AbortRequest(reservation_id=reservation_id))
        return response

    def lookup(self, hashes: Sequence[bytes], *, namespace_id: int = 1) -> pb.LookupResponse:
        request = pb.LookupRequest(namespace_id=namespace_id, hashes=b"".join(hashes))
        response: pb.LookupResponse = self.call("Lookup", request)
        return response

    def get(self, hashes: Sequence[bytes], *, namespace_id: int = 1, **more: Any) -> pb.GetResponse:
        request = pb.GetRequest(namespace_id=namespace_id, hashes=b"".join(hashes), **more)
        (response,) = self.call("Get", request)
        return response  # type: ignore[no-any-return]  # `call` is for every method

    def release(self, *lease_ids: int) -> pb.ReleaseResponse:
        response: pb.ReleaseResponse = self.call("Release", pb.ReleaseRequest(lease_ids=lease_ids))
        return response

    def save(self, hashes: Sequence[bytes], *, namespace_id: int = 1, parent: bytes = b"") -> None:
        """Put and commit without writing a byte, where only the books matter."""
        response = self.put(hashes, namespace_id=namespace_id, parent=parent)
        assert response.reservation_id, response
        self.commit(response.reservation_id)

    def is_checksummed(self, block_hash: bytes) -> bool:
        """Whether the block's checksum has been made: until then the daemon holds the block itself."""
        found: pb.ExplainResponse = self.call("Explain", pb.ExplainRequest(hash=block_hash))
        return found.explanations[0].held.checksummed


def _until_none(requests: queue.SimpleQueue[pb.AttachRequest | None]) -> Iterator[pb.AttachRequest]:
    while (request := requests.get()) is not None:
        yield request
