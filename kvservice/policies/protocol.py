"""protocol: what the store tells a policy, and what it asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NewType, Protocol

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import Rows

Orders = NDArray[np.float64]
"""When waiting requests come to need rows: smaller is sooner, infinite is not at all."""

Memory = NewType("Memory", int)
"""What a policy wants remembered of a block that left: 64 bits that only the policy reads."""

NO_MEMORY = Memory(0)

Memories = NDArray[np.int64]
"""One memory for each row."""


def nothing_remembered(rows: Rows) -> Memories:
    """For rows of which nothing is known from before."""
    return np.full(len(rows), NO_MEMORY, dtype=np.int64)


class EvictionPolicy(Protocol):
    """Orders the rows of one namespace in one tier for eviction. Deterministic: same calls, same order.

    A policy sees rows and never a byte. It only orders: whether a row may leave (no holder, no block behind it) is the
    index's business, asked through `is_evictable`. Time is an argument, in seconds of any clock that does not go back.
    """

    name: str

    def stored(self, rows: Rows, parents: Rows, now_s: float, memories: Memories) -> None:
        """These blocks came into the namespace just now, each after the block before it.

        Args:
            parents: the row of the block before each; NO_ROW: a root.
            memories: what `forget` returned for each when the block left before; NO_MEMORY where that is not known.
        """
        ...

    def touch(self, rows: Rows, now_s: float) -> None:
        """A request used the chain `rows` (root first) just now."""
        ...

    def released(self, rows: Rows) -> None:
        """A holder let go of these rows (chain order), or they arrived in this tier again.

        Rows without a place in the order get one: eviction may have passed them over while they were held.
        """
        ...

    def needed(self, rows: Rows, orders: Orders) -> None:
        """The earliest waiting request that needs each row changed; infinite: none does any more.

        Ends of chains that are not needed any more are `exposed` afterwards: eviction may have passed them over.
        """
        ...

    def expect(self, rows: Rows, at_s: float) -> None:
        """The application says of an idle conversation when its rows will be used; infinite: never again.

        Counts until their next touch.
        """
        ...

    def demoted(self, row: int) -> None:
        """The row left this tier and is still in the index: no victim until it is released or touched."""
        ...

    def forget(self, row: int) -> Memory:
        """The row left the index; its number may be used again.

        Returns:
            What the policy wants to be told if the same block is stored again.
        """
        ...

    def exposed(self, row: int) -> None:
        """The last block behind `row` left: it is the end of its chain now."""
        ...

    def victims(self, is_evictable: Callable[[int], bool], now_s: float) -> Iterator[int]:
        """Rows to evict, best first.

        The caller takes each row out (calling `forget` or `demoted`, then `exposed` for its parent) before it asks for
        the next. Rows that are not evictable are passed over and come back when they are touched, released or exposed.
        """
        ...
