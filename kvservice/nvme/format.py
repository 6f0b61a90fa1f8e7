"""What is on disk: extent headers, segment headers, journal pages. Little-endian, fixed sizes, every page checksummed.

Reading is total: any bytes at all decode to something valid or to None, never to an exception.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import lru_cache

import numpy as np
import xxhash

from kvservice.blocks import BlockHash, NamespaceSpec

PAGE_BYTES = 4096
VERSION = 2
HASH_BYTES_MAX = 64

# magic, version, hash length, namespace digest, hash, payload length, payload checksum, header checksum
_EXTENT = struct.Struct("<8sHH32s64sQQQ")
_EXTENT_MAGIC = b"KVEXTENT"
# magic, version, padding, segment id, namespace digest, stride, extents, generation, checksum
_SEGMENT = struct.Struct("<8sHHI32sQQQQ")
_SEGMENT_MAGIC = b"KVSEGMNT"
_PAGE_HEADER_BYTES = 32
_PAGE_MAGIC = b"KVINDEXP"


class RecordKind(IntEnum):
    """What a journal record says. A later record about the same extent counts."""

    NONE = 0
    STORED = 1  # the block is in the extent
    DROPPED = 2  # the extent's block is gone for good
    TOUCHED = 3  # the block was used then; so were all blocks before it
    SESSION = 4  # `hash` is a session's digest; it ends at the extent's block
    ALIASED = 5  # `hash`, behind `parent`, is the extent's block too; `checksum` is the owner, `uses` the block's depth
    UNALIASED = 6  # not any more
    FORGOTTEN = 7  # `hash` is a session's digest: what was said of it before is void; a word about no extent


RECORD = np.dtype(
    [
        ("kind", "u1"),
        ("hash_size", "u1"),
        ("has_parent", "u1"),
        ("pad", "u1"),
        ("depth", "<u4"),
        ("uses", "<u4"),
        ("namespace", "<u8"),
        ("extent", "<i8"),
        ("checksum", "<u8"),
        ("last_used_s", "<f8"),
        ("hash", f"V{HASH_BYTES_MAX}"),
        ("parent", f"V{HASH_BYTES_MAX}"),
    ]
)
"""One journal record. `namespace` is the first eight bytes of the digest; times are wall-clock seconds."""

RECORDS_PER_PAGE = (PAGE_BYTES - _PAGE_HEADER_BYTES) // RECORD.itemsize

_PAGE = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u2"),
        ("count", "<u2"),
        ("position", "<u4"),
        ("file_number", "<u8"),
        ("checksum", "<u8"),
        ("records", RECORD, RECORDS_PER_PAGE),
        ("pad", f"V{PAGE_BYTES - _PAGE_HEADER_BYTES - RECORDS_PER_PAGE * RECORD.itemsize}"),
    ]
)
"""A journal page: which it is, of which file, and its records."""


@lru_cache(maxsize=1024)
def namespace_digest(spec: NamespaceSpec) -> bytes:
    """32 bytes that name a namespace and its geometry."""
    tenant = spec.key.tenant.encode()
    sizes = struct.pack("<QIIII", spec.block_size_bytes, spec.tokens_per_block, spec.hash_size_bytes, len(tenant), 0)
    return hashlib.sha256(sizes + tenant + spec.key.fingerprint).digest()


def short_digest(digest: bytes) -> int:
    """What stands for a namespace in a record. An extent has the whole digest, and reading it compares that."""
    return int.from_bytes(digest[:8], "little")


def extent_stride_bytes(block_size_bytes: int) -> int:
    """Bytes of disk per block: a header page, and the payload in whole pages."""
    return PAGE_BYTES + -(-block_size_bytes // PAGE_BYTES) * PAGE_BYTES


def pack_extent_header(page: memoryview, digest: bytes, block_hash: BlockHash, size_bytes: int, checksum: int) -> None:
    """Fill a page with the header of an extent."""
    fields = (_EXTENT_MAGIC, VERSION, len(block_hash), digest, block_hash, size_bytes, checksum)
    page[:] = bytes(PAGE_BYTES)
    _EXTENT.pack_into(page, 0, *fields, 0)
    _EXTENT.pack_into(page, 0, *fields, xxhash.xxh3_64_intdigest(page))


class HeaderState(Enum):
    """What an extent's header page is."""

    DAMAGED = "damaged"
    OTHER_BLOCK = "other_block"  # intact, and names another block
    OWN = "own"


def extent_header(page: memoryview, digest: bytes, block_hash: BlockHash, size_bytes: int) -> tuple[HeaderState, int]:
    """Whether the page is the header of exactly that block, and the payload's checksum if so."""
    magic, version, hash_size, of, found, size, checksum, own = _EXTENT.unpack_from(page)
    blank = bytearray(page)
    _EXTENT.pack_into(blank, 0, magic, version, hash_size, of, found, size, checksum, 0)
    if (magic, version) != (_EXTENT_MAGIC, VERSION) or xxhash.xxh3_64_intdigest(blank) != own:
        return HeaderState.DAMAGED, 0
    if (of, hash_size, found[:hash_size], size) != (digest, len(block_hash), block_hash, size_bytes):
        return HeaderState.OTHER_BLOCK, 0
    return HeaderState.OWN, int(checksum)


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """Whose a segment file is, and how it is divided; in its first and in its last page."""

    segment_id: int
    digest: bytes
    stride_bytes: int
    extents: int
    generation: int
    """Grows when the segment changes hands: of two headers that differ, the later one counts."""

    def to_page(self) -> bytes:
        """As on disk."""
        fields = (
            _SEGMENT_MAGIC, VERSION, 0, self.segment_id, self.digest, self.stride_bytes, self.extents, self.generation,
        )  # fmt: skip
        page = bytearray(PAGE_BYTES)
        _SEGMENT.pack_into(page, 0, *fields, 0)
        _SEGMENT.pack_into(page, 0, *fields, xxhash.xxh3_64_intdigest(page))
        return bytes(page)

    @classmethod
    def from_page(cls, page: bytes) -> SegmentHeader | None:
        """None: it is no intact segment header."""
        if len(page) != PAGE_BYTES:
            return None
        *fields, own = _SEGMENT.unpack_from(page)
        blank = bytearray(page)
        _SEGMENT.pack_into(blank, 0, *fields, 0)
        magic, version, _, segment_id, digest, stride, extents, generation = fields
        if (magic, version) != (_SEGMENT_MAGIC, VERSION) or xxhash.xxh3_64_intdigest(blank) != own:
            return None
        return cls(segment_id, digest, stride, extents, generation)


def pack_pages(records: np.ndarray, *, file_number: int, first_page: int) -> bytes:
    """Journal pages for the records (dtype RECORD), for that place of that file."""
    pages = np.zeros(-(-len(records) // RECORDS_PER_PAGE), dtype=_PAGE)
    for number, page in enumerate(pages):
        chunk = records[number * RECORDS_PER_PAGE : (number + 1) * RECORDS_PER_PAGE]
        page["records"][: len(chunk)] = chunk
        page["count"] = len(chunk)
    pages["magic"], pages["version"], pages["file_number"] = _PAGE_MAGIC, VERSION, file_number
    pages["position"] = np.arange(first_page, first_page + len(pages))
    pages["checksum"] = _page_checksums(pages)
    return pages.tobytes()


def unpack_pages(data: memoryview, *, file_number: int) -> tuple[np.ndarray, int]:
    """All records of the intact pages of a whole file, in order, and how many pages were damaged.

    A page of zeros is one that was never written; one from elsewhere is damage; the end of a page that
    was not written whole is nothing. The caller's memory is worked in: the pages' checksums are zero afterwards.
    """
    pages = np.frombuffer(data, dtype=_PAGE, count=len(data) // PAGE_BYTES)
    checksums = pages["checksum"].copy()
    pages["checksum"] = 0
    is_intact = (
        (pages["magic"] == _PAGE_MAGIC)
        & (pages["version"] == VERSION)
        & (pages["position"] == np.arange(len(pages)))
        & (pages["file_number"] == file_number)
        & (pages["count"] <= RECORDS_PER_PAGE)
    )
    is_intact &= _page_checksums(pages) == checksums
    others = pages[~is_intact].view(np.uint8).reshape(-1, PAGE_BYTES)
    is_written = others.any(axis=1) | (checksums[~is_intact] != 0)
    is_record = is_intact[:, None] & (np.arange(RECORDS_PER_PAGE) < pages["count"][:, None])
    return pages["records"][is_record], int(np.count_nonzero(is_written))


def _page_checksums(pages: np.ndarray) -> np.ndarray:
    """Of pages whose checksum is zero."""
    content = pages.view(np.uint8).data
    starts = range(0, len(content), PAGE_BYTES)
    sums = (xxhash.xxh3_64_intdigest(content[start : start + PAGE_BYTES]) for start in starts)
    return np.fromiter(sums, dtype=np.uint64, count=len(pages))


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
    short = short_digest(namespace_digest(spec))
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
