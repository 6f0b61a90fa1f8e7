"""vllm_engine: a process with KV tensors in the layouts of vLLM's GPU backends, and the vLLM adapter's loads and saves.

vLLM itself is not imported: what the worker's half makes of the engine's tensors is made here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import kvservice_client as kv
from kvservice_adapters.positions import Rope, RopeForm, moved
from kvservice_adapters.vllm.counters import Counters
from kvservice_adapters.vllm.gpu_blocks import gpu_blocks
from kvservice_adapters.vllm.keys import KeyTurner, LayerKeys, layer_keys
from kvservice_adapters.vllm.layout import layout_of
from kvservice_adapters.vllm.orders import LoadOrder, SaveOrder
from kvservice_adapters.vllm.transfers import Loads, Saves
from tests.blocks import chain, namespace
from tests.gpu.engine import serve
from tests.waiting import eventually

BLOCKS, LAYERS = 32, 4


def caches_of(layout: str, *, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Each layer's tensor, in the engine's order of dimensions."""
    row = 2 * dim
    make: dict[str, Callable[[], list[torch.Tensor]]] = {
        # By layer, tokens of a head side by side (HND), or heads of a token (NHD).
        "hnd": lambda: [_empty(dtype, BLOCKS, heads, tokens, row) for _ in range(LAYERS)],
        "nhd": lambda: [_empty(dtype, BLOCKS, tokens, heads, row).transpose(1, 2) for _ in range(LAYERS)],
        # A block's layers side by side.
        "across layers": lambda: list(_empty(dtype, BLOCKS, LAYERS, heads, tokens, row).transpose(0, 1)),
        # Each head has a tensor's part of its own.
        "heads first": lambda: [_empty(dtype, heads, BLOCKS, tokens, row).transpose(0, 1) for _ in range(LAYERS)],
        # Two kernel blocks to each of the engine's.
        "small kernel blocks": lambda: [_empty(dtype, 2 * BLOCKS, heads, tokens // 2, row) for _ in range(LAYERS)],
        # Keys and values in halves of the tensor: their keys are not known to the adapter.
        "halves": lambda: [_empty(dtype, 2, BLOCKS, tokens, heads, dim) for _ in range(LAYERS)],
    }
    return make[layout]()


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


class Engine:
    """KV tensors, a client, and the adapter's transfers between them."""

    def attach(
        self,
        socket_dir: str,
        layout: str,
        *,
        heads: int = 8,
        tokens: int = 16,
        dim: int = 128,
        dtype: str = "bfloat16",
        form: str = "HALF_SPLIT",
        rotary_dims: int = 128,
        load_timeout_s: float = 20.0,
    ) -> str:
        """Which way the blocks take."""
        self.dim, self.tokens = dim, tokens
        self.is_split = layout == "halves"
        self.caches = caches_of(layout, heads=heads, tokens=tokens, dim=dim, dtype=getattr(torch, dtype))
        self.rope = Rope(tuple(500_000.0 ** (-2 * pair / dim) for pair in range(rotary_dims // 2)), RopeForm[form])
        found = layout_of({f"layer {number}": tensor for number, tensor in enumerate(self.caches)}, blocks=BLOCKS)
        self.client = kv.attach(
            namespace(layout, block_size_bytes=found.block_size_bytes, tokens_per_block=tokens), socket_dir=socket_dir
        )
        self.memory, way = gpu_blocks(self.client, found, None if self.is_split else self._keys())
        self.counters = Counters()
        self.saves = Saves(self.memory, self.counters, threads=2, waiting_max=64, timeout_s=20.0)
        self.loads = Loads(self.memory, self.counters, threads=2, timeout_s=load_timeout_s)
        self.failed: set[int] = set()
        self.over: set[str] = set()
        return way

    def fill(self, seed: int) -> None:
        """Numbers of which no two blocks have the same; `kept` has them too."""
        generator = torch.Generator("cuda").manual_seed(seed)
        for tensor in self.caches:
            tensor.normal_(generator=generator)
        self.kept = [tensor.clone() for tensor in self.caches]
        torch.cuda.synchronize()

    def poison(self) -> None:
        for tensor in self.caches:
            tensor.fill_(-7.0)

    def save(self, chain_name: str, block_ids: list[int], *, first: int = 0, session_id: str = "") -> None:
        """Order a save, as after a step; `first` as in SaveOrder."""
        hashes = tuple(chain(chain_name, len(block_ids), start=first))
        self.saves.order([SaveOrder(chain_name, session_id, hashes, first, tuple(block_ids))])

    def save_many(self, chains: dict[str, list[int]]) -> None:
        """One step's saves of several requests."""
        self.saves.order(
            [SaveOrder(name, "", tuple(chain(name, len(ids))), 0, tuple(ids)) for name, ids in chains.items()]
        )

    def are_free(self, chain_name: str) -> bool:
        """Whether the blocks of the saves so far may be another request's."""
        return self.saves.take_done({chain_name}) == {chain_name}

    def held(self, chain_name: str, blocks: int) -> int:
        return self.client.lookup(chain(chain_name, blocks)).blocks

    def truncate(self, session_id: str, chain_name: str, blocks: int, drop: int, new_name: str) -> int:
        """Name what follows the first `drop` blocks anew; how many of those are held."""
        keep = [(drop * self.tokens, blocks * self.tokens)]
        new = chain(new_name, blocks - drop)
        return self.client.truncate(session_id, new, source=chain(chain_name, blocks), keep=keep).held_blocks

    def start_load(
        self, chain_name: str, first: int, block_ids: list[int], *, session_id: str = "", is_truncated: bool = False
    ) -> None:
        hashes = tuple(chain(chain_name, first + len(block_ids)))
        order = LoadOrder(chain_name, session_id, hashes, first, tuple(block_ids), is_truncated)
        self.loads.order(order, self.memory.fence())

    def is_over(self, chain_name: str) -> bool:
        ended = self.loads.ended()
        self.failed |= ended.failed_block_ids
        self.over |= ended.request_ids
        return chain_name in self.over

    def load(self, chain_name: str, first: int, block_ids: list[int], **how: Any) -> list[int]:
        """Load and wait; the blocks that were not filled."""
        self.over.discard(chain_name)
        self.start_load(chain_name, first, block_ids, **how)
        eventually(lambda: self.is_over(chain_name))
        failed, self.failed = self.failed, set()
        return sorted(failed)

    def unquiet(self) -> int:
        """Loads that failed, and whose blocks may still be written into."""
        return len(self.loads._unquiet)

    def failed_blocks(self) -> list[int]:
        return sorted(self.failed)

    def differing(
        self, block_ids: list[int], kept_ids: list[int], *, first: int = 0, shift_tokens: int = 0
    ) -> list[int]:
        """Those of these blocks that are not, bit by bit, what `kept` has under the other ids.

        Args:
            first: place of the first of them in its request.
            shift_tokens: by how much its tokens moved: keys must be what `positions.moved` makes of them.
        """
        torch.cuda.synchronize()
        found = []
        for place, (block_id, kept_id) in enumerate(zip(block_ids, kept_ids, strict=True), first):
            same = True
            for now, before in zip(self.caches, self.kept, strict=True):
                mine, theirs = self._block(now, block_id), self._block(before, kept_id).clone()
                if shift_tokens:
                    now_at = (
                        torch.arange(self.tokens, device="cuda").view(-1, 1, theirs.shape[-2]) + place * self.tokens
                    )
                    keys = theirs[..., : self.dim]
                    theirs[..., : self.dim] = moved(keys, self.rope, computed_at=now_at - shift_tokens, now_at=now_at)
                same = same and torch.equal(mine, theirs)
            if not same:
                found.append(block_id)
        return found

    def untouched(self, but: list[int]) -> bool:
        """Whether all other blocks are as `poison` left them."""
        torch.cuda.synchronize()
        others = [block_id for block_id in range(BLOCKS) if block_id not in but]
        return all(bool((self._block(tensor, each) == -7.0).all()) for tensor in self.caches for each in others)

    def counts(self) -> dict[str, float]:
        return self.counters.take()

    def close(self) -> None:
        self.saves.stop()
        self.loads.stop()
        self.memory.close()
        self.client.close()

    def _block(self, tensor: torch.Tensor, block_id: int) -> torch.Tensor:
        """[kernel blocks, heads, tokens, 2 * dim], or what `halves` has instead; a view."""
        if self.is_split:
            return tensor[:, block_id]
        per_block = tensor.shape[0] // BLOCKS
        return tensor[per_block * block_id : per_block * (block_id + 1)]

    def _keys(self) -> KeyTurner:
        layers: dict[int, LayerKeys] = {
            tensor.data_ptr(): layer_keys(tensor, backend="FLASH_ATTN", head_dim=self.dim, write=_unused)
            for tensor in self.caches
        }
        kernel_blocks, _, kernel_tokens, _ = self.caches[0].shape
        device = self.caches[0].device
        return KeyTurner(self.rope, layers, device, kernel_blocks=kernel_blocks // BLOCKS, kernel_tokens=kernel_tokens)


def _unused(keys: torch.Tensor, cache: torch.Tensor) -> None:
    raise AssertionError("only the CPU backend is asked where it writes keys")


if __name__ == "__main__":
    serve(Engine())
