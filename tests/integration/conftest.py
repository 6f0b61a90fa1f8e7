"""conftest: daemons in directories that every user may reach, gone when the test is."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import kvservice_client as kv
from tests.blocks import chain, namespace
from tests.connections import Connection
from tests.daemons import DaemonProcess, DaemonThread
from tests.engines import EngineProcess
from tests.integration.books import books
from tests.waiting import eventually

MakeDaemon = Callable[..., DaemonProcess]
MakeDaemonThread = Callable[..., DaemonThread]
MakeEngine = Callable[..., EngineProcess]
MakeClient = Callable[..., kv.Client]
MakeConnection = Callable[..., Connection]


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory with a path short enough for a socket, that other users may pass through (tmp_path is private)."""
    path = Path(tempfile.mkdtemp(prefix="kvs-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def stack(short_path: Path) -> Iterator[ExitStack]:
    """Closes what the other fixtures made, the last first: clients before their daemon, all before the directory."""
    with ExitStack() as made:
        yield made


@pytest.fixture
def make_daemon(short_path: Path, stack: ExitStack) -> MakeDaemon:
    """Call it with knobs for a real `kvservice serve`; without `directory` it is the test's own one."""

    def make(directory: str = "daemon", **knobs: object) -> DaemonProcess:
        return stack.enter_context(DaemonProcess(short_path / directory, **knobs))  # type: ignore[arg-type]

    return make


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> DaemonProcess:
    """A fresh daemon process with a small arena."""
    return make_daemon()


@pytest.fixture
def make_daemon_thread(short_path: Path, stack: ExitStack) -> MakeDaemonThread:
    """Call it with knobs for a daemon in this process, whose invariants are checked when the test ends."""

    def make(directory: str = "daemon", **knobs: object) -> DaemonThread:
        return stack.enter_context(DaemonThread(short_path / directory, **knobs))  # type: ignore[arg-type]

    return make


@pytest.fixture
def daemon_thread(make_daemon_thread: MakeDaemonThread) -> DaemonThread:
    """A fresh daemon in this process with a small arena."""
    return make_daemon_thread()


@pytest.fixture
def make_engine(stack: ExitStack) -> MakeEngine:
    """Call it with a daemon's socket_dir and a namespace for an attached client process."""

    def make(socket_dir: str = "", of: kv.Namespace | None = None, *, uid: int = -1, gid: int = -1) -> EngineProcess:
        engine = stack.enter_context(EngineProcess(uid=uid, gid=gid))
        if socket_dir:
            assert engine.attach(socket_dir, of or namespace()) == "attached"
        return engine

    return make


@pytest.fixture
def make_client(stack: ExitStack) -> MakeClient:
    """Call it with a daemon's socket_dir and a namespace for an attached client in this process."""

    def make(socket_dir: str, of: kv.Namespace | None = None) -> kv.Client:
        client = stack.enter_context(kv.attach(of or namespace(), socket_dir=socket_dir))
        assert client.attached, client.status
        return client

    return make


@pytest.fixture
def make_connection(stack: ExitStack) -> MakeConnection:
    """Call it with a daemon's socket_dir and namespaces for an attached hand-made connection."""

    def make(socket_dir: str, *namespaces: kv.Namespace) -> Connection:
        connection = stack.enter_context(Connection(socket_dir))
        if namespaces:
            connection.attach(*namespaces)
        return connection

    return make


@pytest.fixture
def witness(daemon_thread: DaemonThread, make_connection: MakeConnection) -> Iterator[Connection]:
    """Another process, attached before and served as well after; nothing of the books has changed meanwhile."""
    connection = make_connection(daemon_thread.socket_dir, namespace())
    connection.save(chain("witness", 5))
    before = books(daemon_thread)
    yield connection
    assert connection.lookup(chain("witness", 5)).hit_blocks == 5
    assert connection.ping().WhichOneof("message") == "pong"
    eventually(lambda: books(daemon_thread) == before, what="the books are as before the garbage")
    daemon_thread.check()


@pytest.fixture
def needs_root() -> None:
    """Skip where a process cannot become another user."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
