"""Engines do what engines do, at random: a miss is allowed, a wrong byte never."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings

from kvservice.blocks import DropReason
from tests.simulation.machine import DEPTH_MAX, Stored
from tests.stores import PAGE_BYTES

pytestmark = pytest.mark.unit

TestStored = Stored.TestCase
TestStored.settings = settings(
    max_examples=50,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

# How often each thing happens in a long history, out of 100.
SHARES = {
    "save": 22,
    "load": 20,
    "begin_to_read": 12,
    "begin_to_write": 12,
    "commit": 10,
    "finish": 6,
    "time_passes": 5,
    "upkeep": 4,
    "acknowledge_late": 4,
    "engine": 2,
    "forget": 3,
}


def step(machine: Stored, chooser: random.Random) -> None:
    """One thing that happens."""
    (what,) = chooser.choices(list(SHARES), list(SHARES.values()))
    which, number, depth = chooser.randrange(12), chooser.randrange(12), chooser.randint(1, DEPTH_MAX)
    session = chooser.choice(["", "a", "b", "c", "d"])
    if what in ("save", "load"):
        numbers = [chooser.randrange(12) for _ in range(chooser.randint(1, 4))]
        getattr(machine, what)(which=which, numbers=numbers, depth=depth, session=session)
    elif what == "begin_to_read":
        machine.begin_to_read(which=which, number=number, depth=depth, session=session)
    elif what == "begin_to_write":
        split = chooser.randint(0, 2)
        machine.begin_to_write(which=which, number=number, depth=depth, session=session, split=split)
    elif what == "commit" and machine.writers:
        machine.commit(which=which, some=chooser.randint(1, 63))
    elif what == "finish" and (machine.readers or machine.writers):
        machine.finish(which=which)
    elif what == "time_passes":
        machine.time_passes(seconds=chooser.choice([1.0, 10.0, 31.0]))
    elif what == "upkeep":
        machine.upkeep()
    elif what == "acknowledge_late" and machine.frozen:
        machine.acknowledge_late(which=which)
    elif what == "engine":
        machine.engine(which=which, how=chooser.choice(["dies", "loses its stream"]))
    elif what == "forget":
        machine.forget(which=which, session=session)


@pytest.mark.parametrize(("seed", "quota"), [(1, 0), (2, 14 * PAGE_BYTES), (3, 0)])
def test_a_long_history(seed: int, quota: int) -> None:
    """The same machine for much longer than hypothesis would, by a seed, and proof that much happened."""
    chooser, machine = random.Random(seed), Stored()
    machine.open(quota=quota, growth=4 * PAGE_BYTES)
    late = 0
    try:
        for _ in range(1_200):
            step(machine, chooser)
            machine.the_books_agree()
            machine.copies_go_on()
            machine.everything_held_has_its_bytes()
            late += len(machine.frozen)
        counters = [namespace.counters for namespace in machine.store.namespaces.values()]
        assert min(of_one.dram_hits for of_one in counters) > 200
        assert min(of_one.committed for of_one in counters) > 200
        dropped = Counter[DropReason]()
        for of_one in counters:
            dropped.update(of_one.dropped)
        assert set(dropped) >= {
            DropReason.QUOTA if quota else DropReason.CAPACITY,
            DropReason.FORGOTTEN,
            DropReason.ABORTED,
            DropReason.PREFIX_LOST,
        }
        assert late > 500
    finally:
        machine.teardown()
