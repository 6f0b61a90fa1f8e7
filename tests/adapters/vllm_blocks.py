"""vllm_blocks: the vLLM adapter's loads and saves over blocks in the memory of a GPU of host memory."""

from __future__ import annotations

from collections.abc import Sequence

import kvservice_client as kv
from kvservice_adapters.vllm.blocks import BlockMemory
from kvservice_adapters.vllm.counters import Counters
from kvservice_adapters.vllm.layout import KVLayout
from kvservice_adapters.vllm.orders import LoadOrder, SaveOrder
from kvservice_adapters.vllm.transfers import Loads, Saves
from tests.blocks import chain, namespace
from tests.daemons import DaemonThread
from tests.waiting import eventually


def attached(daemon: DaemonThread, layout: KVLayout, tokens: int) -> kv.Client:
    """A client for blocks of that layout."""
    return kv.attach(
        namespace(block_size_bytes=layout.block_size_bytes, tokens_per_block=tokens), socket_dir=daemon.socket_dir
    )


class Transfers:
    """What the worker's half makes of a memory.

    Attributes:
        failed: blocks that loads did not fill.
    """

    def __init__(
        self, client: kv.Client, memory: BlockMemory, *, save_threads: int = 1, load_timeout_s: float = 5.0
    ) -> None:
        self.client = client
        self.memory = memory
        self.counters = Counters()
        self.saves = Saves(memory, self.counters, threads=save_threads, waiting_max=4, timeout_s=5.0)
        self.loads = Loads(memory, self.counters, threads=2, timeout_s=load_timeout_s)
        self.failed: set[int] = set()

    def order_save(self, name: str, block_ids: Sequence[int], *, first: int = 0, session_id: str = "") -> None:
        """Of the chain of that name, from place `first` on."""
        hashes = tuple(chain(name, len(block_ids), start=first))
        self.saves.order([SaveOrder(name, session_id, hashes, first, tuple(block_ids))])

    def save(self, name: str, block_ids: Sequence[int], *, session_id: str = "") -> None:
        """Order it and wait for its end."""
        self.order_save(name, block_ids, session_id=session_id)
        self.wait_held(name, len(block_ids))

    def wait_held(self, name: str, blocks: int) -> None:
        eventually(lambda: self.client.lookup(chain(name, blocks)).blocks == blocks)

    def order_load(self, name: str, first: int, block_ids: Sequence[int], *, session_id: str = "") -> None:
        """Into these blocks what the chain of that name has from place `first` on; of a truncated session if named."""
        hashes = tuple(chain(name, first + len(block_ids)))
        self.loads.order(LoadOrder(name, session_id, hashes, first, tuple(block_ids), is_truncated=bool(session_id)))

    def load(self, name: str, first: int, block_ids: Sequence[int], *, session_id: str = "") -> None:
        """Order it and wait for its end."""
        self.order_load(name, first, block_ids, session_id=session_id)
        eventually(lambda: self.is_over(name))

    def is_over(self, name: str) -> bool:
        ended = self.loads.ended()
        self.failed |= ended.failed_block_ids
        return name in ended.request_ids

    def close(self) -> None:
        self.saves.stop()
        self.loads.stop()
        self.memory.close()
        self.client.close()
