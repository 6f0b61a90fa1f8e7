"""The gRPC servers: the Unix socket for engines, TCP with mutual TLS for observers."""

from __future__ import annotations

from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from kvservice.config import Config
from kvservice.errors import StartupError
from kvservice_proto.v1 import kvservice_pb2, kvservice_pb2_grpc

SERVICE_NAME = kvservice_pb2.DESCRIPTOR.services_by_name["KVCacheService"].full_name

_CONCURRENT_RPCS_MAX = 4096


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
        maximum_concurrent_rpcs=_CONCURRENT_RPCS_MAX,
        options=(
            ("grpc.max_receive_message_length", message_bytes_max),
            ("grpc.max_send_message_length", message_bytes_max),
            ("grpc.so_reuseport", 0),
        ),
    )
    kvservice_pb2_grpc.add_KVCacheServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
    names = (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return server


def listen_tls(server: grpc.aio.Server, config: Config) -> int:
    """Listen on `tcp_address` for clients whose certificate the CA signed; returns the port.

    Raises:
        StartupError: a file cannot be read, or the address cannot be bound.
    """
    key, certificate, authority = (
        _read(path) for path in (config.tls_key_file, config.tls_cert_file, config.tls_client_ca_file)
    )
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
