"""streams: in whose order kernels and copies happen: torch's streams, some of our own, and events between them."""

from __future__ import annotations

from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol

import torch

from kvservice_cuda.api import CudaError
from kvservice_cuda.driver import Context, stream_handle


class Streams(Protocol):
    """On which stream a kernel is launched. The tests have their own."""

    def current(self) -> int:
        """The calling thread's stream, a CUstream."""
        ...

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Make a stream (torch's, or a CUstream) the calling thread's for a while."""
        ...


class TorchStreams:
    """Torch's, of one GPU."""

    def __init__(self, device: torch.device) -> None:
        """`device`: with its index: another thread has another current one."""
        self._device = device

    def current(self) -> int:
        """The calling thread's stream, a CUstream."""
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Make a stream (torch's, or a CUstream) the calling thread's for a while."""
        if isinstance(stream, int):
            stream = torch.cuda.ExternalStream(stream, device=self._device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(stream)


class Event:
    """A point in a stream's work. It goes with its last holder, so that nobody asks one that is gone."""

    def __init__(self, context: Context) -> None:
        """It is over until it is recorded. Raises CudaError."""
        self._context = context
        self.handle = context.event()

    def __del__(self) -> None:
        with suppress(CudaError):
            self._context.end_event(self.handle)

    def record(self, stream: Any) -> None:
        """It is over when what is on the stream now is done. Raises CudaError."""
        with self._context.current():
            self._context.record(self.handle, stream_handle(stream))

    def hold_up(self, stream: Any) -> None:
        """What is queued on the stream from now on waits for it. Raises CudaError."""
        with self._context.current():
            self._context.order_after(stream_handle(stream), self.handle)

    def wait(self) -> None:
        """Sleep until it is over. Blocks. Raises CudaError: what came before it failed."""
        self._context.await_event(self.handle)

    @property
    def has_passed(self) -> bool:
        """Whether what came before it runs no more: also where the GPU is lost."""
        try:
            return self._context.has_passed(self.handle)
        except CudaError as error:
            return error.is_fatal
