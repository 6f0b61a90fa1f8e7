"""Looking at a volume's directory while no daemon has it: what is in it, and whether it is intact. Changes nothing.

What is intact is decided by the code that the daemon reads with: a block that is bad here is a miss there.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np

from kvservice.blocks import BlockHash, NamespaceSpec
from kvservice.nvme import directory as directories
from kvservice.nvme.extents import Extents
from kvservice.nvme.files import ReadOnlyFiles
from kvservice.nvme.format import PAGE_BYTES, extent_stride_bytes
from kvservice.nvme.journal_files import JournalFiles
from kvservice.nvme.names import FILES, intact, read_names
from kvservice.nvme.recollection import find_segments, recollect
from kvservice.nvme.results import ReadJob, ReadResult
from kvservice.nvme.segments import Segments, place_of, segment_of

_BATCH_BYTES = 8 * 1024 * 1024
_BATCH_BLOCKS_MAX = 1024
_CALLS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class NamespaceContents:
    """What the directory has of one namespace; times are wall-clock seconds."""

    spec: NamespaceSpec
    blocks: int
    size_bytes: int
    """Of its blocks' extents, headers included."""
    sessions: int
    first_used_s: float
    """Of its blocks, the one used longest ago; 0.0 without blocks."""
    last_used_s: float


@dataclass(frozen=True, slots=True)
class CheckedExtent:
    """One extent that should have a block, and what it has; `why` is empty where that is the block."""

    spec: NamespaceSpec
    block_hash: BlockHash
    segment_id: int
    place: int
    path: str
    offset_bytes: int
    why: str
    is_superseded: bool = False
    """It has another block, whole: its record was not written before a crash. A miss, no damage."""

    @property
    def is_bad(self) -> bool:
        return bool(self.why) and not self.is_superseded


class Survey:
    """A directory that is locked while this is open. A context manager. Blocks."""

    def __init__(self, directory: str) -> None:
        """Raises StartupError: no daemon made it, a daemon has it. OSError: it cannot be read."""
        self.directory = directory
        self._lock = directories.lock_existing(directory)
        files = ReadOnlyFiles()
        self.names = read_names(directory)
        self.segments = find_segments(directory, files)
        self._journal = JournalFiles(directories.index_path(directory), files)
        records, self.damaged_pages = self._journal.read()
        remembered = recollect(self.names, self.segments, records, self.damaged_pages)
        self.recovered = remembered.recovered
        self.lost_records = len(remembered.lost)
        self._books = Segments(segment_bytes=0, data_bytes=0)
        self._books.adopt(self.segments, self.recovered.extent)
        self._extents = Extents(directory, self._books, files, calls_at_once=_CALLS_AT_ONCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._extents.close()
        os.close(self._lock)

    @property
    def blocks(self) -> int:
        """Blocks that the index knows."""
        return len(self.recovered.hashes)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all segment files."""
        return sum(segment.size_bytes for segment in self.segments)

    @property
    def log_bytes(self) -> int:
        """Bytes of the logs."""
        return self._journal.size_bytes("log")

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the checkpoints."""
        return self._journal.size_bytes("checkpoint")

    def contents(self) -> list[NamespaceContents]:
        """What there is of each namespace."""
        found = []
        for at, spec in enumerate(self.recovered.namespaces):
            used_s = self.recovered.last_used_s[self.recovered.namespace_index == at]
            found.append(
                NamespaceContents(
                    spec=spec,
                    blocks=len(used_s),
                    size_bytes=len(used_s) * extent_stride_bytes(spec.block_size_bytes),
                    sessions=len({session for of, session, _ in self.recovered.sessions if of == at}),
                    first_used_s=float(used_s.min(initial=np.inf)) if len(used_s) else 0.0,
                    last_used_s=float(used_s.max(initial=0.0)),
                )
            )
        return found

    def damage(self) -> list[str]:
        """What is damaged beside extents, one sentence each."""
        found = []
        for name in FILES:
            path = os.path.join(self.directory, name)
            if os.path.exists(path) and intact(path) is None:
                found.append(f"{path}: this copy of the namespaces' names is damaged")
        if self.damaged_pages:
            found.append(f"{self._journal.directory}: {self.damaged_pages} pages of the index are damaged")
        in_use = set(segment_of(self.recovered.extent).tolist())
        for segment in self.segments:
            number = segment.header.segment_id
            if number in in_use and not segment.is_ready:
                found.append(f"{directories.segment_path(self.directory, number)}: one of its two headers is damaged")
        return found

    def check(self) -> Iterator[CheckedExtent]:
        """Read and verify every extent that should have a block, in the order of the disk."""
        order = np.argsort(self.recovered.extent, kind="stable").tolist()
        with ThreadPoolExecutor(_CALLS_AT_ONCE) as pool:
            batches = self._batches(order)
            running = [pool.submit(self._check_batch, batch) for batch, _ in zip(batches, range(8), strict=False)]
            while running:
                yield from running.pop(0).result()
                if (batch := next(batches, None)) is not None:
                    running.append(pool.submit(self._check_batch, batch))

    def _batches(self, order: Sequence[int]) -> Iterator[list[int]]:
        """Positions of blocks of one namespace, a few MiB together."""
        batch: list[int] = []
        for position in order:
            namespace = self.recovered.namespace_index[position]
            stride_bytes = extent_stride_bytes(self.recovered.namespaces[namespace].block_size_bytes)
            most = min(_BATCH_BLOCKS_MAX, max(1, _BATCH_BYTES // stride_bytes))
            if batch and (len(batch) >= most or namespace != self.recovered.namespace_index[batch[0]]):
                yield batch
                batch = []
            batch.append(position)
        if batch:
            yield batch

    def _check_batch(self, batch: Sequence[int]) -> list[CheckedExtent]:
        spec = self.recovered.namespaces[self.recovered.namespace_index[batch[0]]]
        payload_bytes = extent_stride_bytes(spec.block_size_bytes) - PAGE_BYTES
        memory = memoryview(mmap.mmap(-1, payload_bytes * len(batch)))
        jobs = [
            ReadJob(
                int(self.recovered.extent[position]),
                BlockHash(self.recovered.hashes[position]),
                memory[number * payload_bytes : (number + 1) * payload_bytes],
            )
            for number, position in enumerate(batch)
        ]
        return list(map(partial(self._checked, spec), jobs, self._read(spec, jobs)))

    def _read(self, spec: NamespaceSpec, jobs: Sequence[ReadJob]) -> Sequence[ReadResult | OSError]:
        try:
            return self._extents.read(spec, jobs)
        except OSError as error:
            if len(jobs) == 1:
                return [error]
            return [result for job in jobs for result in self._read(spec, [job])]  # which of them it is

    def _checked(self, spec: NamespaceSpec, job: ReadJob, result: ReadResult | OSError) -> CheckedExtent:
        segment = self._books.get(job.extent)
        assert segment is not None, "recollect keeps extents of segments that there are"
        why = "" if result is ReadResult.OK else f"it cannot be read: {result}"
        return CheckedExtent(
            spec=spec,
            block_hash=job.block_hash,
            segment_id=segment_of(job.extent),
            place=place_of(job.extent),
            path=directories.segment_path(self.directory, segment_of(job.extent)),
            offset_bytes=segment.offset(job.extent),
            why=result.value if isinstance(result, ReadResult) and why else why,
            is_superseded=result is ReadResult.OTHER_BLOCK,
        )
