"""conftest: the files of a disk that a test can hold up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faulty_files import FaultyFiles


@pytest.fixture
def files() -> Iterator[FaultyFiles]:
    made = FaultyFiles()
    yield made
    made.gate.set()  # whatever hangs must end
