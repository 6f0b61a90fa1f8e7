"""Tracing: OpenTelemetry's own gRPC instrumentation in an engine's process; client and daemon know nothing of it."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.instrumentation.grpc import GrpcInstrumentorClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

import kvservice_client as kv
from tests.blocks import chain, contents, namespace
from tests.daemons import DaemonProcess, environment
from tests.integration.conftest import MakeClient
from tests.waiting import eventually

pytestmark = pytest.mark.integration

BLOCK_BYTES = 4096
SERVICE = "/kvservice.v1.KVCacheService/"
ENGINE = """
import sys
import kvservice_client as kv
from tests.blocks import chain, contents, namespace
with kv.attach(namespace(block_size_bytes=4096), socket_dir=sys.argv[1]) as client:
    assert client.save(chain("talk", 3), contents(chain("talk", 3), 4096)).saved == 3
    assert client.load(chain("talk", 3), bytearray(3 * 4096)).blocks == 3
"""


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """Of the process's tracer provider, which can be set once; nothing is traced while nothing is instrumented."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    """Where the spans of clients made from now on are."""
    instrumentor = GrpcInstrumentorClient()  # type: ignore[no-untyped-call]
    instrumentor.instrument()
    yield exporter
    instrumentor.uninstrument()
    exporter.clear()


def of(spans: InMemorySpanExporter, method: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == SERVICE + method]


def test_every_rpc_is_a_span_that_says_nothing_of_what_was_asked(
    spans: InMemorySpanExporter, daemon: DaemonProcess, make_client: MakeClient
) -> None:
    client = make_client(daemon.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))
    hashes = chain("talk", 3)
    assert client.save(hashes, contents(hashes, BLOCK_BYTES), session_id="of somebody").saved == 3
    assert client.load(hashes, bytearray(3 * BLOCK_BYTES), session_id="of somebody").blocks == 3
    client.close()
    eventually(lambda: of(spans, "Attach"), what="the stream's span ends with the stream")
    for method in ("Put", "Commit", "Get", "Release"):
        (span,) = of(spans, method)
        assert span.attributes is not None
        assert (span.attributes["rpc.method"], span.attributes["rpc.grpc.status_code"]) == (method, 0)
    told = "\n".join(span.to_json() for span in spans.get_finished_spans())
    for secret in ("of somebody", *(block_hash.hex() for block_hash in hashes), *map(str, hashes)):
        assert secret not in told


def test_what_is_refused_is_a_span_with_the_contract_s_code(
    spans: InMemorySpanExporter, daemon: DaemonProcess, make_client: MakeClient
) -> None:
    client = make_client(daemon.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))
    with pytest.raises(kv.InvalidRequest):
        client.truncate("", chain("talk", 1))
    (span,) = of(spans, "Truncate")
    assert span.attributes is not None
    assert span.attributes["rpc.grpc.status_code"] == 3
    assert span.status.status_code is StatusCode.ERROR


class Collector(BaseHTTPRequestHandler):
    """Takes traces as OTLP's collectors do, and keeps the names of their spans."""

    names: list[str]

    def do_POST(self) -> None:
        request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in request.resource_spans:
            self.names += [span.name for scope in resource.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Nothing: the test says what it missed."""


def test_the_documented_command_sends_an_engine_s_spans_to_a_collector(daemon: DaemonProcess, stack: ExitStack) -> None:
    names: list[str] = []
    collector = ThreadingHTTPServer(("127.0.0.1", 0), type("OneCollector", (Collector,), {"names": names}))
    stack.callback(collector.server_close)
    thread = threading.Thread(target=collector.serve_forever, name="collector")
    thread.start()
    stack.callback(thread.join)
    stack.callback(collector.shutdown)
    variables = environment(
        OTEL_TRACES_EXPORTER="otlp_proto_http",
        OTEL_METRICS_EXPORTER="none",
        OTEL_LOGS_EXPORTER="none",
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{collector.server_port}",
    )
    command = [str(Path(sys.executable).with_name("opentelemetry-instrument")), sys.executable, "-c", ENGINE]
    ended = subprocess.run(
        [*command, daemon.socket_dir], env=variables, capture_output=True, text=True, timeout=50, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert {SERVICE + method for method in ("Attach", "Put", "Commit", "Get")} <= set(names), ended.stderr
