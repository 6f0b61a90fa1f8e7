"""The vLLM adapter where things go wrong: every request completes with the same tokens, and reuse comes back."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.vllm_engine import TOKENS_PER_BLOCK, VllmEngine
from tests.adapters.vllm_scenes import (
    HELD_TOKENS,
    PROMPT_TOKENS,
    TAIL_TOKENS,
    answer,
    computed_before,
    prompt,
    wait_attached,
)
from tests.daemons import MIB, DaemonProcess

pytestmark = [pytest.mark.engines, pytest.mark.timeout(180)]

HANG_S = 40.0
"""The deadlines of `served` together, and what a request of the tiny model takes on a busy machine."""


def test_an_absent_daemon_costs_the_reuse_until_it_is_there(
    vllm: VllmEngine, model_dir: Path, absent_daemon: DaemonProcess
) -> None:
    vllm.open_attached(model_dir, absent_daemon, options={"attach_wait_s": 0.0}, enable_prefix_caching=False)
    first = answer(vllm, prompt())
    assert first["computed"] == PROMPT_TOKENS
    absent_daemon.start()
    wait_attached(vllm)
    assert answer(vllm, prompt())["computed"] == PROMPT_TOKENS
    again = answer(vllm, prompt())
    assert (again["tokens"], again["computed"]) == (first["tokens"], TAIL_TOKENS)


@pytest.mark.parametrize("rpc", ["PlanLoad", "UpdateQueue", "Get", "Release", "Put", "Commit", "Abort", "Prefetch"])
def test_any_call_may_fail(served: VllmEngine, rpc: str) -> None:
    ids, new = prompt(f"held {rpc}"), prompt(f"new {rpc}")
    expected = computed_before(served, ids)
    free = served.do("free_blocks")
    served.do("fail", rpc=rpc)
    assert answer(served, ids)["tokens"] == expected
    assert answer(served, new)["computed"] == PROMPT_TOKENS
    assert served.do("free_blocks") == free
    counts = served.do("counts")
    assert "hook_errors" not in counts
    if rpc == "PlanLoad":
        assert counts["failed_lookups:unavailable"] == 2
    if rpc == "Get":
        assert counts["unloaded_blocks:unavailable"] == HELD_TOKENS // TOKENS_PER_BLOCK
    if rpc in {"Put", "Commit"}:
        assert counts["unsaved_blocks:unavailable"] > 0


@pytest.mark.parametrize("where", ["write", "read"], ids=["load", "save"])
def test_the_daemon_is_killed_in_the_middle_of_a_copy(
    served: VllmEngine, served_daemon: DaemonProcess, where: str
) -> None:
    held, new = prompt(f"held {where}"), prompt(f"new {where}")
    expected = computed_before(served, held)
    free = served.do("free_blocks")
    served.do("signal_in", where=where, process_id=served_daemon.process.pid)
    outcome = answer(served, held if where == "write" else new)
    if where == "write":
        assert outcome["tokens"] == expected
    served_daemon.wait()
    assert served.do("free_blocks") == free
    served_daemon.restart()
    wait_attached(served)
    served.do("drop_cache")
    # The new daemon is empty, whatever was under way.
    again = answer(served, held)
    assert (again["tokens"], again["computed"]) == (expected, PROMPT_TOKENS)


def test_reuse_comes_back_after_a_crash_and_a_restart(served: VllmEngine, served_daemon: DaemonProcess) -> None:
    ids = prompt("crash")
    expected = computed_before(served, ids)
    served_daemon.kill()
    assert answer(served, ids)["tokens"] == expected
    served_daemon.restart()
    wait_attached(served)
    # The engine holds these blocks itself now, and gives them to the store again.
    answer(served, ids)
    served.do("drop_cache")
    again = answer(served, ids)
    assert (again["tokens"], again["computed"]) == (expected, TAIL_TOKENS)


@pytest.mark.parametrize("where", ["lookup", "get", "read"])
def test_a_daemon_that_hangs_delays_a_request_by_its_deadline_at_most(
    served: VllmEngine, served_daemon: DaemonProcess, where: str
) -> None:
    held, new = prompt(f"held {where} hang"), prompt(f"new {where} hang")
    expected = computed_before(served, held)
    if where == "lookup":
        served_daemon.pause()
    else:
        served.do("signal_in", where=where, process_id=served_daemon.process.pid, number=signal.SIGSTOP)
    started_s = time.monotonic()
    (outcome,) = served.generate(new if where == "read" else held)
    assert time.monotonic() - started_s < HANG_S
    assert outcome["finish_reason"] == "length"
    assert where == "read" or outcome["tokens"] == expected
    served_daemon.resume()
    served.do("settle")
    wait_attached(served)
    served.do("drop_cache")
    assert answer(served, held)["tokens"] == expected


@pytest.mark.parametrize(
    "hook",
    [
        "on_new_request",
        "matched_tokens",
        "blocks_allocated",
        "plan_saves",
        "loads_ended",
        "request_finished",
        "before_step",
        "start_loads",
        "start_saves",
        "take_saved",
    ],
)
def test_a_bug_in_any_hook_costs_reuse_only(served: VllmEngine, hook: str) -> None:
    held, new = prompt(f"held {hook}"), prompt(f"new {hook}")
    expected = computed_before(served, held)
    served.do("break_hook", hook=hook)
    for _ in range(2):
        (outcome,) = served.generate(held)
        assert (outcome["finish_reason"], outcome["tokens"]) == ("length", expected)
    assert served.generate(new)[0]["finish_reason"] == "length"
    assert served.do("counts")["hook_errors:RuntimeError"] > 0


def test_a_full_arena_saves_what_fits(vllm: VllmEngine, model_dir: Path, tmp_path: Path) -> None:
    prompts = [prompt(seed, tokens=600) for seed in range(4)]
    vllm.open(model_dir)
    expected = [outcome["tokens"] for outcome in vllm.generate(*prompts)]
    vllm.do("close")
    # 48 KiB a block: room for one prompt.
    knobs: dict[str, Any] = {"dram_bytes": 1 * MIB, "dram_segment_bytes": MIB // 2}
    with DaemonProcess(tmp_path / "s", **knobs) as daemon:
        vllm.open_attached(model_dir, daemon)
        for _ in range(2):
            outcomes = vllm.generate(*prompts)
            assert [outcome["tokens"] for outcome in outcomes] == expected
        vllm.do("settle")
        assert vllm.do("counts")["saved_blocks"] > 0
        vllm.do("close")
        assert daemon.stop() == 0


def test_corrupt_files_are_computed_again(vllm: VllmEngine, model_dir: Path, tmp_path: Path) -> None:
    nvme = tmp_path / "nvme"
    knobs: dict[str, Any] = {
        "dram_bytes": 64 * MIB,
        "nvme_dirs": nvme,
        "nvme_bytes": 512 * MIB,
        "nvme_segment_bytes": 16 * MIB,
        "nvme_write_behind_s": 0.1,
    }
    with DaemonProcess(tmp_path / "s", **knobs) as daemon:
        vllm.open_attached(model_dir, daemon)
        expected = answer(vllm, prompt())["tokens"]
        vllm.do("close")
        assert daemon.stop() == 0
        spoil(nvme)
        daemon.restart()
        daemon.wait_event("recovered")
        vllm.open_attached(model_dir, daemon)
        again = answer(vllm, prompt())
        assert (again["tokens"], again["computed"]) == (expected, PROMPT_TOKENS)
        vllm.do("close")


def spoil(folder: Path) -> None:
    """Flip a bit in every page of every segment file that holds blocks."""
    spoilt = 0
    for file in folder.rglob("*"):
        if file.is_file() and "journal" not in file.name and file.stat().st_size >= MIB:
            with file.open("r+b") as stream:
                for position in range(4096, os.fstat(stream.fileno()).st_size, 4096):
                    stream.seek(position)
                    byte = stream.read(1)
                    stream.seek(position)
                    stream.write(bytes([byte[0] ^ 1]))
            spoilt += 1
    assert spoilt, f"no segment files in {folder}"
