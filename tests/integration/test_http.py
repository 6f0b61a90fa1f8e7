"""The HTTP port answers real requests, survives garbage and slow peers, and never holds more than it promised."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import json
import logging
import socket
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from kvservice import http as room
from kvservice import logs
from kvservice.errors import StartupError
from kvservice.http import HttpServer, Verdict
from kvservice.metrics import Metrics
from tests.waiting import eventually

pytestmark = pytest.mark.integration


@dataclass
class Health:
    """Verdicts that a test changes; a failure to have one is an exception."""

    live: Verdict | Exception = field(default_factory=lambda: Verdict(ok=True))
    ready: Verdict | Exception = field(default_factory=lambda: Verdict(ok=True))

    def answer(self, name: str) -> Verdict:
        verdict: Verdict | Exception = getattr(self, name)
        if isinstance(verdict, Exception):
            raise verdict
        return verdict


@dataclass
class Serving:
    address: str
    metrics: Metrics
    health: Health

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def send(self, request: bytes) -> bytes:
        """What comes back for raw bytes, until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            # Refused early, it may be closed already at any of these; the answer is still there to read.
            with contextlib.suppress(OSError):
                connection.sendall(request)
                connection.shutdown(socket.SHUT_WR)
            return receive_all(connection)


def receive_all(connection: socket.socket) -> bytes:
    received = b""
    try:
        while piece := connection.recv(65_536):
            received += piece
    except ConnectionResetError:
        pass
    return received


PAGE = "<!doctype html><title>the page</title>"


@pytest.fixture
def serving() -> Iterator[Serving]:
    metrics, health = Metrics(version="test"), Health()
    server = HttpServer(
        host="127.0.0.1",
        port=0,
        registry=metrics.registry,
        live=lambda: health.answer("live"),
        ready=lambda: health.answer("ready"),
        status_page=lambda: PAGE,
    )
    yield Serving(server.start(), metrics, health)
    server.stop()


def test_metrics_are_served_in_prometheus_format(serving: Serving) -> None:
    serving.metrics.dram_hit_blocks.inc(41)
    with urllib.request.urlopen(f"http://{serving.address}/metrics", timeout=10) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        families = {family.name: family for family in text_string_to_metric_families(response.read().decode())}
    hits = [s.value for s in families["kvservice_block_requests"].samples if s.labels.get("outcome") == "dram"]
    assert 41.0 in hits


def test_metrics_can_be_compressed_selected_and_asked_for_as_openmetrics(serving: Serving) -> None:
    response, body = serving.ask("/metrics", **{"Accept-Encoding": "gzip"})
    assert response.headers["Content-Encoding"] == "gzip"
    assert b"kvservice_build_info" in gzip.decompress(body)
    _, selected = serving.ask("/metrics?name[]=kvservice_build_info")
    assert b"kvservice_build_info" in selected
    assert b"kvservice_block_puts" not in selected
    response, body = serving.ask("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert response.headers["Content-Type"].startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


@pytest.mark.parametrize("page", ["live", "ready"])
def test_health_is_200_or_503_with_the_reasons(serving: Serving, page: str) -> None:
    response, body = serving.ask(f"/{page}z")
    assert (response.status, body) == (200, b"ok\n")
    setattr(serving.health, page, Verdict(ok=False, reasons=("draining", "the disk is gone")))
    response, body = serving.ask(f"/{page}z")
    assert (response.status, body) == (503, b"not ok\ndraining\nthe disk is gone\n")
    assert response.headers["Cache-Control"] == "no-store"
    setattr(serving.health, page, Verdict(ok=True))
    assert serving.ask(f"/{page}z?verbose=1")[0].status == 200


def test_the_root_is_the_status_page_which_may_neither_run_nor_fetch_anything(serving: Serving) -> None:
    response, body = serving.ask("/")
    assert (response.status, body) == (200, PAGE.encode())
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'; ")


def test_an_unknown_path_is_404_and_other_methods_are_405(serving: Serving) -> None:
    response, body = serving.ask("/metrics/../../etc/passwd")
    assert response.status == 404
    assert b"no such page" in body
    assert all(page in body for page in (b"/metrics", b"/livez", b"/readyz"))
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "FLY"):
        response, _ = serving.ask("/metrics", method)
        assert response.status == 405, method
        assert response.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/", "/metrics", "/livez", "/readyz", "/nothing"])
def test_head_answers_like_get_without_the_body(serving: Serving, path: str) -> None:
    got, body = serving.ask(path)
    head, nothing = serving.ask(path, "HEAD")
    assert nothing == b""
    assert head.status == got.status
    assert head.headers["Content-Type"] == got.headers["Content-Type"]
    assert int(head.headers["Content-Length"]) > 0
    assert int(got.headers["Content-Length"]) == len(body)
    raw = serving.send(f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert raw.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /livez HTTP/1.0\r\n\r\n", b"200"),
        (b"GET /livez HTTP/1.1\nHost: x\n\n", b"200"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 tls\r\n\r\n", b"400"),
        (b"GET\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1 extra words\r\n\r\n", b"400"),
        (b"GET / HTTP/9.9\r\n\r\n", b"505"),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", b"431"),
    ],
)
def test_wrong_requests_get_a_plain_answer(serving: Serving, request_bytes: bytes, status: bytes) -> None:
    answer = serving.send(request_bytes)
    assert answer.startswith(b"HTTP/1.0 " + status), answer[:200]
    assert b"<html" not in answer.lower()


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /" + b"a" * room.REQUEST_LINE_BYTES_MAX, b"414"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * room.REQUEST_HEAD_BYTES_MAX, b"431"),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * (room.REQUEST_HEAD_BYTES_MAX // 6 + 1), b"431"),
    ],
)
def test_a_request_that_is_too_large_is_refused_as_soon_as_it_is(
    serving: Serving, request_bytes: bytes, status: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", serving.port), timeout=5) as connection:
        with contextlib.suppress(OSError):  # closed before it is sent
            connection.sendall(request_bytes)
        # Nothing ends the request: an answer means that the server did not wait for more.
        assert receive_all(connection).startswith(b"HTTP/1.0 " + status)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_garbage_never_stops_the_server(serving: Serving, garbage: bytes) -> None:
    serving.send(garbage)
    assert serving.ask("/livez")[0].status == 200


def test_a_page_that_fails_is_a_500_without_the_reason_which_goes_to_the_log(
    serving: Serving, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    logs.configure("info", stream=stream)
    try:
        serving.health.ready = RuntimeError("secret detail")
        response, body = serving.ask("/readyz")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(capture=False)
    assert response.status == 500
    assert b"secret" not in body
    (line,) = (json.loads(text) for text in stream.getvalue().splitlines())
    assert (line["event"], line["path"]) == ("http_page_failed", "/readyz")
    assert "secret detail" in line["exception"]
    assert capsys.readouterr().err == ""


def test_requests_leave_no_access_log(serving: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    serving.ask("/livez")
    serving.ask("/nothing")
    serving.send(b"garbage\r\n\r\n")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_more_connections_than_places_are_told_so_and_places_come_back(serving: Serving) -> None:
    threads_before = threading.active_count()
    idle = [socket.create_connection(("127.0.0.1", serving.port), timeout=10) for _ in range(room.CONNECTIONS_MAX)]
    try:
        # One more: accepted in order, so all places are taken by the time it is looked at.
        assert b"503" in serving.send(b"GET /livez HTTP/1.0\r\n\r\n")
        assert threading.active_count() - threads_before <= room.CONNECTIONS_MAX
    finally:
        for connection in idle:
            connection.close()
    eventually(
        lambda: b"200" in serving.send(b"GET /livez HTTP/1.0\r\n\r\n"),
        what="the places of closed connections come back",
    )


def test_a_peer_that_sends_slowly_is_cut(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "CONNECTION_S_MAX", 0.3)
    with socket.create_connection(("127.0.0.1", serving.port), timeout=10) as connection:
        connection.sendall(b"GET /livez HTTP/1.0\r\n")
        assert receive_all(connection) == b"", "cut, or this would wait until its own time-out"
    assert serving.ask("/livez")[0].status == 200


def test_a_port_in_use_says_which_knob_to_change(serving: Serving) -> None:
    taken = HttpServer(
        host="127.0.0.1",
        port=serving.port,
        registry=serving.metrics.registry,
        live=lambda: Verdict(ok=True),
        ready=lambda: Verdict(ok=True),
        status_page=lambda: PAGE,
    )
    with pytest.raises(StartupError, match=rf"127.0.0.1:{serving.port}: Address already in use; change .*http_port"):
        taken.start()
    taken.stop()


def test_a_host_that_is_not_ours_is_a_startup_error() -> None:
    server = HttpServer(
        host="no such host",
        port=0,
        registry=Metrics(version="test").registry,
        live=lambda: Verdict(ok=True),
        ready=lambda: Verdict(ok=True),
        status_page=lambda: PAGE,
    )
    with pytest.raises(StartupError, match="http_host"):
        server.start()


@pytest.mark.parametrize("host", ["localhost", "::1"])
def test_names_and_ipv6_addresses_can_be_listened_on(host: str) -> None:
    if host == "::1":
        try:
            socket.create_server((host, 0), family=socket.AF_INET6).close()
        except OSError as error:
            pytest.skip(f"this machine has no IPv6 loopback: {error}")
    server = HttpServer(
        host=host,
        port=0,
        registry=Metrics(version="test").registry,
        live=lambda: Verdict(ok=True),
        ready=lambda: Verdict(ok=True),
        status_page=lambda: PAGE,
    )
    address = server.start()
    try:
        with urllib.request.urlopen(f"http://{address}/livez", timeout=10) as response:
            assert response.read() == b"ok\n"
    finally:
        server.stop()


def test_stopping_frees_the_port_cuts_connections_and_may_be_repeated() -> None:
    metrics = Metrics(version="test")
    verdict = Verdict(ok=True)
    server = HttpServer(
        host="127.0.0.1",
        port=0,
        registry=metrics.registry,
        live=lambda: verdict,
        ready=lambda: verdict,
        status_page=lambda: PAGE,
    )
    port = int(server.start().rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as held:
        held.sendall(b"GET /livez")
        server.stop()
        server.stop()
        assert receive_all(held) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    again = HttpServer(
        host="127.0.0.1",
        port=port,
        registry=metrics.registry,
        live=lambda: verdict,
        ready=lambda: verdict,
        status_page=lambda: PAGE,
    )
    again.start()
    again.stop()
