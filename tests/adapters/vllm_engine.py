"""vllm_engine: a real vLLM in a process and an environment of its own, driven through a pipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.daemons import environment

_ROOT = Path(__file__).parents[2]
_PROGRAM = Path(__file__).parent / "programs" / "vllm_engine.py"
_ANSWER_S = 120.0

VENV = _ROOT / os.environ.get("VLLM_VENV", ".venv-vllm")
"""Made by scripts/install_vllm.sh."""

TOKENS_PER_BLOCK = 32
"""The smallest block of vLLM's CPU backend."""


class EngineFailed(Exception):
    """The command raised in the engine; `kind` is the exception's class."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


def engine_environment(**changes: str) -> dict[str, str]:
    """For a vLLM that stays on this machine, with this tree's client and adapters."""
    paths = [str(_ROOT / "client"), str(_ROOT / "engine_adapters")]
    return environment(
        PYTHONPATH=os.pathsep.join(paths),
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        # Threads that spin while they wait take the cores from the daemon.
        OMP_WAIT_POLICY="PASSIVE",
        **changes,
    )


class VllmEngine:
    """A process with one engine at a time. A context manager that leaves no process behind."""

    def __init__(self, **environ: str) -> None:
        self._popen = subprocess.Popen(
            [VENV / "bin" / "python", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=sys.stderr,
            text=True,
            env=engine_environment() | environ,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._popen.kill()
        self._popen.wait()
        for stream in (self._popen.stdin, self._popen.stdout):
            assert stream is not None
            stream.close()

    def start(self, command: str, **arguments: Any) -> None:
        """Send a command without waiting for its answer."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._popen.stdin.flush()

    def answer(self) -> Any:
        """Wait for the answer of the oldest command.

        Raises:
            EngineFailed: the command raised.
            EOFError: the process is gone.
        """
        assert self._popen.stdout is not None
        # A read of a pipe has no deadline of its own; the end of the process ends it.
        watchdog = threading.Timer(_ANSWER_S, self._popen.kill)
        watchdog.start()
        try:
            line = self._popen.stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise EOFError(f"the engine is gone: {self._popen.wait()}")
        answered = json.loads(line)
        if "error" in answered:
            raise EngineFailed(answered["error"], answered["message"])
        return answered["answer"]

    def do(self, command: str, **arguments: Any) -> Any:
        """Send a command and wait for its answer. Raises EngineFailed, EOFError."""
        self.start(command, **arguments)
        return self.answer()

    def open(self, model: Path, **arguments: Any) -> None:
        """Start an engine on that model. Raises EngineFailed."""
        settings = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "float32",
            "max_model_len": 2048,
            "block_size": TOKENS_PER_BLOCK,
        }
        self.do("open", **settings | arguments)

    def generate(self, *prompts: Sequence[int], **arguments: Any) -> list[dict[str, Any]]:
        """Greedy tokens of the prompts, in their order."""
        answered: list[dict[str, Any]] = self.do("generate", prompts=[list(prompt) for prompt in prompts], **arguments)
        return answered
