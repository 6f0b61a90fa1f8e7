"""The GPU's path of the transformers adapter, on a GPU of host memory: a real daemon, client and buffer.

The engine's stream is the fake GPU's; the model computes on the processor, which waits for the stream where the model's
kernels would. What the kernels do is in test_gpu_kernels.py, and all of it on a GPU in tests/gpu.
"""

from __future__ import annotations

import ctypes
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import kvservice_client as kv
from kvservice_adapters.gpu.buffer import HbmBuffer
from kvservice_adapters.gpu.parts import KeyRows
from kvservice_adapters.gpu.turning import Turned
from kvservice_adapters.positions import Rope, Turn
from kvservice_adapters.serving import Request, ServingLoop
from kvservice_adapters.transformers import AdapterOptions, DrainOutcome, TransformersAdapter, positions_of, serve_model
from kvservice_adapters.transformers.device_path import DevicePath
from kvservice_adapters.transformers.paths import Ahead, Arrival, RowsFor
from kvservice_adapters.transformers.sequence import TrackedSequence
from kvservice_adapters.truncation import TruncationPolicy
from kvservice_client.device import CachePart
from tests.adapters.conftest import KNOBS
from tests.adapters.generating import (
    ANSWER_TOKENS,
    REUSABLE_BLOCKS,
    REUSABLE_TOKENS,
    SAVED_BLOCKS,
    TIMEOUT_S,
    TOKENS_PER_BLOCK,
    WEIGHTS,
    generate,
    prompt,
    run_and_save,
)
from tests.adapters.test_serving import draw
from tests.daemons import DaemonThread
from tests.devices import FakeGpu

pytestmark = [pytest.mark.engines, pytest.mark.timeout(120)]


class Stream:
    """A stream of the fake GPU that looks like torch's."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._context = gpu.driver.context(0)
        self.cuda_stream = gpu.new_stream()

    def synchronize(self) -> None:
        self._context.synchronize(self.cuda_stream)


class Streams:
    """The buffer's view: on which stream the calling thread launches."""

    def __init__(self, engine: Stream) -> None:
        self._engine = engine.cuda_stream
        self._local = threading.local()

    def current(self) -> int:
        return int(getattr(self._local, "stream", self._engine))

    @contextmanager
    def _on(self, stream: int) -> Iterator[None]:
        before, self._local.stream = self.current(), stream
        yield
        self._local.stream = before

    def on(self, stream: Any) -> AbstractContextManager[None]:
        return self._on(int(getattr(stream, "cuda_stream", stream)))


class CopyingMover:
    """What the kernels do, by memmove and torch, as a step of the stream that is current."""

    def __init__(
        self,
        parts: Sequence[CachePart],
        *,
        gpu: FakeGpu,
        streams: Streams,
        rope: Rope | None,
        dtype: torch.dtype,
        device: torch.device,
        keys: Mapping[int, KeyRows] | None,
    ) -> None:
        self.layers = max(part.layer for part in parts) + 1
        self.block_size_bytes = sum(part.size_bytes for part in parts)
        self._parts = parts
        self._gpu = gpu
        self._streams = streams
        self._rope = rope
        self._dtype = dtype
        self._keys = keys or {}

    def prepare(self, rope: Rope | None) -> None:
        """Nothing is compiled."""

    def at(self, addresses: np.ndarray) -> CopyingMover:
        made = copy(self)
        places = zip(self._parts, addresses.tolist(), strict=True)
        made._parts = [replace(part, address=address) for part, address in places]
        return made

    def scatter(
        self,
        run: torch.Tensor,
        block_ids: torch.Tensor,
        *,
        first_layer: int,
        end_layer: int,
        turn: Turned | None = None,
    ) -> None:
        def step() -> bool:
            self._copy(run, block_ids, range(first_layer, end_layer), turn, scatters=True)
            return True

        self._gpu.queue(self._streams.current(), step)

    def gather(
        self, run: torch.Tensor, block_ids: torch.Tensor, *, first_layer: int = 0, end_layer: int | None = None
    ) -> None:
        # At once: the cache is the processor's, whose later work is not the stream's.
        self._copy(run, block_ids, range(first_layer, self.layers), None, scatters=False)

    def _copy(
        self, run: torch.Tensor, block_ids: torch.Tensor, layers: range, turn: Turned | None, *, scatters: bool
    ) -> None:
        for place, block_id in enumerate(block_ids.tolist()):
            offset = 0
            for number, part in enumerate(self._parts):
                here, there = run[place].data_ptr() + offset, part.address + block_id * part.block_stride_bytes
                offset += part.size_bytes
                if part.layer not in layers:
                    continue
                to, of = (there, here) if scatters else (here, there)
                ctypes.memmove(to, of, part.size_bytes)
                if turn is not None and turn.row[place] >= 0 and number in self._keys:
                    row = int(turn.row[place])
                    memory = (ctypes.c_uint8 * part.size_bytes).from_address(there)
                    keys = torch.frombuffer(memory, dtype=self._dtype).view(-1, self._keys[number].head_dim)
                    assert self._rope is not None
                    Turn(self._rope, turn.cosine[row], turn.sine[row], None).apply(keys)


class WaitedFor:
    """An arrival for a model on the processor: what the stream waits for, it waits for."""

    is_complete = False

    def __init__(self, arrival: Arrival, stream: Stream) -> None:
        self.blocks = arrival.blocks
        self._arrival = arrival
        self._stream = stream
        self.finish, self.cancel = arrival.finish, arrival.cancel

    def wait_layer(self, layer: int) -> None:
        self._arrival.wait_layer(layer)
        self._stream.synchronize()


class ProcessorsPath(DevicePath):
    """The GPU's path for a model on the processor."""

    stream: Stream

    def load(
        self, sequence: TrackedSequence, hashes: Sequence[bytes], rows_for: RowsFor, *, wait_s: float, deadline_s: float
    ) -> Arrival:
        arrival = super().load(sequence, hashes, rows_for, wait_s=wait_s, deadline_s=deadline_s)
        return WaitedFor(arrival, self.stream) if arrival.blocks else arrival

    def load_ahead(self, sequence: TrackedSequence, hashes: Sequence[bytes], *, deadline_s: float) -> Ahead | None:
        ahead = super().load_ahead(sequence, hashes, deadline_s=deadline_s)
        if ahead is not None:
            into = ahead.into
            ahead.into = lambda *what, **how: WaitedFor(into(*what, **how), self.stream)  # type: ignore[method-assign]
        return ahead


MakeAdapter = Callable[..., TransformersAdapter]


@pytest.fixture
def daemon(gpu: FakeGpu) -> Iterator[DaemonThread]:
    with (
        tempfile.TemporaryDirectory(prefix="kvs-") as folder,
        DaemonThread(Path(folder) / "s", driver=gpu.driver, **KNOBS) as made,
    ):
        yield made


@pytest.fixture
def make_adapter(model: PreTrainedModel, gpu: FakeGpu, daemon: DaemonThread, stack: ExitStack) -> MakeAdapter:
    """Call it for an adapter whose cache is, so it believes, on the fake GPU."""

    def make(
        *,
        blocks: int = 64,
        exportable: bool = True,
        load_deadline_s: float = 10.0,
        policy: TruncationPolicy | None = None,
    ) -> TransformersAdapter:
        served = serve_model(model, weights_identity=WEIGHTS)
        client = stack.enter_context(kv.attach(served.namespace, socket_dir=daemon.socket_dir))
        layout = served.layout
        memory = torch.from_numpy(gpu.array(gpu.allocate(blocks * layout.block_size_bytes, exportable=exportable)))
        stream = Stream(gpu)
        streams = Streams(stream)
        buffer = HbmBuffer(
            client,
            layer_bytes=[layout.block_size_bytes // layout.layers] * layout.layers,
            size_bytes=memory.numel(),
            device=memory.device,
            driver=gpu.driver,
            memory=memory,
            streams=streams,
        )
        assert buffer.plane.name == ("cuda-ipc" if exportable else "mapped")
        rope = positions_of(model) if policy else None
        path = ProcessorsPath(
            buffer,
            layout,
            memory.device,
            rope=rope,
            make_mover=partial(CopyingMover, gpu=gpu, streams=streams, rope=rope),
            current_stream=lambda: stream,
        )
        path.stream = stream
        options = AdapterOptions(recompute_if_faster=False, load_deadline_s=load_deadline_s)
        return stack.enter_context(
            TransformersAdapter(model, client, weights_identity=WEIGHTS, options=options, truncation=policy, path=path)
        )

    return make


@pytest.mark.parametrize("exportable", [True, False])
def test_turns_resume_with_the_same_tokens(
    make_adapter: MakeAdapter, model: PreTrainedModel, *, exportable: bool
) -> None:
    adapter = make_adapter(exportable=exportable)
    assert (adapter.plane.name, bool(adapter.plane.why)) == (("cuda-ipc", False) if exportable else ("mapped", True))
    adapter.prepare(tokens=1000)
    tokens = torch.zeros((1, 0), dtype=torch.long)
    for turn in range(4):
        history = tokens.shape[1]
        tokens = torch.cat([tokens, prompt(seed=turn, tokens=70 + turn)], dim=1)
        expected = generate(model, tokens)
        cache = adapter.load(tokens, session_id="s")
        assert cache.is_arriving is (turn > 0)
        assert cache.reused_tokens == max(0, history - 1) // TOKENS_PER_BLOCK * TOKENS_PER_BLOCK
        tokens = generate(model, tokens, cache)
        assert torch.equal(tokens, expected)
        adapter.save(tokens, cache)
        assert adapter.drain(TIMEOUT_S) is DrainOutcome.DRAINED
    stats = adapter.stats()
    assert (stats.failed_loads, stats.unsaved_blocks, stats.skipped_blocks) == ({}, {}, {})


def test_what_arrives_are_the_very_bytes_that_were_saved(make_adapter: MakeAdapter, model: PreTrainedModel) -> None:
    one, other = make_adapter(), make_adapter()
    _, saved = run_and_save(one, model, prompt())
    loaded = other.load(prompt())
    for (keys, values), (saved_keys, saved_values) in zip(loaded.rows(), saved.rows(), strict=True):
        assert torch.equal(keys, saved_keys[:, :REUSABLE_TOKENS])
        assert torch.equal(values, saved_values[:, :REUSABLE_TOKENS])


def test_what_the_daemon_does_not_copy_in_time_is_computed(
    make_adapter: MakeAdapter, model: PreTrainedModel, gpu: FakeGpu
) -> None:
    ids = prompt()
    run_and_save(make_adapter(), model, ids)
    adapter = make_adapter(load_deadline_s=0.5)
    with gpu.copies_held():
        cache = adapter.load(ids)
        assert (cache.is_arriving, cache.reused_tokens) == (True, REUSABLE_TOKENS)
        assert torch.equal(generate(model, ids, cache), generate(model, ids))
        assert cache.reused_tokens == 0
    assert adapter.stats().failed_loads == {"TIMEOUT": 1}
    assert adapter.stats().loaded_blocks == 0
    cache = adapter.load(ids)
    assert torch.equal(generate(model, ids, cache), generate(model, ids))
    assert cache.reused_tokens == REUSABLE_TOKENS


def test_conversations_that_overflow_are_turned_as_on_the_processor(
    make_adapter: MakeAdapter, model: PreTrainedModel, daemon: DaemonThread
) -> None:
    policy = TruncationPolicy(window_tokens=256)
    device = make_adapter(policy=policy)
    options = AdapterOptions(recompute_if_faster=False)
    with TransformersAdapter(
        model, daemon.socket_dir, weights_identity=WEIGHTS, salt="host", options=options, truncation=policy
    ) as host:
        tokens: list[int] = []
        for turn in range(12):
            tokens += draw(turn, 40)
            caches, outputs = [], []
            for adapter in (device, host):
                fitted = adapter.fit(tokens, session_id="s", max_new_tokens=ANSWER_TOKENS)
                cache = adapter.load(fitted)
                caches.append(cache)
                outputs.append(generate(model, torch.tensor([fitted.tokens]), cache))
                adapter.save(outputs[-1], cache)
                assert adapter.drain(TIMEOUT_S) is DrainOutcome.DRAINED
            assert torch.equal(*outputs)
            assert caches[0].reused_tokens == caches[1].reused_tokens
            for pair, other in zip(caches[0].rows(), caches[1].rows(), strict=True):
                assert torch.equal(pair[0], other[0]), turn
                assert torch.equal(pair[1], other[1]), turn
            tokens += outputs[0][0, -ANSWER_TOKENS:].tolist()
    stats = device.stats()
    assert stats.shifted_blocks == host.stats().shifted_blocks > 20
    assert stats.failed_loads == {}


def test_a_prompt_larger_than_the_buffer_is_saved_and_loaded_in_pieces(
    make_adapter: MakeAdapter, model: PreTrainedModel
) -> None:
    ids, adapter = prompt(), make_adapter(blocks=8)
    expected = generate(model, ids)
    for turn in range(4):
        cache = adapter.load(ids)
        assert cache.reused_tokens == min(8 * turn, REUSABLE_BLOCKS) * TOKENS_PER_BLOCK
        output = generate(model, ids, cache)
        assert torch.equal(output, expected)
        adapter.save(output, cache)
        assert adapter.drain(TIMEOUT_S) is DrainOutcome.DRAINED
    assert adapter.stats().saved_blocks == SAVED_BLOCKS
    assert adapter.stats().failed_loads == {}


def requests(count: int) -> list[Request]:
    return [Request(f"r{index}", draw(index, 200 + 20 * index), 12, session_id=f"s{index}") for index in range(count)]


# A small buffer takes the beginning of a prefix ahead, and the rest behind it.
@pytest.mark.parametrize(("blocks", "fails"), [(256, False), (256, True), (24, False)])
def test_the_loop_loads_what_waits_ahead(
    make_adapter: MakeAdapter, model: PreTrainedModel, gpu: FakeGpu, *, blocks: int, fails: bool
) -> None:
    asked = requests(5)
    adapter = make_adapter(blocks=blocks, load_deadline_s=0.5 if fails else 10.0)
    loop = ServingLoop(model, adapter, rows=2, window_tokens=400)

    def run() -> dict[str, tuple[tuple[int, ...], int]]:
        for request in asked:
            loop.submit(request)
        results = loop.run_until_idle()
        return {result.request_id: (result.tokens, result.reused_tokens) for result in results}

    expected = run()
    assert loop.drain(TIMEOUT_S) is DrainOutcome.DRAINED
    if fails:
        with gpu.copies_held():
            resumed = run()
    else:
        resumed = run()
    for request in asked:
        reusable = 0 if fails else (len(request.tokens) - 1) // TOKENS_PER_BLOCK * TOKENS_PER_BLOCK
        assert resumed[request.request_id] == (expected[request.request_id][0], reusable)
    stats = adapter.stats()
    assert stats.failed_loads == ({"TIMEOUT": 5} if fails else {})
    # What was begun ahead and failed meanwhile is begun again.
    assert fails or 0 < stats.ahead_blocks <= (12 * 5 if blocks == 24 else 256)
