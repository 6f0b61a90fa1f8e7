"""buffers: an engine's cache and the kernels for it, on a GPU of host memory: what a buffer works with in tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvservice_adapters.gpu.turning import Turned
from kvservice_adapters.positions import RopeForm
from kvservice_cuda.driver import stream_handle
from tests.devices import FakeGpu


def tensor_of(gpu: FakeGpu, address: int) -> torch.Tensor:
    """The bytes of an allocation, by its start."""
    return torch.frombuffer(gpu.allocations[address], dtype=torch.uint8)


class FakeStreams:
    """Torch's streams on that GPU: one that is every thread's, until it makes another its own."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.default = gpu.new_stream()
        self._chosen = threading.local()

    def current(self) -> int:
        return int(getattr(self._chosen, "stream", self.default))

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before = self.current()
        self._chosen.stream = stream_handle(stream)
        try:
            yield
        finally:
            self._chosen.stream = before


class FakeMover:
    """Moves blocks when the stream that is current comes to it, as a kernel would.

    Attributes:
        launches: (stream, first layer, end layer) of every scatter.
        error: what launching raises from now on.
    """

    def __init__(self, gpu: FakeGpu, streams: FakeStreams, layers: Sequence[Sequence[torch.Tensor]]) -> None:
        """`layers`: for each its parts, uint8 [blocks, bytes] of any stride; the first of each has float32 keys."""
        self.layers = len(layers)
        self.block_size_bytes = sum(part.shape[1] for of_layer in layers for part in of_layer)
        self.launches: list[tuple[int, int, int]] = []
        self.error: Exception | None = None
        self._gpu = gpu
        self._streams = streams
        self._parts = layers

    def scatter(
        self,
        run: torch.Tensor,
        block_ids: torch.Tensor,
        *,
        first_layer: int,
        end_layer: int,
        turn: Turned | None = None,
    ) -> None:
        self._require(run, block_ids)
        self.launches.append((self._streams.current(), first_layer, end_layer))

        def step() -> bool:
            start = 0
            for layer, of_layer in enumerate(self._parts):
                for number, part in enumerate(of_layer):
                    if first_layer <= layer < end_layer:
                        moved = run[:, start : start + part.shape[1]].clone()
                        if turn is not None and number == 0:
                            _turn(moved, turn)
                        part[block_ids.long()] = moved
                    start += part.shape[1]
            return True

        self._gpu.queue(self._streams.current(), step)

    def gather(
        self, run: torch.Tensor, block_ids: torch.Tensor, *, first_layer: int = 0, end_layer: int | None = None
    ) -> None:
        self._require(run, block_ids)

        def step() -> bool:
            run.copy_(torch.cat([part[block_ids.long()] for of_layer in self._parts for part in of_layer], dim=1))
            return True

        self._gpu.queue(self._streams.current(), step)

    def _require(self, run: torch.Tensor, block_ids: torch.Tensor) -> None:
        if self.error is not None:
            raise self.error
        assert run.shape == (block_ids.numel(), self.block_size_bytes)
        assert run.is_contiguous()
        assert block_ids.dtype == torch.int32


def _turn(parts: torch.Tensor, turn: Turned) -> None:
    """Turn keys, float32 [tokens, head_dim] each, in place."""
    for part, row in zip(parts, turn.row.tolist(), strict=True):
        if row >= 0:
            keys = part.view(torch.float32).view(turn.tokens, -1)
            pairs = turn.rotary_dims // 2
            assert turn.form is RopeForm.HALF_SPLIT
            first, second = keys[:, :pairs].clone(), keys[:, pairs : 2 * pairs].clone()
            cosine, sine = turn.cosine[row], turn.sine[row]
            keys[:, :pairs] = first * cosine - second * sine
            keys[:, pairs : 2 * pairs] = second * cosine + first * sine
