"""generating: prompts, and generation with and without the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

import kvservice_client as kv
from kvservice_adapters.service import KVClient
from kvservice_adapters.serving import ForwardCounter
from kvservice_adapters.transformers import (
    AdapterOptions,
    DrainOutcome,
    PrefixCache,
    TransformersAdapter,
    serve_model,
)

TIMEOUT_S = 30.0
WEIGHTS = "seeded"
PROMPT_TOKENS, ANSWER_TOKENS, TOKENS_PER_BLOCK = 300, 24, 16
# The largest whole number of blocks that leaves a token of the prompt to compute.
REUSABLE_TOKENS = 288
REUSABLE_BLOCKS = REUSABLE_TOKENS // TOKENS_PER_BLOCK
# Of prompt and answer; the answer's last token never goes through the model.
SAVED_BLOCKS = (PROMPT_TOKENS + ANSWER_TOKENS - 1) // TOKENS_PER_BLOCK


def prompt(seed: int = 0, tokens: int = PROMPT_TOKENS) -> torch.Tensor:
    """Random ids, [1, tokens]."""
    return torch.randint(0, 512, (1, tokens), generator=torch.Generator().manual_seed(seed))


def generate(
    model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache | None = None, *, tokens: int = ANSWER_TOKENS
) -> torch.Tensor:
    """Greedy generation as transformers does it: prompt and answer, [1, tokens]."""
    output: Any = model.generate(  # type: ignore[operator]
        ids,
        past_key_values=cache,
        # Without it, generate takes the padding token's id in a random prompt for padding.
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert isinstance(output, torch.Tensor)
    return output


def computed(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache | None = None) -> tuple[torch.Tensor, int]:
    """Generate; the output, and how many positions of the prompt went through the model."""
    counter = ForwardCounter(model)
    output = generate(model, ids, cache)
    counter.detach()
    # Every generated token but the last one goes through the model once.
    return output, counter.positions - (ANSWER_TOKENS - 1)


def adapter_on(
    model: PreTrainedModel, service: KVClient | Path, salt: str, options: AdapterOptions | None = None
) -> TransformersAdapter:
    """An adapter in the test's own namespace; by default no speed decides what it loads."""
    options = options or AdapterOptions(recompute_if_faster=False)
    return TransformersAdapter(model, service, weights_identity=WEIGHTS, salt=salt, options=options)


def attach(model: PreTrainedModel, socket_dir: Path | str, salt: str, *, timeout_s: float = TIMEOUT_S) -> kv.Client:
    """A client in the namespace of `adapter_on`."""
    namespace = serve_model(model, weights_identity=WEIGHTS, salt=salt).namespace
    return kv.attach(namespace, socket_dir=str(socket_dir), attach_timeout_s=timeout_s)


def run_and_save(
    adapter: TransformersAdapter, model: PreTrainedModel, ids: torch.Tensor
) -> tuple[torch.Tensor, PrefixCache]:
    """One turn with the adapter, everything saved when it returns: output and cache."""
    cache = adapter.load(ids, session_id="s")
    output = generate(model, ids, cache)
    adapter.save(output, cache)
    assert adapter.drain(TIMEOUT_S) is DrainOutcome.DRAINED
    return output, cache
