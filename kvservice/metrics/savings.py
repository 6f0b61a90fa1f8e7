"""What the hits were worth: prompt tokens that no engine had to prefill, in GPU time and money. Estimates."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

_SECONDS_PER_HOUR = 3600.0


class Savings:
    """Counters that every hit feeds.

    The estimate takes every block that was handed out as prefill avoided, at one speed for all models: it leaves out
    what loading costs the engine, and that attention makes tokens late in a long prompt dearer than early ones.

    Args:
        prefill_tokens_per_gpu_s: how fast one GPU prefills; 0: GPU time and money are not estimated.
        gpu_hour_price: of one GPU for an hour, in whatever currency; 0: money is not estimated.
    """

    def __init__(self, registry: CollectorRegistry, *, prefill_tokens_per_gpu_s: float, gpu_hour_price: float) -> None:
        self._gpu_s_per_token = 1 / prefill_tokens_per_gpu_s if prefill_tokens_per_gpu_s else 0.0
        self._price_per_token = self._gpu_s_per_token * gpu_hour_price / _SECONDS_PER_HOUR
        self._tokens = Counter(
            "kvservice_saved_tokens",
            "Estimate: prompt tokens that were handed out as KV blocks instead of prefilled.",
            registry=registry,
        )
        self._gpu_seconds = Counter(
            "kvservice_saved_prefill_gpu_seconds",
            "Estimate: GPU time of that prefill, at prefill_tokens_per_gpu_s.",
            registry=registry,
        )
        self._money = Counter(
            "kvservice_saved_money",
            "Estimate: price of that GPU time at gpu_hour_price, in its currency.",
            registry=registry,
        )

    def count(self, tokens: int) -> None:
        """These tokens' blocks were handed to a reader."""
        self._tokens.inc(tokens)
        self._gpu_seconds.inc(tokens * self._gpu_s_per_token)
        self._money.inc(tokens * self._price_per_token)
