"""gpu_ttft: time to the first token of a turn whose history the service holds, on a model of Llama-3-8B's shape.

    python -m benchmarks.gpu_ttft [--out FILE]

256 new tokens after a history, through the transformers adapter: all recomputed; with the history's KV in HBM already;
loaded layer by layer while the new tokens are computed; loaded as a whole first; where the bus takes longer than the
prefill, with the load begun S_buf early (the paper's formula); and with the history on NVMe only. Then the turn with
which a conversation outgrows its window: the older half of its history is dropped, the rest is named anew, loaded and
turned, or recomputed. Tokens are hashed before the clock starts, as an engine does when a request arrives. The logits
of a load are compared, bit by bit, with those of the KV that was in HBM, and what was turned is compared with the same
KV moved by torch. Needs torch with CUDA, triton, transformers, 60 GiB of GPU and 16 of host memory.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import kvservice_client as kv
from benchmarks.daemon import Daemon, await_durable, await_memory, running_daemon
from benchmarks.gpu_engine import BLOCK_BYTES, GIB, TOKENS
from benchmarks.gpu_model import VOCABULARY, llama_8b
from benchmarks.measuring import Record, median, progress, publish
from kvservice_adapters.positions import moved
from kvservice_adapters.transformers import (
    AdapterOptions,
    KVRows,
    PrefixCache,
    TrackedSequence,
    TransformersAdapter,
    positions_of,
)
from kvservice_adapters.truncation import FittedPrompt, TruncationPolicy
from kvservice_client.device.buffer import read_buffer_bytes

NEW_TOKENS, HISTORIES = 256, (8192, 32768)
WINDOWS = HISTORIES  # that a history fills to the last token: the next turn overflows
BUFFER_BYTES = 9 * GIB  # what is loaded ahead may take half of it
NVME_HISTORY, NVME_CHAINS = 8192, 3  # read in turn; DRAM holds little more than one
REPETITIONS, ROUNDS = 5, 15
_PREFILL_TOKENS = 4096


class Engine:
    """A model and its adapter."""

    def __init__(self, model: Any, socket_dir: str, *, truncation: TruncationPolicy | None = None) -> None:
        self.model = model
        options = AdapterOptions(
            recompute_if_faster=False, load_deadline_s=30.0, save_deadline_s=60.0, hbm_buffer_size_bytes=BUFFER_BYTES
        )
        self.adapter = TransformersAdapter(
            model, socket_dir, weights_identity="random", options=options, truncation=truncation
        )
        self.adapter.prepare(tokens=max(HISTORIES))

    def compute(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Logits of the last token."""
        with torch.inference_mode():
            computed = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = computed.logits[0, -1]
        return logits

    def history(self, tokens: torch.Tensor, cache: DynamicCache) -> DynamicCache:
        """Prefilled in pieces, as an engine would."""
        for start in range(0, tokens.shape[1], _PREFILL_TOKENS):
            self.compute(tokens[:, start : start + _PREFILL_TOKENS], cache)
        return cache

    def recomputed_s(self, old: torch.Tensor, new: torch.Tensor) -> float:
        """Seconds until the first token where nothing is held."""

        def work() -> torch.Tensor:
            return self.compute(new, self.history(old, DynamicCache(config=self.model.config)))

        return timed(work)[0]

    def saved_history(self, tokens: torch.Tensor) -> PrefixCache:
        """Computed, and held by the service."""
        cache = self.adapter.load(tokens[:, :_PREFILL_TOKENS])
        assert cache.reused_tokens == 0, "held already"
        for end in range(_PREFILL_TOKENS, tokens.shape[1] + 1, _PREFILL_TOKENS):
            self.compute(tokens[:, end - _PREFILL_TOKENS : end], cache)
            self.adapter.save(tokens[:, :end], cache)
            self.adapter.drain(60.0)
        stats = self.adapter.stats()
        assert not stats.unsaved_blocks, stats
        assert not stats.skipped_blocks, stats
        return cache

    def copy_of(self, cache: DynamicCache) -> DynamicCache:
        """The same history for another turn: computing appends to it."""
        made = DynamicCache(config=self.model.config)
        layers: list[tuple[Any, Any]] = list(zip(made.layers, cache.layers, strict=True))
        for layer, of in layers:
            layer.lazy_initialization(of.keys, of.values)
            layer.keys, layer.values = of.keys, of.values
        return made

    def begin(self, sequence: TrackedSequence, *, layer_wise: bool = True) -> PrefixCache:
        """What `TransformersAdapter.load` does for a sequence that was hashed."""
        served = self.adapter.served
        cache = PrefixCache(self.model.config, sequence)
        load = self.adapter.begin(sequence, lambda blocks: cache.make_room(served.layout, blocks, served.device))
        if not layer_wise:
            load.finish()
        cache.expect(load)
        return cache

    def resumed(
        self, sequence: TrackedSequence, new: torch.Tensor, *, reused_tokens: int, layer_wise: bool = True
    ) -> tuple[float, torch.Tensor]:
        """Seconds until the first token where everything but `new` is held, and its logits."""

        def work() -> torch.Tensor:
            cache = self.begin(sequence, layer_wise=layer_wise)
            assert cache.reused_tokens == reused_tokens, cache.reused_tokens
            return self.compute(new, cache)

        failed = self.adapter.stats().failed_loads
        seconds, logits = timed(work)
        assert self.adapter.stats().failed_loads == failed, "a load failed, and was recomputed"
        return seconds, logits


def tokens_of(history_tokens: int, seed: int) -> torch.Tensor:
    """A history and what follows it, [1, tokens]."""
    numbers = random.Random(seed)  # no secret
    return torch.tensor(
        [[numbers.randrange(VOCABULARY) for _ in range(history_tokens + NEW_TOKENS)]], device="cuda"
    )  # fmt: skip


def timed(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Seconds until the first token is known."""
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    logits = work()
    int(logits.argmax())
    return time.perf_counter() - started_s, logits


class Turn:
    """The new tokens after one history."""

    def __init__(self, engine: Engine, history_tokens: int, seed: int) -> None:
        self.engine = engine
        self.history_tokens = history_tokens
        tokens = tokens_of(history_tokens, seed)
        self.ids = tokens[0].tolist()
        self.old, self.new = tokens[:, :history_tokens], tokens[:, history_tokens:]
        self.in_hbm: DynamicCache | None = engine.saved_history(self.old)
        self.expected = self.from_hbm()[1]

    def from_hbm(self) -> tuple[float, torch.Tensor]:
        assert self.in_hbm is not None
        history = self.in_hbm
        return timed(lambda: self.engine.compute(self.new, self.engine.copy_of(history)))

    def recomputed_s(self) -> float:
        return self.engine.recomputed_s(self.old, self.new)

    def loaded_s(self, *, layer_wise: bool = True, early_s: float = 0.0) -> float:
        sequence = self.engine.adapter.track(self.ids)
        if early_s:  # the job before is still running
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            assert self.engine.adapter.begin_ahead(sequence), "no room to load ahead"
            while time.perf_counter() - began_s < early_s:
                pass

        seconds, logits = self.engine.resumed(
            sequence, self.new, reused_tokens=self.history_tokens, layer_wise=layer_wise
        )
        assert torch.equal(logits, self.expected), "a load gave other logits than the KV that was in HBM"
        return seconds

    def load_s(self) -> float:
        """The load alone."""
        torch.cuda.synchronize()
        sequence = self.engine.adapter.track(self.ids)
        started_s = time.perf_counter()
        cache = self.engine.begin(sequence, layer_wise=False)
        torch.cuda.synchronize()
        assert cache.reused_tokens == self.history_tokens
        return time.perf_counter() - started_s


class Overflow:
    """The turn with which a conversation outgrows its window, which its history fills."""

    def __init__(self, engine: Engine, window_tokens: int) -> None:
        self.engine = engine
        tokens = tokens_of(window_tokens, seed=window_tokens + 1)
        self.ids = tokens[0].tolist()
        self.sessions = itertools.count()
        history = engine.saved_history(tokens[:, :window_tokens])
        dropped = self.fitted().dropped_tokens
        self.kept_tokens = window_tokens - dropped
        self.old, self.new = tokens[:, dropped:window_tokens], tokens[:, window_tokens:]
        loaded = engine.begin(self.track())
        self.check_moved(loaded.rows(), history.rows(), dropped)
        self.expected = engine.compute(self.new, engine.copy_of(loaded))

    def fitted(self) -> FittedPrompt:
        """The prompt of a session in which nothing was truncated before: what is kept has no names there yet."""
        session_id = f"overflow {next(self.sessions)}"
        return self.engine.adapter.fit(self.ids, session_id=session_id, max_new_tokens=1)

    def track(self) -> TrackedSequence:
        return self.engine.adapter.track(self.fitted())

    def check_moved(self, found: KVRows, saved: KVRows, dropped: int) -> None:
        """Values are the saved ones bit by bit, keys are turned as torch turns them."""
        rope = positions_of(self.engine.model)
        now_at = torch.arange(self.kept_tokens, device=found[0][0].device)
        for (keys, values), (saved_keys, saved_values) in zip(found, saved, strict=True):
            assert torch.equal(values, saved_values[:, dropped:]), "wrong values"
            expected = moved(saved_keys[:, dropped:], rope, computed_at=now_at + dropped, now_at=now_at).float()
            # Both compute in float32 and round once to bfloat16: they may differ by one of its steps, and where a sum
            # cancels by what float32 rounded. A key that is one position off differs by up to its own size.
            allowed = expected.abs() * 2**-7 + expected.abs().max() * 2**-20
            difference = (keys.float() - expected).abs()
            assert bool((difference <= allowed).all()), f"keys differ by {difference.max()}"

    def recomputed_s(self) -> float:
        return self.engine.recomputed_s(self.old, self.new)

    def loaded_s(self) -> float:
        shifted = self.engine.adapter.stats().shifted_blocks
        seconds, logits = self.engine.resumed(self.track(), self.new, reused_tokens=self.kept_tokens)
        shifted = self.engine.adapter.stats().shifted_blocks - shifted
        assert shifted == self.kept_tokens // TOKENS, f"{shifted} blocks were shifted"
        assert torch.equal(logits, self.expected), "a load gave other logits than the one that was checked"
        return seconds


def medians(*turns: Callable[[], float]) -> list[float]:
    """Of each, taken in turn: a slow second of the machine's is everybody's, not one figure's."""
    rounds = [[turn() for turn in turns] for _ in range(1 + ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds[1:], strict=True)]


def measure(engine: Engine, history_tokens: int) -> Iterator[Record]:
    """One length of history, in DRAM."""
    turn = Turn(engine, history_tokens, seed=history_tokens)
    recomputed_s = median(turn.recomputed_s, 2)
    load_s = median(turn.load_s, REPETITIONS)
    blocks = history_tokens // TOKENS
    early_bytes = read_buffer_bytes(
        bytes_per_s=blocks * BLOCK_BYTES / load_s,
        block_bytes_per_token=BLOCK_BYTES // TOKENS,
        prefill_s_per_token=median(lambda: turn.from_hbm()[0], REPETITIONS) / NEW_TOKENS,
        history_tokens=history_tokens,
        new_tokens=NEW_TOKENS,
    )
    early_s = early_bytes / (blocks * BLOCK_BYTES / load_s)
    hbm_s, layers_s, whole_s, ahead_s = medians(
        lambda: turn.from_hbm()[0],
        turn.loaded_s,
        lambda: turn.loaded_s(layer_wise=False),
        lambda: turn.loaded_s(early_s=early_s),
    )
    turn.in_hbm = None
    name = f"{history_tokens // 1024}k"
    yield Record.compared(f"ttft_ratio_hbm_{name}", layers_s * 1e3, "ms", hbm_s * 1e3)
    if early_bytes:
        yield Record.compared(f"ttft_ratio_hbm_early_{name}", ahead_s * 1e3, "ms", hbm_s * 1e3)
        yield Record.absolute(f"read_buffer_{name}", early_bytes, "bytes")
    yield Record.compared(f"ttft_ratio_recompute_{name}", layers_s * 1e3, "ms", recomputed_s * 1e3)
    yield Record.compared(f"overlap_gain_{name}", whole_s * 1e3, "ms", layers_s * 1e3)
    yield Record.absolute(f"load_alone_{name}", load_s * 1e3, "ms")


def measure_overflow(engine: Engine, window_tokens: int) -> Iterator[Record]:
    """One length of window, in DRAM; what names the kept blocks anew is part of the turn."""
    turn = Overflow(engine, window_tokens)
    recomputed_s = median(turn.recomputed_s, 2)
    loaded_s = median(turn.loaded_s, REPETITIONS)
    name = f"ttft_overflow_ratio_recompute_{window_tokens // 1024}k"
    yield Record.compared(name, loaded_s * 1e3, "ms", recomputed_s * 1e3)


def measure_nvme(model: Any, directory: Path) -> Iterator[Record]:
    """One length of history, on NVMe only; a directory that is not a disk gives its own figure."""
    size_bytes = NVME_HISTORY // TOKENS * BLOCK_BYTES
    dram_bytes = size_bytes * 5 // 4
    knobs: dict[str, object] = {"nvme_dirs": directory, "nvme_bytes": 8 * size_bytes, "nvme_write_behind_s": 0.01}
    with running_daemon(dram_bytes=dram_bytes, dram_segment_bytes=GIB // 4, **knobs) as daemon:
        engine = Engine(model, daemon.socket_dir)
        client = kv.attach(engine.adapter.served.namespace, socket_dir=daemon.socket_dir, instance_name="watcher")
        await_memory(client, dram_bytes - GIB // 4)
        turns = []
        for seed in range(NVME_CHAINS):
            turns.append(Turn(engine, NVME_HISTORY, seed))
            turns[-1].in_hbm = None
            await_durable(client, engine.adapter.track(turns[-1].ids).chain.hashes[NVME_HISTORY // TOKENS - 1])
        recomputed_s = median(turns[0].recomputed_s, 2)
        times = [turns[number % NVME_CHAINS].loaded_s() for number in range(2 * NVME_CHAINS)]
        nvme_s = statistics.median(times[1:])
        name = f"{NVME_HISTORY // 1024}k"
        yield Record.compared(f"ttft_nvme_ratio_recompute_{name}", nvme_s * 1e3, "ms", recomputed_s * 1e3)
        yield Record.absolute(f"ttft_nvme_bytes_per_s_{name}", size_bytes / nvme_s / 1e9, "GB/s")
        client.close()
        engine.adapter.close()


@contextmanager
def granted(engine: Engine, daemon: Daemon) -> Iterator[Engine]:
    """An engine whose memory in the daemon is there before anything is timed; at the end nothing of it is left."""
    with (
        engine.adapter as adapter,
        kv.attach(adapter.served.namespace, socket_dir=daemon.socket_dir, instance_name="watcher") as client,
    ):
        await_memory(client, 7 * GIB)
        yield engine
        client.forget_namespace()


def results(model: Any) -> Iterator[Record]:
    """Everything. Blocks for two minutes."""
    with running_daemon(dram_bytes=8 * GIB, dram_segment_bytes=GIB) as daemon:
        with granted(Engine(model, daemon.socket_dir), daemon) as engine:
            for history_tokens in HISTORIES:
                yield from measure(engine, history_tokens)
        for window_tokens in WINDOWS:
            truncating = Engine(model, daemon.socket_dir, truncation=TruncationPolicy(window_tokens))
            with granted(truncating, daemon) as engine:
                yield from measure_overflow(engine, window_tokens)
    build = Path("build")
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nvme-", dir=build) as directory:
        yield from measure_nvme(model, Path(directory))


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_ttft", description="Measure time to first token.")
    parser.add_argument("--out", type=Path, default=Path("build/gpu_ttft.jsonl"), help="default: %(default)s")
    options = parser.parse_args()
    progress(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    publish(results(llama_8b()), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
