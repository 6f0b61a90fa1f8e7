"""Free runs of the buffer, against a row of flags."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest

from kvservice_adapters.gpu.runs import Runs

pytestmark = pytest.mark.unit


def longest_run(is_free: list[bool]) -> int:
    text = "".join("x" if free else " " for free in is_free)
    return max(map(len, text.split(" ")))


@hypothesis.given(st.data(), st.integers(1, 24))
def test_runs_are_first_fits_that_do_not_overlap(data: st.DataObject, blocks: int) -> None:
    runs = Runs(blocks)
    is_free = [True] * blocks
    taken: list[tuple[int, int]] = []
    for gives_back in data.draw(st.lists(st.booleans(), max_size=30)):
        if taken and gives_back:
            first, size = taken.pop(data.draw(st.integers(0, len(taken) - 1)))
            # All of it, or an end and then what is left.
            cut = data.draw(st.integers(0, size - 1))
            for start, end in ((first + cut, first + size), (first, first + cut)):
                if start < end:
                    runs.free(start, end - start)
                    is_free[start:end] = [True] * (end - start)
        else:
            size = data.draw(st.integers(1, blocks))
            fits = [at for at in range(blocks - size + 1) if all(is_free[at : at + size])]
            first_fit = runs.allocate(size)
            assert first_fit == (fits[0] if fits else None)
            if first_fit is not None:
                is_free[first_fit : first_fit + size] = [False] * size
                taken.append((first_fit, size))
        assert runs.free_blocks == sum(is_free)
        assert runs.longest == longest_run(is_free)


@hypothesis.given(st.permutations(range(8)))
def test_blocks_that_come_back_in_any_order_are_one_run_again(order: list[int]) -> None:
    runs = Runs(8)
    for _ in range(8):
        runs.allocate(1)
    assert (runs.allocate(1), runs.longest) == (None, 0)
    for block in order:
        runs.free(block, 1)
    assert runs.allocate(8) == 0


@pytest.mark.parametrize(("first", "blocks"), [(0, 1), (3, 1), (1, 3), (5, 1), (-1, 1), (2, 0)])
def test_what_was_not_taken_is_not_given_back(first: int, blocks: int) -> None:
    runs = Runs(5)
    assert runs.allocate(5) == 0
    runs.free(0, 1)
    runs.free(3, 2)
    with pytest.raises(AssertionError):
        runs.free(first, blocks)
