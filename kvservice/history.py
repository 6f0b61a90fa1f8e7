"""history: why blocks left, for as long as memory allows. Answers Explain and reminds policies, decides nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import BlockHash, DropReason


@dataclass(frozen=True, slots=True)
class Departure:
    """One block's end: why, when, and how long it had been unused."""

    reason: DropReason
    at_s: float
    idle_s: float
    memory: int = 0
    """What the eviction policy wants to be told if the block comes back."""


class History:
    """The last `blocks_max` departures of one namespace, newest per hash."""

    def __init__(self, *, blocks_max: int) -> None:
        self.blocks_max = blocks_max
        self._departures: dict[BlockHash, Departure] = {}

    def remember(self, block_hash: BlockHash, departure: Departure) -> None:
        """Add a departure; the oldest goes when the bound is reached."""
        self._departures.pop(block_hash, None)
        self._departures[block_hash] = departure
        if len(self._departures) > self.blocks_max:
            del self._departures[next(iter(self._departures))]

    def find(self, block_hash: BlockHash) -> Departure | None:
        """The departure of that hash if it is still remembered."""
        return self._departures.get(block_hash)

    def memories(self, hashes: Iterable[BlockHash]) -> NDArray[np.int64]:
        """What the policy had remembered of each of these hashes; 0 where the departure is not known."""
        departures = list(map(self._departures.get, hashes))
        memories = np.zeros(len(departures), dtype=np.int64)
        if departures.count(None) < len(departures):  # rarely
            memories[:] = [departure.memory if departure else 0 for departure in departures]
        return memories

    def horizon_s(self, now_s: float) -> float:
        """Age of the oldest departure remembered; 0.0 when there is none."""
        oldest = next(iter(self._departures.values()), None)
        return 0.0 if oldest is None else now_s - oldest.at_s
