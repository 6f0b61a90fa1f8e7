"""One save: in pieces, of which the next is being copied while the last is published."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvservice_client.client import Client
from kvservice_client.device.cache import DeviceCache
from kvservice_client.device.ipc import Call, IpcPlane, PendingSave, SourceGone
from kvservice_client.device.mapped import MappedPlane
from kvservice_client.errors import CapacityExhausted
from kvservice_client.outcomes import Reason, SaveResult

_PIECE_BYTES = 512 * 1024 * 1024
_PIECE_SHRINK = 8  # a full arena still takes a prefix, in smaller pieces


class Saving:
    """The pieces of one call, in chain order.

    Attributes:
        result: of the pieces that are done.
    """

    def __init__(
        self,
        client: Client,
        cache: DeviceCache,
        mapped: MappedPlane | None,
        ipc: IpcPlane | None,
        call: Call,
        hashes: Sequence[bytes],
        *,
        parent: bytes,
        is_source_kept: Callable[[], bool],
    ) -> None:
        """`ipc`: None where `mapped` serves."""
        self.result = SaveResult()
        self._client = client
        self._mapped = mapped
        self._ipc = ipc
        self._call = call
        self._hashes = hashes
        self._parent = parent
        self._is_source_kept = is_source_kept
        self._ends_at_s = time.monotonic() + call.deadline_s
        self._at_once = max(1, _PIECE_BYTES // cache.block_size_bytes)
        self._pending: PendingSave | None = None

    def run(self) -> None:
        """Save everything, or a prefix: `result` says how much. Blocks until the source may be overwritten.

        Raises:
            KVServiceError, CudaError, SourceGone: `result` has what was published before.
        """
        start, blocks = 0, len(self._hashes)
        try:
            while start < blocks:
                end = min(start + self._at_once, blocks)
                try:
                    self._begin(start, end)
                except CapacityExhausted:
                    self._finish()  # what was reserved for the piece before may leave room when it is known
                    if end - start == 1:
                        self.result = self.result.with_rest_refused(blocks, Reason.CAPACITY)
                        return
                    self._at_once = max(1, (end - start) // _PIECE_SHRINK)
                    continue
                start = end
                if self.result.refused:
                    break
            self._finish()
        except BaseException:
            if self._pending is not None and self._ipc is not None:
                self._ipc.drop_save(self._pending)
            raise
        if self.result.refused:
            self.result = self.result.with_rest_refused(blocks, Reason.PARENT_MISSING)

    def _begin(self, start: int, end: int) -> None:
        if not self._is_source_kept():
            raise SourceGone
        size = len(self._hashes[0])
        piece = replace(
            self._call,
            hashes=self._call.hashes[start * size : end * size],
            block_ids=self._call.block_ids[start:end],
            deadline_s=max(0.1, self._ends_at_s - time.monotonic()),
            parent=self._hashes[start - 1] if start else self._parent,
        )
        if self._ipc is not None:
            before, self._pending = self._pending, self._ipc.begin_save(piece)
            self._publish(before)
            return
        assert self._mapped is not None, "bound without a plane"
        with self._client.put(
            self._hashes[start:end],
            parent=piece.parent,
            session_id=piece.session_id,
            request_id=piece.request_id,
            deadline_s=piece.deadline_s,
        ) as reservation:
            self.result = self.result.plus(
                self._mapped.save(reservation, piece.block_ids, piece.deadline_s, self._is_source_kept)
            )

    def _finish(self) -> None:
        pending, self._pending = self._pending, None
        self._publish(pending)

    def _publish(self, pending: PendingSave | None) -> None:
        if pending is not None and self._ipc is not None:
            self.result = self.result.plus(self._ipc.finish_save(pending, self._is_source_kept))
