"""conftest: a daemon with the device plane, and engines with a KV cache on a GPU of host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

import kvservice_client as kv
from kvservice_client.device import CachePart, DeviceCache, DeviceKV
from tests.blocks import namespace
from tests.daemons import DaemonThread
from tests.devices import FakeGpu

LAYERS, PIECE, BLOCKS = 4, 1000, 16  # pieces that end on no boundary
BLOCK = 2 * LAYERS * PIECE


@dataclass
class Engine:
    """A KV cache of keys and values apart, one allocation per layer, with room before it; and its client."""

    gpu: FakeGpu
    client: kv.Client
    layers: list[int]
    cache: DeviceCache
    kv: DeviceKV

    def fill(self, seed: int = 0) -> None:
        for number, layer in enumerate(self.layers):
            random = np.random.default_rng(1000 * seed + number)
            self.gpu.array(layer)[:] = random.integers(0, 256, len(self.gpu.array(layer)), dtype=np.uint8)

    def block(self, block_id: int) -> bytes:
        """The bytes of one of its blocks, part by part."""
        parts = []
        for part in self.cache.parts:
            start, _ = self.gpu.allocation_of(part.address)
            first = part.address - start + block_id * part.block_stride_bytes
            parts.append(bytes(self.gpu.array(start)[first : first + part.size_bytes]))
        return b"".join(parts)

    def blocks(self, block_ids: Sequence[int]) -> list[bytes]:
        return [self.block(block_id) for block_id in block_ids]


MakeEngine = Callable[..., Engine]


@pytest.fixture
def daemon(make_daemon_thread: Callable[..., DaemonThread], gpu: FakeGpu) -> DaemonThread:
    return make_daemon_thread(driver=gpu.driver)


@pytest.fixture
def make_engine(gpu: FakeGpu, daemon: DaemonThread) -> Iterator[MakeEngine]:
    made: list[Engine] = []

    def make(*, exportable: bool = True, fill: bool = True) -> Engine:
        layers = [gpu.allocate(512 + 2 * BLOCKS * PIECE + 100, exportable=exportable) for _ in range(LAYERS)]
        cache = DeviceCache(
            BLOCKS,
            tuple(
                CachePart(layer + 512 + half * BLOCKS * PIECE, PIECE, PIECE, layer=number)
                for number, layer in enumerate(layers)
                for half in range(2)
            ),
        )
        client = kv.attach(namespace(block_size_bytes=BLOCK), socket_dir=daemon.socket_dir)
        engine = Engine(gpu, client, layers, cache, DeviceKV(client, cache, driver=gpu.driver))
        if fill:
            engine.fill()
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.kv.close()
        engine.client.close()
