"""The simulator counts what a brute force counts, keeps its books, and gives the same answer every time."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvservice.cli import main as cli_main
from kvservice.simulate import plots
from kvservice.simulate.engine import Simulation, Speeds
from kvservice.simulate.outcome import Outcome
from kvservice.simulate.replay import replay
from kvservice.simulate.requests import Request, TraceError, read_trace, unique_blocks
from kvservice.simulate.run import _reusable_blocks
from kvservice.simulate.workload import Workload, generate

pytestmark = pytest.mark.unit

BLOCK_TOKENS = 512


def trace_lines(seed: int = 1, conversations: int = 40) -> list[dict[str, Any]]:
    """A small trace in Mooncake's format: conversations behind one shared block, in turns that interleave."""
    chooser = random.Random(seed)
    fresh = iter(range(1, 1 << 30))
    lines = []
    for _ in range(conversations):
        at_ms, chain = chooser.randrange(400_000), [0]
        for _ in range(chooser.choice([1, 1, 2, 3, 5])):
            chain = chain + [next(fresh) for _ in range(chooser.randint(1, 6))]
            ids = [*chain, next(fresh)]
            tokens = {"input_length": len(chain) * BLOCK_TOKENS + 100, "output_length": chooser.randint(1, 400)}
            lines.append({"timestamp": at_ms, **tokens, "hash_ids": ids})
            at_ms += chooser.randrange(1_000, 120_000)
    return sorted(lines, key=lambda line: int(str(line["timestamp"])))


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "small.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in trace_lines()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def requests(trace: Path) -> list[Request]:
    return read_trace(trace)


# ------------------------------------------------------------------ brute force


def brute_force(requests: Sequence[Request], capacity: int, kind: str, window: int = 0) -> int:
    """Hits of the plain replay by the plainest means: lists, and a search of everything for each victim."""
    held: dict[bytes, tuple[bytes | None, int]] = {}  # block -> (the one before it, time of last use)
    hits = 0
    for at, request in enumerate(requests):
        chain = list(request.hashes)
        hit = next((length for length, one in enumerate(chain) if one not in held), len(chain))
        hits += hit
        for depth in range(hit):
            held[chain[depth]] = (held[chain[depth]][0], at)
        coming = {one for later in requests[at + 1 : at + 1 + window] for one in later.hashes}
        for one in chain[hit:]:
            while len(held) >= capacity:
                victim = worst(held, requests, at, kind, set(chain[:hit]) | (coming if window else set()), chain)
                if victim is None:
                    break
                del held[victim]
            if len(held) >= capacity:
                break
            position = chain.index(one)
            held[one] = (chain[position - 1] if position else None, at)
    return hits


def worst(
    held: dict[bytes, tuple[bytes | None, int]],
    requests: Sequence[Request],
    at: int,
    kind: str,
    spared: set[bytes],
    serving: Sequence[bytes],
) -> bytes | None:
    """The block to evict: an end of a chain, of the longest ago, or of the next use that is farthest away."""
    parents = {parent for parent, _ in held.values()}
    ends = [one for one in held if one not in parents and one not in spared and one not in serving]
    if kind == "lru":
        return min(ends, key=lambda one: (held[one][1], -depth_of(held, one)), default=None)
    return max(ends, key=lambda one: (next_use(requests, at, one), depth_of(held, one)), default=None)


def depth_of(held: dict[bytes, tuple[bytes | None, int]], one: bytes) -> int:
    depth = 0
    parent = held[one][0]
    while parent is not None:
        depth, parent = depth + 1, held[parent][0]
    return depth


def next_use(requests: Sequence[Request], at: int, one: bytes) -> int:
    return next((later for later in range(at + 1, len(requests)) if one in requests[later].hashes), 1 << 30)


@pytest.mark.parametrize("capacity", [12, 40, 120])
def test_the_replay_hits_what_a_brute_force_hits(requests: list[Request], capacity: int) -> None:
    lru = replay(requests, "lru", queue_window=0, dram_blocks=capacity, block_bytes=4096)
    assert sum(lru.dram_hits) == brute_force(requests, capacity, "lru")
    ahead = replay(requests, "lookahead", queue_window=8, dram_blocks=capacity, block_bytes=4096)
    assert sum(ahead.dram_hits) == pytest.approx(brute_force(requests, capacity, "lru", window=8), rel=0.02)
    assert sum(ahead.dram_hits) >= sum(lru.dram_hits)


@pytest.mark.parametrize("capacity", [12, 40, 120])
def test_the_oracle_hits_what_a_brute_force_oracle_hits_and_nobody_more(requests: list[Request], capacity: int) -> None:
    oracle = replay(requests, "belady", queue_window=0, dram_blocks=capacity, block_bytes=4096)
    assert sum(oracle.dram_hits) == pytest.approx(brute_force(requests, capacity, "belady"), abs=2)
    for policy in ("fifo", "lru", "predictive"):
        other = replay(requests, policy, queue_window=0, dram_blocks=capacity, block_bytes=4096)
        assert sum(other.dram_hits) <= sum(oracle.dram_hits)


def test_an_endless_store_hits_all_that_can_be_hit(requests: list[Request]) -> None:
    for policy in ("fifo", "lru", "lookahead", "predictive", "belady"):
        endless = replay(requests, policy, queue_window=0, dram_blocks=unique_blocks(requests), block_bytes=4096)
        assert sum(endless.dram_hits) == _reusable_blocks(requests)


# ------------------------------------------------------------------ time-aware


SPEEDS = Speeds(prefill_tokens_per_s=1_500.0, nvme_bytes_per_s=4e6, batch_max=4, gpus=1)


def simulate(
    requests: Sequence[Request],
    policy: str,
    *,
    window: int = -1,
    speeds: Speeds = SPEEDS,
    may_recompute: bool = False,
    admission: str = "all",
    **sizes: int,
) -> tuple[Simulation, Outcome]:
    simulation = Simulation(
        requests,
        policy,
        speeds,
        dram_blocks=sizes.get("dram_blocks", 60),
        nvme_blocks=sizes.get("nvme_blocks", 400),
        block_bytes=65_536,
        block_tokens=BLOCK_TOKENS,
        queue_window=window,
        may_recompute=may_recompute,
        admission=admission,
    )
    return simulation, simulation.run()


@pytest.mark.parametrize("policy", ["fifo", "lru", "lookahead", "predictive"])
@pytest.mark.parametrize("sizes", [{}, {"nvme_blocks": 0}, {"nvme_blocks": 90}, {"dram_blocks": 16, "nvme_blocks": 60}])
def test_every_request_is_served_once_and_the_books_agree(
    requests: list[Request], policy: str, sizes: dict[str, int]
) -> None:
    simulation, outcome = simulate(requests, policy, speeds=SPEEDS, may_recompute=False, admission="all", **sizes)
    simulation.tiers.check()
    assert len(outcome.ttft_s) == len(outcome.asked) == len(requests)
    # hits + misses = requested, and no more is missed or held than was asked for.
    assert sum(outcome.asked) == sum(len(request.hashes) for request in requests)
    assert all(d + n <= asked for d, n, asked in zip(outcome.dram_hits, outcome.nvme_hits, outcome.asked, strict=True))
    assert min(outcome.ttft_s) > 0
    assert outcome.tokens == sum(request.input_tokens + request.output_tokens for request in requests)
    assert simulation.tiers.namespace.pool.holders.sum() == 0, "somebody still holds a slot"
    assert len(simulation.tiers.namespace.window) == 0, "somebody still waits"
    assert sum(outcome.dram_hits) + sum(outcome.nvme_hits) <= _reusable_blocks(requests) + 20


@pytest.mark.parametrize("policy", ["lru", "lookahead", "predictive"])
def test_the_same_run_twice_is_the_same(requests: list[Request], policy: str) -> None:
    first, second = (simulate(requests, policy)[1] for _ in range(2))
    assert first == second


def test_with_a_queue_fetching_ahead_finds_blocks_in_dram_and_saves_time(requests: list[Request]) -> None:
    _, lru = simulate(requests, "lru")
    _, ahead = simulate(requests, "lookahead")
    assert ahead.dram_hit_share > lru.dram_hit_share
    assert sum(ahead.ttft_s) < sum(lru.ttft_s)


def test_a_disk_that_fetches_keep_busy_still_writes_what_is_stored() -> None:
    """Else blocks that wait to be written fill DRAM, and requests find no room to read theirs into."""
    requests = generate(Workload(conversations=100, per_second=10.0, think_s_mean=5.0))
    speeds = Speeds(nvme_bytes_per_s=5e5, gpus=1)
    simulation, outcome = simulate(requests, "lookahead", speeds=speeds, dram_blocks=150, nvme_blocks=2000)
    simulation.tiers.check()
    assert sum(outcome.dram_hits) + sum(outcome.nvme_hits) >= 0.98 * _reusable_blocks(requests)


def test_a_request_does_not_wait_for_a_slow_disk_where_it_may_recompute(requests: list[Request]) -> None:
    slow = Speeds(prefill_tokens_per_s=20_000.0, nvme_bytes_per_s=2e5, batch_max=4, gpus=1)
    _, loading = simulate(requests, "lru", speeds=slow)
    simulation, choosing = simulate(requests, "lru", speeds=slow, may_recompute=True)
    simulation.tiers.check()
    assert 0 < choosing.recomputed_blocks <= sum(choosing.nvme_hits) + sum(choosing.dram_hits)
    assert sum(choosing.ttft_s) < 0.9 * sum(loading.ttft_s)
    _, fast = simulate(requests, "lru", speeds=Speeds(nvme_bytes_per_s=1e12), may_recompute=True)
    assert fast.recomputed_blocks == 0, "nothing is faster than such a disk"


def test_what_no_request_uses_again_is_not_written_where_only_the_reused_is(requests: list[Request]) -> None:
    _, everything = simulate(requests, "lru", nvme_blocks=2_000)
    simulation, reused = simulate(requests, "lru", nvme_blocks=2_000, admission="reused")
    simulation.tiers.check()
    assert 0 < reused.written_blocks < everything.written_blocks
    once = list({request.hashes[0]: request for request in requests}.values())
    _, never = simulate(once, "lru", nvme_blocks=2_000, admission="reused")
    assert (sum(never.asked) > 0, never.written_blocks) == (True, 0)


def test_a_policy_that_is_told_nothing_fetches_nothing_ahead(requests: list[Request]) -> None:
    _, told_nothing = simulate(requests, "lookahead", window=0)
    _, lru = simulate(requests, "lru")
    assert told_nothing.dram_hits == lru.dram_hits
    assert told_nothing.ttft_s == lru.ttft_s


# ------------------------------------------------------------------ workload


def test_the_generated_workload_is_what_the_paper_states() -> None:
    requests = generate(Workload(conversations=4_000))
    firsts = [request for request in requests if request.follows < 0]
    assert len(firsts) == 4_000
    assert len(requests) / 4_000 == pytest.approx(5.75, rel=0.05)
    followed = {request.follows for request in requests}
    assert sum(request.number in followed for request in firsts) / 4_000 == pytest.approx(0.73, abs=0.02)
    assert max(request.arrival_s for request in firsts) == pytest.approx(4_000, rel=0.05)


def test_a_turn_holds_the_turn_before_and_its_reply() -> None:
    by_number = {request.number: request for request in generate(Workload(conversations=50))}
    turns = [request for request in by_number.values() if request.follows >= 0]
    assert turns
    for turn in turns:
        before = by_number[turn.follows]
        assert list(turn.hashes[: len(before.stored)]) == list(before.stored)
        assert turn.input_tokens > before.input_tokens + before.output_tokens
    assert generate(Workload(conversations=50, seed=2)) != list(by_number.values())


def test_a_conversation_that_outgrows_its_window_loses_the_older_half() -> None:
    kept, lost = (
        generate(Workload(conversations=200, context_tokens=2048, keeps_truncated=keeps)) for keeps in (True, False)
    )
    shapes = [[(one.input_tokens, one.output_tokens, len(one.stored)) for one in each] for each in (kept, lost)]
    assert shapes[0] == shapes[1], "the same conversations"
    assert all(request.input_tokens + request.output_tokens <= 2048 for request in kept)
    by_number = {request.number: request for request in kept}
    cuts = [request for request in kept if request.truncated]
    assert len(cuts) > 100
    for request in cuts:
        assert request.truncated is not None
        before = by_number[request.follows]
        assert list(request.truncated.chain) == list(before.stored)
        assert request.truncated.first == 4, "1,024 tokens"
        assert not set(before.stored) & set(request.hashes), "new names"
    assert not any(request.truncated for request in lost)


@pytest.mark.parametrize("policy", ["lru", "lookahead", "predictive"])
def test_blocks_that_stay_in_the_window_are_hits_with_truncation_only(policy: str) -> None:
    hit_ratios = {}
    for keeps in (True, False):
        requests = generate(Workload(conversations=40, context_tokens=2048, keeps_truncated=keeps))
        endless = replay(requests, policy, queue_window=0, dram_blocks=unique_blocks(requests), block_bytes=4096)
        assert sum(endless.dram_hits) == _reusable_blocks(requests)
        simulation, outcome = simulate(requests, policy, speeds=Speeds(nvme_bytes_per_s=1e7), nvme_blocks=2000)
        simulation.tiers.check()
        assert sum(outcome.dram_hits) + sum(outcome.nvme_hits) <= _reusable_blocks(requests)
        hit_ratios[keeps] = outcome.hit_ratio
    assert hit_ratios[True] > 1.1 * hit_ratios[False]


@pytest.mark.parametrize("policy", ["lru", "lookahead"])
def test_blocks_that_leave_with_the_source_of_their_chain_while_bytes_move_do_no_harm(policy: str) -> None:
    workload = Workload(conversations=150, per_second=5.0, think_s_mean=5.0, context_tokens=2048)
    speeds = Speeds(nvme_bytes_per_s=1e6, gpus=1)
    simulation, _ = simulate(generate(workload), policy, speeds=speeds, dram_blocks=100, nvme_blocks=150)
    simulation.tiers.check()
    assert simulation.tiers.namespace.pool.holders.sum() == 0


def test_later_turns_come_after_the_reply_and_the_thinking() -> None:
    requests = generate(Workload(conversations=30))
    simulation, outcome = simulate(requests, "lookahead", dram_blocks=200)
    simulation.tiers.check()
    assert len(outcome.ttft_s) == len(requests)
    assert outcome.elapsed_s > max(request.arrival_s for request in requests if request.follows < 0)


# ------------------------------------------------------------------ the command


def test_the_command_prints_a_table_and_writes_rows_and_plots(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--trace", str(trace), "--untimed", "--policy", "lru,lookahead,belady", "--queue-window", "0,8"]
    assert cli_main(["simulate", *arguments, "--dram-share", "0.05,0.2", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [(row["policy"], row["queue_window"]) for row in rows[:3]] == [("lru", 0), ("lookahead", 8), ("belady", 0)]
    assert len(rows) == 6
    wanted = "policy queue_window dram_blocks nvme_blocks dram_share hit_ratio dram_hit_share ttft_ms_p50 ttft_ms_p99"
    assert {*wanted.split(), "gpu_seconds", "bytes_moved", "bytes_written", "cost"} <= set(rows[0])
    assert "lookahead" in capsys.readouterr().out
    assert (tmp_path / "table.txt").read_text().count("\n") == 7


def test_without_matplotlib_tables_are_written_and_it_says_so(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(plots, "_is_installed", lambda: False)
    arguments = ["--trace", str(trace), "--policy", "lru,predictive", "--dram-share", "0.1", "--nvme", "64MiB"]
    assert cli_main(["simulate", *arguments, "--block-bytes", "64KiB", "--out", str(tmp_path)]) == 0
    assert "pip install 'kvservice[simulate]'" in capsys.readouterr().err
    rows = json.loads((tmp_path / "summary.json").read_text())
    assert [row["policy"] for row in rows] == ["lru", "predictive"]
    assert all(row["ttft_ms_p99"] > 0 and row["cost"] > 0 for row in rows)
    assert not list(tmp_path.glob("*.png"))


def test_plots_are_pictures_of_moderate_size(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `simulate` is not installed")
    outcome = Outcome("lru", 0, 10, 20, asked=[4], dram_hits=[1], nvme_hits=[1], ttft_s=[0.5], tokens=10, gpus=1)
    row = outcome.row(unique_blocks=100, reusable_blocks=4, block_bytes=4096)
    assert plots.draw([row, {**row, "dram_share": 0.2}], tmp_path)
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["cost.png", "dram_hit_share.png", "hit_ratio.png", "ttft_ms_mean.png"]
    assert all(
        path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 200_000 for path in tmp_path.iterdir()
    )


def test_plots_are_against_the_tier_whose_size_differs() -> None:
    row = {"policy": "lru", "queue_window": 0, "dram_blocks": 10, "nvme_blocks": 50, "dram_share": 0.1, "cost": 2.0}
    assert plots._lines([row], "cost", "DRAM") == {"lru": [(0.1, 2.0)]}
    assert plots._lines([row], "cost", "NVMe") == {"lru": [(0.5, 2.0)]}
    assert plots._tier_that_differs([row, {**row, "nvme_blocks": 60}]) == "NVMe"
    assert plots._tier_that_differs([row]) == "DRAM"
    assert plots._tier_that_differs([row, {**row, "dram_blocks": 20, "nvme_blocks": 60}]) == "DRAM"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "lfu"], "lfu is not among fifo"),
        (["--policy", "belady"], "add --untimed"),
        (["--dram-share", "0"], "above 0 and at most 1"),
        (["--dram", "12GB"], "write 12GiB"),
        (["--batch", "0"], "--batch must be above 0"),
        (["--context-tokens", "512"], "at least four blocks, 1024"),
        (["--tarce", "x"], "did you mean --trace"),
    ],
)
def test_wrong_arguments_are_refused_with_what_to_write(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli_main(["simulate", "--out", str(tmp_path), *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "request 1: JSONDecodeError"),
        ('{"timestamp": 1}', "request 1: KeyError: 'hash_ids'"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [-1]}', "request 1: OverflowError"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [1, 1]}', "wants distinct hash_ids"),
        ('{"timestamp": -5, "input_length": 1, "output_length": 1, "hash_ids": [1]}', "not negative"),
        ("", "has no requests"),
    ],
)
def test_a_broken_trace_is_refused_with_its_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(TraceError, match=message):
        read_trace(path)
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "nowhere.jsonl")
