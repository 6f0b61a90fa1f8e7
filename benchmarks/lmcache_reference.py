"""lmcache_reference: what LMCache's own server and its own benchmark reach on the GPU of this run.

    python -m benchmarks.lmcache_reference [--logs FOLDER]

One JSON line per figure. LMCache (0.5.6 was tried) is found where this interpreter finds it, or in the folder that
LMCACHE_SITE names, which only its processes see. Its compiled parts from 0.5.4 on were built against a newer torch than
2.11: LMCACHE_SYMBOL then names the library made of lmcache_symbol.cpp. Needs 40 GB of host memory and 10 GiB of GPU.

What differs from its defaults, in its favour: four workers of each kind; memory for all that is stored, pinned at the
start; no two sizes share a prefix; 0.25 s between requests, so that what was stored is readable. Its checksums are
asked for at 2K tokens only: they take it seconds per GiB, and it would be timed while it still computes them.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import Record, Skipped, progress

REQUESTS = 6
LAYERS, HEADS, DIM = 32, 8, 128  # of Llama-3-8B, in bf16
TOKEN_BYTES = LAYERS * 2 * HEADS * DIM * 2
SHAPE = f"(2,4096,16,{HEADS},{DIM}):bfloat16:{LAYERS}"
LOGS = Path("build/lmcache")
DEADLINE_S = 115.0
"""For the start and the three sizes together; stopping the server may take STOP_TIMEOUT_S of `supervised` more."""

_SUPERVISOR = Path(__file__).parent / "supervised.py"
_LAUNCHER = """
import ctypes, os, torch
if library := os.environ.get("LMCACHE_SYMBOL"):
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
from lmcache.cli.main import main
main()
"""
_SERVER = (
    "--host 127.0.0.1 --l1-size-gb 40 --no-l1-use-lazy --eviction-policy LRU --max-gpu-workers 4 --max-cpu-workers 4"
)
_SLOW = ("compiled extension not found", "No compute backend loaded")
_RETRIEVED = re.compile(r"/warm\] RETRIEVE: retrieved \((\d+) tokens")


@dataclass(frozen=True)
class Size:
    """One run of its benchmark: so many tokens in each request, numbered from `first_request` on."""

    label: str
    tokens: int
    first_request: int
    with_checksums: bool = False


# Those that ours is compared with come first, should the time run out.
SIZES = (Size("8k", 8192, 0), Size("32k", 32768, 100), Size("2k", 2048, 200, with_checksums=True))


@dataclass(frozen=True)
class Figures:
    """Medians of one size.

    Attributes:
        lookup_s: a lookup that finds everything, in seconds.
        load_gb_s: retrieving all of it into the GPU, in GB/s (10^9 bytes).
    """

    lookup_s: float
    load_gb_s: float


@dataclass(frozen=True)
class Peer:
    """What ours is compared with.

    Attributes:
        load_gb_s: retrieving 1 GiB into the GPU, in GB/s (10^9 bytes).
        lookup_32k_us: a lookup of 32K tokens, in microseconds.
        source: where the two come from, for who reads the result.
    """

    load_gb_s: float
    lookup_32k_us: float
    source: str


@functools.cache
def peer() -> Peer:
    """LMCache's figures of this run, else those of an earlier one. The first call may take two minutes."""
    figures: dict[str, Figures] = {}
    reason = ""
    try:
        figures.update(measure(LOGS))  # keeps what came before a size that is skipped
    except Skipped as skipped:
        reason = str(skipped)
    if figures.keys() >= {"8k", "32k"}:
        return Peer(figures["8k"].load_gb_s, figures["32k"].lookup_s * 1e6, "LMCache: measured in this run")
    return Peer(33.0, 6400.0, f"LMCache: figures of an earlier run on an H200, because {reason}")


def measure(logs: Path) -> Iterator[tuple[str, Figures]]:
    """The figures by the label of their size, as they come; `logs` is the folder for the processes' messages.

    Raises:
        Skipped: LMCache is not installed, does not come up, runs on its slow fallback, does not find what it stored,
            or takes longer than DEADLINE_S.
    """
    if not _is_installed():
        raise Skipped("lmcache is not installed (LMCACHE_SITE may name a folder that has it)")
    deadline_s = time.monotonic() + DEADLINE_S
    logs.mkdir(parents=True, exist_ok=True)
    with _running_server(logs / "lmcache-server.log", deadline_s) as server:
        for size in SIZES:
            yield size.label, _figures_of(size, server, logs, deadline_s)


@dataclass(frozen=True)
class _Server:
    port: int
    http_port: int
    log: Path


def _is_installed() -> bool:
    site = os.environ.get("LMCACHE_SITE")
    return importlib.util.find_spec("lmcache") is not None if site is None else (Path(site) / "lmcache").is_dir()


def _environment() -> dict[str, str]:
    inherited = os.environ.get("PYTHONPATH", "")
    path = [folder for folder in (os.environ.get("LMCACHE_SITE", ""), inherited) if folder]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "LMCACHE_TRACK_USAGE": "false",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }


@contextmanager
def _running_server(log: Path, deadline_s: float) -> Iterator[_Server]:
    """LMCache's server on free ports; no process of it is left afterwards.

    Raises:
        Skipped: it ends, or is not up at the deadline.
    """
    server = _Server(*_free_ports(), log)
    command = [sys.executable, "-c", _LAUNCHER, "server", *_SERVER.split()]
    command += ["--port", str(server.port), "--http-port", str(server.http_port)]
    with log.open("w", encoding="utf-8") as out:
        # Its input is the pipe that ends it and all its processes, also when this process is killed.
        process = subprocess.Popen(
            [sys.executable, _SUPERVISOR, *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=_environment(),
        )
    try:
        started_s = time.monotonic()
        while not _is_up(server):
            if process.poll() is not None:
                raise Skipped(f"lmcache server ended with {process.returncode}: {_end_of(log)}")
            if time.monotonic() > deadline_s:
                raise Skipped(f"lmcache server is not up after {DEADLINE_S:.0f} s: {_end_of(log)}")
            time.sleep(0.2)
        progress(f"lmcache server is up after {time.monotonic() - started_s:.1f} s")
        yield server
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def _is_up(server: _Server) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/healthcheck", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _figures_of(size: Size, server: _Server, logs: Path, deadline_s: float) -> Figures:
    """Run its benchmark once. Raises Skipped: it fails, is late or slow, or does not find what it stored."""
    log, output = logs / f"lmcache-bench-{size.label}.log", logs / f"lmcache-bench-{size.label}.json"
    url = f"http://127.0.0.1:{server.http_port}" if size.with_checksums else ""
    command = [sys.executable, "-c", _LAUNCHER, "bench", "server", "--rpc-url", f"tcp://127.0.0.1:{server.port}"]
    command += ["--url", url, "--mode", "gpu", "--num-tokens", str(size.tokens), "--kvcache-shape-spec", SHAPE]
    command += ["--start", str(size.first_request), "--end", str(size.first_request + REQUESTS), "--interval", "0.25"]
    command += ["--format", "json", "--output", str(output)]
    output.unlink(missing_ok=True)
    started_s = time.monotonic()
    with log.open("w", encoding="utf-8") as out:
        try:
            ended = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=_environment(),
                timeout=max(deadline_s - started_s, 0.1),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Skipped(f"lmcache bench server, {size.label}, is late: {_end_of(log)}") from None
    if ended.returncode or not output.exists():
        raise Skipped(f"lmcache bench server, {size.label}, ended with {ended.returncode}: {_end_of(log)}")
    for each in (log, server.log):
        text = each.read_text(encoding="utf-8", errors="replace")
        if slow := [sign for sign in _SLOW if sign in text]:
            raise Skipped(f"lmcache runs on its slow fallback ({slow[0]!r} in {each.name})")
    whole = _RETRIEVED.findall(log.read_text(encoding="utf-8", errors="replace")).count(str(size.tokens))
    metrics = json.loads(output.read_text(encoding="utf-8"))["metrics"]
    checked = f", its checksums {_checksums(metrics)}" if size.with_checksums else ""
    progress(f"lmcache {size.label}: {whole}/{REQUESTS} whole{checked}, {time.monotonic() - started_s:.1f} s")
    if whole < REQUESTS:
        raise Skipped(f"lmcache retrieved {whole} of {REQUESTS} requests of {size.label} whole: {_end_of(log)}")
    return Figures(
        lookup_s=metrics["warm_lookup"]["warm_lookup_p50"] / 1e3,
        load_gb_s=size.tokens * TOKEN_BYTES / (metrics["warm_retrieve"]["warm_retrieve_p50"] / 1e3) / 1e9,
    )


def _checksums(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['results']['checksum_ok']} right, {metrics['results']['checksum_fail']} wrong"


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-1500:]


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for bound in (one, other):
            bound.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1]), int(other.getsockname()[1])


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lmcache_reference", description="Measure LMCache.")
    parser.add_argument("--logs", type=Path, default=LOGS, help="default: %(default)s")
    options = parser.parse_args()
    try:
        for label, figures in measure(options.logs):
            print(Record.absolute(f"lmcache_lookup_{label}", figures.lookup_s * 1e6, "us").to_json(), flush=True)
            print(Record.absolute(f"lmcache_gpu_load_{label}", figures.load_gb_s, "GB/s").to_json(), flush=True)
    except Skipped as reason:
        progress(f"lmcache: skipped, {reason}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
