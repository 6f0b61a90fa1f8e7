"""daemon: the real daemon in a process of its own, and a client of it in this one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import monotonic, sleep

import kvservice_client as kv
from kvservice_proto.v1 import kvservice_pb2 as pb

HASH_SIZE_BYTES = 32
_STOP_TIMEOUT_S = 30.0
_BACKGROUND_TIMEOUT_S = 120.0
_PAUSE_S = 0.002


@dataclass(frozen=True, slots=True)
class Daemon:
    """A running daemon.

    Attributes:
        process_id: its process, for /proc.
        socket_dir: where clients find it.
    """

    process_id: int
    socket_dir: str


@contextmanager
def running_daemon(*, dram_bytes: int, **knobs: object) -> Iterator[Daemon]:
    """`kvservice serve` with that much memory for blocks, ready to serve; stopped by SIGTERM at the end.

    A namespace gets all of that memory soon after it is attached, where the default would grant it in steps.

    Args:
        dram_bytes: the arena.
        knobs: further knobs by name; the directories of the NVMe tier, say.

    Raises:
        RuntimeError: it ended before it was ready; the message is its log.
    """
    knobs = {"dram_bytes": dram_bytes, "dram_grow_ahead_bytes": dram_bytes, "http_port": 0, **knobs}
    flags = [text for name, value in knobs.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    with tempfile.TemporaryDirectory(prefix="kvservice-bench-") as directory:
        socket_dir = str(Path(directory) / "sockets")
        process = subprocess.Popen(
            [sys.executable, "-m", "kvservice", "serve", "--socket-dir", socket_dir, *flags],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _await_ready(process)
            yield Daemon(process.pid, socket_dir)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def attach(daemon: Daemon, label: str, *, block_size_bytes: int) -> kv.Client:
    """A client of this process, attached to a namespace of that label and block size."""
    namespace = kv.Namespace(
        fingerprint=sha256(label.encode()).digest(),
        label=label,
        block_size_bytes=block_size_bytes,
        tokens_per_block=16,
        hash_size_bytes=HASH_SIZE_BYTES,
    )
    return kv.attach(namespace, socket_dir=daemon.socket_dir, instance_name="benchmarks")


@contextmanager
def attached(label: str, *, block_size_bytes: int, dram_bytes: int) -> Iterator[kv.Client]:
    """A client whose daemon does nothing else and has granted it all of that memory."""
    with running_daemon(dram_bytes=dram_bytes) as daemon:
        client = attach(daemon, label, block_size_bytes=block_size_bytes)
        try:
            # The last segment may be left out: memory is granted in whole slots.
            await_memory(client, dram_bytes - block_size_bytes)
            yield client
        finally:
            client.close()


def await_memory(client: kv.Client, size_bytes: int) -> None:
    """Wait until the daemon has granted the client's namespace that much memory.

    Raises:
        RuntimeError: that did not happen within two minutes.
    """
    _await(lambda: dram_bytes_of(client) >= size_bytes, f"grant {size_bytes} bytes")


def dram_bytes_of(client: kv.Client) -> int:
    """The memory that the daemon has granted to its only namespace."""
    return sum(namespace.dram_bytes for namespace in client.stats().namespaces)


def settle(client: kv.Client, last_hash: bytes) -> None:
    """Wait until the daemon has checksummed the block committed last, so that nothing works in the background.

    Raises:
        RuntimeError: that did not happen within two minutes.
    """
    _await(
        lambda: any(found.held.checksummed for found in client.explain(last_hash)),
        "checksum what was committed",
    )


def await_durable(client: kv.Client, last_hash: bytes) -> None:
    """Wait until a chain is on NVMe, of which this is the last block.

    Raises:
        RuntimeError: that did not happen within two minutes.
    """
    _await(
        lambda: any(pb.TIER_NVME in found.held.tiers for found in client.explain(last_hash)), "make the chain durable"
    )


def _await(is_done: Callable[[], bool], what: str) -> None:
    deadline_s = monotonic() + _BACKGROUND_TIMEOUT_S
    while not is_done():
        if monotonic() > deadline_s:
            raise RuntimeError(f"the daemon did not {what} within {_BACKGROUND_TIMEOUT_S:.0f} s")
        # The contract has no event for this; asking without a pause would take the core from what is waited for.
        sleep(_PAUSE_S)


def _await_ready(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if _event_of(line) == "ready":
            # A full pipe would stop the daemon at its next log line.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return
    raise RuntimeError(f"the daemon ended with status {process.wait()} before it was ready:\n{''.join(seen)}")


def _event_of(line: str) -> str:
    try:
        return str(json.loads(line).get("event", ""))
    except (json.JSONDecodeError, AttributeError):
        return ""
