"""engines: client processes that do one thing at a time, when the test says so, and can be stopped in between."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

import kvservice_client as kv
from tests.commands import CommandedProcess
from tests.daemons import environment
from tests.waiting import DEADLINE_S, eventually

_PROGRAM = Path(__file__).parent / "integration" / "programs" / "engine.py"


class EngineProcess(CommandedProcess):
    """A process that imports the client library.

    A context manager that leaves no process behind. Args: `uid`, `gid`: become this user first (needs root); `program`:
    what it runs.
    """

    def __init__(self, *, uid: int = -1, gid: int = -1, program: Path = _PROGRAM) -> None:
        identity = [] if uid < 0 else [str(uid), str(gid)]
        popen = subprocess.Popen(
            [sys.executable, str(program), *identity],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        super().__init__(popen, answer_s=2 * DEADLINE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.is_running:
            self.kill()
        self.close_pipes()

    @property
    def process_id(self) -> int:
        return self._popen.pid

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self._popen.pid)

    # ---------------------------------------------------------------- commands

    def attach(self, socket_dir: str, namespace: kv.Namespace, *, timeout_s: float = 10.0) -> str:
        """Attach; the client's status."""
        described = dataclasses.asdict(namespace) | {"fingerprint": namespace.fingerprint.hex()}
        return str(self.do("attach", socket_dir=socket_dir, namespace=described, timeout_s=timeout_s))

    def wait_served(self) -> None:
        """Wait until a call reaches a daemon; being attached may still mean to the one that has just died."""
        eventually(lambda: self.do("lookup", name="nobody has this", blocks=1)["reason"] == "not_held")

    # ----------------------------------------------------------------- signals

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._popen.kill()
        self._popen.wait(DEADLINE_S)

    def quit(self) -> int:
        """End of its input: it closes its client and ends; the exit status."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        return self._popen.wait(DEADLINE_S)

    def pause(self) -> None:
        """SIGSTOP, and wait until it stands still."""
        self._popen.send_signal(signal.SIGSTOP)
        eventually(lambda: self.process.status() == psutil.STATUS_STOPPED)

    def resume(self) -> None:
        """SIGCONT."""
        self._popen.send_signal(signal.SIGCONT)

    # ----------------------------------------------------------------- looking

    def mapped_segments(self) -> list[str]:
        """Names of the daemon's memory that the process has mapped, as the kernel tells."""
        lines = Path(f"/proc/{self.process_id}/maps").read_text(encoding="utf-8").splitlines()
        return [line.split("/memfd:", 1)[1] for line in lines if "/memfd:kvservice-segment" in line]
