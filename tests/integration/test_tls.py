"""TCP: mutual TLS, read-only, and a tenant that follows from the certificate."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from kvservice_proto.v1 import kvservice_pb2 as pb
from kvservice_proto.v1 import kvservice_pb2_grpc
from tests.blocks import chain, namespace
from tests.certificates import Authority, Certificate
from tests.connections import TOKEN_KEY, call_failed
from tests.daemons import DaemonProcess, DaemonThread
from tests.integration.books import Code, books, refused
from tests.integration.conftest import MakeConnection, MakeDaemon, MakeDaemonThread
from tests.integration.test_access import CALLS
from tests.integration.test_startup import fails_to_start
from tests.waiting import DEADLINE_S

pytestmark = pytest.mark.integration

DENIED = (Code.PERMISSION_DENIED, pb.ERROR_REASON_PERMISSION_DENIED)


@dataclass
class Trust:
    """An authority, and the knobs of a daemon that trusts it."""

    authority: Authority
    knobs: dict[str, str]

    @contextmanager
    def channel(self, port: int, client: Certificate | None, *, trusted: bytes = b"") -> Iterator[grpc.Channel]:
        """To the daemon, showing this certificate."""
        credentials = grpc.ssl_channel_credentials(
            trusted or self.authority.certificate,
            client.key if client else None,
            client.certificate if client else None,
        )
        with grpc.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
            yield channel


@pytest.fixture
def trust(tmp_path: Path) -> Trust:
    authority = Authority("authority of the test")
    certificate, key = authority.server().write(tmp_path, "server")
    authority_file = tmp_path / "authority.crt"
    authority_file.write_bytes(authority.certificate)
    knobs = {
        "tcp_address": "127.0.0.1:0",
        "tls_cert_file": str(certificate),
        "tls_key_file": str(key),
        "tls_client_ca_file": str(authority_file),
    }
    return Trust(authority, knobs)


def call(channel: grpc.Channel, method: str, request: Any, **more: Any) -> Any:
    """One call over TCP. Raises CallFailed."""
    try:
        stub = kvservice_pb2_grpc.KVCacheServiceStub(channel)
        if method == "Attach":
            return list(stub.Attach(iter([request]), timeout=DEADLINE_S, **more))
        response = getattr(stub, method)(request, timeout=DEADLINE_S, **more)
        return list(response) if method == "Get" else response
    except grpc.RpcError as error:
        raise call_failed(error) from None


def test_who_shows_a_trusted_certificate_may_ask_and_nothing_else(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection, trust: Trust
) -> None:
    daemon = make_daemon_thread(**trust.knobs)
    local = make_connection(daemon.socket_dir, namespace())
    local.save(chain("a", 3))
    before = books(daemon)
    attach = ("Attach", pb.AttachRequest(hello=pb.Hello(protocol_version_min=1, protocol_version_max=1)))
    with trust.channel(daemon.daemon.tcp_port, trust.authority.client("ops")) as channel:
        assert call(channel, "Stats", pb.StatsRequest()).state == "serving"
        assert call(channel, "Explain", pb.ExplainRequest(hash=chain("a", 1)[0])).explanations
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        assert "kvservice.v1.KVCacheService" in ProtoReflectionDescriptorDatabase(channel).get_services()
        # A token proves a local process; it opens nothing here.
        for metadata in ((), ((TOKEN_KEY, local.token),)):
            for method, request in (*CALLS, attach):
                if method not in {"Stats", "Explain"}:
                    refused(
                        lambda m=method, r=request, d=metadata: call(channel, m, r, metadata=d),  # type: ignore[misc]  # bound now
                        *DENIED,
                        says="Unix sockets",
                    )
    assert books(daemon) == before


def unreachable(daemon: DaemonProcess, channel: grpc.Channel) -> None:
    """The handshake fails; the daemon does not mind."""
    with pytest.raises(grpc.RpcError) as caught:
        kvservice_pb2_grpc.KVCacheServiceStub(channel).Stats(pb.StatsRequest(), timeout=DEADLINE_S)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert daemon.get("/readyz") == (200, "ok\n")


def test_who_shows_no_certificate_or_a_wrong_one_gets_no_connection(make_daemon: MakeDaemon, trust: Trust) -> None:
    daemon = make_daemon(**trust.knobs)
    port = int(daemon.event("ready")["tcp_port"])
    stranger = Authority("another authority")
    for wrong in (None, stranger.client("ops"), trust.authority.client("ops", days=-1)):
        with trust.channel(port, wrong) as channel:
            unreachable(daemon, channel)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as plain:
        unreachable(daemon, plain)
    # Nor does a client that trusts somebody else talk to this daemon.
    with trust.channel(port, trust.authority.client("ops"), trusted=stranger.certificate) as channel:
        unreachable(daemon, channel)
    for garbage in (b"", b"\0" * 1000, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x40\x00" + bytes(100)):
        with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as peer:
            peer.sendall(garbage)
    with trust.channel(port, trust.authority.client("ops")) as channel:
        assert call(channel, "Stats", pb.StatsRequest()).state == "serving"
    assert not daemon.errors


def test_the_common_name_decides_whose_blocks_are_seen(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection, trust: Trust
) -> None:
    tenants = {f"uid:{os.getuid()}": "team", "cn:ops": "team"}
    daemon: DaemonThread = make_daemon_thread(**trust.knobs, tenants=tenants)
    make_connection(daemon.socket_dir, namespace()).save(chain("a", 3))
    asked = pb.ExplainRequest(hash=chain("a", 1)[0])
    port = daemon.daemon.tcp_port
    with trust.channel(port, trust.authority.client("ops")) as channel:
        shown = call(channel, "Stats", pb.StatsRequest())
        assert [of.tenant for of in shown.namespaces] == ["team"]
        assert [of.tenant for of in shown.attached_instances] == ["team"]
        assert call(channel, "Explain", asked).explanations[0].WhichOneof("finding") == "held"
    for other in ("guest", "team", f"uid:{os.getuid()}", "ops ", "ünïcödé"):
        with trust.channel(port, trust.authority.client(other)) as channel:
            shown = call(channel, "Stats", pb.StatsRequest())
            assert (list(shown.namespaces), list(shown.attached_instances)) == ([], [])
            assert call(channel, "Explain", asked).explanations[0].WhichOneof("finding") == "not_remembered"
    with trust.channel(port, trust.authority.client("")) as channel:
        refused(
            lambda: call(channel, "Stats", pb.StatsRequest()),
            Code.UNAUTHENTICATED,
            pb.ERROR_REASON_UNAUTHENTICATED,
            says="common name",
        )


def test_tls_knobs_that_cannot_work_are_named_at_startup(short_path: Path, trust: Trust) -> None:
    directory = short_path / "daemon"
    for missing in ("tls_cert_file", "tls_key_file", "tls_client_ca_file"):
        knobs = {name: value for name, value in trust.knobs.items() if name != missing}
        assert missing in fails_to_start(directory, **knobs)
        assert f"cannot read {short_path}/nothing" in fails_to_start(
            directory, **(trust.knobs | {missing: f"{short_path}/nothing"})
        )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"cannot listen on tcp_address {address}" in fails_to_start(
            directory, **(trust.knobs | {"tcp_address": address})
        )
    (short_path / "garbage").write_text("no certificate at all")
    Authority("another").server().write(short_path, "another")
    said = fails_to_start(directory, **(trust.knobs | {"tls_key_file": str(short_path / "another.key")}))
    assert "tls_key_file" in said, "a key of another certificate"
    for name in ("tls_cert_file", "tls_key_file", "tls_client_ca_file"):
        said = fails_to_start(directory, **(trust.knobs | {name: str(short_path / "garbage")}))
        assert name in said, said
