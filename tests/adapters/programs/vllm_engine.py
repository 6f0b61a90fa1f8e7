"""A real vLLM in this process: reads commands from its input, one JSON object a line, answers each on its output.

Run by the interpreter of vLLM's own environment (scripts/install_vllm.sh), so it imports nothing of the tests. vLLM
writes to its standard output as it likes; the answers therefore leave through a descriptor of their own.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What engine and worker print goes where a test shows it; the answers do not mix with it.
_answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

import grpc  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm._custom_ops import cpu_attn_reshape_and_cache  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.distributed.kv_transfer import get_kv_transfer_group  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.model_executor.models import ModelRegistry  # noqa: E402

import kvservice_client as kv  # noqa: E402
from kvservice_adapters.vllm.counters import Counters  # noqa: E402
from kvservice_adapters.vllm.keys import places_written  # noqa: E402

_SETTLE_S = 20.0


class Refusal(grpc.RpcError):
    """What a call raises when nobody answers."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "injected by the test"

    def trailing_metadata(self) -> tuple[()]:
        return ()


class Engine:
    """One engine at a time, with or without the connector."""

    def __init__(self) -> None:
        self._llm: LLM | None = None
        self._scheduled: Counter[str] = Counter()
        self._preempted = 0
        self._ended: dict[str, dict[str, Any]] = {}
        self._counts: Counter[str] = Counter()
        self._faults: list[tuple[Any, str, Any]] = []
        self._blocks: dict[int, int] = {}
        """Of the last request that was alone: the engine's block at each place that was loaded or saved."""
        self._count()

    def open(self, **arguments: Any) -> None:
        """Start an engine; the one before it must be closed."""
        assert self._llm is None, "one engine at a time"
        _inspect_here(arguments["model"])
        self._llm = LLM(**arguments)
        self._scheduled.clear()
        self._counts.clear()
        self._preempted = 0
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
            self._watch_scheduler()
            if "kv_transfer_config" in arguments and self._worker() is not None:
                self._watch_blocks()

    def close(self) -> None:
        """End the engine, as a restart would."""
        self.heal()
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def generate(
        self,
        prompts: list[list[int]],
        tokens: int = 24,
        cache_salt: str = "",
        lora: str = "",
        priorities: list[int] | None = None,
        params: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Greedy tokens of each prompt, all at once."""
        assert self._llm is not None
        self._scheduled.clear()
        self._blocks.clear()
        salt = {"cache_salt": cache_salt} if cache_salt else {}
        outputs = self._llm.generate(
            [{"prompt_token_ids": prompt, **salt} for prompt in prompts],
            self._sampling(tokens, params),
            use_tqdm=False,
            lora_request=LoRARequest("lora", 1, lora) if lora else None,
            priority=priorities,
        )
        return [
            {
                "tokens": list(output.outputs[0].token_ids),
                "finish_reason": output.outputs[0].finish_reason,
                "cached": output.num_cached_tokens,
                "told": output.kv_transfer_params,
                # Every generated token but the last goes through the model once.
                "computed": self._computed(output.request_id) - (tokens - 1),
            }
            for output in outputs
        ]

    def abort(self, prompt: list[int], steps: int) -> None:
        """Begin a request and abort it after some steps of the engine."""
        self.add({"aborted": prompt}, 200)
        for _ in range(steps):
            self.step([])
        self._engine().abort_request(["aborted"])

    def start(self, request: str, prompt: list[int], tokens: int) -> None:
        """Add a request and step until it runs."""
        self.add({request: prompt}, tokens)
        while not self._computed(request):
            self.step([])

    def add(self, prompts: dict[str, list[int]], tokens: int) -> None:
        """Add requests, the first to start first; they wait until the next step."""
        for request, prompt in prompts.items():
            self._engine().add_request(request, {"prompt_token_ids": prompt}, self._sampling(tokens, None))

    def step(self, cancelled: list[str]) -> None:
        """Abort these requests and go one step, which tells the daemon of the queue."""
        self._engine().abort_request(cancelled)
        for one in self._engine().step():
            if one.finished:
                self._ended[one.request_id] = {"tokens": [*one.outputs[0].token_ids], "cached": one.num_cached_tokens}

    def run(self) -> dict[str, dict[str, Any]]:
        """Step until every request has ended; how each ended, by its name."""
        while self._engine().has_unfinished_requests():
            self.step([])
        return self._ended

    def drop_cache(self) -> None:
        """The engine forgets what it computed, as in a restart; the store does not."""
        assert self._llm is not None
        assert self._llm.reset_prefix_cache()
        self._counts.clear()

    def settle(self) -> None:
        """Wait until every save is over and the engine has got every block back."""
        ends_at_s = time.monotonic() + _SETTLE_S
        saves = self._worker()._saves
        while saves._queue or any(chain.waiting for chain in list(saves._chains.values())):
            assert time.monotonic() < ends_at_s, "saves do not end"
            time.sleep(0.005)
        while self._scheduler().has_requests():
            assert time.monotonic() < ends_at_s, "requests do not end"
            self._engine().step()

    def fail(self, rpc: str) -> None:
        """From now on nobody answers that call, of either half."""

        def refuse(*_: Any, **__: Any) -> Any:
            raise Refusal

        for client in (self._worker()._client, *self._connector()._scheduler._clients):
            client.link.unary.close()  # every call goes over gRPC then
            self._replace(client.link.stub, rpc, refuse)

    def signal_in(self, where: str, process_id: int, number: int = signal.SIGKILL) -> None:
        """Signal a process when the next copy of a load ("write") or of a save ("read") begins, or its Get ("get")."""
        owner = self._worker()._client if where == "get" else self._worker()._memory.copies
        original: Callable[..., Any] = getattr(owner, where)

        def signalling(*args: Any, **kwargs: Any) -> Any:
            self.heal()
            os.kill(process_id, number)
            return original(*args, **kwargs)

        self._replace(owner, where, signalling)

    def break_hook(self, hook: str) -> None:
        """That method of the scheduler's or the worker's half raises from now on."""

        def breaking(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"{hook} is broken by the test")

        for half in (self._worker(), self._connector()._scheduler):
            if hasattr(half, hook):
                self._replace(half, hook, breaking)

    def zero_loads(self) -> None:
        """What is loaded is zeros from now on."""
        copies = self._worker()._memory.copies
        write = copies.write

        def zeroing(block_ids: Any, addresses: Any) -> None:
            write(block_ids, addresses)
            for region in copies.layout.regions:
                region.tensor[list(block_ids)] = 0

        self._replace(copies, "write", zeroing)

    def leave_keys(self) -> None:
        """Loaded keys are not turned from now on, though their blocks count as loaded."""
        self._replace(self._worker()._memory.keys, "layers", {})

    def heal(self) -> None:
        """End every fault."""
        while self._faults:
            owner, name, original = self._faults.pop()
            setattr(owner, name, original)

    def _replace(self, owner: Any, name: str, by: Any) -> None:
        self._faults.append((owner, name, getattr(owner, name)))
        setattr(owner, name, by)

    def counts(self) -> dict[str, float]:
        """What the adapter counted since the engine was opened."""
        return dict(self._counts)

    def preempted(self) -> int:
        """Preemptions since the engine was opened."""
        return self._preempted

    def free_blocks(self) -> int:
        """The engine's blocks that nobody holds."""
        return int(self._scheduler().kv_cache_manager.block_pool.get_num_free_blocks())

    def status(self) -> list[str]:
        """How worker and scheduler stand with the daemon: attached, where a call has just reached it."""
        clients = (self._worker()._client, *self._connector()._scheduler._clients)
        return [
            client.status.value
            if client.lookup([bytes(client.namespace.hash_size_bytes)]).reason is kv.Reason.NOT_HELD
            else "unreachable"
            for client in clients
        ]

    def keys(self, path: str) -> list[int]:
        """The keys of the last request's loaded and saved blocks, into a file; their places in the request.

        Read by a formula of the test's own: the CPU backend's vector code keeps a head's keys transposed in the first
        half of its part of a block. float32 [layers, blocks, kv_heads, tokens, head_dim].
        """
        places = sorted(self._blocks)
        ids = torch.tensor([self._blocks[place] for place in places])
        keys = []
        for name, tensor in self._caches().items():
            head_dim = self._context()[name].head_size
            blocks, heads, tokens, _ = tensor.shape
            transposed = tensor.view(blocks, heads, 2, head_dim, tokens)[ids, :, 0]
            keys.append(transposed.transpose(-1, -2).float())
        np.save(path, torch.stack(keys).numpy())
        return places

    def key_places(self, isa: str, dtype: str, tokens: int, head_dim: int) -> list[list[int]]:
        """Where vLLM's kernel for an instruction set puts each dimension of each token's key, as the adapter finds."""

        def write(keys: torch.Tensor, cache: torch.Tensor) -> None:
            halves = cache.view(1, 1, 2 * tokens, head_dim).chunk(2, dim=2)
            cpu_attn_reshape_and_cache(keys, torch.zeros_like(keys), *halves, torch.arange(tokens), isa)

        found = places_written(write, tokens=tokens, head_dim=head_dim, dtype=getattr(torch, dtype))
        return list(found.tolist())

    def rope(self) -> tuple[str, int]:
        """How the adapter turns keys: in which pairs, and how many dimensions of a head."""
        rope = self._worker()._memory.keys.rope
        return rope.form.name, rope.rotary_dims

    def refusal(self) -> str:
        """Why the adapter does not turn keys of this model."""
        return str(self._connector()._scheduler.truncation_refusal)

    def namespace(self) -> dict[str, Any]:
        """The worker's."""
        namespace = self._worker().namespace
        return {
            "fingerprint": namespace.fingerprint.hex(),
            "label": namespace.label,
            "block_size_bytes": namespace.block_size_bytes,
        }

    def sessions(self) -> int:
        """Conversations that the daemon knows of this engine's namespace."""
        client = self._worker()._client
        return sum(of.sessions for of in client.stats().namespaces if of.fingerprint == client.namespace.fingerprint)

    def waiting_order(self, prompts: list[list[int]], priorities: list[int]) -> list[str]:
        """Add requests without running them; their ids in the order of the adapter's view. Aborts them again."""
        engine = self._engine()
        for position, (prompt, priority) in enumerate(zip(prompts, priorities, strict=True)):
            engine.add_request(f"w{position}", {"prompt_token_ids": prompt}, self._sampling(4, None), priority=priority)
        order = [tracked.request_id.split("-")[0] for tracked in self._connector()._scheduler.requests.in_order()]
        engine.abort_request([f"w{position}" for position in range(len(prompts))])
        return order

    def _sampling(self, tokens: int, params: dict[str, Any] | None) -> SamplingParams:
        extra = {"kv_transfer_params": params} if params else None
        return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra)

    def _engine(self) -> Any:
        assert self._llm is not None
        return self._llm.llm_engine

    def _scheduler(self) -> Any:
        return self._engine().engine_core.engine_core.scheduler

    def _connector(self) -> Any:
        return self._scheduler().connector

    def _worker(self) -> Any:
        return get_kv_transfer_group()._worker

    def _computed(self, request_id: str) -> int:
        # The engine's own ids carry a suffix.
        return sum(count for name, count in self._scheduled.items() if name.split("-")[0] == request_id)

    def _context(self) -> Any:
        return self._engine().vllm_config.compilation_config.static_forward_context

    def _caches(self) -> dict[str, torch.Tensor]:
        return {name: layer.kv_cache for name, layer in self._context().items() if hasattr(layer, "kv_cache")}

    def _watch_blocks(self) -> None:
        worker = self._worker()
        save, load = worker._saves.order, worker._loads.order

        def saving(orders: Any) -> None:
            for order in orders:
                self._blocks.update(enumerate(order.block_ids, order.first))
            save(orders)

        def loading(order: Any, after: Any) -> None:
            self._blocks.update(enumerate(order.block_ids, order.first))
            load(order, after)

        worker._saves.order, worker._loads.order = saving, loading

    def _watch_scheduler(self) -> None:
        scheduler = self._scheduler()
        schedule = scheduler.schedule

        def counting(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._scheduled.update(output.num_scheduled_tokens)
            self._preempted += len(output.preempted_req_ids or ())
            return output

        scheduler.schedule = counting

    def _count(self) -> None:
        add = Counters.add

        def counting(counters: Counters, name: str, amount: float = 1, *, reason: str = "") -> None:
            if amount:
                self._counts[f"{name}:{reason}" if reason else name] += amount  # type: ignore[assignment]
            add(counters, name, amount, reason=reason)

        Counters.add = counting  # type: ignore[assignment,method-assign]


def _inspect_here(model: str) -> None:
    """Have vLLM look at the model's class in this process: it would start another, of 10 s, for every class once."""
    for name in json.loads((Path(model) / "config.json").read_text())["architectures"]:
        known = ModelRegistry.models[name]
        ModelRegistry.register_model(name, known.load_model_cls())


def main() -> None:
    """Answer commands until the input ends."""
    engine = Engine()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"answer": getattr(engine, request.pop("command"))(**request)}
        except Exception as error:  # noqa: BLE001  # the test decides what a failure means
            traceback.print_exc()
            answer = {"error": type(error).__name__, "message": str(error)}
        _answers.write(json.dumps(answer) + "\n")
        _answers.flush()
    engine.close()


if __name__ == "__main__":
    main()
