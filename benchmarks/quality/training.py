"""training: a small byte-level Llama, trained from nothing for a stated time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measuring import progress
from benchmarks.quality import dialogues
from benchmarks.quality.corpus import Corpus

VOCABULARY = 256  # bytes
_SEED = 11
_DIALOGUE_SHARE = 0.5
_DIALOGUE_POOL = 32_768
_WARM_UP_SHARE = 0.05
_SHOW_EVERY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides the model. `window_tokens` is the context it is trained on."""

    window_tokens: int = 512
    layers: int = 6
    hidden: int = 384
    heads: int = 6
    kv_heads: int = 3
    batch: int = 64
    peak_rate: float = 1.5e-3
    seconds: float = 170.0


def train(recipe: Recipe, corpus: Corpus, device: str) -> LlamaForCausalLM:
    """The trained model in float32, in evaluation mode. Blocks for `recipe.seconds`; shows progress."""
    torch.manual_seed(_SEED)
    model = LlamaForCausalLM(  # type: ignore[no-untyped-call]
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.hidden * 8 // 3 // 64 * 64,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            max_position_embeddings=recipe.window_tokens,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    model.to(torch.device(device))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.peak_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda"
    )
    started_s = shown_s = time.monotonic()
    losses: list[torch.Tensor] = []
    for step, batch in enumerate(_batches(recipe, corpus, device)):
        elapsed_s = time.monotonic() - started_s
        if elapsed_s >= recipe.seconds:
            break
        for group in optimizer.param_groups:
            group["lr"] = recipe.peak_rate * _rate(elapsed_s / recipe.seconds)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().reshape(-1, VOCABULARY), batch[:, 1:].reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if time.monotonic() - shown_s > _SHOW_EVERY_S:
            shown_s = time.monotonic()
            mean = torch.stack(losses[-50:]).mean().item()
            seen = (step + 1) * recipe.batch * recipe.window_tokens / 1e6
            progress(f"training: {elapsed_s:4.0f} of {recipe.seconds:.0f} s, {seen:.0f} MB, loss {mean:.3f} nats")
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _rate(share: float) -> float:
    """The share of the peak learning rate after that share of the time: warm-up, then cosine to a tenth."""
    if share < _WARM_UP_SHARE:
        return share / _WARM_UP_SHARE
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share))


def _batches(recipe: Recipe, corpus: Corpus, device: str) -> Iterator[torch.Tensor]:
    """Endless [batch, window_tokens + 1] int64: a share of dialogues, the rest pieces of the corpus."""
    generator = torch.Generator().manual_seed(_SEED)
    text = torch.frombuffer(bytearray(corpus.training), dtype=torch.uint8).to(device)
    length = recipe.window_tokens + 1
    made = [
        dialogues.make(
            seed=number, size_bytes=length, filler=corpus.training, recall_bytes_max=recipe.window_tokens * 3 // 4
        ).text
        for number in range(_DIALOGUE_POOL)
    ]
    pool = torch.frombuffer(bytearray(b"".join(made)), dtype=torch.uint8).view(_DIALOGUE_POOL, length).to(device)
    spoken = int(recipe.batch * _DIALOGUE_SHARE)
    offsets = torch.arange(length, device=device)
    while True:
        starts = torch.randint(len(text) - length, (recipe.batch - spoken,), generator=generator).to(device)
        chosen = torch.randint(_DIALOGUE_POOL, (spoken,), generator=generator).to(device)
        yield torch.cat([text[starts[:, None] + offsets], pool[chosen]]).long()
