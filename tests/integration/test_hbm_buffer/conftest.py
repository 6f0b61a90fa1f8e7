"""conftest: an engine whose cache is many small pieces, and its buffer, on a GPU of host memory; a daemon beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import kvservice_client as kv
from kvservice_adapters.gpu import loads
from kvservice_adapters.gpu.buffer import HbmBuffer
from tests.blocks import namespace
from tests.buffers import FakeMover, FakeStreams, tensor_of
from tests.daemons import DaemonThread
from tests.devices import FakeGpu

LAYERS, CACHE_BLOCKS, BUFFER_BLOCKS = 4, 40, 8
TOKENS, HEAD_DIM = 16, 8
KEYS = TOKENS * HEAD_DIM * 4
VALUES = 300
STRIDE = 900
BLOCK = LAYERS * (KEYS + VALUES)


@dataclass
class Engine:
    """A cache of an allocation per layer, keys (float32) and values of a block apart; its client, mover and buffer."""

    gpu: FakeGpu
    client: kv.Client
    streams: FakeStreams
    parts: list[list[torch.Tensor]]
    mover: FakeMover
    buffer: HbmBuffer

    @property
    def stream(self) -> int:
        """The one that the engine computes on."""
        return self.streams.default

    def fill(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        for keys, values in self.parts:
            floats = random.standard_normal((CACHE_BLOCKS, TOKENS * HEAD_DIM), np.float32)
            keys.copy_(torch.from_numpy(floats).view(torch.uint8))
            values.copy_(torch.from_numpy(random.integers(0, 256, values.shape, dtype=np.uint8)))

    def block(self, block_id: int, *, layer: int | None = None) -> bytes:
        """The bytes of one of its blocks, or of one of its layers."""
        chosen = self.parts if layer is None else [self.parts[layer]]
        return b"".join(bytes(part[block_id].numpy()) for of_layer in chosen for part in of_layer)

    def blocks(self, block_ids: Sequence[int]) -> list[bytes]:
        return [self.block(block_id) for block_id in block_ids]

    def save(self, hashes: Sequence[bytes], block_ids: Sequence[int], *, session_id: str = "") -> None:
        """As many at once as the buffer takes."""
        for start in range(0, len(hashes), BUFFER_BLOCKS):
            gathered = self.buffer.gather(self.mover, block_ids[start : start + BUFFER_BLOCKS])
            assert gathered is not None
            parent = hashes[start - 1] if start else b""
            some = hashes[start : start + BUFFER_BLOCKS]
            assert self.buffer.save(gathered, some, parent=parent, session_id=session_id).saved == len(some)

    def synchronize(self) -> None:
        self.gpu.driver.context(0).synchronize(self.stream)

    def stop_at(self, gate: threading.Event) -> None:
        """The engine's stream goes no further until the gate is open."""
        self.gpu.queue(self.stream, gate.is_set)


MakeEngine = Callable[..., Engine]


@pytest.fixture
def daemon(make_daemon_thread: Callable[..., DaemonThread], gpu: FakeGpu) -> DaemonThread:
    return make_daemon_thread(driver=gpu.driver)


@pytest.fixture
def make_engine(gpu: FakeGpu, daemon: DaemonThread) -> Iterator[MakeEngine]:
    made: list[Engine] = []

    def make(*, exportable: bool = True, buffer_blocks: int = BUFFER_BLOCKS, socket_dir: str = "") -> Engine:
        memory = [tensor_of(gpu, gpu.allocate(CACHE_BLOCKS * STRIDE)) for _ in range(LAYERS)]
        parts = [
            [each.as_strided((CACHE_BLOCKS, size), (STRIDE, 1), start) for start, size in ((4, KEYS), (600, VALUES))]
            for each in memory
        ]
        client = kv.attach(namespace(block_size_bytes=BLOCK), socket_dir=socket_dir or daemon.socket_dir)
        streams = FakeStreams(gpu)
        size_bytes = buffer_blocks * BLOCK + BLOCK // 2
        buffer = HbmBuffer(
            client,
            layer_bytes=[KEYS + VALUES] * LAYERS,
            size_bytes=size_bytes,
            device=torch.device("cpu"),
            driver=gpu.driver,
            memory=tensor_of(gpu, gpu.allocate(size_bytes, exportable=exportable)),
            streams=streams,
        )
        engine = Engine(gpu, client, streams, parts, FakeMover(gpu, streams, parts), buffer)
        engine.fill()
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.buffer.close()
        engine.client.close()


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    return make_engine()


@pytest.fixture
def every_layer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer is so small that the next is scattered with it."""
    monkeypatch.setattr(loads, "_SCATTER_BYTES_MIN", 1)
    monkeypatch.setattr(loads, "_SCATTER_BYTES_MAX", 1)
