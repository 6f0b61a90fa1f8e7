"""format: the pages of a volume on disk: superblock, segment header, extent header. Little-endian, fixed size.

Every page of metadata begins with 8 bytes of magic and the xxh3-64 of all that follows them, up to the page's end. The
superblock's random volume id is in every other page, so that no file of another volume, and nothing that a client could
write into a block, is taken for this volume's.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from kvservice.blocks import NamespaceSpec
from kvservice.checksums import checksum_of
from kvservice.nvme.files import PAGE_BYTES

FORMAT_VERSION = 1
HASH_BYTES_MAX = 64
VOLUME_ID_BYTES = 16

SUPERBLOCK_MAGIC = b"KVSVOLUM"
SEGMENT_MAGIC = b"KVSSEGMT"
EXTENT_MAGIC = b"KVSEXTNT"

_SUPERBLOCK = struct.Struct("<8sQI4x16sd")
"""magic, checksum, version, volume id, made at (wall seconds)"""
_SEGMENT = struct.Struct("<8sQI4x16sQ32sQQ")
"""magic, checksum, version, volume id, segment id, namespace digest, stride, places"""
_EXTENT = struct.Struct("<8sQII16s32sqQQQ64s")
"""magic, checksum, version, hash length, volume id, namespace digest, extent, sequence, payload bytes, payload
checksum, block hash"""

_CHECKSUM = struct.Struct("<Q")
_CHECKED_FROM = 16
_BLANK_PAGE = bytes(PAGE_BYTES)
_PLACE_BITS = 32


def extent_id(segment_id: int, place: int) -> int:
    """The number of a place in a segment."""
    return segment_id << _PLACE_BITS | place


def segment_of(extent: int) -> int:
    """The id of the segment that an extent is in."""
    return extent >> _PLACE_BITS


def place_of(extent: int) -> int:
    """Which of its segment's places an extent is."""
    return extent & (1 << _PLACE_BITS) - 1


def stride_bytes(block_size_bytes: int) -> int:
    """The distance between extents: a header page, and the payload rounded up to whole pages."""
    return PAGE_BYTES + -(-block_size_bytes // PAGE_BYTES) * PAGE_BYTES


def extent_offset(place: int, stride: int) -> int:
    """Where an extent starts in its segment's file."""
    return PAGE_BYTES + place * stride


@lru_cache(maxsize=4096)
def namespace_digest(namespace: NamespaceSpec) -> bytes:
    """32 bytes that stand for everything that makes blocks incompatible; the label is only for people."""
    sizes = (namespace.block_size_bytes, namespace.tokens_per_block, namespace.hash_size_bytes)
    digest = hashlib.sha256(struct.pack("<3Q", *sizes))
    for part in (namespace.key.tenant.encode(), namespace.key.fingerprint):
        digest.update(struct.pack("<Q", len(part)) + part)
    return digest.digest()


def seal(page: memoryview) -> None:
    """Write a finished page's checksum into it."""
    _CHECKSUM.pack_into(page, 8, checksum_of(page[_CHECKED_FROM:]))


def is_whole(page: memoryview, magic: bytes) -> bool:
    """Whether the page is of that kind and not a bit of it has changed since `seal`."""
    return page[:8] == magic and _CHECKSUM.unpack_from(page, 8)[0] == checksum_of(page[_CHECKED_FROM:])


def is_blank(page: memoryview) -> bool:
    """Whether the page was never written."""
    return page == _BLANK_PAGE


@dataclass(frozen=True, slots=True)
class Damaged:
    """A page that does not say what it should; `reason` for people."""

    reason: str


# ------------------------------------------------------------------ superblock


@dataclass(frozen=True, slots=True)
class Superblock:
    """What makes a directory one volume."""

    version: int
    volume_id: bytes
    made_at_s: float

    def write_into(self, page: memoryview) -> None:
        """Fill the page."""
        page[:] = _BLANK_PAGE
        _SUPERBLOCK.pack_into(page, 0, SUPERBLOCK_MAGIC, 0, self.version, self.volume_id, self.made_at_s)
        seal(page)


def read_superblock(page: memoryview) -> Superblock | Damaged:
    """The superblock in the page, of whatever version."""
    if not is_whole(page, SUPERBLOCK_MAGIC):
        return Damaged("the checksum does not match")
    _, _, version, volume_id, made_at_s = _SUPERBLOCK.unpack_from(page)
    return Superblock(version, volume_id, made_at_s)


# -------------------------------------------------------------------- segments


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """Whose extents a segment has, and how they lie in it."""

    volume_id: bytes
    segment_id: int
    digest: bytes
    stride: int
    places: int

    def write_into(self, page: memoryview) -> None:
        """Fill the page."""
        page[:] = _BLANK_PAGE
        _SEGMENT.pack_into(
            page,
            0,
            SEGMENT_MAGIC,
            0,
            FORMAT_VERSION,
            self.volume_id,
            self.segment_id,
            self.digest,
            self.stride,
            self.places,
        )
        seal(page)


def read_segment_header(
    page: memoryview, *, volume_id: bytes, segment_id: int, size_bytes: int
) -> SegmentHeader | Damaged:
    """The header in the page, if it is that segment's and fits a file of that size."""
    if not is_whole(page, SEGMENT_MAGIC):
        return Damaged("blank" if is_blank(page) else "the checksum does not match")
    _, _, version, found_volume_id, found_id, digest, stride, places = _SEGMENT.unpack_from(page)
    if version != FORMAT_VERSION:
        return Damaged(f"of format version {version}, not {FORMAT_VERSION}")
    if found_volume_id != volume_id or found_id != segment_id:
        return Damaged("of another volume or segment")
    if not stride or not places or extent_offset(places, stride) > size_bytes:
        return Damaged("the file is shorter than its header says")
    return SegmentHeader(volume_id, segment_id, digest, stride, places)


# --------------------------------------------------------------------- extents


class ExtentState(Enum):
    """What an extent turned out to hold, in words that follow "the extent"."""

    OK = "is whole"
    BLANK = "was never written"
    MISSING = "lies beyond the end of the file"
    UNREADABLE = "cannot be read from the device"
    DAMAGED_HEADER = "has a damaged header"
    FOREIGN = "belongs to another volume, namespace or place"
    OTHER_BLOCK = "holds another block"
    DAMAGED_PAYLOAD = "has a damaged payload"
    OTHER_CONTENT = "holds its block as it was stored another time"


@dataclass(frozen=True, slots=True)
class ExtentHeader:
    """Whose bytes follow. `sequence` grows with every extent that a volume writes."""

    volume_id: bytes
    digest: bytes
    extent: int
    block_hash: bytes
    payload_bytes: int
    payload_checksum: int
    sequence: int

    def write_into(self, page: memoryview) -> None:
        """Fill the page."""
        page[:] = _BLANK_PAGE
        _EXTENT.pack_into(
            page,
            0,
            EXTENT_MAGIC,
            0,
            FORMAT_VERSION,
            len(self.block_hash),
            self.volume_id,
            self.digest,
            self.extent,
            self.sequence,
            self.payload_bytes,
            self.payload_checksum,
            self.block_hash,
        )
        seal(page)


def read_extent_header(page: memoryview) -> ExtentHeader | ExtentState:
    """The header in the page; BLANK or DAMAGED_HEADER where there is none."""
    if not is_whole(page, EXTENT_MAGIC):
        return ExtentState.BLANK if is_blank(page) else ExtentState.DAMAGED_HEADER
    fields = _EXTENT.unpack_from(page)
    version, hash_length, volume_id, digest, extent, sequence, payload_bytes, payload_checksum, block_hash = fields[2:]
    if version != FORMAT_VERSION or hash_length > HASH_BYTES_MAX:
        return ExtentState.FOREIGN
    return ExtentHeader(
        volume_id, digest, extent, block_hash[:hash_length], payload_bytes, payload_checksum, sequence
    )
