"""`kvservice demo` on a GPU: what its engines load and save goes straight between the daemon and the GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.processes import run_alone

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(300)]


def test_the_demo_resumes_on_the_device_plane_and_all_its_checks_hold(tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.json"
    done = run_alone(
        [sys.executable, "-m", "kvservice", "demo", "--quick", "--json", str(rows_file)], timeout_s=280
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(rows_file.read_text())
    assert {row["plane"] for row in written["rows"]} == {"cuda-ipc"}
    assert "Blocks travel by cuda-ipc" in done.stdout
    assert all(row["reused_tokens"] for row in written["rows"] if row["history_tokens"])
    assert any(row["dropped_tokens"] and row["reused_tokens"] for row in written["rows"]), "keys were turned"
    assert (written["summary"]["nvme_turns"], written["control"]["tokens_differ"]) == (2, True)


@pytest.mark.parametrize(
    ("sabotage", "noticed"),
    [("lose-blocks", "are new, 16 make a block"), ("corrupt-blocks", "the tokens differ from the recomputed ones")],
)
def test_what_is_broken_on_purpose_is_noticed_there_too(sabotage: str, noticed: str) -> None:
    done = run_alone([sys.executable, "-m", "kvservice", "demo", "--quick", "--sabotage", sabotage], timeout_s=280)
    assert done.returncode == 1, done.stdout + done.stderr
    assert noticed in done.stdout
