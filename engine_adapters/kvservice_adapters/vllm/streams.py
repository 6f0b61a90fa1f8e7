"""streams: the engine's work on its GPU, and ours beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvservice_adapters.vllm.blocks import Fence


def fence_of(device: torch.device) -> Fence | None:
    """On the engine's thread: an event behind all that it has launched there so far; None for host memory."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


class OwnStream:
    """A stream that is not the engine's: what is done there does not wait for its steps. Nothing for host memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def current(self) -> Iterator[None]:
        """The calling thread's for a while."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            yield

    def wait_for(self, fence: Fence | None) -> None:
        """What is done there from now on comes after it."""
        if isinstance(fence, torch.cuda.Event) and self._stream is not None:
            self._stream.wait_event(fence)
