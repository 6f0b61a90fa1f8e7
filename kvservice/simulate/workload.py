"""workload: the paper's workload, generated: conversations that arrive at random and come back after thinking.

Stated by the paper (CachedAttention, section 4.1): 9,000 conversations of ShareGPT, 5.75 turns in the mean, 73 % with
more than one, new conversations Poisson at 1.0/s. Left open by it and chosen here: how long prompts and replies are
(lognormal, means 120 and 380 tokens, so that about half of the conversations pass 2,000 tokens), how long people think
(exponential, mean 60 s, from the end of a reply), and that no conversation is truncated. Only full blocks are kept,
as engines do it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from kvservice.blocks import BlockHash
from kvservice.simulate.requests import Request, block_hash

_SINGLE_TURN = 0.27
_SIGMA = 1.0
_NOMINAL_TOKEN_S = 0.03


@dataclass(frozen=True, slots=True)
class Workload:
    """What is generated."""

    conversations: int = 9_000
    per_second: float = 1.0
    turns_mean: float = 5.75
    think_s_mean: float = 60.0
    prompt_tokens_mean: float = 120.0
    reply_tokens_mean: float = 380.0
    block_tokens: int = 256
    seed: int = 1


def generate(workload: Workload) -> list[Request]:
    """The requests by nominal time of arrival: as if a reply took 30 ms a token and nobody waited."""
    chooser = random.Random(workload.seed)  # noqa: S311  # a workload, not a secret
    drafts: list[Request] = []
    numbers = iter(range(1, 1 << 62))
    starts_s = 0.0
    for _ in range(workload.conversations):
        starts_s += chooser.expovariate(workload.per_second)
        at_s, tokens, follows, think_s = starts_s, 0, -1, 0.0
        chain: list[BlockHash] = []
        for _ in range(_turns(chooser, workload.turns_mean)):
            input_tokens = tokens + _tokens(chooser, workload.prompt_tokens_mean)
            output_tokens = _tokens(chooser, workload.reply_tokens_mean)
            tokens = input_tokens + output_tokens
            known = len(chain)
            chain = chain + [block_hash(next(numbers)) for _ in range(tokens // workload.block_tokens - known)]
            hashes = chain[: input_tokens // workload.block_tokens]
            drafts.append(Request(len(drafts), at_s, hashes, input_tokens, output_tokens, chain, follows, think_s))
            follows, think_s = len(drafts) - 1, chooser.expovariate(1.0 / workload.think_s_mean)
            at_s += output_tokens * _NOMINAL_TOKEN_S + think_s
    return sorted(drafts, key=lambda request: request.arrival_s)


def _turns(chooser: random.Random, mean: float) -> int:
    """One, or at least two with a geometric tail, so that the mean over all is `mean`."""
    if chooser.random() < _SINGLE_TURN:
        return 1
    more_mean = (mean - _SINGLE_TURN) / (1.0 - _SINGLE_TURN) - 2.0
    return 2 + int(math.log(1.0 - chooser.random()) / math.log(more_mean / (1.0 + more_mean)))


def _tokens(chooser: random.Random, mean: float) -> int:
    return max(1, round(chooser.lognormvariate(math.log(mean) - _SIGMA**2 / 2, _SIGMA)))
