"""gpu: what the device plane reaches on a GPU, next to one large pinned copy in the same run.

    python -m benchmarks.gpu [--out FILE]

This process is the engine: it has the KV cache, in two layouts, and computes; the daemon is one of its own. One JSON
line per result, and a table with the bounds at the end. Needs torch with CUDA, and 16 GiB each of GPU and host memory.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

import kvservice_client as kv
from benchmarks.daemon import Daemon, await_memory, running_daemon, settle
from benchmarks.measuring import Record, progress
from kvservice_client.device import DeviceCache, DeviceKV

GIB, MIB = 1 << 30, 1 << 20
LAYERS, HEADS, TOKENS, DIM = 32, 8, 16, 128  # of Llama-3-8B, in bf16: a block has 2 MiB
BLOCK_BYTES = LAYERS * 2 * HEADS * TOKENS * DIM * 2
MOVED_BLOCKS, CACHE_BLOCKS = GIB // BLOCK_BYTES, 2048
REPETITIONS = 7
_QUEUED = 16
LMCACHE_LOAD_GB_S, LMCACHE_LOOKUP_32K_US = 33.0, 6400.0  # its own benchmark, 1 GiB retrieved, on an H200


@dataclass(frozen=True)
class Bound:
    """What a ratio must reach, or must not pass."""

    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least}"
        return f"<= {self.at_most}" if self.at_most is not None else "reported"


BOUNDS = {
    "gpu_load_ratio_per_layer": Bound(at_least=0.95),
    "gpu_save_ratio_per_layer": Bound(at_least=0.95),
    "gpu_load_ratio_contiguous": Bound(at_least=0.95),
    "gpu_save_ratio_contiguous": Bound(at_least=0.95),
    "gpu_both_ways_ratio_per_layer": Bound(at_least=0.85),
    "gpu_both_ways_ratio_contiguous": Bound(at_least=0.85),
    "gpu_load_ratio_busy_per_layer": Bound(at_least=0.65),
    "gpu_load_ratio_busy_contiguous": Bound(at_least=0.65),
    "gpu_engine_slowdown_loading_per_layer": Bound(at_least=0.98),
    "gpu_engine_slowdown_loading_contiguous": Bound(at_least=0.98),
    "gpu_engine_slowdown_both_ways_per_layer": Bound(at_least=0.98),
    "gpu_engine_slowdown_both_ways_contiguous": Bound(at_least=0.98),
    "vs_lmcache_gpu_load": Bound(at_least=1.4),
    "vs_lmcache_lookup_32k": Bound(at_least=5),
}


class Engine:
    """A client and its KV cache in one layout."""

    def __init__(self, daemon: Daemon, layout: str) -> None:
        self.layout = layout
        if layout == "contiguous":
            self.tensors = [torch.empty(CACHE_BLOCKS, BLOCK_BYTES, dtype=torch.uint8, device="cuda")]
        else:
            self.tensors = [
                torch.empty(CACHE_BLOCKS, BLOCK_BYTES // LAYERS, dtype=torch.uint8, device="cuda")
                for _ in range(LAYERS)
            ]
        for tensor in self.tensors:
            tensor.random_(0, 256)
        namespace = kv.Namespace(sha256(layout.encode()).digest(), layout, BLOCK_BYTES, TOKENS, 32)
        self.client = kv.attach(namespace, socket_dir=daemon.socket_dir, instance_name=f"gpu {layout}")
        self.kv = DeviceKV(self.client, DeviceCache.of_tensors([[tensor] for tensor in self.tensors]))
        assert self.kv.plane.name == "cuda-ipc", self.kv.plane
        scattered = random.Random(1).sample(range(CACHE_BLOCKS), CACHE_BLOCKS)  # no secret
        self.sources, self.destinations = scattered[:MOVED_BLOCKS], scattered[MOVED_BLOCKS : 2 * MOVED_BLOCKS]
        self.others = scattered[2 * MOVED_BLOCKS : 3 * MOVED_BLOCKS]

    @functools.cache  # noqa: B019  # as long-lived as the process; hashing is not what is timed
    def chain(self, name: str, blocks: int = MOVED_BLOCKS) -> list[bytes]:
        return [sha256(f"{self.layout}/{name}/{number}".encode()).digest() for number in range(blocks)]

    def save(self, name: str) -> float:
        """Seconds until 1 GiB is readable by others."""
        hashes = self.chain(name)
        started_s = time.perf_counter()
        result = self.kv.save(hashes, self.sources, session_id=name)
        elapsed_s = time.perf_counter() - started_s
        assert result.saved == MOVED_BLOCKS, result
        return elapsed_s

    def load(self, name: str, into: list[int] | None = None) -> float:
        """Seconds until 1 GiB is in place."""
        hashes = self.chain(name)
        started_s = time.perf_counter()
        load = self.kv.load(hashes, into or self.destinations)
        self.call_s = time.perf_counter() - started_s
        result = load.result()
        elapsed_s = time.perf_counter() - started_s
        assert result.blocks == MOVED_BLOCKS, result
        return elapsed_s

    def check(self) -> None:
        """What was loaded is what was saved, byte by byte."""
        torch.cuda.synchronize()
        for tensor in self.tensors:
            assert torch.equal(tensor[self.sources], tensor[self.destinations]), "wrong bytes"


class Large:
    """The reference: one pinned copy of 1 GiB."""

    def __init__(self) -> None:
        self.host = [torch.empty(GIB, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.device = [torch.empty(GIB, dtype=torch.uint8, device="cuda") for _ in range(2)]
        self.streams: list[Any] = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]

    def copy(self, *ways: str) -> float:
        """Seconds of these ways at once."""
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        for way in ways:
            place = int(way == "save")
            with torch.cuda.stream(self.streams[place]):
                ends = (self.device[place], self.host[place])
                destination, source = ends if way == "load" else ends[::-1]
                destination.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        return time.perf_counter() - started_s


def median(repeat: Callable[[], float], repetitions: int = REPETITIONS) -> float:
    repeat()
    return statistics.median(repeat() for _ in range(repetitions))


def transfers(engine: Engine, large: Large) -> Iterator[Record]:
    """Loads and saves on an idle GPU, one way and both."""
    layout = engine.layout
    reference = {way: GIB / median(functools.partial(large.copy, way)) / 1e9 for way in ("load", "save")}
    both = 2 * GIB / median(lambda: large.copy("load", "save")) / 1e9

    def fresh_save() -> float:
        engine.client.forget_namespace()
        return engine.save("a")

    saved = GIB / median(fresh_save) / 1e9
    yield Record.compared(f"gpu_save_ratio_{layout}", saved, "GB/s", reference["save"])
    settle(engine.client, engine.chain("a")[-1])
    loaded = GIB / median(lambda: engine.load("a")) / 1e9
    engine.check()
    yield Record.absolute(f"gpu_load_call_us_{layout}", median(lambda: engine.load("a") and engine.call_s) * 1e6, "us")
    yield Record.compared(f"gpu_load_ratio_{layout}", loaded, "GB/s", reference["load"])
    if layout == "per_layer":
        yield Record.compared("vs_lmcache_gpu_load", loaded, "GB/s", LMCACHE_LOAD_GB_S)

    def both_ways() -> float:
        engine.client.forget_session("both")  # its memory, pinned already, is used again
        threads = [
            threading.Thread(target=engine.load, args=("a", engine.others)),
            threading.Thread(target=engine.save, args=("both",)),
        ]
        started_s = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - started_s

    moved = 2 * GIB / median(both_ways) / 1e9
    yield Record.compared(f"gpu_both_ways_ratio_{layout}", moved, "GB/s", both)


class Matmuls:
    """Back-to-back bf16 matrix products of this process."""

    def __init__(self, size: int = 8192) -> None:
        self.size = size
        self.operands = [torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        self.run(0.5)

    def run(self, seconds: float) -> float:
        """TFLOP/s."""
        torch.cuda.synchronize()
        started_s, products = time.perf_counter(), 0
        before: torch.cuda.Event | None = None
        while time.perf_counter() - started_s < seconds:
            for _ in range(_QUEUED):
                torch.matmul(*self.operands)
            products += _QUEUED
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            if before is not None:  # the GPU always has the next ones queued already
                before.synchronize()
            before = event
        torch.cuda.synchronize()
        return products * 2 * self.size**3 / (time.perf_counter() - started_s) / 1e12


def busy(engine: Engine, large: Large, matmuls: Matmuls) -> Iterator[Record]:
    """Loads, then loads and saves, while the engine computes."""
    layout = engine.layout
    alone = matmuls.run(1.0)
    times: list[float] = []
    stop = threading.Event()

    def loads() -> None:
        while not stop.is_set():
            times.append(engine.load("a", engine.others))

    def saves() -> None:
        while not stop.is_set():
            engine.client.forget_session("saves")
            engine.save("saves")

    rates = {}
    for name, work in (("loading", [loads]), ("both_ways", [loads, saves])):
        stop.clear()
        threads = [threading.Thread(target=each) for each in work]
        for thread in threads:
            thread.start()
        rates[name] = matmuls.run(1.5)
        stop.set()
        for thread in threads:
            thread.join()
        if name == "loading":
            loaded = GIB / statistics.median(times) / 1e9
    reference = GIB / median(lambda: large.copy("load")) / 1e9
    yield Record.compared(f"gpu_load_ratio_busy_{layout}", loaded, "GB/s", reference)
    alone = (alone + matmuls.run(1.0)) / 2
    for name, rate in rates.items():
        yield Record.compared(f"gpu_engine_slowdown_{name}_{layout}", rate, "TFLOP/s", alone)


def small(engine: Engine) -> Iterator[Record]:
    """One block until a stream may use it, beside its parts."""
    hashes = engine.chain("a", 1)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    host = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(BLOCK_BYTES, dtype=torch.uint8, device="cuda")
    layer = engine.kv.cache.parts[-1].layer

    def load() -> float:
        started_s = time.perf_counter()
        under_way = engine.kv.load(hashes, engine.others[:1])
        under_way.wait_layer(layer, stream)
        stream.synchronize()
        elapsed_s = time.perf_counter() - started_s
        assert under_way.result().blocks == 1
        return elapsed_s

    def floor() -> float:
        started_s = time.perf_counter()
        engine.client.lookup(hashes)
        with torch.cuda.stream(stream):
            device.copy_(host, non_blocking=True)
        stream.synchronize()
        return time.perf_counter() - started_s

    ours, bare = sorted(load() for _ in range(400)), sorted(floor() for _ in range(400))
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        place = int(part * len(ours))
        yield Record.compared(
            f"gpu_small_load_us_{name}_{engine.layout}", ours[place] * 1e6, "us", bare[place] * 1e6
        )  # fmt: skip


def lookups(engine: Engine) -> Iterator[Record]:
    """Lookup of 32K tokens in blocks of 16, all of them held."""
    engine.client.forget_namespace()
    hashes = engine.chain("long", 2048)
    for start in range(0, 2048, MOVED_BLOCKS):
        parent = hashes[start - 1] if start else b""
        engine.kv.save(hashes[start : start + MOVED_BLOCKS], engine.sources, parent=parent)
    times = []
    for _ in range(200):
        started_s = time.perf_counter()
        held = engine.client.lookup(hashes).blocks
        times.append(time.perf_counter() - started_s)
    assert held == 2048, held
    ours_us = statistics.median(times[20:]) * 1e6
    yield Record("vs_lmcache_lookup_32k", ours_us, "us", LMCACHE_LOOKUP_32K_US, LMCACHE_LOOKUP_32K_US / ours_us)


def measure() -> Iterator[Record]:
    """Everything. Blocks for about a minute."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    large, matmuls = Large(), Matmuls()
    for layout in ("per_layer", "contiguous"):
        with running_daemon(dram_bytes=6 * GIB, dram_segment_bytes=GIB) as daemon:
            free_bytes = torch.cuda.mem_get_info()[0]
            engine = Engine(daemon, layout)
            cache_bytes = sum(tensor.numel() for tensor in engine.tensors)
            if layout == "per_layer":
                used = free_bytes - torch.cuda.mem_get_info()[0] - cache_bytes
                yield Record.absolute("gpu_daemon_footprint", used, "bytes")
            await_memory(engine.client, 5 * GIB)
            yield from transfers(engine, large)
            yield from busy(engine, large, matmuls)
            yield from small(engine)
            if layout == "contiguous":
                yield from lookups(engine)
            engine.client.forget_namespace()
            engine.kv.close()
            engine.client.close()
            del engine
            torch.cuda.empty_cache()


def table(records: list[Record]) -> str:
    """For docs/benchmarks.md."""
    lines = ["| figure | value | reference | ratio | bound | |", "|---|---|---|---|---|---|"]
    for record in records:
        bound = BOUNDS.get(record.name, Bound())
        met = (bound.at_least is None or record.ratio >= bound.at_least) and (
            bound.at_most is None or record.ratio <= bound.at_most
        )
        verdict = "" if str(bound) == "reported" else ("met" if met else "**missed**")
        reference = "" if record.reference is None else f"{record.reference:.4g} {record.unit}"
        value = f"{record.value:.4g} {record.unit}"
        cells = (f"`{record.name}`", value, reference, f"{record.ratio:.3g}", str(bound), verdict)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measure the device plane.")
    parser.add_argument("--out", type=Path, default=Path("build/gpu.jsonl"), help="default: %(default)s")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    records = []
    with options.out.open("w", encoding="utf-8") as out:
        for record in measure():
            records.append(record)
            for stream in (out, sys.stdout):
                print(record.to_json(), file=stream, flush=True)
    progress(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}\n")
    progress(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
