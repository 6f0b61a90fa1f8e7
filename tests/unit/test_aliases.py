"""Aliases stay within every bound, and every book forgets one that left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.aliases import NO_INSTANCE, AliasBounds, Aliases
from kvservice.blocks import NO_ROW

pytestmark = pytest.mark.unit

BOUNDS = AliasBounds(per_session=6, per_instance=8, in_all=10)


def make_room(aliases: Aliases, owner: int, instance_id: int, adding: int) -> list[int]:
    gone = []
    while (row := aliases.row_over_bounds(owner, instance_id, adding)) != NO_ROW:
        aliases.row_left(row)
        gone.append(row)
    return gone


def test_an_alias_is_found_by_its_source_until_it_leaves() -> None:
    aliases = Aliases(BOUNDS)
    aliases.add([10, 11], [1, 2], owner=7, instance_id=1)
    aliases.add([12], [1], owner=8, instance_id=1)
    assert aliases.of_source(1) == [10, 12]
    aliases.row_left(10)
    assert aliases.of_source(1) == [12]
    aliases.row_left(12)
    assert aliases.of_source(1) == []
    aliases.check([11], [2])


def test_a_session_at_its_bound_loses_its_own_oldest() -> None:
    aliases = Aliases(BOUNDS)
    aliases.add([1, 2, 3], [101, 102, 103], owner=7, instance_id=1)
    aliases.add([4, 5], [104, 105], owner=8, instance_id=2)
    aliases.add([6, 7, 8], [106, 107, 108], owner=7, instance_id=3)
    assert make_room(aliases, 7, 3, 2) == [1, 2]


def test_an_instance_at_its_bound_loses_the_oldest_that_it_made() -> None:
    aliases = Aliases(BOUNDS)
    aliases.add([1], [101], owner=7, instance_id=2)
    for number in range(2, 9):
        aliases.add([number], [100 + number], owner=number, instance_id=1)
    assert make_room(aliases, 50, 1, 2) == [2]


def test_aliases_found_again_after_a_restart_are_no_instances() -> None:
    aliases = Aliases(BOUNDS)
    for number in range(1, 10):
        aliases.add([number], [100 + number], owner=number, instance_id=NO_INSTANCE)
    assert make_room(aliases, 50, NO_INSTANCE, 1) == []


def test_at_the_common_bound_the_session_used_longest_ago_loses() -> None:
    aliases = Aliases(BOUNDS)
    aliases.add([1, 2, 3, 4, 5], [101] * 5, owner=7, instance_id=1)
    aliases.add([6, 7, 8, 9], [101] * 4, owner=8, instance_id=2)
    aliases.touch(7)
    assert make_room(aliases, 9, 3, 3) == [6, 7]


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(1, 6), st.booleans()), max_size=40))
def test_no_bound_is_ever_passed(steps: list[tuple[int, int, int, bool]]) -> None:
    aliases, next_row = Aliases(BOUNDS), 1
    model: dict[int, tuple[int, int, int]] = {}
    for owner, instance_id, count, is_touched in steps:
        for row in make_room(aliases, owner, instance_id, count):
            del model[row]
        rows = list(range(next_row, next_row + count))
        next_row += count
        aliases.add(rows, [1000 + row % 5 for row in rows], owner, instance_id)
        model.update({row: (1000 + row % 5, owner, instance_id) for row in rows})
        if is_touched:
            aliases.touch(owner)
        aliases.check(list(model), [source for source, _, _ in model.values()])
        for bound, of in ((6, 1), (8, 2)):
            for key in {entry[of] for entry in model.values()} - ({NO_INSTANCE} if of == 2 else set()):
                assert sum(entry[of] == key for entry in model.values()) <= bound
