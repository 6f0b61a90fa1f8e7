"""The books of a volume: which extents are free, and whose each segment is. Never blocks; safe from any thread.

An extent's number is its segment's number and its place in it. A segment belongs to one namespace at
a time; one without a block goes to whoever needs it, at its size, divided anew.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from kvservice.nvme.format import PAGE_BYTES, SegmentHeader
from kvservice.nvme.results import SegmentUse

PLACE_BITS = 24
"""An extent's number is its segment's, shifted by so many bits, and its place there."""

_PLACE_MASK = (1 << PLACE_BITS) - 1
_HEADER_PAGES = 2

Number = TypeVar("Number", int, np.ndarray)


def segment_of(extent: Number) -> Number:
    """The number of the extent's segment; of each, for an array."""
    return extent >> PLACE_BITS


def place_of(extent: Number) -> Number:
    """The extent's place in its segment; of each, for an array."""
    return extent & _PLACE_MASK


@dataclass(slots=True, eq=False)
class Segment:
    """One segment file; `is_ready`: its file is as long and has the header that these books say."""

    header: SegmentHeader
    size_bytes: int
    is_ready: bool
    free: list[int] = field(default_factory=list)
    is_sorted: bool = True

    @property
    def is_idle(self) -> bool:
        """Whether it has no block."""
        return len(self.free) == self.header.extents

    def offset(self, extent: int) -> int:
        """Where the extent begins in the file."""
        return PAGE_BYTES + place_of(extent) * self.header.stride_bytes


def extents_in(size_bytes: int, stride_bytes: int) -> int:
    """How many extents a file of that size has beside its two headers."""
    return min(_PLACE_MASK + 1, max(0, size_bytes - _HEADER_PAGES * PAGE_BYTES) // stride_bytes)


def file_bytes(stride_bytes: int, extents: int) -> int:
    """The size of a file with so many extents."""
    return _HEADER_PAGES * PAGE_BYTES + extents * stride_bytes


class Segments:
    """All segments of a volume."""

    def __init__(self, *, segment_bytes: int, data_bytes: int) -> None:
        """Args:
        segment_bytes: size of a new segment's file; smaller where less is left, larger for larger blocks.
        data_bytes: bound on the files' sizes together.
        """
        self._segment_bytes = segment_bytes
        self._data_bytes = data_bytes
        self._mutex = threading.Lock()
        self._segments: dict[int, Segment] = {}
        self._owned: defaultdict[bytes, dict[int, Segment]] = defaultdict(dict)
        self._open: defaultdict[bytes, dict[int, Segment]] = defaultdict(dict)  # by owner, those with free extents
        self._free: defaultdict[bytes, int] = defaultdict(int)
        self._taken_bytes = 0
        self.live = 0
        self.live_bytes = 0

    def __iter__(self) -> Iterator[Segment]:
        return iter(list(self._segments.values()))

    def get(self, extent: int) -> Segment | None:
        """The extent's segment; None: there is none."""
        return self._segments.get(segment_of(extent))

    def reserve(self, digest: bytes, stride_bytes: int, count: int) -> list[int]:
        """So many free extents of the namespace, neighbours where possible; none if there is no room for all."""
        with self._mutex:
            while self._free[digest] < count:
                if not self._idle_to(digest, stride_bytes) and not self._grow(digest, stride_bytes):
                    return []
            taken: list[int] = []
            for segment in list(self._open[digest].values()):
                taken += self._take(segment, count - len(taken))
                if len(taken) == count:
                    break
            return taken

    def release(self, extents: Iterable[int]) -> None:
        """These extents may be used again."""
        with self._mutex:
            for extent in extents:
                segment = self._segments[segment_of(extent)]
                segment.free.append(place_of(extent))
                segment.is_sorted = False
                assert len(segment.free) <= segment.header.extents, "an extent was released twice"
                self._open[segment.header.digest][segment.header.segment_id] = segment
                self._free[segment.header.digest] += 1
                self.live -= 1
                self.live_bytes -= segment.header.stride_bytes

    def adopt(self, found: Sequence[Segment], live: np.ndarray) -> None:
        """Take over segments that are on disk.

        Args:
            live: extents that hold blocks, int64, each in one of the segments.
        """
        order = np.sort(live)
        numbers = order >> PLACE_BITS
        with self._mutex:
            for segment in found:
                header = segment.header
                first, last = np.searchsorted(numbers, [header.segment_id, header.segment_id + 1])
                is_free = np.ones(header.extents, dtype=bool)
                is_free[order[first:last] & _PLACE_MASK] = False
                segment.free = np.flatnonzero(is_free).tolist()
                self._add(segment)
                used = header.extents - len(segment.free)
                self.live += used
                self.live_bytes += used * header.stride_bytes

    def uses(self, digest: bytes) -> list[SegmentUse]:
        """The segments that the namespace owns."""
        with self._mutex:
            return [
                SegmentUse(
                    segment_id=number,
                    size_bytes=segment.size_bytes,
                    stride_bytes=segment.header.stride_bytes,
                    extents_in_use=segment.header.extents - len(segment.free),
                )
                for number, segment in self._owned[digest].items()
            ]

    def owners(self) -> set[bytes]:
        """Digests of the namespaces that have blocks."""
        with self._mutex:
            return {segment.header.digest for segment in self._segments.values() if not segment.is_idle}

    def _take(self, segment: Segment, count: int) -> list[int]:
        if not segment.is_sorted:
            segment.free.sort()  # neighbours are read and written together
            segment.is_sorted = True
        places = segment.free[:count]
        del segment.free[: len(places)]
        header = segment.header
        if not segment.free:
            del self._open[header.digest][header.segment_id]
        self._free[header.digest] -= len(places)
        self.live += len(places)
        self.live_bytes += len(places) * header.stride_bytes
        return [header.segment_id << PLACE_BITS | place for place in places]

    def _idle_to(self, digest: bytes, stride_bytes: int) -> bool:
        """Give the namespace another's segment that has no block and room for one; whether there was one."""
        for owner, segments in self._open.items():
            for segment in segments.values():
                extents = extents_in(segment.size_bytes, stride_bytes)
                if owner != digest and segment.is_idle and extents:
                    self._remove(segment)
                    header, number = segment.header, segment.header.segment_id
                    segment.header = SegmentHeader(number, digest, stride_bytes, extents, header.generation + 1)
                    segment.is_ready, segment.is_sorted = False, True
                    segment.free = list(range(extents))
                    self._add(segment)
                    return True
        return False

    def _grow(self, digest: bytes, stride_bytes: int) -> bool:
        """Add a segment for the namespace; whether the bound has room for one."""
        wanted_bytes = max(self._segment_bytes, file_bytes(stride_bytes, 1))
        size_bytes = min(wanted_bytes, self._data_bytes - self._taken_bytes)
        extents = extents_in(size_bytes, stride_bytes)
        if not extents:
            return False
        number = max(self._segments, default=0) + 1
        size_bytes = file_bytes(stride_bytes, extents)
        header = SegmentHeader(number, digest, stride_bytes, extents, 1)
        self._add(Segment(header, size_bytes, is_ready=False, free=list(range(extents))))
        return True

    def _add(self, segment: Segment) -> None:
        header = segment.header
        self._segments[header.segment_id] = self._owned[header.digest][header.segment_id] = segment
        self._taken_bytes += segment.size_bytes
        self._free[header.digest] += len(segment.free)
        if segment.free or not header.extents:
            self._open[header.digest][header.segment_id] = segment

    def _remove(self, segment: Segment) -> None:
        header = segment.header
        for books in (self._segments, self._owned[header.digest], self._open[header.digest]):
            del books[header.segment_id]
        self._taken_bytes -= segment.size_bytes
        self._free[header.digest] -= len(segment.free)
