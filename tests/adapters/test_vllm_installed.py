"""The vLLM of the engine tests: it runs here, without a GPU, and computes the same tokens every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adapters.vllm_engine import VllmEngine

pytestmark = [pytest.mark.engines, pytest.mark.timeout(180)]


def test_a_real_vllm_runs_and_is_deterministic(vllm: VllmEngine, model_dir: Path) -> None:
    prompt = [(7 * position) % 509 for position in range(300)]
    answers = []
    for _ in range(2):
        vllm.open(model_dir)
        answers.append(vllm.generate(prompt))
        vllm.do("close")
    assert answers[0] == answers[1]
    ((answer,), _) = answers
    assert len(set(answer["tokens"])) > 1, "a model that repeats one token would hide wrong KV"
    assert (answer["cached"], answer["computed"], answer["finish_reason"]) == (0, 300, "length")
