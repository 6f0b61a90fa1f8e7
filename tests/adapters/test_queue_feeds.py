"""Engines that tell of their queue: what waits is fetched from a slow disk before it starts, and computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from kvservice_adapters.serving import Request, Result, ServingLoop
from kvservice_adapters.transformers import AdapterOptions, DrainOutcome, TransformersAdapter
from tests.adapters.conftest import KNOBS
from tests.adapters.vllm_engine import TOKENS_PER_BLOCK, VllmEngine
from tests.adapters.vllm_scenes import HELD_TOKENS, prompt, wait_attached
from tests.daemons import MIB, DaemonProcess
from tests.waiting import eventually

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

TIMEOUT_S = 30.0
BURST = 6
CANCELLED = 20  # four seconds of this disk's reads
OUTCOMES = ("started", "useful", "late", "wasted", "cancelled")


@pytest.fixture
def slow_disk(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon whose disk moves two mebibytes a second, one read at a time."""
    nvme: dict[str, Any] = {"nvme_dirs": tmp_path / "nvme", "nvme_bytes": 256 * MIB, "nvme_segment_bytes": 16 * MIB}
    with DaemonProcess(tmp_path / "s", **KNOBS, **nvme, nvme_bytes_per_s_max=2 * MIB, nvme_queue_depth=1) as daemon:
        yield daemon


def restart(daemon: DaemonProcess) -> None:
    """What it holds is on NVMe only afterwards."""
    assert daemon.stop() == 0
    daemon.restart()
    assert daemon.wait_event("recovered")["blocks"] > 0


def started_as(daemon: DaemonProcess, blocks: str) -> float:
    return daemon.series("kvservice_prefetch_request_starts_total", blocks=blocks)


# ---------------------------------------------------------------- serving loop


def asked() -> list[Request]:
    return [Request(f"r{seed}", tuple(prompt(seed)), max_new_tokens=12, session_id=f"s{seed}") for seed in range(BURST)]


def served(loop: ServingLoop) -> dict[str, Result]:
    return {result.request_id: result for result in loop.run_until_idle()}


def test_the_serving_loops_queue_is_fetched_before_its_turn(model: PreTrainedModel, slow_disk: DaemonProcess) -> None:
    options = AdapterOptions(recompute_if_faster=False)
    with TransformersAdapter(model, slow_disk.socket_dir, weights_identity="seeded", options=options) as adapter:
        loop = ServingLoop(model, adapter, rows=1, window_tokens=400)
        for request in asked():
            loop.submit(request)
        computed = served(loop)
        assert loop.drain(TIMEOUT_S) is DrainOutcome.DRAINED
        restart(slow_disk)
        eventually(lambda: adapter.attached)
        for request in asked():
            loop.submit(request)

        def is_covered() -> bool:
            needed = slow_disk.series("kvservice_prefetch_window_blocks")
            return needed > 0 and needed == slow_disk.series("kvservice_prefetch_window_dram_blocks")

        eventually(lambda: slow_disk.series("kvservice_queued_requests") == BURST)
        eventually(is_covered)
        resumed = served(loop)
        for name, result in resumed.items():
            assert (result.tokens, result.reused_tokens) == (computed[name].tokens, 288)
        eventually(lambda: started_as(slow_disk, "ready") == BURST)
        assert slow_disk.series("kvservice_prefetch_lead_seconds_count") == BURST
        assert slow_disk.series("kvservice_prefetch_blocks_total", outcome="late") == 0
        assert slow_disk.series("kvservice_queued_requests") == 0


def test_the_serving_loop_computes_what_the_disk_would_bring_later(
    model: PreTrainedModel, slow_disk: DaemonProcess
) -> None:
    """300 tokens take a fifth of a second from this disk, and an engine that says so computes them in no time."""
    options = AdapterOptions(recompute_if_faster=True)
    with TransformersAdapter(model, slow_disk.socket_dir, weights_identity="seeded", options=options) as adapter:
        loop = ServingLoop(model, adapter, rows=1, window_tokens=400)
        for request in asked()[:2]:
            loop.submit(request)
        computed = served(loop)
        assert loop.drain(TIMEOUT_S) is DrainOutcome.DRAINED
        restart(slow_disk)
        eventually(lambda: adapter.load(prompt(0)).reused_tokens == 288)  # which measures the disk
        for _ in range(50):
            adapter.prefilled(tokens=10_000, seconds=0.01)
        tracked = adapter.track(prompt(1))
        assert adapter.fetch(tracked, lambda blocks: pytest.fail("something was loaded") if blocks else []) == 0
        assert adapter.stats().missed_blocks["RECOMPUTED"] == 18
        assert adapter.fetch(adapter.track(prompt(0)), lambda _blocks: loop._cache.row(0)) == 288, "that is in DRAM"
        assert computed["r0"].reused_tokens == 0


# ------------------------------------------------------------------------ vLLM


def test_a_burst_on_vllm_is_fetched_before_its_requests_start(
    vllm: VllmEngine, model_dir: Path, slow_disk: DaemonProcess
) -> None:
    """Resumed conversations wait behind a request that runs; the test steps the engine, so no clock has a say.

    An engine that computes faster than this disk reads plans to load nothing when they arrive, and loads all the same
    what has come by the time their turn has.
    """
    resumed = {f"resumed {number}": prompt(100 + number) for number in range(BURST)}
    cancelled = {f"cancelled {number}": prompt(200 + number) for number in range(CANCELLED)}
    vllm.open_attached(model_dir, slow_disk, max_num_seqs=1, options={"recompute_if_faster": True})
    expected = vllm.generate(*resumed.values(), tokens=12)
    vllm.generate(*cancelled.values(), tokens=1)
    vllm.do("settle")
    restart(slow_disk)
    wait_attached(vllm)
    vllm.do("drop_cache")
    vllm.do("start", request="running", prompt=prompt("running"), tokens=200)
    vllm.do("add", prompts=resumed | cancelled, tokens=12)
    vllm.do("step", cancelled=[])
    eventually(lambda: slow_disk.series("kvservice_queued_requests") == BURST + CANCELLED)
    vllm.do("step", cancelled=list(cancelled))
    eventually(lambda: slow_disk.series("kvservice_queued_requests") == BURST)
    blocks = BURST * HELD_TOKENS // TOKENS_PER_BLOCK
    eventually(lambda: slow_disk.series("kvservice_prefetch_window_dram_blocks") == blocks)
    outcomes = vllm.do("run")
    assert [outcomes[name]["tokens"] for name in resumed] == [outcome["tokens"] for outcome in expected]
    assert [outcomes[name]["cached"] for name in resumed] == [HELD_TOKENS] * BURST
    eventually(lambda: started_as(slow_disk, "ready") == BURST)
    assert slow_disk.series("kvservice_prefetch_lead_seconds_count") == BURST, "fetched before they started"
    became = {one: slow_disk.series("kvservice_prefetch_blocks_total", outcome=one) for one in OUTCOMES}
    assert (became["useful"], became["late"], became["wasted"]) == (blocks, 0, 0)
    # What was on its way when they were cancelled is a second's worth of reads at most.
    assert became["cancelled"] > 0
    assert became["started"] - became["cancelled"] < (BURST + CANCELLED) * HELD_TOKENS // TOKENS_PER_BLOCK
