"""conftest: a daemon with two tiers under load, and a browser."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.daemons import DaemonProcess
from tests.operations.browser import Browser
from tests.operations.traffic import KNOBS

RequireTool = Callable[[str, str], str]


@pytest.fixture
def daemon(stack: ExitStack) -> DaemonProcess:
    """A daemon with a small DRAM tier and an NVMe tier behind it, in a directory short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="kvs-"))
    stack.callback(shutil.rmtree, path)
    return stack.enter_context(DaemonProcess(path / "daemon", nvme_dirs=path / "nvme", **KNOBS))


@pytest.fixture
def browser(require_tool: RequireTool, tmp_path: Path) -> Browser:
    """Headless Chromium."""
    return Browser(require_tool("chromium", "chromium"), tmp_path)
