"""engine: what the tests run in processes of their own: a client with a KV cache of torch tensors on the GPU.

Commands come as JSON lines, answers go back the same way; everything else the process prints is its log.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

import kvservice_client as kv
from kvservice_client.device import DeviceCache, DeviceKV
from kvservice_cuda.driver import Driver
from tests.blocks import chain, namespace


class Engine:
    """One KV cache and one client."""

    def attach(
        self,
        socket_dir: str,
        layout: str,
        layers: int,
        blocks: int,
        tokens: int = 16,
        heads: int = 8,
        dim: int = 128,
        dtype: str = "bfloat16",
        name: str = "gpu",
    ) -> dict[str, Any]:
        self.layout = layout
        element = getattr(torch, dtype)
        size_bytes = layers * 2 * tokens * heads * dim * element.itemsize
        if layout == "contiguous":
            self.whole = torch.empty(blocks, layers, 2, tokens, heads, dim, dtype=element, device="cuda")
            self.cache = DeviceCache.of_tensors([[self.whole]])
        else:
            # An allocation of torch's begins before the tensor: the offset inside it must be right.
            self.before = torch.empty(1 << 12, device="cuda")
            shape = (2, blocks, tokens, heads, dim) if layout == "split" else (blocks, 2, tokens, heads, dim)
            self.layers = [torch.empty(shape, dtype=element, device="cuda") for _ in range(layers)]
            if layout == "split":
                self.cache = DeviceCache.of_tensors([[each[0], each[1]] for each in self.layers])
            else:
                self.cache = DeviceCache.of_tensors([[each] for each in self.layers])
        self.client = kv.attach(namespace(name, block_size_bytes=size_bytes), socket_dir=socket_dir)
        self.kv = DeviceKV(self.client, self.cache)
        return {"plane": self.kv.plane.name, "why": self.kv.plane.why, "block_size_bytes": size_bytes}

    def use_expandable_segments(self) -> None:
        """As some engines do: torch then takes memory by cuMemCreate."""
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")  # the only way at run time

    def fill(self, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        for tensor in self._tensors():
            tensor.view(torch.uint8).random_(0, 256, generator=generator)
        torch.cuda.synchronize()

    def poison(self) -> None:
        for tensor in self._tensors():
            tensor.view(torch.uint8).fill_(0xA5)
        torch.cuda.synchronize()

    def digest(self, block_ids: list[int]) -> list[str]:
        """Each block's bytes as sums that tell any two of them apart."""
        import hashlib  # noqa: PLC0415

        torch.cuda.synchronize()
        sums = []
        for block_id in block_ids:
            parts = [self._block(tensor, block_id) for tensor in self._tensors()]
            sums.append(hashlib.sha256(b"".join(parts)).hexdigest())
        return sums

    def save(self, chain_name: str, block_ids: list[int]) -> dict[str, Any]:
        result = self.kv.save(chain(chain_name, len(block_ids)), block_ids)
        return {"saved": result.saved, "held": result.held, "reason": result.reason.value}

    def load(self, chain_name: str, block_ids: list[int]) -> dict[str, Any]:
        """Load, with a stream that waits for each layer and then copies it: what it sees is what an engine would."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        load = self.kv.load(chain(chain_name, len(block_ids)), block_ids)
        seen = []
        for layer in range(self.cache.parts[-1].layer + 1):
            load.wait_layer(layer, stream)
            if self.layout != "contiguous":
                with torch.cuda.stream(stream):
                    seen.append(self.layers[layer].clone())
        stream.synchronize()
        result = load.result()
        now = self.layers if seen else []
        same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(seen, now, strict=True))
        return {"blocks": result.blocks, "reason": result.reason.value, "waited_right": same, "quiet": load.is_quiet}

    def start_load(self, chain_name: str, block_ids: list[int], deadline_s: float) -> int:
        self.under_way = self.kv.load(chain(chain_name, len(block_ids)), block_ids, deadline_s=deadline_s)
        return self.under_way.blocks

    def wait_on_gpu(self, layer: int) -> dict[str, Any]:
        """Let a stream wait for the load under way; how long it took to get past."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        started_s = time.monotonic()
        self.under_way.wait_layer(layer, stream)
        stream.synchronize()
        return {"seconds": time.monotonic() - started_s, "failed": self.under_way.has_failed}

    def loads_for_ever(self, chain_name: str, blocks: int) -> None:
        """Load until somebody ends the process; answers before the first."""
        print(json.dumps({"answer": "started"}), flush=True)  # noqa: T201  # the answer
        while True:
            self.kv.load(chain(chain_name, blocks), list(range(blocks))).result()

    def plane(self) -> str:
        return self.kv.plane.name

    def quiet(self, timeout_s: float) -> bool:
        return self.under_way.wait_quiet(timeout_s)

    def close(self) -> None:
        self.kv.close()
        self.client.close()

    def free_gpu_bytes(self) -> int:
        return Driver().context(0).free_bytes()

    def _tensors(self) -> list[torch.Tensor]:
        return [self.whole] if self.layout == "contiguous" else self.layers

    def _block(self, tensor: torch.Tensor, block_id: int) -> bytes:
        part = tensor[:, block_id] if self.layout == "split" else tensor[block_id]
        return bytes(part.contiguous().view(torch.uint8).cpu().numpy().tobytes())


def serve(engine: object) -> None:
    """Do what the test says, until its pipe closes."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"answer": getattr(engine, request.pop("command"))(**request)}
        except Exception as error:  # noqa: BLE001  # the test shows it
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer), flush=True)  # noqa: T201  # the answer


if __name__ == "__main__":
    serve(Engine())
