"""Blocks on their way from NVMe into DRAM, and who waits for them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from kvservice.transfers import Transfer


class Landing(Enum):
    """How a block's way into DRAM ended."""

    OK = "ok"
    CORRUPT = "corrupt"
    TIER_OFFLINE = "tier_offline"
    GONE = "gone"  # dropped meanwhile (Forget), or the read was cancelled


@dataclass(slots=True, eq=False)
class Arrival:
    """A run of blocks of one chain that one transfer reads; coalesces everybody who wants them."""

    rows: list[int]
    landed: asyncio.Future[dict[int, Landing]]
    """Resolves when the blocks are usable, or are not going to be; by row."""
    transfer: Transfer[Any] | None = None
    is_hinted: bool = False
    """Begun because somebody will need the blocks, not because somebody waits."""
    awaited: set[int] = field(default_factory=set)
    """Rows that a Get waits for."""
