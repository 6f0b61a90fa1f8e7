"""shelf: a tier of one namespace for policies' tests: chains of rows, who may leave, and a check of every victim."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

import numpy as np

from kvservice.blocks import NO_ROW, Rows
from kvservice.policies import EvictionPolicy, Memories, Window, make_policy, nothing_remembered


def rows_of(*numbers: int) -> Rows:
    return np.array(numbers, dtype=np.int32)


class Shelf:
    """Rows in chains with a policy and a window. Time advances by hand."""

    def __init__(self, policy: EvictionPolicy | str) -> None:
        self.policy = make_policy(policy) if isinstance(policy, str) else policy
        self.window = Window()
        self.parent: dict[int, int] = {}
        self.held: set[int] = set()
        self.exempt_end = math.inf
        self.now_s = 1.0

    def store(self, *numbers: int, behind: int = NO_ROW, memories: Memories | None = None) -> None:
        rows = rows_of(*numbers)
        parents = rows_of(behind, *numbers[:-1])
        self.parent.update(zip(numbers, parents.tolist(), strict=True))
        self.policy.stored(rows, parents, self.now_s, nothing_remembered(rows) if memories is None else memories)

    def use(self, *numbers: int) -> None:
        self.policy.touch(rows_of(*numbers), self.now_s)

    def path(self, row: int) -> list[int]:
        found = []
        while row != NO_ROW:
            found.append(row)
            row = self.parent[row]
        return found[::-1]

    def hold(self, chain: Sequence[int]) -> None:
        self.held.update(chain)

    def release(self, chain: Sequence[int]) -> None:
        self.held.difference_update(chain)
        self.policy.released(rows_of(*[row for row in chain if row in self.parent]))

    def queue(self, request: int, chain: Sequence[int], order: float) -> None:
        self._tell(self.window.queue(request, rows_of(*chain), order))

    def unqueue(self, request: int) -> None:
        self._tell(self.window.unqueue(request))

    def is_end(self, row: int) -> bool:
        return row in self.parent and row not in self.parent.values()

    def is_evictable(self, row: int) -> bool:
        return self.is_end(row) and row not in self.held and not self.window.is_exempt(row)

    def evict(self, count: int = 1_000_000) -> list[int]:
        """Take out the next victims; each of them must be one that may leave."""
        left = []
        for row in islice(self.policy.victims(self.is_evictable, self.now_s), count):
            assert self.is_evictable(row), f"row {row} may not leave"
            left.append(row)
            self.remove(row)
        return left

    def remove(self, row: int) -> None:
        parent = self.parent.pop(row)
        self.policy.forget(row)
        self.window.forget(row)
        if parent != NO_ROW and self.is_end(parent):
            self.policy.exposed(parent)

    def _tell(self, rows: Rows) -> None:
        orders = self.window.order_of(rows)
        self.policy.needed(rows, orders)
        for row in rows[orders == math.inf].tolist():
            if self.is_end(row):
                self.policy.exposed(row)
