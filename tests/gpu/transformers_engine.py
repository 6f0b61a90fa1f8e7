"""transformers_engine: what the tests run in processes of their own: a model on the GPU, its adapter, its serving loop.

Each turn of a conversation is generated twice: from what the adapter loaded, and from keys and values that never left
the GPU, cut to the same tokens and turned by torch. Both compute the same things in the same shapes, so that in any
dtype tokens and bytes must be equal. Commands come as JSON lines, answers go back the same way.
"""

from __future__ import annotations

import os
import signal
from dataclasses import asdict
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import kvservice_client as kv
from kvservice_adapters.positions import moved
from kvservice_adapters.service import KVClient
from kvservice_adapters.serving import ForwardCounter, Request, ServingLoop
from kvservice_adapters.transformers import (
    AdapterOptions,
    DrainOutcome,
    KVRows,
    TransformersAdapter,
    positions_of,
    serve_model,
)
from kvservice_adapters.truncation import TruncationPolicy
from tests.adapters.clients import PassingClient
from tests.gpu.engine import serve

TIMEOUT_S = 30.0


class Kept:
    """A conversation's keys and values as they were computed, and where each token stood then."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._rope = positions_of(model)
        self._rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._positions = torch.zeros(0, dtype=torch.long, device="cuda")

    def cache(self, *, dropped: int, tokens: int) -> DynamicCache:
        """So many tokens behind the dropped ones, at the positions they have now."""
        cache = DynamicCache(config=self._model.config)
        span = slice(dropped, dropped + tokens)
        now_at = torch.arange(tokens, device="cuda")
        for layer, (keys, values) in enumerate(self._rows if tokens else []):
            turned = moved(keys[:, span], self._rope, computed_at=self._positions[span], now_at=now_at)
            cache.update(turned[None], values[None, :, span], layer)
        return cache

    def keep(self, rows: KVRows, *, dropped: int, reused: int) -> None:
        """Remember what a turn computed."""
        end = dropped + reused
        computed = [(keys[:, reused:].clone(), values[:, reused:].clone()) for keys, values in rows]
        if self._rows:
            pairs = zip(self._rows, computed, strict=True)
            computed = [
                (torch.cat([k[:, :end], new_k], dim=1), torch.cat([v[:, :end], new_v], dim=1))
                for (k, v), (new_k, new_v) in pairs
            ]
        self._rows = computed
        positions = torch.arange(reused, rows[0][0].shape[1], device="cuda")
        self._positions = torch.cat([self._positions[:end], positions])


class Engine:
    """One model, one adapter, and loops with and without it."""

    def open(
        self,
        model_dir: str,
        socket_dir: str,
        dtype: str,
        window_tokens: int = 0,
        buffer_bytes: int = 0,
        own_client: int = 0,
    ) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
        self.model = model.to("cuda").eval()
        options = AdapterOptions(recompute_if_faster=False, hbm_buffer_size_bytes=buffer_bytes)
        truncation = TruncationPolicy(window_tokens) if window_tokens else None
        service: KVClient | str = socket_dir
        if own_client:
            namespace = serve_model(self.model, weights_identity="seeded").namespace
            service = PassingClient(kv.attach(namespace, socket_dir=socket_dir))
        self.adapter = TransformersAdapter(
            self.model, service, weights_identity="seeded", options=options, truncation=truncation
        )
        self.adapter.prepare(tokens=16)
        self.kept: dict[str, Kept] = {}

    def turn(self, session: str, tokens: list[int], new_tokens: int = 24, kill: int = 0) -> dict[str, Any]:
        """Generate from what is loaded, and from what was kept; `kill`: a process to kill once the load has begun."""
        ids, dropped = tokens, 0
        if self.adapter.truncation is not None:
            fitted = self.adapter.fit(tokens, session_id=session, max_new_tokens=new_tokens)
            ids, dropped = list(fitted.tokens), fitted.dropped_tokens
            cache = self.adapter.load(fitted)
        else:
            cache = self.adapter.load(tokens, session_id=session)
        arriving = cache.is_arriving
        if kill:
            os.kill(kill, signal.SIGKILL)
        counter = ForwardCounter(self.model)
        output = self._generate(ids, cache, new_tokens)
        counter.detach()
        reused, rows = cache.reused_tokens, cache.rows()
        kept = self.kept.setdefault(session, Kept(self.model))
        beside = kept.cache(dropped=dropped, tokens=reused)
        expected = self._generate(ids, beside, new_tokens)
        pairs = [
            (part, other[0])
            for pair, (keys, values, _) in zip(rows, beside, strict=True)
            for part, other in zip(pair, (keys, values), strict=True)
        ]
        # What follows the history was computed twice, and rounds as the library's kernels please.
        same = [torch.equal(part[:, :reused], other[:, :reused]) for part, other in pairs]
        kept.keep(rows, dropped=dropped, reused=reused)
        self.adapter.save([*ids, *output], cache)
        return {
            "tokens": output,
            "same_tokens": output == expected,
            "same_history": all(same),
            "layer_wise": arriving,
            "reused": reused,
            "dropped": dropped,
            "computed": counter.positions - new_tokens + 1,
        }

    def resume(self, session: str, tokens: list[int], new_tokens: int = 24) -> dict[str, Any]:
        """Generate from what is loaded; nothing is kept and nothing saved."""
        cache = self.adapter.load(tokens, session_id=session)
        output = self._generate(tokens, cache, new_tokens)
        return {"tokens": output, "reused": cache.reused_tokens}

    def serve(self, prompts: dict[str, list[int]], with_service: bool) -> dict[str, Any]:
        """Run these requests, as one burst, in two rows; a loop is made for it."""
        loop = ServingLoop(self.model, self.adapter if with_service else None, rows=2, window_tokens=1024)
        for name, tokens in prompts.items():
            loop.submit(Request(name, tuple(tokens), max_new_tokens=20, session_id=name))
        results = loop.run_until_idle()
        assert loop.drain(TIMEOUT_S) is DrainOutcome.DRAINED
        loop.close()
        return {
            result.request_id: {
                "tokens": list(result.tokens),
                "reused": result.reused_tokens,
                "computed": result.computed_tokens,
            }
            for result in results
        }

    def drain(self) -> bool:
        return self.adapter.drain(TIMEOUT_S) is DrainOutcome.DRAINED

    def attached(self) -> bool:
        return self.adapter.attached

    def plane(self) -> str:
        return str(self.adapter.plane)

    def stats(self) -> dict[str, Any]:
        return asdict(self.adapter.stats())

    def close(self) -> None:
        self.adapter.close()

    def _generate(self, ids: list[int], cache: DynamicCache, new_tokens: int) -> list[int]:
        prompt = torch.tensor([ids], device="cuda")
        output: Any = self.model.generate(
            prompt,
            past_key_values=cache,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens: list[int] = output[0, len(ids) :].tolist()
        return tokens


if __name__ == "__main__":
    serve(Engine())
