"""batches: our side of saving and loading: batches of fresh blocks, timed end to end, compared byte by byte afterwards.

Saving is Put, copying, Commit; loading is Get, copying, the check of the generations, Release: what an engine calls.
"""

from __future__ import annotations

import random
from time import perf_counter

import kvservice_client as kv
from benchmarks.daemon import HASH_SIZE_BYTES, settle
from benchmarks.measuring import FreshContents, PrivateBuffer, require_same_bytes


class Batches:
    """Batches of blocks of one namespace, saved from and loaded into private buffers of this process.

    Attributes:
        size_bytes: of one batch.
        contents: what is saved; every repetition's is different.
        destination: where it is loaded.
    """

    def __init__(self, client: kv.Client, *, blocks: int, block_size_bytes: int, repetitions: int) -> None:
        self.size_bytes = blocks * block_size_bytes
        self.contents = FreshContents(self.size_bytes, repetitions=repetitions + 1)
        self.destination = PrivateBuffer(self.size_bytes)
        self._client = client
        self._blocks = blocks
        self._repetitions = repetitions
        self._hashes: list[bytes] = []

    def warm_up(self) -> None:
        """One batch there and back, so that the daemon has granted, and this process mapped, the memory it needs."""
        self.save(self._repetitions)
        self.load(self._repetitions)

    def save(self, repetition: int) -> float:
        """Seconds of saving a batch that the daemon has never seen. The batch before it is forgotten first, untimed."""
        if self._hashes:
            self._client.forget_namespace()
        self._hashes = fresh_hashes(self._blocks)
        source = self.contents.view(repetition)
        started_s = perf_counter()
        done = self._client.save(self._hashes, source)
        elapsed_s = perf_counter() - started_s
        if done.saved != self._blocks:
            raise RuntimeError(f"saved {done.saved} of {self._blocks} blocks: {done}")
        settle(self._client, self._hashes[-1])
        return elapsed_s

    def load(self, repetition: int) -> float:
        """Seconds of loading the batch that was saved in this repetition."""
        self.destination.wipe()
        started_s = perf_counter()
        done = self._client.load(self._hashes, self.destination.view)
        elapsed_s = perf_counter() - started_s
        if done.blocks != self._blocks:
            raise RuntimeError(f"loaded {done.blocks} of {self._blocks} blocks: {done}")
        require_same_bytes(self.contents.address(repetition), self.destination.address, self.size_bytes, "our load")
        return elapsed_s


def fresh_hashes(count: int, source: random.Random | None = None) -> list[bytes]:
    """A chain of that many hashes that nobody used before, or `source`'s next ones."""
    source = source or random.SystemRandom()
    return [source.randbytes(HASH_SIZE_BYTES) for _ in range(count)]
