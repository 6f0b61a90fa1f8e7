"""vllm_engine: a real vLLM in a process and an environment of its own, driven through a pipe."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.vllm_server import VENV, transfer_config, vllm_environment
from tests.commands import CommandedProcess
from tests.daemons import DaemonProcess

_PROGRAM = Path(__file__).parent / "programs" / "vllm_engine.py"
_ANSWER_S = 120.0

TOKENS_PER_BLOCK = 32
"""The smallest block of vLLM's CPU backend."""


PATIENT: dict[str, Any] = {
    "lookup_wait_s": 30.0,
    "promotion_wait_s": 30.0,
    "attach_wait_s": 30.0,
    "load_timeout_s": 60.0,
    "save_timeout_s": 60.0,
    "recompute_if_faster": False,
}
"""Options of the adapter with which a busy machine does not decide whether a block is reused."""


class VllmEngine(CommandedProcess):
    """A process with one engine at a time. A context manager that leaves no process behind."""

    def __init__(self, **environ: str) -> None:
        popen = subprocess.Popen(
            [VENV / "bin" / "python", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sys.stderr,
            text=True,
            env=vllm_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0") | environ,
        )
        super().__init__(popen, answer_s=_ANSWER_S)
        self.opened: object = None
        """What engine is open, for those who share one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._popen.kill()
        self._popen.wait()
        self.close_pipes()

    def close(self) -> None:
        """End the engine, if one is open."""
        self.opened = None
        self.do("close")

    def open(self, model: Path, **arguments: Any) -> None:
        """Start an engine on that model. Raises CommandFailed."""
        settings = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 2048,
            "block_size": TOKENS_PER_BLOCK,
        }
        self.do("open", **settings | arguments)

    def open_attached(self, model: Path, daemon: DaemonProcess | None, **arguments: Any) -> None:
        """Start an engine with the adapter on that daemon, or without; "options" are the adapter's."""
        options: dict[str, Any] = PATIENT | arguments.pop("options", {})
        if daemon is not None:
            arguments["kv_transfer_config"] = transfer_config(socket_dir=daemon.socket_dir, **options)
        self.open(model, **arguments)

    def generate(self, *prompts: Sequence[int], **arguments: Any) -> list[dict[str, Any]]:
        """Greedy tokens of the prompts, in their order."""
        answered: list[dict[str, Any]] = self.do("generate", prompts=[list(prompt) for prompt in prompts], **arguments)
        return answered
