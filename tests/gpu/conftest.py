"""conftest: a real daemon and engine processes with their KV caches on the GPU."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.daemons import DaemonProcess
from tests.engines import EngineProcess

GIB = 1 << 30
MakeGpuEngine = Callable[..., EngineProcess]


@pytest.fixture
def daemon(stack: ExitStack) -> DaemonProcess:
    """A fresh daemon with 2 GiB."""
    directory = tempfile.mkdtemp(prefix="kvs-")
    stack.callback(shutil.rmtree, directory)
    return stack.enter_context(
        DaemonProcess(Path(directory) / "sockets", dram_bytes=2 * GIB, dram_segment_bytes=GIB // 4)
    )


@pytest.fixture
def make_engine(stack: ExitStack) -> MakeGpuEngine:
    """Call it for a process that imports torch and waits for commands; it runs engine.py, or another program here."""

    def make(program: str = "engine.py") -> EngineProcess:
        return stack.enter_context(EngineProcess(program=Path(__file__).parent / program))

    return make
