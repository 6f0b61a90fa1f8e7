"""workload: the paper's workload, generated: conversations that arrive at random and come back after thinking.

Stated by the paper (CachedAttention, section 4.1): 9,000 conversations of ShareGPT, 5.75 turns in the mean, 73 % with
more than one, new conversations Poisson at 1.0/s. Left open by it and chosen here: how long prompts and replies are
(lognormal, means 120 and 380 tokens, so that about half of the conversations pass 2,000 tokens), how long people think
(exponential, mean 60 s, from the end of a reply), and that no conversation outgrows its window unless one is given;
then the older half goes, as in the paper. Only full blocks are kept, as engines do it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvservice.blocks import BlockHash
from kvservice.simulate.requests import Request, Truncated, block_hash

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
    context_tokens: int = 0
    """The model's window: conversations that outgrow it lose the older half of it; 0: no end."""
    keeps_truncated: bool = True
    """The blocks that stay are still of use, as with the service's Truncate; else they are computed again."""
    seed: int = 1


def generate(workload: Workload) -> list[Request]:
    """The requests by nominal time of arrival: as if a reply took 30 ms a token and nobody waited."""
    chooser = random.Random(workload.seed)  # noqa: S311  # a workload, not a secret
    drafts: list[Request] = []
    numbers = iter(range(1, 1 << 62))
    starts_s = 0.0
    for _ in range(workload.conversations):
        starts_s += chooser.expovariate(workload.per_second)
        at_s, follows, think_s = starts_s, -1, 0.0
        conversation = _Conversation(workload, numbers)
        for _ in range(_turns(chooser, workload.turns_mean)):
            prompt = _tokens(chooser, workload.prompt_tokens_mean)
            reply = _tokens(chooser, workload.reply_tokens_mean)
            drafts.append(conversation.turn(prompt, reply, Request(len(drafts), at_s, (), 0, 0, (), follows, think_s)))
            follows, think_s = len(drafts) - 1, chooser.expovariate(1.0 / workload.think_s_mean)
            at_s += reply * _NOMINAL_TOKEN_S + think_s
    return sorted(drafts, key=lambda request: request.arrival_s)


class _Conversation:
    """What is in the window after each turn."""

    def __init__(self, workload: Workload, numbers: Iterator[int]) -> None:
        self._workload = workload
        self._numbers = numbers
        self._tokens = 0
        self._chain: list[BlockHash] = []

    def turn(self, prompt_tokens: int, reply_tokens: int, draft: Request) -> Request:
        """The draft with the turn's tokens and blocks; a turn takes at most half of the window."""
        truncated = None
        block_tokens, window = self._workload.block_tokens, self._workload.context_tokens
        if window:
            prompt_tokens, reply_tokens = (min(tokens, window // 4) for tokens in (prompt_tokens, reply_tokens))
            if self._tokens + prompt_tokens + reply_tokens > window:
                truncated = self._truncate()
        input_tokens = self._tokens + prompt_tokens
        self._tokens = input_tokens + reply_tokens
        self._chain = self._chain + self._fresh(self._tokens // block_tokens - len(self._chain))
        return replace(
            draft,
            hashes=self._chain[: input_tokens // block_tokens],
            input_tokens=input_tokens,
            output_tokens=reply_tokens,
            stored=self._chain,
            truncated=truncated,
        )

    def _truncate(self) -> Truncated | None:
        """The oldest half of the window goes, in whole blocks, and what stays has new hashes."""
        before = self._chain
        first = min(len(before), -(-self._workload.context_tokens // (2 * self._workload.block_tokens)))
        self._tokens -= first * self._workload.block_tokens
        self._chain = self._fresh(len(before) - first)
        return Truncated(before, first) if self._workload.keeps_truncated else None

    def _fresh(self, count: int) -> list[BlockHash]:
        return [block_hash(next(self._numbers)) for _ in range(count)]


def _turns(chooser: random.Random, mean: float) -> int:
    """One, or at least two with a geometric tail, so that the mean over all is `mean`."""
    if chooser.random() < _SINGLE_TURN:
        return 1
    more_mean = (mean - _SINGLE_TURN) / (1.0 - _SINGLE_TURN) - 2.0
    return 2 + int(math.log(1.0 - chooser.random()) / math.log(more_mean / (1.0 + more_mean)))


def _tokens(chooser: random.Random, mean: float) -> int:
    return max(1, round(chooser.lognormvariate(math.log(mean) - _SIGMA**2 / 2, _SIGMA)))
