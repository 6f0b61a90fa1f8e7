"""conftest: what every test may ask for: a tool of the system, a GPU, a GPU of host memory."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest

from tests.devices import FakeGpu

# Timing never decides a test: a busy machine makes any example slow. pytest's own timeout ends what hangs.
# In CI the same examples every time: what a change breaks is the change's. New ones are looked for everywhere else.
hypothesis.settings.register_profile(
    "house",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=os.environ.get("CI") == "true",
)
hypothesis.settings.load_profile("house")

RequireTool = Callable[[str, str], str]


@pytest.fixture(scope="session")
def require_tool() -> RequireTool:
    """Call it with a program's name and its Debian package; it returns the program's path.

    Without the program the test is skipped; it fails when REQUIRE_TEST_TOOLS=1, which is what CI sets,
    so that a test cannot go missing there unnoticed.
    """

    def require(name: str, debian_package: str) -> str:
        path = shutil.which(name)
        if path is not None:
            return path
        reason = f"{name} is not installed (Debian: apt-get install {debian_package})"
        if os.environ.get("REQUIRE_TEST_TOOLS") == "1":
            pytest.fail(f"{reason}, and REQUIRE_TEST_TOOLS=1 forbids skipping", pytrace=False)
        pytest.skip(reason)

    return require


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what other fixtures made, the last first."""
    with ExitStack() as made:
        yield made


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    """A GPU made of host memory, see tests/devices.py."""
    with FakeGpu() as made:
        yield made


def pytest_configure() -> None:
    """Be ended by SIGTERM as by Ctrl-C, so that fixtures end the daemons and engines that they started.

    By Ctrl-C too where a shell started this in its background, which ignores it, and passes that on to all children.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none."""
    # The device files, not the driver: initialising CUDA here would break every test that forks.
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine (/dev/nvidia* is missing)"))
