"""The transformers adapter on a GPU: blocks cross the bus through pinned memory, bit by bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvservice_adapters.serving import Request, Result, ServingLoop
from kvservice_adapters.transformers import DrainOutcome, TransformersAdapter

pytestmark = [pytest.mark.gpu, pytest.mark.engines, pytest.mark.timeout(120)]

TIMEOUT_S = 30.0
# Reuse is by blocks of 16 tokens, and one token of the prompt stays to compute.
PROMPT_TOKENS, REUSABLE_TOKENS = 500, 496


def run(loop: ServingLoop, names: list[str]) -> dict[str, Result]:
    for index, name in enumerate(names):
        ids = torch.randint(0, 512, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(index))
        loop.submit(Request(name, tuple(ids.tolist()), max_new_tokens=24))
    return {result.request_id: result for result in loop.run_until_idle()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_on_the_gpu_are_saved_and_resumed_bit_by_bit(
    model_dir: Path, socket_dir: Path, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    model.to("cuda")  # type: ignore[arg-type]
    salt = f"gpu {dtype}"
    with TransformersAdapter(model, socket_dir, weights_identity="seeded", salt=salt) as adapter:
        loop = ServingLoop(model, adapter, rows=4, window_tokens=600)
        cold = run(loop, ["a", "b", "c"])
        assert loop.drain(TIMEOUT_S) is DrainOutcome.DRAINED
        assert adapter.stats().saved_blocks == 3 * ((PROMPT_TOKENS + 23) // 16)
        before = [tuple(part.clone() for part in pair) for pair in adapter.load(prompt_of(0)).rows()]
        warm = run(loop, ["a", "b", "c"])
    assert all(keys.is_cuda and keys.shape[1] == REUSABLE_TOKENS for keys, _ in before)
    for name, result in warm.items():
        assert (result.reused_tokens, result.computed_tokens) == (REUSABLE_TOKENS, PROMPT_TOKENS - REUSABLE_TOKENS)
        if dtype is torch.float32:
            assert result.tokens == cold[name].tokens
    # Beside the same prompt computed by the model itself: what a prefill puts into the cache is what came back.
    cache = model(prompt_of(0).to("cuda"), use_cache=True).past_key_values
    for (keys, values), layer in zip(before, cache.layers, strict=True):
        assert torch.equal(keys, layer.keys[0, :, :REUSABLE_TOKENS])
        assert torch.equal(values, layer.values[0, :, :REUSABLE_TOKENS])


def prompt_of(seed: int) -> torch.Tensor:
    return torch.randint(0, 512, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(seed))
