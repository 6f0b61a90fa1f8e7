"""One directory on one device: segments of extents, and the journal that says what is in them.

Bookkeeping (`reserve`, `release`, `usage`) is for the event loop and never blocks; everything else
blocks and is for threads. Extents are reused in place: nothing is ever moved to make space.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from kvservice.blocks import BlockHash, NamespaceSpec
from kvservice.checksums import checksum_of
from kvservice.errors import CapacityExhausted, StartupError
from kvservice.nvme.files import Files, RealFiles
from kvservice.nvme.format import (
    PAGE_BYTES,
    RecordKind,
    SegmentHeader,
    extent_checksum,
    extent_stride_bytes,
    leading_bytes,
    namespace_digest,
    pack_extent_header,
)
from kvservice.nvme.journal import Journal
from kvservice.nvme.names import read_names, write_names
from kvservice.nvme.results import ReadResult, Recovered, SegmentUse
from kvservice.tiers import TierUsage

PLACE_BITS = 24
"""An extent's number is its segment's, shifted by so many bits, and its place there."""

_FREE_SHARE_KEPT = 10  # the last tenth of a file system is never taken
_JOURNAL_SHARE = 16  # one part in so many of the capacity is for log and checkpoints
_JOURNAL_BYTES_MIN = 4 * 1024 * 1024
_RECORD_BYTES_ON_DISK = 2 * 180  # a record in the old checkpoint and in the new, page overhead included


@dataclass(slots=True)
class _Segment:
    """Books of one segment file; `is_ready`: its header on disk says what these say."""

    header: SegmentHeader
    descriptor: int = -1
    is_ready: bool = False
    free: list[int] = field(default_factory=list)

    def offset(self, extent: int) -> int:
        return PAGE_BYTES + (extent & (1 << PLACE_BITS) - 1) * self.header.stride_bytes


class Volume:
    """See the module. Made by `open`."""

    def __init__(self, directory: str, *, capacity_bytes: int, segment_bytes: int, files: Files, lock: int) -> None:
        self.directory = directory
        self.capacity_bytes = capacity_bytes
        self.written_bytes = 0
        self._segment_bytes = segment_bytes
        self._files = files
        self._lock_descriptor = lock
        self._journal_bytes = max(_JOURNAL_BYTES_MIN, capacity_bytes // _JOURNAL_SHARE)
        self._segments: dict[int, _Segment] = {}
        self._specs: dict[bytes, NamespaceSpec] = {}
        self._named: set[bytes] = set()
        self._live = 0
        self._unflushed: set[int] = set()
        self._mutex = threading.Lock()
        self._flushing = threading.Lock()
        self._local = threading.local()
        os.makedirs(os.path.join(directory, "segments"), mode=0o700, exist_ok=True)
        self.journal = Journal(os.path.join(directory, "index"), files)

    @classmethod
    def open(cls, directory: str, *, capacity_bytes: int, segment_bytes: int, files: Files | None = None) -> Volume:
        """Lock and open a directory, making it if need be. Blocks.

        Args:
            capacity_bytes: bound on all files together; 0: half of what is free or ours already.

        Raises:
            StartupError: another daemon has it, or it cannot be used.
        """
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            lock = os.open(os.path.join(directory, "LOCK"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartupError(f"cannot use nvme directory {directory}: {error.strerror}; choose another") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise StartupError(f"another process uses {directory}; stop it or choose another nvme directory") from None
        try:
            capacity = _capacity_bytes(directory, capacity_bytes)
            return cls(
                directory, capacity_bytes=capacity, segment_bytes=segment_bytes, files=files or RealFiles(), lock=lock
            )
        except OSError as error:
            os.close(lock)
            raise StartupError(f"cannot use nvme directory {directory}: {error}; choose another") from error

    # ------------------------------------------------------------------- books

    def reserve(self, spec: NamespaceSpec, count: int) -> list[int]:
        """Extents for `count` blocks of the namespace, all or none. Never blocks.

        Raises:
            CapacityExhausted: the volume's bound leaves no room.
        """
        digest = namespace_digest(spec)
        if (self._live + count) * _RECORD_BYTES_ON_DISK > self._journal_bytes // 2:
            raise CapacityExhausted(f"{self._live} blocks fill the index of {self.directory}")
        with self._mutex:
            missing = count - sum(len(segment.free) for segment in self._of(digest))
            added = self._add_segments(spec, digest, missing)
            if added < missing:
                raise CapacityExhausted(
                    f"{count} blocks do not fit: {self.directory} may take {self.capacity_bytes} bytes"
                )
            taken: list[int] = []
            for segment in self._of(digest):
                some = segment.free[: count - len(taken)]
                del segment.free[: len(some)]
                taken += [segment.header.segment_id << PLACE_BITS | place for place in some]
                if len(taken) == count:
                    break
            self._live += count
            self._specs.setdefault(digest, spec)
        return taken

    def release(self, extents: Iterable[int]) -> None:
        """These extents may be used again. Never blocks."""
        with self._mutex:
            for extent in extents:
                self._segments[extent >> PLACE_BITS].free.append(extent & (1 << PLACE_BITS) - 1)
                self._live -= 1

    def usage(self) -> TierUsage:
        """Occupancy: blocks' extents and the journal's share."""
        with self._mutex:
            used = sum(
                (segment.header.extents - len(segment.free)) * segment.header.stride_bytes
                for segment in self._segments.values()
            )
        return TierUsage(self.capacity_bytes, used, "online")

    @property
    def data_bytes(self) -> int:
        """Bound on all segments together."""
        return self.capacity_bytes - self._journal_bytes

    def segments_of(self, spec: NamespaceSpec) -> list[SegmentUse]:
        """The segments that the namespace owns. Never blocks."""
        with self._mutex:
            return [
                SegmentUse(
                    segment_id=segment.header.segment_id,
                    size_bytes=self._file_bytes(segment),
                    stride_bytes=segment.header.stride_bytes,
                    extents_in_use=segment.header.extents - len(segment.free),
                )
                for segment in self._of(namespace_digest(spec))
            ]

    @property
    def needs_fold(self) -> bool:
        """Whether the log is long enough to be worth a checkpoint."""
        return self.journal.log_bytes > self._journal_bytes // 6

    # --------------------------------------------------------------------- I/O

    def write(self, extent: int, spec: NamespaceSpec, block_hash: BlockHash, memory: memoryview, checksum: int) -> None:
        """Write a block; durable after `flush`. Blocks.

        Args:
            memory: the block, padded to whole pages, in page-aligned memory.
            checksum: of its first block_size_bytes.

        Raises:
            OSError.
        """
        segment = self._ready_segment(extent)
        page = self._page()
        pack_extent_header(page, namespace_digest(spec), block_hash, spec.block_size_bytes, checksum)
        self._files.write(segment.descriptor, [page, memory], segment.offset(extent))
        with self._mutex:
            self._unflushed.add(segment.header.segment_id)
            self.written_bytes += PAGE_BYTES + len(memory)

    def flush(self) -> None:
        """What was written before this call survives a loss of power when it returns. Raises OSError."""
        with self._flushing:  # who comes second waits: a flush under way may be of its blocks
            while self._unflushed:
                with self._mutex:
                    segment_id = self._unflushed.pop()
                try:
                    self._files.flush(self._segments[segment_id].descriptor)
                except OSError:
                    self._unflushed.add(segment_id)
                    raise

    def append(self, records: np.ndarray) -> None:
        """Make journal records (dtype RECORD) durable; payloads first. Raises OSError."""
        self._write_namespaces()
        if self.journal.log_bytes + records.nbytes > self._journal_bytes // 2:
            self.journal.fold()  # the bound holds also where nobody folded in time
        self.journal.append(records)

    def read(self, extent: int, spec: NamespaceSpec, block_hash: BlockHash, memory: memoryview) -> ReadResult:
        """Read a block into page-aligned memory (padded to whole pages) and verify it. Blocks.

        Raises:
            OSError: the device failed. Wrong bytes are a result, not an error.
        """
        segment = self._segments.get(extent >> PLACE_BITS)
        if segment is None:
            return ReadResult.CORRUPT
        self._open(segment)
        page = self._page()
        count = self._files.read(segment.descriptor, [page, memory], segment.offset(extent))
        if count != PAGE_BYTES + len(memory):
            return ReadResult.CORRUPT
        checksum = extent_checksum(page, namespace_digest(spec), block_hash, spec.block_size_bytes)
        if checksum is None or checksum_of(memory[: spec.block_size_bytes]) != checksum:
            return ReadResult.CORRUPT
        return ReadResult.OK

    def recover(self) -> Recovered:
        """What the journal remembers of intact segments; fills the books. Blocks: about 3 s a million blocks."""
        self._specs = read_names(self.directory)
        self._find_segments()
        records, damaged = self.journal.read()
        specs = list(self._specs.values())
        by_short = {int.from_bytes(digest[:4], "little"): at for at, digest in enumerate(self._specs)}
        stored = records[records["kind"] == RecordKind.STORED]
        namespace_index = np.array([by_short.get(short, -1) for short in stored["namespace"].tolist()], dtype=np.int32)
        stored, namespace_index = self._plausible(stored, namespace_index)
        self._mark_live(stored["extent"])
        hashes = leading_bytes(stored["hash"], stored["hash_size"])
        parents = leading_bytes(stored["parent"], stored["hash_size"] * (stored["has_parent"] > 0))
        ends = records[records["kind"] == RecordKind.SESSION]
        sessions = [
            (by_short[short], digest, extent)
            for short, digest, extent in zip(
                ends["namespace"].tolist(),
                leading_bytes(ends["hash"], ends["hash_size"]),
                ends["extent"].tolist(),
                strict=True,
            )
            if short in by_short
        ]
        return Recovered(
            namespaces=specs,
            namespace_index=namespace_index,
            hashes=hashes,
            parent_hashes=parents,
            depth=stored["depth"].astype(np.int64),
            extent=stored["extent"].copy(),
            checksum=stored["checksum"].copy(),
            uses=stored["uses"].copy(),
            last_used_s=stored["last_used_s"].copy(),
            sessions=sessions,
            damaged_pages=damaged,
        )

    def probe(self) -> None:
        """Write, flush and read a page. Raises OSError: the device does not work."""
        path = os.path.join(self.directory, "probe")
        descriptor, pattern = self._files.open(path, direct=False, create=True), b"\x5a" * PAGE_BYTES
        try:
            self._files.write(descriptor, [pattern], 0)
            self._files.flush(descriptor)
            page = memoryview(bytearray(PAGE_BYTES))
            if self._files.read(descriptor, [page], 0) != PAGE_BYTES or page != pattern:
                raise OSError("the probe reads something else than was written")
        finally:
            self._files.close(descriptor)
            self._files.remove(path)

    def close(self) -> None:
        """Close all files and unlock."""
        self.journal.close()
        for segment in self._segments.values():
            if segment.descriptor >= 0:
                self._files.close(segment.descriptor)
        os.close(self._lock_descriptor)

    # --------------------------------------------------------------- privately

    def _of(self, digest: bytes) -> list[_Segment]:
        return [segment for segment in self._segments.values() if segment.header.digest == digest]

    def _add_segments(self, spec: NamespaceSpec, digest: bytes, missing: int) -> int:
        """Add segments until `missing` more extents are free; how many were added."""
        stride = extent_stride_bytes(spec.block_size_bytes)
        wanted = max(1, (self._segment_bytes - PAGE_BYTES) // stride)
        added = 0
        while added < missing:
            segment = self._idle_segment(digest, stride) or self._new_segment(stride, wanted)
            if segment is None:
                break
            extents = min(wanted, (self._file_bytes(segment) - PAGE_BYTES) // stride)
            segment.header = SegmentHeader(segment.header.segment_id, digest, stride, extents)
            segment.is_ready = False
            segment.free = list(range(extents))
            added += extents
        return added

    def _idle_segment(self, digest: bytes, stride: int) -> _Segment | None:
        """A segment of another namespace without a block, large enough for one extent."""
        for segment in self._segments.values():
            is_idle = segment.header.digest != digest and len(segment.free) == segment.header.extents
            if is_idle and self._file_bytes(segment) >= PAGE_BYTES + stride:
                return segment
        return None

    def _new_segment(self, stride: int, wanted: int) -> _Segment | None:
        taken = sum(self._file_bytes(segment) for segment in self._segments.values())
        extents = min(wanted, (self.capacity_bytes - self._journal_bytes - taken - PAGE_BYTES) // stride)
        if extents < 1:
            return None
        segment_id = max(self._segments, default=0) + 1
        segment = _Segment(SegmentHeader(segment_id, b"", stride, extents))
        self._segments[segment_id] = segment
        return segment

    def _file_bytes(self, segment: _Segment) -> int:
        return PAGE_BYTES + segment.header.stride_bytes * segment.header.extents

    def _ready_segment(self, extent: int) -> _Segment:
        """The extent's segment, with its file and header on disk."""
        segment = self._segments[extent >> PLACE_BITS]
        self._open(segment)
        if not segment.is_ready:
            with self._mutex:
                if not segment.is_ready:
                    self._files.allocate(segment.descriptor, self._file_bytes(segment))
                    page = self._page()
                    page[:] = segment.header.to_page()
                    self._files.write(segment.descriptor, [page], 0)
                    self._files.flush(segment.descriptor)
                    segment.is_ready = True
        return segment

    def _open(self, segment: _Segment) -> None:
        if segment.descriptor < 0:
            with self._mutex:
                if segment.descriptor < 0:
                    path = os.path.join(self.directory, "segments", f"{segment.header.segment_id:08}.kv")
                    segment.descriptor = self._files.open(path, direct=True, create=True)

    def _page(self) -> memoryview:
        """This thread's page-aligned page."""
        if not hasattr(self._local, "page"):
            self._local.page = memoryview(mmap.mmap(-1, PAGE_BYTES))
        page: memoryview = self._local.page
        return page

    def _find_segments(self) -> None:
        folder = os.path.join(self.directory, "segments")
        for name in sorted(os.listdir(folder)):
            path = os.path.join(folder, name)
            descriptor = self._files.open(path, direct=True, create=False)
            page = self._page()
            count = self._files.read(descriptor, [page], 0)
            header = SegmentHeader.from_page(bytes(page)) if count == PAGE_BYTES else None
            if header is None or f"{header.segment_id:08}.kv" != name or header.digest not in self._specs:
                # Nothing in it can be trusted or found: give the space back.
                self._files.close(descriptor)
                self._files.remove(path)
                continue
            self._segments[header.segment_id] = _Segment(
                header, descriptor, is_ready=True, free=list(range(header.extents))
            )

    def _plausible(self, stored: np.ndarray, namespace_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Without records of extents that no longer exist or belong to another namespace now."""
        digests, keep = list(self._specs), []
        owner = {segment_id: segment.header for segment_id, segment in self._segments.items()}
        for extent, of, size in zip(
            stored["extent"].tolist(), namespace_index.tolist(), stored["hash_size"].tolist(), strict=True
        ):
            header = owner.get(extent >> PLACE_BITS)
            keep.append(
                header is not None
                and of >= 0
                and header.digest == digests[of]
                and extent & (1 << PLACE_BITS) - 1 < header.extents
                and size == self._specs[digests[of]].hash_size_bytes
            )
        mask = np.array(keep, dtype=bool)
        return stored[mask], namespace_index[mask]

    def _mark_live(self, extents: np.ndarray) -> None:
        for segment_id in np.unique(extents >> PLACE_BITS).tolist():
            segment = self._segments[segment_id]
            is_free = np.ones(segment.header.extents, dtype=bool)
            is_free[extents[extents >> PLACE_BITS == segment_id] & (1 << PLACE_BITS) - 1] = False
            segment.free = np.flatnonzero(is_free).tolist()
        self._live = len(extents)

    def _write_namespaces(self) -> None:
        """Durable names of the namespaces, before the first record that refers to one."""
        with self._mutex:
            specs = dict(self._specs)
        if self._named != specs.keys():
            write_names(self._files, self.directory, specs.values())
            self._named = set(specs)


def _capacity_bytes(directory: str, asked_bytes: int) -> int:
    status = os.statvfs(directory)
    ours = sum(
        os.stat(os.path.join(folder, name)).st_blocks * 512 for folder, _, names in os.walk(directory) for name in names
    )
    free = status.f_bavail * status.f_frsize + ours
    most = max(0, free - status.f_blocks * status.f_frsize // _FREE_SHARE_KEPT)
    return min(asked_bytes or free // 2, most)
