"""The NVMe tier's life under a store: open, recover, keep up, close."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from kvservice.blocks import NO_EXTENT, NO_SLOT, DropReason
from kvservice.config import Config
from kvservice.errors import StartupError
from kvservice.logs import event_log
from kvservice.nvme import CountedFiles, Files, Volume
from kvservice.store import recovery
from kvservice.store.disk_health import Place
from kvservice.store.disks import Disk, Disks, in_thread
from kvservice.store.journal import Journal
from kvservice.store.registry import Registry
from kvservice.store.write_behind import WriteBehind

_JOURNAL_INTERVAL_S = 1.0
_KEEP_UP_INTERVAL_S = 0.1
_SLICE_BLOCKS = 512

_log = event_log(__name__)


class Durability:
    """Opens the configured directories and brings back what they hold."""

    def __init__(
        self,
        config: Config,
        disks: Disks,
        journal: Journal,
        write_behind: WriteBehind,
        registry: Registry,
        *,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        files: Files,
    ) -> None:
        self._config = config
        self._files = files
        self._disks = disks
        self._journal = journal
        self._write_behind = write_behind
        self._registry = registry
        self._clock = clock
        self._wall_clock = wall_clock
        self._journal_at_s = float("-inf")
        self.recovered_blocks = 0

    async def open(self) -> None:
        """Lock and open the NVMe directories; `recover` makes them usable. Raises StartupError."""
        for directory in filter(None, self._config.nvme_dirs.split(":")):
            files = CountedFiles(self._files)
            self._disks.disks.append(
                Disk(
                    await self._volume(directory, files),
                    files,
                    depth=self._config.nvme_queue_depth,
                    waiting_max=self._config.nvme_waiting_max,
                    bytes_per_s_max=self._config.nvme_bytes_per_s_max,
                )
            )

    async def recover(self) -> None:
        """Find again what the disks hold; DRAM serves meanwhile."""
        self.recovered_blocks = await self._recover(self._disks.disks)
        self._write_what_waited()

    async def record(self) -> None:
        """What left the store until now stays away after a restart too, if its disk can be written to."""
        await self._journal.append_all()

    async def close(self) -> None:
        """Wait for transfers under way, then close and unlock the directories."""
        for disk in self._disks.disks:
            await disk.close()

    async def run(self) -> None:
        """Keep up until cancelled. A task of its own: a disk that hangs must hold up nothing else."""
        while True:
            await self.keep_up()
            await asyncio.sleep(_KEEP_UP_INTERVAL_S)

    async def keep_up(self) -> None:
        """One round: disks that fail or came back, records that wait, checkpoints."""
        for disk in self._disks.disks:
            disk.note_wear()
            disk.health.watch()
            if disk.health.can_read:
                await self._look_after(disk)
            if disk.health.is_probe_due:
                await self._try(disk)
        if not self._disks.can_write:
            self._write_behind.give_up()
        if self._clock() >= self._journal_at_s:
            self._journal_at_s = self._clock() + _JOURNAL_INTERVAL_S
            await self._journal.append_all()

    async def _volume(self, directory: str, files: Files) -> Volume:
        config = self._config
        opening = partial(
            Volume.open,
            directory,
            capacity_bytes=config.nvme_bytes,
            segment_bytes=config.nvme_segment_bytes,
            calls_at_once=config.nvme_queue_depth,
            files=files,
        )
        return await asyncio.get_running_loop().run_in_executor(None, opening)

    async def _recover(self, disks: Sequence[Disk]) -> int:
        """Adopt what these disks hold; how many blocks. Those that cannot be read go offline."""
        loop = asyncio.get_running_loop()
        found = []
        for disk in disks:
            try:
                recovered = await loop.run_in_executor(None, disk.volume.recover)
            except OSError as error:
                disk.health.fail(f"recovery failed: {error}")
                continue
            found.append((disk, recovered))
            if recovered.is_damaged:
                _log.warning(
                    "nvme_index_damaged",
                    directory=disk.volume.directory,
                    blocks=len(recovered.hashes),
                    lost_blocks=recovered.lost_blocks,
                    damaged_pages=recovered.damaged_pages,
                )
        restoring = partial(recovery.restore, self._disks, found, now_s=self._clock(), wall_now_s=self._wall_clock())
        restored = await loop.run_in_executor(None, restoring)
        for one in restored:
            namespace = self._registry.restore_namespace(one.spec)
            lost = list(one.orphans)
            # Another disk may have taken blocks while this one was read: their index stays.
            is_free = namespace is not None and bool((namespace.index.extent == NO_EXTENT).all())
            if not is_free:
                lost += one.index.extent[one.coldest_first].tolist()
            self._disks.release(lost)
            if namespace is not None:
                self._journal.left(namespace, lost)  # or a later start would find them again
                if is_free:
                    recovery.adopt(namespace, one, self._clock())
        for disk, _ in found:
            disk.health.recovered()
        return sum(len(one.coldest_first) for one in restored)

    # -------------------------------------------------- directories that go and come

    async def _look_after(self, disk: Disk) -> None:
        """An open file outlives its directory: what is written to it then is lost."""
        try:
            place = await in_thread(disk.health.place)
        except OSError as error:
            disk.health.fail(f"the directory is gone: {error}")
            return
        if place is Place.ANOTHER:
            disk.health.fail("another directory is in its place")

    async def _try(self, disk: Disk) -> None:
        """Bring a disk back that failed, if it works again."""
        if disk.health.hanging_s:
            disk.health.probe_failed(f"an access has not ended for {disk.health.hanging_s:.0f} s")
            return
        try:
            place = await in_thread(disk.health.place)
        except OSError as error:
            disk.health.probe_failed(str(error))
            return
        if place is Place.OURS and disk.health.is_recovered:
            if await disk.came_back():
                self._write_what_waited()
        elif disk.transfers.running or self._write_behind.is_busy:
            disk.health.probe_failed("accesses are still under way")
        else:
            await self._begin_anew(disk, place)

    async def _begin_anew(self, disk: Disk, place: Place) -> None:
        """The books say nothing of what is in the directory: another one is in its place, or recovery failed.

        Old blocks are lost. What the directory holds is used if nothing else is on NVMe: otherwise its index would have
        to be merged with a large one, for which the event loop has no time.
        """
        await self._forget(disk)
        try:
            if place is Place.ANOTHER:
                old = disk.replace(await self._volume(disk.volume.directory, disk.files))
                await in_thread(old.close)
                await in_thread(disk.health.look)
            is_alone = all(
                (namespace.index.extent == NO_EXTENT).all() for namespace in self._registry.namespaces.values()
            )
            blocks = await self._recover([disk]) if is_alone else await self._begin_empty(disk)
        except (OSError, StartupError) as error:
            disk.health.probe_failed(str(error))
            return
        if disk.health.can_write:
            _log.info("nvme_begun_anew", directory=disk.volume.directory, blocks=blocks)
            self._write_what_waited()

    async def _begin_empty(self, disk: Disk) -> int:
        found = await asyncio.get_running_loop().run_in_executor(None, disk.volume.recover)
        disk.volume.release(found.extent.tolist())
        disk.health.recovered()
        return 0

    async def _forget(self, disk: Disk) -> None:
        """Nothing in the books is on this disk any more."""
        for namespace in list(self._registry.namespaces.values()):
            index = namespace.index
            rows = np.flatnonzero(index.extent != NO_EXTENT)
            rows = rows[self._disks.segments(disk, index.extent[rows]) >= 0]
            rows = rows[np.argsort(-index.depth[rows], kind="stable")]
            extents = index.extent[rows].tolist()
            for number, (row, extent) in enumerate(zip(rows.tolist(), extents, strict=True), 1):
                if number % _SLICE_BLOCKS == 0:
                    await asyncio.sleep(0)  # others' calls; what they changed is looked at again
                if index.extent[row] != extent:
                    continue
                if index.slot[row] == NO_SLOT:
                    namespace.drop_subtrees([row], DropReason.CORRUPT, self._clock())
                else:
                    namespace.leave_nvme(row)
        self._journal.forget(disk)

    def _write_what_waited(self) -> None:
        for namespace in self._registry.namespaces.values():
            self._write_behind.submit_missing(namespace)
