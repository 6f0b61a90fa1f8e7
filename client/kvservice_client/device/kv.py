"""What an engine with a GPU calls: load and save blocks of its KV cache, on the plane that works here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvservice_client.client import Client
from kvservice_client.device.cache import DeviceCache
from kvservice_client.device.ipc import Call, IpcPlane, LoadUnanswered, NotExportable, SourceGone
from kvservice_client.device.load import DeviceLoad, Watchdog
from kvservice_client.device.mapped import MappedPlane
from kvservice_client.device.saving import Saving
from kvservice_client.errors import InvalidRequest, KVServiceError
from kvservice_client.link import Link
from kvservice_client.outcomes import Reason, SaveResult
from kvservice_cuda.api import CudaError
from kvservice_cuda.driver import Driver
from kvservice_proto.v1 import kvservice_pb2 as pb

_CALL_TIMEOUT_S = 10.0
_TEXT_MAX = 200


@dataclass(frozen=True, slots=True)
class PlaneInUse:
    """How bytes travel: "cuda-ipc", "mapped" or "none", of adapters "shared-memory" too; and why not better.

    Attributes:
        why: "" where it is the best there is.
    """

    name: str
    why: str = ""

    def __str__(self) -> str:
        """For people."""
        return f"{self.name} ({self.why})" if self.why else self.name


class DeviceKV:
    """One KV cache in GPU memory, of one client. Thread-safe. Fail-open: a failure of the service is a miss."""

    def __init__(self, client: Client, cache: DeviceCache, *, driver: Driver | None = None) -> None:
        """Find the GPU of the cache. It is registered with the daemon now, and with every later one.

        The tensors must outlive this object, and `close` must come before they are freed.

        Raises:
            InvalidRequest: the cache does not fit the namespace, or is not in the memory of a GPU.
        """
        if cache.block_size_bytes != client.namespace.block_size_bytes:
            raise InvalidRequest(
                f"a block of the cache has {cache.block_size_bytes} bytes, one of the namespace "
                f"{client.namespace.block_size_bytes}"
            )
        self.cache = cache
        self._client = client
        self._driver = driver or Driver()
        try:
            ordinals = {self._driver.ordinal_at(part.address) for part in cache.parts}
            if len(ordinals) != 1:
                raise InvalidRequest(f"the cache is on GPUs {sorted(ordinals)}: register one cache per GPU")
            self._context = self._driver.context(ordinals.pop())
        except CudaError as error:
            raise InvalidRequest(f"the cache cannot be used: {error}") from None
        self._watchdog = Watchdog()
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._ipc: IpcPlane | None = None
        self._mapped: MappedPlane | None = None
        self._why = ""
        self.plane  # noqa: B018  # register now, not under the first request

    @property
    def plane(self) -> PlaneInUse:
        """The plane in use with the present daemon. Registers the cache if that has not happened yet."""
        try:
            ipc = self._bound(self._client.link)
        except (KVServiceError, CudaError) as error:
            return PlaneInUse("none", str(error))
        return PlaneInUse(IpcPlane.name) if ipc is not None else PlaneInUse(MappedPlane.name, self._why)

    @property
    def transfers_under_way(self) -> int:
        """Loads, and saves that were given up, whose copies may still move bytes."""
        return self._watchdog.under_way

    def load(
        self,
        hashes: Sequence[bytes],
        block_ids: Sequence[int],
        *,
        first: int = 0,
        session_id: str = "",
        request_id: str = "",
        wait_s: float = 0.0,
        deadline_s: float = _CALL_TIMEOUT_S,
        after: int = 0,
        accepts_shifts: bool = False,
    ) -> DeviceLoad:
        """Begin to copy the longest held prefix into the engine's blocks. Blocks until that has begun, not longer.

        The destination belongs to the load until it `is_quiet`, also where it failed: give it to nobody else before.

        Args:
            hashes: chain of n hashes, root first.
            block_ids: where each block from `first` on goes.
            first: so many leading blocks are not copied: the engine has them.
            wait_s: how long to wait for blocks from NVMe, as a plan says; what comes later is a miss. 0.0: deadline_s.
            deadline_s: a load that has not arrived by then has failed, and no stream waits for it any more.
            after: a CUevent to wait for first, where work on the GPU may still use the destination; 0: there is none.
            accepts_shifts: the caller rotates the keys of blocks that moved, as the load's `shifts` say; without it
                they are misses.

        Raises:
            InvalidRequest: the arguments do not fit.
        """
        call = Call(
            self._client.pack(hashes),
            self._checked(hashes, block_ids, first=first),
            session_id,
            request_id,
            deadline_s,
            first=first,
            wait_s=wait_s,
            accepts_shifts=accepts_shifts,
        )
        if not len(call.block_ids):
            return DeviceLoad(None, None, 0, Reason.OK)
        try:
            self._await(after)
            ipc = self._bound(self._client.link)
            if ipc is not None:
                return ipc.load(call)
            assert self._mapped is not None, "bound without a plane"
            lease = self._client.get(
                hashes,
                session_id=session_id,
                request_id=request_id,
                wait_s=wait_s,
                deadline_s=deadline_s,
                accepts_shifts=accepts_shifts,
            )
            try:
                return self._mapped.load(lease, call.block_ids, deadline_s, first=first)
            except BaseException:
                lease.release()
                raise
        except InvalidRequest:
            raise
        except LoadUnanswered as unanswered:
            return unanswered.load
        except (KVServiceError, CudaError) as error:
            return DeviceLoad(None, None, 0, self._reason_of(error))

    def save(
        self,
        hashes: Sequence[bytes],
        block_ids: Sequence[int],
        *,
        parent: bytes = b"",
        session_id: str = "",
        request_id: str = "",
        deadline_s: float = _CALL_TIMEOUT_S,
        after: int = 0,
        is_source_kept: Callable[[], bool] = lambda: True,
    ) -> SaveResult:
        """Store blocks that are not held yet. Blocks until the source may be overwritten: for a thread of its own.

        Args:
            block_ids: where each block is.
            parent: hash of the block before the first; b"" where the chain starts.
            after: a CUevent behind which the blocks' bytes are written; 0: they are.
            is_source_kept: asked when bytes were read, before they are published: whether the source was these blocks'
                until now. Once it says no, nothing more is published, so that a source may be given away at any time.

        Raises:
            InvalidRequest: the arguments do not fit.
        """
        ids = self._checked(hashes, block_ids)
        call = Call(self._client.pack(hashes), ids, session_id, request_id, deadline_s)
        if not hashes:
            return SaveResult()
        try:
            self._await(after)
            ipc = self._bound(self._client.link)
        except (KVServiceError, CudaError) as error:
            return SaveResult().with_rest_refused(len(hashes), self._reason_of(error))
        work = Saving(
            self._client, self.cache, self._mapped, ipc, call, hashes, parent=parent, is_source_kept=is_source_kept
        )
        try:
            work.run()
        except SourceGone:
            return work.result.with_rest_refused(len(hashes), Reason.CHANGED)
        except InvalidRequest:
            raise
        except (KVServiceError, CudaError) as error:
            return work.result.with_rest_refused(len(hashes), self._reason_of(error))
        return work.result

    def close(self) -> None:
        """End it: nothing touches the cache when this returns. Blocks. May be called twice."""
        with self._lock:
            ipc, self._ipc, self._link = self._ipc, None, None
            mapped, self._mapped = self._mapped, None
        if ipc is not None:
            ipc.close()
        if mapped is not None:
            mapped.close()
        self._watchdog.stop()

    def _bound(self, link: Link) -> IpcPlane | None:
        """Register with this link's daemon if that has not happened; None: the mapped plane serves.

        Raises:
            KVServiceError: try again later. CudaError: there is no plane.
        """
        with self._lock:
            if self._link is link:
                return self._ipc
            self._ipc, self._why = None, ""
            try:
                self._ipc = IpcPlane(link, self.cache, self._driver, self._context, self._watchdog)
            except NotExportable as error:
                self._why = str(error)
                self._tell_unavailable(link)
            except (InvalidRequest, CudaError) as error:
                self._why = str(error)
            if self._ipc is None and self._mapped is None:
                self._mapped = MappedPlane(self.cache, self._context, self._watchdog)
            self._link = link
            return self._ipc

    def _tell_unavailable(self, link: Link) -> None:
        """So that the daemon's pages can say why this engine does not use the better plane."""
        request = pb.RegisterDeviceRequest(
            namespace_id=link.welcome.namespace_ids[0], unavailable=self._why[:_TEXT_MAX]
        )
        link.call("RegisterDevice", request, _CALL_TIMEOUT_S)

    def _checked(self, hashes: Sequence[bytes], block_ids: Sequence[int], *, first: int = 0) -> NDArray[np.uint32]:
        if not 0 <= first <= len(hashes) or len(block_ids) != len(hashes) - first:
            raise InvalidRequest(f"{len(block_ids)} block ids for {len(hashes)} hashes from place {first} on")
        if isinstance(block_ids, range):  # as a buffer's run is
            ids = np.arange(block_ids.start, block_ids.stop, block_ids.step)
        else:
            ids = np.array(block_ids, dtype=np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.cache.blocks:
            raise InvalidRequest(f"a block id is out of bounds: the cache has {self.cache.blocks} blocks")
        return ids.astype(np.uint32)

    def _await(self, event: int) -> None:
        if event:
            self._context.await_event(event)

    def _reason_of(self, error: KVServiceError | CudaError) -> Reason:
        return Reason.INTERNAL if isinstance(error, CudaError) else self._client.reason_of(error)
