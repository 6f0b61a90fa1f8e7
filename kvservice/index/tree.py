"""The shape of the forest: which row follows which, as linked lists of siblings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvservice.blocks import NO_ROW
from kvservice.index.columns import Columns


class Tree(Columns):
    """Rows behind rows; of names, states and bytes it knows nothing."""

    def ancestors(self, row: int) -> Iterator[int]:
        """`row`, the block before it, and so on to the root."""
        while row != NO_ROW:
            yield row
            row = int(self.parent[row])

    def children(self, row: int) -> Iterator[int]:
        """The blocks directly behind `row`."""
        child = int(self.first_child[row])
        while child != NO_ROW:
            yield child
            child = int(self.next_sibling[child])

    def subtree(self, row: int) -> list[int]:
        """`row` and everything behind it, every block after all blocks behind it."""
        rows = [row]
        for at in rows:
            rows.extend(self.children(at))
        return rows[::-1]

    def _link(self, row: int, parent: int) -> None:
        """`row` is the first of those behind `parent` now; NO_ROW: a root."""
        self.parent[row] = parent
        if parent == NO_ROW:
            return
        sibling = int(self.first_child[parent])
        self.next_sibling[row] = sibling
        if sibling != NO_ROW:
            self.previous_sibling[sibling] = row
        self.first_child[parent] = row

    def _link_all(self, parents: np.ndarray) -> None:
        """The first n rows, unlinked so far, are behind these (int32; NO_ROW: a root)."""
        self.parent[: len(parents)] = parents
        # Siblings become neighbours when rows are sorted by what they follow.
        order = np.argsort(parents, kind="stable").astype(np.int32)
        order = order[parents[order] != NO_ROW]
        of = parents[order]
        is_first = np.ones(len(order), dtype=bool)
        is_first[1:] = of[1:] != of[:-1]
        self.first_child[of[is_first]] = order[is_first]
        self.previous_sibling[order[1:][~is_first[1:]]] = order[:-1][~is_first[1:]]
        self.next_sibling[order[:-1][~is_first[1:]]] = order[1:][~is_first[1:]]

    def _cut(self, row: int) -> None:
        """`row` is behind nothing any more; what is behind it stays there."""
        parent = int(self.parent[row])
        before, after = int(self.previous_sibling[row]), int(self.next_sibling[row])
        if before != NO_ROW:
            self.next_sibling[before] = after
        elif parent != NO_ROW:
            self.first_child[parent] = after
        if after != NO_ROW:
            self.previous_sibling[after] = before
        self.parent[row] = self.previous_sibling[row] = self.next_sibling[row] = NO_ROW
