"""buffer_engine: what the tests run in processes of their own: a cache of small pieces on the GPU, and its buffer.

Commands come as JSON lines, answers go back the same way; everything else the process prints is its log.
"""

from __future__ import annotations

import hashlib
import time
from typing import Any

import torch

import kvservice_client as kv
from kvservice_adapters.gpu.buffer import HbmBuffer
from kvservice_adapters.gpu.kernels import BlockMover, KeyRows
from kvservice_adapters.positions import Rope, moved
from kvservice_client.device import DeviceCache
from tests.blocks import chain, namespace
from tests.gpu.engine import serve

DIM = 128
ROPE = Rope(tuple(10_000 ** (-pair / 64) for pair in range(64)))


class Engine:
    """A tensor [2, blocks, tokens, heads, 128] for each layer, one client, one buffer."""

    def attach(
        self, socket_dir: str, layers: int, blocks: int, tokens: int, heads: int, buffer_blocks: int, dtype: str
    ) -> str:
        element = getattr(torch, dtype)
        piece_bytes = tokens * heads * DIM * element.itemsize
        block_bytes = layers * 2 * piece_bytes
        self.tokens = tokens
        self.layers = [torch.empty(2, blocks, tokens, heads, DIM, dtype=element, device="cuda") for _ in range(layers)]
        of_engine = namespace("buffer", block_size_bytes=block_bytes, tokens_per_block=tokens)
        self.client = kv.attach(of_engine, socket_dir=socket_dir)
        self.buffer = HbmBuffer(
            self.client,
            layer_bytes=[2 * piece_bytes] * layers,
            size_bytes=buffer_blocks * block_bytes,
            device=torch.device("cuda"),
        )
        rows = tokens * heads
        keys = KeyRows(DIM, DIM, key_rows=rows, tokens=tokens, group_rows=rows, row_divisor=heads)
        parts = DeviceCache.of_tensors([[each[0], each[1]] for each in self.layers]).parts
        of_keys = dict.fromkeys(range(0, 2 * layers, 2), keys) if element is torch.bfloat16 else None
        self.mover = BlockMover(parts, dtype=element, device=torch.device("cuda"), keys=of_keys)
        self.stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        return self.buffer.plane.name

    def fill(self, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        for tensor in self.layers:
            tensor.copy_(torch.randn(tensor.shape, device="cuda", generator=generator))
        torch.cuda.synchronize()

    def poison(self) -> None:
        for tensor in self.layers:
            tensor.view(torch.uint8).fill_(0xA5)
        torch.cuda.synchronize()

    def digest(self, block_ids: list[int]) -> list[str]:
        torch.cuda.synchronize()
        blocks = [[each[:, block_id].contiguous() for each in self.layers] for block_id in block_ids]
        return [
            hashlib.sha256(b"".join(part.view(torch.uint8).cpu().numpy().tobytes() for part in block)).hexdigest()
            for block in blocks
        ]

    def save(self, chain_name: str, block_ids: list[int], session_id: str = "") -> int:
        """As many at once as the buffer takes; the stream overwrites what was gathered before it is saved."""
        hashes = chain(chain_name, len(block_ids))
        saved = 0
        for start in range(0, len(hashes), self.buffer.blocks):
            span = slice(start, start + self.buffer.blocks)
            with torch.cuda.stream(self.stream):
                gathered = self.buffer.gather(self.mover, block_ids[span])
                for tensor in self.layers:
                    tensor[:, block_ids[span]] = 0
            assert gathered is not None, "no room"
            parent = hashes[start - 1] if start else b""
            saved += self.buffer.save(gathered, hashes[span], parent=parent, session_id=session_id).saved
        return saved

    def load(self, chain_name: str, block_ids: list[int]) -> dict[str, Any]:
        """Load, with a stream that waits for each layer and then copies it: what it sees is what an engine would."""
        with torch.cuda.stream(self.stream):
            load = self.buffer.load(chain(chain_name, len(block_ids)), self.mover, block_ids)
            seen = []
            for layer, tensor in enumerate(self.layers):
                load.wait_layer(layer, self.stream)
                seen.append(tensor[:, block_ids].clone())
        self.stream.synchronize()
        has_failed = load.has_failed
        result = load.finish()
        same = all(torch.equal(a, tensor[:, block_ids]) for a, tensor in zip(seen, self.layers, strict=True))
        return {"blocks": result.blocks, "reason": result.reason.value, "waited_right": same, "failed": has_failed}

    def load_in_thread(self, chain_name: str, block_ids: list[int]) -> int:
        """As an engine that computes something else meanwhile: no stream waits, `finish` scatters."""
        return self.buffer.load(chain(chain_name, len(block_ids)), self.mover, block_ids).finish().blocks

    def start_load(self, chain_name: str, block_ids: list[int], deadline_s: float) -> int:
        hashes = chain(chain_name, len(block_ids))
        with torch.cuda.stream(self.stream):
            self.under_way = self.buffer.load(hashes, self.mover, block_ids, deadline_s=deadline_s)
        return self.under_way.blocks

    def wait_on_gpu(self) -> dict[str, Any]:
        """Let the stream wait for every layer of the load under way; how long it took to get past."""
        started_s = time.monotonic()
        for layer in range(len(self.layers)):
            self.under_way.wait_layer(layer, self.stream)
        self.stream.synchronize()
        seconds = time.monotonic() - started_s
        return {"seconds": seconds, "failed": self.under_way.has_failed, "blocks": self.under_way.finish().blocks}

    def turned_right(self, block_ids: list[int], kept: list[int], places: list[int]) -> dict[str, Any]:
        """Save a conversation, truncate it to the `kept` blocks, load these, and compare with what torch turns."""
        hashes = chain("talk", len(block_ids))
        before = [each[:, [block_ids[place] for place in kept]].clone() for each in self.layers]
        saved = self.save("talk", block_ids, session_id="talk")
        new = [hashlib.sha256(b"talk" + hashes[place]).digest() for place in kept]
        sinks = 1 if kept[0] == 0 else 0
        named = self.client.truncate("talk", new, drop_ratio=0.5, sink_blocks=sinks)
        self.poison()
        load = self.buffer.load(new, self.mover, places, session_id="talk", rope=ROPE)
        result = load.finish()
        torch.cuda.synchronize()
        tokens = torch.arange(self.tokens, device="cuda")
        right = [torch.equal(old[1], now[1, places]) for old, now in zip(before, self.layers, strict=True)]
        for old, now in zip(before, self.layers, strict=True):
            for number, place in enumerate(kept):
                expected = moved(
                    old[0, number].transpose(0, 1),
                    ROPE,
                    computed_at=place * self.tokens + tokens,
                    now_at=number * self.tokens + tokens,
                )
                right.append(torch.equal(expected, now[0, places[number]].transpose(0, 1)))
        shifts = list(load.shifts)
        return {
            "saved": saved,
            "held": named.held_blocks,
            "blocks": result.blocks,
            "shifts": shifts,
            "right": all(right),
        }

    def plane(self) -> str:
        return self.buffer.plane.name

    def free_blocks(self) -> int:
        return self.buffer.free_blocks

    def close(self) -> None:
        self.buffer.close()
        self.client.close()


if __name__ == "__main__":
    serve(Engine())
