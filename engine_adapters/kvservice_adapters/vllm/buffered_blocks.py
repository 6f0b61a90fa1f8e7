"""buffered_blocks: the engine's blocks in GPU memory, by way of a buffer beside them.

For layouts whose blocks are many small pieces. The service writes into the buffer and reads from it, and never touches
the engine's blocks: a load that failed leaves them alone at once, and those that are saved are free when a kernel has
gathered them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvservice_adapters.gpu.buffer import Gathered, HbmBuffer, Mover
from kvservice_adapters.gpu.parts import KeyRows
from kvservice_adapters.positions import Rope, UnsupportedPositions
from kvservice_adapters.vllm.blocks import Fence, Filled, Owner, SaveCall, Source
from kvservice_adapters.vllm.keys import GatheredKeys, KeyTurner, StridedKeys
from kvservice_adapters.vllm.layout import KVLayout, Region
from kvservice_adapters.vllm.orders import LoadOrder
from kvservice_adapters.vllm.streams import OwnStream, fence_of
from kvservice_client import Reason, SaveResult
from kvservice_client.device import CachePart
from kvservice_cuda.api import CudaError

_PORTION_SHRINK = 4


def parts_of(layout: KVLayout) -> tuple[CachePart, ...]:
    """The regions, each with the layer that it is of, by the order of the engine's layers."""
    layers: dict[int, int] = {}
    return tuple(
        CachePart(
            region.address,
            region.stride_bytes,
            region.size_bytes,
            layer=layers.setdefault(region.tensor.data_ptr(), len(layers)),
        )
        for region in layout.regions
    )


def layer_bytes_of(layout: KVLayout) -> tuple[int, ...]:
    """Of a block, how many bytes each layer has."""
    sizes: Counter[int] = Counter()
    for part in parts_of(layout):
        sizes[part.layer] += part.size_bytes
    return tuple(sizes[layer] for layer in range(len(sizes)))


def key_rows_of(layout: KVLayout, keys: KeyTurner) -> dict[int, KeyRows]:
    """How keys lie in each region, by its place in the layout.

    Raises:
        UnsupportedPositions: they are no rows in one of them.
    """
    return {at: _key_rows(region, keys) for at, region in enumerate(layout.regions)}


def _key_rows(region: Region, keys: KeyTurner) -> KeyRows:
    of_layer = keys.layers.get(region.tensor.data_ptr())
    if not isinstance(of_layer, GatheredKeys | StridedKeys):
        raise UnsupportedPositions("where keys stand in a layer is not known as rows")
    view = of_layer.view
    _, heads, tokens, head_dim = view.shape
    block_stride, head_stride, token_stride, _ = view.stride()
    row_elements = region.tensor.shape[-1]
    # Where heads lie further apart than blocks, each head's part of a block is a region of its own.
    heads = heads if head_stride < block_stride else 1
    return KeyRows(
        row_elements=row_elements,
        head_dim=head_dim,
        key_rows=region.size_bytes // (row_elements * view.element_size()),
        tokens=tokens,
        group_rows=heads * tokens,
        row_divisor=heads if heads > 1 and token_stride > head_stride else 1,
    )


class BufferedBlocks:
    """See the module, and BlockMemory."""

    def __init__(self, buffer: HbmBuffer, mover: Mover, layout: KVLayout, *, rope: Rope | None = None) -> None:
        """Use that buffer from now on, and close it in the end.

        Args:
            mover: between it and the engine's cache.
            rope: how the mover turns keys of blocks that moved; None: such blocks are misses.
        """
        self.layout = layout
        self._buffer = buffer
        self._mover = mover
        self._rope = rope
        self.blocks_at_once = max(1, buffer.blocks // 2)
        """How many of a step are gathered at most: loads want room too."""
        self.blocks_later = max(1, buffer.blocks // 4)
        """How many a thread that saves gathers at most before it gives room back: others want some too."""
        self._loading, self._saving = OwnStream(layout.device), OwnStream(layout.device)

    def fence(self) -> Fence | None:
        """See BlockMemory."""
        return fence_of(self.layout.device)

    def fill(self, order: LoadOrder, after: Fence | None, timeout_s: float) -> Filled:
        """See BlockMemory."""
        with self._loading.current():
            # The daemon copies meanwhile; what is scattered waits for this stream.
            self._loading.wait_for(after)
            load = self._buffer.load(
                order.hashes,
                self._mover,
                order.block_ids,
                session_id=order.session_id,
                request_id=order.request_id,
                deadline_s=timeout_s,
                rope=self._rope if order.is_truncated else None,
                first_place=order.first,
            )
            try:
                result = load.finish(timeout_s)
            except BaseException:
                load.cancel()  # nothing is scattered when this returns
                raise
        moved = sum(run.blocks for run in result.shifted)
        return Filled(result.blocks, result.reason.value, moved)

    def sources(self, blocks: Sequence[tuple[Sequence[int], Owner]]) -> list[Source]:
        """See BlockMemory."""
        if not blocks:
            return []
        sizes = [len(block_ids) for block_ids, _ in blocks]
        together = [block_id for block_ids, _ in blocks for block_id in block_ids]
        # One kernel for all: a launch for each request of a step would cost the engine's thread more than the copies.
        gathered = self._buffer.gather(self._mover, together) if sum(sizes) <= self.blocks_at_once else None
        if gathered is None:
            after = self.fence()
            return [_LaterSource(self, block_ids, owner, after) for block_ids, owner in blocks]
        return [_GatheredSource(self, part) for part in gathered.split(sizes)]

    def later_source(self, block_ids: Sequence[int], owner: Owner) -> Source:
        """See BlockMemory."""
        return _LaterSource(self, block_ids, owner, None)

    def gather_now(self, block_ids: Sequence[int]) -> Gathered | None:
        """Off the engine's thread; the blocks are free when this returns. None: no room now, or the GPU fails."""
        with self._saving.current():
            gathered = self._buffer.gather(self._mover, block_ids)
        if gathered is not None:
            try:
                gathered.after.wait()
            except CudaError:
                self._buffer.discard(gathered)
                return None
        return gathered

    def save_gathered(self, gathered: Gathered, call: SaveCall) -> SaveResult:
        """Store what was gathered, and give its place in the buffer back. Blocks."""
        return self._buffer.save(
            gathered,
            call.hashes,
            parent=call.parent,
            session_id=call.session_id,
            request_id=call.request_id,
            deadline_s=call.deadline_s,
        )

    def discard(self, gathered: Gathered) -> None:
        """Give its place in the buffer back."""
        self._buffer.discard(gathered)

    def close(self) -> None:
        """See BlockMemory."""
        self._buffer.close()


@dataclass(frozen=True, slots=True)
class _GatheredSource:
    """Blocks that are in the buffer, as far as the engine's stream is concerned."""

    memory: BufferedBlocks
    gathered: Gathered
    needs_blocks: bool = False

    def save(self, call: SaveCall) -> SaveResult:
        """See Source."""
        return self.memory.save_gathered(self.gathered, call)

    def discard(self) -> None:
        """See Source."""
        self.memory.discard(self.gathered)


@dataclass(frozen=True, slots=True)
class _LaterSource:
    """Blocks that are gathered when it is their turn, in as many portions as the buffer has room for."""

    memory: BufferedBlocks
    block_ids: Sequence[int]
    owner: Owner
    after: Fence | None
    needs_blocks: bool = True

    def save(self, call: SaveCall) -> SaveResult:
        """See Source."""
        if self.after is not None:
            self.after.synchronize()
        ends_at_s = time.monotonic() + call.deadline_s
        blocks, start, at_once = len(call.hashes), 0, self.memory.blocks_later
        result = SaveResult()
        while start < blocks:
            end = min(start + at_once, blocks)
            with self.owner.reading() as is_allowed:
                gathered = self.memory.gather_now(self.block_ids[start:end]) if is_allowed else None
            if gathered is None:
                if not is_allowed or end - start == 1:
                    return result.with_rest_refused(blocks, Reason.OVERLOADED if is_allowed else Reason.CHANGED)
                at_once = max(1, (end - start) // _PORTION_SHRINK)
                continue
            portion = replace(
                call,
                hashes=call.hashes[start:end],
                parent=call.hashes[start - 1] if start else call.parent,
                deadline_s=max(0.1, ends_at_s - time.monotonic()),
            )
            saved = self.memory.save_gathered(gathered, portion)
            result = result.plus(saved)
            if saved.refused:
                return result.with_rest_refused(blocks, saved.reason)
            start = end
        return result

    def discard(self) -> None:
        """See Source."""
