"""conftest: a store of 16 slots with one engine attached."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.stores import Engine, Workplace


@pytest.fixture
def workplace() -> Iterator[Workplace]:
    with Workplace() as opened:
        yield opened


@pytest.fixture
def engine(workplace: Workplace) -> Engine:
    return workplace.engine()
