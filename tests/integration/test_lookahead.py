"""Look-ahead in a real daemon with a throttled disk: what waits is fetched, in order, once; what does not, is not."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvservice_client as kv
from tests.blocks import chain, contents, namespace
from tests.clients import wait_served
from tests.daemons import DaemonProcess
from tests.integration.conftest import MakeClient, MakeDaemon
from tests.waiting import eventually

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

MIB = 1 << 20
BLOCK_BYTES = 64 * 1024
BLOCKS = 12
TALKS = ("a", "b", "c", "d", "e", "f")
CHAINS = {name: chain(name, BLOCKS) for name in TALKS}


def knobs(directory: Path, **more: object) -> dict[str, object]:
    return {
        "dram_bytes": 8 * MIB,
        "nvme_dirs": directory / "nvme",
        "nvme_bytes": 256 * MIB,
        "nvme_segment_bytes": 16 * MIB,
        "nvme_write_behind_s": 0.05,
        "nvme_queue_depth": 1,
        **more,
    }


@pytest.fixture
def on_nvme(short_path: Path, make_daemon: MakeDaemon, make_client: MakeClient) -> DaemonProcess:
    """A daemon that has six chains, all of them on NVMe only, and reads two mebibytes a second."""
    before = make_daemon(**knobs(short_path))
    with make_client(before.socket_dir, namespace(block_size_bytes=BLOCK_BYTES)) as client:
        for name in TALKS:
            assert client.save(CHAINS[name], contents(CHAINS[name], BLOCK_BYTES), session_id=name).saved == BLOCKS
    assert before.stop() == 0
    daemon = make_daemon(**knobs(short_path, nvme_bytes_per_s_max=2 * MIB))
    assert daemon.wait_event("recovered")["blocks"] == len(TALKS) * BLOCKS
    return daemon


@pytest.fixture
def client(on_nvme: DaemonProcess, make_client: MakeClient) -> kv.Client:
    return make_client(on_nvme.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))


def queue(*names: str) -> list[kv.WaitingRequest]:
    return [kv.WaitingRequest(f"request {name}", CHAINS[name], session_id=name) for name in names]


def prefetched(daemon: DaemonProcess, outcome: str) -> float:
    return daemon.series("kvservice_prefetch_blocks_total", outcome=outcome)


def is_in_dram(client: kv.Client, name: str) -> bool:
    # A plan tells blocks that are there from blocks on their way.
    return client.plan_load(CHAINS[name]).dram_blocks == BLOCKS


def load(client: kv.Client, name: str) -> None:
    buffer = bytearray(BLOCKS * BLOCK_BYTES)
    assert client.load(CHAINS[name], buffer, request_id=f"request {name}").blocks == BLOCKS
    assert buffer == contents(CHAINS[name], BLOCK_BYTES), f"chain {name} came with bytes that are not its own"


def test_what_waits_is_in_dram_before_it_starts(on_nvme: DaemonProcess, client: kv.Client) -> None:
    waiting = ["a", "b", "c"]
    client.update_queue(queue(*waiting))
    eventually(lambda: on_nvme.series("kvservice_queued_requests") == 3)
    while waiting:
        name = waiting.pop(0)
        eventually(lambda name=name: is_in_dram(client, name))  # type: ignore[misc]
        client.update_queue(queue(*waiting), started=[f"request {name}"])
        load(client, name)
    eventually(lambda: on_nvme.series("kvservice_prefetch_request_starts_total", blocks="ready") == 3)
    assert on_nvme.series("kvservice_prefetch_lead_seconds_count") == 3, "each fetch ended before its request started"
    outcomes = {outcome: prefetched(on_nvme, outcome) for outcome in ("started", "useful", "late", "wasted")}
    assert outcomes == {"started": 3 * BLOCKS, "useful": 3 * BLOCKS, "late": 0, "wasted": 0}
    assert on_nvme.series("kvservice_block_requests_total", outcome="dram") == 3 * BLOCKS
    assert on_nvme.series("kvservice_queued_requests") == 0


def test_the_windows_are_visible(on_nvme: DaemonProcess, client: kv.Client) -> None:
    client.update_queue(queue(*TALKS))

    def covered() -> bool:
        needed = on_nvme.series("kvservice_prefetch_window_blocks")
        return needed == 6 * BLOCKS == on_nvme.series("kvservice_prefetch_window_dram_blocks")

    eventually(covered)
    assert on_nvme.series("kvservice_prefetch_window_requests") == 6
    assert on_nvme.series("kvservice_eviction_window_requests") == 6
    stats = client.stats()
    assert [instance.queued_requests for instance in stats.attached_instances] == [6]
    (told,) = (namespace.queue for namespace in stats.namespaces)
    assert (told.requests, told.prefetch_window_requests, told.eviction_window_requests) == (6, 6, 6)
    assert (told.needed_blocks, told.dram_blocks) == (6 * BLOCKS, 6 * BLOCKS)


def test_a_new_order_of_the_queue_reads_nothing_twice(on_nvme: DaemonProcess, client: kv.Client) -> None:
    client.update_queue(queue("a", "b", "c", "d", "e"))
    eventually(lambda: prefetched(on_nvme, "started") == 5 * BLOCKS)
    client.update_queue(queue("e", "d", "c", "b", "a"))
    eventually(lambda: all(is_in_dram(client, name) for name in "abcde"))
    assert on_nvme.series("kvservice_transfer_bytes_total", direction="nvme_to_dram") == 5 * BLOCKS * BLOCK_BYTES


def test_what_leaves_the_queue_is_not_read(on_nvme: DaemonProcess, client: kv.Client) -> None:
    client.update_queue(queue(*TALKS))
    eventually(lambda: prefetched(on_nvme, "started") == 6 * BLOCKS)
    client.update_queue(queue("f"))
    eventually(lambda: is_in_dram(client, "f"))

    def is_accounted_for() -> bool:
        read_bytes = on_nvme.series("kvservice_transfer_bytes_total", direction="nvme_to_dram")
        return read_bytes == (6 * BLOCKS - prefetched(on_nvme, "cancelled")) * BLOCK_BYTES

    eventually(is_accounted_for, what="what was started was either read or cancelled")
    load(client, "e")


def test_a_request_that_starts_before_its_fetch_has_ended_is_counted_and_read_once(
    on_nvme: DaemonProcess, client: kv.Client
) -> None:
    client.update_queue(queue("a", "b"))
    eventually(lambda: prefetched(on_nvme, "started") == 2 * BLOCKS)
    client.update_queue(queue("a"), started=["request b"])
    load(client, "b")
    # Too early, unless this machine has been busy with something else for longer than b takes to be read.
    starts = ("late", "ready")
    eventually(
        lambda: sum(on_nvme.series("kvservice_prefetch_request_starts_total", blocks=how) for how in starts) == 1
    )
    assert on_nvme.series("kvservice_transfer_bytes_total", direction="nvme_to_dram") <= 2 * BLOCKS * BLOCK_BYTES


def test_a_prefetch_that_nobody_used_is_wasted(on_nvme: DaemonProcess, client: kv.Client) -> None:
    client.update_queue(queue("a"))
    eventually(lambda: is_in_dram(client, "a"))
    client.update_queue([])
    for number in range(12):  # 9 MiB through 8 MiB of DRAM
        filling = chain(f"filling {number}", BLOCKS)
        client.save(filling, contents(filling, BLOCK_BYTES))
    eventually(lambda: prefetched(on_nvme, "wasted") == BLOCKS)
    assert prefetched(on_nvme, "useful") == 0


def test_shared_prefixes_are_read_once_for_all_instances(
    on_nvme: DaemonProcess, client: kv.Client, make_client: MakeClient
) -> None:
    other = make_client(on_nvme.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))
    for number, engine in enumerate((client, other)):
        tail = chain(f"tail {number}", 3)
        engine.update_queue([kv.WaitingRequest("x", [*CHAINS["a"], *tail]), kv.WaitingRequest("y", CHAINS["a"][:5])])
    eventually(lambda: is_in_dram(client, "a"))
    eventually(lambda: on_nvme.series("kvservice_queued_requests") == 4)
    assert prefetched(on_nvme, "started") == BLOCKS


def test_the_queue_ends_with_its_instance(on_nvme: DaemonProcess, make_client: MakeClient) -> None:
    engine = make_client(on_nvme.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))
    engine.update_queue(queue(*TALKS))
    eventually(lambda: on_nvme.series("kvservice_queued_requests") == 6)
    engine.close()
    eventually(lambda: on_nvme.series("kvservice_queued_requests") == 0)
    eventually(lambda: on_nvme.series("kvservice_prefetch_window_requests") == 0)


def test_a_new_daemon_is_told_the_whole_queue(on_nvme: DaemonProcess, client: kv.Client) -> None:
    client.update_queue(queue("a", "b"))
    eventually(lambda: on_nvme.series("kvservice_queued_requests") == 2)
    on_nvme.kill()
    on_nvme.restart()
    wait_served(client)
    client.update_queue(queue("b"), started=["request a"])
    eventually(lambda: on_nvme.series("kvservice_queued_requests") == 1)
    eventually(lambda: is_in_dram(client, "b"))


def test_idle_conversations_are_hinted_by_name(client: kv.Client) -> None:
    load(client, "a")
    assert client.hint_session("a", kv.Resumption.in_seconds(30.0))
    assert client.hint_session("a", kv.Resumption.typing())
    assert client.hint_session("a", kv.Resumption.finished())
    assert not client.hint_session("nobody", kv.Resumption.typing())
    with pytest.raises(kv.InvalidRequest):
        client.hint_session("", kv.Resumption.typing())


def test_a_plan_weighs_the_disk_against_the_engine(client: kv.Client) -> None:
    """16 tokens a block, 32 blocks a second from this disk: 512 tokens/s is where both are even."""
    assert client.plan_load(CHAINS["a"], prefill_tokens_per_s=1e6).blocks == BLOCKS, "nothing was measured yet"
    load(client, "a")
    load(client, "b")
    slow, fast = (client.plan_load(CHAINS["c"], prefill_tokens_per_s=speed) for speed in (10.0, 5000.0))
    assert (slow.blocks, fast.blocks) == (BLOCKS, 0)
    assert slow.held_blocks == fast.held_blocks == BLOCKS
    assert 0 < slow.load_s < slow.recompute_s
    in_dram = client.plan_load(CHAINS["a"], prefill_tokens_per_s=5000.0)
    assert (in_dram.blocks, in_dram.dram_blocks) == (BLOCKS, BLOCKS), "DRAM is faster than any of them"
    part = client.plan_load([*CHAINS["a"], *chain("new", 2)], prefill_tokens_per_s=5000.0)
    assert (part.blocks, part.reason) == (BLOCKS, kv.Reason.NOT_HELD)


def test_a_load_that_takes_longer_than_planned_brings_what_came(
    short_path: Path, on_nvme: DaemonProcess, make_daemon: MakeDaemon, make_client: MakeClient
) -> None:
    assert on_nvme.stop() == 0
    slow = make_daemon(**knobs(short_path, nvme_bytes_per_s_max=2 * BLOCK_BYTES))  # six seconds for a chain
    slow.wait_event("recovered")
    client = make_client(slow.socket_dir, namespace(block_size_bytes=BLOCK_BYTES))
    buffer = bytearray(BLOCKS * BLOCK_BYTES)
    loaded = client.load(CHAINS["a"], buffer, wait_s=0.1)
    assert loaded.blocks < BLOCKS
    assert loaded.reason is kv.Reason.OVER_LIMIT
    assert buffer[: loaded.blocks * BLOCK_BYTES] == contents(CHAINS["a"][: loaded.blocks], BLOCK_BYTES)
