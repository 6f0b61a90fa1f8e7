"""nvme: moving blocks to and from the NVMe tier, against raw reads and writes of the same directory.

The reference is preadv and pwritev with O_DIRECT by as many threads as the daemon has calls at its device, the same
block size, in slots of the daemon's own arena: a device's speed depends on which memory it meets (by a third, where
this was written). Reads are of the daemon's own segment files, so that both sides read the very same places; writes go
over files that were allocated and written before, as the daemon's are, and are flushed.

Ours is a Get of a chain that is on NVMe only, until its last block was handed out (checksums verified), and the time
from Commit until the chain's last block is durable (checksums made, payloads flushed, journal flushed).
"""

from __future__ import annotations

import ctypes
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, sleep

import kvservice_client as kv
from benchmarks.batches import fresh_hashes
from benchmarks.daemon import attach, await_durable, await_memory, running_daemon
from benchmarks.measuring import PAGE_SIZE_BYTES, FreshContents, Record, require_same_bytes, take_turns
from benchmarks.raw_disk import Place, RawDisk, opened
from benchmarks.settings import Settings
from kvservice.config import Config
from kvservice_proto.v1 import kvservice_pb2 as pb

_CHAINS = 3
"""Read in turn; DRAM holds little more than one, so that each is on NVMe only when its turn comes."""
_SEGMENT_BYTES = 256 << 20
_QUIET_SHARE = 0.7
_GET_TIMEOUT_S = 60.0


def measure(settings: Settings) -> Iterator[Record]:
    """nvme_read_ratio, nvme_first_block_share, nvme_write_ratio."""
    blocks, block_bytes = settings.nvme_chain_blocks, settings.shm_block_size_bytes
    size_bytes = blocks * block_bytes
    build = Path("build")
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nvme-", dir=build) as directory:
        tier = Path(directory) / "tier"
        knobs: dict[str, object] = {
            "nvme_dirs": tier,
            "nvme_bytes": 8 * size_bytes,
            "nvme_segment_bytes": _SEGMENT_BYTES,
            # What is timed begins with Commit: it must not wait for more to write.
            "nvme_write_behind_s": 0.01,
        }
        dram_bytes = size_bytes * 5 // 4
        raw = RawDisk(threads=Config().nvme_queue_depth)
        with running_daemon(dram_bytes=dram_bytes, **knobs) as daemon:
            client = attach(daemon, "bench nvme", block_size_bytes=block_bytes)
            try:
                await_memory(client, dram_bytes - block_bytes)
                moves = Moves(client, blocks=blocks, block_size_bytes=block_bytes)
                yield from _reads(settings, moves, raw, tier)
                yield from _writes(settings, moves, raw, Path(directory))
            finally:
                client.close()
                raw.close()


def _reads(settings: Settings, moves: Moves, raw: RawDisk, tier: Path) -> Iterator[Record]:
    for chain in range(_CHAINS):
        moves.save(chain)
    segments = sorted((tier / "segments").iterdir())
    with opened(segments, os.O_RDONLY) as descriptors:
        places = _extents(segments, descriptors, moves.block_size_bytes)

        def reference(repetition: int) -> Mapping[str, float]:
            first = (repetition + 1) % _CHAINS * moves.blocks
            with moves.slots() as memory:
                return {"read": raw.read(places[first : first + moves.blocks], memory)}

        turns = take_turns(
            reference=reference,
            ours=lambda repetition: moves.get(repetition % _CHAINS),
            repetitions=settings.repetitions,
            title="nvme reads",
        )
    yield turns.throughput("nvme_read_ratio", moves.size_bytes, ours="all", reference="read")
    first, whole = turns.ours["first"], turns.ours["all"]
    shares = [one / all_ for one, all_ in zip(first, whole, strict=True)]
    yield Record(
        "nvme_first_block_share",
        statistics.median(first) * 1e6,
        "us",
        statistics.median(whole) * 1e6,
        statistics.median(shares),
    )


def _writes(settings: Settings, moves: Moves, raw: RawDisk, directory: Path) -> Iterator[Record]:
    per_file = max(1, _SEGMENT_BYTES // moves.block_size_bytes)
    paths = [directory / f"raw-{number}" for number in range(-(-moves.blocks // per_file))]
    with opened(paths, os.O_RDWR | os.O_CREAT) as descriptors:
        places: list[Place] = []
        for descriptor in descriptors:
            os.posix_fallocate(descriptor, 0, per_file * moves.block_size_bytes)
            places += [(descriptor, at * moves.block_size_bytes) for at in range(per_file)]
        places = places[: moves.blocks]

        def reference(_repetition: int) -> Mapping[str, float]:
            with moves.slots() as memory:
                return {"write": raw.write(places, memory)}

        reference(0)
        turns = take_turns(
            reference=reference,
            ours=lambda repetition: {"write": moves.write_behind(repetition)},
            repetitions=settings.repetitions,
            title="nvme writes",
        )
    yield turns.throughput("nvme_write_ratio", moves.size_bytes, ours="write", reference="write")


def _extents(segments: list[Path], descriptors: list[int], block_size_bytes: int) -> list[Place]:
    """Where the payloads of all extents are, in the order in which the daemon gave them out."""
    places = []
    for path, descriptor in zip(segments, descriptors, strict=True):
        stride_bytes = PAGE_SIZE_BYTES + block_size_bytes
        extents = (path.stat().st_size - 2 * PAGE_SIZE_BYTES) // stride_bytes
        places += [(descriptor, 2 * PAGE_SIZE_BYTES + at * stride_bytes) for at in range(extents)]
    return places


class Moves:
    """Chains of one namespace that go to NVMe and come back."""

    def __init__(self, client: kv.Client, *, blocks: int, block_size_bytes: int) -> None:
        self.blocks = blocks
        self.block_size_bytes = block_size_bytes
        self.size_bytes = blocks * block_size_bytes
        self._client = client
        self._last_s = 0.0
        self._contents = FreshContents(self.size_bytes, repetitions=_CHAINS)
        self._chains = [fresh_hashes(blocks) for _ in range(_CHAINS)]

    def save(self, chain: int) -> float:
        """Store a chain; seconds from its Commit until it is durable."""
        hashes, source = self._chains[chain], self._contents.address(chain)
        with self._client.put(hashes) as reservation:
            if len(reservation.reserved) != self.blocks:
                raise RuntimeError(f"{len(reservation.reserved)} of {self.blocks} blocks were reserved")
            for position, view in reservation.reserved:
                ctypes.memmove(view.address, source + position * self.block_size_bytes, self.block_size_bytes)
            started_s = perf_counter()
            reservation.commit()
            # Nobody asks most of the time: what asking costs the daemon is not part of writing.
            sleep(_QUIET_SHARE * self._last_s)
            await_durable(self._client, hashes[-1])
            self._last_s = perf_counter() - started_s
            return self._last_s

    def write_behind(self, repetition: int) -> float:
        """The same with a chain that the daemon has never seen, over extents that were written before."""
        self._client.forget_namespace()
        self._chains[repetition % _CHAINS] = fresh_hashes(self.blocks)
        return self.save(repetition % _CHAINS)

    def get(self, chain: int) -> dict[str, float]:
        """Seconds until the first and the last block of a chain on NVMe were handed out. Every byte is compared."""
        hashes = self._chains[chain]
        if self._client.lookup(hashes).dram_blocks:
            raise RuntimeError("the chain is in DRAM")
        link = self._client._attachment.link()
        request = pb.GetRequest(namespace_id=link.welcome.namespace_ids[0], hashes=b"".join(hashes))
        first_s, slots = 0.0, []
        lease_id = 0
        started_s = perf_counter()
        for response in link.get(request, _GET_TIMEOUT_S):
            lease_id = response.lease_id or lease_id
            for run in response.runs:
                if run.WhichOneof("outcome") == "handles":
                    first_s = first_s or perf_counter() - started_s
                    shared = run.handles.shared_memory
                    slots += [(shared.segment_id, slot) for slot in shared.slots]
        elapsed_s = perf_counter() - started_s
        if len(slots) != self.blocks:
            raise RuntimeError(f"{len(slots)} of {self.blocks} blocks came")
        expected = self._contents.address(chain)
        for position, (segment_id, slot) in enumerate(slots):
            address = link.use_segment(segment_id).slot_address(slot)
            at = expected + position * self.block_size_bytes
            require_same_bytes(at, address, self.block_size_bytes, "a block from NVMe")
            link.unuse_segment(segment_id)
        link.end_hold(lease_id=lease_id)
        return {"first": first_s, "all": elapsed_s}

    @contextmanager
    def slots(self) -> Iterator[list[memoryview]]:
        """As many slots of the daemon's arena as a chain has blocks, to scribble on."""
        with self._client.put(fresh_hashes(self.blocks)) as reservation:
            yield [view.memory for _, view in reservation.reserved]
