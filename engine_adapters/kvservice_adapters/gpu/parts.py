"""parts: how a block lies in an engine's cache, and what of that a kernel has to be told. Numbers in, numbers out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from kvservice_client.device import CachePart

PARTS_MAX = (1 << 16) - 1
PART_BYTES_MAX = 1 << 29
"""What a launch's grid has room for."""


@dataclass(frozen=True, slots=True)
class KeyRows:
    """Where keys are in a part, whose elements are rows of `row_elements`: at the start of its first rows.

    Attributes:
        row_elements: head_dim where keys and values are apart ([heads, tokens, head_dim], or [2, ...] of that); 2 *
            head_dim where a head's key and value lie side by side.
        head_dim: how many leading elements of such a row are the key.
        key_rows: how many leading rows have a key; the others are values only.
        tokens: of a group of rows: a part may be several of the engine's kernel blocks, one after the other.
        group_rows: of one kernel block: tokens * heads.
        row_divisor: from one token's row to the next one's: 1 where the tokens of a head follow each other ([heads,
            tokens]), heads where the heads of a token do ([tokens, heads]).
    """

    row_elements: int
    head_dim: int
    key_rows: int
    tokens: int
    group_rows: int
    row_divisor: int

    @property
    def block_tokens(self) -> int:
        """Of all groups that have keys."""
        return self.key_rows // self.group_rows * self.tokens

    def require_fits(self, part_bytes: int, item_bytes: int) -> None:
        """Whether a part of that size can be these rows.

        Raises:
            ValueError: why it cannot.
        """
        if min(self.row_elements, self.head_dim, self.key_rows, self.tokens, self.group_rows, self.row_divisor) < 1:
            raise ValueError(f"{self} has a number below 1")
        if part_bytes % (self.row_elements * item_bytes):
            raise ValueError(f"a part of {part_bytes} bytes is no rows of {self.row_elements} x {item_bytes} bytes")
        rows = part_bytes // (self.row_elements * item_bytes)
        if self.key_rows > rows or self.head_dim > self.row_elements:
            raise ValueError(f"{self} is more than a part of {rows} rows")
        if self.key_rows % self.group_rows or self.group_rows % (self.tokens * self.row_divisor):
            raise ValueError(f"{self}: rows are no whole groups, or a group no whole tokens")


@dataclass(frozen=True, slots=True)
class PartGroup:
    """Parts that one launch can move: of one size, and with keys in the same arrangement if they have any.

    Attributes:
        keys: the arrangement; how many rows have keys is each part's own.
        first_of_layer: the row of the table with the first part of each layer, and where the last layer's end.
    """

    size_bytes: int
    keys: KeyRows | None
    first_of_layer: tuple[int, ...]


PartRow = tuple[int, int, int, int]
"""Of the table: address, stride from block to block, offset in a block of the run, all in bytes; and key rows."""


def grouped(
    parts: Sequence[CachePart], keys: Mapping[int, KeyRows], *, layers: int
) -> tuple[tuple[PartGroup, ...], list[PartRow]]:
    """The parts in as few groups as there are launches, and the table that they count the rows of."""
    offsets = accumulate((part.size_bytes for part in parts), initial=0)
    members: dict[tuple[int, KeyRows | None], list[tuple[int, PartRow]]] = {}
    # Parts without keys go with others of their size. Those with keys are seen first, so that these exist.
    arrangements = {rows: replace(rows, key_rows=rows.group_rows) for rows in set(keys.values())}
    for at, (part, offset) in sorted(enumerate(zip(parts, offsets, strict=False)), key=lambda of: of[0] not in keys):
        rows = keys.get(at)
        if rows is None:
            arrangement = next((other for size, other in members if size == part.size_bytes), None)
        else:
            arrangement = arrangements[rows]
        row = (part.address, part.block_stride_bytes, offset, 0 if rows is None else rows.key_rows)
        members.setdefault((part.size_bytes, arrangement), []).append((part.layer, row))
    groups: list[PartGroup] = []
    table: list[PartRow] = []
    for (size_bytes, arrangement), found in members.items():
        found.sort()
        of_rows = [layer for layer, _ in found]
        first_of_layer = tuple(len(table) + bisect_left(of_rows, layer) for layer in range(layers + 1))
        groups.append(PartGroup(size_bytes, arrangement, first_of_layer))
        table.extend(row for _, row in found)
    return tuple(groups), table
