"""Making sense of what is on disk: segments by their headers, records by what they refer to. Reads only; blocks."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvservice.blocks import NamespaceSpec
from kvservice.nvme.directory import segment_ids, segment_path
from kvservice.nvme.files import Files
from kvservice.nvme.format import PAGE_BYTES, RecordKind, SegmentHeader, leading_bytes, short_digest
from kvservice.nvme.results import Recovered, RecoveredAlias
from kvservice.nvme.segments import Segment, file_bytes, place_of, segment_of


@dataclass(frozen=True, slots=True)
class Recollection:
    """What the records say, and the extents of those that refer to nothing."""

    recovered: Recovered
    lost: list[int]


def find_segments(directory: str, files: Files) -> list[Segment]:
    """Every segment file with what its headers say; without an intact one it has no owner. Raises OSError."""
    found = []
    page = memoryview(mmap.mmap(-1, PAGE_BYTES))
    for segment_id in segment_ids(directory):
        descriptor = files.open(segment_path(directory, segment_id), direct=True, create=False)
        try:
            size_bytes = files.size_bytes(descriptor) // PAGE_BYTES * PAGE_BYTES
            headers = [
                header
                for offset in (0, size_bytes - PAGE_BYTES)
                if offset >= 0
                and files.read(descriptor, [page], offset) == PAGE_BYTES
                and (header := SegmentHeader.from_page(bytes(page))) is not None
                and header.segment_id == segment_id
            ]
        finally:
            files.close(descriptor)
        blank = SegmentHeader(segment_id, b"", PAGE_BYTES, 0, 0)
        header = max(headers, key=lambda header: header.generation, default=blank)
        # A file that was cut short is made as long again before it is written to.
        size_bytes = max(size_bytes, file_bytes(header.stride_bytes, header.extents))
        found.append(Segment(header, size_bytes, is_ready=headers == [header, header]))
    return found


def fitting(found: Sequence[Segment], records: np.ndarray, data_bytes: int) -> list[Segment]:
    """The segments that may stay where the volume's bound has become smaller: those used last."""
    last_used_s: dict[int, float] = {}
    is_stored = records["kind"] == RecordKind.STORED
    numbers, which = np.unique(segment_of(records["extent"][is_stored]), return_inverse=True)
    latest = np.zeros(len(numbers))
    np.maximum.at(latest, which, records["last_used_s"][is_stored])
    last_used_s.update(zip(numbers.tolist(), latest.tolist(), strict=True))
    kept, taken_bytes = [], 0
    for segment in sorted(found, key=lambda of: last_used_s.get(of.header.segment_id, 0.0), reverse=True):
        if taken_bytes + segment.size_bytes <= data_bytes:
            taken_bytes += segment.size_bytes
            kept.append(segment)
    return sorted(kept, key=lambda segment: segment.header.segment_id)


def recollect(
    names: Mapping[bytes, NamespaceSpec], segments: Sequence[Segment], records: np.ndarray, damaged_pages: int
) -> Recollection:
    """What the live records say of the segments that there are."""
    digests, specs = list(names), list(names.values())
    by_short = {short_digest(digest): at for at, digest in enumerate(digests)}
    stored = _chosen(records, records["kind"] == RecordKind.STORED)
    namespace_index = _positions(by_short, stored["namespace"])
    is_there = _plausible(specs, digests, segments, stored, namespace_index)
    lost = stored["extent"][~is_there].tolist()
    stored, namespace_index = _chosen(stored, is_there), namespace_index[is_there]
    ends = records[records["kind"] == RecordKind.SESSION]
    sessions = [
        (at, session, extent)
        for at, session, extent in zip(
            _positions(by_short, ends["namespace"]).tolist(),
            leading_bytes(ends["hash"], ends["hash_size"]),
            ends["extent"].tolist(),
            strict=True,
        )
        if at >= 0
    ]
    recovered = Recovered(
        namespaces=specs,
        namespace_index=namespace_index,
        hashes=leading_bytes(stored["hash"], stored["hash_size"]),
        parent_hashes=leading_bytes(stored["parent"], stored["hash_size"] * (stored["has_parent"] > 0)),
        depth=stored["depth"].astype(np.int64),
        extent=stored["extent"].copy(),
        checksum=stored["checksum"].copy(),
        uses=stored["uses"].copy(),
        last_used_s=stored["last_used_s"].copy(),
        sessions=sessions,
        aliases=_aliases(by_short, records[records["kind"] == RecordKind.ALIASED]),
        damaged_pages=damaged_pages,
        lost_blocks=len(lost),
    )
    return Recollection(recovered, lost)


def _aliases(by_short: Mapping[int, int], records: np.ndarray) -> list[RecoveredAlias]:
    return [
        RecoveredAlias(at, block_hash, parent, depth, extent, source_depth, owner)
        for at, block_hash, parent, depth, extent, source_depth, owner in zip(
            _positions(by_short, records["namespace"]).tolist(),
            leading_bytes(records["hash"], records["hash_size"]),
            leading_bytes(records["parent"], records["hash_size"] * (records["has_parent"] > 0)),
            records["depth"].tolist(),
            records["extent"].tolist(),
            records["uses"].tolist(),
            records["checksum"].tolist(),
            strict=True,
        )
        if at >= 0
    ]


def _chosen(records: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Those of the mask; nearly always all, which need no copy."""
    return records if mask.all() else records[mask]


def _positions(by_short: Mapping[int, int], column: np.ndarray) -> np.ndarray:
    """Positions of the namespaces that a column names; -1: unknown."""
    distinct, which = np.unique(column, return_inverse=True)
    positions: np.ndarray = np.array([by_short.get(short, -1) for short in distinct.tolist()], dtype=np.int32)[which]
    return positions


def _plausible(
    specs: Sequence[NamespaceSpec],
    digests: Sequence[bytes],
    segments: Sequence[Segment],
    stored: np.ndarray,
    namespace_index: np.ndarray,
) -> np.ndarray:
    """Which records are of extents that there are and that belong to their namespace, as a mask."""
    numbers = np.array([segment.header.segment_id for segment in segments], dtype=np.int64)
    owner_of = {digest: at for at, digest in enumerate(digests)}
    owners = np.array([owner_of.get(segment.header.digest, -2) for segment in segments], dtype=np.int64)
    extents = np.array([segment.header.extents for segment in segments], dtype=np.int64)
    hash_sizes = np.array([spec.hash_size_bytes for spec in specs], dtype=np.int64)
    if not len(segments) or not len(specs):
        return np.zeros(len(stored), dtype=bool)
    number = segment_of(stored["extent"])
    at = np.minimum(np.searchsorted(numbers, number), len(numbers) - 1)
    is_there: np.ndarray = (
        (numbers[at] == number)
        & (owners[at] == namespace_index)
        & (place_of(stored["extent"]) < extents[at])
        & (hash_sizes[namespace_index] == stored["hash_size"])
    )
    return is_there
