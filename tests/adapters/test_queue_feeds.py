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
from tests.adapters.vllm_engine import VllmEngine
from tests.adapters.vllm_scenes import HELD_TOKENS, prompt, wait_attached
from tests.daemons import MIB, DaemonProcess
from tests.waiting import eventually

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

TIMEOUT_S = 30.0
BURST = 6


def with_disk(directory: Path, *, bytes_per_s_max: int) -> DaemonProcess:
    nvme: dict[str, Any] = {"nvme_dirs": directory / "nvme", "nvme_bytes": 256 * MIB, "nvme_segment_bytes": 16 * MIB}
    return DaemonProcess(directory / "s", **KNOBS, **nvme, nvme_bytes_per_s_max=bytes_per_s_max)


@pytest.fixture
def slow_disk(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon whose disk moves two mebibytes a second."""
    with with_disk(tmp_path, bytes_per_s_max=2 * MIB) as daemon:
        yield daemon


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A daemon whose disk brings a prompt in a thirtieth of a second; no engine here answers one as fast."""
    with with_disk(tmp_path, bytes_per_s_max=16 * MIB) as daemon:
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
    with TransformersAdapter(model, slow_disk.socket_dir, weights_identity="seeded") as adapter:
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


def burst(engine: VllmEngine, tokens: int) -> list[dict[str, Any]]:
    return engine.generate(*[prompt(100 + seed) for seed in range(BURST)], tokens=tokens)


def test_a_burst_on_vllm_is_fetched_before_its_requests_start(
    vllm: VllmEngine, model_dir: Path, disk: DaemonProcess
) -> None:
    vllm.open_attached(model_dir, disk, max_num_seqs=1)
    expected = [outcome["tokens"] for outcome in burst(vllm, 64)]
    vllm.do("settle")
    restart(disk)
    wait_attached(vllm)
    vllm.do("drop_cache")
    outcomes = burst(vllm, 64)
    assert [outcome["tokens"] for outcome in outcomes] == expected
    eventually(lambda: disk.series("kvservice_queued_requests") == 0)
    states = ("ready", "late", "absent", "nothing_held")
    assert sum(started_as(disk, state) for state in states) <= BURST, "a request starts once"
    # The first starts at once; while one runs, the next are fetched.
    assert started_as(disk, "ready") >= BURST // 2
    assert disk.series("kvservice_prefetch_lead_seconds_count") >= BURST // 2
    assert disk.series("kvservice_prefetch_blocks_total", outcome="useful") > 0
    assert [outcome["cached"] for outcome in outcomes].count(HELD_TOKENS) >= BURST // 2
