"""The NVMe tier: its disks, and what extents are where."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from kvservice.blocks import NamespaceSpec, Tier
from kvservice.errors import CapacityExhausted
from kvservice.lookahead import Throughput
from kvservice.nvme import PLACE_BITS, CountedFiles, Throttle, Volume
from kvservice.store.disk_health import Health
from kvservice.store.disk_wear import Wear
from kvservice.tiers import DiskUsage, TierUsage
from kvservice.transfers import Priority, TransferQueue

Result = TypeVar("Result")

_VOLUME_SHIFT = 56  # an extent number is its volume's position, then the volume's own number
_LOCAL = (1 << _VOLUME_SHIFT) - 1
_ACCESS_S_MAX = 10.0
_VERIFYING_THREADS = 2
"""Beside those at the device: what they read is verified, and what they write prepared, while it is busy."""


async def in_thread(work: Callable[[], Result]) -> Result:
    """The result of a short access to a disk, which may hang. Raises OSError; TimeoutError is one."""
    async with asyncio.timeout(_ACCESS_S_MAX):
        return await asyncio.get_running_loop().run_in_executor(None, work)


@dataclass(slots=True)
class Moved:
    """What went to and fro since the start."""

    read_bytes: int = 0
    read_s: float = 0.0
    admitted_bytes: int = 0
    """Of blocks written and recorded."""
    write_s: float = 0.0
    checksum_failures: int = 0


class Disk:
    """One volume, its queue, and how it is doing. The event loop owns it."""

    def __init__(
        self, volume: Volume, files: CountedFiles, *, depth: int, waiting_max: int, bytes_per_s_max: int = 0
    ) -> None:
        """Blocks for a moment.

        Args:
            files: what the volume stands on.
            depth: calls that the device gets side by side.
            waiting_max: bound on transfers that have not started.
            bytes_per_s_max: bound on its bandwidth; 0: none.
        """
        threads = depth + _VERIFYING_THREADS
        self.volume = volume
        self.health = Health(volume.directory)
        self.moved = Moved()
        self.files = files
        status = os.statvfs(volume.directory)
        self._device_bytes = status.f_blocks * status.f_frsize
        self._wear = Wear(self._device_bytes, time.monotonic())
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="nvme")
        self.transfers = TransferQueue(self._executor, depth=threads, waiting_max=waiting_max)
        self.throttle = Throttle(bytes_per_s_max)
        self.reads, self.writes = Throughput(), Throughput()
        self.health.on_offline.add(self._give_up_waiting)

    @property
    def read_bytes_per_s(self) -> float:
        """As measured; before the first read as writes were; 0.0: nothing is known."""
        return self.reads.bytes_per_s or self.writes.bytes_per_s

    @property
    def wait_s(self) -> float:
        """How long a Get that comes now waits for its turn; 0.0 where the rate is unknown."""
        rate = self.read_bytes_per_s
        return self.transfers.bytes_before(Priority.GET) / rate if rate else 0.0

    def note_wear(self) -> None:
        """To be called every now and then."""
        self._wear.note(self.files.written_bytes, time.monotonic())

    def usage(self) -> DiskUsage:
        """How full, busy and worn it is. For any thread."""
        usage, moved, written_bytes, now_s = self.volume.usage(), self.moved, self.files.written_bytes, time.monotonic()
        return DiskUsage(
            directory=self.volume.directory,
            state=self.health.state.value,
            why=self.health.why,
            capacity_bytes=usage.capacity_bytes,
            used_bytes=usage.used_bytes,
            device_bytes=self._device_bytes,
            read_bytes=moved.read_bytes,
            read_s=moved.read_s,
            written_bytes=written_bytes,
            admitted_bytes=moved.admitted_bytes,
            write_s=moved.write_s,
            checksum_failures=moved.checksum_failures,
            writes_per_day=self._wear.per_day(written_bytes, now_s),
            writes_per_day_lately=self._wear.per_day_lately(written_bytes, now_s),
            depths={priority.name.lower(): depth for priority, depth in self.transfers.depths().items()},
        )

    async def came_back(self) -> bool:
        """Try a disk that failed, if it is time and its directory is in its place; whether it works again."""
        if not self.health.is_probe_due or not self.health.is_recovered:
            return False
        try:
            await in_thread(self.volume.probe)
        except OSError as error:
            self.health.probe_failed(str(error))
            return False
        self.health.come_back()
        return True

    def replace(self, volume: Volume) -> Volume:
        """Its directory was opened anew; the old volume, nothing of which is in use any more."""
        old, self.volume = self.volume, volume
        return old

    def _give_up_waiting(self) -> None:
        self.transfers.fail_waiting(OSError(errno.EIO, self.health.why))

    async def close(self) -> None:
        """Wait for what runs, then close the volume."""
        await self.transfers.close()
        self._executor.shutdown(wait=True)
        await asyncio.get_running_loop().run_in_executor(None, self.volume.close)


class Disks:
    """All disks as one tier."""

    tier = Tier.NVME

    def __init__(self, disks: Sequence[Disk]) -> None:
        self.disks = list(disks)

    def __bool__(self) -> bool:
        return bool(self.disks)

    @property
    def can_write(self) -> bool:
        """Whether at least one disk takes blocks."""
        return any(disk.health.can_write for disk in self.disks)

    @property
    def can_read_all(self) -> bool:
        """Whether no block is unreachable."""
        return all(disk.health.can_read for disk in self.disks)

    def why_unreadable(self, extent: int) -> str:
        """What keeps the extent from being read; empty: nothing."""
        health = self.of(extent).health
        return "" if health.can_read else health.why or health.state.value

    def of(self, extent: int) -> Disk:
        """The disk that has the extent."""
        return self.disks[extent >> _VOLUME_SHIFT]

    def local(self, extent: int) -> int:
        """The extent as its volume numbers it."""
        return extent & _LOCAL

    def extent(self, disk: Disk, local: int) -> int:
        """A volume's extent as the index numbers it."""
        return self.disks.index(disk) << _VOLUME_SHIFT | local

    def extents(self, disk: Disk, locals_: np.ndarray) -> np.ndarray:
        """A volume's extents as the index numbers them."""
        extents: np.ndarray = locals_ | (self.disks.index(disk) << _VOLUME_SHIFT)
        return extents

    def segments(self, disk: Disk, extents: np.ndarray) -> np.ndarray:
        """Which of the disk's segments each extent is in; -1: on another disk."""
        elsewhere = extents >> _VOLUME_SHIFT != self.disks.index(disk)
        segments: np.ndarray = np.where(elsewhere, -1, (extents & _LOCAL) >> PLACE_BITS)
        return segments

    def readable(self, extents: np.ndarray) -> np.ndarray:
        """Which of the extents are on a disk that can be read, as a mask."""
        readable = np.array([disk.health.can_read for disk in self.disks], dtype=bool)
        mask: np.ndarray = readable[extents >> _VOLUME_SHIFT]
        return mask

    def reserve(self, namespace: NamespaceSpec, count: int) -> tuple[Disk, list[int]]:
        """Extents on the disk with most room that takes blocks.

        Raises:
            CapacityExhausted: none has room for all of them.
        """
        refusal = CapacityExhausted("no disk takes blocks")
        writable = [disk for disk in self.disks if disk.health.can_write]
        for disk in sorted(writable, key=lambda disk: disk.volume.usage().used_bytes):
            try:
                locals_ = disk.volume.reserve(namespace, count)
            except CapacityExhausted as error:
                refusal = error
                continue
            return disk, [self.extent(disk, local) for local in locals_]
        raise refusal

    def release(self, extents: Iterable[int]) -> None:
        """Extents whose blocks are gone."""
        for extent in extents:
            self.of(extent).volume.release([self.local(extent)])

    @property
    def read_bytes_per_s(self) -> float:
        """Of all disks together; 0.0: nothing is known."""
        return sum(disk.read_bytes_per_s for disk in self.disks if disk.health.can_read)

    def read_speed(self, extents: np.ndarray) -> tuple[float, float]:
        """(bytes per second, seconds until it begins) of reading these extents, one chain's; 0.0: not known."""
        positions, counts = np.unique(extents >> _VOLUME_SHIFT, return_counts=True)
        disks = [self.disks[position] for position in positions.tolist()]
        if not all(disk.read_bytes_per_s for disk in disks):
            return 0.0, 0.0
        # Side by side: the disk that takes longest decides.
        per_byte_s = max(count / disk.read_bytes_per_s for disk, count in zip(disks, counts.tolist(), strict=True))
        return len(extents) / per_byte_s, max(disk.wait_s for disk in disks)

    def is_measured(self, extents: np.ndarray) -> bool:
        """Whether the disks of these extents were read lately, or are being read."""
        now_s = time.monotonic()
        reads = [self.disks[position].reads for position in np.unique(extents >> _VOLUME_SHIFT).tolist()]
        return all(one.is_current(now_s) or one.pending_bytes for one in reads)

    def usage(self) -> TierUsage:
        """Occupancy of all disks; the state names those that are not online."""
        usages = [disk.volume.usage() for disk in self.disks]
        wrong = [
            f"{disk.health.state.value}: {disk.health.why or disk.volume.directory}"
            for disk in self.disks
            if not disk.health.can_write
        ]
        return TierUsage(
            sum(usage.capacity_bytes for usage in usages),
            sum(usage.used_bytes for usage in usages),
            "; ".join(wrong) or "online",
        )
