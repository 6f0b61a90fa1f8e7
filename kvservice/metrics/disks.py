"""The series of each NVMe directory: its state, what moved, how fast its device wears out, who waits for it.

`disk` is the directory as the operator configured it.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from kvservice.tiers import DiskUsage

DISK_STATES = ("recovering", "online", "read-only", "offline")


def disk_families(disks: Sequence[DiskUsage]) -> list[Metric]:
    """Every family, with a sample for each disk; without disks, empty."""
    state = GaugeMetricFamily(
        "kvservice_disk_state",
        "1 for the state that an NVMe directory is in, 0 for the others.",
        labels=("disk", "state"),
    )
    capacity = GaugeMetricFamily("kvservice_disk_capacity_bytes", "What a directory may take.", labels=("disk",))
    used = GaugeMetricFamily("kvservice_disk_used_bytes", "Part of it that blocks take.", labels=("disk",))
    moved = CounterMetricFamily(
        "kvservice_disk_bytes",
        "Bytes by what they were: read (blocks that arrived intact), admitted (blocks stored), written (all that "
        "was written, index included). Write amplification is written over admitted.",
        labels=("disk", "what"),
    )
    seconds = CounterMetricFamily(
        "kvservice_disk_seconds", "Time that reads and writes of blocks took, side by side counted once each.",
        labels=("disk", "what"),
    )  # fmt: skip
    failures = CounterMetricFamily(
        "kvservice_disk_checksum_failures", "Blocks of a directory that were not what was written.", labels=("disk",)
    )
    wear = GaugeMetricFamily(
        "kvservice_disk_drive_writes_per_day",
        "Bytes written over the size of the file system, per day: since the start, or over the last hour.",
        labels=("disk", "window"),
    )
    transfers = GaugeMetricFamily(
        "kvservice_disk_transfers", "Transfers that wait or run, by priority.", labels=("disk", "priority", "is")
    )
    for disk in disks:
        for name in DISK_STATES:
            state.add_metric((disk.directory, name), float(disk.state == name))
        capacity.add_metric((disk.directory,), disk.capacity_bytes)
        used.add_metric((disk.directory,), disk.used_bytes)
        moved.add_metric((disk.directory, "read"), disk.read_bytes)
        moved.add_metric((disk.directory, "admitted"), disk.admitted_bytes)
        moved.add_metric((disk.directory, "written"), disk.written_bytes)
        seconds.add_metric((disk.directory, "read"), disk.read_s)
        seconds.add_metric((disk.directory, "write"), disk.write_s)
        failures.add_metric((disk.directory,), disk.checksum_failures)
        wear.add_metric((disk.directory, "start"), disk.writes_per_day)
        wear.add_metric((disk.directory, "hour"), disk.writes_per_day_lately)
        for priority, depth in disk.depths.items():
            transfers.add_metric((disk.directory, priority, "waiting"), depth.waiting)
            transfers.add_metric((disk.directory, priority, "running"), depth.running)
    return [state, capacity, used, moved, seconds, failures, wear, transfers]
