"""The index is closed under prefixes whatever order commits arrive in, and bisection agrees with a linear scan."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvservice.blocks import NO_ROW, NO_SLOT, BlockHash, Chain, Rows, Slots
from kvservice.errors import InvalidRequest
from kvservice.index import Index, State

pytestmark = pytest.mark.unit

SIZE_BYTES = 8


def name(number: int) -> BlockHash:
    return BlockHash(number.to_bytes(SIZE_BYTES, "big"))


def names(*numbers: int) -> list[BlockHash]:
    return [name(number) for number in numbers]


def slots(count: int, first: int = 0) -> Slots:
    return np.arange(first, first + count, dtype=np.int32)


def hit_length(index: Index, hashes: Sequence[bytes]) -> int:
    return index.hit_length(Chain(b"".join(hashes), SIZE_BYTES))


def stored(index: Index, hashes: Sequence[BlockHash], parent: int = NO_ROW) -> Rows:
    rows = index.insert(parent, hashes, slots(len(hashes)))
    index.publish(rows, 1.0)
    return rows


class Model:
    """What the index should be: a tree as plain dictionaries, with linear scans."""

    def __init__(self) -> None:
        self.parent: dict[BlockHash, BlockHash] = {}
        self.state: dict[BlockHash, int] = {}
        self.slot: dict[BlockHash, int] = {}
        self._next = 1

    def fresh(self, count: int) -> list[BlockHash]:
        self._next += count
        return [name(number) for number in range(self._next - count, self._next)]

    def insert(self, parent: BlockHash, hashes: Sequence[BlockHash], of_slots: Slots) -> None:
        for block_hash, slot in zip(hashes, of_slots.tolist(), strict=True):
            self.parent[block_hash], self.state[block_hash], self.slot[block_hash] = parent, State.RESERVED, slot
            parent = block_hash

    def publish(self, hashes: Sequence[BlockHash]) -> set[BlockHash]:
        """Returns what became resident."""
        before = self.held()
        for block_hash in hashes:
            self.state[block_hash] = State.WRITTEN
        changed = True
        while changed:
            changed = False
            for block_hash, state in self.state.items():
                parent = self.parent[block_hash]
                if state == State.WRITTEN and (not parent or self.state[parent] == State.RESIDENT):
                    self.state[block_hash] = State.RESIDENT
                    changed = True
        return self.held() - before

    def held(self) -> set[BlockHash]:
        return {block_hash for block_hash, state in self.state.items() if state == State.RESIDENT}

    def leaves(self) -> list[BlockHash]:
        inner = set(self.parent.values())
        return [block_hash for block_hash in self.parent if block_hash not in inner]

    def remove(self, block_hash: BlockHash) -> None:
        del self.parent[block_hash], self.state[block_hash], self.slot[block_hash]

    def path(self, block_hash: BlockHash) -> list[BlockHash]:
        """The chain that ends with the block, root first."""
        found = []
        while block_hash:
            found.append(block_hash)
            block_hash = self.parent[block_hash]
        return found[::-1]

    def hit_length(self, hashes: Sequence[BlockHash]) -> int:
        for position, block_hash in enumerate(hashes):
            if self.state.get(block_hash) != State.RESIDENT:
                return position
        return len(hashes)


ROOT = BlockHash(b"")
NUMBER = st.integers(0, 1 << 16)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), NUMBER, st.integers(1, 6)),
        st.tuples(st.just("publish"), NUMBER, st.integers(1, 31)),
        st.tuples(st.just("remove"), NUMBER, st.just(0)),
    ),
    max_size=40,
)


def apply(index: Index, model: Model, kind: str, choice: int, argument: int) -> None:
    """One operation on both, where the numbers choose among what is there."""
    if kind == "insert":
        parent = [*model.parent, ROOT][choice % (len(model.parent) + 1)]
        hashes = model.fresh(argument)
        of_slots = slots(argument, first=choice)
        index.insert(index.row_of(parent) if parent else NO_ROW, hashes, of_slots)
        model.insert(parent, hashes, of_slots)
    elif kind == "publish":
        reserved = [block_hash for block_hash, state in model.state.items() if state == State.RESERVED]
        if reserved:
            # Some blocks of one chain, in chain order: what a Commit may name.
            path = [at for at in model.path(reserved[choice % len(reserved)]) if model.state[at] == State.RESERVED]
            chosen = [at for bit, at in enumerate(path) if argument >> (bit % 5) & 1] or path
            became = index.publish(np.array([index.row_of(at) for at in chosen], dtype=np.int32), 2.0)
            assert {index.hash_of(row) for row in became.tolist()} == model.publish(chosen)
            seen: set[int] = set()
            for row in became.tolist():
                assert int(index.parent[row]) not in set(became.tolist()) - seen, "a block came before its prefix"
                seen.add(row)
    elif leaves := model.leaves():
        leaf = leaves[choice % len(leaves)]
        index.remove(index.row_of(leaf))
        model.remove(leaf)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(OPERATIONS)
def test_any_history_agrees_with_a_plain_tree(operations: list[tuple[str, int, int]]) -> None:
    index, model = Index(), Model()
    for kind, choice, argument in operations:
        apply(index, model, kind, choice, argument)
        index.check()
        assert len(index) == len(model.parent)
    for block_hash, parent in model.parent.items():
        row = index.row_of(block_hash)
        assert index.hash_of(row) == block_hash
        assert index.state[row] == model.state[block_hash]
        assert index.slot[row] == model.slot[block_hash]
        assert index.depth[row] == len(model.path(block_hash)) - 1
        assert int(index.parent[row]) == (index.row_of(parent) if parent else NO_ROW)
        children = {index.hash_of(child) for child in index.children(row)}
        assert children == {child for child, behind in model.parent.items() if behind == block_hash}
        assert [index.hash_of(at) for at in index.ancestors(row)] == model.path(block_hash)[::-1]
    roots = {index.hash_of(row) for row in index.roots().tolist()}
    assert roots == {block_hash for block_hash, parent in model.parent.items() if not parent}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(OPERATIONS, st.integers(0, 5))
def test_the_hit_length_is_that_of_a_linear_scan(operations: list[tuple[str, int, int]], absent: int) -> None:
    index, model = Index(), Model()
    for kind, choice, argument in operations:
        apply(index, model, kind, choice, argument)
    strangers = [name((1 << 40) + number) for number in range(absent)]
    for block_hash in [*model.parent, ROOT]:
        path = model.path(block_hash) + strangers
        if path:
            hit = model.hit_length(path)
            assert hit_length(index, path) == hit
            of_hit = index.hit_rows(Chain(b"".join(path), SIZE_BYTES), hit)
            assert [index.hash_of(row) for row in of_hit.tolist()] == path[:hit]
            known = index.rows_of(path)
            assert [index.hash_of(row) for row in known.tolist()] == path[: len(path) - absent]


@pytest.mark.parametrize("held", [0, 1, 2, 3, 63, 64, 99, 100])
def test_every_hit_length_of_a_chain_is_found(held: int) -> None:
    index = Index()
    hashes = names(*range(100))
    if held:
        stored(index, hashes[:held])
    assert hit_length(index, hashes) == held
    assert hit_length(index, hashes[: held + 1]) == held
    assert hit_length(index, hashes[:held]) == held


def test_a_chain_that_begins_in_the_middle_is_no_hit() -> None:
    index = Index()
    hashes = names(1, 2, 3, 4)
    stored(index, hashes)
    assert hit_length(index, hashes[1:]) == 0
    assert hit_length(index, [*hashes[1:], name(9)]) == 0


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (names(1, 9, 3), "hash 1 is not held but a later one is"),
        (names(9, 1), "hash 0 is not held but a later one is"),
        (names(1, 2, 3, 9, 4), "hash 3 is not held but a later one is"),
        (names(2, 3), "hash 0 is held behind another block"),
        (names(1, 3), "hash 1 is held behind another block"),
        (names(1, 2, 1), "hash 2 is held behind another block"),
        (names(1, 1), "hash 1 is held behind another block"),
        (names(3, 2, 1), "hash 0 is held behind another block"),
        (names(1, 11), "hash 1 is held behind another block"),
        (names(10, 11, 2), "hash 2 is held behind another block"),
    ],
)
def test_hashes_that_are_not_one_chain_are_refused(chain: list[BlockHash], message: str) -> None:
    index = Index()
    stored(index, names(1, 2, 3, 4))
    stored(index, names(10, 11))
    with pytest.raises(InvalidRequest, match=message) as refusal:
        index.rows_of(chain)
    assert refusal.value.field == "hashes"
    index.check()
    assert hit_length(index, names(1, 2, 3, 4)) == 4


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (names(1, 9, 3, 4), "hash 1 is not held but a later one is"),
        (names(9, 2, 3, 4), "hash 0 is not held but a later one is"),
        (names(1, 2, 10, 4), "hash 2 is held behind another block"),
        (names(1, 2, 2, 4), "hash 2 is held behind another block"),
    ],
)
def test_a_hit_whose_front_is_not_its_chain_is_refused(chain: list[BlockHash], message: str) -> None:
    index = Index()
    stored(index, names(1, 2, 3, 4))
    stored(index, names(10, 11))
    assert hit_length(index, chain) == 4, "bisection looks at a few hashes only"
    with pytest.raises(InvalidRequest, match=message):
        index.hit_rows(Chain(b"".join(chain), SIZE_BYTES), 4)


def test_a_tail_must_follow_the_parent_that_it_names() -> None:
    index = Index()
    rows = stored(index, names(1, 2, 3, 4))
    assert index.rows_of(names(3, 4, 5), parent=int(rows[1])).tolist() == rows[2:].tolist()
    assert len(index.rows_of(names(8, 9), parent=int(rows[1]))) == 0
    for parent in (int(rows[0]), int(rows[2]), NO_ROW):
        with pytest.raises(InvalidRequest, match="hash 0 is held behind another block"):
            index.rows_of(names(3, 4), parent=parent)


def test_blocks_written_before_their_prefix_become_resident_with_it() -> None:
    index = Index()
    first = index.insert(NO_ROW, names(1, 2), slots(2))
    second = index.insert(int(first[1]), names(3, 4), slots(2))
    third = index.insert(int(first[1]), names(5), slots(1))
    assert index.publish(second, 1.0).tolist() == []
    assert index.publish(third, 1.0).tolist() == []
    assert hit_length(index, names(1, 2, 3, 4)) == 0
    assert index.publish(first[1:], 1.0).tolist() == []
    became = index.publish(first[:1], 2.0).tolist()
    assert sorted(became) == sorted([*first.tolist(), *second.tolist(), *third.tolist()])
    assert hit_length(index, names(1, 2, 3, 4)) == 4
    assert hit_length(index, names(1, 2, 5)) == 3
    index.check()


def test_a_committed_chain_is_at_once_resident_even_while_others_wait() -> None:
    index = Index()
    waiting = index.insert(NO_ROW, names(1, 2), slots(2))
    index.publish(waiting[1:], 1.0)
    assert hit_length(index, names(1, 2)) == 0
    rows = stored(index, names(10, 11, 12))
    assert hit_length(index, names(10, 11, 12)) == 3
    assert index.state[rows].tolist() == [State.RESIDENT] * 3
    index.remove(int(waiting[1]))
    index.remove(int(waiting[0]))
    index.check()


def test_a_block_with_others_behind_it_cannot_be_removed() -> None:
    index = Index()
    rows = stored(index, names(1, 2))
    with pytest.raises(AssertionError, match="still has blocks behind it"):
        index.remove(int(rows[0]))
    index.check()
    assert hit_length(index, names(1, 2)) == 2


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_siblings_leave_in_any_order(order: tuple[int, ...]) -> None:
    index = Index()
    root = int(stored(index, names(1))[0])
    siblings = [int(stored(index, [name(number)], parent=root)[0]) for number in (10, 11, 12)]
    left = set(siblings)
    for position in order:
        index.remove(siblings[position])
        left.discard(siblings[position])
        assert set(index.children(root)) == left
        index.check()
    assert hit_length(index, names(1)) == 1


def test_a_subtree_lists_every_block_after_all_behind_it() -> None:
    index = Index()
    trunk = stored(index, names(1, 2, 3)).tolist()
    branch = stored(index, names(10, 11), parent=trunk[1]).tolist()
    other = stored(index, names(20), parent=branch[0]).tolist()
    stored(index, names(99))
    subtree = index.subtree(trunk[1])
    assert sorted(subtree) == sorted([*trunk[1:], *branch, *other])
    for position, row in enumerate(subtree):
        assert not set(index.children(row)) & set(subtree[position:])


def test_columns_grow_and_keep_what_they_held() -> None:
    index = Index()
    parent = NO_ROW
    for first in range(0, 9_000, 750):
        rows = index.insert(parent, names(*range(first, first + 750)), slots(750, first))
        index.publish(rows, float(first))
        index.checksum[rows] = np.arange(first, first + 750, dtype=np.uint64)
        parent = int(rows[-1])
    rows = index.rows_of(names(*range(9_000)))
    assert len(index) == len(rows) == 9_000
    assert index.slot[rows].tolist() == list(range(9_000))
    assert index.depth[rows].tolist() == list(range(9_000))
    assert index.checksum[rows].tolist() == list(range(9_000))
    assert index.last_used_s[rows].tolist() == [float(number // 750 * 750) for number in range(9_000)]
    assert hit_length(index, names(*range(9_500))) == 9_000


def test_rows_are_used_again_and_begin_blank() -> None:
    index = Index()
    rows = stored(index, names(*range(8)))
    index.uses[rows] = 7
    index.checksummed[rows] = True
    index.checksum[rows] = 42
    for row in rows.tolist()[::-1]:
        index.remove(row)
    assert len(index) == 0
    assert index.slot[rows].tolist() == [NO_SLOT] * 8
    # Two chains, so that old neighbours are strangers now.
    left = index.insert(NO_ROW, names(*range(100, 104)), slots(4))
    right = index.insert(NO_ROW, names(*range(200, 204)), slots(4))
    assert sorted([*left.tolist(), *right.tolist()]) == sorted(rows.tolist())
    for row in [*left.tolist(), *right.tolist()]:
        assert index.uses[row] == 0
        assert not index.checksummed[row]
        assert index.state[row] == State.RESERVED
    assert list(index.children(int(left[3]))) == list(index.children(int(right[3]))) == []
    assert index.row_of(name(0)) == NO_ROW
    assert hit_length(index, names(*range(8))) == 0
    index.check()


def test_many_comings_and_goings_take_no_more_rows() -> None:
    index = Index()
    highest = 0
    for round_number in range(200):
        rows = stored(index, names(*range(round_number * 16, round_number * 16 + 16)))
        highest = max(highest, int(rows.max()))
        for row in rows.tolist()[::-1]:
            index.remove(row)
    assert highest < 16


def test_the_hash_of_an_absent_row_is_an_error() -> None:
    index = Index()
    row = int(stored(index, names(1))[0])
    index.remove(row)
    with pytest.raises(AssertionError, match="absent"):
        index.hash_of(row)
