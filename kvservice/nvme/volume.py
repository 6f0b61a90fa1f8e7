"""One directory on one device: segments of extents, and the journal that says what is in them.

`reserve`, `release` and `usage` are for the event loop and never block; everything else blocks and is
for threads. Extents are reused in place: nothing is ever moved to make space.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Sequence

import numpy as np

from kvservice.blocks import NamespaceSpec
from kvservice.errors import CapacityExhausted, StartupError
from kvservice.nvme import directory as directories
from kvservice.nvme.extents import Extents
from kvservice.nvme.files import Files, RealFiles
from kvservice.nvme.format import (
    PAGE_BYTES,
    RECORD,
    RECORDS_PER_PAGE,
    RecordKind,
    extent_stride_bytes,
    namespace_digest,
)
from kvservice.nvme.journal import Journal
from kvservice.nvme.names import names_bytes, read_names, write_names
from kvservice.nvme.recollection import Recollection, find_segments, fitting, recollect
from kvservice.nvme.results import ReadJob, ReadResult, Recovered, SegmentUse, WriteJob
from kvservice.nvme.segments import Segments
from kvservice.tiers import TierUsage

_JOURNAL_SHARE = 16
_JOURNAL_BYTES_MIN = 4 * 1024 * 1024
_CAPACITY_BYTES_MIN = _JOURNAL_BYTES_MIN + 64 * 1024
_RECORD_BYTES_ON_DISK = 179  # page overhead included


class Volume:
    """See the module. Made by `open`.

    Of the capacity a sixteenth is the index's: half of that for a checkpoint and its successor, three
    eighths for logs, an eighth for the namespaces' names and a page to probe with. The rest is for segments.
    """

    def __init__(
        self, directory: str, *, capacity_bytes: int, segment_bytes: int, calls_at_once: int, files: Files, lock: int
    ) -> None:
        self.directory = directory
        self.capacity_bytes = capacity_bytes
        self._files = files
        self._lock_descriptor = lock
        self._journal_bytes = max(_JOURNAL_BYTES_MIN, capacity_bytes // _JOURNAL_SHARE)
        self.data_bytes = capacity_bytes - self._journal_bytes
        """Bound on all segments together."""
        self._segments = Segments(segment_bytes=segment_bytes, data_bytes=self.data_bytes)
        self._extents = Extents(directory, self._segments, files, calls_at_once=calls_at_once)
        self._specs: dict[bytes, NamespaceSpec] = {}
        self._named: set[bytes] = set()
        self._appending = threading.Lock()
        self.journal = Journal(directories.index_path(directory), files)

    @classmethod
    def open(
        cls,
        directory: str,
        *,
        capacity_bytes: int,
        segment_bytes: int,
        calls_at_once: int = 4,
        files: Files | None = None,
    ) -> Volume:
        """Lock and open a directory, making it if need be. Blocks.

        Args:
            capacity_bytes: bound on all files together; 0: half of what is free or ours already.
            calls_at_once: reads and writes that the device gets side by side.

        Raises:
            StartupError: another daemon has it, or it cannot be used.
        """
        lock = directories.lock(directory)
        try:
            return cls(
                directory,
                capacity_bytes=_usable(directories.capacity_bytes(directory, capacity_bytes)),
                segment_bytes=segment_bytes,
                calls_at_once=calls_at_once,
                files=files or RealFiles(),
                lock=lock,
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
        # A block has a record in the old checkpoint and in the new; so may a quarter as many sessions, and aliases.
        if (self._segments.live + count) * _RECORD_BYTES_ON_DISK * 6 // 4 > self._journal_bytes // 4:
            raise CapacityExhausted(f"{self._segments.live} blocks fill the index of {self.directory}")
        digest = namespace_digest(spec)
        if digest not in self._specs:
            self._require_room_for_name(spec)
        extents = self._segments.reserve(digest, extent_stride_bytes(spec.block_size_bytes), count)
        if len(extents) < count:
            raise CapacityExhausted(f"{count} blocks do not fit: {self.directory} may take {self.capacity_bytes} bytes")
        self._specs[digest] = spec
        return extents

    def release(self, extents: Iterable[int]) -> None:
        """These extents may be used again. Never blocks."""
        self._segments.release(extents)

    def usage(self) -> TierUsage:
        """Occupancy by blocks, their headers included."""
        return TierUsage(self.capacity_bytes, self._segments.live_bytes, "online")

    def segments_of(self, spec: NamespaceSpec) -> list[SegmentUse]:
        """The segments that the namespace owns. Never blocks."""
        return self._segments.uses(namespace_digest(spec))

    @property
    def written_bytes(self) -> int:
        """Bytes of extents written since the start."""
        return self._extents.written_bytes

    @property
    def epoch(self) -> int:
        """To be noted before writing, for `flush`."""
        return self._extents.epoch

    @property
    def needs_fold(self) -> bool:
        """Whether the log is long enough to be worth a checkpoint."""
        return self.journal.log_bytes > self._journal_bytes // 8

    # --------------------------------------------------------------------- I/O

    def write(self, spec: NamespaceSpec, jobs: Sequence[WriteJob]) -> None:
        """Write blocks; durable after `flush`. Blocks. Raises OSError."""
        self._extents.write(spec, jobs)

    def flush(self, epoch: int) -> None:
        """What was written since that epoch, and before this call, survives a loss of power. Blocks.

        Raises:
            OSError: it may not, and no later flush will make it: write it again, elsewhere or after a probe.
        """
        self._extents.flush(epoch)

    def append(self, records: np.ndarray) -> None:
        """Make journal records (dtype RECORD) durable; payloads first. Blocks. Raises OSError."""
        at_once = self._journal_bytes // 16 // _RECORD_BYTES_ON_DISK
        with self._appending:
            self._write_names()
            for start in range(0, len(records), at_once):
                piece = records[start : start + at_once]
                size_bytes = (len(piece) // RECORDS_PER_PAGE + 1) * PAGE_BYTES
                if self.journal.log_bytes + size_bytes > self._journal_bytes * 3 // 8:
                    self.journal.fold()  # the bound holds also where nobody folded in time
                self.journal.append(piece)

    def read(self, spec: NamespaceSpec, jobs: Sequence[ReadJob]) -> list[ReadResult]:
        """Read blocks and verify them. Blocks.

        Raises:
            OSError: the device failed. Wrong bytes are a result, not an error.
        """
        return self._extents.read(spec, jobs)

    def recover(self) -> Recovered:
        """What the journal remembers of the segments that there are; fills the books. Blocks: about 3 s a million.

        Raises:
            OSError.
        """
        names = read_names(self.directory)
        found = find_segments(self.directory, self._files)
        records, damaged = self.journal.read()
        kept = fitting(found, records, self.data_bytes)
        keeping = {segment.header.segment_id for segment in kept}
        for segment in found:
            if segment.header.segment_id not in keeping:
                self._files.remove(directories.segment_path(self.directory, segment.header.segment_id))
        remembered = recollect(names, kept, records, damaged)
        self._named = set(names)
        self._disown(remembered)
        self._segments.adopt(kept, remembered.recovered.extent)
        owners = self._segments.owners()
        self._specs = {digest: spec for digest, spec in names.items() if digest in owners}
        return remembered.recovered

    def probe(self) -> None:
        """Write, flush and read a page; then writing is possible again. Blocks.

        Raises:
            OSError: the device does not work.
        """
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
        self._extents.accept()

    def close(self) -> None:
        """Close all files and unlock. Blocks."""
        self.journal.close()
        self._extents.close()
        os.close(self._lock_descriptor)

    # --------------------------------------------------------------- privately

    def _disown(self, remembered: Recollection) -> None:
        """Records of what cannot be found must not come true when their extents have other blocks."""
        dropped = np.zeros(len(remembered.lost), dtype=RECORD)
        dropped["kind"], dropped["extent"] = RecordKind.DROPPED, remembered.lost
        self.append(dropped)
        if self.journal.size_bytes > self._journal_bytes // 2:
            self.journal.fold()

    def _require_room_for_name(self, spec: NamespaceSpec) -> None:
        bound_bytes = self._journal_bytes // 8
        if names_bytes([*self._specs.values(), spec]) > bound_bytes:
            owners = self._segments.owners()
            self._specs = {digest: of for digest, of in self._specs.items() if digest in owners}
        if names_bytes([*self._specs.values(), spec]) > bound_bytes:
            raise CapacityExhausted(f"{len(self._specs)} namespaces fill the index of {self.directory}")

    def _write_names(self) -> None:
        """Durable names of the namespaces, before the first record that refers to one."""
        specs = dict(self._specs)
        if not specs.keys() <= self._named:
            write_names(self._files, self.directory, specs.values())
            self._named = set(specs)


def _usable(capacity_bytes: int) -> int:
    if capacity_bytes < _CAPACITY_BYTES_MIN:
        raise OSError(errno.ENOSPC, f"{capacity_bytes} bytes may be taken, {_CAPACITY_BYTES_MIN} are needed")
    return capacity_bytes
