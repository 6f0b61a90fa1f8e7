"""shared_memory: saving and loading over shared memory, against a plain memcpy of the same bytes.

The reference is one single-threaded memcpy, in one call, between two mappings whose pages were touched before; the
reports add a memcpy by two threads, each half of the bytes. Ours is what an engine calls in another process than the
daemon: Put, copy, Commit and Get, copy, check, Release, with all RPCs inside the timed region.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import kvservice_client as kv
from benchmarks.batches import Batches, fresh_hashes
from benchmarks.daemon import attached, settle
from benchmarks.measuring import FreshContents, PrivateBuffer, Record, take_turns
from benchmarks.settings import Settings


def measure(settings: Settings) -> Iterator[Record]:
    """shm_save_ratio and shm_load_ratio, and the reports beside them."""
    size_bytes = settings.shm_blocks * settings.shm_block_size_bytes
    # Everything that the sustained figure saves stays resident, with the daemon's usual distance from full.
    dram_bytes = size_bytes * settings.sustained_rounds * 5 // 4
    label, block_size_bytes = "bench shared memory", settings.shm_block_size_bytes
    with attached(label, block_size_bytes=block_size_bytes, dram_bytes=dram_bytes) as client:
        batches = Batches(
            client,
            blocks=settings.shm_blocks,
            block_size_bytes=settings.shm_block_size_bytes,
            repetitions=settings.repetitions,
        )
        batches.warm_up()
        with Memcpy(batches.contents, batches.destination) as memcpy:
            turns = take_turns(
                reference=memcpy.turn,
                ours=lambda repetition: {"save": batches.save(repetition), "load": batches.load(repetition)},
                repetitions=settings.repetitions,
                title="shared memory",
            )
            for verb in ("save", "load"):
                yield turns.throughput(f"shm_{verb}_ratio", size_bytes, ours=verb, reference="memcpy")
            for verb in ("save", "load"):
                yield turns.throughput(f"shm_{verb}_two_threads", size_bytes, ours=verb, reference="memcpy by two")
            yield _sustained(settings, client, batches, memcpy)


class Memcpy:
    """Plain copies of the source's bytes to the destination, both of which were touched before."""

    def __init__(self, source: FreshContents, destination: PrivateBuffer) -> None:
        self._source = source
        self._destination = destination
        self._second = ThreadPoolExecutor(1)

    def __enter__(self) -> Memcpy:
        return self

    def __exit__(self, *_: object) -> None:
        self._second.shutdown()

    def turn(self, repetition: int) -> Mapping[str, float]:
        """Seconds of a copy by one thread, and of one by two."""
        return {"memcpy": self.by_one(repetition), "memcpy by two": self.by_two(repetition)}

    def by_one(self, repetition: int) -> float:
        source, destination = self._source.address(repetition), self._destination.address
        started_s = perf_counter()
        ctypes.memmove(destination, source, self._source.size_bytes)
        return perf_counter() - started_s

    def by_two(self, repetition: int) -> float:
        source, destination = self._source.address(repetition), self._destination.address
        half_bytes = self._source.size_bytes // 2
        started_s = perf_counter()
        other = self._second.submit(ctypes.memmove, destination + half_bytes, source + half_bytes, half_bytes)
        ctypes.memmove(destination, source, half_bytes)
        other.result()
        return perf_counter() - started_s


def _sustained(settings: Settings, client: kv.Client, batches: Batches, memcpy: Memcpy) -> Record:
    """Saves in a row, from the first byte until the last block has its checksum, over as many memcpys in a row."""
    rounds = range(settings.sustained_rounds)

    def copies(_repetition: int) -> Mapping[str, float]:
        return {"memcpy": sum(memcpy.by_one(round_ % settings.repetitions) for round_ in rounds)}

    def saves(_repetition: int) -> Mapping[str, float]:
        client.forget_namespace()
        chains = [fresh_hashes(settings.shm_blocks) for _ in rounds]
        started_s = perf_counter()
        for round_, hashes in zip(rounds, chains, strict=True):
            done = client.save(hashes, batches.contents.view(round_ % settings.repetitions))
            if done.saved != settings.shm_blocks:
                raise RuntimeError(f"saved {done.saved} of {settings.shm_blocks} blocks: {done}")
        settle(client, chains[-1][-1])
        return {"save": perf_counter() - started_s}

    turns = take_turns(
        reference=copies,
        ours=saves,
        repetitions=settings.repetitions,
        title="sustained",
    )
    size_bytes = batches.size_bytes * settings.sustained_rounds
    return turns.throughput("shm_save_sustained_with_checksums", size_bytes, ours="save", reference="memcpy")
