"""Truncated sessions with a real daemon: shifts over the wire, nobody else served, restarts, NVMe, a wrong call."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest

import kvservice_client as kv
from tests.blocks import chain, contents, namespace
from tests.clients import wait_served
from tests.integration.conftest import MakeClient, MakeDaemon
from tests.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

MIB = 1 << 20
BLOCK_BYTES = 64 * 1024
TOKENS = 16
BLOCKS = 8
OLD = chain("a", BLOCKS)


def salted(session: str, hashes: Sequence[bytes]) -> list[bytes]:
    names, before = [], hashlib.sha256(session.encode()).digest()
    for block_hash in hashes:
        before = hashlib.sha256(before + block_hash).digest()
        names.append(before)
    return names


NEW = salted("talk", [OLD[0], *OLD[5:]])


def spec() -> kv.Namespace:
    return namespace(block_size_bytes=BLOCK_BYTES, tokens_per_block=TOKENS)


def load(
    client: kv.Client, hashes: Sequence[bytes], *, session_id: str = "talk", accepts_shifts: bool = True
) -> tuple[kv.LoadResult, bytes]:
    buffer = bytearray(len(hashes) * BLOCK_BYTES)
    loaded = client.load(hashes, buffer, session_id=session_id, accepts_shifts=accepts_shifts)
    return loaded, bytes(buffer[: loaded.blocks * BLOCK_BYTES])


def overflow(client: kv.Client) -> list[bytes]:
    """A conversation of 8 blocks, truncated to its first and last three, and a turn of two more."""
    assert client.save(OLD, contents(OLD, BLOCK_BYTES), session_id="talk").saved == BLOCKS
    done = client.truncate("talk", NEW, drop_ratio=0.5, sink_blocks=1)
    kept = (kv.KeptBlocks(0, 1, 0), kv.KeptBlocks(5, 3, 1))
    assert done == kv.TruncateResult(BLOCKS, kept, 4, kv.Reason.OK)
    turn = chain("turn", 2)
    assert client.save(turn, contents(turn, BLOCK_BYTES), parent=NEW[-1], session_id="talk").saved == 2
    return [*NEW, *turn]


SHIFTED = (kv.ShiftedBlocks(1, 3, -4 * TOKENS),)
EXPECTED = bytes(contents([OLD[0], *OLD[5:], *chain("turn", 2)], BLOCK_BYTES))


def test_an_overflowing_session_goes_on(make_daemon: MakeDaemon, make_client: MakeClient) -> None:
    daemon = make_daemon()
    client = make_client(daemon.socket_dir, spec())
    truncated = overflow(client)
    assert load(client, truncated) == (kv.LoadResult(6, kv.Reason.OK, SHIFTED), EXPECTED)
    assert client.lookup(truncated) == kv.LookupResult(6, 6, kv.Reason.OK)
    (stats,) = client.stats().namespaces
    assert (stats.aliases, stats.shifted_hit_blocks, stats.blocks) == (4, 3, BLOCKS + 4 + 2)
    assert daemon.errors == []


def test_nobody_else_is_served(make_daemon: MakeDaemon, make_client: MakeClient) -> None:
    daemon = make_daemon()
    truncated = overflow(make_client(daemon.socket_dir, spec()))
    other = make_client(daemon.socket_dir, spec())
    for session_id in ("other", ""):
        assert load(other, truncated, session_id=session_id)[0] == kv.LoadResult(0, kv.Reason.OTHER_SESSION)
    assert load(other, truncated, accepts_shifts=False)[0] == kv.LoadResult(0, kv.Reason.OTHER_SESSION)
    more = chain("more", 1)
    refused = other.save(more, contents(more, BLOCK_BYTES), parent=truncated[-1], session_id="other")
    assert (refused.refused, refused.reason) == (1, kv.Reason.OTHER_SESSION)
    assert load(other, truncated)[0].blocks == 6, "the session moved to another engine"


def test_wrong_calls_are_told_what_is_wrong(make_daemon: MakeDaemon, make_client: MakeClient) -> None:
    client = make_client(make_daemon().socket_dir, spec())
    assert client.save(OLD, contents(OLD, BLOCK_BYTES), session_id="talk").saved == BLOCKS
    for arguments, why in (
        ({"session_id": "", "hashes": []}, "belongs to a session"),
        ({"hashes": NEW[:1]}, "1 hashes for 4 kept blocks"),
        ({"hashes": [], "keep": [(64, 32)]}, "does not follow"),
        ({"hashes": [], "keep": [(0, 4096)]}, "128 tokens"),
        ({"hashes": [], "drop_ratio": 1.5}, "between 0 and 1"),
        ({"hashes": [OLD[0], *OLD[5:]]}, "salt them"),
    ):
        call = {"session_id": "talk", "sink_blocks": 1, **arguments}
        with pytest.raises(kv.InvalidRequest, match=why):
            client.truncate(**call)  # type: ignore[arg-type]
    assert client.truncate("nobody", []) == kv.TruncateResult(0, (), 0, kv.Reason.NOT_HELD)
    # A cut inside a block: the kept range is shrunk to whole blocks, and the answer says to which.
    assert client.truncate("talk", [], keep=[(40, 128)]).kept == (kv.KeptBlocks(3, 5, 0),)


def test_without_a_daemon_a_truncation_is_a_miss(make_daemon: MakeDaemon, make_client: MakeClient) -> None:
    daemon = make_daemon()
    client = make_client(daemon.socket_dir, spec())
    daemon.kill()
    eventually(lambda: not client.attached)
    assert client.truncate("talk", []).reason is kv.Reason.UNAVAILABLE


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_truncated_sessions_survive_the_daemon_on_nvme(
    short_path: Path, make_daemon: MakeDaemon, make_client: MakeClient, end: str
) -> None:
    daemon = make_daemon(
        dram_bytes=16 * MIB,
        nvme_dirs=short_path / "nvme",
        nvme_bytes=256 * MIB,
        nvme_segment_bytes=16 * MIB,
        nvme_write_behind_s=0.1,
    )
    client = make_client(daemon.socket_dir, spec())
    truncated = overflow(client)
    # Out of DRAM: the aliases' sources are read from NVMe.
    # What is being written just then is passed over, so that it may take more than the arena's worth of others.
    for number in range(400):
        other = chain(f"other {number}", 8)
        assert client.save(other, contents(other, BLOCK_BYTES)).saved == 8
        if client.lookup(truncated).dram_blocks < 6:
            break
    assert client.lookup(truncated).dram_blocks < 6
    assert load(client, truncated) == (kv.LoadResult(6, kv.Reason.OK, SHIFTED), EXPECTED)
    if end == "stop":
        assert daemon.stop() == 0
    else:
        # The journal is written every second; a drained one has nothing to wait for.
        eventually(lambda: _is_remembered(short_path / "nvme", NEW[-1]))
        daemon.kill()
    daemon.restart()
    daemon.wait_event("recovered")
    wait_served(client)
    assert load(client, truncated) == (kv.LoadResult(6, kv.Reason.OK, SHIFTED), EXPECTED)
    assert load(client, truncated, session_id="other")[0] == kv.LoadResult(0, kv.Reason.OTHER_SESSION)


def _is_remembered(directory: Path, block_hash: bytes) -> bool:
    return any(block_hash in file.read_bytes() for file in (directory / "index").iterdir())
