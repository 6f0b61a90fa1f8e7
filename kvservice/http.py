"""http: the status page, /metrics, /livez and /readyz on a port of their own, for Prometheus, Kubernetes and people.

A small threaded server beside the event loop, so that a loop that is stuck can still be reported. Everything is
bounded: connections, the time each may take, the bytes of a request. There is no access control: it listens on
loopback unless configured, and shows counts, never keys or bytes of blocks.
"""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from wsgiref.types import WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from kvservice.errors import StartupError
from kvservice.logs import event_log

CONNECTIONS_MAX = 16
CONNECTION_S_MAX = 10.0
"""A connection older than this is cut, whatever it is doing: nobody can hold a place by sending slowly."""
REQUEST_LINE_BYTES_MAX = 4096
REQUEST_HEAD_BYTES_MAX = 32_768

_TEXT = "text/plain; charset=utf-8"
_BUSY = b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: text/plain\r\n\r\ntoo many connections\n"
_HTML_HEADERS = (
    ("Content-Type", "text/html; charset=utf-8"),
    ("Cache-Control", "no-store"),
    # No scripts, nothing from elsewhere, in nobody's frame: whatever a name on the page may try.
    ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
)
_PAGES = """/         what the daemon holds, the last hour, the last misses
/metrics  Prometheus series
/livez    200 while the process can do its work; 503 and the reasons: restart it
/readyz   200 while it takes work; 503 and the reasons: wait, or look at the reasons
"""

_log = event_log(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Answer to "live?" or "ready?"; the reasons are for people, and say what is wrong where the answer is no."""

    ok: bool
    reasons: tuple[str, ...] = ()


class HttpServer:
    """Serves metrics and health from its own threads.

    Args:
        host: address to listen on, a name or an IPv4 or IPv6 address.
        port: port to listen on; 0 takes any free one.
        registry: whose series /metrics shows.
        live: whether the process can do its work; called in this server's threads, and must not wait.
        ready: whether it takes work now; the same.
        status_page: an HTML document about the daemon; the same.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        registry: CollectorRegistry,
        live: Callable[[], Verdict],
        ready: Callable[[], Verdict],
        status_page: Callable[[], str],
    ) -> None:
        self._host = host
        self._port = port
        self._pages: Mapping[str, PageMaker] = {
            "/": lambda _: _Page(HTTPStatus.OK, status_page().encode(), _HTML_HEADERS),
            "/livez": lambda _: _verdict_page(live()),
            "/readyz": lambda _: _verdict_page(ready()),
            "/metrics": _metrics_page_maker(registry),
        }
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> str:
        """Listen and serve. Returns the bound address as "host:port".

        Raises:
            StartupError: the address cannot be bound; the message says which knob to change.
        """
        try:
            family, _, _, _, address = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)[0]
            self._server = _Server(family, (str(address[0]), int(address[1])), self._pages)
        except OSError as error:
            raise StartupError(
                f"cannot listen for HTTP on {self._host}:{self._port}: {error.strerror}; "
                "change http_host or http_port (0 takes any free port, -1 turns HTTP off)"
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="http", daemon=True
        )
        self._thread.start()
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if family == socket.AF_INET6 else f"{host!s}:{port}"

    def stop(self) -> None:
        """Stop listening and cut open connections. Blocks for about a tenth of a second; may be called twice."""
        server, thread = self._server, self._thread
        self._server = self._thread = None
        if server is None or thread is None:
            return
        server.shutdown()
        thread.join()
        server.server_close()
        server.cut_connections(older_than_s=0.0)


@dataclass(frozen=True, slots=True)
class _Page:
    status: HTTPStatus
    body: bytes
    headers: tuple[tuple[str, str], ...] = (("Content-Type", _TEXT),)


PageMaker = Callable[[BaseHTTPRequestHandler], _Page]


def _verdict_page(verdict: Verdict) -> _Page:
    status = HTTPStatus.OK if verdict.ok else HTTPStatus.SERVICE_UNAVAILABLE
    lines = ["ok" if verdict.ok else "not ok", *verdict.reasons, ""]
    return _Page(status, "\n".join(lines).encode(), (("Content-Type", _TEXT), ("Cache-Control", "no-store")))


def _metrics_page_maker(registry: CollectorRegistry) -> PageMaker:
    """The client library's WSGI application: it negotiates format and compression, and selects by ?name[]=."""
    application = make_wsgi_app(registry)

    def make(request: BaseHTTPRequestHandler) -> _Page:
        answered: list[tuple[str, list[tuple[str, str]]]] = []

        def start_response(status: str, headers: list[tuple[str, str]], _: object = None) -> Callable[[bytes], object]:
            answered.append((status, headers))
            return lambda _: None

        environ: WSGIEnvironment = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": "/metrics",
            "QUERY_STRING": request.path.partition("?")[2],
            "HTTP_ACCEPT": request.headers.get("Accept", ""),
            "HTTP_ACCEPT_ENCODING": request.headers.get("Accept-Encoding", ""),
        }
        body = b"".join(application(environ, start_response))
        status, headers = answered[-1]
        return _Page(HTTPStatus(int(status.split()[0])), body, tuple(headers))

    return make


class _Server(ThreadingMixIn, TCPServer):
    """One thread per connection, at most CONNECTIONS_MAX, each cut after CONNECTION_S_MAX."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = CONNECTIONS_MAX

    def __init__(self, family: socket.AddressFamily, address: tuple[str, int], pages: Mapping[str, PageMaker]) -> None:
        self.address_family = family
        self.pages = pages
        self._open: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(address, _RequestHandler)

    def process_request(self, request: object, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        with self._lock:
            has_place = len(self._open) < CONNECTIONS_MAX
            if has_place:
                self._open[request] = time.monotonic()
        if has_place:
            super().process_request(request, client_address)
            return
        request.settimeout(0)
        with contextlib.suppress(OSError):  # a peer that is gone or does not read loses an error message
            request.send(_BUSY)
        self.shutdown_request(request)

    def shutdown_request(self, request: object) -> None:
        assert isinstance(request, socket.socket)
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        self.cut_connections(older_than_s=CONNECTION_S_MAX)

    def cut_connections(self, *, older_than_s: float) -> None:
        """Shut the sockets of overdue connections; their threads see the end of the stream and finish."""
        youngest_overdue_s = time.monotonic() - older_than_s
        with self._lock:
            for connection, since_s in self._open.items():
                if since_s <= youngest_overdue_s:
                    with contextlib.suppress(OSError):  # closed already
                        connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:  # the base class's
        _log.debug("http_connection_failed", client=str(client_address))


class _RequestHandler(BaseHTTPRequestHandler):
    """Reads one bounded request, answers it, closes; writes no access log."""

    timeout = CONNECTION_S_MAX
    server_version = "kvservice"
    sys_version = ""
    default_request_version = "HTTP/1.0"  # with the default, 0.9, answers to garbage would carry no status line
    error_content_type = _TEXT
    error_message_format = "%(code)d %(message)s\n"

    def handle(self) -> None:
        with contextlib.suppress(TimeoutError, ConnectionError):  # the peer's loss
            if self._read_request():
                self._answer(self._page())

    def _read_request(self) -> bool:
        """Read the line and the headers, not a body. False: an error was answered, or nothing came."""
        self.close_connection = True
        self.requestline = self.request_version = self.command = ""
        self.raw_requestline = self.rfile.readline(REQUEST_LINE_BYTES_MAX + 1)
        if len(self.raw_requestline) > REQUEST_LINE_BYTES_MAX:
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
            return False
        head = b""
        while (line := self.rfile.readline(REQUEST_HEAD_BYTES_MAX + 1)) not in {b"\r\n", b"\n", b""}:
            head += line
            if len(head) > REQUEST_HEAD_BYTES_MAX:
                self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
                return False
        self.rfile = io.BufferedReader(io.BytesIO(head))
        return bool(self.raw_requestline) and self.parse_request()

    def _page(self) -> _Page:
        if self.command not in {"GET", "HEAD"}:
            headers = (("Content-Type", _TEXT), ("Allow", "GET, HEAD"))
            return _Page(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET and HEAD\n", headers)
        assert isinstance(self.server, _Server)
        make = self.server.pages.get(self.path.partition("?")[0])
        if make is None:
            return _Page(HTTPStatus.NOT_FOUND, f"no such page\n\n{_PAGES}".encode())
        try:
            return make(self)
        except Exception as error:  # noqa: BLE001  # whatever fails in a verdict or a collector is answered and logged
            _log.exception("http_page_failed", error, path=self.path)
            return _Page(HTTPStatus.INTERNAL_SERVER_ERROR, b"internal error; the daemon's log says more\n")

    def _answer(self, page: _Page) -> None:
        self.send_response(page.status)
        for name, value in (*page.headers, ("Content-Length", str(len(page.body))), ("Connection", "close")):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class names it so
        _log.debug("http_request", client=self.address_string(), request=format % args)
