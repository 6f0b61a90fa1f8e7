"""policies: what a touch and an eviction cost in the eviction order of a million blocks, against plain LRU's.

The order is filled with chains of 256 blocks, as 4,096 tokens at 16 a block are. Then chains are used again, in random
order, which is the touch; then chains are stored while as many blocks leave, which is the eviction. Both sides take
turns over the same chains; no index, no bytes, and every end of a chain may leave.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from time import perf_counter

import numpy as np

from benchmarks.measuring import Record, take_turns
from benchmarks.settings import Settings
from kvservice.policies import EvictionPolicy, make_policy, nothing_remembered

_CHAIN_BLOCKS = 256
_TOUCHES = 400
_EVICTED_CHAINS = 100
_INTERVAL_S = 0.3


def measure(settings: Settings) -> Iterator[Record]:
    """policy_touch_us and policy_evict_us of `predictive`, and of `lookahead` beside them."""
    blocks = settings.growth_blocks[1]
    sides = {name: Side(name, blocks) for name in ("lru", "lookahead", "predictive")}
    for name in ("predictive", "lookahead"):
        turns = take_turns(
            reference=sides["lru"].measure,
            ours=sides[name].measure,
            repetitions=settings.repetitions,
            title=f"policy {name}",
        )
        suffix = "" if name == "predictive" else f"_{name}"
        for what in ("touch", "evict"):
            yield turns.latency(f"policy_{what}_us{suffix}", ours=what, reference=what)


class Side:
    """One policy twice: what eviction broke up would be no chain any more to touch."""

    def __init__(self, name: str, blocks: int) -> None:
        self._touched, self._evicted = Filled(make_policy(name), blocks), Filled(make_policy(name), blocks)

    def measure(self, seed: int) -> Mapping[str, float]:
        """Mean seconds of the touch of a block, and of storing one while another leaves."""
        return {"touch": self._touched.touch_s(seed), "evict": self._evicted.evict_s()}


class Filled:
    """A policy whose order holds that many blocks, in chains that were stored 0.3 s apart."""

    def __init__(self, policy: EvictionPolicy, blocks: int) -> None:
        self._policy = policy
        self._now_s = 1.0
        self._chains = [
            np.arange(first, first + _CHAIN_BLOCKS, dtype=np.int32)
            for first in range(0, blocks - _CHAIN_BLOCKS + 1, _CHAIN_BLOCKS)
        ]
        for chain in self._chains:
            self._store(chain)

    def touch_s(self, seed: int) -> float:
        """Mean seconds of the touch of a block, chains being used 0.3 s apart."""
        touched = random.Random(seed).choices(self._chains, k=_TOUCHES)
        started_s = perf_counter()
        for chain in touched:
            self._now_s += _INTERVAL_S
            self._policy.touch(chain, self._now_s)
        return (perf_counter() - started_s) / (_TOUCHES * _CHAIN_BLOCKS)

    def evict_s(self) -> float:
        """Mean seconds of storing a block while another leaves, a chain's worth at a time."""
        started_s = perf_counter()
        for _ in range(_EVICTED_CHAINS):
            self._store(np.array(self._evict(_CHAIN_BLOCKS)[::-1], dtype=np.int32))
        return (perf_counter() - started_s) / (_EVICTED_CHAINS * _CHAIN_BLOCKS)

    def _store(self, chain: np.ndarray) -> None:
        self._now_s += _INTERVAL_S
        self._policy.stored(chain, chain - 1, self._now_s, nothing_remembered(chain))

    def _evict(self, count: int) -> list[int]:
        left: list[int] = []
        for row in self._policy.victims(lambda row: True, self._now_s):
            self._policy.forget(row)
            left.append(row)
            if len(left) == count:
                break
        return left
