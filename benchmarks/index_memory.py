"""index_memory: what a block costs the daemon beyond its bytes, by the kernel's account of the whole process.

A million blocks of 4 KiB with 32-byte hashes, in chains, are committed over the wire. The figure is the growth of the
daemon's resident memory from before anybody attached until everything is committed and checksummed, less the arena's
own bytes: index, eviction order, slots' books, and whatever garbage the way there left behind. The report beside it is
the growth of the total, arena included, after the arena was granted and touched: what filling it adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.daemon import attach, await_memory, dram_bytes_of, running_daemon
from benchmarks.filling import BLOCK_SIZE_BYTES, fill
from benchmarks.measuring import Record, progress
from benchmarks.settings import Settings

_SPARE_FRACTION = 0.125


@dataclass(frozen=True, slots=True)
class Resident:
    """A process's memory that is in RAM: all of it, and the part that is shared (the arena and its tables)."""

    total_bytes: int
    shared_bytes: int


def measure(settings: Settings) -> Iterator[Record]:
    """index_bytes_per_block, and the growth of the total beside it."""
    blocks = settings.growth_blocks[1]
    dram_bytes = int(blocks * (1 + _SPARE_FRACTION)) * BLOCK_SIZE_BYTES
    with running_daemon(dram_bytes=dram_bytes) as daemon:
        before = resident(daemon.process_id)
        client = attach(daemon, "bench index memory", block_size_bytes=BLOCK_SIZE_BYTES)
        try:
            await_memory(client, dram_bytes - BLOCK_SIZE_BYTES)
            ready = resident(daemon.process_id)
            fill(client, blocks)
            after = resident(daemon.process_id)
            arena_bytes = dram_bytes_of(client)
        finally:
            client.close()
    for name, moment in (("before attaching", before), ("memory granted", ready), ("filled", after)):
        progress(f"{name}: {moment.total_bytes >> 20} MiB resident, {moment.shared_bytes >> 20} MiB of it shared")
    # Of the shared memory only the arena's bytes are not counted: the tables of generations are.
    own_bytes = after.total_bytes - before.total_bytes - min(after.shared_bytes, arena_bytes)
    yield Record.absolute("index_bytes_per_block", own_bytes / blocks, "bytes")
    yield Record.absolute("index_fill_bytes_per_block", (after.total_bytes - ready.total_bytes) / blocks, "bytes")


def resident(process_id: int) -> Resident:
    """What the kernel says of that process now."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{process_id}/status").read_text(encoding="ascii").splitlines()
    )
    return Resident(
        total_bytes=_kib(fields["VmRSS"]) * 1024,
        shared_bytes=_kib(fields["RssShmem"]) * 1024,
    )


def _kib(text: str) -> int:
    number, unit = text.split()
    assert unit == "kB", f"the kernel counts in {unit}"
    return int(number)
