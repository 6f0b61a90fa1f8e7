"""The NVMe tier across the daemon's life: drained, killed under load, damaged on disk, shared by nobody."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from pathlib import Path

import pytest

import kvservice_client as kv
from tests.blocks import chain, contents, namespace
from tests.daemons import DaemonProcess, environment, serve_command
from tests.integration.conftest import MakeClient, MakeDaemon
from tests.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

MIB = 1 << 20
BLOCK_BYTES = 64 * 1024
BLOCKS = 12
WINDOW_S = 0.2
SLACK_S = 3.0
"""A loaded machine may take so much longer than the window promises."""
KILLS = int(os.environ.get("NVME_KILLS", "5"))
"""A few at every run; NVME_KILLS=100 for a long one."""


def knobs(directory: Path) -> dict[str, object]:
    return {
        "dram_bytes": 16 * MIB,
        "nvme_dirs": directory / "nvme",
        "nvme_bytes": 512 * MIB,
        "nvme_segment_bytes": 16 * MIB,
        "nvme_write_behind_s": WINDOW_S,
    }


def recovered(daemon: DaemonProcess) -> int:
    return int(daemon.wait_event("recovered")["blocks"])


def load(client: kv.Client, name: str, blocks: int = BLOCKS) -> int:
    """Load a chain and compare every byte; how many leading blocks came."""
    buffer = bytearray(blocks * BLOCK_BYTES)
    loaded = client.load(chain(name, blocks), buffer).blocks
    expected = contents(chain(name, loaded), BLOCK_BYTES)
    assert buffer[: loaded * BLOCK_BYTES] == expected, f"chain {name} came with bytes that are not its own"
    return loaded


def save(client: kv.Client, name: str, blocks: int = BLOCKS) -> int:
    hashes = chain(name, blocks)
    return client.save(hashes, contents(hashes, BLOCK_BYTES)).saved


def test_a_drained_daemon_finds_everything_again(
    short_path: Path, make_daemon: MakeDaemon, make_client: MakeClient
) -> None:
    daemon = make_daemon(**knobs(short_path))
    client = make_client(daemon.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))
    for number in range(40):  # 30 MiB through 16 MiB of DRAM
        assert save(client, f"c{number}") == BLOCKS
    assert daemon.stop() == 0
    daemon.restart()
    assert recovered(daemon) == 40 * BLOCKS
    eventually(lambda: client.attached)
    assert [load(client, f"c{number}") for number in range(40)] == [BLOCKS] * 40


def test_kill_9_under_write_load_loses_the_window_and_nothing_else(
    short_path: Path, make_daemon: MakeDaemon, make_client: MakeClient
) -> None:
    chance = random.Random(11)
    daemon = make_daemon(**knobs(short_path))
    client = make_client(daemon.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))
    saved_at_s: dict[str, float] = {}
    number = 0
    for _ in range(KILLS):
        killer = threading.Timer(chance.uniform(0.3, 1.2), daemon.kill)
        killer.start()
        while daemon.is_running and number < 200 * KILLS:
            name = f"c{number}"
            if save(client, name) == BLOCKS:
                saved_at_s[name] = time.monotonic()
            number += 1
        killer.join()
        killed_at_s = time.monotonic()
        daemon.restart()
        recovered(daemon)
        eventually(lambda: client.attached)
        for name in chance.sample(sorted(saved_at_s), min(30, len(saved_at_s))):
            came = load(client, name)
            if killed_at_s - saved_at_s[name] > WINDOW_S + SLACK_S:
                finding = client.explain(chain(name, BLOCKS)[-1])[0]
                assert came == BLOCKS or finding.HasField("dropped"), f"{name} was durable and is gone: {finding}"
        saved_at_s = {name: 0.0 for name in saved_at_s if client.lookup(chain(name, BLOCKS)).blocks == BLOCKS}


def test_damaged_extents_are_misses_and_the_rest_is_served(
    short_path: Path, make_daemon: MakeDaemon, make_client: MakeClient
) -> None:
    daemon = make_daemon(**knobs(short_path))
    client = make_client(daemon.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))
    for number in range(6):
        save(client, f"c{number}")
    daemon.stop()
    segment = next((short_path / "nvme" / "segments").iterdir())
    content = bytearray(segment.read_bytes())
    at = content.index(contents(chain("c2", BLOCKS)[5:6], BLOCK_BYTES))
    content[at + 1000] ^= 0x40
    segment.write_bytes(content)
    daemon.restart()
    recovered(daemon)
    eventually(lambda: client.attached)
    assert [load(client, f"c{number}") for number in range(6)] == [12, 12, 5, 12, 12, 12]
    finding = client.explain(chain("c2", BLOCKS)[5])[0]
    assert finding.dropped.reason == 6, finding  # DROP_REASON_CORRUPT
    assert "kvservice_checksum_failures_total 1.0" in daemon.get("/metrics")[1]


def test_the_tier_a_block_came_from_is_counted(
    short_path: Path, make_daemon: MakeDaemon, make_client: MakeClient
) -> None:
    daemon = make_daemon(**knobs(short_path))
    client = make_client(daemon.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))
    save(client, "a")
    daemon.stop()
    daemon.restart()
    recovered(daemon)
    eventually(lambda: client.attached)
    looked = client.lookup(chain("a", BLOCKS))
    assert (looked.blocks, looked.dram_blocks) == (BLOCKS, 0)
    assert load(client, "a") == BLOCKS
    assert load(client, "a", BLOCKS) == BLOCKS
    stats = client.stats()
    mine = stats.namespaces[0]
    assert (mine.requested_blocks, mine.nvme_hit_blocks, mine.dram_hit_blocks) == (2 * BLOCKS, BLOCKS, BLOCKS)
    assert [tier.state for tier in stats.tiers] == ["online", "online"]


def test_a_second_daemon_on_the_same_directory_refuses(short_path: Path, make_daemon: MakeDaemon) -> None:
    make_daemon(**knobs(short_path))
    other = subprocess.run(
        serve_command(short_path / "other", knobs(short_path)),
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=30,
    )
    assert other.returncode == 1
    assert "another process uses" in other.stderr
