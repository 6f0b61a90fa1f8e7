"""aliases: blocks that a truncated conversation names a second time; whose they are, and how many.

An alias counts for eviction order but never holds its source in the store: when the source leaves,
the alias is a miss. Pure; bounded per session, per instance and in all: who is over a bound loses
the oldest aliases.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvservice.blocks import NO_ROW

NO_INSTANCE = 0
"""Of aliases that were found again after a restart."""


@dataclass(frozen=True, slots=True)
class AliasBounds:
    """How many aliases there may be."""

    per_session: int
    per_instance: int
    in_all: int


@dataclass(frozen=True, slots=True)
class Alias:
    """What an alias row names, and for whom."""

    source: int
    owner: int
    """The session's; see `sessions.owner_of`."""
    instance_id: int


class Aliases:
    """The aliases of one namespace, by row."""

    def __init__(self, bounds: AliasBounds) -> None:
        self._bounds = bounds
        self._aliases: dict[int, Alias] = {}
        self._by_source: dict[int, dict[int, None]] = {}
        self._by_session: OrderedDict[int, dict[int, None]] = OrderedDict()
        self._by_instance: dict[int, dict[int, None]] = {}

    def __len__(self) -> int:
        return len(self._aliases)

    def __getitem__(self, row: int) -> Alias:
        return self._aliases[row]

    def add(self, rows: Sequence[int], sources: Sequence[int], owner: int, instance_id: int) -> None:
        """`rows` (chain order) name the bytes of `sources` for that session."""
        mine = self._by_session.setdefault(owner, {})
        self._by_session.move_to_end(owner)
        of_instance = self._by_instance.setdefault(instance_id, {})
        for row, source in zip(rows, sources, strict=True):
            self._aliases[row] = Alias(source, owner, instance_id)
            self._by_source.setdefault(source, {})[row] = None
            mine[row] = of_instance[row] = None

    def touch(self, owner: int) -> None:
        """The session used its aliases."""
        if owner in self._by_session:
            self._by_session.move_to_end(owner)

    def row_over_bounds(self, owner: int, instance_id: int, adding: int) -> int:
        """The alias to give up first before so many are added; NO_ROW: there is room."""
        mine = self._by_session.get(owner, {})
        of_instance = self._by_instance.get(instance_id, {})
        if mine and len(mine) + adding > self._bounds.per_session:
            return next(iter(mine))
        if instance_id != NO_INSTANCE and of_instance and len(of_instance) + adding > self._bounds.per_instance:
            return next(iter(of_instance))
        if self._aliases and len(self._aliases) + adding > self._bounds.in_all:
            return next(iter(next(iter(self._by_session.values()))))
        return NO_ROW

    @property
    def addable(self) -> int:
        """The most that one call may add."""
        return min(self._bounds.per_session, self._bounds.per_instance, self._bounds.in_all)

    def of_source(self, row: int) -> list[int]:
        """The aliases of that row."""
        return list(self._by_source.get(row, ()))

    def row_left(self, row: int) -> None:
        """An alias left the index."""
        alias = self._aliases.pop(row)
        books: tuple[tuple[dict[int, dict[int, None]], int], ...] = (
            (self._by_source, alias.source),
            (self._by_session, alias.owner),
            (self._by_instance, alias.instance_id),
        )
        for book, key in books:
            del book[key][row]
            if not book[key]:
                del book[key]

    def check(self, rows: Iterable[int], sources: Iterable[int]) -> None:
        """Assert that the books agree with each other and with the index's alias rows. For tests."""
        known = {(row, alias.source) for row, alias in self._aliases.items()}
        assert known == set(zip(rows, sources, strict=True)), "the index has other aliases"
        books: tuple[dict[int, dict[int, None]], ...] = (self._by_source, self._by_session, self._by_instance)
        for book in books:
            listed = sorted(row for of_one in book.values() for row in of_one)
            assert listed == sorted(self._aliases), "an alias is in one book and not in another"
            assert all(book.values()), "an empty page"
        assert len(self._aliases) <= self._bounds.in_all, "more aliases than there may be"
