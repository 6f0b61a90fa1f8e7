"""gpu_serving: conversations served by a model of Llama-3-8B's shape, with the service and without: the paper's terms.

    python -m benchmarks.gpu_serving [--conversations N] [--out FILE]

The serving loop for transformers models (arrival queue, batched decode) gets the same conversations twice: once it
computes every prompt whole, once it has the service. Conversations begin as a Poisson process; a conversation has as
many turns as the paper's mean (5.75, geometric; 16 at most, so that no run waits for one user), and its next turn comes
a think time after its last answer. Turns have lognormal lengths, answers a fixed one; what outgrows the window is cut
by half, in both runs alike. Think times are shorter than people's, so that the run is: what matters to the service is
how much arrives meanwhile. torch's attention by cuDNN is turned off: it builds a plan for every length that it has not
seen, 25 ms for each layer, and a conversation has another one each time.

TTFT is from arrival to the first token, waiting included; prefill throughput is prompt tokens over the seconds from
leaving the queue to the first token; GPU time is what the steps of the loop took, idle waiting left out. Needs torch
with CUDA, transformers, 40 GiB of GPU and 24 of host memory.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.daemon import running_daemon
from benchmarks.gpu_model import VOCABULARY, llama_8b
from benchmarks.measuring import Record, progress, publish
from kvservice_adapters.serving import Request, Result, ServingLoop
from kvservice_adapters.transformers import TransformersAdapter
from kvservice_adapters.truncation import TruncationPolicy

GIB = 1 << 30
WINDOW_TOKENS, ROWS = 8192, 8
TURNS_MEAN, TURNS_MAX = 5.75, 16
TURN_TOKENS_MEDIAN, TURN_TOKENS_SIGMA, ANSWER_TOKENS = 600, 0.7, 24
ARRIVALS_PER_S, THINK_S_MEAN = 1.0, 1.0
_PAUSE_S = 0.0005


@dataclass
class Conversation:
    """What a user will say, drawn before either run."""

    name: str
    begins_at_s: float
    turns: list[list[int]]
    think_s: list[float]
    history: list[int] = field(default_factory=list)
    done: int = 0

    def request(self) -> Request:
        """The next turn."""
        self.history = self.history + self.turns[self.done]
        return Request(
            request_id=f"{self.name}/{self.done}",
            tokens=tuple(self.history),
            max_new_tokens=ANSWER_TOKENS,
            session_id=self.name,
        )


def conversations(count: int) -> list[Conversation]:
    """Drawn with one seed: both runs get the same."""
    numbers = random.Random(17)  # no secret
    made = []
    begins_at_s = 0.0
    for number in range(count):
        begins_at_s += numbers.expovariate(ARRIVALS_PER_S)
        turns = 1
        while turns < TURNS_MAX and numbers.random() > 1 / TURNS_MEAN:
            turns += 1
        lengths = [
            min(WINDOW_TOKENS // 4, max(16, round(TURN_TOKENS_MEDIAN * numbers.lognormvariate(0.0, TURN_TOKENS_SIGMA))))
            for _ in range(turns)
        ]
        made.append(
            Conversation(
                f"conversation {number}",
                begins_at_s,
                [[numbers.randrange(VOCABULARY) for _ in range(length)] for length in lengths],
                [numbers.expovariate(1 / THINK_S_MEAN) for _ in range(turns)],
            )
        )
    return made


@dataclass
class Run:
    """One run over all conversations."""

    results: list[Result]
    wall_s: float
    gpu_s: float

    @property
    def ttft_s(self) -> list[float]:
        """Of every turn."""
        return sorted(result.ttft_s for result in self.results)

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens over the seconds that prompts took once they were served."""
        return sum(result.prompt_tokens for result in self.results) / sum(result.prefill_s for result in self.results)


def served(loop: ServingLoop, users: list[Conversation], title: str) -> Run:
    """Let everybody talk to the end. Blocks."""
    by_name = {user.name: user for user in users}
    coming = [(user.begins_at_s, user.name) for user in users]
    heapq.heapify(coming)
    results: list[Result] = []
    busy_s = 0.0
    turns = sum(len(user.turns) for user in users)
    started_s = time.perf_counter()
    while len(results) < turns:
        now_s = time.perf_counter() - started_s
        while coming and coming[0][0] <= now_s:
            loop.submit(by_name[heapq.heappop(coming)[1]].request())
        if not loop.waiting and not loop.running:
            time.sleep(_PAUSE_S)  # until somebody speaks
            continue
        step_s = time.perf_counter()
        finished = loop.step().finished
        torch.cuda.synchronize()
        busy_s += time.perf_counter() - step_s
        for result in finished:
            user = by_name[result.session_id]
            user.history = user.history + list(result.tokens)
            user.done += 1
            if user.done < len(user.turns):
                after_s = time.perf_counter() - started_s + user.think_s[user.done - 1]
                heapq.heappush(coming, (after_s, user.name))
            results.append(result)
            if len(results) % 20 == 0:
                progress(f"{title}: {len(results)} of {turns} turns, {now_s:.0f} s")
    return Run(results, time.perf_counter() - started_s, busy_s)


def measure(count: int) -> Iterator[Record]:
    """Both runs. Takes two minutes."""
    torch.backends.cuda.enable_cudnn_sdp(enabled=False)
    model = llama_8b()
    truncation = TruncationPolicy(window_tokens=WINDOW_TOKENS)
    loop = ServingLoop(model, rows=ROWS, window_tokens=WINDOW_TOKENS, truncation=truncation)
    loop.warm_up()
    without = served(loop, conversations(count), "recomputed")
    loop.close()
    del loop
    gc.collect()
    torch.cuda.empty_cache()
    with running_daemon(dram_bytes=16 * GIB, dram_segment_bytes=GIB) as daemon:
        yield from _compared(without, _with_service(model, daemon.socket_dir, truncation, count))


def _with_service(model: Any, socket_dir: str, truncation: TruncationPolicy, count: int) -> Run:
    with TransformersAdapter(model, socket_dir, weights_identity="random", truncation=truncation) as adapter:
        loop = ServingLoop(model, adapter, rows=ROWS, window_tokens=WINDOW_TOKENS)
        loop.warm_up()
        run = served(loop, conversations(count), "with the service")
        loop.close()
        progress(str(adapter.stats()))
    return run


def _compared(without: Run, with_service: Run) -> Iterator[Record]:
    for name, part in (("mean", None), ("p50", 0.5), ("p99", 0.99)):
        ours, theirs = (
            statistics.fmean(run.ttft_s) if part is None else run.ttft_s[int(part * len(run.ttft_s))]
            for run in (with_service, without)
        )
        yield Record.compared(f"serving_ttft_{name}", ours * 1e3, "ms", theirs * 1e3)
    yield Record.compared(
        "serving_prefill_throughput", with_service.prefill_tokens_per_s, "tokens/s", without.prefill_tokens_per_s
    )
    yield Record.compared("serving_gpu_time", with_service.gpu_s, "s", without.gpu_s)
    prompt, reused = (
        sum(getattr(result, name) for result in with_service.results) for name in ("prompt_tokens", "reused_tokens")
    )
    yield Record.compared("serving_reused_tokens", reused, "tokens", prompt)
    history = statistics.fmean(result.prompt_tokens for result in with_service.results)
    yield Record.absolute("serving_prompt_mean", history, "tokens")
    truncated = sum(result.dropped_tokens > 0 for result in with_service.results)
    yield Record.compared("serving_truncated_turns", truncated, "turns", len(with_service.results))


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_serving", description="Serve conversations.")
    parser.add_argument("--conversations", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("build/gpu_serving.jsonl"), help="default: %(default)s")
    options = parser.parse_args()
    progress(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    publish(measure(options.conversations), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
