"""processes: commands of which nothing is left when they are over, whatever ended them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence


def run_alone(command: Sequence[str | os.PathLike[str]], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run it to its end in a process group of its own, and kill what of the group is left then.

    For programs with children: `subprocess.run` ends the program alone, and leaves those to nobody.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as popen:
        try:
            output, errors = popen.communicate(timeout=timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(popen.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, popen.returncode, output, errors)
