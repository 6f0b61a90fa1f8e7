"""vllm_server: `vllm serve` from its own environment (scripts/install_vllm.sh), with or without the adapter."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_ROOT = Path(__file__).parents[1]
_START_TIMEOUT_S = 300.0
_SUPERVISOR = Path(__file__).parent / "supervised.py"

VENV = _ROOT / os.environ.get("VLLM_VENV", ".venv-vllm")
"""Made by scripts/install_vllm.sh."""


def is_installed() -> bool:
    """Whether that environment is there."""
    return (VENV / ".installed").exists()


def transfer_config(**options: Any) -> dict[str, Any]:
    """--kv-transfer-config with these options of the adapter."""
    return {
        "kv_connector": "KVServiceConnector",
        "kv_connector_module_path": "kvservice_adapters.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": options,
    }


def vllm_environment(**changes: str) -> dict[str, str]:
    """For a vLLM that stays on this machine, with this tree's client and adapters."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KVSERVICE_")}
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(_ROOT / "client"), str(_ROOT / "engine_adapters")]),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        # Threads that spin while they wait take the cores from the daemon.
        "OMP_WAIT_POLICY": "PASSIVE",
        **changes,
    }


class VllmServer:
    """A server on a free port of this machine. A context manager that leaves no process behind."""

    def __init__(
        self,
        model: Path,
        *,
        transfer: Mapping[str, Any] | None = None,
        flags: Sequence[str] = (),
        log: Path,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Start it; `wait_ready` waits for it."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [str(VENV / "bin" / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--served-model-name", "model", "--enforce-eager", "--block-size", "32"]
        command += ["--enable-prompt-tokens-details", *flags]
        if transfer is not None:
            command += ["--kv-transfer-config", json.dumps(transfer)]
        with log.open("w", encoding="utf-8") as out:
            # Its input is the pipe that ends it and all its processes, also when this process is killed.
            self._popen = subprocess.Popen(
                [sys.executable, _SUPERVISOR, *command],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=vllm_environment(**(environ or {})),
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def is_running(self) -> bool:
        """Whether its first process is there."""
        return self._popen.poll() is None

    def wait_ready(self) -> None:
        """Wait until it serves. Raises RuntimeError, with the end of its log: it does not."""
        ends_at_s = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < ends_at_s and self.is_running:
            try:
                self.get("/health")
            except (OSError, urllib.error.URLError):
                time.sleep(0.2)
            else:
                return
        raise RuntimeError(f"vllm serve is not ready:\n{self.log.read_text(encoding='utf-8')[-4000:]}")

    def get(self, path: str) -> str:
        """The text of a page. Raises OSError."""
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return str(response.read().decode())

    def stop(self) -> None:
        """End all its processes; see supervised."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._popen.wait()
