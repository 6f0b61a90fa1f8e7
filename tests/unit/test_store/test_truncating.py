"""Truncated sessions: kept blocks under new names with their shifts, for nobody else, while their sources live."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice.blocks import DropReason
from kvservice.errors import Draining, InvalidRequest, NamespaceUnknown
from kvservice.index import State
from kvservice.store.outcomes import Dropped, Granted, Held, KeptRun, Miss, Truncated, Written
from kvservice.store.truncating import DropOldest, KeepRanges, plan
from tests.stores import HASH_BYTES, PAGE_BYTES, Engine, Workplace, chain, content_of, small_config
from tests.unit.test_store.explaining import finding

pytestmark = pytest.mark.unit

TOKENS = 16
"""Per block."""
HALF = DropOldest(0.5, sink_blocks=0)


def salted(session: str, hashes: Sequence[bytes]) -> list[bytes]:
    """New names for kept blocks: a chain that depends on the session and on the old names."""
    names, before = [], hashlib.sha256(session.encode()).digest()
    for block_hash in hashes:
        before = hashlib.sha256(before + block_hash).digest()
        names.append(before[:HASH_BYTES])
    return names


def load(engine: Engine, hashes: Sequence[bytes], session: str = "talk") -> tuple[list[bytes], list[int], Miss]:
    """What a client that rotates keys gets: contents, shifts, and why no more."""
    granted = engine.get(hashes, session_id=session, accepts_shifts=True)
    contents = engine.read(granted.slots)
    if granted.hold_id:
        engine.store.release(engine.peer, [granted.hold_id])
    shifts = list(granted.shifts) or [0] * len(contents)
    return contents, shifts, granted.miss


def contents(hashes: Sequence[bytes]) -> list[bytes]:
    return [content_of(block_hash) for block_hash in hashes]


@pytest.fixture
def old(workplace: Workplace, engine: Engine) -> list[bytes]:
    """A session's chain of 8 blocks."""
    hashes = chain("a", 8)
    workplace.save(engine, hashes, session_id="talk")
    return hashes


# ------------------------------------------------------------------------ plan


def test_the_oldest_part_goes_and_the_sinks_stay() -> None:
    assert plan(DropOldest(0.5, 0), 8, TOKENS) == [KeptRun(4, 4, 0)]
    assert plan(DropOldest(0.5, 2), 8, TOKENS) == [KeptRun(0, 2, 0), KeptRun(6, 2, 2)]
    assert plan(DropOldest(0.3, 1), 10, TOKENS) == [KeptRun(0, 1, 0), KeptRun(4, 6, 1)]


def test_a_dropped_part_is_rounded_up_and_a_kept_range_inwards() -> None:
    assert plan(DropOldest(0.5, 0), 7, TOKENS) == [KeptRun(4, 3, 0)]
    assert plan(KeepRanges([(1, 50)]), 8, TOKENS) == [KeptRun(1, 2, 0)]
    assert plan(KeepRanges([(0, 16), (40, 128)]), 8, TOKENS) == [KeptRun(0, 1, 0), KeptRun(3, 5, 1)]
    assert plan(KeepRanges([(17, 31), (40, 128)]), 8, TOKENS) == [KeptRun(3, 5, 0)]


@pytest.mark.parametrize(
    ("keep", "match"),
    [
        (KeepRanges([(16, 16)]), "does not follow"),
        (KeepRanges([(32, 16)]), "does not follow"),
        (KeepRanges([(0, 129)]), "128 tokens"),
        (KeepRanges([(0, 32), (16, 64)]), "does not follow 32"),
        (KeepRanges([(64, 128), (0, 32)]), "does not follow 128"),
        (KeepRanges([]), "no whole block"),
        (KeepRanges([(1, 16)]), "no whole block"),
        (KeepRanges([(at, at + 1) for at in range(65)]), "at most 64"),
        (DropOldest(0.0, 0), "between 0 and 1"),
        (DropOldest(1.0, 0), "between 0 and 1"),
        (DropOldest(float("nan"), 0), "between 0 and 1"),
        (DropOldest(0.99, 0), "no whole block"),
    ],
)
def test_bad_parts_are_refused(keep: KeepRanges | DropOldest, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        plan(keep, 8, TOKENS)


@given(st.integers(1, 500), st.floats(0.01, 0.99), st.integers(0, 20))
def test_a_ratio_never_keeps_more_than_asked_for(blocks: int, ratio: float, sinks: int) -> None:
    try:
        runs = plan(DropOldest(ratio, sinks), blocks, TOKENS)
    except InvalidRequest:
        return
    kept = sum(run.blocks for run in runs)
    assert blocks - kept >= min(ratio * blocks - 1e-5, blocks - sinks)
    assert runs[-1].first_block + runs[-1].blocks in (blocks, min(sinks, blocks))
    assert [run.new_first_block for run in runs] == [0, runs[0].blocks][: len(runs)]


# ------------------------------------------------------------------ new names


def test_kept_blocks_are_read_under_their_new_names_with_their_shift(engine: Engine, old: list[bytes]) -> None:
    slots_before = engine.namespace.pool.free_slots
    new = salted("talk", old[4:])
    assert engine.truncate("talk", new, HALF) == Truncated(8, [KeptRun(4, 4, 0)], 4, Miss.NOT_HELD)
    assert load(engine, new) == (contents(old[4:]), [-4 * TOKENS] * 4, Miss.NOT_HELD)
    assert engine.namespace.pool.free_slots == slots_before, "bytes were copied"
    assert load(engine, old)[0] == contents(old), "the old names are gone"


def test_sinks_have_no_shift(engine: Engine, old: list[bytes]) -> None:
    kept = [*old[:2], *old[6:]]
    new = salted("talk", kept)
    engine.truncate("talk", new, DropOldest(0.5, sink_blocks=2))
    assert load(engine, new) == (contents(kept), [0, 0, -4 * TOKENS, -4 * TOKENS], Miss.NOT_HELD)
    looked = engine.lookup(new)
    assert (looked.dram_blocks, list(looked.shifts)) == (4, [0, 0, -64, -64])


def test_without_hashes_only_the_plan_is_answered(workplace: Workplace, engine: Engine, old: list[bytes]) -> None:
    with workplace.unchanged():
        assert engine.truncate("talk", [], HALF) == Truncated(8, [KeptRun(4, 4, 0)], 0, Miss.NOT_HELD)


def test_doing_it_again_changes_nothing(workplace: Workplace, engine: Engine, old: list[bytes]) -> None:
    new = salted("talk", old[4:])
    first = engine.truncate("talk", new, HALF, source=old)
    with workplace.unchanged():
        assert engine.truncate("talk", new, HALF, source=old) == first


def test_an_unknown_session_has_no_chain(workplace: Workplace, engine: Engine, old: list[bytes]) -> None:
    with workplace.unchanged():
        assert engine.truncate("nobody", [], HALF) == Truncated(0, [], 0, Miss.NOT_HELD)


def test_what_is_not_held_of_the_chain_ends_the_kept_part(
    workplace: Workplace, engine: Engine, old: list[bytes]
) -> None:
    longer = chain("a", 10)
    new = salted("talk", longer[5:])
    done = engine.truncate("talk", new, HALF, source=longer)
    assert (done.chain_blocks, done.held_blocks, done.miss) == (10, 3, Miss.NOT_HELD)
    assert load(engine, new)[0] == contents(old[5:])
    # Where the sinks are not all held, nothing behind them can be named.
    assert engine.truncate("talk", salted("x", chain("b", 4)), HALF, source=chain("b", 8)).held_blocks == 0


def test_the_next_turn_is_saved_behind_the_truncated_chain(
    workplace: Workplace, engine: Engine, old: list[bytes]
) -> None:
    new = salted("talk", old[4:])
    engine.truncate("talk", new, HALF)
    turn = chain("turn", 3)
    reserved = workplace.save(engine, turn, parent=new[-1], session_id="talk")
    assert len(reserved.slots) == 3
    assert load(engine, [*new, *turn]) == (
        [*contents(old[4:]), *contents(turn)],
        [-4 * TOKENS] * 4 + [0] * 3,
        Miss.NOT_HELD,
    )
    # From the root as well: what is known needs no writing.
    assert workplace.put(engine, [*new, *turn], session_id="talk").known == [(7, Written.HELD)]


def test_two_truncations_equal_one_to_the_combined_position(workplace: Workplace) -> None:
    with Workplace(small_config(dram_bytes=64 * PAGE_BYTES)) as roomy:
        engine = roomy.engine()
        old = chain("a", 12)
        roomy.save(engine, old, session_id="talk")
        once = salted("talk", old[3:])
        engine.truncate("talk", once, KeepRanges([(3 * TOKENS, 12 * TOKENS)]))
        turn = chain("turn", 3)
        roomy.save(engine, turn, parent=once[-1], session_id="talk")
        twice = salted("talk again", [*once[5:], *turn])
        engine.truncate("talk", twice, KeepRanges([(5 * TOKENS, 12 * TOKENS)]))
        direct = salted("direct", old[8:])
        engine.truncate("talk", direct, KeepRanges([(8 * TOKENS, 12 * TOKENS)]), source=old)
        assert load(engine, twice) == (
            [*contents(old[8:]), *contents(turn)],
            [-8 * TOKENS] * 4 + [-5 * TOKENS] * 3,
            Miss.NOT_HELD,
        )
        assert load(engine, twice[:4])[:2] == load(engine, direct)[:2]
        sources = engine.namespace.index.source
        assert (sources[sources[sources >= 0]] < 0).all(), "an alias of an alias"


# ------------------------------------------------------------- for nobody else


def test_nobody_else_is_handed_a_truncated_sessions_blocks(
    workplace: Workplace, engine: Engine, old: list[bytes]
) -> None:
    new = salted("talk", old[4:])
    engine.truncate("talk", new, HALF)
    turn = chain("turn", 2)
    workplace.save(engine, turn, parent=new[-1], session_id="talk")
    stranger = workplace.engine()
    for granted in (
        engine.get([*new, *turn], session_id="other", accepts_shifts=True),
        engine.get([*new, *turn], accepts_shifts=True),
        engine.get([*new, *turn], session_id="talk"),  # an engine that knows nothing of shifts
        stranger.get([*new, *turn], session_id="stranger", accepts_shifts=True),
    ):
        assert isinstance(granted, Granted)
        assert (len(granted.slots), granted.hold_id, granted.miss) == (0, 0, Miss.OTHER_SESSION)
    assert load(stranger, new, "talk")[0] == contents(old[4:]), "the session moved to another engine"


def test_nobody_else_puts_blocks_behind_them(workplace: Workplace, engine: Engine, old: list[bytes]) -> None:
    new = salted("talk", old[4:])
    engine.truncate("talk", new, HALF)
    for session in ("", "other"):
        with workplace.unchanged():
            refused = workplace.put(engine, chain("turn", 2), parent=new[-1], session_id=session)
            assert refused.known == [(2, Written.OTHER_SESSION)]
            assert workplace.put(engine, new, session_id=session).known == [(4, Written.OTHER_SESSION)]


def test_nobody_else_truncates_them(workplace: Workplace, engine: Engine, old: list[bytes]) -> None:
    new = salted("talk", old[4:])
    engine.truncate("talk", new, HALF)
    theirs = salted("other", new[2:])
    done = engine.truncate("other", theirs, HALF, source=new)
    assert (done.held_blocks, done.miss) == (0, Miss.OTHER_SESSION)
    with workplace.unchanged(), pytest.raises(InvalidRequest, match="another session's"):
        engine.truncate("other", new, HALF, source=old)


@pytest.mark.parametrize(
    ("session", "kept", "match"),
    [
        ("", 4, "belongs to a session"),
        ("talk", 3, "3 hashes for 4 kept blocks"),
        ("talk", 5, "5 hashes for 4 kept blocks"),
    ],
)
def test_a_call_that_contradicts_itself_is_refused(
    workplace: Workplace, engine: Engine, old: list[bytes], session: str, kept: int, match: str
) -> None:
    with workplace.unchanged(), pytest.raises(InvalidRequest, match=match):
        engine.truncate(session, salted("talk", old[:kept]), HALF)


def test_names_that_are_not_salted_are_refused(workplace: Workplace, engine: Engine, old: list[bytes]) -> None:
    with workplace.unchanged():
        with pytest.raises(InvalidRequest, match="salt them"):
            engine.truncate("talk", old[4:], HALF)
        with pytest.raises(InvalidRequest, match="salt them"):
            engine.truncate("talk", old[:4], KeepRanges([(0, 64)]))
        with pytest.raises(InvalidRequest, match="named twice"):
            engine.truncate("talk", [old[4][::-1]] * 4, HALF)
        with pytest.raises(InvalidRequest, match="multiple"):
            engine.truncate("talk", [b"short"], HALF)


def test_a_draining_daemon_and_an_unknown_namespace_refuse(workplace: Workplace, engine: Engine) -> None:
    engine.namespace_id = 2
    with pytest.raises(NamespaceUnknown):
        engine.truncate("talk", [], HALF)
    workplace.store.drain()
    with pytest.raises(Draining):
        engine.truncate("talk", [], HALF)


# -------------------------------------------------- a reference, never a pin


def test_an_alias_does_not_keep_its_source(workplace: Workplace, engine: Engine, old: list[bytes]) -> None:
    new = salted("talk", old[4:])
    engine.truncate("talk", new, HALF)
    for name in "bcd":
        workplace.save(engine, chain(name, 8))
    assert load(engine, new)[0] == []
    gone = finding(workplace, new[0])
    assert isinstance(gone, Dropped)
    assert gone.reason in (DropReason.SOURCE_LOST, DropReason.PREFIX_LOST)
    assert len(engine.namespace.aliases) == 0


def test_using_an_alias_keeps_its_source_from_being_the_next_to_leave(
    workplace: Workplace, engine: Engine, old: list[bytes]
) -> None:
    workplace.save(engine, chain("b", 8), session_id="idle")
    new = salted("talk", old[4:])
    engine.truncate("talk", new, HALF)
    load(engine, new)
    workplace.save(engine, chain("c", 8))
    assert load(engine, new)[0] == contents(old[4:])
    assert engine.lookup(chain("b", 8)).dram_blocks == 0


def test_bytes_outlive_their_name_while_an_alias_has_them(workplace: Workplace, engine: Engine) -> None:
    """The former truncation's blocks leave from the front; what a later one keeps of them stays."""
    old = chain("a", 4)
    workplace.save(engine, old, session_id="talk")
    once = salted("talk", old[2:])
    engine.truncate("talk", once, HALF)
    turn = chain("turn", 2)
    workplace.save(engine, turn, parent=once[-1], session_id="talk")
    twice = salted("talk again", turn)
    engine.truncate("talk", twice, HALF, source=[*once, *turn])
    namespace = engine.namespace
    row = namespace.index.row_of(old[2])  # type: ignore[arg-type]
    namespace.drop_subtrees([row], DropReason.CAPACITY, 0.0)
    workplace.store.check()
    assert load(engine, once)[0] == []
    assert load(engine, [*once, *turn])[0] == []
    assert load(engine, twice) == (contents(turn), [-2 * TOKENS] * 2, Miss.NOT_HELD)
    unnamed = (namespace.index.state == State.UNNAMED).sum()
    assert unnamed == 2
    # They leave as any block does, and their alias with them.
    for name in "bcd":
        workplace.save(engine, chain(name, 8))
    assert load(engine, twice)[0] == []
    assert (namespace.index.state != State.UNNAMED).all()


def test_unnamed_bytes_go_with_their_last_alias(workplace: Workplace, engine: Engine, old: list[bytes]) -> None:
    new, other = salted("talk", old[4:]), salted("other", old[4:])
    engine.truncate("talk", new, HALF, source=old)
    engine.truncate("other", other, HALF, source=old)
    engine.namespace.drop_subtrees([engine.namespace.index.row_of(old[0])], DropReason.CORRUPT, 0.0)  # type: ignore[arg-type]
    workplace.store.check()
    free = engine.namespace.pool.free_slots
    assert load(engine, new)[0] == contents(old[4:])
    engine.store.forget_session(engine.peer, 1, "talk")
    assert load(engine, other, "other")[0] == contents(old[4:])
    assert engine.namespace.pool.free_slots == free
    engine.store.forget_session(engine.peer, 1, "other")
    assert engine.namespace.pool.free_slots == free + 4


def test_a_leased_source_is_read_to_the_end(workplace: Workplace, engine: Engine, old: list[bytes]) -> None:
    new = salted("talk", old[4:])
    engine.truncate("talk", new, HALF)
    granted = engine.get(new, session_id="talk", accepts_shifts=True)
    engine.store.forget_namespace(engine.peer, 1)
    workplace.store.check()
    assert engine.read(granted.slots) == contents(old[4:])
    engine.store.release(engine.peer, [granted.hold_id])


def test_forgetting_a_session_takes_its_truncations_along(
    workplace: Workplace, engine: Engine, old: list[bytes]
) -> None:
    new = salted("talk", old[4:])
    engine.truncate("talk", new, HALF)
    workplace.save(engine, chain("turn", 2), parent=new[-1], session_id="talk")
    assert engine.store.forget_session(engine.peer, 1, "talk").dropped == 10
    assert len(engine.namespace.index) == len(engine.namespace.aliases) == 0
    assert engine.namespace.pool.free_slots == engine.namespace.pool.total_slots


def test_bounds_take_the_oldest_truncation() -> None:
    with Workplace(small_config(aliases_per_session_max=5)) as workplace:
        engine = workplace.engine()
        old = chain("a", 8)
        workplace.save(engine, old, session_id="talk")
        first, second = salted("1", old[4:]), salted("2", old[5:])
        engine.truncate("talk", first, HALF, source=old)
        engine.truncate("talk", second, KeepRanges([(5 * TOKENS, 8 * TOKENS)]), source=old)
        assert (load(engine, first)[0], load(engine, second)[0]) == ([], contents(old[5:]))
        gone = finding(workplace, first[0])
        assert isinstance(gone, Dropped)
        assert gone.reason is DropReason.ALIAS_LIMIT
        with workplace.unchanged(), pytest.raises(InvalidRequest, match="at most 5"):
            engine.truncate("talk", salted("3", old[:6]), KeepRanges([(0, 96)]), source=old)


def test_explain_knows_where_an_aliases_bytes_are(workplace: Workplace, engine: Engine, old: list[bytes]) -> None:
    new = salted("talk", old[4:])
    engine.truncate("talk", new, HALF)
    held = finding(workplace, new[1])
    assert isinstance(held, Held)
    assert (len(held.tiers), held.depth) == (1, 1)
