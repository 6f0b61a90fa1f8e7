"""Reading and writing extents: neighbours in one system call, everything read verified. Blocks; for threads.

A flush is a barrier that fails closed. After a failed write-back the kernel calls the pages clean and
the next flush succeeds, so a later success says nothing about what was written before: once a flush
failed, all writes since the last good one are given up, and so are later ones until the device passed
a probe. A writer notes the `epoch` before it writes and names it when it flushes.
"""

from __future__ import annotations

import errno
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

from kvservice.blocks import NamespaceSpec
from kvservice.checksums import checksum_of
from kvservice.nvme.descriptors import Descriptors
from kvservice.nvme.directory import segment_path
from kvservice.nvme.files import Buffer, Files, after
from kvservice.nvme.format import PAGE_BYTES, HeaderState, extent_header, namespace_digest, pack_extent_header
from kvservice.nvme.results import ReadJob, ReadResult, WriteJob
from kvservice.nvme.segments import Segment, Segments, segment_of

_EXTENTS_PER_CALL = 64  # far below the kernel's 1,024 buffers
_DESCRIPTORS_MAX = 256
_READ_ATTEMPTS = 8

Job = TypeVar("Job", ReadJob, WriteJob)


class Extents:
    """The extents of a volume's segments, as bytes."""

    def __init__(self, directory: str, segments: Segments, files: Files, *, calls_at_once: int) -> None:
        """Args:
        calls_at_once: reads and writes that the device gets side by side; more threads than that verify meanwhile.
        """
        self._segments = segments
        self._files = files
        self._descriptors = Descriptors(files, lambda number: segment_path(directory, number), limit=_DESCRIPTORS_MAX)
        self._device = threading.BoundedSemaphore(calls_at_once)
        self._preparing = threading.Lock()
        self._flushing = threading.Lock()
        self._mutex = threading.Lock()
        self._unflushed: set[int] = set()
        self._failure = ""
        self._local = threading.local()
        self.epoch = 0
        """Changes whenever what was written and not flushed is given up."""
        self.written_bytes = 0

    def write(self, spec: NamespaceSpec, jobs: Sequence[WriteJob]) -> None:
        """Write blocks of one namespace; durable after `flush`. Raises OSError."""
        digest = namespace_digest(spec)
        for segment, run in self._runs(jobs, of=lambda job: job.extent):
            self._require(self.epoch)
            with self._descriptors.borrowed(segment.header.segment_id) as descriptor:
                if not segment.is_ready:
                    self._prepare(segment, descriptor)
                buffers: list[Buffer] = []
                for page, job in zip(self._pages(len(run)), run, strict=True):
                    pack_extent_header(page, digest, job.block_hash, spec.block_size_bytes, job.checksum)
                    buffers += [page, job.memory]
                with self._device:
                    self._files.write(descriptor, buffers, segment.offset(run[0].extent))
            with self._mutex:
                self._unflushed.add(segment.header.segment_id)  # now: a flush that began before may miss the write
                self.written_bytes += sum(len(buffer) for buffer in buffers)

    def flush(self, epoch: int) -> None:
        """What was written before this call survives a loss of power when it returns.

        Args:
            epoch: as it was before the first of those writes.

        Raises:
            OSError: it may not, and never will by another flush: write it again.
        """
        with self._flushing:  # who comes second waits: a flush under way may be of its blocks
            self._require(epoch)
            with self._mutex:
                numbers = list(self._unflushed)
            for number in numbers:
                with self._mutex:
                    self._unflushed.discard(number)
                try:
                    with self._descriptors.borrowed(number) as descriptor:
                        self._files.flush(descriptor)
                except OSError as error:
                    self.give_up(str(error))
                    raise
            self._require(epoch)

    def give_up(self, why: str) -> None:
        """What was written and not flushed is lost; so is what comes, until `accept`."""
        with self._mutex:
            self.epoch += 1
            self._failure = why
            self._unflushed.clear()

    def accept(self) -> None:
        """The device passed a probe: write again."""
        with self._mutex:
            self._failure = ""

    def read(self, spec: NamespaceSpec, jobs: Sequence[ReadJob]) -> list[ReadResult]:
        """Read blocks of one namespace and verify them; a result for each job.

        Raises:
            OSError: the device failed. Wrong bytes are a result, not an error.
        """
        digest = namespace_digest(spec)
        stride_bytes = PAGE_BYTES + len(jobs[0].memory)
        results: list[ReadResult] = []
        for segment, run in self._runs(jobs, of=lambda job: job.extent):
            pages = self._pages(len(run))
            buffers = [part for page, job in zip(pages, run, strict=True) for part in (page, job.memory)]
            with self._descriptors.borrowed(segment.header.segment_id) as descriptor, self._device:
                count = read_whole(self._files, descriptor, buffers, segment.offset(run[0].extent))
            for position, (page, job) in enumerate(zip(pages, run, strict=True)):
                is_whole = (position + 1) * stride_bytes <= count
                results.append(verify(spec, digest, page, job) if is_whole else ReadResult.ENDS_EARLY)
        return results

    def close(self) -> None:
        """Close all files."""
        self._descriptors.close()

    def _require(self, epoch: int) -> None:
        if self._failure or epoch != self.epoch:
            raise OSError(errno.EIO, f"a flush failed: {self._failure or 'what was written before is given up'}")

    def _prepare(self, segment: Segment, descriptor: int) -> None:
        """Put the segment's file and headers on disk, once."""
        with self._preparing:
            if segment.is_ready:
                return
            self._files.allocate(descriptor, segment.size_bytes)
            page = self._pages(1)[0]
            header = segment.header.to_page()
            for offset in (0, segment.size_bytes - PAGE_BYTES):
                page[:] = header
                self._files.write(descriptor, [page], offset)
            self._files.flush(descriptor)
            segment.is_ready = True

    def _runs(self, jobs: Sequence[Job], *, of: Callable[[Job], int]) -> Iterator[tuple[Segment, list[Job]]]:
        """Jobs whose extents are neighbours, in order, a bounded number together."""
        run = [jobs[0]]
        for before, job in pairwise(jobs):
            is_neighbour = of(job) == of(before) + 1 and segment_of(of(job)) == segment_of(of(before))
            if not is_neighbour or len(run) == _EXTENTS_PER_CALL:
                yield self._segment(of(run[0])), run
                run = []
            run.append(job)
        yield self._segment(of(run[0])), run

    def _segment(self, extent: int) -> Segment:
        segment = self._segments.get(extent)
        assert segment is not None, f"extent {extent} is in no segment"
        return segment

    def _pages(self, count: int) -> list[memoryview]:
        """This thread's page-aligned pages."""
        if not hasattr(self._local, "pages"):
            memory = memoryview(mmap.mmap(-1, _EXTENTS_PER_CALL * PAGE_BYTES))
            starts = range(0, len(memory), PAGE_BYTES)
            self._local.pages = [memory[start : start + PAGE_BYTES] for start in starts]
        pages: list[memoryview] = self._local.pages[:count]
        return pages


def read_whole(files: Files, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Fill the buffers, however short the single reads are; fewer bytes only where the file ends. Raises OSError."""
    wanted = sum(len(buffer) for buffer in buffers)
    done = 0
    for _ in range(_READ_ATTEMPTS):
        count = files.read(descriptor, after(buffers, done), offset + done)
        if done + count == wanted or offset + done + count >= files.size_bytes(descriptor):
            return done + count
        done += count - count % PAGE_BYTES
    raise OSError(errno.EIO, f"{_READ_ATTEMPTS} reads in a row were short")


def verify(spec: NamespaceSpec, digest: bytes, page: memoryview, job: ReadJob) -> ReadResult:
    """Whether the header page and the memory are that block, whole."""
    state, checksum = extent_header(page, digest, job.block_hash, spec.block_size_bytes)
    if state is not HeaderState.OWN:
        return ReadResult.HEADER_DAMAGED if state is HeaderState.DAMAGED else ReadResult.OTHER_BLOCK
    is_intact = checksum_of(job.memory[: spec.block_size_bytes]) == checksum
    return ReadResult.OK if is_intact else ReadResult.PAYLOAD_DAMAGED
