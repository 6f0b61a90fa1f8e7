"""Real daemons whose NVMe directory fills up, vanishes and comes back: DRAM serves on, the tier returns by itself."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvservice_client as kv
from tests.blocks import chain, namespace
from tests.clients import wait_served
from tests.daemons import DaemonProcess
from tests.integration.conftest import MakeClient, MakeDaemon
from tests.integration.test_nvme_restart import BLOCK_BYTES, BLOCKS, knobs, load, recovered, save
from tests.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

BACK_S = 40.0
"""A probe comes after five seconds, the next ones later."""


def tier_state(client: kv.Client) -> str:
    return str(client.stats().tiers[1].state)


def durable(client: kv.Client, name: str) -> bool:
    """Whether the chain's last block is on NVMe."""
    held = client.explain(chain(name, BLOCKS)[-1])[0].held
    return 2 in held.tiers


def on_nvme_only(client: kv.Client, chains: int) -> str:
    """The name of a chain that DRAM has nothing of."""
    names = [f"c{number}" for number in range(chains)]
    return next(name for name in names if client.lookup(chain(name, BLOCKS)).dram_blocks == 0)


def in_dram(client: kv.Client, chains: int) -> str:
    """The name of the last chain that is in DRAM as a whole; the first ones leave it as the watermarks are kept."""
    names = [f"c{number}" for number in reversed(range(chains))]
    return next(name for name in names if client.lookup(chain(name, BLOCKS)).dram_blocks == BLOCKS)


def attached(daemon: DaemonProcess, make_client: MakeClient) -> kv.Client:
    return make_client(daemon.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))


def test_a_file_size_limit_makes_the_tier_read_only_until_it_is_lifted(
    short_path: Path, make_daemon: MakeDaemon, make_client: MakeClient
) -> None:
    daemon = make_daemon(**knobs(short_path))
    client = attached(daemon, make_client)
    save(client, "before")
    eventually(lambda: durable(client, "before"))
    # Below one segment: the first is there already, the next cannot be made.
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    number = 0
    while tier_state(client) == "online":
        assert save(client, f"c{number}") == BLOCKS
        number += 1
        assert number < 200
    assert tier_state(client).startswith("read-only: ")
    assert 'kvservice_tier_online{tier="nvme"} 0' in daemon.get("/metrics")[1]
    assert load(client, "before") == BLOCKS, "what is on it is served"
    assert save(client, "meanwhile") == BLOCKS
    assert load(client, "meanwhile") == BLOCKS, "DRAM serves"
    assert sum(line["event"] == "nvme_read_only" for line in daemon.log) == 1
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    eventually(lambda: tier_state(client) == "online", within_s=BACK_S)
    eventually(lambda: durable(client, "meanwhile"))
    assert not daemon.errors or all(line["event"] == "nvme_read_only" for line in daemon.errors)


def test_a_directory_that_is_deleted_and_made_again_is_used_again(
    short_path: Path, make_daemon: MakeDaemon, make_client: MakeClient
) -> None:
    daemon = make_daemon(**knobs(short_path))
    client = attached(daemon, make_client)
    for number in range(30):  # more than DRAM holds
        save(client, f"c{number}")
    eventually(lambda: durable(client, "c29"))
    gone, kept = on_nvme_only(client, 30), in_dram(client, 30)
    shutil.rmtree(short_path / "nvme")
    eventually(lambda: tier_state(client).startswith("offline: the directory is gone"))
    assert load(client, gone) == 0
    assert client.lookup(chain(gone, BLOCKS)).reason is kv.Reason.TIER_OFFLINE
    finding = client.explain(chain(gone, BLOCKS)[0])[0]
    assert "the directory is gone" in finding.tier_offline.why
    assert load(client, kept) == BLOCKS, "DRAM serves"
    (short_path / "nvme").mkdir()
    eventually(lambda: tier_state(client) == "online", within_s=BACK_S)
    assert client.lookup(chain(gone, BLOCKS)).reason is kv.Reason.NOT_HELD
    save(client, "new")
    eventually(lambda: durable(client, "new"))
    daemon.kill()
    daemon.restart()
    recovered(daemon)
    wait_served(client)
    assert load(client, "new") == BLOCKS


@pytest.fixture
def mounted(short_path: Path) -> Iterator[Path]:
    """A small file system at the NVMe directory; skipped where nothing may be mounted."""
    directory = short_path / "nvme"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=False, capture_output=True)


def test_a_mount_that_vanishes_is_waited_for_and_nothing_is_written_under_it(
    mounted: Path, make_daemon: MakeDaemon, make_client: MakeClient
) -> None:
    daemon = make_daemon(**(knobs(mounted.parent) | {"nvme_bytes": 128 << 20}))
    client = attached(daemon, make_client)
    for number in range(30):
        save(client, f"c{number}")
    eventually(lambda: durable(client, "c29"))
    gone, kept = on_nvme_only(client, 30), in_dram(client, 30)
    elsewhere = mounted.parent / "elsewhere"
    elsewhere.mkdir()
    subprocess.run(["mount", "--bind", str(mounted), str(elsewhere)], check=True)
    try:
        subprocess.run(["umount", "-l", str(mounted)], check=True)
        eventually(lambda: tier_state(client).startswith("offline: the directory is gone"))
        assert load(client, gone) == 0
        assert load(client, kept) == BLOCKS, "DRAM serves"
        save(client, "meanwhile")
        assert load(client, "meanwhile") == BLOCKS
        eventually(lambda: "probe: " in tier_state(client))
        assert list(mounted.iterdir()) == [], "the file system underneath is not ours"
        subprocess.run(["mount", "--bind", str(elsewhere), str(mounted)], check=True)
        eventually(lambda: tier_state(client) == "online", within_s=BACK_S)
        assert load(client, gone) == BLOCKS, "nothing was lost"
        eventually(lambda: durable(client, "meanwhile"))
    finally:
        daemon.kill()
        subprocess.run(["umount", "-l", str(elsewhere)], check=False, capture_output=True)
