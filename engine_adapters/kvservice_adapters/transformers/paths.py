"""paths: how blocks' bytes get between the service and an engine's cache.

`HostPath` moves them through host memory: the CPU's way. `device_path` has the GPU's, where the daemon copies into and
out of GPU memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeAlias

import torch

import kvservice_client
from kvservice_adapters.positions import Rope
from kvservice_adapters.service import KVClient
from kvservice_adapters.transformers.layout import BlockLayout, KVRows
from kvservice_adapters.transformers.positions import move_keys
from kvservice_adapters.transformers.sequence import TrackedSequence
from kvservice_client.device import PlaneInUse

RowsFor: TypeAlias = Callable[[int], KVRows]
"""Makes room for so many leading blocks in an engine's cache; called at most once for a load."""


class Arrival(Protocol):
    """Leading blocks of a sequence on their way into an engine's cache. Of the engine's thread."""

    @property
    def blocks(self) -> int:
        """How many are coming; fewer than asked for where `finish` says why."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether they were all in the cache when this was made: no layer need be waited for."""
        ...

    def wait_layer(self, layer: int) -> None:
        """Let what this thread's stream does from now on find the layer in the cache. The CPU waits for nothing."""
        ...

    def finish(self) -> kvservice_client.LoadResult:
        """Wait until the blocks are in the cache, behind all that this thread's stream has to do.

        `blocks` of the result is 0 where they failed: what was computed from them is wrong. Blocks.
        """
        ...

    def cancel(self) -> None:
        """Go on without them; also where they arrived."""
        ...


class Ahead(Protocol):
    """Leading blocks that were asked for before it was known where they go."""

    @property
    def blocks(self) -> int:
        """How many are coming."""
        ...

    def into(self, rows_for: RowsFor, hashes: Sequence[bytes], *, wait_s: float, deadline_s: float) -> Arrival:
        """Let them go into a cache, and begin to load behind them what else of `hashes` is held; once.

        Args: as of `BlockPath.load`.
        """
        ...

    def cancel(self) -> None:
        """They are not needed."""
        ...


class Outgoing(Protocol):
    """Blocks that were copied out of an engine's cache, not yet saved."""

    @property
    def blocks(self) -> int:
        """How many."""
        ...

    def save(
        self, hashes: Sequence[bytes], *, parent: bytes, session_id: str, request_id: str, deadline_s: float
    ) -> kvservice_client.SaveResult:
        """Save them; once. Blocks: for the saving thread.

        Raises:
            KVServiceError: some clients raise it; nothing was saved.
        """
        ...


class BlockPath(Protocol):
    """`load`, `load_ahead` and `copy_out` are called by the engine's thread."""

    @property
    def plane(self) -> PlaneInUse:
        """How bytes travel at present, and why not better."""
        ...

    @property
    def outgoing_blocks_max(self) -> int:
        """How many blocks may be on their way out, at least 1."""
        ...

    @property
    def ahead_blocks_max(self) -> int:
        """How many blocks `load_ahead` may have room for; 0: it never has any."""
        ...

    @property
    def ahead_blocks_now(self) -> int:
        """How many it has room for at present."""
        ...

    def load(
        self, sequence: TrackedSequence, hashes: Sequence[bytes], rows_for: RowsFor, *, wait_s: float, deadline_s: float
    ) -> Arrival:
        """Begin to load the longest held prefix.

        Args:
            rows_for: asked for room for all of `hashes`, or for as many as came. Not asked where none did.
            wait_s: how long the service may wait for what is on NVMe; 0.0: no limit but the deadline.
            deadline_s: a load that takes longer has failed.

        Raises:
            KVServiceError: some clients raise it; nothing was loaded.
        """
        ...

    def load_ahead(self, sequence: TrackedSequence, hashes: Sequence[bytes], *, deadline_s: float) -> Ahead | None:
        """Begin to load before there is a cache for it; None: there is no room for that now."""
        ...

    def copy_out(self, rows: KVRows, first_block: int, count: int) -> Outgoing | None:
        """Copy so many blocks, or the first of them, out of a cache; None: there is no room now.

        The CPU waits for nothing, and later work of this thread's stream may overwrite the cache.
        """
        ...

    def prepare(self, *, blocks: int) -> None:
        """Pay now for what the first load of so many blocks would pay for otherwise. Blocks."""
        ...

    def close(self) -> None:
        """Nothing moves any more when this returns. Blocks."""
        ...


class Arrived:
    """Blocks that are in the cache."""

    is_complete = True

    def __init__(self, result: kvservice_client.LoadResult) -> None:
        self._result = result

    @property
    def blocks(self) -> int:
        """How many."""
        return self._result.blocks

    def wait_layer(self, layer: int) -> None:
        """Nothing to wait for."""

    def finish(self) -> kvservice_client.LoadResult:
        """What came."""
        return self._result

    def cancel(self) -> None:
        """Nothing to cancel."""


class Joined:
    """Leading blocks that were loaded ahead, and those behind them. What fails of either, fails all."""

    is_complete = False

    def __init__(self, leading: Arrival, rest: Arrival) -> None:
        self._leading = leading
        self._rest = rest

    @property
    def blocks(self) -> int:
        """How many are coming, of both."""
        return self._leading.blocks + self._rest.blocks

    def wait_layer(self, layer: int) -> None:
        """Let what this thread's stream does from now on find the layer of both in the cache."""
        self._leading.wait_layer(layer)
        self._rest.wait_layer(layer)

    def finish(self) -> kvservice_client.LoadResult:
        """Wait for both. Blocks."""
        leading, rest = self._leading.finish(), self._rest.finish()
        if not leading.blocks or rest.blocks < self._rest.blocks:
            return kvservice_client.LoadResult(0, rest.reason if leading.blocks else leading.reason)
        moved = [replace(run, first_block=run.first_block + leading.blocks) for run in rest.shifted]
        return kvservice_client.LoadResult(leading.blocks + rest.blocks, rest.reason, (*leading.shifted, *moved))

    def cancel(self) -> None:
        """Go on without both."""
        self._leading.cancel()
        self._rest.cancel()


class HostPath:
    """Through host memory, where the client copies: the CPU's cache, or a GPU's that the device plane cannot serve."""

    def __init__(
        self,
        client: KVClient,
        layout: BlockLayout,
        device: torch.device,
        *,
        rope: Rope | None,
        save_queue_size_bytes: int,
        why: str = "",
    ) -> None:
        """Args:
        rope: of the model whose saved keys may move; None: blocks that moved are not asked for.
        why: this path and not a better one; "": there is none.
        """
        self.plane = PlaneInUse("shared-memory", why)
        self._client = client
        self._layout = layout
        self._device = device
        self._rope = rope
        self.ahead_blocks_max = self.ahead_blocks_now = 0  # its loads are for the engine's thread to wait for
        self.outgoing_blocks_max = max(1, save_queue_size_bytes // layout.block_size_bytes)
        # Loaded blocks land here first; kept, because fresh memory costs page faults.
        self._landing = torch.empty(0, dtype=torch.uint8)
        self._landing_lock = threading.Lock()

    def load(
        self, sequence: TrackedSequence, hashes: Sequence[bytes], rows_for: RowsFor, *, wait_s: float, deadline_s: float
    ) -> Arrival:
        """Load; it is all there when this returns."""
        size_bytes = len(hashes) * self._layout.block_size_bytes
        with self._landing_lock:
            if self._landing.numel() < size_bytes:
                # More than needed: a conversation grows a little with every turn.
                self._grow_landing(size_bytes * 3 // 2)
            loaded = self._client.load(
                hashes,
                self._landing[:size_bytes],
                session_id=sequence.session_id,
                request_id=sequence.request_id,
                wait_s=wait_s,
                deadline_s=deadline_s,
                accepts_shifts=self._rope is not None,
            )
            if loaded.blocks:
                landed = self._landing[: loaded.blocks * self._layout.block_size_bytes].to(self._device)
                arrived = self._layout.as_blocks(landed)
                if self._rope is not None:
                    move_keys(arrived, self._rope, loaded.shifted)
                self._layout.scatter(arrived, 0, rows_for(loaded.blocks))
        return Arrived(loaded)

    def load_ahead(self, sequence: TrackedSequence, hashes: Sequence[bytes], *, deadline_s: float) -> Ahead | None:
        """There is no room."""
        return None

    def copy_out(self, rows: KVRows, first_block: int, count: int) -> Outgoing | None:
        """Copy on the cache's device; the way to the host is the saving thread's."""
        blocks = torch.empty(count * self._layout.block_size_bytes, dtype=torch.uint8, device=rows[0][0].device)
        self._layout.gather(rows, first_block, self._layout.as_blocks(blocks))
        copied: torch.cuda.Event | None = None
        if blocks.is_cuda:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(blocks.device))
        return _HostOutgoing(self._client, blocks, count, copied)

    def prepare(self, *, blocks: int) -> None:
        """Take the memory where so many blocks land."""
        with self._landing_lock:
            self._grow_landing(blocks * self._layout.block_size_bytes)
            self._landing.zero_()

    def close(self) -> None:
        """Nothing moves behind its back."""

    def _grow_landing(self, size_bytes: int) -> None:
        if self._landing.numel() < size_bytes:
            self._landing = torch.empty(size_bytes, dtype=torch.uint8)


class _HostOutgoing:
    def __init__(self, client: KVClient, memory: torch.Tensor, blocks: int, copied: torch.cuda.Event | None) -> None:
        # `copied`: behind which the bytes are in `memory`; None: they are, on the CPU.
        self._client = client
        self._memory = memory
        self.blocks = blocks
        self._copied = copied

    def save(
        self, hashes: Sequence[bytes], *, parent: bytes, session_id: str, request_id: str, deadline_s: float
    ) -> kvservice_client.SaveResult:
        if self._copied is not None:
            self._copied.synchronize()
        return self._client.save(
            hashes,
            self._memory.cpu(),
            parent=parent,
            session_id=session_id,
            request_id=request_id,
            deadline_s=deadline_s,
        )
