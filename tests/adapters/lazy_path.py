"""lazy_path: a path as the GPU's, on the CPU: a layer reaches the cache where it is waited for, or garbage does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

import kvservice_client as kv
from kvservice_adapters.transformers import BlockLayout, KVRows, TrackedSequence
from kvservice_adapters.transformers.paths import Ahead, Arrival, Arrived, HostPath, Joined, RowsFor


class LazyArrival:
    """Blocks in memory of their own, which are not in the cache before a layer is waited for."""

    is_complete = False

    def __init__(self, path: LazyPath, memory: torch.Tensor, loaded: kv.LoadResult, *, first: int, fails: bool) -> None:
        self.blocks = loaded.blocks - first
        self.waited: list[int] = []
        self.is_cancelled = False
        self._path = path
        self._first = first
        self._arrived = path.layout.as_blocks(memory)[first : loaded.blocks]
        self._loaded = loaded
        self._fails = fails
        self._rows: KVRows = []

    def into(self, rows_for: RowsFor, hashes: Sequence[bytes], *, wait_s: float, deadline_s: float) -> Arrival:
        rows = rows_for(len(hashes))
        self.put(rows)
        rest = self._path.begin(hashes, first=self.blocks) if self.blocks < len(hashes) else None
        if rest is None:
            return self
        rest.put(rows)
        return Joined(self, rest)

    def put(self, rows: KVRows) -> None:
        self._rows = rows
        for pair in rows:
            for part in pair:
                part[:, self._tokens] = torch.nan

    @property
    def _tokens(self) -> slice:
        tokens = self._path.layout.tokens_per_block
        return slice(self._first * tokens, (self._first + self.blocks) * tokens)

    def wait_layer(self, layer: int) -> None:
        self.waited.append(layer)
        heads, tokens, head_dim = self._path.layout.block_shape[2:]
        for part, row in enumerate(self._rows[layer]):
            blocks = self._arrived[:, layer, part] * (-1 if self._fails else 1)
            row[:, self._tokens].view(heads, self.blocks, tokens, head_dim).copy_(blocks.transpose(0, 1))

    def finish(self) -> kv.LoadResult:
        for layer in set(range(self._path.layout.layers)) - set(self.waited):
            self.wait_layer(layer)
        return kv.LoadResult(0, kv.Reason.CHANGED) if self._fails else replace(self._loaded, blocks=self.blocks)

    def cancel(self) -> None:
        self.is_cancelled = True


class LazyPath(HostPath):
    """Loads as the GPU's path does.

    Attributes:
        fails: whether the loads that begin now fail, which is not known before the end.
        ahead_blocks_max, ahead_blocks_now: room for loads ahead; none unless a test makes some.
        loads: what was begun so far, loads ahead included.
        loads_ahead: of these, the ones that were begun ahead.
    """

    def __init__(self, client: kv.Client, layout: BlockLayout) -> None:
        device = torch.device("cpu")
        super().__init__(client, layout, device, rope=None, save_queue_size_bytes=1 << 30)
        self.fails = False
        self.layout = layout
        self.loads: list[LazyArrival] = []
        self.loads_ahead: list[LazyArrival] = []
        self._kv = client

    def load(
        self, sequence: TrackedSequence, hashes: Sequence[bytes], rows_for: RowsFor, *, wait_s: float, deadline_s: float
    ) -> Arrival:
        load = self.begin(hashes)
        if load is None:
            return Arrived(kv.LoadResult())
        load.put(rows_for(len(hashes)))
        return load

    def load_ahead(self, sequence: TrackedSequence, hashes: Sequence[bytes], *, deadline_s: float) -> Ahead | None:
        load = self.begin(hashes)
        self.loads_ahead += [load] if load else []
        return load

    def begin(self, hashes: Sequence[bytes], *, first: int = 0) -> LazyArrival | None:
        memory = torch.empty(len(hashes) * self.layout.block_size_bytes, dtype=torch.uint8)
        loaded = self._kv.load(hashes, memory)
        if loaded.blocks <= first:
            return None
        load = LazyArrival(self, memory, loaded, first=first, fails=self.fails)
        self.loads.append(load)
        return load
