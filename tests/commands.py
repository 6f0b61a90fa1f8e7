"""commands: a process that does one thing at a time, when the test says so, and answers."""

from __future__ import annotations

import json
import subprocess
import threading
from typing import Any


class CommandFailed(Exception):
    """The command raised in the process; `kind` is the exception's class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class CommandedProcess:
    """Commands go down a pipe as lines of JSON, answers come up another.

    Args: `answer_s`: the longest that an answer takes.
    """

    def __init__(self, popen: subprocess.Popen[str], *, answer_s: float) -> None:
        self._popen = popen
        self._answer_s = answer_s

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    def start(self, command: str, **arguments: Any) -> None:
        """Send a command without waiting for its answer."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._popen.stdin.flush()

    def answer(self) -> Any:
        """Wait for the answer of the oldest command.

        Raises:
            CommandFailed: the command raised.
            EOFError: the process is gone.
        """
        assert self._popen.stdout is not None
        # A read of a pipe has no deadline of its own; the end of the process ends it.
        watchdog = threading.Timer(self._answer_s, self._popen.kill)
        watchdog.start()
        try:
            line = self._popen.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise EOFError(f"the process is gone: {self._popen.wait(self._answer_s)}")
        answered = json.loads(line)
        if "error" in answered:
            raise CommandFailed(answered["error"], answered["message"])
        return answered["answer"]

    def do(self, command: str, **arguments: Any) -> Any:
        """Send a command and wait for its answer. Raises CommandFailed, EOFError."""
        self.start(command, **arguments)
        return self.answer()

    def close_pipes(self) -> None:
        """The process is gone, and nobody asks it any more."""
        for stream in (self._popen.stdin, self._popen.stdout):
            assert stream is not None
            stream.close()
