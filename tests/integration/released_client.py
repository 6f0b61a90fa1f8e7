"""released_client: a client built from the released contract alone, without a line of today's generated code."""

from __future__ import annotations

import mmap
import os
import queue
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

RELEASED = Path(__file__).parents[2] / "protos" / "kvservice" / "v1" / "released.binpb"
PACKAGE = "kvservice.v1"
_LENGTH = struct.Struct(">I")
_TIMEOUT_S = 10.0


class ReleasedContract:
    """The messages and methods as they were when they were released, in a pool of their own."""

    def __init__(self) -> None:
        files = descriptor_pb2.FileDescriptorSet.FromString(RELEASED.read_bytes())
        pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            pool.Add(file)
        self._pool = pool
        self.service: Any = pool.FindServiceByName(f"{PACKAGE}.KVCacheService")

    def message(self, name: str) -> Any:
        """The class of a message such as "PutRequest"."""
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))

    def value(self, enum: str, name: str) -> int:
        """The number of an enum's value."""
        return int(self._pool.FindEnumTypeByName(f"{PACKAGE}.{enum}").values_by_name[name].number)


class ReleasedClient:
    """One attached process. A context manager."""

    def __init__(self, socket_dir: str) -> None:
        self.contract = ReleasedContract()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.connect(f"{socket_dir}/memory.sock")
        hello = self.new("SocketHello", protocol_version_min=1, protocol_version_max=1)
        response, _ = self._exchange(self.new("SocketRequest", hello=hello))
        self._metadata = (("kvservice-token-bin", response.welcome.token),)
        self._channel = grpc.insecure_channel(
            f"unix:{socket_dir}/control.sock", options=(("grpc.use_local_subchannel_pool", 1),)
        )
        self._outgoing: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.stream: Any = None
        self._mapped: dict[int, tuple[mmap.mmap, mmap.mmap, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._outgoing.put(None)
        if self.stream is not None:
            self.stream.cancel()
        self._channel.close()
        self._socket.close()
        for memory, generations, _ in self._mapped.values():
            memory.close()
            generations.close()

    def new(self, message: str, **fields: Any) -> Any:
        """A message with these fields."""
        return self.contract.message(message)(**fields)

    def call(self, method: str, **fields: Any) -> Any:
        """One call; a stream's answers as a list. Raises grpc.RpcError."""
        described = self.contract.service.methods_by_name[method]
        kind: Any = self._channel.unary_stream if method == "Get" else self._channel.unary_unary
        stub = kind(
            f"/{PACKAGE}.KVCacheService/{method}",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=self.contract.message(described.output_type.name).FromString,
        )
        request = self.new(described.input_type.name, **fields)
        answered = stub(request, timeout=_TIMEOUT_S, metadata=self._metadata)
        return list(answered) if method == "Get" else answered

    def attach(self, **namespace: Any) -> Any:
        """Open the stream; the welcome."""
        hello = self.new(
            "Hello",
            protocol_version_min=1,
            protocol_version_max=1,
            instance_name="an engine of last year",
            namespaces=[self.new("Namespace", **namespace)],
        )
        attach: Any = self._channel.stream_stream(
            f"/{PACKAGE}.KVCacheService/Attach",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=self.contract.message("AttachResponse").FromString,
        )
        self._outgoing.put(self.new("AttachRequest", hello=hello))
        self.stream = attach(self._requests(), metadata=self._metadata)
        return next(self.stream).welcome

    def ping(self) -> str:
        """What the daemon sends back."""
        self._outgoing.put(self.new("AttachRequest", ping=self.new("Ping")))
        return str(next(self.stream).WhichOneof("message"))

    def slots(self, shared_memory: Any, size_bytes: int) -> list[memoryview]:
        """The blocks of a run, in place, after comparing their generations."""
        if shared_memory.segment_id not in self._mapped:
            self._mapped[shared_memory.segment_id] = self._map(shared_memory.segment_id)
        memory, generations, stride_bytes = self._mapped[shared_memory.segment_id]
        views = []
        for slot, generation in zip(shared_memory.slots, shared_memory.generations, strict=True):
            assert struct.unpack_from("<Q", generations, 8 * slot)[0] == generation
            views.append(memoryview(memory)[slot * stride_bytes : slot * stride_bytes + size_bytes])
        return views

    def _map(self, segment_id: int) -> tuple[mmap.mmap, mmap.mmap, int]:
        request = self.new("SocketRequest", segment=self.new("SegmentRequest", segment_id=segment_id))
        response, (memory_fd, generations_fd) = self._exchange(request)
        grant = response.segment
        memory = mmap.mmap(memory_fd, grant.size_bytes)
        generations = mmap.mmap(generations_fd, grant.generations_size_bytes, prot=mmap.PROT_READ)
        os.close(memory_fd)
        os.close(generations_fd)
        return memory, generations, grant.slot_stride_bytes

    def _requests(self) -> Iterator[Any]:
        while (request := self._outgoing.get()) is not None:
            yield request

    def _exchange(self, request: Any) -> tuple[Any, list[int]]:
        body = request.SerializeToString()
        self._socket.sendall(_LENGTH.pack(len(body)) + body)
        header, descriptors, _, _ = socket.recv_fds(self._socket, _LENGTH.size, 2)
        (size_bytes,) = _LENGTH.unpack(header)
        received = b""
        while len(received) < size_bytes:
            received += self._socket.recv(size_bytes - len(received))
        return self.contract.message("SocketResponse").FromString(received), list(descriptors)
