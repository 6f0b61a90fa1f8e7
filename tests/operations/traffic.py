"""traffic: an engine's day in a second: conversations that are saved, resumed, prefetched, forgotten, and missed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import count
from typing import Any

import kvservice_client as kv
from tests.blocks import chain, contents, namespace
from tests.daemons import MIB

BLOCK_BYTES = 64 * 1024
BLOCKS = 12
KNOBS: dict[str, Any] = {
    "dram_bytes": 4 * MIB,
    "dram_segment_bytes": 1 * MIB,
    "nvme_bytes": 24 * MIB,
    "nvme_segment_bytes": 4 * MIB,
    "nvme_write_behind_s": 0.05,
    "gpu_hour_price": 2.5,
}
"""DRAM for five conversations, NVMe for some twenty."""

MODEL = namespace("model", block_size_bytes=BLOCK_BYTES, label="llama-3-8b bf16 tp0")


class Engine:
    """A client with conversations; every turn finds the earlier ones, or says what it missed."""

    def __init__(self, socket_dir: str, name: str = "vllm-0") -> None:
        self.client = kv.attach(MODEL, socket_dir=socket_dir, instance_name=name)
        assert self.client.attached, self.client.status
        self._buffer = bytearray(BLOCKS * BLOCK_BYTES)
        self._front = ""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()

    def save(self, conversation: str) -> int:
        """Save all blocks of a conversation; how many were new."""
        hashes = chain(conversation, BLOCKS)
        return int(self.client.save(hashes, contents(hashes, BLOCK_BYTES)).saved)

    def resume(self, conversation: str) -> int:
        """Load what is held of it; how many blocks."""
        return int(self.client.load(chain(conversation, BLOCKS), self._buffer).blocks)

    def prefetch(self, conversation: str) -> None:
        """What a scheduler does ahead of a request."""
        self.client.prefetch(chain(conversation, BLOCKS))

    def wait_for_turn(self, conversations: Sequence[str]) -> str:
        """These wait now, the next first; the one that waited longest before starts, and is returned."""
        waiting = [kv.WaitingRequest(f"request {name}", chain(name, BLOCKS), session_id=name) for name in conversations]
        started = self._front
        self._front = conversations[0]
        self.client.update_queue(waiting, started=[f"request {started}"] if started else [])
        return started or conversations[0]


def conversations(engine: Engine, *, count: int, name: str = "chat") -> None:
    """Save more conversations than DRAM holds, resume each, and ask for one that nobody saved."""
    for number in range(count):
        engine.save(f"{name} {number}")
    for number in range(count):
        engine.resume(f"{name} {number}")
    engine.resume(f"{name} unknown")


def endless(engine: Engine, stop: threading.Event, name: str = "turn") -> None:
    """New conversations all the time; older ones resume, from DRAM, from NVMe, after a prefetch, or not at all."""
    for number in count():
        turns = [f"{name} {number - behind}" for behind in (10, 9, 8)]
        started = engine.wait_for_turn(turns)
        engine.save(f"{name} {number}")
        engine.resume(f"{name} {number}")
        engine.prefetch(f"{name} {number - 12}")
        engine.resume(started)
        engine.resume(f"{name} unknown {number}")
        if stop.wait(0.05):
            return
