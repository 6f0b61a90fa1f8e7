"""api: signatures of the driver's functions, and the one place where their status becomes an exception."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

IPC_HANDLE_BYTES = 64

_SUCCESS, _NOT_READY = 0, 600
# Deinitialized, device unavailable, invalid context, ECC, NVLink, destroyed context, unknown, and every fault of
# running work (illegal address to launch failed): these stay.
_FATAL = frozenset({4, 46, 201, 214, 220, 700, 702, 709, 999, *range(714, 720)})


class CudaError(Exception):
    """A call of the driver failed.

    Attributes:
        code: the CUresult.
    """

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code

    @property
    def is_fatal(self) -> bool:
        """Whether the GPU, or this process's context on it, is lost: nothing works there until the process ends."""
        return self.code in _FATAL


class DriverMissing(CudaError):
    """There is no CUDA driver here that can be used; the message says why."""


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle: names one allocation of one process."""

    _fields_ = (("reserved", ctypes.c_ubyte * IPC_HANDLE_BYTES),)


class Uuid(ctypes.Structure):
    """CUuuid."""

    _fields_ = (("bytes", ctypes.c_ubyte * 16),)


class Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", c_int), ("id", c_int))


class CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = (
        ("source_access_order", c_int),
        ("source_hint", Location),
        ("destination_hint", Location),
        ("flags", c_uint),
    )


class RowsCopy(ctypes.Structure):
    """CUDA_MEMCPY2D: equally spaced rows on both sides."""

    _fields_ = (
        ("source_x_bytes", c_size_t),
        ("source_y", c_size_t),
        ("source_type", c_int),
        ("source_host", c_void_p),
        ("source_device", c_uint64),
        ("source_array", c_void_p),
        ("source_pitch", c_size_t),
        ("destination_x_bytes", c_size_t),
        ("destination_y", c_size_t),
        ("destination_type", c_int),
        ("destination_host", c_void_p),
        ("destination_device", c_uint64),
        ("destination_array", c_void_p),
        ("destination_pitch", c_size_t),
        ("width_bytes", c_size_t),
        ("height", c_size_t),
    )


_ADDRESS = c_uint64  # CUdeviceptr

# Names as libcuda exports them: a suffix is the version of the function's signature.
_SIGNATURES: Mapping[str, Sequence[Any]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetUuid_v2": (POINTER(Uuid), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuCtxGetStreamPriorityRange": (POINTER(c_int), POINTER(c_int)),
    "cuStreamCreateWithPriority": (POINTER(c_void_p), c_uint, c_int),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuStreamWriteValue64_v2": (c_void_p, _ADDRESS, c_uint64, c_uint),
    "cuStreamWaitValue64_v2": (c_void_p, _ADDRESS, c_uint64, c_uint),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuEventSynchronize": (c_void_p,),
    "cuEventDestroy_v2": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(_ADDRESS), c_size_t),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemGetAddressRange_v2": (POINTER(_ADDRESS), POINTER(c_size_t), _ADDRESS),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuPointerGetAttribute": (c_void_p, c_int, _ADDRESS),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemHostGetDevicePointer_v2": (POINTER(_ADDRESS), c_void_p, c_uint),
    "cuMemcpy2DAsync_v2": (POINTER(RowsCopy), c_void_p),
    "cuMemcpyAsync": (_ADDRESS, _ADDRESS, c_size_t, c_void_p),
    "cuMemcpyBatchAsync_v2": (
        c_void_p,  # destinations, sources, sizes: arrays of uint64
        c_void_p,
        c_void_p,
        c_size_t,
        POINTER(CopyAttributes),
        POINTER(c_size_t),
        c_size_t,
        c_void_p,
    ),
    "cuIpcGetMemHandle": (POINTER(IpcHandle), _ADDRESS),
    "cuIpcOpenMemHandle_v2": (POINTER(_ADDRESS), IpcHandle, c_uint),
    "cuIpcCloseMemHandle": (_ADDRESS,),
}


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverMissing(f"no CUDA driver here ({error})") from None
    library.cuGetErrorName.argtypes = (c_int, POINTER(c_char_p))
    for name, arguments in _SIGNATURES.items():
        try:
            getattr(library, name).argtypes = arguments
        except AttributeError:
            raise DriverMissing(f"this CUDA driver has no {name}: a driver of CUDA 13 is needed") from None
    status = library.cuInit(0)
    if status != _SUCCESS:
        raise DriverMissing(f"the CUDA driver finds no GPU that it can use: {_error_name(library, status)}")
    return library


def call(name: str, *arguments: Any) -> None:
    """Call a function of the driver. Releases the GIL.

    Raises:
        DriverMissing: there is none. CudaError: it failed.
    """
    library = _library()
    status = getattr(library, name)(*arguments)
    if status != _SUCCESS:
        raise CudaError(f"{name}: {_error_name(library, status)}", status)


def is_ready(name: str, *arguments: Any) -> bool:
    """Call a function that asks whether work is done.

    Raises:
        CudaError: the work failed.
    """
    library = _library()
    status = getattr(library, name)(*arguments)
    if status == _NOT_READY:
        return False
    if status != _SUCCESS:
        raise CudaError(f"{name}: {_error_name(library, status)}", status)
    return True


def _error_name(library: ctypes.CDLL, status: int) -> str:
    name = c_char_p()
    library.cuGetErrorName(status, ctypes.byref(name))
    return (name.value or b"unknown error").decode() + f" ({status})"
