"""The NVMe tier's life under a store: open, recover, keep up, close."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from kvservice.config import Config
from kvservice.nvme import Files, Volume
from kvservice.store import recovery
from kvservice.store.disks import Disk, Disks
from kvservice.store.journal import Journal
from kvservice.store.registry import Registry
from kvservice.store.write_behind import WriteBehind

_JOURNAL_INTERVAL_S = 1.0


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
        loop = asyncio.get_running_loop()
        for directory in filter(None, self._config.nvme_dirs.split(":")):
            capacity, segment = self._config.nvme_bytes, self._config.nvme_segment_bytes
            depth = self._config.nvme_queue_depth
            opening = partial(
                Volume.open,
                directory,
                capacity_bytes=capacity,
                segment_bytes=segment,
                calls_at_once=depth,
                files=self._files,
            )
            volume = await loop.run_in_executor(None, opening)
            disk = Disk(
                volume,
                depth=depth,
                waiting_max=self._config.nvme_waiting_max,
                bytes_per_s_max=self._config.nvme_bytes_per_s_max,
            )
            self._disks.disks.append(disk)

    async def recover(self) -> None:
        """Find again what the disks hold; DRAM serves meanwhile."""
        loop = asyncio.get_running_loop()
        found = []
        for disk in self._disks.disks:
            try:
                found.append((disk, await loop.run_in_executor(None, disk.volume.recover)))
            except OSError as error:
                disk.fail(f"recovery failed, restart the daemon when the device works: {error}")
        restoring = partial(recovery.restore, self._disks, found, now_s=self._clock(), wall_now_s=self._wall_clock())
        restored = await loop.run_in_executor(None, restoring)
        for one in restored:
            namespace = self._registry.restore_namespace(one.spec)
            self._disks.release(one.orphans)
            if namespace is not None:
                self._journal.left(namespace, one.orphans)  # or a later start would find them again
            if namespace is None:
                self._disks.release(one.index.extent[one.coldest_first].tolist())
            else:
                recovery.adopt(namespace, one, self._clock())
        for disk, _ in found:
            disk.recovered()
        self.recovered_blocks = sum(len(one.coldest_first) for one in restored)
        self._write_what_waited()

    async def record(self) -> None:
        """What left the store until now stays away after a restart too, if its disk can be written to."""
        await self._journal.append_all()

    async def close(self) -> None:
        """Wait for transfers under way, then close and unlock the directories."""
        for disk in self._disks.disks:
            await disk.close()

    async def keep_up(self) -> None:
        """One round: disks that came back, records that wait, checkpoints."""
        if any([await disk.came_back() for disk in self._disks.disks]):
            self._write_what_waited()
        if self._clock() >= self._journal_at_s:
            self._journal_at_s = self._clock() + _JOURNAL_INTERVAL_S
            await self._journal.append_all()

    def _write_what_waited(self) -> None:
        for namespace in self._registry.namespaces.values():
            self._write_behind.submit_missing(namespace)
