"""When a disk counts as too slow, hung or gone, and how often it is tried again; with the clock in the test's hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvservice.store.disk_health import DiskState, Health, Place
from tests.stores import Clock

pytestmark = pytest.mark.unit

MIB = 1 << 20


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(tmp_path: Path, clock: Clock) -> Health:
    (tmp_path / "nvme").mkdir()
    (tmp_path / "nvme" / "LOCK").touch()
    made = Health(str(tmp_path / "nvme"), clock=clock)
    made.recovered()
    return made


def learn(health: Health, *, mib_per_s: float) -> None:
    for _ in range(100):
        health.took(1 / mib_per_s, MIB)


def test_a_read_a_hundred_times_slower_than_usual_takes_the_disk_offline(health: Health) -> None:
    learn(health, mib_per_s=1000)
    health.took(90 * 0.032, 32 * MIB)
    assert health.can_read
    health.took(130 * 0.032, 32 * MIB)
    assert health.state is DiskState.OFFLINE
    assert "100 times as long as usual" in health.why


def test_small_reads_may_take_their_time(health: Health) -> None:
    learn(health, mib_per_s=1000)
    health.took(1.9, 4096)
    assert health.can_read, "a device may be busy for a moment"


def test_an_access_that_does_not_end_takes_the_disk_offline_and_keeps_it_there(health: Health, clock: Clock) -> None:
    told = []
    health.on_offline.add(lambda: told.append(health.state))
    with health.working(MIB):
        clock.advance(29.0)
        health.watch()
        assert health.can_read, "nothing is usual yet: patience"
        learn(health, mib_per_s=1000)
        health.watch()
        assert health.state is DiskState.OFFLINE
        assert told == [DiskState.OFFLINE]
        assert health.hanging_s == 29.0
    assert health.hanging_s == 0.0


def test_an_access_without_a_usual_rate_may_take_half_a_minute(health: Health, clock: Clock) -> None:
    learn(health, mib_per_s=1000)
    with health.working(0):
        clock.advance(29.0)
        health.watch()
        assert health.can_read
        clock.advance(2.0)
        health.watch()
        assert health.state is DiskState.OFFLINE


def test_a_failed_write_leaves_reading_and_a_failed_read_takes_that_too(health: Health) -> None:
    health.refuse_writes("full")
    assert (health.can_read, health.can_write, health.why) == (True, False, "full")
    health.refuse_writes("full again")
    assert health.why == "full", "said once"
    health.fail("broken")
    assert (health.can_read, health.can_write, health.why) == (False, False, "broken")
    health.refuse_writes("full")
    assert health.state is DiskState.OFFLINE


def test_probes_become_rare_while_they_fail_and_where_success_does_not_last(health: Health, clock: Clock) -> None:
    def until_probe_s() -> float:
        waited_s = 0.0
        while not health.is_probe_due:
            clock.advance(1.0)
            waited_s += 1.0
        return waited_s

    health.fail("broken")
    waits = [until_probe_s()]
    for _ in range(8):
        health.probe_failed("still")
        waits.append(until_probe_s())
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    assert health.why == "broken; probe: still"
    health.come_back()
    clock.advance(61.0)
    health.refuse_writes("full")
    assert until_probe_s() == 5, "it worked for a while"
    for expected in (10, 20, 40):
        health.come_back()
        health.refuse_writes("full")
        assert until_probe_s() == expected, "a page fits, a segment does not"


def test_a_directory_that_was_emptied_is_another_one_and_a_missing_one_is_none(health: Health, tmp_path: Path) -> None:
    assert health.place() is Place.OURS
    (tmp_path / "nvme" / "LOCK").unlink()
    assert health.place() is Place.ANOTHER
    (tmp_path / "nvme" / "LOCK").touch()
    health.look()
    assert health.place() is Place.OURS
    shutil.rmtree(tmp_path / "nvme")
    with pytest.raises(FileNotFoundError):
        health.place()


def test_another_file_system_in_its_place_is_never_written_to(health: Health, tmp_path: Path) -> None:
    other = next(path for path in map(Path, ("/proc", "/sys", "/dev/shm")) if path.is_dir())
    shutil.rmtree(tmp_path / "nvme")
    (tmp_path / "nvme").symlink_to(other)
    with pytest.raises(OSError, match="is the device mounted"):
        health.place()
