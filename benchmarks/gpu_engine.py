"""gpu_engine: an engine's side of the GPU figures: a KV cache in one layout, and the ways to and from the service."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import torch

import kvservice_client as kv
from benchmarks.daemon import Daemon
from kvservice_adapters.gpu.buffer import HbmBuffer
from kvservice_adapters.gpu.kernels import BlockMover, KeyRows
from kvservice_adapters.positions import Rope
from kvservice_client.device import DeviceCache, DeviceKV

GIB, MIB = 1 << 30, 1 << 20
LAYERS, HEADS, TOKENS, DIM = 32, 8, 16, 128  # of Llama-3-8B, in bf16: a block has 2 MiB
BLOCK_BYTES = LAYERS * 2 * HEADS * TOKENS * DIM * 2
MOVED_BLOCKS, CACHE_BLOCKS = GIB // BLOCK_BYTES, 2048
BUFFER_BYTES = 3 * GIB
BUFFERED = ("per_layer", "split")
"""Layouts whose pieces go through the HBM buffer."""


class Engine:
    """A client and its KV cache in one layout."""

    def __init__(self, daemon: Daemon, layout: str) -> None:
        self.layout = layout
        self.tensors = tensors_of(layout)
        for tensor in self.tensors:
            tensor.random_(0, 256)
        namespace = kv.Namespace(sha256(layout.encode()).digest(), layout, BLOCK_BYTES, TOKENS, 32)
        self.client = kv.attach(namespace, socket_dir=daemon.socket_dir, instance_name=f"gpu {layout}")
        self.way: Straight | Buffered = (
            Buffered(self.client, self.tensors) if layout in BUFFERED else Straight(self.client, self.tensors)
        )
        scattered = random.Random(1).sample(range(CACHE_BLOCKS), CACHE_BLOCKS)  # no secret
        self.sources, self.destinations = scattered[:MOVED_BLOCKS], scattered[MOVED_BLOCKS : 2 * MOVED_BLOCKS]
        self.others = scattered[2 * MOVED_BLOCKS : 3 * MOVED_BLOCKS]

    @functools.cache  # noqa: B019  # as long-lived as the process; hashing is not what is timed
    def chain(self, name: str, blocks: int = MOVED_BLOCKS) -> list[bytes]:
        return [sha256(f"{self.layout}/{name}/{number}".encode()).digest() for number in range(blocks)]

    def save(self, name: str) -> float:
        """Seconds until 1 GiB is readable by others."""
        hashes = self.chain(name)
        started_s = time.perf_counter()
        saved = self.way.save(hashes, self.sources, session_id=name)
        elapsed_s = time.perf_counter() - started_s
        assert saved == MOVED_BLOCKS, saved
        return elapsed_s

    def load(self, name: str, into: list[int] | None = None) -> float:
        """Seconds until 1 GiB is in place."""
        hashes = self.chain(name)
        started_s = time.perf_counter()
        load = self.way.load(hashes, into or self.destinations)
        self.call_s = time.perf_counter() - started_s
        blocks = load()
        elapsed_s = time.perf_counter() - started_s
        assert blocks == MOVED_BLOCKS, blocks
        return elapsed_s

    def check(self) -> None:
        """What was loaded is what was saved, byte by byte."""
        torch.cuda.synchronize()
        for tensor in self.tensors:
            assert torch.equal(tensor[self.sources], tensor[self.destinations]), "wrong bytes"

    def close(self) -> None:
        self.client.forget_namespace()
        self.way.close()
        self.client.close()


def tensors_of(layout: str) -> list[torch.Tensor]:
    """The KV cache: uint8 [blocks, bytes] each, in the order of a block's bytes."""
    if layout == "contiguous":
        return [torch.empty(CACHE_BLOCKS, BLOCK_BYTES, dtype=torch.uint8, device="cuda")]
    if layout == "split":
        halves = [
            torch.empty(2, CACHE_BLOCKS, BLOCK_BYTES // LAYERS // 2, dtype=torch.uint8, device="cuda")
            for _ in range(LAYERS)
        ]
        return [half for of_layer in halves for half in of_layer]
    return [torch.empty(CACHE_BLOCKS, BLOCK_BYTES // LAYERS, dtype=torch.uint8, device="cuda") for _ in range(LAYERS)]


def parts_of(tensors: list[torch.Tensor]) -> DeviceCache:
    """The cache as the client takes it, layer by layer."""
    per_layer = max(1, len(tensors) // LAYERS)
    return DeviceCache.of_tensors([tensors[start : start + per_layer] for start in range(0, len(tensors), per_layer)])


class Straight:
    """The daemon copies into and out of the cache itself."""

    def __init__(self, client: kv.Client, tensors: list[torch.Tensor]) -> None:
        self.kv = DeviceKV(client, parts_of(tensors))
        assert self.kv.plane.name == "cuda-ipc", self.kv.plane

    def load(self, hashes: list[bytes], block_ids: list[int]) -> Callable[[], int]:
        load = self.kv.load(hashes, block_ids)
        return lambda: load.result().blocks

    def save(self, hashes: list[bytes], block_ids: list[int], *, session_id: str = "", parent: bytes = b"") -> int:
        return self.kv.save(hashes, block_ids, session_id=session_id, parent=parent).saved

    def close(self) -> None:
        self.kv.close()


class Buffered:
    """The daemon copies into and out of the HBM buffer, kernels of this process between it and the cache."""

    def __init__(self, client: kv.Client, tensors: list[torch.Tensor], *, rope: Rope | None = None) -> None:
        device = torch.device("cuda")
        self.buffer = HbmBuffer(
            client, layer_bytes=[BLOCK_BYTES // LAYERS] * LAYERS, size_bytes=BUFFER_BYTES, device=device
        )
        assert self.buffer.plane.name == "cuda-ipc", self.buffer.plane
        rows = HEADS * TOKENS
        keys = KeyRows(row_elements=DIM, head_dim=DIM, key_rows=rows, tokens=TOKENS, group_rows=rows, row_divisor=1)
        self.mover = BlockMover(
            parts_of(tensors).parts, dtype=torch.bfloat16, device=device, keys=keys if rope is not None else None
        )
        self.rope = rope
        # Not the one on which the benchmark multiplies: a load waits for what its stream has to do.
        self.stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def load(self, hashes: list[bytes], block_ids: list[int], *, session_id: str = "") -> Callable[[], int]:
        with torch.cuda.stream(self.stream):
            load = self.buffer.load(hashes, self.mover, block_ids, session_id=session_id, rope=self.rope)
        return lambda: load.finish().blocks

    def save(self, hashes: list[bytes], block_ids: list[int], *, session_id: str = "", parent: bytes = b"") -> int:
        with torch.cuda.stream(self.stream):
            gathered = self.buffer.gather(self.mover, block_ids)
        assert gathered is not None, "the buffer has no room"
        return self.buffer.save(gathered, hashes, session_id=session_id, parent=parent).saved

    def close(self) -> None:
        self.buffer.close()


class Large:
    """The reference: one pinned copy of 1 GiB."""

    def __init__(self) -> None:
        self.host = [torch.empty(GIB, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.device = [torch.empty(GIB, dtype=torch.uint8, device="cuda") for _ in range(2)]
        self.streams: list[Any] = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]

    def copy(self, *ways: str) -> float:
        """Seconds of these ways at once."""
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        for way in ways:
            place = int(way == "save")
            with torch.cuda.stream(self.streams[place]):
                ends = (self.device[place], self.host[place])
                destination, source = ends if way == "load" else ends[::-1]
                destination.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        return time.perf_counter() - started_s
