"""What the system allows: the smaller of the machine's memory and the control group's."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvservice.server.limits import memory_limit_bytes

pytestmark = pytest.mark.unit


def group(root: Path, line: str, limit: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"1:name=systemd:/\n{line}\n")
    (root / "sys/fs/cgroup/pod").mkdir(parents=True)
    (root / "sys/fs/cgroup/pod/memory.max").write_text(f"{limit}\n")


def test_a_control_groups_limit_counts(tmp_path: Path) -> None:
    physical_bytes = memory_limit_bytes(tmp_path / "nothing is here")
    group(tmp_path, "0::/pod", "4096")
    assert memory_limit_bytes(tmp_path) == 4096 < physical_bytes


@pytest.mark.parametrize(("line", "limit"), [("0::/pod", "max"), ("0::/", "4096"), ("4:memory:/pod", "4096")])
def test_without_one_the_machines_memory_does(tmp_path: Path, line: str, limit: str) -> None:
    group(tmp_path, line, limit)
    assert memory_limit_bytes(tmp_path) == memory_limit_bytes(tmp_path / "nothing is here")
