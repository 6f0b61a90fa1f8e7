"""vllm_reuse: what the vLLM adapter costs where nothing is reused, and what it saves where conversations resume.

Real `vllm serve`, with the adapter and without, answer the same load by turns, on the CPU. All have vLLM's own prefix
caching on; their caches are too small for the working set, as a busy engine's is. Requests go one at a time, so that
times are those of requests and not of queues. A third server's daemon has little DRAM and a disk that is held back: it
must not make a resumed turn slower than computing it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import kvservice_client as kv
from benchmarks.chat_model import write_chat_model
from benchmarks.daemon import running_daemon
from benchmarks.measuring import Record, Skipped, progress
from benchmarks.multi_turn import Load, Server, drive, generated
from benchmarks.multi_turn_report import Report, percentile
from benchmarks.settings import Settings
from benchmarks.vllm_server import VENV, VllmServer, is_installed, transfer_config
from kvservice.demo.model import ModelShape

_ARENA_BYTES = 1 << 30
_SLOW_ARENA_BYTES, _SLOW_NVME_BYTES = 64 << 20, 1 << 30  # of the four conversations' 120 MB at least half are on disk
_SLOW_BYTES_PER_S = 50_000_000
_MEMORY_TIMEOUT_S, _POLL_S = 120.0, 0.5
# 4,800 tokens: two histories and a bit, where four conversations take turns.
_FLAGS = ("--dtype", "float32", "--max-model-len", "4096", "--num-gpu-blocks-override", "150")
# vLLM keeps one more core free where a connector is configured: said here, so that both compute with as many threads.
_ENVIRON = {"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"}
_COLD_REQUESTS, _COLD_WORDS, _ANSWER_TOKENS = 6, 200, 24
_CONVERSATIONS, _TURNS, _HISTORY_WORDS = 4, 4, 400  # a token per byte: 2,000 tokens and more from the first turn on


def measure(settings: Settings) -> Iterator[Record]:
    """vllm_cold_overhead (tokens per second, with over without), vllm_multi_turn_ttft_ratio, vllm_slow_disk_*. Minutes.

    Raises:
        Skipped: vLLM is not installed.
        RuntimeError: a request failed, or nothing was reused.
    """
    if not is_installed():
        raise Skipped(f"no vLLM in {VENV}: scripts/install_vllm.sh")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvservice-bench-")))
        write_chat_model(folder / "model", ModelShape())
        daemon = stack.enter_context(running_daemon(dram_bytes=_ARENA_BYTES))
        slow = stack.enter_context(
            running_daemon(
                dram_bytes=_SLOW_ARENA_BYTES,
                nvme_dirs=folder / "nvme",
                nvme_bytes=_SLOW_NVME_BYTES,
                nvme_bytes_per_s_max=_SLOW_BYTES_PER_S,
            )
        )
        transfers = {
            "with": transfer_config(socket_dir=daemon.socket_dir),
            "slow disk": transfer_config(socket_dir=slow.socket_dir),
            "without": None,
        }
        servers = {
            name: stack.enter_context(
                VllmServer(
                    folder / "model", transfer=transfer, flags=_FLAGS, log=folder / f"{name}.log", environ=_ENVIRON
                )
            )
            for name, transfer in transfers.items()
        }
        for server in servers.values():
            server.wait_ready()
        urls = {name: server.url for name, server in servers.items()}
        _warm(urls)
        _await_memory(daemon.socket_dir)
        yield _cold({name: urls[name] for name in ("with", "without")}, settings.repetitions)
        yield from _resumed(urls, settings.repetitions)


def _warm(urls: Mapping[str, str]) -> None:
    for name in urls:
        _drive(urls[name], generated(conversations=1, turns=2, first_words=40, words=10, seed=999), seed=999)


def _await_memory(socket_dir: str) -> None:
    """Wait until the daemon has granted the engine all its memory: making and mapping it takes cores from both."""
    ends_at_s = time.monotonic() + _MEMORY_TIMEOUT_S
    with kv.admin(socket_dir) as admin:
        while sum(namespace.dram_bytes for namespace in admin.stats().namespaces) < 0.9 * _ARENA_BYTES:
            if time.monotonic() > ends_at_s:
                raise RuntimeError(f"the daemon did not grant its memory within {_MEMORY_TIMEOUT_S:.0f} s")
            time.sleep(_POLL_S)


def _cold(urls: Mapping[str, str], repetitions: int) -> Record:
    """Every request is new to both: the one with the adapter looks up in vain and saves everything."""
    rates: dict[str, list[float]] = {name: [] for name in urls}
    for repetition in range(repetitions):
        order = list(urls) if repetition % 2 else list(urls)[::-1]
        for name in order:
            seed = 2 * repetition + (name == "with")
            load = generated(conversations=_COLD_REQUESTS, turns=1, first_words=_COLD_WORDS, words=1, seed=seed)
            report = _drive(urls[name], load, seed=seed)
            tokens = sum(turn.prompt_tokens + turn.answer_tokens for turn in report.turns)
            if sum(turn.reused_tokens for turn in report.turns):
                raise RuntimeError("a cold request was reused: this measures something else")
            rates[name].append(tokens / report.seconds)
        progress(f"  cold: {rates['with'][-1]:.0f} tokens/s with, {rates['without'][-1]:.0f} without")
    with_adapter, without = (statistics.median(rates[name]) for name in ("with", "without"))
    return Record.compared("vllm_cold_overhead", with_adapter, "tokens/s", without)


def _resumed(urls: Mapping[str, str], repetitions: int) -> Iterator[Record]:
    """Conversations by turns, so that each has left the engine's cache when it is resumed."""
    times: dict[str, list[float]] = {name: [] for name in urls}
    reused = dict.fromkeys(urls, 0)
    for repetition in range(max(1, repetitions // 3)):
        seed = 1000 + repetition
        load = generated(conversations=_CONVERSATIONS, turns=_TURNS, first_words=_HISTORY_WORDS, words=20, seed=seed)
        for name in list(urls) if repetition % 2 else list(urls)[::-1]:
            report = _drive(urls[name], load, seed=seed)
            times[name] += [turn.ttft_s for turn in report.resumed]
            reused[name] += sum(turn.reused_tokens for turn in report.resumed)
            progress(f"  {name}:\n{report.table()}")
    if not reused["with"]:
        raise RuntimeError("nothing was reused: this measures something else")
    for figure, name, share in (
        ("vllm_multi_turn_ttft_ratio", "with", 0.5),
        ("vllm_slow_disk_ttft_p50", "slow disk", 0.5),
        ("vllm_slow_disk_ttft_p99", "slow disk", 0.99),
    ):
        ours, without = (percentile(sorted(times[of]), share) for of in (name, "without"))
        yield Record.compared(figure, ours * 1e6, "us", without * 1e6)


def _drive(url: str, conversations: list[list[str]], *, seed: int) -> Report:
    # The pause lets another conversation have the next turn.
    load = Load(conversations, think_s=0.05, answer_tokens=_ANSWER_TOKENS, at_once=1)
    report = drive(Server(url), load, seed=seed)
    if report.failed:
        raise RuntimeError(report.table())
    return report
