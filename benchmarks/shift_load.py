"""shift_load: what turning the keys of a truncated session costs the vLLM adapter's loads, on the processor.

The reference is the adapter's load of as many blocks, from the same daemon's memory into the same tensors, whose tokens
stand where they stood. Ours loads them under a truncated session's names, and turns every key. Tensors, blocks and the
order of keys in them are those of vLLM's CPU backend for an 8B model in bfloat16; torch uses one thread, as there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter, sleep

import torch

import kvservice_client as kv
from benchmarks.daemon import HASH_SIZE_BYTES, await_memory, running_daemon, settle
from benchmarks.measuring import Record, WrongBytes, take_turns
from benchmarks.settings import MIB, Settings
from kvservice_adapters.positions import Rope, moved
from kvservice_adapters.vllm.blocks import HostBlocks, HostCopies
from kvservice_adapters.vllm.counters import Counters
from kvservice_adapters.vllm.keys import KeyTurner, packed_keys
from kvservice_adapters.vllm.layout import layout_of
from kvservice_adapters.vllm.orders import LoadOrder
from kvservice_adapters.vllm.transfers import Loads
from kvservice_client.memory import ThreadedCopier

_LAYERS, _HEADS, _TOKENS, _DIM = 32, 8, 32, 128
_BLOCK_BYTES = _LAYERS * _HEADS * _TOKENS * 2 * _DIM * 2
_DROPPED = 8
_SESSION = "truncated"
_ROPE = Rope(tuple(500_000.0 ** (-2 * pair / _DIM) for pair in range(_DIM // 2)))
_POLL_S = 0.0005


def measure(settings: Settings) -> Iterator[Record]:
    """shift_load_ratio_cpu: GB/s of loads that turn every key, over GB/s of loads that turn none."""
    blocks = settings.shm_blocks // 4
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _engine(blocks) as engine:
            turns = take_turns(
                reference=lambda repetition: engine.loaded(engine.plain, is_truncated=False),
                ours=lambda repetition: engine.loaded(engine.truncated, is_truncated=True),
                repetitions=settings.repetitions,
                title="shift_load",
            )
            engine.check()
    finally:
        torch.set_num_threads(threads)
    yield turns.throughput("shift_load_ratio_cpu", blocks * _BLOCK_BYTES, ours="load", reference="load")


class _Engine:
    """Tensors like an engine's, and loads into their first blocks."""

    def __init__(self, client: kv.Client, blocks: int) -> None:
        self._client = client
        self._blocks = blocks
        chain = _chain("a conversation", blocks + _DROPPED)
        self.plain = chain[_DROPPED:]
        self.truncated = _chain("what is left of it", blocks)
        self._whole = chain
        self._tensors = torch.zeros((_LAYERS, blocks, _HEADS, _TOKENS, 2 * _DIM), dtype=torch.bfloat16)
        caches = {f"layer {number}": tensor for number, tensor in enumerate(self._tensors)}
        self._copier = ThreadedCopier(threads=2)
        places = torch.arange(_DIM) * _TOKENS + torch.arange(_TOKENS)[:, None]
        turner = KeyTurner(
            _ROPE,
            {number: packed_keys(tensor, places) for number, tensor in enumerate(self._tensors)},
            torch.device("cpu"),
            kernel_blocks=1,
            kernel_tokens=_TOKENS,
        )
        memory = HostBlocks(client, HostCopies(layout_of(caches, blocks=blocks), self._copier), keys=turner)
        self._loads = Loads(memory, Counters(), threads=1, timeout_s=60.0)
        self._saved = torch.randn((blocks, *self._tensors[:, 0].shape), generator=torch.Generator().manual_seed(0)).to(
            torch.bfloat16
        )

    def fill(self) -> None:
        """Save the conversation, and name what stays of it."""
        dropped = torch.zeros((_DROPPED, *self._saved[0].shape), dtype=torch.bfloat16)
        saved = self._client.save(self._whole, torch.cat((dropped, self._saved)), session_id=_SESSION)
        keep = [(_DROPPED * _TOKENS, len(self._whole) * _TOKENS)]
        named = self._client.truncate(_SESSION, self.truncated, source=self._whole, keep=keep)
        if (saved.saved, named.held_blocks) != (len(self._whole), self._blocks):
            raise WrongBytes(f"saved {saved.saved} blocks, named {named.held_blocks}")
        settle(self._client, self._whole[-1])

    def loaded(self, hashes: Sequence[bytes], *, is_truncated: bool) -> Mapping[str, float]:
        """Seconds of one load of all blocks; raises WrongBytes: it was not whole."""
        self._tensors.zero_()
        chain = hashes if is_truncated else self._whole
        ids = tuple(range(self._blocks))
        started_s = perf_counter()
        self._loads.order(LoadOrder("r", _SESSION, tuple(chain), len(chain) - self._blocks, ids, is_truncated))
        while not (ended := self._loads.ended()).request_ids:
            sleep(_POLL_S)
        elapsed_s = perf_counter() - started_s
        if ended.failed_block_ids:
            raise WrongBytes(f"{len(ended.failed_block_ids)} of {self._blocks} blocks did not come")
        return {"load": elapsed_s}

    def check(self) -> None:
        """Compare every key and value of a load of either kind. Raises WrongBytes."""
        shift = _DROPPED * _TOKENS
        for hashes, is_truncated in ((self.plain, False), (self.truncated, True)):
            self.loaded(hashes, is_truncated=is_truncated)
            for block, expected in enumerate(self._saved):
                found = self._tensors[:, block].reshape(_LAYERS, _HEADS, 2, -1)
                expected = expected.view(_LAYERS, _HEADS, 2, -1)  # noqa: PLW2901  # the same, seen as halves
                keys = expected[:, :, 0].view(_LAYERS, _HEADS, _DIM, _TOKENS).mT
                if is_truncated:
                    now_at = block * _TOKENS + torch.arange(_TOKENS)
                    keys = moved(keys, _ROPE, computed_at=now_at + shift, now_at=now_at)
                are_right = torch.equal(found[:, :, 0], keys.mT.reshape(_LAYERS, _HEADS, -1))
                if not are_right or not torch.equal(found[:, :, 1], expected[:, :, 1]):
                    raise WrongBytes(f"block {block} is not what was saved")

    def close(self) -> None:
        """End the threads."""
        self._loads.stop()
        self._copier.close()


@contextmanager
def _engine(blocks: int) -> Iterator[_Engine]:
    dram_bytes = (blocks + 2 * _DROPPED) * _BLOCK_BYTES
    namespace = kv.Namespace(
        fingerprint=hashlib.sha256(b"shift_load").digest(),
        label="shift_load",
        block_size_bytes=_BLOCK_BYTES,
        tokens_per_block=_TOKENS,
        hash_size_bytes=HASH_SIZE_BYTES,
    )
    with (
        running_daemon(dram_bytes=max(dram_bytes, 256 * MIB)) as daemon,
        kv.attach(namespace, socket_dir=daemon.socket_dir, instance_name="benchmarks") as client,
    ):
        await_memory(client, dram_bytes - _BLOCK_BYTES)
        engine = _Engine(client, blocks)
        try:
            engine.fill()
            yield engine
        finally:
            engine.close()


def _chain(name: str, blocks: int) -> list[bytes]:
    hashes = [hashlib.sha256(name.encode()).digest()]
    while len(hashes) < blocks:
        hashes.append(hashlib.sha256(hashes[-1]).digest())
    return hashes
