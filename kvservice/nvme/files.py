"""The few system calls of the tier, as a seam: tests put a disk under it that loses power or fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Protocol

Buffer = memoryview | bytes | bytearray
_ALIGNMENT_BYTES = 4096


def after(buffers: Sequence[memoryview], done_bytes: int) -> list[memoryview]:
    """What is left of the buffers behind their first bytes."""
    left = []
    for buffer in buffers:
        if done_bytes < len(buffer):
            left.append(buffer[done_bytes:] if done_bytes else buffer)
        done_bytes = max(0, done_bytes - len(buffer))
    return left


class Files(Protocol):
    """What a volume asks of its file system. Every method blocks and raises OSError."""

    def open(self, path: str, *, direct: bool, create: bool) -> int:
        """A descriptor for reading and writing; `direct`: O_DIRECT, aligned access only."""
        ...

    def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
        """All bytes of the buffers, one after the other, at the offset."""
        ...

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill the buffers from the offset; how many bytes there were."""
        ...

    def size_bytes(self, descriptor: int) -> int:
        """How long the file is."""
        ...

    def flush(self, descriptor: int) -> None:
        """What was written survives a loss of power."""
        ...

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        """The file has that size and the space for it."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Atomically, and durably."""
        ...

    def remove(self, path: str) -> None:
        """Delete a file, durably."""
        ...

    def close(self, descriptor: int) -> None:
        """Give the descriptor back."""
        ...


class RealFiles:
    """The operating system's."""

    def open(self, path: str, *, direct: bool, create: bool) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        existed = os.path.exists(path)
        try:
            descriptor = os.open(path, flags | (os.O_DIRECT if direct else 0), 0o600)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            descriptor = os.open(path, flags, 0o600)  # a file system without O_DIRECT (tmpfs)
        if create and not existed:
            _sync_directory(os.path.dirname(path))
        return descriptor

    def write(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
        wanted = sum(len(buffer) for buffer in buffers)
        done = 0
        while done < wanted:
            # After a short write the next says why: the disk is full, or fails.
            written = os.pwritev(descriptor, after([memoryview(buffer) for buffer in buffers], done), offset + done)
            if written < min(_ALIGNMENT_BYTES, wanted - done):
                raise OSError(errno.EIO, f"{done + written} of {wanted} bytes written")
            done += written if done + written == wanted else written - written % _ALIGNMENT_BYTES

    def read(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(descriptor, buffers, offset)

    def size_bytes(self, descriptor: int) -> int:
        return os.fstat(descriptor).st_size

    def flush(self, descriptor: int) -> None:
        os.fdatasync(descriptor)

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        os.posix_fallocate(descriptor, 0, size_bytes)
        os.fsync(descriptor)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)
        _sync_directory(os.path.dirname(target))

    def remove(self, path: str) -> None:
        os.unlink(path)
        _sync_directory(os.path.dirname(path))

    def close(self, descriptor: int) -> None:
        os.close(descriptor)


class ReadOnlyFiles(RealFiles):
    """The operating system's, for who changes nothing: files are opened for reading, and none is made."""

    def open(self, path: str, *, direct: bool, create: bool) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            return os.open(path, flags | (os.O_DIRECT if direct else 0))
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            return os.open(path, flags)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
