"""conftest: tiny models, and daemons with room for what they save."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is loaded: threads that spin while they wait make a forward 5 to 10 times slower as soon as
# another process (the daemon, a second engine) wants one of the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.vllm_server import VENV, is_installed
from kvservice.demo.model import ModelShape, write_model
from tests.adapters.vllm_engine import VllmEngine
from tests.adapters.vllm_scenes import wait_attached
from tests.daemons import MIB, DaemonProcess

TINY = ModelShape(
    layers=3, hidden=128, intermediate=256, heads=4, kv_heads=2, head_dim=32, vocabulary=512, window_tokens=2048
)
# Every test has a namespace of its own, and each owns at least a segment.
KNOBS: dict[str, Any] = {"dram_bytes": 512 * MIB, "dram_segment_bytes": 4 * MIB}

LoadModel = Callable[[torch.dtype], PreTrainedModel]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, TINY)
    return folder


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """Another model of the same shape, configuration and file sizes."""
    folder = tmp_path_factory.mktemp("other-model")
    write_model(folder, TINY)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 1.5
    save_file(tensors, weights, metadata={"format": "pt"})
    assert weights.stat().st_size == (model_dir / "model.safetensors").stat().st_size
    return folder


@pytest.fixture(scope="session")
def load_model(model_dir: Path) -> LoadModel:
    """Call it with a dtype for the tiny Llama; one per dtype is loaded and shared."""
    loaded: dict[torch.dtype, PreTrainedModel] = {}

    def load(dtype: torch.dtype) -> PreTrainedModel:
        if dtype not in loaded:
            loaded[dtype] = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
        return loaded[dtype]

    return load


@pytest.fixture(scope="session")
def model(load_model: LoadModel) -> PreTrainedModel:
    """The tiny Llama in float32."""
    return load_model(torch.float32)


@pytest.fixture
def salt(request: pytest.FixtureRequest) -> str:
    """Of this test's namespace: nothing that another test saved is found."""
    return str(request.node.nodeid)


@pytest.fixture(scope="module")
def socket_dir() -> Iterator[Path]:
    """Of a daemon that serves the whole module."""
    with tempfile.TemporaryDirectory(prefix="kvs-") as folder, DaemonProcess(Path(folder) / "s", **KNOBS) as daemon:
        yield Path(daemon.socket_dir)
        assert daemon.stop() == 0
        assert daemon.errors == []


@pytest.fixture
def absent_daemon() -> Iterator[DaemonProcess]:
    """A daemon that is not started yet; ended with the test."""
    folder = tempfile.mkdtemp(prefix="kvs-")
    daemon = DaemonProcess(Path(folder) / "s", **KNOBS)
    yield daemon
    if daemon.is_running:
        daemon.kill()
    shutil.rmtree(folder)


@pytest.fixture
def daemon(absent_daemon: DaemonProcess) -> DaemonProcess:
    """A daemon of the test's own, to be killed and restarted."""
    absent_daemon.start()
    return absent_daemon


@pytest.fixture(scope="session")
def vllm_installed() -> None:
    """Skips where vLLM's environment is missing; fails instead in CI, as `require_tool` does."""
    if is_installed():
        return
    reason = f"no vLLM in {VENV}: make vllm-environment"
    if os.environ.get("REQUIRE_TEST_TOOLS") == "1":
        pytest.fail(f"{reason}, and REQUIRE_TEST_TOOLS=1 forbids skipping", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def vllm_process(vllm_installed: None) -> Iterator[VllmEngine]:
    """A process that has imported vLLM, which takes its time; tests use `vllm`."""
    with VllmEngine() as process:
        yield process


@pytest.fixture
def vllm(vllm_process: VllmEngine) -> Iterator[VllmEngine]:
    """Open engines in it; what is left open is closed after the test."""
    vllm_process.close()
    yield vllm_process
    vllm_process.close()


@pytest.fixture(scope="session")
def served_daemon() -> Iterator[DaemonProcess]:
    """Of the engine that tests share; they may kill and restart it."""
    with tempfile.TemporaryDirectory(prefix="kvs-") as folder, DaemonProcess(Path(folder) / "s", **KNOBS) as daemon:
        yield daemon


@pytest.fixture
def served(vllm_process: VllmEngine, model_dir: Path, served_daemon: DaemonProcess) -> Iterator[VllmEngine]:
    """An attached engine that many tests share, because opening one takes seconds: each takes prompts of its own."""
    if vllm_process.opened is not served_daemon:
        vllm_process.close()
        # Short, because some tests let the daemon hang; long enough for a busy machine's copies.
        options = {"lookup_wait_s": 5.0, "load_timeout_s": 5.0, "save_timeout_s": 5.0}
        vllm_process.open_attached(model_dir, served_daemon, scheduling_policy="priority", options=options)
        vllm_process.opened = served_daemon
    yield vllm_process
    vllm_process.do("heal")
    if not served_daemon.is_running:
        served_daemon.restart()
    served_daemon.resume()
    wait_attached(vllm_process)
    vllm_process.do("settle")
    vllm_process.do("drop_cache")
