"""Whatever ends a run of the tests, no daemon and no browser of theirs outlives it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.daemons import environment
from tests.processes import run_alone
from tests.waiting import DEADLINE_S, eventually

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]

HANGING_TEST = """
import signal
from pathlib import Path

from tests.daemons import DaemonProcess

def test_that_hangs():
    folder = Path({folder!r})
    with DaemonProcess(folder / "daemon") as daemon:
        (folder / "written").write_text(str(daemon.process.pid))
        (folder / "written").rename(folder / "process_id")
        {end}
"""


@pytest.mark.parametrize(
    ("end", "number"),
    [
        ("signal.pause()", signal.SIGTERM),
        ("signal.pause()", signal.SIGINT),
        ("signal.raise_signal(signal.SIGALRM)", None),  # as pytest-timeout does when the time is over
        ("raise AssertionError", None),
    ],
    ids=["SIGTERM", "SIGINT", "time-out", "failure"],
)
def test_a_run_that_is_ended_ends_its_daemons(short_path: Path, end: str, number: signal.Signals | None) -> None:
    program = short_path / "test_hanging.py"
    program.write_text(HANGING_TEST.format(folder=str(short_path), end=end))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml")]
    run = subprocess.Popen(
        [*command, "-p", "no:cacheprovider", str(program)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with run:
        try:
            eventually((short_path / "process_id").exists, within_s=2 * DEADLINE_S)
            if number is not None:
                run.send_signal(number)
            output, _ = run.communicate(timeout=2 * DEADLINE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == (2 if number else 1), output
    assert not psutil.pid_exists(int((short_path / "process_id").read_text()))


def test_a_command_that_is_over_leaves_no_child() -> None:
    ended = run_alone(["/bin/sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"], timeout_s=DEADLINE_S)
    child = int(ended.stdout)
    # Nobody may be there to collect a process whose parent is gone.
    eventually(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
