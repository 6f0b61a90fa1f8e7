"""The NVMe tier across the daemon's life: drained, killed under load, damaged on disk, shared by nobody."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import kvservice_client as kv
from tests.blocks import chain, contents, namespace
from tests.clients import wait_served
from tests.daemons import DaemonProcess, environment, serve_command
from tests.integration.conftest import MakeClient, MakeDaemon

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]

MIB = 1 << 20
BLOCK_BYTES = 64 * 1024
BLOCKS = 12
WINDOW_S = 0.2
SLACK_S = 3.0
"""A loaded machine may take so much longer than the window promises."""
KILLS = int(os.environ.get("NVME_KILLS", "20"))
"""About a minute at every run; NVME_KILLS=100 for a long one."""
CHAINS_KEPT = 250
"""Of at most 600 that fit on NVMe; a round saves fewer than the difference."""


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


def save(client: kv.Client, name: str, blocks: int = BLOCKS, *, session_id: str = "") -> int:
    hashes = chain(name, blocks)
    return client.save(hashes, contents(hashes, BLOCK_BYTES), session_id=session_id).saved


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
    wait_served(client)
    assert [load(client, f"c{number}") for number in range(40)] == [BLOCKS] * 40


@pytest.mark.slow
@pytest.mark.timeout(60 + 10 * KILLS)
def test_kill_9_under_write_load_loses_the_window_and_nothing_else(
    short_path: Path, make_daemon: MakeDaemon, make_client: MakeClient
) -> None:
    chance = random.Random(11)
    daemon = make_daemon(**knobs(short_path))
    client = make_client(daemon.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))
    saved_at_s: dict[str, float] = {}
    number = durable = 0
    for _ in range(KILLS):
        for name in list(saved_at_s)[:-CHAINS_KEPT]:  # what nobody forgot is never evicted: there is room
            client.forget_session(name)
            del saved_at_s[name]
        killer = threading.Timer(chance.uniform(0.3, 1.2), daemon.kill)
        killer.start()
        while daemon.is_running:
            name = f"c{number}"
            if save(client, name, session_id=name) == BLOCKS:
                saved_at_s[name] = time.monotonic()
            number += 1
        killer.join()
        killed_at_s = time.monotonic()
        daemon.restart()
        recovered(daemon)
        wait_served(client)
        for name in chance.sample(sorted(saved_at_s), min(30, len(saved_at_s))):
            came = load(client, name)  # compares every byte
            if killed_at_s - saved_at_s[name] > WINDOW_S + SLACK_S:
                durable += 1
                assert came == BLOCKS, f"{name} was durable and {BLOCKS - came} blocks are gone"
        held = {name for name in saved_at_s if client.lookup(chain(name, BLOCKS)).blocks == BLOCKS}
        saved_at_s = {name: 0.0 for name in saved_at_s if name in held}
    assert durable > KILLS


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
    wait_served(client)
    assert [load(client, f"c{number}") for number in range(6)] == [12, 12, 5, 12, 12, 12]
    finding = client.explain(chain("c2", BLOCKS)[5])[0]
    assert finding.dropped.reason == 6, finding  # DROP_REASON_CORRUPT
    assert "kvservice_checksum_failures_total 1.0" in daemon.get("/metrics")[1]


def test_check_names_each_damaged_extent_and_the_daemon_serves_the_rest(
    short_path: Path, make_daemon: MakeDaemon, make_client: MakeClient
) -> None:
    def check() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kvservice", "check", str(short_path / "nvme")]
        return subprocess.run(command, check=False, capture_output=True, text=True, env=environment(), timeout=60)

    daemon = make_daemon(**knobs(short_path))
    client = make_client(daemon.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))
    for number in range(6):
        assert save(client, f"c{number}") == BLOCKS
    refused = check()
    assert (refused.returncode, "stop it first" in refused.stderr) == (2, True)
    daemon.stop()
    assert check().returncode == 0
    damaged = {"c0": 11, "c2": 5, "c4": 0}
    segment = next((short_path / "nvme" / "segments").iterdir())
    content = bytearray(segment.read_bytes())
    for name, position in damaged.items():
        at = content.index(contents(chain(name, BLOCKS)[position : position + 1], BLOCK_BYTES))
        content[at - (2000 if name == "c2" else -777)] ^= 0x40  # one in its header, the others in their payloads
    segment.write_bytes(content)
    checked = check()
    assert checked.returncode == 1
    for name, position in damaged.items():
        assert f"bad: block {chain(name, BLOCKS)[position].hex()} in segment 1, extent " in checked.stdout
    assert "72 blocks" in checked.stdout
    assert "3 bad extents" in checked.stdout
    daemon.restart()
    recovered(daemon)
    wait_served(client)
    assert [load(client, f"c{number}") for number in range(6)] == [11, 12, 5, 12, 0, 12]


def test_the_tier_a_block_came_from_is_counted(
    short_path: Path, make_daemon: MakeDaemon, make_client: MakeClient
) -> None:
    daemon = make_daemon(**knobs(short_path))
    client = make_client(daemon.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))
    save(client, "a")
    daemon.stop()
    daemon.restart()
    recovered(daemon)
    wait_served(client)
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
