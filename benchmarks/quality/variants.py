"""variants: what an engine can do with saved KV when a conversation outgrows its window, and what the model predicts.

A conversation is fed in steps, as turns would be. Whenever the next step does not fit the window, the oldest half
of the context goes (in whole blocks, after the sinks if there are any). The variants differ only in the KV that is
left of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from kvservice_adapters.positions import Rope, moved

_DROPPED_SHARE = 0.5  # the paper's truncation ratio


class Variant(Enum):
    """What is done at an overflow."""

    RECOMPUTE = "token truncation, recomputed"
    SHIFTED = "saved KV, positions shifted"
    SHIFTED_WITH_SINKS = "saved KV, positions shifted, first block kept"
    NAIVE = "saved KV, old positions kept in the keys"


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model said about each token but the first, [batch, tokens - 1].

    Attributes:
        loss: negative log likelihood in nats.
        is_right: whether the token was the model's first choice.
        depth: how many truncations came before the token was predicted, [tokens - 1].
        kept_from: the oldest token of the context that predicted it (sinks aside), [tokens - 1].
    """

    loss: torch.Tensor
    is_right: torch.Tensor
    depth: torch.Tensor
    kept_from: torch.Tensor


class _Context:
    """The KV of one batch: as it was computed, with the positions it was computed at, and as the model sees it now."""

    def __init__(self, model: LlamaForCausalLM, rope: Rope) -> None:
        self._model = model
        self._rope = rope
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._cache = DynamicCache()
        self._computed_keys: list[torch.Tensor] = []
        self._computed_at = torch.empty(0, dtype=torch.int64, device=self._model.device)

    def __len__(self) -> int:
        return len(self._computed_at)

    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, tokens, vocabulary] of tokens behind the context."""
        positions = torch.arange(len(self), len(self) + tokens.shape[1], device=tokens.device)
        logits: torch.Tensor = self._model(
            tokens, past_key_values=self._cache, position_ids=positions[None], use_cache=True
        ).logits
        new = [layer.keys[:, :, len(self) :] for layer in self._layers() if layer.keys is not None]
        if self._computed_keys:
            self._computed_keys = [
                torch.cat([old, more], dim=2) for old, more in zip(self._computed_keys, new, strict=True)
            ]
        else:
            self._computed_keys = new
        self._computed_at = torch.cat([self._computed_at, positions])
        return logits

    def keep(self, kept: torch.Tensor, *, shifted: bool) -> None:
        """Drop all but these tokens. Shifted keys are made from the computed ones each time: roundings never add up."""
        self._computed_keys = [keys[:, :, kept] for keys in self._computed_keys]
        self._computed_at = self._computed_at[kept]
        now_at = torch.arange(len(kept), device=kept.device)
        for layer, keys in zip(self._layers(), self._computed_keys, strict=True):
            assert layer.values is not None, "a context that overflows holds tokens"
            layer.keys = moved(keys, self._rope, computed_at=self._computed_at, now_at=now_at) if shifted else keys
            layer.values = layer.values[:, :, kept]

    def _layers(self) -> list[DynamicLayer]:
        return [layer for layer in self._cache.layers if isinstance(layer, DynamicLayer)]


@torch.inference_mode()
def predict(
    model: LlamaForCausalLM,
    tokens: torch.Tensor,
    variant: Variant,
    rope: Rope,
    *,
    window_tokens: int,
    step_tokens: int = 64,
    block_tokens: int = 16,
) -> Prediction:
    """Feed a batch of conversations [batch, tokens] through the variant.

    Args:
        rope: the model's, by which saved keys are moved.
        window_tokens: the context never holds more.
        step_tokens: tokens that are fed at once.
        block_tokens: truncations cut between blocks of so many tokens.
    """
    context = _Context(model, rope)
    sinks = block_tokens if variant is Variant.SHIFTED_WITH_SINKS else 0
    truncations, kept_from = 0, 0
    losses, rights, depths, starts = [], [], [], []
    length = tokens.shape[1] - 1
    for start in range(0, length, step_tokens):
        step = tokens[:, start : min(start + step_tokens, length)]
        if len(context) + step.shape[1] > window_tokens:
            dropped = int(len(context) * _DROPPED_SHARE) // block_tokens * block_tokens
            kept = torch.arange(len(context), device=tokens.device)
            kept = torch.cat([kept[:sinks], kept[sinks + dropped :]])
            kept_from = start - (len(kept) - sinks)
            truncations += 1
            if variant is Variant.RECOMPUTE:
                context.clear()
                context.extend(tokens[:, kept_from:start])
            else:
                context.keep(kept, shifted=variant is not Variant.NAIVE)
        logits = context.extend(step).float()
        targets = tokens[:, start + 1 : start + 1 + step.shape[1]]
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
        rights.append(logits.argmax(dim=2) == targets)
        depths.append(torch.full((step.shape[1],), truncations))
        starts.append(torch.full((step.shape[1],), kept_from))
    return Prediction(torch.cat(losses, dim=1), torch.cat(rights, dim=1), torch.cat(depths), torch.cat(starts))
