"""One engine's KV cache in GPU memory, opened here, and the copies that touch it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvservice.device.progress import ProgressPage
from kvservice.dram import Segment
from kvservice_cuda.copier import Direction
from kvservice_cuda.geometry import Geometry
from kvservice_cuda.plan import Plan


@dataclass(frozen=True, slots=True)
class Region:
    """A part of one allocation of the engine's process."""

    ipc_handle: bytes
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Places:
    """Slots of one segment, in order."""

    segment: Segment
    slots: np.ndarray


@dataclass(slots=True, eq=False)
class Registration:
    """An opened KV cache. The event loop owns it; what a plan says does not change."""

    registration_id: int
    instance_id: int
    device_uuid: bytes
    geometry: Geometry
    regions: Sequence[Region]
    progress: ProgressPage
    opened: Sequence[int] = ()
    """The start of each allocation, as this process sees it; one entry per open call."""
    plan: Plan | None = None
    """The geometry where this process sees it, once it is open."""
    copies: set[Copy] = field(default_factory=set)
    is_closed: bool = False
    """No copy may begin any more."""

    @property
    def size_bytes(self) -> int:
        """GPU memory that is registered."""
        return sum(region.size_bytes for region in self.regions)


@dataclass(slots=True, eq=False)
class Copy:
    """One load or save on its way.

    Attributes:
        blocks: the engine's block ids, each in bounds.
        places: as many slots, in order.
        lane, sequence: where its progress is told.
        attempt_id: the call that asked for it; 0: none.
        begun: its first bytes are queued, or wait behind another copy of the same registration, or it failed.
        done: no byte of it moves any more; the result is whether all of them arrived.
    """

    registration: Registration
    direction: Direction
    blocks: np.ndarray
    places: Sequence[Places]
    lane: int
    sequence: int
    attempt_id: int
    begun: asyncio.Event
    done: asyncio.Future[bool]

    @property
    def size_bytes(self) -> int:
        """Of all its blocks."""
        return len(self.blocks) * self.registration.geometry.block_size_bytes
