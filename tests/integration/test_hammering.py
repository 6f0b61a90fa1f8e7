"""Sixty-four clients that do everything at once, some killed in the middle: no leak, no wrong byte, no broken book."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

import kvservice_client as kv
from tests.blocks import chain, content
from tests.daemons import MIB, environment
from tests.integration.conftest import MakeDaemon, MakeDaemonThread
from tests.integration.programs.hammer import BLOCKS_MAX, CHAINS, NAMESPACES
from tests.integration.test_lost_daemon import nothing_is_held
from tests.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SECONDS = float(os.environ.get("KVSERVICE_HAMMER_S", "5"))
"""How long each storm takes; two of them run in each test."""
PROCESSES, CLIENTS_EACH = 4, 16
PROGRAM = Path(__file__).parent / "programs" / "hammer.py"
RSS_SLACK_BYTES = 16 * MIB
"""What the allocator may keep more after the second storm than after the first, which warmed everything up."""

KNOBS = {
    "dram_bytes": 6 * MIB,
    "dram_segment_bytes": 512 * 1024,
    "lease_s": 2,
    # Bounded by count, so that what is remembered does not look like a leak.
    "explain_history_blocks": 500,
    "sessions_max": 100,
}

storms_take = pytest.mark.timeout(120 + 3 * SECONDS)


def storm(socket_dir: str, seed: int) -> Counter[str]:
    """Let them loose; one process is killed half way and another takes its place. What was done."""
    counts: Counter[str] = Counter()
    with ExitStack() as stack:

        def start(number: int, seconds: float) -> subprocess.Popen[str]:
            command = [sys.executable, str(PROGRAM), socket_dir, str(seed + number), str(CLIENTS_EACH), str(seconds)]
            popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
            stack.callback(popen.wait)
            stack.callback(popen.kill)
            return stack.enter_context(popen)

        processes = [start(number, SECONDS) for number in range(PROCESSES)]
        half_s = time.monotonic() + SECONDS / 2
        eventually(lambda: time.monotonic() >= half_s, within_s=SECONDS)
        processes.pop().kill()
        processes.append(start(PROCESSES, SECONDS / 2))
        for process in processes:
            answer, _ = process.communicate(timeout=SECONDS + 60)
            done = json.loads(answer)
            assert done["failures"] == []
            counts += Counter(done["counts"])
    for needed in ("loaded", "saved", "leased", "committed"):
        assert counts[needed] > 0, counts
    return counts


def verify_what_is_left(socket_dir: str) -> int:
    """Load every chain; how many blocks there were, all of them right."""
    found = 0
    for of in NAMESPACES:
        with kv.attach(of, socket_dir=socket_dir) as client:
            for number in range(CHAINS):
                hashes = chain(f"{of.label}/{number}", BLOCKS_MAX)
                pieces = [bytearray(of.block_size_bytes) for _ in hashes]
                loaded = client.load(hashes, pieces)
                found += loaded.blocks
                for block_hash, piece in zip(hashes[: loaded.blocks], pieces, strict=False):
                    assert piece == content(block_hash, of.block_size_bytes)
    return found


@storms_take
def test_a_storm_leaks_neither_memory_nor_descriptors(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(**KNOBS)
    storm(daemon.socket_dir, seed=100)
    eventually(lambda: nothing_is_held(daemon))
    eventually(lambda: "kvservice_instances 0.0" in daemon.get("/metrics")[1])
    segments = 2 * 2 * KNOBS["dram_bytes"] // KNOBS["dram_segment_bytes"]
    descriptors, rss_bytes = daemon.open_descriptors, daemon.rss_bytes
    assert descriptors <= 40 + segments
    storm(daemon.socket_dir, seed=200)
    eventually(lambda: nothing_is_held(daemon))
    eventually(lambda: daemon.open_descriptors <= max(descriptors, 40 + segments // 2))
    eventually(lambda: daemon.rss_bytes <= rss_bytes + RSS_SLACK_BYTES, what=f"at most {RSS_SLACK_BYTES} bytes more")
    assert daemon.get("/readyz") == (200, "ok\n")
    verify_what_is_left(daemon.socket_dir)
    assert not daemon.errors
    assert daemon.stop() == 0


@storms_take
def test_after_a_storm_every_invariant_holds_and_every_byte_is_right(make_daemon_thread: MakeDaemonThread) -> None:
    daemon = make_daemon_thread(**KNOBS)
    storm(daemon.socket_dir, seed=300)
    daemon.wait_no_instances()
    daemon.wait_checksummed()
    daemon.check()
    verify_what_is_left(daemon.socket_dir)
    daemon.wait_no_instances()
    assert daemon.store.arena.used_bytes <= 6 * MIB
    # Everything can leave: no slot is kept by nobody.
    with ExitStack() as stack:
        for of in NAMESPACES:
            client = stack.enter_context(kv.attach(of, socket_dir=daemon.socket_dir))
            assert client.forget_namespace().blocks_in_use == 0
    daemon.wait_no_instances()

    def all_free() -> bool:
        pools = [namespace.pool for namespace in daemon.store.namespaces.values()]
        return all(pool.free_slots == pool.total_slots for pool in pools)

    assert daemon.on_loop(all_free)
