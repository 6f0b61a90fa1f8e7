"""The NVMe tier: its disks, what state they are in, and what extents are where.

A disk that fails, is full or turns a hundred times slower than usual goes offline by itself, says
why, and comes back when a probe succeeds. Meanwhile its blocks are misses and DRAM serves on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum

import numpy as np

from kvservice.blocks import NamespaceSpec, Tier
from kvservice.errors import CapacityExhausted
from kvservice.logs import event_log
from kvservice.lookahead import Throughput
from kvservice.nvme import PLACE_BITS, Throttle, Volume
from kvservice.tiers import TierUsage
from kvservice.transfers import Priority, TransferQueue

_VOLUME_SHIFT = 56  # an extent number is its volume's position, then the volume's own number
_LOCAL = (1 << _VOLUME_SHIFT) - 1
_PROBE_INTERVAL_S = 5.0
_SLOW_FACTOR = 100.0
_SLOW_S_MIN = 2.0
_SMOOTHING = 0.1
_VERIFYING_THREADS = 2
"""Beside those at the device: what they read is verified, and what they write prepared, while it is busy."""

_log = event_log(__name__)


class DiskState(Enum):
    """What a disk can be used for."""

    RECOVERING = "recovering"
    ONLINE = "online"
    OFFLINE = "offline"


class Disk:
    """One volume, its queue, and how it is doing. The event loop owns it."""

    def __init__(self, volume: Volume, *, depth: int, waiting_max: int, bytes_per_s_max: int = 0) -> None:
        """Args:
        depth: calls that the device gets side by side.
        waiting_max: bound on transfers that have not started.
        bytes_per_s_max: bound on its bandwidth; 0: none.
        """
        threads = depth + _VERIFYING_THREADS
        self.volume = volume
        self.state = DiskState.RECOVERING
        self.why = ""
        self.is_recovered = False
        """Whether what it holds is known; writing before that would go over it."""
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="nvme")
        self.transfers = TransferQueue(self._executor, depth=threads, waiting_max=waiting_max)
        self.throttle = Throttle(bytes_per_s_max)
        self.reads, self.writes = Throughput(), Throughput()
        self._usual_s_per_byte = 0.0
        self._probe_at_s = 0.0

    @property
    def is_online(self) -> bool:
        """Whether it reads and writes."""
        return self.state is DiskState.ONLINE

    @property
    def read_bytes_per_s(self) -> float:
        """As measured; before the first read as writes were; 0.0: nothing is known."""
        return self.reads.bytes_per_s or self.writes.bytes_per_s

    @property
    def wait_s(self) -> float:
        """How long a Get that comes now waits for its turn; 0.0 where the rate is unknown."""
        rate = self.read_bytes_per_s
        return self.transfers.bytes_before(Priority.GET) / rate if rate else 0.0

    def fail(self, why: str) -> None:
        """Take it offline. Says so once."""
        if self.state is not DiskState.OFFLINE:
            self.state, self.why = DiskState.OFFLINE, why
            _log.error("nvme_offline", directory=self.volume.directory, why=why)
        self._probe_at_s = time.monotonic() + _PROBE_INTERVAL_S

    def took(self, seconds: float, size_bytes: int) -> None:
        """A read of so many bytes took so long; one far slower than usual takes the disk offline."""
        if not size_bytes:
            return
        rate = seconds / size_bytes
        usual = self._usual_s_per_byte
        if usual and seconds > _SLOW_S_MIN and rate > _SLOW_FACTOR * usual:
            self.fail(f"a read took {seconds:.1f} s, {rate / usual:.0f} times as long as usual")
            return
        self._usual_s_per_byte = usual + _SMOOTHING * (rate - usual) if usual else rate

    def recovered(self) -> None:
        """What it holds is known: it can be used."""
        self.state, self.is_recovered = DiskState.ONLINE, True

    def come_back(self) -> None:
        """It works again."""
        self.state, self.why = DiskState.ONLINE, ""
        self._usual_s_per_byte = 0.0
        _log.info("nvme_online", directory=self.volume.directory)

    async def came_back(self) -> bool:
        """If it is offline and time, try it; whether it is online again."""
        if self.state is not DiskState.OFFLINE or not self.is_recovered or time.monotonic() < self._probe_at_s:
            return False
        self._probe_at_s = time.monotonic() + _PROBE_INTERVAL_S
        try:
            await asyncio.get_running_loop().run_in_executor(None, self.volume.probe)
        except OSError as error:
            self.why = f"{self.why.split('; probe')[0]}; probe: {error}"
            return False
        self.come_back()
        return True

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
        return any(disk.is_online for disk in self.disks)

    @property
    def all_online(self) -> bool:
        """Whether no block is unreachable."""
        return all(disk.is_online for disk in self.disks)

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
        """Which of the extents are on a disk that is online, as a mask."""
        online = np.array([disk.is_online for disk in self.disks], dtype=bool)
        mask: np.ndarray = online[extents >> _VOLUME_SHIFT]
        return mask

    def reserve(self, namespace: NamespaceSpec, count: int) -> tuple[Disk, list[int]]:
        """Extents on the online disk with most room.

        Raises:
            CapacityExhausted: none has room for all of them.
        """
        refusal = CapacityExhausted("no disk is online")
        online = [disk for disk in self.disks if disk.is_online]
        for disk in sorted(online, key=lambda disk: disk.volume.usage().used_bytes):
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
        return sum(disk.read_bytes_per_s for disk in self.disks if disk.is_online)

    def read_speed(self, extents: np.ndarray) -> tuple[float, float]:
        """(bytes per second, seconds until it begins) of reading these extents, one chain's; 0.0: not known."""
        positions, counts = np.unique(extents >> _VOLUME_SHIFT, return_counts=True)
        disks = [self.disks[position] for position in positions.tolist()]
        if not all(disk.read_bytes_per_s for disk in disks):
            return 0.0, 0.0
        # Side by side: the disk that takes longest decides.
        per_byte_s = max(count / disk.read_bytes_per_s for disk, count in zip(disks, counts.tolist(), strict=True))
        return len(extents) / per_byte_s, max(disk.wait_s for disk in disks)

    def usage(self) -> TierUsage:
        """Occupancy of all disks; the state names those that are not online."""
        usages = [disk.volume.usage() for disk in self.disks]
        wrong = [
            f"{disk.state.value}: {disk.why or disk.volume.directory}" for disk in self.disks if not disk.is_online
        ]
        return TierUsage(
            sum(usage.capacity_bytes for usage in usages),
            sum(usage.used_bytes for usage in usages),
            "; ".join(wrong) or "online",
        )
