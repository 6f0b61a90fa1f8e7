"""vllm_scenes: prompts, and what is said again and again in tests of the vLLM adapter."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.adapters.vllm_engine import TOKENS_PER_BLOCK, VllmEngine
from tests.daemons import MIB
from tests.waiting import eventually

PROMPT_TOKENS, ANSWER_TOKENS = 300, 24
HELD_TOKENS = PROMPT_TOKENS // TOKENS_PER_BLOCK * TOKENS_PER_BLOCK
"""Of a prompt that was computed before: its full blocks."""
TAIL_TOKENS = PROMPT_TOKENS - HELD_TOKENS


def two_tiers(nvme_dir: Path) -> dict[str, Any]:
    """Knobs of a daemon that writes everything behind at once."""
    return {
        "dram_bytes": 64 * MIB,
        "nvme_dirs": nvme_dir,
        "nvme_bytes": 512 * MIB,
        "nvme_segment_bytes": 16 * MIB,
        "nvme_write_behind_s": 0.1,
    }


def prompt(seed: int | str = 0, tokens: int = PROMPT_TOKENS) -> list[int]:
    """Random ids of the tiny model's vocabulary."""
    return random.Random(seed).choices(range(512), k=tokens)


def answer(engine: VllmEngine, ids: list[int], **arguments: Any) -> dict[str, Any]:
    """One request's outcome; every block that it filled is saved when this returns, or will never be."""
    (outcome,) = engine.generate(ids, **arguments)
    engine.do("settle")
    assert outcome["finish_reason"] == "length"
    return outcome


def wait_attached(engine: VllmEngine) -> None:
    """Wait until both halves have found the daemon."""
    eventually(lambda: set(engine.do("status")) == {"attached"}, what="the engine is attached")


def computed_before(engine: VllmEngine, ids: list[int], **arguments: Any) -> list[int]:
    """The tokens that answer a prompt whose blocks the store holds afterwards and the engine does not."""
    outcome = answer(engine, ids, **arguments)
    assert outcome["computed"] == len(ids), "the test's prompt is not its own"
    engine.do("drop_cache")
    tokens: list[int] = outcome["tokens"]
    return tokens
