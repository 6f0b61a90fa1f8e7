"""Explain says of every hash why it is a hit or a miss, inside the tenant that asks."""

from __future__ import annotations

import pytest

from kvservice.blocks import DropReason, Tier
from kvservice.store.outcomes import BeingStored, Dropped, Elsewhere, Explanation, Held, NotRemembered
from tests.stores import Engine, Workplace, chain, small_config, spec_of
from tests.unit.test_store.explaining import explanations, finding

pytestmark = pytest.mark.unit

(STRANGER,) = chain("never stored", 1)


def test_a_hit_says_where_how_deep_and_how_used(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 3)
    workplace.save(engine, hashes)
    workplace.save(engine, chain("branch", 1), parent=hashes[1])
    engine.load(hashes)
    engine.get(hashes[:2])
    workplace.clock.advance(7.0)
    assert finding(workplace, hashes[1]) == Held(
        tiers=(Tier.DRAM,), depth=1, children=2, idle_s=7.0, uses=2, holders=1, is_checksummed=False
    )
    assert finding(workplace, hashes[2]) == Held(
        tiers=(Tier.DRAM,), depth=2, children=0, idle_s=7.0, uses=1, holders=0, is_checksummed=False
    )


def test_a_block_under_a_writers_hands_says_since_when(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 2)
    reserved = workplace.put(engine, hashes)
    workplace.clock.advance(3.0)
    assert finding(workplace, hashes[1]) == BeingStored(age_s=3.0, is_written=False)
    engine.commit(reserved, [1])
    workplace.clock.advance(1.0)
    assert finding(workplace, hashes[1]) == BeingStored(age_s=1.0, is_written=True)
    assert finding(workplace, hashes[0]) == BeingStored(age_s=4.0, is_written=False)


def test_an_evicted_block_says_why_when_and_how_long_it_was_idle(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 16)
    workplace.save(engine, hashes)
    workplace.clock.advance(5.0)
    workplace.save(engine, chain("b", 1))
    workplace.clock.advance(2.0)
    assert finding(workplace, hashes[-1]) == Dropped(DropReason.CAPACITY, ago_s=2.0, idle_s=5.0)
    assert isinstance(finding(workplace, hashes[0]), Held)


def test_a_block_stored_again_is_held_again(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 1)
    workplace.save(engine, hashes)
    workplace.store.forget_namespace(engine.peer, 1)
    assert isinstance(finding(workplace, hashes[0]), Dropped)
    workplace.save(engine, hashes)
    assert isinstance(finding(workplace, hashes[0]), Held)


def test_a_block_never_stored_says_how_far_memory_goes(workplace: Workplace, engine: Engine) -> None:
    assert finding(workplace, STRANGER) == NotRemembered(65_536, 0.0)
    workplace.save(engine, chain("a", 2))
    workplace.store.forget_namespace(engine.peer, 1)
    workplace.clock.advance(9.0)
    assert finding(workplace, STRANGER) == NotRemembered(65_536, 9.0)


def test_a_departure_beyond_the_bound_is_not_remembered() -> None:
    with Workplace(small_config(explain_history_blocks=2)) as workplace:
        engine = workplace.engine()
        hashes = chain("a", 3)
        workplace.save(engine, hashes)
        workplace.store.forget_namespace(engine.peer, 1)
        workplace.clock.advance(4.0)
        # The deepest left first.
        assert finding(workplace, hashes[2]) == NotRemembered(2, 4.0)
        assert isinstance(finding(workplace, hashes[1]), Dropped)


def test_a_hash_of_another_namespace_of_the_tenant_is_elsewhere(workplace: Workplace) -> None:
    one, two = spec_of("one", tenant="uid:1"), spec_of("two", tenant="uid:1", label="the second")
    engine = workplace.engine(one, two)
    workplace.save(engine, chain("a", 1))
    (block_hash,) = chain("a", 1)
    assert explanations(workplace, block_hash, fingerprint=two.key.fingerprint) == [
        Explanation(two, Elsewhere(("one",)))
    ]
    (explanation,) = explanations(workplace, block_hash)
    assert explanation.spec == one
    assert isinstance(explanation.finding, Held)
    assert explanations(workplace, block_hash, fingerprint=b"?" * 32) == [Explanation(None, Elsewhere(("one",)))]


def test_every_namespace_that_knows_the_hash_is_named(workplace: Workplace) -> None:
    one, two, three = (spec_of(name, tenant="uid:1") for name in ("one", "two", "three"))
    engine = workplace.engine(one, two, three)
    (block_hash,) = chain("a", 1)
    workplace.save(engine, [block_hash])
    engine.namespace_id = 2
    workplace.save(engine, [block_hash])
    workplace.store.forget_namespace(engine.peer, 2)
    found = {explanation.spec: type(explanation.finding) for explanation in explanations(workplace, block_hash)}
    assert found == {one: Held, two: Dropped}


def test_another_tenant_is_told_nothing(workplace: Workplace, engine: Engine) -> None:
    other = workplace.engine(uid=2)
    (block_hash,) = chain("a", 1)
    workplace.save(engine, [block_hash])
    assert isinstance(finding(workplace, block_hash), Held)
    fingerprint = engine.namespace.spec.key.fingerprint
    assert finding(workplace, block_hash, tenant="uid:2") == NotRemembered(65_536, 0.0)
    assert finding(workplace, block_hash, tenant="uid:2", fingerprint=fingerprint) == NotRemembered(65_536, 0.0)
    workplace.store.forget_namespace(engine.peer, 1)
    assert isinstance(finding(workplace, block_hash), Dropped)
    assert finding(workplace, block_hash, tenant="uid:2") == NotRemembered(65_536, 0.0)
    assert other.lookup([block_hash]).dram_blocks == 0


def test_a_tenant_without_namespaces_gets_an_answer(workplace: Workplace, engine: Engine) -> None:
    assert explanations(workplace, STRANGER, tenant="uid:99") == [Explanation(None, NotRemembered(0, 0.0))]


def test_asking_changes_nothing(workplace: Workplace, engine: Engine) -> None:
    hashes = chain("a", 4)
    workplace.save(engine, hashes)
    workplace.put(engine, chain("b", 2))
    with workplace.unchanged():
        for block_hash in [*hashes, *chain("b", 2), STRANGER]:
            explanations(workplace, block_hash)
