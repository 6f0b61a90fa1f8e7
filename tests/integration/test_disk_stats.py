"""What a real daemon tells of its NVMe directories: in Stats, in the metrics, on the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.blocks import chain, namespace
from tests.clients import wait_served
from tests.daemons import environment
from tests.integration.conftest import MakeClient, MakeDaemon
from tests.integration.test_nvme_restart import BLOCK_BYTES, BLOCKS, knobs, load, recovered, save
from tests.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

CHAINS = 4


def test_hits_by_tier_and_misses_add_up_to_what_was_requested(
    short_path: Path, make_daemon: MakeDaemon, make_client: MakeClient
) -> None:
    daemon = make_daemon(**knobs(short_path))
    client = make_client(daemon.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))
    for number in range(CHAINS):
        save(client, f"c{number}")
    daemon.stop()
    daemon.restart()
    recovered(daemon)
    wait_served(client)
    for name in ("c0", "c0", "c1", "nobody saved this"):
        load(client, name)
    asked = 4 * BLOCKS
    outcomes = {
        outcome: daemon.series("kvservice_block_requests_total", outcome=outcome)
        for outcome in ("dram", "nvme", "miss")
    }
    assert outcomes == {"dram": BLOCKS, "nvme": 2 * BLOCKS, "miss": BLOCKS}
    assert sum(outcomes.values()) == asked
    mine = client.stats().namespaces[0]
    assert (mine.dram_hit_blocks, mine.nvme_hit_blocks, mine.miss_blocks) == (BLOCKS, 2 * BLOCKS, BLOCKS)
    assert mine.requested_blocks == asked


def test_a_directory_tells_what_moved_how_worn_it_is_and_who_waits(
    short_path: Path, make_daemon: MakeDaemon, make_client: MakeClient
) -> None:
    directory = str(short_path / "nvme")
    daemon = make_daemon(**knobs(short_path))
    client = make_client(daemon.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))
    for number in range(CHAINS):
        save(client, f"c{number}")
    stored_bytes = CHAINS * BLOCKS * BLOCK_BYTES
    eventually(lambda: client.stats().tiers[1].disks[0].admitted_bytes == stored_bytes)
    (disk,) = client.stats().tiers[1].disks
    assert (disk.directory, disk.state, disk.why) == (directory, "online", "")
    # Each block has a header page, the segment two, the log a page and more: all of it counts.
    assert disk.written_bytes >= CHAINS * BLOCKS * (BLOCK_BYTES + 4096) + 2 * 4096
    assert disk.write_amplification == disk.written_bytes / disk.admitted_bytes
    assert 1.0 < disk.write_amplification < 1.5
    assert disk.device_bytes >= disk.capacity_bytes > disk.used_bytes == CHAINS * BLOCKS * (BLOCK_BYTES + 4096)
    assert disk.writes_per_day == pytest.approx(disk.written_bytes / disk.device_bytes * 1440), "the first minute"
    assert [depth.priority for depth in disk.transfers] == ["get", "prefetch", "write"]
    assert client.stats().namespaces[0].nvme_bytes == disk.used_bytes
    assert daemon.series("kvservice_disk_state", disk=directory, state="online") == 1
    assert daemon.series("kvservice_disk_state", disk=directory) == 1, "in one state at a time"
    assert daemon.series("kvservice_disk_bytes_total", what="admitted") == stored_bytes
    assert daemon.series("kvservice_disk_bytes_total", what="written") >= disk.written_bytes
    assert daemon.series("kvservice_disk_seconds_total", what="write") > 0
    daemon.stop()
    daemon.restart()
    recovered(daemon)
    wait_served(client)
    load(client, "c0")
    (disk,) = client.stats().tiers[1].disks
    assert (disk.read_bytes, disk.admitted_bytes) == (BLOCKS * BLOCK_BYTES, 0)
    assert disk.read_s > 0
    assert daemon.series("kvservice_disk_bytes_total", what="read") == disk.read_bytes
    shown = subprocess.run(
        [sys.executable, "-m", "kvservice", "stats", "--socket-dir", daemon.socket_dir],
        check=True,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=30,
    ).stdout
    (line,) = (line for line in shown.splitlines() if line.startswith(directory[:20]))
    assert "online" in line
    assert client.lookup(chain("c0", BLOCKS)).dram_blocks == BLOCKS
