"""The first length that is too long is named with its place; one line less is fine."""

from __future__ import annotations

import pytest

from scripts.check_lengths import too_long

pytestmark = pytest.mark.unit


def function(lines: int, head: str = "def f():") -> str:
    return "\n".join([head, *["    pass"] * (lines - 1)]) + "\n"


@pytest.mark.parametrize("head", ["def f():", "async def f():"])
def test_a_function_of_70_lines_is_too_long(head: str) -> None:
    assert list(too_long(function(69, head))) == []
    (finding,) = too_long("\n" + function(70, head))
    assert finding.startswith("2: f has 70 lines")


def test_a_method_counts_and_its_decorators_do_not() -> None:
    body = function(69, "def f():").replace("\n", "\n    ").rstrip()
    assert list(too_long(f"class A:\n    @property\n    {body}\n")) == []
    (finding,) = too_long(f"class A:\n    @property\n    {body}\n        pass\n")
    assert finding.startswith("3: f has 70 lines")


def test_a_file_of_400_lines_is_too_long() -> None:
    assert list(too_long("x = 1\n" * 399)) == []
    (finding,) = too_long("x = 1\n" * 400)
    assert finding.startswith("1: 400 lines")
