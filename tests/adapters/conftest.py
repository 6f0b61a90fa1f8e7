"""Fixtures of the adapters' tests: a tiny model, a daemon process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before torch is loaded: threads that spin while they wait make a forward 5 to 10 times slower as soon as
# another process (the daemon, a second engine) wants one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from kvservice.demo.model import ModelShape, write_model
from kvservice.demo.processes import DaemonProcess

TINY = ModelShape(
    layers=3, hidden=128, intermediate=256, heads=4, kv_heads=2, head_dim=32, vocabulary=512, window_tokens=2048
)
DRAM_BYTES = 256 << 20
READY_TIMEOUT_S = 30.0

StartDaemon = Callable[[Path], DaemonProcess]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def socket_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Sockets of a daemon that serves the whole module; tests keep apart by a salt of their own."""
    with DaemonProcess(tmp_path_factory.mktemp("d"), dram_bytes=DRAM_BYTES) as daemon:
        daemon.wait_ready(READY_TIMEOUT_S)
        yield daemon.socket_dir
        daemon.stop()


@pytest.fixture
def start_daemon() -> Iterator[StartDaemon]:
    """Start a daemon whose sockets are in folder/"sockets"; all are ended with the test."""
    started: list[DaemonProcess] = []

    def start(folder: Path) -> DaemonProcess:
        daemon = DaemonProcess(folder, dram_bytes=DRAM_BYTES)
        started.append(daemon)
        daemon.wait_ready(READY_TIMEOUT_S)
        return daemon

    yield start
    for daemon in started:
        with daemon:
            pass
