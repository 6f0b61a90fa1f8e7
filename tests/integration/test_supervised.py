"""What benchmarks/supervised.py runs ends with whoever started it: in order, killed, or by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.waiting import eventually

pytestmark = pytest.mark.integration

SUPERVISOR = Path(__file__).parents[2] / "benchmarks" / "supervised.py"
FAMILY = ["/bin/sh", "-c", "sleep 1000 & echo $$ $!; wait"]
"""A shell and its child, which ignores SIGINT, as whatever a shell starts in the background does."""
# Says whom it started, then waits for ever.
STARTER = """
import subprocess, sys
family = subprocess.Popen([sys.executable, *sys.argv[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
print(family.stdout.readline(), end="", flush=True)
family.wait()
"""


def are_gone(processes: list[int]) -> bool:
    return not any(psutil.pid_exists(one) and psutil.Process(one).status() != "zombie" for one in processes)


def test_whoever_started_it_is_killed() -> None:
    command = [sys.executable, "-c", STARTER, str(SUPERVISOR), *FAMILY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        family = [int(word) for word in starter.stdout.readline().split()]
        assert len(family) == 2
        assert not are_gone(family)
        starter.kill()
    eventually(lambda: are_gone(family), what="the command's processes end")


def test_its_input_is_closed() -> None:
    with subprocess.Popen(
        [sys.executable, SUPERVISOR, *FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as supervisor:
        assert supervisor.stdin is not None
        assert supervisor.stdout is not None
        family = [int(word) for word in supervisor.stdout.readline().split()]
        assert not are_gone(family)
        supervisor.stdin.close()
        supervisor.wait()
        assert are_gone(family)


def test_it_ends_by_itself_with_its_status() -> None:
    command = [sys.executable, str(SUPERVISOR), "/bin/sh", "-c", "exit 7"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as supervisor:
        assert supervisor.wait() == 7
