"""direct_blocks: the engine's blocks in GPU memory, into and out of which the device plane copies.

For layouts whose blocks are few large pieces. A daemon that is late writes into the engine's own blocks: a load that
failed keeps them until it is quiet. One that is late with reading does no harm: what it read is not stored.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvservice_adapters.vllm.blocks import Fence, Filled, Owner, SaveCall, Source
from kvservice_adapters.vllm.keys import KeyTurner
from kvservice_adapters.vllm.layout import KVLayout
from kvservice_adapters.vllm.orders import LoadOrder
from kvservice_adapters.vllm.streams import OwnStream, fence_of
from kvservice_client import Client, SaveResult
from kvservice_client.device import CachePart, DeviceCache, DeviceKV, DeviceLoad, PlaneInUse

_log = logging.getLogger(__name__)


class DirectBlocks:
    """See the module, and BlockMemory."""

    def __init__(self, client: Client, layout: KVLayout, *, keys: KeyTurner | None = None, driver: Any = None) -> None:
        """Register the engine's cache with the daemon.

        Args:
            keys: turns those of blocks that moved, in place; None: such blocks are misses.
            driver: of the GPU; None: the machine's.

        Raises:
            InvalidRequest: the tensors are not on a GPU that can be used.
        """
        self.layout = layout
        self._keys = keys
        # One layer: the engine hears of a load when all of it is there.
        parts = tuple(CachePart(address, stride, size) for address, stride, size in layout.pieces)
        self._kv = DeviceKV(client, DeviceCache(layout.blocks, parts), driver=driver)
        self._turning = OwnStream(layout.device)

    @property
    def plane(self) -> PlaneInUse:
        """How bytes travel at present."""
        return self._kv.plane

    def fence(self) -> Fence | None:
        """See BlockMemory."""
        return fence_of(self.layout.device)

    def fill(self, order: LoadOrder, after: Fence | None, timeout_s: float) -> Filled:
        """See BlockMemory."""
        if after is not None:
            after.synchronize()
        load = self._kv.load(
            order.hashes,
            order.block_ids,
            first=order.first,
            session_id=order.session_id,
            request_id=order.request_id,
            deadline_s=timeout_s,
            accepts_shifts=order.is_truncated and self._keys is not None,
        )
        try:
            return self._finished(order, load, timeout_s)
        except Exception:  # noqa: BLE001  # whatever it was: the blocks are the load's until it is quiet
            load.cancel()  # no stream waits for it, and nothing of it counts; it may write on
            _log.exception("a load failed in an unexpected way")
            return Filled(0, "internal", is_quiet=lambda: load.is_quiet)

    def sources(self, blocks: Sequence[tuple[Sequence[int], Owner]]) -> list[Source]:
        """See BlockMemory."""
        after = self.fence()
        return [_DirectSource(self._kv, block_ids, owner, after) for block_ids, owner in blocks]

    def later_source(self, block_ids: Sequence[int], owner: Owner) -> Source:
        """See BlockMemory."""
        return _DirectSource(self._kv, block_ids, owner, None)

    def close(self) -> None:
        """See BlockMemory."""
        self._kv.close()

    def _finished(self, order: LoadOrder, load: DeviceLoad, timeout_s: float) -> Filled:
        result = load.result(timeout_s)
        moved = 0
        if result.blocks and self._keys is not None:
            places = range(order.first, order.first + result.blocks)
            with self._turning.current():
                moved = self._keys.turn(order.block_ids[: result.blocks], places, load.shifts[: result.blocks])
        return Filled(result.blocks, result.reason.value, moved, is_quiet=lambda: load.is_quiet)


@dataclass(frozen=True, slots=True)
class _DirectSource:
    kv: DeviceKV
    block_ids: Sequence[int]
    owner: Owner
    after: Fence | None
    needs_blocks: bool = True

    def save(self, call: SaveCall) -> SaveResult:
        """See Source."""
        if self.after is not None:
            self.after.synchronize()
        return self.kv.save(
            call.hashes,
            self.block_ids,
            parent=call.parent,
            session_id=call.session_id,
            request_id=call.request_id,
            deadline_s=call.deadline_s,
            is_source_kept=lambda: self.owner.keeps_blocks,
        )

    def discard(self) -> None:
        """See Source."""
