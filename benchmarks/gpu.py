"""gpu: what the device plane reaches on a GPU, next to one large pinned copy in the same run.

    python -m benchmarks.gpu [--layouts LAYOUT ...] [--out FILE]

This process is the engine: it has the KV cache, in several layouts, and computes; the daemon is one of its own. One
JSON line per result, and a table with the bounds at the end. Needs torch with CUDA and triton, and 16 GiB each of GPU
and host memory. Layouts: *contiguous*: a block is one piece of 2 MiB, copied straight; *per_layer*: 32 tensors, pieces
of 64 KiB, and *split*: keys and values apart, 32 KiB, both through the HBM buffer; *direct*: per_layer without it. All
blocks are scattered over the cache.
"""

from __future__ import annotations

import argparse
import functools
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

import kvservice_client as kv
from benchmarks.daemon import Daemon, await_memory, running_daemon, settle
from benchmarks.gpu_engine import (
    BLOCK_BYTES,
    CACHE_BLOCKS,
    DIM,
    GIB,
    HEADS,
    MOVED_BLOCKS,
    TOKENS,
    Buffered,
    Engine,
    Large,
    Straight,
    tensors_of,
)
from benchmarks.lmcache_reference import peer as lmcache
from benchmarks.measuring import Record, median, progress, publish
from kvservice_adapters.positions import Rope, moved

LAYOUTS = ("contiguous", "per_layer", "split", "direct")
DROPPED_BLOCKS = 64
_QUEUED = 16


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
    "gpu_load_ratio_busy": Bound(at_least=0.65),
    "gpu_load_ratio": Bound(at_least=0.95),
    "gpu_save_ratio": Bound(at_least=0.95),
    "gpu_both_ways_ratio": Bound(at_least=0.85),
    "gpu_engine_slowdown": Bound(at_least=0.98),
    "shift_load_ratio": Bound(at_least=0.95),
    "vs_lmcache_gpu_load": Bound(at_least=1.4),
    "vs_lmcache_lookup_32k": Bound(at_least=5),
}
"""By the beginning of the name; the last part is the layout."""
UNBOUND = "_direct"
"""Layouts that are there to be compared with."""


def bound_of(name: str) -> Bound:
    """What is asked of a figure."""
    if name.endswith(UNBOUND):
        return Bound()
    return next((bound for start, bound in BOUNDS.items() if name.startswith(start)), Bound())


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
    if layout == "split":  # the shape that LMCache's benchmark moves
        yield Record.compared("vs_lmcache_gpu_load", loaded, "GB/s", lmcache().load_gb_s)

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
    assert isinstance(engine.way, Straight)
    straight = engine.way.kv
    hashes = engine.chain("a", 1)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    host = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(BLOCK_BYTES, dtype=torch.uint8, device="cuda")

    def load() -> float:
        started_s = time.perf_counter()
        under_way = straight.load(hashes, engine.others[:1])
        under_way.wait_layer(0, stream)
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
        engine.way.save(hashes[start : start + MOVED_BLOCKS], engine.sources, parent=parent)
    times = []
    for _ in range(200):
        started_s = time.perf_counter()
        held = engine.client.lookup(hashes).blocks
        times.append(time.perf_counter() - started_s)
    assert held == 2048, held
    ours_us = statistics.median(times[20:]) * 1e6
    theirs_us = lmcache().lookup_32k_us
    yield Record("vs_lmcache_lookup_32k", ours_us, "us", theirs_us, theirs_us / ours_us)


def shifted(daemon: Daemon) -> Iterator[Record]:
    """Loads of a truncated session whose keys all turn, over the same loads of what stands where it stood."""
    rope = Rope(tuple(500_000.0 ** (-2 * pair / DIM) for pair in range(DIM // 2)))
    tensors = tensors_of("per_layer")
    for tensor in tensors:
        tensor.view(torch.bfloat16).normal_()
    namespace = kv.Namespace(sha256(b"shifted").digest(), "shifted", BLOCK_BYTES, TOKENS, 32)
    client = kv.attach(namespace, socket_dir=daemon.socket_dir, instance_name="gpu shifted")
    way = Buffered(client, tensors, rope=rope)
    await_memory(client, 2 * GIB)
    whole = [sha256(f"shifted/{number}".encode()).digest() for number in range(MOVED_BLOCKS + DROPPED_BLOCKS)]
    view = [sha256(f"view/{number}".encode()).digest() for number in range(MOVED_BLOCKS)]
    assert way.save(whole, list(range(len(whole))), session_id="s") == len(whole)
    keep = [(DROPPED_BLOCKS * TOKENS, len(whole) * TOKENS)]
    assert client.truncate("s", view, source=whole, keep=keep).held_blocks == MOVED_BLOCKS
    settle(client, whole[-1])
    into = random.Random(2).sample(range(1024, CACHE_BLOCKS), MOVED_BLOCKS)  # no secret

    def load(hashes: list[bytes], session_id: str) -> float:
        started_s = time.perf_counter()
        assert way.load(hashes, into, session_id=session_id)() == MOVED_BLOCKS
        return time.perf_counter() - started_s

    plain_s = median(lambda: load(whole[:MOVED_BLOCKS], ""))
    turned_s = median(lambda: load(view, "s"))
    check_turned(tensors, into, rope)
    yield Record.compared("shift_load_ratio", GIB / turned_s / 1e9, "GB/s", GIB / plain_s / 1e9)
    client.forget_namespace()
    way.close()
    client.close()


def check_turned(tensors: list[torch.Tensor], into: list[int], rope: Rope) -> None:
    """Values are the saved ones bit by bit, keys are turned as the reference turns them."""
    now_at = torch.arange(MOVED_BLOCKS * TOKENS, device="cuda").view(MOVED_BLOCKS, 1, TOKENS)
    for tensor in (tensors[0], tensors[-1]):
        blocks = tensor.view(torch.bfloat16).view(CACHE_BLOCKS, 2, HEADS, TOKENS, DIM)
        saved, found = blocks[DROPPED_BLOCKS : DROPPED_BLOCKS + MOVED_BLOCKS], blocks[into]
        assert torch.equal(saved[:, 1], found[:, 1]), "wrong values"
        expected = moved(saved[:, 0], rope, computed_at=now_at + DROPPED_BLOCKS * TOKENS, now_at=now_at)
        difference = (expected.float() - found[:, 0].float()).abs().max()
        assert float(difference) <= 2**-6 * float(expected.float().abs().max()), f"keys differ by {difference}"


def measure(layouts: Sequence[str] = LAYOUTS) -> Iterator[Record]:
    """Everything. Blocks for two minutes, one more where LMCache is measured as well."""
    lmcache()  # before anything of ours has memory of the GPU
    torch.cuda.init()  # type: ignore[no-untyped-call]
    large, matmuls = Large(), Matmuls()
    for layout in layouts:
        with running_daemon(dram_bytes=6 * GIB, dram_segment_bytes=GIB) as daemon:
            free_bytes = torch.cuda.mem_get_info()[0]
            engine = Engine(daemon, layout)
            if layout == "contiguous":
                used = free_bytes - torch.cuda.mem_get_info()[0] - sum(tensor.numel() for tensor in engine.tensors)
                yield Record.absolute("gpu_daemon_footprint", used, "bytes")
            await_memory(engine.client, 5 * GIB)
            yield from transfers(engine, large)
            yield from busy(engine, large, matmuls)
            if layout == "contiguous":
                yield from small(engine)
                yield from lookups(engine)
            engine.close()
            if layout == "per_layer":
                yield from shifted(daemon)
            del engine
            torch.cuda.empty_cache()


def table(records: list[Record]) -> str:
    """For docs/benchmarks.md."""
    lines = ["| figure | value | reference | ratio | bound | |", "|---|---|---|---|---|---|"]
    for record in records:
        bound = bound_of(record.name)
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
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="default: all")
    options = parser.parse_args()
    records = publish(measure(options.layouts), options.out)
    progress(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    progress(f"{lmcache().source}\n")
    progress(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
