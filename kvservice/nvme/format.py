"""What is on disk: extent headers, segment headers, journal pages. Little-endian, fixed sizes, every page checksummed.

Reading is total: any bytes at all decode to something valid or to None, never to an exception.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import xxhash

from kvservice.blocks import BlockHash, NamespaceSpec

PAGE_BYTES = 4096
VERSION = 1
HASH_BYTES_MAX = 64

# magic, version, hash length, namespace digest, hash, payload length, payload checksum, header checksum
_EXTENT = struct.Struct("<8sHH32s64sQQQ")
_EXTENT_MAGIC = b"KVEXTENT"
# magic, version, padding, segment id, namespace digest, stride, extents, checksum
_SEGMENT = struct.Struct("<8sHHI32sQQQ")
_SEGMENT_MAGIC = b"KVSEGMNT"
# magic, version, records, sequence number, checksum
_PAGE = struct.Struct("<8sHHIQ8x")
_PAGE_MAGIC = b"KVINDEXP"


class RecordKind(IntEnum):
    """What a journal record says. A later record about the same extent counts."""

    NONE = 0
    STORED = 1  # the block is in the extent
    DROPPED = 2  # the extent's block is gone for good
    TOUCHED = 3  # the block was used then; so were all blocks before it
    SESSION = 4  # `hash` is a session's digest; it ends at the extent's block


RECORD = np.dtype(
    [
        ("kind", "u1"),
        ("hash_size", "u1"),
        ("has_parent", "u1"),
        ("pad", "u1"),
        ("depth", "<u4"),
        ("uses", "<u4"),
        ("namespace", "<u4"),
        ("extent", "<i8"),
        ("checksum", "<u8"),
        ("last_used_s", "<f8"),
        ("hash", f"V{HASH_BYTES_MAX}"),
        ("parent", f"V{HASH_BYTES_MAX}"),
    ]
)
"""One journal record. `namespace` is the first four bytes of the digest; times are wall-clock seconds."""

RECORDS_PER_PAGE = (PAGE_BYTES - _PAGE.size) // RECORD.itemsize


def namespace_digest(spec: NamespaceSpec) -> bytes:
    """32 bytes that name a namespace and its geometry."""
    tenant = spec.key.tenant.encode()
    sizes = struct.pack("<QIIII", spec.block_size_bytes, spec.tokens_per_block, spec.hash_size_bytes, len(tenant), 0)
    return hashlib.sha256(sizes + tenant + spec.key.fingerprint).digest()


def extent_stride_bytes(block_size_bytes: int) -> int:
    """Bytes of disk per block: a header page, and the payload in whole pages."""
    return PAGE_BYTES + -(-block_size_bytes // PAGE_BYTES) * PAGE_BYTES


def pack_extent_header(page: memoryview, digest: bytes, block_hash: BlockHash, size_bytes: int, checksum: int) -> None:
    """Fill a page with the header of an extent."""
    fields = (_EXTENT_MAGIC, VERSION, len(block_hash), digest, block_hash, size_bytes, checksum)
    page[:] = bytes(PAGE_BYTES)
    _EXTENT.pack_into(page, 0, *fields, 0)
    _EXTENT.pack_into(page, 0, *fields, xxhash.xxh3_64_intdigest(page))


def extent_checksum(page: memoryview, digest: bytes, block_hash: BlockHash, size_bytes: int) -> int | None:
    """The payload's checksum if the page is the header of exactly that block, else None."""
    magic, version, hash_size, of, found, size, checksum, own = _EXTENT.unpack_from(page)
    expected = (_EXTENT_MAGIC, VERSION, len(block_hash), digest, block_hash, size_bytes)
    if (magic, version, hash_size, of, found[: len(block_hash)], size) != expected:
        return None
    blank = bytearray(page)
    _EXTENT.pack_into(blank, 0, magic, version, hash_size, of, found, size, checksum, 0)
    return int(checksum) if xxhash.xxh3_64_intdigest(blank) == own else None


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """A segment file's first page: whose it is, and how it is divided."""

    segment_id: int
    digest: bytes
    stride_bytes: int
    extents: int

    def to_page(self) -> bytes:
        """As on disk."""
        fields = (_SEGMENT_MAGIC, VERSION, 0, self.segment_id, self.digest, self.stride_bytes, self.extents)
        page = bytearray(PAGE_BYTES)
        _SEGMENT.pack_into(page, 0, *fields, 0)
        _SEGMENT.pack_into(page, 0, *fields, xxhash.xxh3_64_intdigest(page))
        return bytes(page)

    @classmethod
    def from_page(cls, page: bytes) -> SegmentHeader | None:
        """None: it is no intact segment header."""
        if len(page) != PAGE_BYTES:
            return None
        magic, version, pad, segment_id, digest, stride, extents, own = _SEGMENT.unpack_from(page)
        blank = bytearray(page)
        _SEGMENT.pack_into(blank, 0, magic, version, pad, segment_id, digest, stride, extents, 0)
        if (magic, version) != (_SEGMENT_MAGIC, VERSION) or xxhash.xxh3_64_intdigest(blank) != own:
            return None
        return cls(segment_id, digest, stride, extents)


def pack_pages(records: np.ndarray, first_sequence: int) -> bytes:
    """Journal pages for the records (dtype RECORD), numbered from `first_sequence`."""
    pages = bytearray()
    for number, start in enumerate(range(0, len(records), RECORDS_PER_PAGE)):
        chunk = records[start : start + RECORDS_PER_PAGE]
        page = bytearray(PAGE_BYTES)
        page[_PAGE.size : _PAGE.size + chunk.nbytes] = chunk.tobytes()
        fields = (_PAGE_MAGIC, VERSION, len(chunk), (first_sequence + number) & 0xFFFFFFFF)
        _PAGE.pack_into(page, 0, *fields, 0)
        _PAGE.pack_into(page, 0, *fields, xxhash.xxh3_64_intdigest(page))
        pages += page
    return bytes(pages)


def unpack_pages(data: bytes) -> tuple[np.ndarray, int]:
    """All records of the intact pages, in order, and how many pages were damaged.

    A page of zeros is one that was never written.
    """
    chunks: list[np.ndarray] = []
    damaged = 0
    for page in _pages(data):
        magic, version, count, sequence, own = _PAGE.unpack_from(page)
        blank = bytearray(page)
        _PAGE.pack_into(blank, 0, magic, version, count, sequence, 0)
        is_intact = (magic, version) == (_PAGE_MAGIC, VERSION) and xxhash.xxh3_64_intdigest(blank) == own
        if is_intact and count <= RECORDS_PER_PAGE:
            chunks.append(np.frombuffer(page, dtype=RECORD, count=count, offset=_PAGE.size))
        elif page.count(0) != PAGE_BYTES:
            damaged += 1
    return (np.concatenate(chunks) if chunks else np.zeros(0, dtype=RECORD)), damaged


def _pages(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), PAGE_BYTES):
        page = data[start : start + PAGE_BYTES]
        if len(page) == PAGE_BYTES:
            yield page


def record(
    kind: RecordKind,
    spec: NamespaceSpec,
    extent: int,
    *,
    block_hash: bytes = b"",
    parent: bytes = b"",
    depth: int = 0,
    uses: int = 0,
    checksum: int = 0,
    last_used_s: float = 0.0,
) -> tuple[object, ...]:
    """One journal record; make an array of dtype RECORD from a list of these."""
    short = int.from_bytes(namespace_digest(spec)[:4], "little")
    return (
        int(kind), len(block_hash), bool(parent), 0, depth, uses, short, extent, checksum, last_used_s,
        block_hash.ljust(64, b"\0"), parent.ljust(64, b"\0"),
    )  # fmt: skip


def records_array(records: Iterable[tuple[object, ...]]) -> np.ndarray:
    """Records as `Volume.append` takes them."""
    return np.array(list(records), dtype=RECORD)


def leading_bytes(column: np.ndarray, sizes: np.ndarray) -> list[bytes]:
    """The leading bytes of each fixed-size field."""
    packed, width = column.tobytes(), column.dtype.itemsize
    return [packed[at * width : at * width + size] for at, size in enumerate(sizes.tolist())]
