"""connector: vLLM's side: the hooks that it calls, each of which fails open.

Loaded by name: "kv_connector": "KVServiceConnector", "kv_connector_module_path": "kvservice_adapters.vllm.connector".
vLLM makes two of these: one in the scheduler's process and one in every worker's, possibly the same process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA

from kvservice_adapters.vllm.counters import Counters
from kvservice_adapters.vllm.hashing import BlockNames
from kvservice_adapters.vllm.messages import StepOrders, WorkerNamespace
from kvservice_adapters.vllm.metrics import AdapterPromMetrics, AdapterStats
from kvservice_adapters.vllm.options import AdapterOptions
from kvservice_adapters.vllm.scheduler import SchedulerHalf
from kvservice_adapters.vllm.status import LOG
from kvservice_adapters.vllm.support import require_supported_engine, require_supported_model, tokens_per_block_of
from kvservice_adapters.vllm.worker import WorkerHalf

Answer = TypeVar("Answer")


class KVServiceConnector(KVConnectorBase_V1, SupportsHMA):
    """Keeps the engine's full KV blocks in the node's kvservice daemon, and loads them instead of computing them."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Check what can be checked.

        Raises:
            UnsupportedEngine, ValueError: the engine's settings have to be changed; the message says which. Whatever
                else is wrong costs the reuse only.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        require_supported_engine(vllm_config)
        self._options = AdapterOptions.from_extra_config(self._kv_transfer_config.kv_connector_extra_config)
        self._counters = Counters()
        self._errors_told: set[tuple[str, str]] = set()
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role is KVConnectorRole.SCHEDULER:
            self._attempt("start", self._start_scheduler, otherwise=None)

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a miss later, nothing else."""
        return False

    # ------------------------------------------------------------------ start

    def _start_scheduler(self) -> None:
        config, cache = self._vllm_config, self._kv_cache_config
        require_supported_model(config, cache)
        tokens_per_block = tokens_per_block_of(cache)
        names = BlockNames(tokens_per_block=tokens_per_block, tokens_per_hash=cache.hash_block_size or tokens_per_block)
        self._scheduler = SchedulerHalf(
            self._options,
            names,
            tokens_per_block=tokens_per_block,
            by_priority=config.scheduler_config.policy == "priority",
            loads=self._kv_transfer_config.is_kv_consumer,
            saves=self._kv_transfer_config.is_kv_producer,
        )

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[tuple[int, int], WorkerNamespace]) -> None:
        """The ranks' namespaces; without one of every rank nothing can be looked up."""
        parallel = self._vllm_config.parallel_config
        ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        scheduler = self._scheduler
        if scheduler is not None and len(metadata) == ranks:
            ranks_metadata = [metadata[place] for place in sorted(metadata)]
            namespaces = [rank.namespace for rank in ranks_metadata]
            refusal = next((rank.truncation_refusal for rank in ranks_metadata if rank.truncation_refusal), "")
            self._attempt("attach", lambda: scheduler.attach(namespaces, truncation_refusal=refusal), otherwise=None)

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The worker's tensors are there: begin."""
        self._attempt("start", lambda: self._start_worker(kv_caches), otherwise=None)

    def _start_worker(self, kv_caches: dict[str, torch.Tensor]) -> None:
        require_supported_model(self._vllm_config, self._kv_cache_config)
        self._worker = WorkerHalf(self._options, self._vllm_config, self._kv_cache_config, kv_caches, rank=_rank())

    def get_handshake_metadata(self) -> WorkerNamespace | None:
        """This rank's namespace, for the scheduler's half."""
        worker = self._worker
        return None if worker is None else WorkerNamespace(worker.namespace, worker.truncation_refusal)

    # -------------------------------------------------------- the scheduler's

    def on_new_request(self, request: Any) -> None:
        """See SchedulerHalf."""
        half = self._scheduler
        if half is not None:
            self._attempt("on_new_request", lambda: half.on_new_request(request), otherwise=None)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See SchedulerHalf.matched_tokens."""
        half = self._scheduler
        if half is None:
            return 0, False
        nothing: tuple[int | None, bool] = (0, False)
        return self._attempt(
            "get_num_new_matched_tokens",
            lambda: half.matched_tokens(request, num_computed_tokens),
            otherwise=nothing,
        )

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """See SchedulerHalf.blocks_allocated."""
        half = self._scheduler
        if half is None or num_external_tokens == 0:
            return
        block_ids = blocks.get_block_ids()[0]

        def allocated() -> bool:
            half.blocks_allocated(request, block_ids, num_external_tokens)
            return True

        if not self._attempt("update_state_after_alloc", allocated, otherwise=False):
            half.abandon_load(request.request_id, block_ids)

    def build_connector_meta(self, scheduler_output: Any) -> StepOrders:
        """The step's orders; a plan that fails costs its saves, never a load or a promise."""
        half = self._scheduler
        if half is None:
            return StepOrders()
        orders = half.take_orders(
            preempted=scheduler_output.preempted_req_ids or (), finished=scheduler_output.finished_req_ids
        )
        self._attempt("build_connector_meta", lambda: half.plan_saves(orders, scheduler_output), otherwise=None)
        self._attempt("build_connector_meta", lambda: half.step_began(scheduler_output), otherwise=None)
        return orders

    def update_connector_output(self, connector_output: Any) -> None:
        """Which loads have ended, and how."""
        half = self._scheduler
        if half is not None:
            finished, failed = connector_output.finished_recving or (), connector_output.invalid_block_ids
            self._attempt("update_connector_output", half.step_ended, otherwise=None)
            self._attempt("update_connector_output", lambda: half.loads_ended(finished, failed), otherwise=None)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """(whether the engine keeps the blocks until they are saved, what the answer says of a truncation)."""
        half = self._scheduler
        if half is None:
            return False, None
        nothing: dict[str, Any] | None = None
        told = self._attempt("truncation_told", lambda: half.truncation_told(request), otherwise=nothing)
        is_kept = self._attempt("request_finished", lambda: half.request_finished(request), otherwise=False)
        return is_kept, None if told is None else {"truncation": told}

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The same, for an engine without the hybrid memory allocator."""
        return self.request_finished_all_groups(request, (block_ids,))

    def reset_cache(self) -> bool | None:
        """Drop what is stored: somebody says that it is not valid any more (new weights, say). Blocks."""
        half = self._scheduler
        return None if half is None else self._attempt("reset_cache", half.forget_all, otherwise=False)

    # ----------------------------------------------------------- the worker's

    def handle_preemptions(self, kv_connector_metadata: StepOrders) -> None:
        """See WorkerHalf.before_step."""
        half = self._worker
        if half is not None:
            self._attempt("handle_preemptions", lambda: half.before_step(kv_connector_metadata), otherwise=None)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin the step's loads."""
        half, orders = self._worker, self._orders()
        if half is None:
            return

        def started() -> bool:
            half.start_loads(orders)
            return True

        if not self._attempt("start_load_kv", started, otherwise=False):
            half.give_up_loads(orders)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads come between steps: nothing to wait for."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are saved whole, after the step: nothing to do here."""

    def wait_for_save(self) -> None:
        """The step was launched: begin its saves. Does not wait: the engine keeps the blocks."""
        half = self._worker
        if half is not None:
            self._attempt("wait_for_save", lambda: half.start_saves(self._orders()), otherwise=None)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """(requests whose blocks may be freed, requests whose load has ended)."""
        half = self._worker
        if half is None:
            return None, None
        orders = self._orders()
        retained = set(orders.retained)
        saved = self._attempt("get_finished", lambda: half.take_saved(orders), otherwise=retained)
        return saved, half.take_loaded()

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of the loads reported last that have to be computed."""
        return set() if self._worker is None else self._worker.take_failed_blocks()

    # --------------------------------------------------------------- both

    def get_kv_connector_stats(self) -> AdapterStats | None:
        """What was counted since the last call."""
        stats = AdapterStats(self._counters.take())
        half = self._scheduler or self._worker
        if half is not None:
            stats.aggregate(AdapterStats(half.counters.take()))
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> AdapterStats:
        """Stats that crossed a process boundary as a plain mapping."""
        return AdapterStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> AdapterPromMetrics:
        """The series of vLLM's /metrics page."""
        return AdapterPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Detach."""
        for half in (self._scheduler, self._worker):
            if half is not None:
                self._attempt("shutdown", half.close, otherwise=None)

    # ---------------------------------------------------------- privately

    def _orders(self) -> StepOrders:
        orders = self._connector_metadata
        return orders if isinstance(orders, StepOrders) else StepOrders()

    def _attempt(self, hook: str, run: Callable[[], Answer], *, otherwise: Answer) -> Answer:
        """Run a hook's work; an exception that left it would end the engine, so it is counted and told once."""
        try:
            return run()
        except Exception as error:  # noqa: BLE001  # see above
            kind = type(error).__name__
            self._counters.add("hook_errors", reason=kind)
            if (hook, kind) not in self._errors_told:
                self._errors_told.add((hook, kind))
                LOG.warning("kvservice: %s failed, the engine goes on without reuse here: %s", hook, error)
                LOG.debug("kvservice: %s", hook, exc_info=True)
            return otherwise


def _rank() -> dict[str, int]:
    from vllm.distributed import get_pp_group, get_tp_group  # noqa: PLC0415  # there only where workers are

    tensor, pipeline = get_tp_group(), get_pp_group()
    return {
        "tp": tensor.rank_in_group,
        "tp_size": tensor.world_size,
        "pp": pipeline.rank_in_group,
        "pp_size": pipeline.world_size,
    }
