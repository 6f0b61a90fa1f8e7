"""recovery: how long a start takes with a million blocks on NVMe, and what a lookup notices of blocks that move.

recovery_s_per_million: from before exec until a Get of a random block that is on NVMe came with its own bytes; half of
the records in a checkpoint, half in the log's tail, the index not in the page cache. The report beside it is when the
daemon's health check said "serving".

loop_stall_ratio: p99 of a Lookup of a hundred hashes while at least 2 GiB go to NVMe and 2 GiB come from it, over its
p99 while nothing moves, in turns, with the same million blocks in the index.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

import kvservice_client as kv
from benchmarks import recorded
from benchmarks.daemon import Daemon, attach, running_daemon
from benchmarks.measuring import Record, WrongBytes, progress, take_turns
from benchmarks.recorded import Recorded
from benchmarks.settings import Settings
from kvservice_client.calls import open_channel

_MIB = 1 << 20
_STARTS = 3
_PAUSE_S = 0.02
_START_TIMEOUT_S = 120.0
_IDLE_CALLS = 3000
_WARM_UP_CALLS = 50
_DRAM_BYTES = 64 * _MIB
_DATA_ROOM_BYTES = 32 << 30
_INDEX_BYTES_PER_BLOCK = 16 * 1024
"""A volume gives a sixteenth of its bound to its index: a million blocks need about 15 GiB of bound."""


def measure(settings: Settings) -> Iterator[Record]:
    """recovery_s_per_million, then loop_stall_ratio in the same directory."""
    blocks = settings.growth_blocks[1]
    build = Path("build")
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nvme-", dir=build) as directory:
        nvme_bytes = blocks * _INDEX_BYTES_PER_BLOCK + _DATA_ROOM_BYTES
        held = recorded.record_blocks(Path(directory) / "tier", blocks, nvme_bytes=nvme_bytes)
        yield from _starts(held, blocks)
        yield _stalls(settings, held)


def _starts(held: Recorded, blocks: int) -> Iterator[Record]:
    source = random.Random(2)
    first_hits_s, healthy_s = [], []
    for number in range(_STARTS):
        recorded.forget_cache(held.directory)
        started_s = perf_counter()
        with _daemon(held, dram_bytes=_DRAM_BYTES) as daemon:
            _await_health(daemon)
            healthy_s.append(perf_counter() - started_s)
            client = attach(daemon, recorded.LABEL, block_size_bytes=recorded.BLOCK_SIZE_BYTES)
            try:
                waited = _await_hit(client, source.choice(held.chains)[:1])
                first_hits_s.append(perf_counter() - started_s)
                for chain in source.sample(list(held.chains), min(10, len(held.chains))):
                    _require_hit(client, chain)
            finally:
                client.close()
        progress(
            f"start {number + 1}/{_STARTS}: healthy after {healthy_s[-1]:.2f} s, hit after {first_hits_s[-1]:.2f} s"
        )
        if not waited:
            raise RuntimeError("the first Get hit at once: health was answered only after recovery")
    first_hit_s = statistics.median(first_hits_s)
    yield Record.absolute("recovery_s_per_million", first_hit_s / (blocks / 1_000_000), "s")
    yield Record.compared("recovery_healthy_share", statistics.median(healthy_s), "s", first_hit_s)


def _stalls(settings: Settings, held: Recorded) -> Record:
    chain_bytes = settings.nvme_chain_blocks * settings.shm_block_size_bytes
    with _daemon(held, dram_bytes=chain_bytes * 7 // 2) as daemon:
        client = attach(daemon, recorded.LABEL, block_size_bytes=recorded.BLOCK_SIZE_BYTES)
        try:
            _await_hit(client, held.chains[0][:1])
            with Mover(daemon, settings) as mover:
                mover.move()
                turns = take_turns(
                    reference=lambda repetition: {"p99": _p99_s(client, held, repetition, mover=None)},
                    ours=lambda repetition: {"p99": _p99_s(client, held, repetition, mover=mover)},
                    repetitions=settings.repetitions,
                    title="lookups while blocks move",
                )
        finally:
            client.close()
    return turns.latency("loop_stall_ratio", ours="p99", reference="p99")


class Mover:
    """Another process that moves blocks of its own namespace to and from NVMe when told to."""

    def __init__(self, daemon: Daemon, settings: Settings) -> None:
        command = [sys.executable, "-m", "benchmarks.mover", daemon.socket_dir]
        command += [str(settings.nvme_chain_blocks), str(settings.shm_block_size_bytes)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Mover:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def begin(self) -> None:
        """Start moving two chains each way."""
        assert self._process.stdin is not None
        self._process.stdin.write("move\n")
        self._process.stdin.flush()

    def wait(self) -> None:
        """Until they have moved. Raises RuntimeError."""
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "moved\n":
            raise RuntimeError("the process that moves blocks ended")

    def move(self) -> None:
        """Both."""
        self.begin()
        self.wait()


def _p99_s(client: kv.Client, held: Recorded, seed: int, *, mover: Mover | None) -> float:
    """p99 of lookups: as many as there are during one move, or a few thousand."""
    source = random.Random(seed)
    elapsed_s: list[float] = []

    def lookups(count: int) -> None:
        for _ in range(count):
            hashes = source.choice(held.all_chains)
            started_s = perf_counter()
            found = client.lookup(hashes)
            elapsed_s.append(perf_counter() - started_s)
            if found.blocks != len(hashes):
                raise RuntimeError(f"{found.blocks} of {len(hashes)} blocks were found: {found}")

    lookups(_WARM_UP_CALLS)
    elapsed_s.clear()
    if mover is None:
        lookups(_IDLE_CALLS)
    else:
        mover.begin()
        moved = threading.Thread(target=mover.wait)
        moved.start()
        while moved.is_alive():
            lookups(10)
        moved.join()
    p50_ms, longest_ms = statistics.median(elapsed_s) * 1e3, max(elapsed_s) * 1e3
    progress(f"{len(elapsed_s)} lookups, p50 {p50_ms:.2f} ms, longest {longest_ms:.1f} ms")
    return statistics.quantiles(elapsed_s, n=100)[98]


@contextmanager
def _daemon(held: Recorded, *, dram_bytes: int) -> Iterator[Daemon]:
    knobs = {"nvme_dirs": held.directory, "nvme_bytes": held.nvme_bytes, "nvme_write_behind_s": 0.01}
    with running_daemon(dram_bytes=dram_bytes, **knobs) as daemon:
        yield daemon


def _await_health(daemon: Daemon) -> None:
    with open_channel(daemon.socket_dir) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise RuntimeError(f"the daemon says that it is ready and its health check says {answer}")


def _await_hit(client: kv.Client, hashes: Sequence[bytes]) -> int:
    """Ask until the blocks come; how often they did not."""
    deadline_s, misses = perf_counter() + _START_TIMEOUT_S, 0
    while not _is_hit(client, hashes):
        misses += 1
        if perf_counter() > deadline_s:
            raise RuntimeError(f"a block on NVMe was not found within {_START_TIMEOUT_S:.0f} s")
        sleep(_PAUSE_S)
    return misses


def _require_hit(client: kv.Client, hashes: Sequence[bytes]) -> None:
    if not _is_hit(client, hashes):
        raise RuntimeError("a chain on NVMe is not found after the recovery")


def _is_hit(client: kv.Client, hashes: Sequence[bytes]) -> bool:
    buffer = bytearray(len(hashes) * recorded.BLOCK_SIZE_BYTES)
    if client.load(hashes, buffer).blocks < len(hashes):
        return False
    if bytes(buffer) != b"".join(map(recorded.content_of, hashes)):
        raise WrongBytes("a block that was recovered has other bytes")
    return True
