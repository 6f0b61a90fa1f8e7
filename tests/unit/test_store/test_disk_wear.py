"""Drive writes per day, from bytes written and the time, since the start and over the last hour."""

from __future__ import annotations

import pytest

from kvservice.store.disk_wear import Wear

pytestmark = pytest.mark.unit

DEVICE_BYTES = 1_000_000
HOUR_S = 3600.0


def test_a_device_written_once_in_a_day_has_one_drive_write_per_day() -> None:
    wear = Wear(DEVICE_BYTES, 0.0)
    for hour in range(1, 25):
        wear.note(DEVICE_BYTES * hour // 24, hour * HOUR_S)
    assert wear.per_day(DEVICE_BYTES, 24 * HOUR_S) == pytest.approx(1.0)
    assert wear.per_day_lately(DEVICE_BYTES, 24 * HOUR_S) == pytest.approx(1.0, rel=1e-4)


def test_lately_forgets_what_was_written_more_than_an_hour_ago() -> None:
    wear = Wear(DEVICE_BYTES, 0.0)
    written_bytes = 0
    for minute in range(1, 181):
        written_bytes += 1000 if minute <= 60 else 0
        wear.note(written_bytes, minute * 60.0)
        if minute == 60:
            assert wear.per_day_lately(written_bytes, 3600.0) == pytest.approx(0.06 * 24)
        if minute == 90:
            assert wear.per_day_lately(written_bytes, 5400.0) == pytest.approx(0.03 * 24)
    assert wear.per_day_lately(written_bytes, 180 * 60.0) == 0.0
    assert wear.per_day(written_bytes, 180 * 60.0) == pytest.approx(0.06 * 8)


def test_the_first_seconds_are_not_extrapolated_to_a_day() -> None:
    wear = Wear(DEVICE_BYTES, 100.0)
    assert wear.per_day(DEVICE_BYTES // 10, 100.1) == pytest.approx(0.1 * 1440)
    assert wear.per_day_lately(0, 100.0) == 0.0


def test_it_keeps_about_an_hour_of_samples() -> None:
    wear = Wear(DEVICE_BYTES, 0.0)
    for second in range(0, 100_000, 10):
        wear.note(second, float(second))
    assert len(wear._samples) <= 62


def test_a_device_of_unknown_size_has_no_wear() -> None:
    assert Wear(0, 0.0).per_day(1000, 60.0) == 0.0
