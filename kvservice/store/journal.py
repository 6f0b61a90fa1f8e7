"""Collects what the disks' journals have to be told, and tells them in batches."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from kvservice.blocks import NO_EXTENT, NO_ROW, NamespaceSpec, Rows
from kvservice.logs import event_log
from kvservice.nvme import RecordKind, record, records_array
from kvservice.sessions import session_key
from kvservice.store.disks import Disk, Disks
from kvservice.store.namespace import Namespace

_PENDING_MAX = 200_000
_APPEND_S_MAX = 5.0

_log = event_log(__name__)

PackedRecord = tuple[object, ...]


class Journal:
    """Pending records of every disk. The event loop owns it."""

    def __init__(self, disks: Disks, *, clock: Callable[[], float], wall_clock: Callable[[], float]) -> None:
        self._disks = disks
        self._clock = clock
        self._wall_clock = wall_clock
        self._appending: dict[Disk, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._pending: dict[Disk, list[PackedRecord]] = defaultdict(list)
        self._next: dict[Disk, asyncio.Task[None]] = {}
        self._under_way: set[asyncio.Task[None]] = set()
        self._folding: set[Disk] = set()
        self._kept: dict[Disk, int] = {}

    def stored(self, namespace: Namespace, row: int, parent_hash: bytes, extent: int, checksum: int) -> None:
        """The row's block is in the extent, flushed."""
        index = namespace.index
        self._add(
            RecordKind.STORED,
            namespace.spec,
            extent,
            block_hash=index.hash_of(row),
            parent=parent_hash,
            depth=int(index.depth[row]),
            uses=int(index.uses[row]),
            checksum=checksum,
            last_used_s=self._wall_s(float(index.last_used_s[row])),
        )

    def left(self, namespace: Namespace, extents: Iterable[int]) -> None:
        """The extents' blocks are gone for good."""
        for extent in extents:
            self._add(RecordKind.DROPPED, namespace.spec, extent)

    def touched(self, namespace: Namespace, rows: Rows, session_id: str) -> None:
        """A chain was used: its deepest block on NVMe stands for all before it."""
        if not self._disks:
            return
        index = namespace.index
        on_nvme = rows[index.extent[rows] != NO_EXTENT]
        if not len(on_nvme):
            return
        tip = int(on_nvme[-1])
        extent = int(index.extent[tip])
        self._add(
            RecordKind.TOUCHED,
            namespace.spec,
            extent,
            uses=int(index.uses[tip]),
            last_used_s=self._wall_s(float(index.last_used_s[tip])),
        )
        if session_id:
            self.session(namespace, extent, session_key(session_id))

    def session(self, namespace: Namespace, extent: int, session: Hashable) -> None:
        """The session of that key ends at the extent's block."""
        assert isinstance(session, bytes), "sessions are known by their key"
        self._add(RecordKind.SESSION, namespace.spec, extent, block_hash=session)

    def forgotten(self, namespace: Namespace, session: bytes) -> None:
        """The session of that key has no end any more, on whichever disk it had one."""
        for disk in self._disks.disks:
            forgotten = record(RecordKind.FORGOTTEN, namespace.spec, 0, block_hash=session)
            self._pend(disk, forgotten)

    def aliased(self, namespace: Namespace, rows: Rows) -> None:
        """These rows are aliases; those whose source is on NVMe are remembered, the others with their source."""
        for row, source in zip(rows.tolist(), namespace.index.source[rows].tolist(), strict=True):
            extent = int(namespace.index.extent[source])
            if extent != NO_EXTENT:
                parent = int(namespace.index.parent[row])
                self._add(
                    RecordKind.ALIASED,
                    namespace.spec,
                    extent,
                    block_hash=namespace.index.hash_of(row),
                    parent=b"" if parent == NO_ROW else namespace.index.hash_of(parent),
                    depth=int(namespace.index.depth[row]),
                    uses=int(namespace.index.depth[source]),
                    checksum=int(namespace.index.owner[row]),
                )

    def alias_left(self, namespace: Namespace, row: int) -> None:
        """The alias is about to leave the index."""
        extent = int(namespace.index.extent[namespace.index.source[row]])
        if extent != NO_EXTENT:
            block_hash = namespace.index.hash_of(row)
            self._add(RecordKind.UNALIASED, namespace.spec, extent, block_hash=block_hash)

    async def append(self, disk: Disk) -> None:
        """Make the disk's pending records durable, in their order.

        Raises:
            OSError: they are kept for later, and the disk takes no more blocks.
        """
        async with self._appending[disk]:
            await self._append_pending(disk)

    async def append_all(self) -> None:
        """Every disk's pending records, and a checkpoint where a log has grown long. Waits for no disk that hangs."""
        appends = [self._next_append(disk) for disk in self._disks.disks if disk.health.can_write]
        if appends:
            _, late = await asyncio.wait(appends, timeout=_APPEND_S_MAX)
            if late:
                _log.warning("journal_is_slow", why=f"records are not durable after {_APPEND_S_MAX:.0f} s")

    def _next_append(self, disk: Disk) -> asyncio.Task[None]:
        """The append that takes everything pending now: one may be under way, one more waits for it."""
        if disk not in self._next:
            self._next[disk] = asyncio.create_task(self._append_and_fold(disk))
        return self._next[disk]

    async def _append_and_fold(self, disk: Disk) -> None:
        async with self._appending[disk]:
            append = self._next.pop(disk)
            self._under_way.add(append)
            append.add_done_callback(self._under_way.discard)
            try:
                await self._append_pending(disk)
            except OSError:
                return
        if disk.volume.needs_fold and disk not in self._folding:
            self._folding.add(disk)
            folding = asyncio.get_running_loop().run_in_executor(None, disk.volume.journal.fold)
            folding.add_done_callback(lambda done: self._folded(disk, done))

    def forget(self, disk: Disk) -> None:
        """The disk begins anew: what it should have been told is void."""
        self._pending.pop(disk, None)
        self._kept.pop(disk, None)

    async def _append_pending(self, disk: Disk) -> None:
        pending = self._pending.pop(disk, [])
        if not pending:
            return

        def append() -> None:
            with disk.health.working(0):
                disk.volume.append(records_array(pending))

        try:
            await asyncio.get_running_loop().run_in_executor(None, append)
        except OSError as error:
            self._pending[disk][:0] = pending
            disk.health.refuse_writes(str(error))
            raise

    def _folded(self, disk: Disk, done: asyncio.Future[None]) -> None:
        self._folding.discard(disk)
        error = done.exception()
        if error is not None:
            disk.health.refuse_writes(f"checkpoint failed: {error}")

    def _add(self, kind: RecordKind, spec: NamespaceSpec, extent: int, **fields: Any) -> None:
        """Queue a record; `fields` as `nvme.record` takes them."""
        self._pend(self._disks.of(extent), record(kind, spec, self._disks.local(extent), **fields))

    def _pend(self, disk: Disk, packed: PackedRecord) -> None:
        pending = self._pending[disk]
        pending.append(packed)
        if len(pending) > _PENDING_MAX + self._kept.get(disk, 0):
            # The disk has been offline for long. What is lost is misses; that a block left is never lost: what was
            # forgotten would come back. There are no more of these than the disk has extents.
            older = pending[: -_PENDING_MAX // 2]
            pending[: -_PENDING_MAX // 2] = [one for one in older if one[0] == RecordKind.DROPPED]
            self._kept[disk] = len(pending) - _PENDING_MAX // 2

    def _wall_s(self, clock_s: float) -> float:
        return self._wall_clock() - (self._clock() - clock_s)
