"""Quota, time to live and Forget on NVMe, in a real daemon and across its restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.blocks import chain, contents, namespace
from tests.clients import wait_served
from tests.integration.conftest import MakeClient, MakeDaemon
from tests.integration.test_nvme_restart import BLOCK_BYTES, BLOCKS, knobs, load, recovered, save
from tests.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

EXPIRED, QUOTA = 5, 3  # the contract's DropReason


def payload_is_on_disk(directory: Path, name: str) -> bool:
    """Whether a segment file has the bytes of the chain's first block (they need not be scrubbed, only unreachable)."""
    content = contents(chain(name, 1), BLOCK_BYTES)
    return any(content in segment.read_bytes() for segment in (directory / "nvme" / "segments").iterdir())


@pytest.mark.parametrize("whole", [False, True], ids=["session", "namespace"])
def test_what_was_forgotten_does_not_come_back_even_after_kill_9_right_behind_the_answer(
    short_path: Path, make_daemon: MakeDaemon, make_client: MakeClient, *, whole: bool
) -> None:
    daemon = make_daemon(**knobs(short_path))
    client = make_client(daemon.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))
    for number in range(4):
        hashes = chain(f"c{number}", BLOCKS)
        assert client.save(hashes, contents(hashes, BLOCK_BYTES), session_id=f"s{number}").saved == BLOCKS
    assert daemon.stop() == 0
    assert payload_is_on_disk(short_path, "c1"), "or this test would prove nothing"
    daemon.restart()
    assert recovered(daemon) == 4 * BLOCKS
    wait_served(client)
    assert load(client, "c1") == BLOCKS  # in both tiers again; c0 on NVMe only
    dropped = 0
    for number in range(2):
        dropped += (client.forget_namespace() if whole else client.forget_session(f"s{number}")).blocks_dropped
    daemon.kill()
    assert dropped == (4 if whole else 2) * BLOCKS
    daemon.restart()
    assert recovered(daemon) == (0 if whole else 2 * BLOCKS)
    wait_served(client)
    assert [load(client, f"c{number}") for number in range(4)] == ([0] * 4 if whole else [0, 0, BLOCKS, BLOCKS])


def test_time_to_live_and_quota_by_label_hold_across_restarts_and_explain_says_so(
    short_path: Path, make_daemon: MakeDaemon, make_client: MakeClient
) -> None:
    rules = short_path / "kvservice.toml"
    rules.write_text(
        f"""
        [namespaces."small*"]
        nvme_quota_bytes = {BLOCKS * (BLOCK_BYTES + 4096)}
        [namespaces."brief*"]
        ttl_s = 1
        """
    )
    daemon = make_daemon(**knobs(short_path), config=rules)
    small = make_client(daemon.socket_dir, namespace("small", block_size_bytes=BLOCK_BYTES))
    brief = make_client(daemon.socket_dir, namespace("brief", block_size_bytes=BLOCK_BYTES))
    for number in range(3):
        assert save(small, f"c{number}") == BLOCKS
    assert save(brief, "gone") == BLOCKS
    eventually(lambda: brief.lookup(chain("gone", BLOCKS)).blocks == 0)
    assert brief.explain(chain("gone", 1)[0])[0].dropped.reason == EXPIRED
    assert daemon.stop() == 0
    daemon.restart()
    assert recovered(daemon) <= BLOCKS
    wait_served(small, brief)
    assert brief.lookup(chain("gone", BLOCKS)).blocks == 0
    found = [small.lookup(chain(f"c{number}", BLOCKS)).blocks for number in range(3)]
    assert found == [0, 0, BLOCKS], "the quota has room for the newest chain"
