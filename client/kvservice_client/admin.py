"""Stats and Explain for people and tools: no namespace, no attachment."""

from __future__ import annotations

import grpc

from kvservice_client.calls import metadata_of, open_channel
from kvservice_client.errors import from_rpc
from kvservice_client.memory_socket import MemorySocket
from kvservice_client.namespace import default_socket_dir
from kvservice_proto.v1 import kvservice_pb2 as pb
from kvservice_proto.v1 import kvservice_pb2_grpc

_TIMEOUT_S = 5.0


def admin(socket_dir: str | None = None) -> Admin:
    """Connect to the daemon of that directory (None: `default_socket_dir()`).

    Raises:
        DaemonUnreachable, PermissionDenied, Overloaded, Draining.
    """
    return Admin(socket_dir or default_socket_dir())


class Admin:
    """A connection that only asks. A context manager."""

    def __init__(self, socket_dir: str) -> None:
        self._memory_socket = MemorySocket(socket_dir, timeout_s=_TIMEOUT_S)
        self._metadata = metadata_of(self._memory_socket.token)
        self._channel = open_channel(socket_dir)
        self._stub = kvservice_pb2_grpc.KVCacheServiceStub(self._channel)

    def stats(self) -> pb.StatsResponse:
        """The daemon's state and this tenant's namespaces. Raises KVServiceError."""
        try:
            response: pb.StatsResponse = self._stub.Stats(
                pb.StatsRequest(), timeout=_TIMEOUT_S, metadata=self._metadata
            )
            return response
        except grpc.RpcError as error:
            raise from_rpc(error) from None

    def explain(self, block_hash: bytes, *, fingerprint: bytes = b"") -> list[pb.Explanation]:
        """Why a hash is a hit or a miss, in one namespace or (b"") in all. Raises KVServiceError."""
        request = pb.ExplainRequest(hash=block_hash, fingerprint=fingerprint)
        try:
            response = self._stub.Explain(request, timeout=_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        return list(response.explanations)

    def close(self) -> None:
        """Hang up."""
        self._channel.close()
        self._memory_socket.close()

    def __enter__(self) -> Admin:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
