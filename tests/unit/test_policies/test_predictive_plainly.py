"""The predictor's vector operations decide what one that goes block by block, with lists and dictionaries, decides."""

from __future__ import annotations

import bisect
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from kvservice.blocks import NO_ROW, Rows
from kvservice.policies import NO_MEMORY, Memories, Memory, Predictive
from kvservice.policies.predictive import KINDS
from kvservice.policies.protocol import Orders
from kvservice.policies.reuse import ReuseModel
from tests.unit.test_policies.shelf import Shelf, rows_of

pytestmark = pytest.mark.unit

NEW = ("new, up to 2 at once", "new, up to 8 at once", "new, up to 32 at once", "new, more than 32 at once")
TIMES = ("", "used once", "used twice", "used thrice or more")
GAPS = ("under 32 s", "under 128 s", "under 512 s", "longer")
STEPS = ("store", "store", "use", "use", "use", "hold", "release", "expect", "evict", "wait", "wait")
FINISHED, EXPECTED = len(KINDS), len(KINDS) + 1


@dataclass
class Block:
    kind: int
    used_at: int
    share: int
    uses: int


class Plain:
    """Orders are lists; each block of a chain is looked at by itself."""

    name = "plain"

    def __init__(self) -> None:
        self.model = ReuseModel([next((n for n in (3, 2, 1) if kind.startswith(TIMES[n])), 0) for kind in KINDS])
        self.blocks: dict[int, Block] = {}
        self.left: list[Block] = []  # a memory is a place in here, plus one
        self.orders: list[list[int]] = [[] for _ in range(len(KINDS) + 2)]
        self.home: dict[int, int] = {}
        self.expected_at_s: dict[int, float] = {}

    def stored(self, rows: Rows, parents: Rows, now_s: float, memories: Memories) -> None:
        new = sum(memory == NO_MEMORY for memory in memories.tolist())
        known = [None if memory == NO_MEMORY else self.left[memory - 1] for memory in memories.tolist()]
        self._use(rows.tolist(), known, now_s, NEW[bisect.bisect_left((2, 8, 32), new)])

    def touch(self, rows: Rows, now_s: float) -> None:
        self._use(rows.tolist(), [self.blocks[row] for row in rows.tolist()], now_s, "")

    def _use(self, rows: list[int], known: list[Block | None], now_s: float, new: str) -> None:
        now = self.model.advance(now_s)
        kinds = []
        for at, block in enumerate(known):
            if block is None:
                # A chain of which only the last block is new has no end of its own; neither has one of a block.
                is_end = at == len(rows) - 1
                kinds.append(KINDS.index("new, end of its chain" if is_end else new))
            else:
                self.model.ended(block.kind, block.used_at, 1 / block.share)
                gap = GAPS[bisect.bisect_right((32, 128, 512), now - block.used_at)]
                kinds.append(KINDS.index(f"{TIMES[min(3, block.uses + 1)]}, {gap} apart"))
        shares = Counter(kinds)
        for kind in shares:
            self.model.started(kind)
        for row, block, kind in reversed(list(zip(rows, known, kinds, strict=True))):
            self.expected_at_s.pop(row, None)
            self._place(row, kind)
            self.blocks[row] = Block(kind, now, shares[kind], min(3, block.uses + 1) if block else 0)

    def _remove(self, row: int) -> None:
        for order in self.orders:
            if row in order:
                order.remove(row)

    def _place(self, row: int, order: int) -> None:
        self._remove(row)
        self.orders[order].append(row)
        self.home[row] = order

    def released(self, rows: Rows) -> None:
        for row in rows.tolist():
            self.exposed(row)

    def needed(self, rows: Rows, orders: Orders) -> None:
        pass

    def expect(self, rows: Rows, at_s: float) -> None:
        for row in reversed(rows.tolist()):
            self.expected_at_s[row] = at_s
            self._place(row, FINISHED if at_s == math.inf else EXPECTED)

    def demoted(self, row: int) -> None:
        self._remove(row)

    def forget(self, row: int) -> Memory:
        self._remove(row)
        self.expected_at_s.pop(row, None)
        self.left.append(self.blocks.pop(row))
        return Memory(len(self.left))

    def exposed(self, row: int) -> None:
        if not any(row in order for order in self.orders):
            self.orders[self.home[row]].insert(0, row)

    def victims(self, is_evictable: Callable[[int], bool], now_s: float) -> Iterator[int]:
        now = self.model.advance(now_s)
        while candidates := [number for number, order in enumerate(self.orders) if order]:
            worst = min(candidates, key=lambda number: self._rank(number, now))
            used_at = self.blocks[self.orders[worst][0]].used_at
            while self.orders[worst] and self.blocks[self.orders[worst][0]].used_at == used_at:
                row = self.orders[worst].pop(0)
                if is_evictable(row):
                    yield row

    def _rank(self, order: int, now: int) -> tuple[float, int]:
        row = self.orders[order][0]
        block = self.blocks[row]
        if order == FINISHED:
            return -1.0, block.used_at
        if order == EXPECTED and self.expected_at_s[row] - now > -60:
            return 1 / max(1.0, self.expected_at_s[row] - now), block.used_at
        return self.model.worth(block.kind, block.used_at), block.used_at


class Remembering(Shelf):
    """A shelf that tells of a block that comes back what was to be remembered of it."""

    def __init__(self, policy: Predictive | Plain) -> None:
        super().__init__(policy)
        self.memories: dict[int, int] = {}
        self.victims: list[int] = []

    def remove(self, row: int) -> None:
        parent = self.parent.pop(row)
        self.memories[row] = int(self.policy.forget(row))
        if parent != NO_ROW and self.is_end(parent):
            self.policy.exposed(parent)


def step(shelf: Remembering, kind: str, choice: float, amount: int) -> None:
    """One step; equal shelves take equal ones."""
    known, free = list(shelf.parent), [row for row in range(300) if row not in shelf.parent][:amount]
    chain = shelf.path(known[int(choice * len(known))]) if known else []
    if kind == "store" and free:
        memories = np.array([shelf.memories.get(row, NO_MEMORY) for row in free], dtype=np.int64)
        shelf.store(*free, behind=[*known, NO_ROW][int(choice * (len(known) + 1))], memories=memories)
    elif kind == "use" and chain:
        shelf.use(*chain)
    elif kind == "hold" and chain and not shelf.held:
        shelf.hold(chain)
    elif kind == "release":
        shelf.release(sorted(shelf.held))
    elif kind == "expect" and chain:
        shelf.policy.expect(rows_of(*chain), math.inf if amount < 8 else shelf.now_s + 100 * choice)
    elif kind == "evict":
        shelf.victims += shelf.evict(amount)
    elif kind == "wait":
        shelf.now_s += 200 * choice * choice


@pytest.mark.parametrize("seed", range(12))
def test_it_decides_what_the_plain_one_decides(seed: int) -> None:
    chooser = random.Random(seed)
    shelves = [Remembering(Predictive()), Remembering(Plain())]
    for _ in range(300):
        kind, choice, amount = chooser.choice(STEPS), chooser.random(), chooser.randint(1, 40)
        for shelf in shelves:
            step(shelf, kind, choice, amount)
    fast, plain = shelves
    assert len(fast.victims) > 100
    assert fast.victims == plain.victims
