"""files: the few system calls that a volume makes, as a seam: the real ones here, a failing disk in tests.

Every method blocks and raises OSError. Nothing here knows what is in the files.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Protocol

PAGE_BYTES = 4096
"""The unit of everything on disk: O_DIRECT moves whole, aligned pages."""


class Access(Enum):
    """How a file is opened."""

    READ = os.O_RDONLY
    WRITE = os.O_RDWR
    CREATE = os.O_RDWR | os.O_CREAT


class Files(Protocol):
    """A file system as a volume sees it. Descriptors are plain numbers; paths are absolute."""

    def make_directory(self, path: str) -> None:
        """Make it and what is missing above it; it may exist."""
        ...

    def list_directory(self, path: str) -> list[str]:
        """The names in it."""
        ...

    def sync_directory(self, path: str) -> None:
        """Return when files made, renamed and unlinked in it stay so after a power loss."""
        ...

    def open(self, path: str, access: Access, *, direct: bool) -> int:
        """A descriptor; `direct`: past the page cache, EINVAL where the file system cannot."""
        ...

    def close(self, descriptor: int) -> None: ...

    def lock(self, path: str) -> int:
        """Make the file if need be and lock it until the descriptor closes. BlockingIOError: somebody else has it."""
        ...

    def size_bytes(self, descriptor: int) -> int: ...

    def allocated_bytes(self, descriptor: int) -> int:
        """What the file takes on the disk, as the file system counts it."""
        ...

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        """Give the file that size with every byte of it backed by the disk."""
        ...

    def truncate(self, descriptor: int, size_bytes: int) -> None: ...

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Read; fewer bytes than asked for are an answer, 0 at the end of the file."""
        ...

    def pwritev(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Write; fewer bytes than given are an answer."""
        ...

    def fdatasync(self, descriptor: int) -> None:
        """Return when what was written stays so after a power loss."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Atomic; replaces the target."""
        ...

    def unlink(self, path: str) -> None: ...


class RealFiles:
    """The operating system's."""

    def make_directory(self, path: str) -> None:
        os.makedirs(path, mode=0o700, exist_ok=True)

    def list_directory(self, path: str) -> list[str]:
        return os.listdir(path)

    def sync_directory(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def open(self, path: str, access: Access, *, direct: bool) -> int:
        return os.open(path, access.value | os.O_CLOEXEC | (os.O_DIRECT if direct else 0), 0o600)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def lock(self, path: str) -> int:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES):
                raise
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def size_bytes(self, descriptor: int) -> int:
        return os.fstat(descriptor).st_size

    def allocated_bytes(self, descriptor: int) -> int:
        return os.fstat(descriptor).st_blocks * 512

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        os.posix_fallocate(descriptor, 0, size_bytes)

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        os.ftruncate(descriptor, size_bytes)

    def preadv(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(descriptor, buffers, offset)

    def pwritev(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(descriptor, buffers, offset)

    def fdatasync(self, descriptor: int) -> None:
        os.fdatasync(descriptor)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)


REAL_FILES = RealFiles()


class EndOfFile(OSError):
    """The file ends before the bytes that were asked for."""


def read_all(files: Files, descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Fill the buffers, in as many reads as it takes. Raises EndOfFile, OSError."""
    wanted = sum(map(len, buffers))
    done = files.preadv(descriptor, buffers, offset)
    while done < wanted:
        # What came beyond the last whole page is read again: O_DIRECT starts at page boundaries only.
        kept = done // PAGE_BYTES * PAGE_BYTES
        more = files.preadv(descriptor, _beyond(buffers, kept), offset + kept)
        if kept + more <= done:
            raise EndOfFile(errno.EIO, f"the file ends {wanted - done} bytes early")
        done = kept + more


def write_all(files: Files, descriptor: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Write the buffers, in as many writes as it takes. Raises OSError, also where writes make no progress."""
    wanted = sum(map(len, buffers))
    done = files.pwritev(descriptor, buffers, offset)
    while done < wanted:
        kept = done // PAGE_BYTES * PAGE_BYTES
        more = files.pwritev(descriptor, _beyond(buffers, kept), offset + kept)
        if kept + more <= done:
            raise OSError(errno.EIO, f"the last {wanted - done} bytes of a write are not taken")
        done = kept + more


def _beyond(buffers: Sequence[memoryview], skipped_bytes: int) -> list[memoryview]:
    """What is left of the buffers after so many bytes."""
    left = []
    for buffer in buffers:
        if skipped_bytes < len(buffer):
            left.append(buffer[skipped_bytes:])
        skipped_bytes = max(0, skipped_bytes - len(buffer))
    return left


class PagePool:
    """Page-aligned scratch memory of one size, used again and again. Thread-safe."""

    def __init__(self, *, pages: int) -> None:
        self._size_bytes = pages * PAGE_BYTES
        # list.pop and append are atomic.
        self._idle: list[memoryview] = []

    @contextmanager
    def borrowed(self) -> Iterator[memoryview]:
        """Memory with whatever its last user left in it."""
        try:
            pages = self._idle.pop()
        except IndexError:
            pages = memoryview(mmap.mmap(-1, self._size_bytes))
        try:
            yield pages
        finally:
            self._idle.append(pages)
