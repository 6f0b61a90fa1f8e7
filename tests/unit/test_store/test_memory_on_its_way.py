"""A put that comes while memory is being made for its namespace waits for it: it neither evicts nor is refused."""

from __future__ import annotations

import asyncio

import pytest

from tests.stores import PAGE_BYTES, Workplace, chain, small_config

pytestmark = pytest.mark.unit


def test_upkeep_and_a_put_that_need_memory_at_once_agree() -> None:
    with Workplace(small_config(dram_grow_ahead_bytes=8 * PAGE_BYTES, dram_bytes=8 * PAGE_BYTES)) as workplace:
        engine = workplace.engine()

        async def both() -> None:
            _, reserved = await asyncio.gather(workplace.store.upkeep(), engine.put(chain("a", 7)))
            assert len(reserved.slots) == 7

        workplace.run(both())
        assert workplace.store.arena.used_bytes == 8 * PAGE_BYTES


def test_a_put_evicts_nothing_while_memory_for_it_is_being_made() -> None:
    with Workplace(small_config(dram_grow_ahead_bytes=4 * PAGE_BYTES, dram_bytes=8 * PAGE_BYTES)) as workplace:
        engine = workplace.engine()
        workplace.save(engine, chain("a", 4))

        async def both() -> None:
            await asyncio.gather(workplace.store.upkeep(), engine.put(chain("b", 2)))

        workplace.run(both())
        assert engine.lookup(chain("a", 4)).dram_blocks == 4


def test_two_puts_that_fit_together_are_both_served() -> None:
    with Workplace(small_config(dram_bytes=8 * PAGE_BYTES)) as workplace:
        engine, other = workplace.engine(), workplace.engine()
        workplace.save(engine, chain("a", 4))
        engine.get(chain("a", 4))

        async def both() -> None:
            first, second = await asyncio.gather(engine.put(chain("b", 2)), other.put(chain("c", 2)))
            assert (len(first.slots), len(second.slots)) == (2, 2)

        workplace.run(both())
