"""How calls reach the daemon: gRPC's channel, and for unary ones the call socket where the daemon offers it."""

from __future__ import annotations

import os
import time
from typing import Any

import grpc
import grpc.experimental
from google.protobuf.message import DecodeError

from kvservice_client.call_socket import CONNECTIONS_MAX, CallSocket, NotOffered
from kvservice_client.errors import DaemonUnreachable, from_rpc
from kvservice_proto.v1 import kvservice_pb2 as pb
from kvservice_proto.v1 import kvservice_pb2_grpc

CONTROL_SOCKET = "control.sock"
TOKEN_KEY = "kvservice-token-bin"

_MESSAGE_BYTES_MAX = 64 * 1024 * 1024
_METHODS = pb.DESCRIPTOR.services_by_name["KVCacheService"].methods
_RESPONSES: dict[str, Any] = {method.name: getattr(pb, method.output_type.name) for method in _METHODS}


class LinkEnded(DaemonUnreachable):
    """The channel was closed between being looked up and being used: grpc says ValueError then. Nothing was sent."""

    def __init__(self, error: ValueError) -> None:
        super().__init__(f"the attachment has ended; the client attaches again by itself ({error})")


class UnaryCalls:
    """The unary RPCs of one link, each by the fastest way there is. Thread-safe."""

    def __init__(
        self, socket_dir: str, token: bytes, channel: grpc.Channel, stub: kvservice_pb2_grpc.KVCacheServiceStub
    ) -> None:
        """Connects nothing yet."""
        self._stub = stub
        self._metadata = metadata_of(token)
        connections_max = CONNECTIONS_MAX if _is_plain(channel) else 0
        self._call_socket = CallSocket(socket_dir, token, connections_max=connections_max)

    def call(self, method: str, request: Any, timeout_s: float) -> Any:
        """The response. Blocks.

        Raises:
            KVServiceError. LinkEnded: nothing was sent.
        """
        ends_at_s = time.monotonic() + timeout_s
        try:
            packed = self._call_socket.call(method, request.SerializeToString(), timeout_s)
        except NotOffered:
            return self._call_grpc(method, request, ends_at_s - time.monotonic())
        try:
            return _RESPONSES[method].FromString(packed)
        except DecodeError as error:
            raise DaemonUnreachable(f"the daemon's answer is none ({error})") from None

    def close(self) -> None:
        """Hang up. The channel is its owner's."""
        self._call_socket.close()

    def _call_grpc(self, method: str, request: Any, timeout_s: float) -> Any:
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        except ValueError as error:
            raise LinkEnded(error) from None


def metadata_of(token: bytes) -> tuple[tuple[str, bytes]]:
    """What every RPC carries."""
    return ((TOKEN_KEY, token),)


def open_channel(socket_dir: str) -> grpc.Channel:
    """A channel of its own (not pooled with others of the process) to the daemon's gRPC socket."""
    return grpc.insecure_channel(
        f"unix:{os.path.join(os.path.abspath(socket_dir), CONTROL_SOCKET)}",
        options=(
            ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", _MESSAGE_BYTES_MAX),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
            # One thread fewer between a Get and its caller.
            (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),
        ),
    )


def _is_plain(channel: grpc.Channel) -> bool:
    """Whether nobody stands between: who intercepts gRPC's calls, to trace them say, is to see every one of them."""
    return type(channel).__module__ == "grpc._channel"
