"""processes: the daemon and the engines of the demo as subprocesses, each with its own log file."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar

from kvservice.demo.protocol import Command, Event, Failed, ProtocolError, Quit, Ready, decode_event, encode

_LOG_LINES_SHOWN = 15
_STOP_TIMEOUT_S = 20.0
_SEGMENT_BYTES = 64 << 20

EventT = TypeVar("EventT")


class DemoFailedError(RuntimeError):
    """The demo cannot go on; the message is for the person who started it."""


class _Subprocess:
    """A child whose stderr goes to a log file; ended when the block is left."""

    def __init__(self, name: str, command: Sequence[str], log_path: Path) -> None:
        self.name = name
        self._log_path = log_path
        # What is set for this shell's own daemon or engine is not meant for the demo's.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("KVSERVICE_")}
        # Threads that spin while they wait for one another make a forward 5 to 10 times slower as soon as any
        # other process wants one of the cores; sleeping ones cost 1.4 times on an idle machine. Seen on two cores.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._process = subprocess.Popen(  # noqa: S603 - our own modules, no shell
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        self._log_follower = threading.Thread(target=self._follow_log, daemon=True)
        self._log_follower.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log_follower.join(_STOP_TIMEOUT_S)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream:
                stream.close()

    @property
    def process_id(self) -> int:
        """Of the child."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the child is gone."""
        return self._process.poll() is not None

    def died(self, doing: str) -> DemoFailedError:
        """The error to raise when the child is gone or silent: what it said last is in the message."""
        status = self._process.poll()
        state = "gave no answer" if status is None else f"ended with status {status}"
        if status is not None:
            self._log_follower.join(_STOP_TIMEOUT_S)
        lines = self._log_path.read_text(errors="replace").splitlines()[-_LOG_LINES_SHOWN:]
        said = "\n".join(f"    {line}" for line in lines) or "    nothing"
        return DemoFailedError(f"{self.name} {state} while {doing}; it last said:\n{said}")

    def log_line(self, line: str) -> None:
        """Called by the thread that follows stderr, for every line of it."""

    def log_ended(self) -> None:
        """Called by that thread when stderr is closed."""

    def _follow_log(self) -> None:
        with self._log_path.open("wb") as log:
            for line in self._pipe(self._process.stderr):
                log.write(line)
                log.flush()
                self.log_line(line.decode(errors="replace"))
        self.log_ended()

    def _pipe(self, stream: IO[bytes] | None) -> IO[bytes]:
        assert stream is not None  # Popen was asked for pipes
        return stream


class DaemonProcess(_Subprocess):
    """`kvservice serve` in a folder of its own."""

    def __init__(self, name: str, folder: Path, *, dram_bytes: int) -> None:
        """One of the same folder finds on NVMe what an earlier one stored there."""
        self.socket_dir = folder / "sockets"
        self._said: dict[str, dict[str, object]] = {}
        self._log_has_ended = False
        self._heard = threading.Condition()
        knobs = {
            "socket-dir": self.socket_dir,
            "http-port": 0,
            "dram-bytes": dram_bytes,
            "nvme-dirs": folder / "nvme",
            "nvme-bytes": dram_bytes * 3 // 2,
            "nvme-segment-bytes": _SEGMENT_BYTES,
        }
        flags = [text for knob, value in knobs.items() for text in (f"--{knob}", str(value))]
        super().__init__(name, ["-m", "kvservice", "serve", *flags], folder / f"{name.replace(' ', '-')}.log")

    def log_line(self, line: str) -> None:
        """Note the events that it logs."""
        with self._heard:
            entry = _event(line)
            self._said[str(entry.get("event"))] = entry
            self._heard.notify_all()

    def log_ended(self) -> None:
        """Nothing more will be said."""
        with self._heard:
            self._log_has_ended = True
            self._heard.notify_all()

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until it serves.

        Raises:
            DemoFailedError: It ended, or does not serve in time.
        """
        self._wait_for("ready", timeout_s, doing="starting")

    def wait_recovered(self, timeout_s: float) -> int:
        """Wait until it has found again what is on NVMe; how many blocks that are.

        Raises:
            DemoFailedError: It ended, or is not done in time.
        """
        return int(str(self._wait_for("recovered", timeout_s, doing="looking at what is on NVMe")["blocks"]))

    def stop(self) -> None:
        """Ask it to drain and end.

        Raises:
            DemoFailedError: It was gone already, or did not end with status 0.
        """
        if self._process.poll() is not None:
            raise self.died("conversations ran")
        self._process.terminate()
        try:
            status = self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise self.died("draining") from error
        if status != 0:
            raise self.died("draining")

    def _wait_for(self, event: str, timeout_s: float, *, doing: str) -> dict[str, object]:
        with self._heard:
            self._heard.wait_for(lambda: event in self._said or self._log_has_ended, timeout_s)
            if event not in self._said:
                raise self.died(doing)
            return self._said[event]


def _event(line: str) -> dict[str, object]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


class _Ended:
    """After an engine's last event."""


class EngineProcess(_Subprocess):
    """`python -m kvservice.demo.engine`: commands in, events out."""

    def __init__(self, name: str, arguments: Sequence[str], folder: Path) -> None:
        log_path = folder / f"{name.replace(' ', '-')}.log"
        super().__init__(name, ["-m", "kvservice.demo.engine", *arguments], log_path)
        self._events: queue.SimpleQueue[Event | _Ended] = queue.SimpleQueue()
        threading.Thread(target=self._read_events, daemon=True).start()

    def send(self, command: Command) -> None:
        """Write one command.

        Raises:
            DemoFailedError: The engine is gone.
        """
        try:
            self._pipe(self._process.stdin).write((encode(command) + "\n").encode())
            self._pipe(self._process.stdin).flush()
        except BrokenPipeError as error:
            raise self.died("it was sent a command") from error

    def next_event(self, timeout_s: float, *, doing: str) -> Event:
        """Wait for whatever comes next.

        Raises:
            DemoFailedError: The engine is gone, silent, or says that it failed.
        """
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty as error:
            raise self.died(doing) from error
        if isinstance(event, _Ended):
            # stdout is closed; give the exit status a moment to be there for the message.
            self._process.wait(_STOP_TIMEOUT_S)
            raise self.died(doing)
        if isinstance(event, Failed):
            raise DemoFailedError(f"{self.name} failed while {doing}: {event.message}")
        return event

    def expect(self, kind: type[EventT], timeout_s: float, *, doing: str) -> EventT:
        """Wait for one event of a kind.

        Raises:
            DemoFailedError: See next_event; or it is another kind.
        """
        event = self.next_event(timeout_s, doing=doing)
        if not isinstance(event, kind):
            raise DemoFailedError(f"{self.name} said {type(event).__name__} where {kind.__name__} was due")
        return event

    def wait_ready(self, timeout_s: float) -> Ready:
        """Wait until the model is loaded.

        Raises:
            DemoFailedError: The engine ended, or is not ready in time.
        """
        return self.expect(Ready, timeout_s, doing="loading the model")

    def quit(self) -> None:
        """End it the orderly way.

        Raises:
            DemoFailedError: It did not end with status 0.
        """
        self.send(Quit())
        try:
            status = self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise self.died("ending") from error
        if status != 0:
            raise self.died("ending")

    def _read_events(self) -> None:
        for line in self._pipe(self._process.stdout):
            try:
                self._events.put(decode_event(line.decode()))
            except ProtocolError as error:
                self._events.put(Failed(str(error)))
        self._events.put(_Ended())
