"""conftest: a store of 16 slots with one engine attached, and the scene of all refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.stores import Engine, Workplace, small_config
from tests.unit.test_store.scene import LIMITS, Scene


@pytest.fixture
def workplace() -> Iterator[Workplace]:
    with Workplace() as opened:
        yield opened


@pytest.fixture
def engine(workplace: Workplace) -> Engine:
    return workplace.engine()


@pytest.fixture
def scene() -> Iterator[Scene]:
    with Workplace(small_config(**LIMITS)) as opened:
        yield Scene(opened)
