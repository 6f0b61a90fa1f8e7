"""worker: the half beside the model: one per rank, it owns the rank's namespace and moves its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import kvservice_client as kv
from kvservice_adapters.positions import UnsupportedPositions
from kvservice_adapters.vllm.blocks import BlockMemory, Fence, HostBlocks, HostCopies
from kvservice_adapters.vllm.counters import Counters
from kvservice_adapters.vllm.hashing import namespace_of
from kvservice_adapters.vllm.keys import KeyTurner
from kvservice_adapters.vllm.layout import KVLayout, layout_of
from kvservice_adapters.vllm.messages import StepOrders
from kvservice_adapters.vllm.options import AdapterOptions
from kvservice_adapters.vllm.positions import key_turner_of
from kvservice_adapters.vllm.status import LOG, StatusLog
from kvservice_adapters.vllm.transfers import Loads, Saves
from kvservice_client.memory import ThreadedCopier


class WorkerHalf:
    """Made when the engine's KV tensors are there. All calls come from the engine's thread."""

    def __init__(
        self,
        options: AdapterOptions,
        vllm_config: Any,
        kv_cache_config: Any,
        kv_caches: Mapping[str, torch.Tensor],
        *,
        rank: Mapping[str, int],
    ) -> None:
        """Find the blocks, name them, attach.

        Raises:
            UnsupportedLayout, UnsupportedModel: the message says why.
            KVServiceError: the daemon refuses this engine.
        """
        layout = layout_of(kv_caches, blocks=kv_cache_config.num_blocks)
        self.namespace = namespace_of(
            vllm_config,
            kv_cache_config,
            layout,
            rank=rank,
            salt=options.salt,
            weights=options.weights_identity,
        )
        self.counters = Counters()
        self.truncation_refusal = ""
        keys = None
        try:
            keys = key_turner_of(vllm_config, kv_caches, blocks=kv_cache_config.num_blocks)
        except UnsupportedPositions as refusal:
            self.truncation_refusal = str(refusal)
        except Exception as error:  # noqa: BLE001  # a model of a kind that nobody thought of: the rest works for it
            self.truncation_refusal = f"its positions could not be found out: {type(error).__name__}: {error}"
        if self.truncation_refusal:
            LOG.info("kvservice worker: truncated conversations are computed again: %s", self.truncation_refusal)
        self._client = kv.attach(
            self.namespace,
            socket_dir=options.socket_dir or None,
            instance_name=f"vllm worker {' '.join(f'{name}{at}' for name, at in rank.items())}",
            attach_timeout_s=options.attach_wait_s,
            copy_threads=1,
        )
        self._status = StatusLog("worker", self._client)
        self._copier = ThreadedCopier(threads=options.copy_threads)
        try:
            self._memory = self._memory_of(layout, keys, buffer_bytes=options.gpu_buffer_mib << 20)
        except BaseException:
            self._client.close()
            self._copier.close()
            raise
        self._loads = Loads(self._memory, self.counters, threads=options.load_threads, timeout_s=options.load_timeout_s)
        self._saves = Saves(
            self._memory,
            self.counters,
            threads=options.save_threads,
            waiting_max=options.saves_waiting_max,
            timeout_s=options.save_timeout_s,
        )
        self._before_loads: Fence | None = None
        self._retained: set[str] = set()
        self._failed_block_ids: set[int] = set()

    def before_step(self, orders: StepOrders) -> None:
        """Blocks of released requests are about to be overwritten."""
        # A step that is under way may still write into blocks that it lost; the one that begins has no more of them.
        self._before_loads = self._memory.fence() if orders.loads else None
        self._saves.stop_reading(orders.released)
        self._status.look()

    def start_loads(self, orders: StepOrders) -> None:
        """Begin this step's loads."""
        if orders.loads:
            before, self._before_loads = self._before_loads, None
            after = before or self._memory.fence()
            for order in orders.loads:
                self._loads.order(order, after)

    def give_up_loads(self, orders: StepOrders) -> None:
        """Something went wrong: end what was not begun, because the engine waits for the end of everything ordered."""
        self._loads.give_up(orders.loads)

    def start_saves(self, orders: StepOrders) -> None:
        """The step was launched: save what it fills."""
        if orders.saves:
            self._saves.order(orders.saves)

    def take_saved(self, orders: StepOrders) -> set[str]:
        """Finished requests whose blocks the engine kept and may free now."""
        self._retained.update(orders.retained)
        done = self._saves.take_done(self._retained)
        self._retained -= done
        return done

    def take_loaded(self) -> set[str]:
        """Requests whose load has ended, filled or not; see `take_failed_blocks`."""
        ended = self._loads.ended()
        self._failed_block_ids |= ended.failed_block_ids
        return ended.request_ids

    def take_failed_blocks(self) -> set[int]:
        """The engine's blocks that the loads taken last did not fill."""
        failed, self._failed_block_ids = self._failed_block_ids, set()
        return failed

    def close(self) -> None:
        """Save what waits, end what loads, detach."""
        self._saves.stop()
        self._loads.stop()
        self._memory.close()
        self._client.close()
        self._copier.close()

    def _memory_of(self, layout: KVLayout, keys: KeyTurner | None, *, buffer_bytes: int) -> BlockMemory:
        if layout.device.type == "cpu":
            return HostBlocks(self._client, HostCopies(layout, self._copier), keys=keys)
        from kvservice_adapters.vllm.gpu_blocks import gpu_blocks  # noqa: PLC0415  # brings Triton and numpy

        memory, plane = gpu_blocks(self._client, layout, keys, buffer_bytes=buffer_bytes)
        LOG.info("kvservice worker: blocks go through %s", plane)
        return memory
