"""Slots of a holder that is late are used by nobody else until it lets go of them or is gone."""

from __future__ import annotations

import asyncio

import pytest

from kvservice import errors
from kvservice.leases import HoldKind
from kvservice.store.outcomes import Committed, Ended, Granted, Reserved, Written
from tests.stores import PAGE_BYTES, Engine, Workplace, at_once, chain, content_of, small_config, spec_of

pytestmark = pytest.mark.unit


def fill(workplace: Workplace, engine: Engine) -> int:
    """Reserve blocks one after another until no room can be made; how many slots were free or could be freed."""
    slots = 0
    for number in range(64):
        try:
            slots += len(workplace.put(engine, chain(f"filler {number}", 1)).slots)
        except errors.CapacityExhausted:
            return slots
    raise AssertionError("the arena never got full")


def late(workplace: Workplace) -> None:
    workplace.clock.advance(31.0)
    workplace.upkeep()


def test_a_reader_that_is_late_keeps_its_blocks_in_place(workplace: Workplace, engine: Engine) -> None:
    writer = workplace.engine()
    workplace.save(engine, chain("a", 4))
    granted = engine.get(chain("a", 4))
    late(workplace)
    assert workplace.store.leases.quarantined_slots() == 4
    assert workplace.store.metrics.registry.get_sample_value("kvservice_expirations_total", {"held": "lease"}) == 1
    assert fill(workplace, writer) == 12
    assert engine.read(granted.slots) == [content_of(block_hash) for block_hash in chain("a", 4)]
    # The blocks are still good for others, who may lease them again.
    assert writer.load(chain("a", 4)) == [content_of(block_hash) for block_hash in chain("a", 4)]
    assert workplace.store.release(engine.peer, [granted.hold_id], "") == Ended(live=0, expired=1)
    assert workplace.store.leases.quarantined_slots() == 0
    assert fill(workplace, writer) == 4


def test_a_writer_that_is_late_loses_its_blocks_but_nobody_gets_its_slots(workplace: Workplace, engine: Engine) -> None:
    other = workplace.engine()
    hashes = chain("a", 4)
    reserved = workplace.put(engine, hashes)
    late(workplace)
    assert (
        workplace.store.metrics.registry.get_sample_value("kvservice_expirations_total", {"held": "reservation"}) == 1
    )
    assert workplace.store.leases.quarantined_slots() == 4
    assert other.lookup(hashes).dram_blocks == 0
    # Another writer stores the same blocks elsewhere, while the late one goes on writing into its slots.
    again = workplace.put(other, hashes)
    assert not set(again.slots.tolist()) & set(reserved.slots.tolist())
    other.write(again.slots, [content_of(block_hash, 2) for block_hash in hashes])
    engine.write(reserved.slots, [content_of(block_hash, 1) for block_hash in hashes])
    assert other.commit(again) == [(4, Committed.PUBLISHED)]
    with pytest.raises(errors.ReservationLost):
        engine.commit(reserved)
    assert other.load(hashes) == [content_of(block_hash, 2) for block_hash in hashes]
    assert fill(workplace, other) == 8 + 4  # what was free, and the blocks just saved; not the quarantined slots
    assert workplace.store.abort(engine.peer, reserved.hold_id) is True
    assert workplace.store.leases.quarantined_slots() == 0
    assert engine.namespace.pool.free_slots == 4


@pytest.mark.parametrize("break_stream", [True, False])
def test_everything_a_process_held_is_free_when_it_is_gone(
    workplace: Workplace, engine: Engine, break_stream: bool
) -> None:
    other = workplace.engine()
    workplace.save(engine, chain("a", 4))
    engine.get(chain("a", 4))
    workplace.put(engine, chain("b", 4))
    if break_stream:
        workplace.store.detach(engine.peer)
        assert workplace.store.leases.quarantined_slots() == 8
        assert fill(workplace, other) == 8
        other.hang_up()
        other = workplace.engine()
    engine.hang_up()
    assert list(workplace.store.leases) == []
    assert workplace.store.leases.quarantined_slots() == 0
    assert fill(workplace, other) == 16
    with pytest.raises(errors.Unauthenticated):
        workplace.store.instances.of_token(engine.peer.token)


def test_hanging_up_twice_is_hanging_up(workplace: Workplace, engine: Engine) -> None:
    workplace.put(engine, chain("b", 4))
    engine.hang_up()
    with workplace.unchanged():
        engine.hang_up()


def test_a_broken_stream_expires_the_holds_of_that_process_only(workplace: Workplace, engine: Engine) -> None:
    other = workplace.engine()
    workplace.save(engine, chain("a", 2))
    mine, theirs = engine.get(chain("a", 2)), other.get(chain("a", 2))
    writing = workplace.put(other, chain("b", 2))
    workplace.store.detach(engine.peer)
    with pytest.raises(errors.LeaseExpired):
        workplace.store.renew(engine.peer, [mine.hold_id], [], 0.0)
    workplace.store.renew(other.peer, [theirs.hold_id], [writing.hold_id], 0.0)
    assert other.commit(writing) == [(2, Committed.PUBLISHED)]
    # The process is still there and may say that it let go, attached or not.
    assert workplace.store.release(engine.peer, [mine.hold_id], "") == Ended(live=0, expired=1)


def test_a_process_that_attaches_again_has_new_namespaces_and_old_holds(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 2))
    granted = engine.get(chain("a", 2))
    workplace.store.detach(engine.peer)
    workplace.run(workplace.store.attach(engine.peer, "again", [spec_of("another model", tenant="uid:1")]))
    # Id 1 names what was attached now: anything else would be another model's bytes.
    assert engine.namespace.spec.label == "another model"
    assert engine.lookup(chain("a", 2)).dram_blocks == 0
    with pytest.raises(errors.NamespaceUnknown):
        workplace.store.lookup(engine.peer, 2, chain("a", 1)[0])
    assert workplace.store.release(engine.peer, [granted.hold_id], "") == Ended(live=0, expired=1)


def test_a_live_hold_lasts_while_it_is_renewed(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 2))
    granted = engine.get(chain("a", 2))
    reserved = workplace.put(engine, chain("b", 2))
    for _ in range(5):
        workplace.clock.advance(29.0)
        workplace.upkeep()
        renewed = workplace.store.renew(engine.peer, [granted.hold_id], [reserved.hold_id], 0.0)
        assert renewed.duration_s == 30.0
    assert engine.commit(reserved) == [(2, Committed.PUBLISHED)]
    assert workplace.store.release(engine.peer, [granted.hold_id], "") == Ended(live=1, expired=0)


@pytest.mark.parametrize(("asked_s", "granted_s"), [(0.0, 30.0), (5.0, 5.0), (300.0, 300.0), (301.0, 300.0)])
def test_a_hold_lasts_as_long_as_asked_up_to_the_bound(
    workplace: Workplace, engine: Engine, asked_s: float, granted_s: float
) -> None:
    workplace.save(engine, chain("a", 2))
    granted = engine.get(chain("a", 2), duration_s=asked_s)
    reserved = workplace.put(engine, chain("b", 1), duration_s=asked_s)
    assert granted.duration_s == reserved.duration_s == granted_s
    workplace.clock.advance(granted_s - 0.5)
    workplace.upkeep()
    assert workplace.store.leases.quarantined_slots() == 0
    workplace.clock.advance(0.5)
    workplace.upkeep()
    assert workplace.store.leases.quarantined_slots() == 3


def test_a_block_with_two_readers_stays_until_both_let_go(workplace: Workplace, engine: Engine) -> None:
    other, writer = workplace.engine(), workplace.engine()
    workplace.save(engine, chain("a", 4))
    first, second = engine.get(chain("a", 4)), other.get(chain("a", 4))
    workplace.store.release(engine.peer, [first.hold_id], "")
    assert fill(workplace, writer) == 12
    workplace.store.release(other.peer, [second.hold_id], "")
    assert fill(workplace, writer) == 4


def test_a_leased_block_that_is_forgotten_is_unreachable_and_stays_where_it_is(
    workplace: Workplace, engine: Engine
) -> None:
    hashes = chain("a", 4)
    workplace.save(engine, hashes)
    granted = engine.get(hashes)
    assert workplace.store.forget_namespace(engine.peer, 1).in_use == 4
    assert engine.lookup(hashes).dram_blocks == 0
    again = workplace.put(engine, hashes)
    assert not set(again.slots.tolist()) & set(granted.slots.tolist())
    engine.write(again.slots, [content_of(block_hash, 9) for block_hash in hashes])
    assert engine.read(granted.slots) == [content_of(block_hash) for block_hash in hashes]
    free = engine.namespace.pool.free_slots
    workplace.store.release(engine.peer, [granted.hold_id], "")
    assert engine.namespace.pool.free_slots == free + 4


# ------------------------------------------------------------------- requests


def held_by(workplace: Workplace, engine: Engine, request_id: str) -> tuple[Granted, Reserved]:
    granted = engine.get(chain("a", 2), request_id=request_id)
    return granted, workplace.put(engine, chain(f"{engine.peer.instance_id} {request_id}", 2), request_id=request_id)


def test_a_request_ends_with_all_its_leases_and_reservations(workplace: Workplace, engine: Engine) -> None:
    other = workplace.engine()
    workplace.save(engine, chain("a", 2))
    held_by(workplace, engine, "r")
    granted, kept = held_by(workplace, engine, "s")
    held_by(workplace, other, "r")
    assert workplace.store.release(engine.peer, [], "r") == Ended(live=2, expired=0)
    left = {(hold.instance_id, hold.kind, hold.request_id) for hold in workplace.store.leases}
    mine, theirs = engine.peer.instance_id, other.peer.instance_id
    assert left == {
        (mine, HoldKind.READ, "s"),
        (mine, HoldKind.WRITE, "s"),
        (theirs, HoldKind.READ, "r"),
        (theirs, HoldKind.WRITE, "r"),
    }
    assert workplace.store.release(engine.peer, [], "r") == Ended(live=0, expired=0)
    assert engine.commit(kept) == [(2, Committed.PUBLISHED)]
    assert workplace.store.release(engine.peer, [granted.hold_id], "s") == Ended(live=1, expired=0)


def test_expired_holds_of_a_request_are_counted_apart(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 2))
    engine.get(chain("a", 2), request_id="r", duration_s=5.0)
    held_by(workplace, engine, "r")
    workplace.clock.advance(6.0)
    workplace.upkeep()
    assert workplace.store.release(engine.peer, [], "r") == Ended(live=2, expired=1)
    assert engine.namespace.pool.free_slots == 2, "the reservation's slots are free"


def test_a_hold_past_its_time_counts_as_expired_before_the_upkeep_comes_round(
    workplace: Workplace, engine: Engine
) -> None:
    workplace.save(engine, chain("a", 2))
    granted = engine.get(chain("a", 2))
    workplace.clock.advance(31.0)
    assert workplace.store.release(engine.peer, [granted.hold_id], "") == Ended(live=0, expired=1)


def test_a_release_of_nothing_is_nothing(workplace: Workplace, engine: Engine) -> None:
    engine.get(chain("a", 1))
    workplace.put(engine, chain("b", 1))
    with workplace.unchanged():
        assert workplace.store.release(engine.peer, [], "") == Ended(live=0, expired=0)


# ------------------------------------------------------------------- attempts


def attempt_put(workplace: Workplace, engine: Engine, attempt_id: int, name: str = "b") -> Reserved:
    return workplace.run(
        workplace.store.put(
            engine.peer,
            1,
            b"",
            b"".join(chain(name, 2)),
            session_id="",
            request_id="",
            duration_s=0.0,
            attempt_id=attempt_id,
        )
    )


def attempt_get(workplace: Workplace, engine: Engine, attempt_id: int) -> Granted:
    return at_once(
        workplace.store.get(
            engine.peer,
            1,
            b"".join(chain("a", 2)),
            session_id="",
            request_id="",
            duration_s=0.0,
            max_blocks=0,
            attempt_id=attempt_id,
        )
    )


def test_what_an_attempt_was_granted_can_be_given_back_without_its_id(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 2))
    attempt_get(workplace, engine, 7)
    attempt_put(workplace, engine, 8)
    kept = attempt_get(workplace, engine, 9)
    assert workplace.store.release(engine.peer, [], attempt_ids=[7, 8]) == Ended(live=2, expired=0)
    assert [hold.hold_id for hold in workplace.store.leases] == [kept.hold_id]


def test_an_attempt_given_up_before_it_was_granted_is_refused(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 2))
    assert workplace.store.release(engine.peer, [], attempt_ids=[7, 8]) == Ended(live=0, expired=0)
    with workplace.unchanged(), pytest.raises(errors.LeaseExpired, match="attempt 7 was released before"):
        attempt_get(workplace, engine, 7)
    with workplace.unchanged(), pytest.raises(errors.LeaseExpired, match="attempt 8 was released before"):
        attempt_put(workplace, engine, 8)
    # Another process counts for itself.
    assert attempt_get(workplace, workplace.engine(), 7).hold_id


def test_holds_without_an_attempt_are_nobodys_attempt(workplace: Workplace, engine: Engine) -> None:
    workplace.save(engine, chain("a", 2))
    engine.get(chain("a", 2))
    with workplace.unchanged():
        assert workplace.store.release(engine.peer, [], attempt_ids=[0]) == Ended(live=0, expired=0)
    assert engine.get(chain("a", 2)).hold_id


def test_an_attempt_that_waits_for_room_can_be_given_up() -> None:
    with Workplace(small_config(dram_bytes=8 * PAGE_BYTES)) as workplace:
        engine = workplace.engine()
        workplace.save(engine, chain("a", 4))

        async def scenario() -> None:
            waiting = asyncio.create_task(
                workplace.store.put(
                    engine.peer,
                    1,
                    b"",
                    b"".join(chain("b", 2)),
                    session_id="",
                    request_id="",
                    duration_s=0.0,
                    attempt_id=5,
                )
            )
            await asyncio.sleep(0)
            assert not waiting.done(), "it waits for a segment"
            workplace.store.release(engine.peer, [], attempt_ids=[5])
            with pytest.raises(errors.LeaseExpired):
                await waiting

        workplace.run(scenario())
        assert list(workplace.store.leases) == []
        assert workplace.put(engine, chain("b", 2)).known == []


def test_a_put_says_what_is_written_by_somebody_who_is_late(workplace: Workplace, engine: Engine) -> None:
    """Between expiry and upkeep the blocks are still the late writer's; nobody else may have them."""
    other = workplace.engine()
    workplace.put(engine, chain("a", 2))
    workplace.clock.advance(31.0)
    assert workplace.put(other, chain("a", 2)).known == [(2, Written.BEING_WRITTEN)]
    workplace.upkeep()
    assert workplace.put(other, chain("a", 2)).known == []
