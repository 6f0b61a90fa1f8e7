"""oracle: Belady's policy, which knows the future: the bound that no real policy can pass. Here only."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from kvservice.blocks import BlockHash, Rows
from kvservice.policies import NO_MEMORY, Memories, Memory
from kvservice.policies.protocol import Orders
from kvservice.simulate.requests import Request

_NEVER = 1 << 60


class Belady:
    """Evicts what is used again last, of one next use the deepest block first. For replays in the order of arrival."""

    name = "belady"

    def __init__(self, requests: Sequence[Request]) -> None:
        self.hash_of: Callable[[int], BlockHash]
        """The hash of a row: to be set to the index's before the first row comes."""
        self._uses = _uses_of(requests)
        self._next_of: dict[int, int] = {}
        self._heap: list[tuple[int, int, int]] = []
        self._number = 0
        self.at = 0
        """The request that is being served."""

    def stored(self, rows: Rows, parents: Rows, now_s: float, memories: Memories) -> None:
        self.touch(rows, now_s)

    def touch(self, rows: Rows, now_s: float) -> None:
        for row in rows.tolist():
            uses = self._uses[self.hash_of(row)]
            following = int(np.searchsorted(uses, self.at, side="right"))
            self._next_of[row] = int(uses[following]) if following < len(uses) else _NEVER
            self._push(row)

    def released(self, rows: Rows) -> None:
        for row in rows.tolist():
            self._push(row)

    def needed(self, rows: Rows, orders: Orders) -> None:
        pass

    def expect(self, rows: Rows, at_s: float) -> None:
        pass

    def demoted(self, row: int) -> None:
        pass

    def forget(self, row: int) -> Memory:
        self._next_of.pop(row, None)
        return NO_MEMORY

    def exposed(self, row: int) -> None:
        if row in self._next_of:
            self._push(row)

    def victims(self, is_evictable: Callable[[int], bool], now_s: float) -> Iterator[int]:
        while self._heap:
            following, _, row = heapq.heappop(self._heap)
            if self._next_of.get(row) == -following and is_evictable(row):
                yield row

    def _push(self, row: int) -> None:
        self._number += 1
        heapq.heappush(self._heap, (-self._next_of[row], -self._number, row))


def _uses_of(requests: Sequence[Request]) -> Mapping[BlockHash, np.ndarray]:
    uses: dict[BlockHash, list[int]] = {}
    for at, request in enumerate(requests):
        for one in request.stored:
            uses.setdefault(one, []).append(at)
    return {one: np.array(found) for one, found in uses.items()}
