"""extents: blocks between memory and their extents, and whether what was read is what was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvservice.checksums import checksum_of
from kvservice.nvme.files import PAGE_BYTES, EndOfFile, Files, PagePool, read_all, write_all
from kvservice.nvme.format import ExtentHeader, ExtentState, read_extent_header

_HEADER = slice(0, PAGE_BYTES)
_TAIL = slice(PAGE_BYTES, 2 * PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class ExtentKey:
    """What an extent must hold to be served."""

    volume_id: bytes
    digest: bytes
    extent: int
    block_hash: bytes


@dataclass(frozen=True, slots=True)
class Found:
    """What reading an extent found; `checksum` is the payload's if the state is OK."""

    state: ExtentState
    checksum: int = 0


class ExtentMover:
    """Writes and reads extents with one system call each, straight from and to the block's memory. Thread-safe.

    Args:
        direct: the descriptors are O_DIRECT, so that memory must be page-aligned.
    """

    def __init__(self, files: Files, *, direct: bool) -> None:
        self._files = files
        self._direct = direct
        self._scratch = PagePool(pages=2)

    def write(
        self, descriptor: int, offset: int, key: ExtentKey, memory: memoryview, *, checksum: int, sequence: int
    ) -> int:
        """Write header and payload. Blocks; returns the bytes written. Raises OSError."""
        header = ExtentHeader(key.volume_id, key.digest, key.extent, key.block_hash, len(memory), checksum, sequence)
        with self._scratch.borrowed() as pages:
            header.write_into(pages[_HEADER])
            buffers = self._buffers(pages, memory)
            rest = len(memory) % PAGE_BYTES
            if rest:
                pages[_TAIL][:rest] = memory[-rest:]
                pages[_TAIL][rest:] = bytes(PAGE_BYTES - rest)
            write_all(self._files, descriptor, buffers, offset)
            return sum(map(len, buffers))

    def read(self, descriptor: int, offset: int, key: ExtentKey, memory: memoryview) -> Found:
        """Read the payload into `memory`, which holds the block only if the state is OK. Blocks.

        Raises:
            OSError: the device does not answer.
        """
        with self._scratch.borrowed() as pages:
            try:
                read_all(self._files, descriptor, self._buffers(pages, memory), offset)
            except EndOfFile:
                return Found(ExtentState.MISSING)
            rest = len(memory) % PAGE_BYTES
            if rest:
                memory[-rest:] = pages[_TAIL][:rest]
            found = read_extent_header(pages[_HEADER])
        if isinstance(found, ExtentState):
            return Found(found)
        if (found.volume_id, found.digest, found.extent) != (key.volume_id, key.digest, key.extent):
            return Found(ExtentState.FOREIGN)
        if found.block_hash != key.block_hash:
            return Found(ExtentState.OTHER_BLOCK)
        if found.payload_bytes != len(memory) or found.payload_checksum != checksum_of(memory):
            return Found(ExtentState.DAMAGED_PAYLOAD)
        return Found(ExtentState.OK, found.payload_checksum)

    def _buffers(self, pages: memoryview, memory: memoryview) -> list[memoryview]:
        """Header page, the block's whole pages where they are, and a scratch page for what is left of it."""
        whole = len(memory) // PAGE_BYTES * PAGE_BYTES
        if whole and self._direct and np.frombuffer(memory, dtype=np.uint8).ctypes.data % PAGE_BYTES:
            raise ValueError("the block's memory does not start on a page boundary")
        buffers = [pages[_HEADER]]
        if whole:
            buffers.append(memory[:whole])
        if whole < len(memory):
            buffers.append(pages[_TAIL])
        return buffers
