"""recorded: a directory of the NVMe tier with many small blocks, as a daemon leaves it: half of the records in a
checkpoint, half in the log's tail.

Made with the daemon's own volume. Every hundredth chain has its bytes; of the others the extents are allocated and
recorded only: a start reads no payloads, and who asks for one of those chains would get a miss.
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

from benchmarks.batches import fresh_hashes
from benchmarks.daemon import HASH_SIZE_BYTES
from benchmarks.measuring import progress
from kvservice.blocks import BlockHash, NamespaceKey, NamespaceSpec, Tenant
from kvservice.checksums import checksum_of
from kvservice.nvme import RecordKind, Volume, WriteJob, record, records_array

BLOCK_SIZE_BYTES = 4096
CHAIN_BLOCKS = 100
LABEL = "bench recorded"
_WRITTEN_EVERY = 100
_CHAINS_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class Recorded:
    """What is in the directory.

    Attributes:
        directory: one for nvme_dirs.
        nvme_bytes: its bound.
        chains: some of those whose bytes are there too.
        all_chains: a sample of all of them, for lookups.
    """

    directory: Path
    nvme_bytes: int
    chains: Sequence[Sequence[bytes]]
    all_chains: Sequence[Sequence[bytes]]


def content_of(block_hash: bytes) -> bytes:
    """The bytes of a block that has any."""
    return block_hash * (BLOCK_SIZE_BYTES // HASH_SIZE_BYTES)


def record_blocks(directory: Path, blocks: int, *, nvme_bytes: int, seed: int = 1) -> Recorded:
    """Make the directory. Blocks for about a minute a million blocks."""
    volume = Volume.open(str(directory), capacity_bytes=nvme_bytes, segment_bytes=256 << 20)
    volume.recover()
    source = random.Random(seed)
    numbered = iter(range(blocks // CHAIN_BLOCKS))
    written, sample = [], []
    is_folded = False
    while numbers := list(islice(numbered, _CHAINS_AT_ONCE)):
        chains = [fresh_hashes(CHAIN_BLOCKS, source) for _ in numbers]
        extents = volume.reserve(SPEC, len(chains) * CHAIN_BLOCKS)
        epoch = volume.epoch
        for at, number in enumerate(numbers):
            # Also the last of all: a segment that nobody wrote to has no file, and its blocks would not be found again.
            if number % _WRITTEN_EVERY == 0 or number == blocks // CHAIN_BLOCKS - 1:
                _write(volume, chains[at], extents[at * CHAIN_BLOCKS :])
                written.append(chains[at])
        volume.flush(epoch)
        volume.append(records_array(_records(chains, extents)))
        sample.append(chains[-1])
        if numbers[-1] * CHAIN_BLOCKS >= blocks // 2 and not is_folded:
            volume.journal.fold()
            is_folded = True
            progress(f"recorded {(numbers[-1] + 1) * CHAIN_BLOCKS} of {blocks} blocks")
    volume.close()
    return Recorded(directory, nvme_bytes, written, sample)


def forget_cache(directory: Path) -> None:
    """The index is read from the disk, not from the kernel's memory."""
    for path in (directory / "index").iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# What a client of this process with the label and sizes of `benchmarks.daemon.attach` declares.
SPEC = NamespaceSpec(
    key=NamespaceKey(Tenant(f"uid:{os.getuid()}"), sha256(LABEL.encode()).digest()),
    label=LABEL,
    block_size_bytes=BLOCK_SIZE_BYTES,
    tokens_per_block=16,
    hash_size_bytes=HASH_SIZE_BYTES,
)


def _records(chains: Sequence[Sequence[bytes]], extents: Sequence[int]) -> Iterator[tuple[object, ...]]:
    at = iter(extents)
    for number, chain in enumerate(chains):
        for depth, block_hash in enumerate(chain):
            parent = chain[depth - 1] if depth else b""
            yield record(
                RecordKind.STORED,
                SPEC,
                next(at),
                block_hash=block_hash,
                parent=parent,
                depth=depth,
                last_used_s=float(number),
            )


def _write(volume: Volume, chain: Sequence[bytes], extents: Sequence[int]) -> None:
    memory = memoryview(mmap.mmap(-1, len(chain) * BLOCK_SIZE_BYTES))
    jobs = []
    for number, block_hash in enumerate(chain):
        block = memory[number * BLOCK_SIZE_BYTES : (number + 1) * BLOCK_SIZE_BYTES]
        block[:] = content_of(block_hash)
        jobs.append(WriteJob(extents[number], BlockHash(block_hash), block, checksum_of(block)))
    volume.write(SPEC, jobs)
