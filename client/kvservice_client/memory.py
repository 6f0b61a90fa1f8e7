"""Bytes: mapped segments, addresses of callers' buffers, and copies with the GIL released.

Nothing here creates a Python object per block's bytes: copies go from address to address through
`ctypes.memmove`, which releases the GIL (memoryview assignment does not).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

from kvservice_client.errors import InvalidRequest

_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap module has no name for it
_MADV_DONTFORK = 10
_PIECE_BYTES_MIN = 1 << 20  # below this, handing work to another thread costs more than it saves

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True, slots=True)
class Memory:
    """Plain memory by address, for callers that have no buffer object (a tensor's data_ptr)."""

    address: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Copy:
    """One piece to move."""

    destination: int
    source: int
    size_bytes: int


class Segment:
    """One segment of the daemon's arena, mapped into this process and not into its children."""

    def __init__(self, segment_id: int, *, fds: Sequence[int], size_bytes: int, stride_bytes: int, slots: int) -> None:
        """Map and pre-fault. Blocks (about 0.1 s a GiB). Takes the descriptors over.

        Args:
            fds: the segment's, then its generation table's.

        Raises:
            OSError: the mapping failed.
        """
        self.segment_id = segment_id
        self.stride_bytes = stride_bytes
        self.slots = slots
        self._size_bytes = size_bytes
        self._generations_bytes = slots * 8
        try:
            self.address = _map(fds[0], size_bytes, mmap.PROT_READ | mmap.PROT_WRITE)
            try:
                self._generations_address = _map(fds[1], self._generations_bytes, mmap.PROT_READ)
            except OSError:
                _libc.munmap(self.address, size_bytes)
                raise
        finally:
            for descriptor in fds:
                os.close(descriptor)
        _libc.madvise(self.address, size_bytes, _MADV_POPULATE_WRITE)
        self._generations = (ctypes.c_uint64 * slots).from_address(self._generations_address)
        self._is_mapped = True
        self.on_unmap: list[Callable[[], None]] = []
        """Called before the address range goes, by whoever made more of it (pinned it, say)."""

    @property
    def size_bytes(self) -> int:
        """Of the mapping."""
        return self._size_bytes

    def slot_address(self, slot: int) -> int:
        """Where a slot starts."""
        return self.address + slot * self.stride_bytes

    def generation(self, slot: int) -> int:
        """The slot's generation now."""
        return int(self._generations[slot])

    def unmap(self) -> None:
        """Give the address range back; nothing may use it any more. May be called twice."""
        if self._is_mapped:
            self._is_mapped = False
            for undo in self.on_unmap:
                undo()
            _libc.munmap(self.address, self._size_bytes)
            _libc.munmap(self._generations_address, self._generations_bytes)


class Copier(Protocol):
    """Moves pieces from address to address and returns when all are there."""

    def copy(self, pieces: Sequence[Copy]) -> None:
        """Blocks until done; releases the GIL while bytes move."""
        ...

    def close(self) -> None:
        """Give threads back."""
        ...


class ThreadedCopier:
    """memmove by a few threads: one memory channel is rarely filled by one core."""

    def __init__(self, *, threads: int) -> None:
        self._threads = threads
        self._executor = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="kvservice-copy")

    def copy(self, pieces: Sequence[Copy]) -> None:
        """Blocks until done; the calling thread takes a share of the work."""
        shares = _shares(merge(pieces), self._threads)
        others = [self._executor.submit(_move, share) for share in shares[1:]]
        try:
            _move(shares[0] if shares else ())
        finally:
            # Whatever happens here, nobody may copy on after this returns.
            wait(others)
        for other in others:
            other.result()

    def close(self) -> None:
        """Stop the threads."""
        self._executor.shutdown(wait=False)


def merge(pieces: Sequence[Copy]) -> list[Copy]:
    """Join neighbours that are adjacent on both sides."""
    merged: list[Copy] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.destination + last.size_bytes == piece.destination
            and last.source + last.size_bytes == piece.source
        ):
            merged[-1] = Copy(last.destination, last.source, last.size_bytes + piece.size_bytes)
        else:
            merged.append(piece)
    return merged


def _shares(pieces: Sequence[Copy], threads: int) -> list[list[Copy]]:
    """Cut the work into at most `threads` shares of equal bytes, in order."""
    total = sum(piece.size_bytes for piece in pieces)
    share_bytes = max(-(-total // threads), _PIECE_BYTES_MIN)
    shares: list[list[Copy]] = [[]]
    room = share_bytes
    for piece in pieces:
        done = 0
        while done < piece.size_bytes:
            if room == 0:
                shares.append([])
                room = share_bytes
            size = min(room, piece.size_bytes - done)
            shares[-1].append(Copy(piece.destination + done, piece.source + done, size))
            done, room = done + size, room - size
    return shares


def _move(pieces: Sequence[Copy]) -> None:
    for piece in pieces:
        ctypes.memmove(piece.destination, piece.source, piece.size_bytes)


def _map(descriptor: int, size_bytes: int, protection: int) -> int:
    address = _libc.mmap(None, size_bytes, protection, mmap.MAP_SHARED, descriptor, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map {size_bytes} bytes of the daemon's memory: {os.strerror(number)}")
    _libc.madvise(address, size_bytes, _MADV_DONTFORK)
    return int(address)


# ------------------------------------------------------------- callers' buffers


class _PyBuffer(ctypes.Structure):
    """CPython's Py_buffer (stable ABI since 3.11)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_PYBUF_SIMPLE, _PYBUF_WRITABLE = 0, 1
_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int]
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = [ctypes.POINTER(_PyBuffer)]


class Buffers:
    """Addresses of a caller's buffers, valid while this context is open.

    Accepts one C-contiguous buffer of `blocks * block_size_bytes`, or one per block: anything with
    the buffer protocol (numpy, bytearray, memoryview, mmap), a torch CPU tensor, or Memory.
    """

    def __init__(self, buffers: Any, *, blocks: int, block_size_bytes: int, writable: bool) -> None:
        self._blocks = blocks
        self._block_size_bytes = block_size_bytes
        self._writable = writable
        self._views: list[_PyBuffer] = []
        self._buffers = buffers
        self.addresses: list[int] = []

    def __enter__(self) -> Buffers:
        try:
            self.addresses = self._resolve()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._release()

    def _resolve(self) -> list[int]:
        size = self._block_size_bytes
        if isinstance(self._buffers, (list, tuple)):
            if len(self._buffers) != self._blocks:
                raise InvalidRequest(f"{len(self._buffers)} buffers for {self._blocks} blocks")
            return [self._address(buffer, size) for buffer in self._buffers]
        start = self._address(self._buffers, size * self._blocks)
        return [start + position * size for position in range(self._blocks)]

    def _address(self, buffer: Any, size_bytes: int) -> int:
        if isinstance(buffer, Memory):
            return _require_size(buffer.address, buffer.size_bytes, size_bytes)
        if hasattr(buffer, "data_ptr"):
            return _tensor_address(buffer, size_bytes)
        view = _PyBuffer()
        try:
            _get_buffer(buffer, ctypes.byref(view), _PYBUF_WRITABLE if self._writable else _PYBUF_SIMPLE)
        except (BufferError, TypeError, ValueError) as error:  # ValueError: numpy's for read-only and strided arrays
            raise InvalidRequest(f"not a usable buffer: {error}") from None
        self._views.append(view)
        return _require_size(int(view.buf or 0), int(view.len), size_bytes)

    def _release(self) -> None:
        while self._views:
            _release_buffer(ctypes.byref(self._views.pop()))


def _tensor_address(tensor: Any, size_bytes: int) -> int:
    """Torch is not imported here: a tensor is what has data_ptr, device and is_contiguous."""
    if tensor.device.type != "cpu":
        raise InvalidRequest(f"a tensor on {tensor.device}: the shared-memory plane copies CPU memory")
    if not tensor.is_contiguous():
        raise InvalidRequest("the tensor is not contiguous")
    return _require_size(int(tensor.data_ptr()), tensor.numel() * tensor.element_size(), size_bytes)


def _require_size(address: int, have_bytes: int, want_bytes: int) -> int:
    if have_bytes != want_bytes:
        raise InvalidRequest(f"a buffer of {have_bytes} bytes where {want_bytes} are needed")
    return address
