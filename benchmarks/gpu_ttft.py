"""gpu_ttft: time to the first token of a turn whose history is in DRAM, on a model of Llama-3-8B's shape.

    python -m benchmarks.gpu_ttft [--out FILE]

256 new tokens after a history: all recomputed; with the history's KV in HBM already; loaded layer by layer while the
new tokens are computed; loaded as a whole first; and, where the bus takes longer than the prefill, with the load begun
S_buf early (the paper's formula). Weights are random: they change no time. The logits of a load are compared, bit by
bit, with those of the KV that was in HBM. Needs torch with CUDA, transformers, 45 GiB of GPU and 16 of host memory.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

import kvservice_client as kv
from benchmarks.daemon import await_memory, running_daemon
from benchmarks.measuring import Record, progress
from kvservice_client.device import CachePart, DeviceCache, DeviceKV, DeviceLoad
from kvservice_client.device.buffer import read_buffer_bytes

GIB = 1 << 30
LAYERS, HEADS, DIM, TOKENS = 32, 8, 128, 16
NEW_TOKENS, HISTORIES = 256, (8192, 32768)
LAYER_BYTES = 2 * HEADS * TOKENS * DIM * 2
BLOCK_BYTES = LAYERS * LAYER_BYTES
REPETITIONS = 5


class LoadingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer whose history is on its way: the stream waits for it where it is first needed."""

    def __init__(self, fill: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fill: Callable[[], None] | None = fill

    def update(self, *arguments: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        fill, self._fill = self._fill, None
        if fill is not None:
            fill()
        return super().update(*arguments, **named)


class Engine:
    """The model, a read buffer in HBM whose blocks are contiguous, and a client."""

    def __init__(self, socket_dir: str, *, blocks: int) -> None:
        config = LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=LAYERS,
            num_attention_heads=32,
            num_key_value_heads=HEADS,
            max_position_embeddings=65536,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )
        torch.manual_seed(0)
        with torch.device("cuda"):
            model: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
        self.model = model.to(torch.bfloat16).eval()
        self.config = config
        self.buffer = torch.empty(blocks, LAYERS, 2, HEADS, TOKENS, DIM, dtype=torch.bfloat16, device="cuda")
        parts = tuple(
            CachePart(self.buffer.data_ptr() + layer * LAYER_BYTES, BLOCK_BYTES, LAYER_BYTES, layer)
            for layer in range(LAYERS)
        )
        namespace = kv.Namespace(sha256(b"ttft").digest(), "llama-3-8b", BLOCK_BYTES, TOKENS, 32)
        self.client = kv.attach(namespace, socket_dir=socket_dir, instance_name="ttft")
        self.kv = DeviceKV(self.client, DeviceCache(blocks, parts))
        assert self.kv.plane.name == "cuda-ipc", self.kv.plane
        self.stream = torch.cuda.current_stream()

    def compute(self, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Logits of the last token."""
        with torch.inference_mode():
            computed = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = computed.logits[0, -1]
        return logits

    def history(self, tokens: torch.Tensor) -> DynamicCache:
        """Prefilled in pieces, as an engine would."""
        cache = DynamicCache(config=self.config)
        for start in range(0, tokens.shape[1], 4096):
            self.compute(tokens[:, start : start + 4096], cache)
        return cache

    def save(self, hashes: list[bytes], cache: DynamicCache) -> None:
        """Gather into the buffer, and from there into the service."""
        layers: list[Any] = cache.layers
        for layer in range(LAYERS):
            for half, rows in enumerate((layers[layer].keys, layers[layer].values)):
                blocks = rows[0].view(HEADS, len(hashes), TOKENS, DIM).transpose(0, 1)
                self.buffer[: len(hashes), layer, half].copy_(blocks)
        torch.cuda.synchronize()
        result = self.kv.save(hashes, range(len(hashes)), deadline_s=60.0)
        assert result.saved == len(hashes), result

    def copy_of(self, cache: DynamicCache) -> DynamicCache:
        """The same history for another turn: computing appends to it."""
        made = DynamicCache(config=self.config)
        layers: list[tuple[Any, Any]] = list(zip(made.layers, cache.layers, strict=True))
        for layer, of in layers:
            layer.lazy_initialization(of.keys, of.values)
            layer.keys, layer.values = of.keys, of.values
        return made

    def cache_of(self, load: DeviceLoad, *, layer_wise: bool) -> DynamicCache:
        """A cache whose layers take their history out of the buffer, each when it is there."""
        tokens = load.blocks * TOKENS
        made = DynamicCache(config=self.config)
        for number in range(LAYERS):
            keys = torch.empty(1, HEADS, tokens, DIM, dtype=torch.bfloat16, device="cuda")
            values = torch.empty_like(keys)

            def fill(number: int = number, keys: torch.Tensor = keys, values: torch.Tensor = values) -> None:
                if layer_wise:
                    load.wait_layer(number, self.stream)
                for half, rows in enumerate((keys, values)):
                    blocks = self.buffer[: load.blocks, number, half].transpose(0, 1)
                    rows[0].view(HEADS, load.blocks, TOKENS, DIM).copy_(blocks)

            layer = LoadingLayer(fill)
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            made.layers[number] = layer
        return made


def median_s(turn: Callable[[], float], repetitions: int = REPETITIONS) -> float:
    turn()
    return statistics.median(turn() for _ in range(repetitions))


def timed(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Seconds until the first token is known."""
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    logits = work()
    int(logits.argmax())
    return time.perf_counter() - started_s, logits


def measure(engine: Engine, history_tokens: int) -> Iterator[Record]:
    """One length of history."""
    numbers = random.Random(history_tokens)  # no secret
    tokens = torch.tensor(
        [[numbers.randrange(128256) for _ in range(history_tokens + NEW_TOKENS)]], device="cuda"
    )  # fmt: skip
    old, new = tokens[:, :history_tokens], tokens[:, history_tokens:]
    hashes = [sha256(f"{history_tokens}/{block}".encode()).digest() for block in range(history_tokens // TOKENS)]
    in_hbm = engine.history(old)
    engine.save(hashes, in_hbm)
    engine.buffer.fill_(float("nan"))
    expected = timed(lambda: engine.compute(new, engine.copy_of(in_hbm)))[1]

    def loaded(*, layer_wise: bool, early_s: float = 0.0) -> float:
        started: list[DeviceLoad] = []
        if early_s:  # the job before is still running
            torch.cuda.synchronize()
            began_s = time.perf_counter()
            started.append(engine.kv.load(hashes, range(len(hashes))))
            while time.perf_counter() - began_s < early_s:
                pass

        def work() -> torch.Tensor:
            load = started.pop() if started else engine.kv.load(hashes, range(len(hashes)))
            if not layer_wise:
                assert load.result().blocks == len(hashes)
            logits = engine.compute(new, engine.cache_of(load, layer_wise=layer_wise))
            started.append(load)
            return logits

        seconds, logits = timed(work)
        assert started[0].result().blocks == len(hashes)
        assert torch.equal(logits, expected), "a load gave other logits than the KV that was in HBM"
        return seconds

    hbm_s = median_s(lambda: timed(lambda: engine.compute(new, engine.copy_of(in_hbm)))[0])
    layers_s = median_s(lambda: loaded(layer_wise=True))
    whole_s = median_s(lambda: loaded(layer_wise=False))
    load_s = median_s(lambda: _load_s(engine, hashes))
    early_bytes = read_buffer_bytes(
        bytes_per_s=len(hashes) * BLOCK_BYTES / load_s,
        block_bytes_per_token=BLOCK_BYTES // TOKENS,
        prefill_s_per_token=hbm_s / NEW_TOKENS,
        history_tokens=history_tokens,
        new_tokens=NEW_TOKENS,
    )
    early_s = early_bytes / (len(hashes) * BLOCK_BYTES / load_s)
    recomputed_s = median_s(lambda: timed(lambda: _recomputed(engine, tokens))[0], 2)
    name = f"{history_tokens // 1024}k"
    yield Record.compared(f"ttft_ratio_hbm_{name}", layers_s * 1e3, "ms", hbm_s * 1e3)
    if early_s:
        ahead_s = median_s(lambda: loaded(layer_wise=True, early_s=early_s))
        yield Record.compared(f"ttft_ratio_hbm_early_{name}", ahead_s * 1e3, "ms", hbm_s * 1e3)
        yield Record.absolute(f"read_buffer_{name}", early_bytes, "bytes")
    yield Record.compared(f"ttft_ratio_recompute_{name}", layers_s * 1e3, "ms", recomputed_s * 1e3)
    yield Record.compared(f"overlap_gain_{name}", whole_s * 1e3, "ms", layers_s * 1e3)
    yield Record.absolute(f"load_alone_{name}", load_s * 1e3, "ms")


def _load_s(engine: Engine, hashes: list[bytes]) -> float:
    started_s = time.perf_counter()
    assert engine.kv.load(hashes, range(len(hashes))).result().blocks == len(hashes)
    return time.perf_counter() - started_s


def _recomputed(engine: Engine, tokens: torch.Tensor) -> torch.Tensor:
    cache = engine.history(tokens[:, :-NEW_TOKENS])
    return engine.compute(tokens[:, -NEW_TOKENS:], cache)


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_ttft", description="Measure time to first token.")
    parser.add_argument("--out", type=Path, default=Path("build/gpu_ttft.jsonl"), help="default: %(default)s")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with (
        options.out.open("w", encoding="utf-8") as out,
        running_daemon(dram_bytes=8 * GIB, dram_segment_bytes=GIB) as daemon,
    ):
        engine = Engine(daemon.socket_dir, blocks=max(HISTORIES) // TOKENS)
        await_memory(engine.client, 7 * GIB)
        progress(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        for history_tokens in HISTORIES:
            for record in measure(engine, history_tokens):
                for stream in (out, sys.stdout):
                    print(record.to_json(), file=stream, flush=True)
        engine.kv.close()
        engine.client.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
