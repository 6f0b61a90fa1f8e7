"""`kvservice demo`: exit status 0 when everything held, 1 when something is broken on purpose."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.processes import run_alone
from tests.waiting import DEADLINE_S, eventually

pytestmark = [pytest.mark.engines, pytest.mark.slow, pytest.mark.timeout(240)]


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvservice", "demo", "--quick", *arguments]
    return run_alone(command, timeout_s=200)


def test_conversations_resume_and_the_status_is_zero(tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.json"
    done = demo("--json", str(rows_file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All checks passed." in done.stdout
    written = json.loads(rows_file.read_text())
    rows = [row for row in written["rows"] if row["engine"] != "engine 4"]
    assert [(row["conversation"], row["turn"], row["engine"]) for row in rows] == [
        (1, 1, "engine 1"),
        (2, 1, "engine 1"),
        (1, 2, "engine 2"),
        (2, 2, "engine 2"),
        (1, 3, "engine 3"),
        (2, 3, "engine 3"),
        (1, 4, "engine 3"),
        (2, 4, "engine 3"),
    ]
    for row in rows:
        reused_blocks = row["reused_tokens"] // 16
        # Turn 2 is a new engine's, turn 3 a new daemon's; what turn 3 read is in DRAM for turn 4.
        origin = (0, reused_blocks) if row["turn"] == 3 else (reused_blocks, 0)
        assert (row["dram_blocks"], row["nvme_blocks"]) == origin
    assert written["summary"]["nvme_turns"] == 2
    table = [
        line.split() for line in done.stdout.splitlines() if line.split()[:2] in (["1", "1"], ["1", "2"], ["1", "3"])
    ]
    assert [cells[5] for cells in table] == ["-", "DRAM", "NVMe"], "the table names the tier"
    assert {row["plane"] for row in written["rows"]} == {"shared-memory"}
    assert "Blocks travel by shared-memory\n" in re.sub(r" +\n", "\n", done.stdout)
    for row in rows:
        assert row["tokens_identical"]
        assert row["reused_tokens"] + row["computed_tokens"] == row["history_tokens"] + row["new_tokens"]
        assert row["computed_tokens"] <= row["new_tokens"] + 16
        assert row["reused_tokens"] > 0 or row["turn"] == 1
    overflowing = [row for row in written["rows"] if row["engine"] == "engine 4"]
    assert [row["turn"] for row in overflowing] == list(range(1, 9))
    assert len({row["dropped_tokens"] for row in overflowing}) >= 3, "the window overflowed at least twice"
    for row in overflowing[1:]:
        assert row["computed_tokens"] <= row["new_tokens"] + 16
        assert row["reused_tokens"] > 0
    assert written["summary"]["truncated_turns"] == sum(row["dropped_tokens"] > 0 for row in overflowing) >= 4
    assert written["control"]["tokens_differ"]
    assert written["control"]["sound_tokens_identical"]
    assert written["problems"] == []


@pytest.mark.parametrize(
    ("sabotage", "noticed"),
    [("lose-blocks", "are new, 16 make a block"), ("corrupt-blocks", "the tokens differ from the recomputed ones")],
)
def test_an_engine_that_is_broken_on_purpose_is_noticed(sabotage: str, noticed: str) -> None:
    done = demo("--sabotage", sabotage)
    assert done.returncode == 1, done.stdout + done.stderr
    assert noticed in done.stdout
    assert "Something is off." in done.stdout


def test_who_is_terminated_takes_daemon_and_engines_along(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kvservice", "demo", "--quick"]
    environ = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environ, start_new_session=True) as running:
        try:
            shown = psutil.Process(running.pid)

            def has_a_daemon() -> bool:
                with contextlib.suppress(psutil.Error):  # one has just ended
                    return any("serve" in child.cmdline() for child in shown.children())
                return False

            eventually(has_a_daemon, within_s=100)
            children = shown.children()
            running.terminate()
            assert running.wait(DEADLINE_S) == 130
            eventually(lambda: not [child for child in children if child.is_running()])
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    assert not list(tmp_path.glob("kvservice-demo-*"))


def test_a_folder_without_a_model_is_said_so() -> None:
    done = demo("--model", "/nonexistent")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "/nonexistent" in done.stdout
