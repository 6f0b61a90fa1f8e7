"""Blocks whose time to live passed leave, from the ends of chains, in slices, and never under a holder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvservice.blocks import DropReason
from kvservice.config import NamespaceRule
from kvservice.store import expiry, explain
from kvservice.store.outcomes import Dropped
from tests.stores import PAGE_BYTES, Workplace, chain, small_config, spec_of

pytestmark = pytest.mark.unit

TTL_S = 60.0


@pytest.fixture
def workplace() -> Iterator[Workplace]:
    rules = {"kept*": NamespaceRule(ttl_s=0.0)}
    with Workplace(small_config(ttl_s=TTL_S, namespaces=rules, dram_bytes=64 * PAGE_BYTES)) as made:
        yield made


def test_what_nobody_used_for_its_time_leaves_and_says_why(workplace: Workplace) -> None:
    engine = workplace.engine()
    workplace.save(engine, chain("a", 3), session_id="talk")
    workplace.clock.advance(TTL_S - 1)
    workplace.upkeep()
    assert engine.lookup(chain("a", 3)).hit_blocks == 3
    workplace.clock.advance(2)
    workplace.upkeep()
    assert engine.lookup(chain("a", 3)).hit_blocks == 0
    assert len(engine.namespace.sessions) == 0
    spec, now_s = spec_of(), workplace.clock()
    finding = explain(workplace.store.namespaces.values(), spec.key.tenant, chain("a", 3)[1], b"", now_s)[0].finding
    assert isinstance(finding, Dropped)
    assert (finding.reason, finding.idle_s) == (DropReason.EXPIRED, TTL_S + 1)


def test_use_begins_the_time_anew_for_everything_in_front(workplace: Workplace) -> None:
    engine = workplace.engine()
    workplace.save(engine, chain("a", 4))
    workplace.clock.advance(TTL_S - 1)
    assert len(engine.load(chain("a", 2))) == 2
    workplace.clock.advance(2)
    workplace.upkeep()
    assert engine.lookup(chain("a", 4)).hit_blocks == 2, "the end was not used"
    workplace.save(engine, chain("a", 3)[2:], parent=chain("a", 2)[1])
    workplace.clock.advance(TTL_S - 1)
    workplace.upkeep()
    assert engine.lookup(chain("a", 3)).hit_blocks == 3, "a fresh end keeps what is in front of it"


def test_a_leased_block_stays_until_it_is_released(workplace: Workplace) -> None:
    engine = workplace.engine()
    workplace.save(engine, chain("a", 2))
    granted = engine.get(chain("a", 2), duration_s=300.0)
    workplace.clock.advance(TTL_S + 1)
    workplace.upkeep()
    assert engine.lookup(chain("a", 2)).hit_blocks == 2
    workplace.store.release(engine.peer, [granted.hold_id])
    workplace.upkeep()
    assert engine.lookup(chain("a", 2)).hit_blocks == 0


def test_a_rule_decides_for_its_namespaces(workplace: Workplace) -> None:
    engine = workplace.engine(spec_of("kept for ever"))
    workplace.save(engine, chain("a", 2))
    workplace.clock.advance(1000 * TTL_S)
    workplace.upkeep()
    assert engine.lookup(chain("a", 2)).hit_blocks == 2


def test_one_round_drops_and_looks_at_no_more_than_a_slice(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry, "_DROPS_PER_SLICE", 3)
    monkeypatch.setattr(expiry, "_ROWS_PER_SLICE", 512)
    engine = workplace.engine()
    for name in "abcd":
        workplace.save(engine, chain(name, 2))
    workplace.clock.advance(TTL_S + 1)
    left = []
    for _ in range(8):  # the index has 1,024 rows: every second round looks at the empty half
        workplace.upkeep()
        left.append(len(engine.namespace.index))
    assert left[0] == 5, "no more than three at a time"
    assert left[-1] == 0
