"""limits: what the system allows this process, looked at before anything is opened."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from kvservice.config import Config
from kvservice.errors import StartupError
from kvservice.logs import event_log

DESCRIPTORS_MIN = 64
"""With fewer gRPC itself does not start, and aborts the process."""

_log = event_log(__name__)


def look_at_limits(config: Config) -> None:
    """Use as many descriptors as the system allows, and say what the configuration asks for in vain.

    Segments take four descriptors each, processes one and one more for each of their threads that calls.

    Raises:
        StartupError: too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        soft = min(hard, 1 << 16) if hard > 0 else 1 << 16
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if 0 <= soft < DESCRIPTORS_MIN:
        raise StartupError(
            f"this process may open {soft} files and needs {DESCRIPTORS_MIN} at least; "
            "raise the limit (ulimit -n, or LimitNOFILE= of the unit)"
        )
    memory_bytes = memory_limit_bytes()
    if config.dram_bytes > memory_bytes:
        _log.warning(
            "dram_exceeds_memory",
            dram_bytes=config.dram_bytes,
            memory_bytes=memory_bytes,
            next="lower dram_bytes, or raise the container's limit: the kernel kills somebody when it is used up",
        )


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """What the machine has, or what this process's control group may use of it. `root`: of /proc and /sys."""
    physical_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        (path,) = (line[3:] for line in groups if line.startswith("0::"))
        limit = (root / "sys/fs/cgroup" / path.lstrip("/") / "memory.max").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return physical_bytes  # no control group of its own, or version 1
    return min(physical_bytes, int(limit)) if limit.isdecimal() else physical_bytes
