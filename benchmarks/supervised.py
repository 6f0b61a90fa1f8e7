"""supervised: runs a command whose processes all end when whoever started it does, in whatever way that ends.

    python benchmarks/supervised.py COMMAND ...      # while its standard input is open

A test that is aborted, or killed by its deadline, cleans nothing up; its end of the pipe is closed all the same.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence

STOP_TIMEOUT_S = 30.0


def main(command: Sequence[str]) -> int:
    """The command's exit status; afterwards no process of its group is left."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            _wait(process)
        finally:
            _end(process)
        return process.wait()


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of the input or of the process."""
    ended = os.pidfd_open(process.pid)
    with selectors.DefaultSelector() as events:
        events.register(ended, selectors.EVENT_READ)
        events.register(sys.stdin.fileno(), selectors.EVENT_READ)
        while {key.fd for key, _ in events.select()} == {sys.stdin.fileno()}:
            if not os.read(sys.stdin.fileno(), 4096):
                break
    os.close(ended)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGINT to all its processes, SIGKILL to those that stay."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
