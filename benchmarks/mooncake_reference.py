"""mooncake_reference: saving and loading against Mooncake's store over TCP loopback, batched and zero-copy.

Three processes, as on a node without RDMA: the master, an owner of the memory, and a user with registered private
buffers that calls batch_put_from and batch_get_into. (When the user owns the memory itself, Mooncake copies inside one
process and the store dies with the engine: another thing, not compared.) Connection pooling with two lanes is on: of
the settings tried (slice sizes of 64 KiB, 1 and 4 MiB, pooling, one or two lanes) it was the fastest by a little.

The package pins nothing of ours but is large, so it may live in an environment of its own: build/bench-venv, made by
scripts/install_bench_references.sh.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.measuring import Record, Skipped, progress
from benchmarks.settings import Settings
from benchmarks.versus import Opponent, Shape, compare

_ROOT = Path(__file__).resolve().parents[1]
_ENVIRONMENT = _ROOT / "build" / "bench-venv" / "bin" / "python"
_INSTALL = "scripts/install_bench_references.sh installs it"
_STOP_TIMEOUT_S = 20.0
_OWNED_BYTES = 2 << 30


def measure(settings: Settings) -> Iterator[Record]:
    """vs_mooncake_get_* and vs_mooncake_put_*.

    Raises:
        Skipped: Mooncake is not installed, or its system libraries are not.
    """
    python, package = _installation()
    with _running_store(python, package) as master:

        @contextmanager
        def opponent_with(shape: Shape) -> Iterator[Opponent]:
            arguments = ["user", master, str(shape.block_size_bytes), str(shape.blocks), str(settings.repetitions)]
            with _worker(python, arguments) as user:
                yield MooncakeOpponent(user)

        yield from compare("mooncake", opponent_with, settings)


class MooncakeOpponent:
    """Batches of values in Mooncake, moved by a process that has its package."""

    def __init__(self, user: subprocess.Popen[str]) -> None:
        self._user = user

    def put(self, repetition: int) -> float:
        return self._seconds_of("put", repetition)

    def get(self, repetition: int) -> float:
        return self._seconds_of("get", repetition)

    def _seconds_of(self, verb: str, repetition: int) -> float:
        assert self._user.stdin is not None
        self._user.stdin.write(f"{verb} {repetition}\n")
        self._user.stdin.flush()
        return float(_answer(self._user)["elapsed_s"])


def _installation() -> tuple[Path, Path]:
    """The interpreter that can import Mooncake, and the package's folder."""
    problem = f"mooncake-transfer-engine-non-cuda is not installed ({_INSTALL})"
    for python in (Path(sys.executable), _ENVIRONMENT):
        if not python.exists():
            continue
        found = subprocess.run(
            [python, "-c", "import mooncake.store; print(mooncake.store.__file__)"],
            capture_output=True,
            text=True,
            check=False,
        )
        if found.returncode == 0:
            return python, Path(found.stdout.strip().splitlines()[-1]).parent
        last_line = (found.stderr.strip().splitlines() or [""])[-1]
        if "No module named 'mooncake'" not in last_line:
            problem = f"Mooncake cannot be imported: {last_line} ({_INSTALL})"
    raise Skipped(problem)


@contextmanager
def _running_store(python: Path, package: Path) -> Iterator[str]:
    """A master and an owner of memory; yields the master's address."""
    master_port, metrics_port = _free_ports(2)
    flags = ["-rpc_address", "127.0.0.1", "-rpc_port", str(master_port)]
    flags += ["-metrics_host", "127.0.0.1", "-metrics_port", str(metrics_port)]
    master = subprocess.Popen(
        [package / "mooncake_master", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        env=_environment(),
    )
    try:
        address = f"127.0.0.1:{master_port}"
        with _worker(python, ["owner", address, str(_OWNED_BYTES)]):
            yield address
    finally:
        master.terminate()
        _await_end(master)


@contextmanager
def _worker(python: Path, arguments: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process of benchmarks.mooncake_worker that has said that it is ready; it ends when its stdin does."""
    # Mooncake writes a page of messages per process; they matter only where something went wrong.
    with tempfile.TemporaryFile("w+") as messages:
        process = subprocess.Popen(
            [python, "-m", "benchmarks.mooncake_worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            cwd=_ROOT,
            env=_environment(),
        )
        try:
            _answer(process)
            yield process
        except BaseException:
            messages.seek(0)
            progress(messages.read())
            raise
        finally:
            assert process.stdin is not None
            process.stdin.close()
            _await_end(process)


def _answer(process: subprocess.Popen[str]) -> dict[str, float]:
    """The next line that the worker itself wrote; Mooncake's own lines are passed over."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            answer: dict[str, float] = json.loads(line)
            return answer
    raise RuntimeError("a Mooncake worker ended; its messages are above")


def _await_end(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _environment() -> dict[str, str]:
    return {**os.environ, "MC_TCP_ENABLE_CONNECTION_POOL": "1", "MC_TCP_LANES_PER_PEER": "2"}


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for bound in sockets:
            bound.bind(("127.0.0.1", 0))
        return [int(bound.getsockname()[1]) for bound in sockets]
