"""daemons: a real `kvservice serve` under a test's control, and one in a thread whose state a test may look at."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from kvservice.config import Config
from kvservice.leases import HoldKind
from kvservice.server import Daemon
from kvservice.store import Store
from kvservice_cuda.driver import Driver
from tests.waiting import DEADLINE_S, eventually

MIB = 1 << 20
SMALL = {"dram_bytes": 4 * MIB, "dram_segment_bytes": 1 * MIB, "dram_grow_ahead_bytes": 0, "http_port": 0}
"""An arena of four segments that grows only when it must."""

Answer = TypeVar("Answer")


def serve_command(socket_dir: Path | str, knobs: Mapping[str, object]) -> list[str]:
    """The command line of a daemon with these knobs."""
    flags = [text for name, value in knobs.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "kvservice", "serve", "--socket-dir", str(socket_dir), *flags]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what is set for somebody's own daemon."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVSERVICE_")}
    return kept | changes


class DaemonProcess:
    """`kvservice serve` in a process of its own. A context manager that leaves none behind.

    Args:
        socket_dir: its directory; a restart uses the same.
        knobs: as flags; whatever is not named is as in SMALL.
        environ: variables on top of this process's.
        descriptors_max: RLIMIT_NOFILE of the process; 0 leaves it.
        launcher: a command that runs it, such as one that becomes another user first.
    """

    def __init__(
        self,
        socket_dir: Path | str,
        *,
        environ: Mapping[str, str] | None = None,
        descriptors_max: int = 0,
        launcher: Sequence[str] = (),
        **knobs: object,
    ) -> None:
        self.socket_dir = str(socket_dir)
        self._command = [*launcher, *serve_command(socket_dir, SMALL | knobs)]
        self._environ = environment(**(environ or {}))
        self._descriptors_max = descriptors_max
        self._popen: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._changed = threading.Condition()
        self._log_has_ended = False
        self.log: list[dict[str, Any]] = []
        """Events of the current run."""
        self.output = ""
        """Everything that it printed in all runs."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.is_running:
            self.kill()
        # pytest shows it where the test failed.
        sys.stderr.write(f"----- log of the daemon in {self.socket_dir}\n{self.output}")

    # -------------------------------------------------------------------- life

    def start(self) -> None:
        """Start, and wait until it says that it is ready."""
        command = self._command
        if self._descriptors_max:
            limit = str(self._descriptors_max)
            command = ["/bin/sh", "-c", f'ulimit -n {limit} && exec "$0" "$@"', *command]
        self._popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=self._environ)
        self.log, self._log_has_ended = [], False
        self._reader = threading.Thread(target=self._read_log, args=(self._popen,), name="daemon log")
        self._reader.start()
        self.wait_event("ready")

    def restart(self) -> None:
        """Start again in the same directory, after `kill` or `stop`."""
        self.start()

    @property
    def is_running(self) -> bool:
        return self._popen is not None and self._popen.poll() is None

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self._wait()

    def terminate(self) -> None:
        """SIGTERM: it drains."""
        self.signal(signal.SIGTERM)

    def stop(self) -> int:
        """SIGTERM, and wait; the exit status."""
        self.terminate()
        return self._wait()

    def wait(self) -> int:
        """Wait for the end; the exit status."""
        return self._wait()

    def pause(self) -> None:
        """SIGSTOP, and wait until it stands still."""
        self.signal(signal.SIGSTOP)
        eventually(lambda: self.process.status() == psutil.STATUS_STOPPED)

    def resume(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        assert self._popen is not None
        self._popen.send_signal(number)

    # ----------------------------------------------------------------- looking

    @property
    def process(self) -> psutil.Process:
        assert self._popen is not None
        return psutil.Process(self._popen.pid)

    @property
    def http_address(self) -> str:
        return str(self.event("ready")["http_address"])

    @property
    def rss_bytes(self) -> int:
        """Resident memory without what is shared with clients."""
        memory = self.process.memory_info()
        return int(memory.rss - memory.shared)

    @property
    def open_descriptors(self) -> int:
        return int(self.process.num_fds())

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of a page of the HTTP port."""
        try:
            with urllib.request.urlopen(f"http://{self.http_address}{path}", timeout=DEADLINE_S) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def series(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name with at least these labels on the metrics page; there must be one."""
        families = text_string_to_metric_families(self.get("/metrics")[1])
        samples = [each for family in families for each in family.samples if each.name == name]
        values = [each.value for each in samples if labels.items() <= each.labels.items()]
        assert values, f"no series {name} {labels}"
        return sum(values)

    def event(self, name: str) -> dict[str, Any]:
        """The first event of that name in this run."""
        return next(line for line in self.log if line["event"] == name)

    def wait_event(self, name: str) -> dict[str, Any]:
        """Wait for an event in the log of this run."""

        def is_there() -> bool:
            return any(line["event"] == name for line in self.log)

        with self._changed:
            self._changed.wait_for(lambda: is_there() or self._log_has_ended, DEADLINE_S)
        assert is_there(), f"no event {name!r} in the daemon's log:\n{self.output}"
        return self.event(name)

    @property
    def errors(self) -> list[dict[str, Any]]:
        """What it logged as an error in this run: bugs, unless the test provoked them."""
        return [line for line in self.log if line["level"] == "error"]

    # --------------------------------------------------------------- privately

    def _wait(self) -> int:
        assert self._popen is not None
        assert self._reader is not None
        status = self._popen.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        return status

    def _read_log(self, popen: subprocess.Popen[str]) -> None:
        assert popen.stderr is not None
        with popen.stderr as lines:
            for line in lines:
                with self._changed:
                    self.output += line
                    if line.startswith("{") and line.endswith("\n"):  # what SIGKILL cut off is no event
                        self.log.append(json.loads(line))
                    self._changed.notify_all()
        with self._changed:
            self._log_has_ended = True
            self._changed.notify_all()


class DaemonThread:
    """The same daemon on an event loop in a thread of this process, so that its books can be checked.

    A context manager; leaving it checks the invariants once more and stops the daemon.
    """

    def __init__(self, socket_dir: Path | str, *, driver: Driver | None = None, **knobs: object) -> None:
        self.socket_dir = str(socket_dir)
        self._driver = driver
        # A real GPU is for processes of their own: CUDA cannot open in one what the same one exported.
        values = SMALL | {"http_port": -1, "device_plane": "off"} | knobs
        self.config = Config(socket_dir=self.socket_dir, **values)  # type: ignore[arg-type]  # checked when made
        self.daemon: Daemon
        self.tasks_killed: set[str] = set()
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._error: BaseException | None = None
        self._is_ready = threading.Event()
        # One that does not stop fails its test, and must not keep pytest from ending.
        self._thread = threading.Thread(target=self._run, name="daemon", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._is_ready.wait(DEADLINE_S), "the daemon did not become ready"
        if self._error is not None:
            self._thread.join(DEADLINE_S)
            raise self._error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.check()
        finally:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the daemon does not stop"
        if self._error is not None:
            raise self._error

    @property
    def store(self) -> Store:
        return self.daemon.store

    def on_loop(self, ask: Callable[[], Answer]) -> Answer:
        """Call something on the daemon's event loop, where alone its state may be touched."""

        async def call() -> Answer:
            return ask()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(DEADLINE_S)

    def drain(self) -> None:
        """What SIGTERM does, without the end; wait until it is done."""
        asyncio.run_coroutine_threadsafe(self.daemon.drain(), self._loop).result(DEADLINE_S)

    def check(self) -> None:
        """Assert every invariant of the store, and that no background task died that was not meant to."""
        self.on_loop(self.store.check)
        assert set(self.daemon.tasks.dead) <= self.tasks_killed

    def kill_task(self, name: str) -> None:
        """End a background task as a bug in it would."""
        self.tasks_killed.add(name)
        (task,) = [task for task in asyncio.all_tasks(self._loop) if task.get_name() == name]
        self._loop.call_soon_threadsafe(task.cancel)
        eventually(lambda: name in self.daemon.tasks.dead)

    def holds(self) -> tuple[int, int, int]:
        """(leases, reservations, quarantined slots)."""
        leases = self.store.leases

        def count() -> tuple[int, int, int]:
            return leases.count(HoldKind.READ), leases.count(HoldKind.WRITE), leases.quarantined_slots()

        return self.on_loop(count)

    def wait_checksummed(self) -> None:
        """Wait until the background has made every checksum, and holds no slot for it any more."""

        def is_done() -> bool:
            held = sum(int(namespace.pool.holders.sum()) for namespace in self.store.namespaces.values())
            return not self.store.checksummer.queued_blocks and held == sum(len(of.slots) for of in self.store.leases)

        eventually(lambda: self.on_loop(is_done), what="checksums are made")

    def wait_no_holds(self) -> None:
        """Wait until nobody holds anything, quarantine included; then check."""
        eventually(lambda: self.holds() == (0, 0, 0), what="no lease, reservation or quarantined slot is left")
        self.check()

    def wait_no_instances(self) -> None:
        """Wait until every process is known to have hung up."""
        eventually(lambda: self.on_loop(lambda: len(self.store.instances)) == 0, what="every connection has ended")
        self.wait_no_holds()

    def _run(self) -> None:
        try:
            uvloop.run(self._serve())
        except BaseException as error:  # noqa: BLE001  # handed to the thread that started it
            self._error = error
        finally:
            self._is_ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with Daemon(self.config, driver=self._driver) as self.daemon:
            self._is_ready.set()
            await self._stop.wait()
