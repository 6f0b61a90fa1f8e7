"""driver: contexts, streams, events, pinned memory, copies and CUDA IPC, in this project's words.

Addresses are ints; sizes are bytes. What takes a Context makes it current for the call only, so that
any thread may call, also one in which an engine has its own context.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_int, c_size_t, c_uint64, c_void_p
from typing import Any, Protocol

from kvservice_cuda.api import (
    IPC_HANDLE_BYTES,
    CopyAttributes,
    CudaError,
    IpcHandle,
    RowsCopy,
    Uuid,
    call,
    is_ready,
)
from kvservice_cuda.plan import Rows

_EVENT_BLOCKING_SYNC, _EVENT_DISABLE_TIMING = 1, 2
_STREAM_NON_BLOCKING = 1
_HOST_REGISTER_PORTABLE, _HOST_REGISTER_DEVICE_MAP = 1, 2
_POINTER_DEVICE_ORDINAL, _POINTER_IS_LEGACY_IPC_CAPABLE, _POINTER_MEMORY_TYPE = 9, 13, 2
_MEMORY_TYPE_HOST, _MEMORY_TYPE_DEVICE = 1, 2
_IPC_LAZY_PEER_ACCESS = 1
_WAIT_GREATER_OR_EQUAL = 0
_ACCESS_IN_STREAM_ORDER = 1
_PREFER_OVERLAP_WITH_COMPUTE = 1

_COPY_ATTRIBUTES = CopyAttributes(source_access_order=_ACCESS_IN_STREAM_ORDER, flags=_PREFER_OVERLAP_WITH_COMPUTE)
_FIRST_ATTRIBUTES = c_size_t(0)  # the attributes count from the first piece on

Handle = int


class Batch(Protocol):
    """Many pieces to copy: addresses of three arrays of uint64, and how long they are."""

    @property
    def pieces(self) -> int: ...
    @property
    def destinations_address(self) -> int: ...
    @property
    def sources_address(self) -> int: ...
    @property
    def sizes_address(self) -> int: ...


def stream_handle(stream: Any) -> Handle:
    """The CUstream that a torch stream, or an int, is."""
    return int(getattr(stream, "cuda_stream", stream))


def device_count() -> int:
    """How many GPUs this process sees. Raises CudaError."""
    count = c_int()
    call("cuDeviceGetCount", byref(count))
    return count.value


def device_uuid(ordinal: int) -> bytes:
    """The GPU's identity, 16 bytes: the same in every process and container. Raises CudaError."""
    uuid = Uuid()
    call("cuDeviceGetUuid_v2", byref(uuid), ordinal)
    return bytes(uuid.bytes)


def device_name(ordinal: int) -> str:
    """What the GPU calls itself. Raises CudaError."""
    name = ctypes.create_string_buffer(256)
    call("cuDeviceGetName", name, 256, ordinal)
    return name.value.decode()


def device_of(address: int) -> int:
    """The ordinal of the GPU that a device address belongs to. Raises CudaError: it is no device address."""
    kind, ordinal = c_int(), c_int()
    call("cuPointerGetAttribute", byref(kind), _POINTER_MEMORY_TYPE, address)
    if kind.value != _MEMORY_TYPE_DEVICE:
        raise CudaError(f"{address:#x} is not in the memory of a GPU")
    call("cuPointerGetAttribute", byref(ordinal), _POINTER_DEVICE_ORDINAL, address)
    return ordinal.value


def is_exportable(address: int) -> bool:
    """Whether legacy CUDA IPC can export the allocation: not one of cuMemCreate or a memory pool. Raises CudaError."""
    capable = ctypes.c_ubyte()
    call("cuPointerGetAttribute", byref(capable), _POINTER_IS_LEGACY_IPC_CAPABLE, address)
    return bool(capable.value)


class Context:
    """The primary context of one GPU: the one that this process's other libraries use, too."""

    def __init__(self, ordinal: int) -> None:
        """Take it, making it where this process has none yet (about 0.5 GiB of the GPU). Raises CudaError."""
        self.ordinal = ordinal
        self._handle = c_void_p()
        call("cuDevicePrimaryCtxRetain", byref(self._handle), ordinal)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make it this thread's for a while."""
        call("cuCtxPushCurrent_v2", self._handle)
        try:
            yield
        finally:
            call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def close(self) -> None:
        """Give it back; the last user's end destroys it."""
        call("cuDevicePrimaryCtxRelease_v2", self.ordinal)

    # ------------------------------------------------------------------ memory

    def allocate(self, size_bytes: int) -> int:
        """Device memory; its address. Raises CudaError."""
        address = c_uint64()
        with self.current():
            call("cuMemAlloc_v2", byref(address), size_bytes)
        return address.value

    def free(self, address: int) -> None:
        """End what `allocate` began."""
        with self.current():
            call("cuMemFree_v2", address)

    def allocation_of(self, address: int) -> tuple[int, int]:
        """(start, size in bytes) of the whole allocation around an address. Raises CudaError."""
        start, size = c_uint64(), c_size_t()
        with self.current():
            call("cuMemGetAddressRange_v2", byref(start), byref(size), address)
        return start.value, size.value

    def free_bytes(self) -> int:
        """Free memory of the GPU."""
        free, total = c_size_t(), c_size_t()
        with self.current():
            call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def pin(self, address: int, size_bytes: int) -> int:
        """Lock host memory for DMA by every GPU; the address that streams know it by. Blocks. Raises CudaError."""
        on_device = c_uint64()
        with self.current():
            flags = _HOST_REGISTER_PORTABLE | _HOST_REGISTER_DEVICE_MAP
            call("cuMemHostRegister_v2", address, size_bytes, flags)
            call("cuMemHostGetDevicePointer_v2", byref(on_device), address, 0)
        return on_device.value

    def unpin(self, address: int) -> None:
        """End what `pin` began, before the memory is unmapped."""
        with self.current():
            call("cuMemHostUnregister", address)

    # --------------------------------------------------------------------- ipc

    def export_allocation(self, address: int) -> bytes:
        """The handle by which another process opens the allocation around the address. Raises CudaError."""
        handle = IpcHandle()
        with self.current():
            call("cuIpcGetMemHandle", byref(handle), address)
        return bytes(handle.reserved)

    def open_allocation(self, handle: bytes) -> int:
        """Another process's allocation: its start, as this process sees it. Raises CudaError."""
        if len(handle) != IPC_HANDLE_BYTES:
            raise CudaError(f"a handle of {len(handle)} bytes, not {IPC_HANDLE_BYTES}")
        address = c_uint64()
        with self.current():
            call("cuIpcOpenMemHandle_v2", byref(address), IpcHandle.from_buffer_copy(handle), _IPC_LAZY_PEER_ACCESS)
        return address.value

    def close_allocation(self, address: int) -> None:
        """End what `open_allocation` began: until then the memory lives, even if its process does not."""
        with self.current():
            call("cuIpcCloseMemHandle", address)

    # ----------------------------------------------------------------- streams

    def stream(self, *, urgent: bool = False) -> Handle:
        """A stream of its own, not ordered with the default one. Raises CudaError."""
        least, greatest, made = c_int(), c_int(), c_void_p()
        with self.current():
            call("cuCtxGetStreamPriorityRange", byref(least), byref(greatest))
            priority = greatest.value if urgent else least.value
            call("cuStreamCreateWithPriority", byref(made), _STREAM_NON_BLOCKING, priority)
        return int(made.value or 0)

    def end_stream(self, stream: Handle) -> None:
        """Destroy it; what is queued still runs."""
        with self.current():
            call("cuStreamDestroy_v2", stream)

    def synchronize(self, stream: Handle) -> None:
        """Wait until everything queued on it is done. Blocks. Raises CudaError."""
        with self.current():
            call("cuStreamSynchronize", stream)

    def event(self) -> Handle:
        """An event that threads can sleep on. Raises CudaError."""
        made = c_void_p()
        with self.current():
            call("cuEventCreate", byref(made), _EVENT_BLOCKING_SYNC | _EVENT_DISABLE_TIMING)
        return int(made.value or 0)

    def end_event(self, event: Handle) -> None:
        """Destroy it."""
        with self.current():
            call("cuEventDestroy_v2", event)

    def record(self, event: Handle, stream: Handle) -> None:
        """The event is over when what is on the stream now is done. Called while current. Raises CudaError."""
        call("cuEventRecord", event, stream)

    def has_passed(self, event: Handle) -> bool:
        """Whether it is over. Raises CudaError: what came before it failed."""
        with self.current():
            return is_ready("cuEventQuery", event)

    def await_event(self, event: Handle) -> None:
        """Sleep until it is over. Blocks. Raises CudaError: what came before it failed."""
        with self.current():
            call("cuEventSynchronize", event)

    def order_after(self, stream: Handle, event: Handle) -> None:
        """What is queued on the stream from now on waits for the event. Called while current. Raises CudaError."""
        call("cuStreamWaitEvent", stream, event, 0)

    def write_flag(self, stream: Handle, address: int, value: int) -> None:
        """Store 64 bits when what is on the stream now is done and visible. Called while current. Raises CudaError."""
        call("cuStreamWriteValue64_v2", stream, address, value, 0)

    def await_flag(self, stream: Handle, address: int, value: int) -> None:
        """What is queued on the stream from now on waits until the 64 bits are at least `value`. Raises CudaError."""
        with self.current():
            call("cuStreamWaitValue64_v2", stream, address, value, _WAIT_GREATER_OR_EQUAL)

    # ------------------------------------------------------------------ copies

    def copy(self, stream: Handle, destination: int, source: int, size_bytes: int) -> None:
        """Queue one copy. Raises CudaError."""
        with self.current():
            call("cuMemcpyAsync", destination, source, size_bytes, stream)

    def copy_rows(self, stream: Handle, rows: Rows, *, to_device: bool) -> None:
        """Queue the copy of all rows between pinned memory and the GPU. Called while current. Raises CudaError."""
        if rows.is_contiguous:
            ends = (rows.device, rows.host) if to_device else (rows.host, rows.device)
            call("cuMemcpyAsync", *ends, rows.width_bytes * rows.rows, stream)
            return
        copy = RowsCopy(width_bytes=rows.width_bytes, height=rows.rows)
        if to_device:
            copy.source_type, copy.source_host, copy.source_pitch = _MEMORY_TYPE_HOST, rows.host, rows.host_pitch_bytes
            copy.destination_type, copy.destination_device = _MEMORY_TYPE_DEVICE, rows.device
            copy.destination_pitch = rows.device_pitch_bytes
        else:
            copy.source_type, copy.source_device = _MEMORY_TYPE_DEVICE, rows.device
            copy.source_pitch = rows.device_pitch_bytes
            copy.destination_type, copy.destination_host = _MEMORY_TYPE_HOST, rows.host
            copy.destination_pitch = rows.host_pitch_bytes
        call("cuMemcpy2DAsync_v2", byref(copy), stream)

    def copy_batch(self, stream: Handle, batch: Batch) -> None:
        """Queue all pieces in one call, to be copied in any order by copy engines. Called while current.

        Raises:
            CudaError.
        """
        call(
            "cuMemcpyBatchAsync_v2",
            batch.destinations_address,
            batch.sources_address,
            batch.sizes_address,
            batch.pieces,
            byref(_COPY_ATTRIBUTES),
            byref(_FIRST_ATTRIBUTES),
            1,
            stream,
        )


class Driver:
    """The GPUs of this process, by their identity. What the daemon and the client take as an argument."""

    def ordinal_of(self, uuid: bytes) -> int | None:
        """Which GPU has that identity, None where this process does not see it. Raises CudaError."""
        return next((ordinal for ordinal in range(device_count()) if device_uuid(ordinal) == uuid), None)

    def names(self) -> list[str]:
        """What the GPUs call themselves. Raises CudaError: there is no driver, or no GPU."""
        return [device_name(ordinal) for ordinal in range(device_count())]

    def uuid(self, ordinal: int) -> bytes:
        """The GPU's identity, 16 bytes: the same in every process and container. Raises CudaError."""
        return device_uuid(ordinal)

    def ordinal_at(self, address: int) -> int:
        """Which GPU a device address belongs to. Raises CudaError: it is no device address."""
        return device_of(address)

    def is_exportable(self, address: int) -> bool:
        """Whether legacy CUDA IPC can export the allocation: not one of cuMemCreate or a pool. Raises CudaError."""
        return is_exportable(address)

    def context(self, ordinal: int) -> Context:
        """See Context. Raises CudaError."""
        return Context(ordinal)
