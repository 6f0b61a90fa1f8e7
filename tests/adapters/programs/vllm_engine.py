"""A real vLLM in this process: reads commands from its input, one JSON object a line, answers each on its output.

Run by the interpreter of vLLM's own environment (scripts/install_vllm.sh), so it imports nothing of the tests. vLLM
writes to its standard output as it likes; the answers therefore leave through a descriptor of their own.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from typing import Any

# What engine and worker print goes where a test shows it; the answers do not mix with it.
_answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402


class Engine:
    """One engine at a time, with or without the connector."""

    def __init__(self) -> None:
        self._llm: LLM | None = None
        self._scheduled: dict[str, int] = {}

    # -------------------------------------------------------------------- life

    def open(self, **arguments: Any) -> None:
        """Start an engine; the one before it must be closed."""
        assert self._llm is None, "one engine at a time"
        self._llm = LLM(**arguments)
        self._scheduled = {}
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
            self._watch_scheduler()

    def close(self) -> None:
        """End the engine, as a restart would."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()

    # ---------------------------------------------------------------- requests

    def generate(self, prompts: list[list[int]], tokens: int = 24, **request: Any) -> list[dict[str, Any]]:
        """Greedy tokens of each prompt, all at once."""
        return self._outputs(prompts, tokens, request)

    def _outputs(self, prompts: list[list[int]], tokens: int, request: dict[str, Any]) -> list[dict[str, Any]]:
        assert self._llm is not None
        self._scheduled.clear()
        salt = {"cache_salt": request["cache_salt"]} if "cache_salt" in request else {}
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt, **salt} for prompt in prompts], params, use_tqdm=False
        )
        return [
            {
                "tokens": list(output.outputs[0].token_ids),
                "finish_reason": output.outputs[0].finish_reason,
                "cached": output.num_cached_tokens,
                # Every generated token but the last goes through the model once.
                "computed": self._computed(output.request_id) - (tokens - 1),
            }
            for output in outputs
        ]

    # ----------------------------------------------------------------- looking

    def _computed(self, request_id: str) -> int:
        # The engine's own ids carry a suffix.
        return sum(count for name, count in self._scheduled.items() if name.split("-")[0] == request_id)

    def _watch_scheduler(self) -> None:
        assert self._llm is not None
        scheduler = self._scheduler()
        schedule = scheduler.schedule

        def counting(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            for name, count in output.num_scheduled_tokens.items():
                self._scheduled[name] = self._scheduled.get(name, 0) + count
            return output

        scheduler.schedule = counting

    def _scheduler(self) -> Any:
        assert self._llm is not None
        return self._llm.llm_engine.engine_core.engine_core.scheduler


def main() -> None:
    """Answer commands until the input ends."""
    engine = Engine()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"answer": getattr(engine, request.pop("command"))(**request)}
        except Exception as error:  # noqa: BLE001  # the test decides what a failure means
            traceback.print_exc()
            answer = {"error": type(error).__name__, "message": str(error)}
        _answers.write(json.dumps(answer) + "\n")
        _answers.flush()
    engine.close()


if __name__ == "__main__":
    main()
