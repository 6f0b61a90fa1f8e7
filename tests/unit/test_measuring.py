"""The benchmarks' arithmetic: turns, medians, records, bounds, and buffers that cannot hide stale bytes."""

from __future__ import annotations

import ctypes
import json

import pytest

from benchmarks.figures import FIGURES, Verdict, bound_of, table, verdict_on
from benchmarks.measuring import (
    PAGE_SIZE_BYTES,
    FreshContents,
    PrivateBuffer,
    Record,
    Turns,
    WrongBytes,
    require_same_bytes,
    take_turns,
)

pytestmark = pytest.mark.unit


def test_a_ratio_is_ours_over_the_reference() -> None:
    assert Record.compared("x", 12.0, "GB/s", 8.0).ratio == 1.5
    assert Record.absolute("x", 250.0, "bytes").ratio == 250.0


def test_a_record_is_one_line_with_exactly_the_promised_keys() -> None:
    line = Record.compared("x", 1 / 3, "GB/s", 3.0).to_json()
    assert "\n" not in line
    assert json.loads(line) == {"name": "x", "value": 0.33333, "unit": "GB/s", "reference": 3.0, "ratio": 0.11111}
    assert json.loads(Record.absolute("y", 2.0, "bytes").to_json())["reference"] is None


def test_throughput_and_latency_come_from_the_medians() -> None:
    turns = Turns(reference={"copy": [2.0, 1.0, 50.0]}, ours={"save": [4.0, 1000.0, 0.1]})
    throughput = turns.throughput("t", 8_000_000_000, ours="save", reference="copy")
    assert (throughput.value, throughput.reference, throughput.ratio) == (2.0, 4.0, 0.5)
    latency = turns.latency("l", ours="save", reference="copy")
    assert (latency.value, latency.reference, latency.ratio) == (4e6, 2e6, 2.0)


def test_sides_take_turns_and_the_order_swaps(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def side(name: str, repetition: int) -> dict[str, float]:
        order.append(f"{name} {repetition}")
        return {"work": float(repetition)}

    turns = take_turns(
        reference=lambda repetition: side("reference", repetition),
        ours=lambda repetition: side("ours", repetition),
        repetitions=3,
        title="three",
    )
    assert order == ["reference 0", "ours 0", "ours 1", "reference 1", "reference 2", "ours 2"]
    assert turns.reference == {"work": [0.0, 1.0, 2.0]}
    assert turns.ours == {"work": [0.0, 1.0, 2.0]}
    shown = capsys.readouterr()
    assert shown.out == "", "stdout is for records"
    assert "three 3/3" in shown.err


@pytest.mark.parametrize(
    ("name", "ratio", "verdict"),
    [
        ("shm_save_ratio", 0.80, Verdict.MET),
        ("shm_save_ratio", 0.799, Verdict.MISSED),
        ("lookup_1_ratio", 0.6, Verdict.MET),
        ("lookup_1_ratio", 0.601, Verdict.MISSED),
        ("vs_redis_put_16MiB", 2.9, Verdict.MISSED),
        ("index_bytes_per_block", 400.0, Verdict.MET),
        ("something_reported", 0.0, Verdict.REPORTED),
    ],
)
def test_a_bound_holds_at_its_limit_and_not_beyond(name: str, ratio: float, verdict: Verdict) -> None:
    assert verdict_on(Record(name, 1.0, "u", 1.0, ratio)) is verdict


def test_every_figure_has_one_bound() -> None:
    names = [figure.name for figure in FIGURES]
    assert len(names) == len(set(names)) == 28
    assert all(bound_of(name) for name in names)
    assert bound_of("something_reported") == ""


def test_the_table_shows_bounds_and_reasons() -> None:
    records = [Record.compared("shm_save_ratio", 6.0, "GB/s", 12.0), Record.absolute("index_bytes_per_block", 246, "B")]
    lines = table(records, [("redis_reference", "not installed")]).splitlines()
    assert lines[0].split()[:2] == ["figure", "ours"]
    assert ">= 0.8" in lines[2]
    assert lines[2].endswith("MISSED")
    assert lines[3].endswith("met")
    assert lines[-1] == "redis_reference: skipped: not installed"


def test_every_page_of_the_contents_is_fresh_in_every_repetition() -> None:
    contents = FreshContents(4 * PAGE_SIZE_BYTES, repetitions=3)
    seen = [bytes(contents.view(repetition)) for repetition in range(3)]
    for page in range(0, 4 * PAGE_SIZE_BYTES, PAGE_SIZE_BYTES):
        assert len({content[page : page + PAGE_SIZE_BYTES] for content in seen}) == 3
    assert contents.address(2) + contents.size_bytes <= contents.address(0) + contents.capacity_bytes
    with pytest.raises(AssertionError, match="past the buffer's end"):
        contents.address(4)


def test_one_wrong_byte_is_found() -> None:
    expected, actual = PrivateBuffer(10_000), PrivateBuffer(10_000)
    assert expected.size_bytes == 3 * PAGE_SIZE_BYTES, "whole pages"
    expected.fill_random(7)
    ctypes.memmove(actual.address, expected.address, expected.size_bytes)
    require_same_bytes(expected.address, actual.address, expected.size_bytes, "a copy")
    actual.view[9_999] ^= 1
    with pytest.raises(WrongBytes, match="a copy"):
        require_same_bytes(expected.address, actual.address, expected.size_bytes, "a copy")
    actual.wipe()
    assert len(set(actual.view)) == 1
