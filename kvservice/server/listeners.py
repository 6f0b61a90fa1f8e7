"""The gRPC servers: the Unix socket for engines, TCP with mutual TLS for observers."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from kvservice.config import Config
from kvservice.errors import StartupError
from kvservice.service.calls import CALLS_MAX, Malformed
from kvservice_proto.v1 import kvservice_pb2, kvservice_pb2_grpc

SERVICE_NAME = kvservice_pb2.DESCRIPTOR.services_by_name["KVCacheService"].full_name


class Health:
    """grpc.health.v1 for the whole server ("") and for the service, always the same answer."""

    def __init__(self) -> None:
        self.servicer = health_aio.HealthServicer()

    async def set(self, *, serving: bool) -> None:
        """Answer SERVING or NOT_SERVING from now on."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE_NAME):
            await self.servicer.set(name, status)


def make_server(
    servicer: kvservice_pb2_grpc.KVCacheServiceServicer, health: Health, *, message_bytes_max: int
) -> grpc.aio.Server:
    """A server of the contract, health and reflection, not listening yet."""
    server = grpc.aio.server(
        maximum_concurrent_rpcs=CALLS_MAX,
        options=(
            ("grpc.max_receive_message_length", message_bytes_max),
            ("grpc.max_send_message_length", message_bytes_max),
            ("grpc.so_reuseport", 0),
        ),
    )
    kvservice_pb2_grpc.add_KVCacheServiceServicer_to_server(servicer, _Registrar(server))
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    names = (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return server


class _Registrar:
    """Takes the place of a server while generated code adds the service to it.

    A request that is no message then reaches the service, which refuses it in the contract's words; gRPC itself would
    answer with the exception's text, and log a traceback for whatever anybody sends.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """The same handlers come below, by name."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        tolerant = {method: _tolerant(handler) for method, handler in handlers.items()}
        # Found by name, not registered: gRPC's event loop builds and looks through one waiter per registered method for
        # every call.
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, tolerant),))


def _tolerant(handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler, with `Malformed` where a request cannot be parsed."""

    def parse(packed: bytes) -> Any:
        try:
            return handler.request_deserializer(packed)
        except DecodeError as error:
            return Malformed(str(error))

    codec = {"request_deserializer": parse, "response_serializer": handler.response_serializer}
    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(handler.stream_stream, **codec)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(handler.unary_stream, **codec)
    return grpc.unary_unary_rpc_method_handler(handler.unary_unary, **codec)


def listen_tls(server: grpc.aio.Server, config: Config) -> int:
    """Listen on `tcp_address` for clients whose certificate the CA signed; returns the port.

    Raises:
        StartupError: a file cannot be read or is not what it should be, or the address cannot be bound.
    """
    key, certificate, authority = (
        _read(path) for path in (config.tls_key_file, config.tls_cert_file, config.tls_client_ca_file)
    )
    _require_usable(config)
    credentials = grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=authority, require_client_auth=True
    )
    try:
        port: int = server.add_secure_port(config.tcp_address, credentials)
    except RuntimeError as error:
        raise StartupError(f"cannot listen on tcp_address {config.tcp_address}: {error}") from error
    return port


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}") from error


def _require_usable(config: Config) -> None:
    """Name the file that is wrong: gRPC says only that it cannot bind the address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An empty password, so that an encrypted key is an error and not a prompt.
        context.load_cert_chain(config.tls_cert_file, config.tls_key_file, password="")
    except ssl.SSLError as error:
        raise StartupError(
            f"tls_cert_file {config.tls_cert_file} and tls_key_file {config.tls_key_file} are not a PEM certificate "
            f"and its unencrypted key: {error}"
        ) from error
    try:
        context.load_verify_locations(config.tls_client_ca_file)
    except ssl.SSLError as error:
        raise StartupError(
            f"tls_client_ca_file {config.tls_client_ca_file} holds no PEM certificate: {error}"
        ) from error
