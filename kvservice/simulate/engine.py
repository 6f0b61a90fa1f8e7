"""engine: the time-aware replay: a simulated engine with a queue in front of it and the tiers behind it.

The engine is one server with continuous batching, as engines without chunked prefill are: it prefills one prompt at
a time, in order of arrival, while those that decode wait, and decodes all running requests together otherwise. A
prefill takes the longer of computing what was not held and copying what was (layer by layer, the two overlap). Blocks
on NVMe are read when their request comes to the head of the queue, unless they were fetched before; meanwhile the
others decode.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from kvservice.blocks import NO_SLOT, BlockHash, Rows
from kvservice.lookahead import Speeds as LoadSpeeds
from kvservice.lookahead import load_or_recompute, window_lengths
from kvservice.policies import POLICIES, make_policy
from kvservice.simulate.device import Device
from kvservice.simulate.movement import Movement
from kvservice.simulate.outcome import Outcome
from kvservice.simulate.requests import Request
from kvservice.simulate.tiers import Tiers, Waiting

_SMOOTHING = 0.02
_PLANNED_MAX = 64
"""Requests of the prefetch window that are looked at for one plan: more than a second of any disk's work."""

QUEUE_AWARE = tuple(name for name in POLICIES if name in ("lookahead", "predictive"))


@dataclass(frozen=True, slots=True)
class Speeds:
    """How fast the simulated engine and its devices are."""

    prefill_tokens_per_s: float = 12_000.0
    decode_step_s: float = 0.03
    batch_max: int = 24
    gpus: int = 2
    dram_bytes_per_s: float = 26e9
    nvme_bytes_per_s: float = 3e9


@dataclass(slots=True, eq=False)
class _Started:
    """The request that is next: its blocks are leased."""

    request: Request
    rows: Rows
    slots: Rows


class Simulation:
    """One run; see the module."""

    def __init__(
        self,
        requests: Sequence[Request],
        policy: str,
        speeds: Speeds,
        *,
        dram_blocks: int,
        nvme_blocks: int,
        block_bytes: int,
        block_tokens: int,
        queue_window: int,
        may_recompute: bool = False,
        admission: str = "all",
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Args:
        queue_window: requests of the queue that the tiers are told of; -1: as many as wait.
        may_recompute: what is held is computed where the daemon's PlanLoad says that this is faster.
        admission: which blocks are written to NVMe: one of the daemon's nvme_admission.
        """
        self._requests = {request.number: request for request in requests}
        self._speeds = speeds
        self._block_bytes, self._block_tokens = block_bytes, block_tokens
        self._queue_window = queue_window if policy in QUEUE_AWARE else 0
        self._may_recompute = may_recompute
        self._admission = admission
        self._on_progress = on_progress
        self.outcome = Outcome(policy, self._queue_window, dram_blocks, nvme_blocks, gpus=speeds.gpus)
        self.tiers = Tiers(
            make_policy(policy),
            make_policy(policy),
            dram_blocks=dram_blocks,
            nvme_blocks=nvme_blocks,
            block_bytes=block_bytes,
        )
        self._told = Waiting(self.tiers)
        self._movement = Movement(
            self.tiers, Device(speeds.nvme_bytes_per_s, at=self._at), self.outcome, on_landed=self._landed
        )
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._number = 0
        self._order = 0
        self._waiting: deque[Request] = deque()
        self._next: _Started | None = None
        self._decoding: dict[int, float] = {}  # tokens left
        self._decoding_since_s = 0.0
        self._is_prefilling = False
        self._phase = 0
        self._blocks_per_request = 1.0
        self._queued_s = 0.0
        self._arrived_s: dict[int, float] = {}
        self._followers: dict[int, Request] = {}
        for request in requests:
            if request.follows < 0:
                self._at(1.0 + request.arrival_s, partial(self._arrive, request))
            else:
                self._followers[request.follows] = request

    def run(self) -> Outcome:
        """Until every request has its reply."""
        began_s = now_s = 1.0
        while self._events:
            at_s, _, what = heapq.heappop(self._events)
            self._queued_s += (at_s - now_s) * len(self._waiting)
            now_s = at_s
            what(now_s)
        assert not self._waiting, "the run ended while requests wait"
        assert self._next is None, "the run ended while a request waits for its blocks"
        self.outcome.elapsed_s = now_s - began_s
        self.outcome.queue_mean = self._queued_s / max(1e-9, now_s - began_s)
        return self.outcome

    def _at(self, at_s: float, what: Callable[[float], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, what))

    def _arrive(self, request: Request, now_s: float) -> None:
        self._arrived_s[request.number] = now_s
        self._waiting.append(request)
        if request.truncated:
            self.tiers.truncate(request.hashes, request.truncated)
        if len(self._waiting) <= self._window():
            self._tell(request)
        if len(self._waiting) <= _PLANNED_MAX:
            self._plan(now_s)
        self._dispatch(now_s)

    def _window(self) -> int:
        return len(self._waiting) if self._queue_window < 0 else self._queue_window

    def _tell(self, request: Request) -> None:
        self._order += 1
        self._told.add(request.number, request.hashes, float(self._order))

    def _plan(self, now_s: float) -> None:
        """Fetch for the prefetch window. Only what knows the queue can."""
        if self._queue_window == 0 or not self.tiers.nvme_blocks:
            return
        blocks = self.outcome.dram_blocks, self.outcome.nvme_blocks
        length = min(window_lengths(*blocks, self._blocks_per_request).prefetch, self._window(), _PLANNED_MAX)
        window = self.tiers.namespace.window
        ahead = [(request.number, window.rows_of(request.number)) for request in islice(self._waiting, length)]
        self._movement.plan(ahead, now_s)

    def _landed(self, now_s: float) -> None:
        if self._movement.is_running_dry:
            self._plan(now_s)
        self._dispatch(now_s)

    def _dispatch(self, now_s: float) -> None:
        """Whatever the engine can do now: prefill what is next, else decode."""
        if self._is_prefilling:
            return
        self._settle_decoding(now_s)
        if self._next is None and self._waiting and len(self._decoding) < self._speeds.batch_max:
            self._next = self._start(self._waiting.popleft(), now_s)
            self._plan(now_s)
        if self._next is not None and self._movement.is_there(self._next.rows, self._next.slots):
            self._prefill(self._next, now_s)
        elif self._decoding:
            self._phase += 1
            left_s = min(self._decoding.values()) * self._speeds.decode_step_s
            self._at(now_s + left_s, partial(self._decoded, self._phase))

    def _start(self, request: Request, now_s: float) -> _Started:
        """Lease what is held; what is not in DRAM yet is read now."""
        if self._queue_window:
            self._told_started(request)
        namespace = self.tiers.namespace
        rows = self.tiers.held(request.hashes)
        self._blocks_per_request += _SMOOTHING * (len(rows) - self._blocks_per_request)
        in_dram = (namespace.index.slot[rows] != NO_SLOT) & ~namespace.index.arriving[rows]
        wanted = self._worth_loading(rows, in_dram) if self._may_recompute else rows
        got = self._movement.get(wanted, now_s)
        # What found no room in DRAM to be read into is no hit; what is computed by choice is one.
        hits = len(rows) if len(got) == len(wanted) else len(got)
        dram = int(np.count_nonzero(in_dram[:hits]))
        self.outcome.hit_of(len(request.hashes), dram=dram, nvme=hits - dram)
        self.outcome.recomputed_blocks += hits - len(got)
        namespace.touch(got, now_s)
        if self._admission == "reused":
            self._movement.write_used(got, now_s)
        slots = namespace.index.slot[got]
        namespace.pool.hold(slots)
        return _Started(request, got, slots)

    def _worth_loading(self, rows: Rows, in_dram: NDArray[np.bool_]) -> Rows:
        plan = load_or_recompute(
            len(rows) if in_dram.all() else int(np.argmin(in_dram)),
            len(rows),
            block_bytes=self._block_bytes,
            tokens_per_block=self._block_tokens,
            speeds=LoadSpeeds(
                self._speeds.prefill_tokens_per_s,
                self._speeds.dram_bytes_per_s,
                self._speeds.nvme_bytes_per_s,
                self._movement.nvme_wait_s,
            ),
        )
        return rows[: plan.blocks]

    def _told_started(self, request: Request) -> None:
        self._told.remove(request.number)
        if 0 < self._queue_window <= len(self._waiting):
            self._tell(self._waiting[self._queue_window - 1])

    def _prefill(self, started: _Started, now_s: float) -> None:
        self._next, self._is_prefilling = None, True
        self._phase += 1
        held_tokens = min(len(started.rows) * self._block_tokens, started.request.input_tokens - 1)
        compute_s = (started.request.input_tokens - held_tokens) / self._speeds.prefill_tokens_per_s
        copy_s = len(started.rows) * self._block_bytes / self._speeds.dram_bytes_per_s
        spent_s = max(compute_s, copy_s)
        self.outcome.gpu_seconds += spent_s * self._speeds.gpus
        self._at(now_s + spent_s, partial(self._prefilled, started))

    def _prefilled(self, started: _Started, now_s: float) -> None:
        request = started.request
        self._is_prefilling = False
        self.tiers.namespace.end_hold(started.slots)
        self.outcome.ttft_s.append(now_s - self._arrived_s.pop(request.number))
        self.outcome.tokens += request.input_tokens + request.output_tokens
        self._on_progress(len(self.outcome.ttft_s))
        self._decoding[request.number] = max(1.0, float(request.output_tokens))
        self._decoding_since_s = now_s
        self._save(request, request.hashes, now_s)
        self._dispatch(now_s)

    def _save(self, request: Request, hashes: Sequence[BlockHash], now_s: float) -> None:
        rows = self.tiers.store(hashes, now_s)
        if len(rows):
            self._told.stored([self.tiers.namespace.index.hash_of(row) for row in rows.tolist()])
            if self._admission == "all":
                self._movement.write_behind(rows, now_s)

    def _settle_decoding(self, now_s: float) -> None:
        """Count what was decoded since the last time, and let go of who is done."""
        spent_s = now_s - self._decoding_since_s
        self._decoding_since_s = now_s
        if not self._decoding or spent_s <= 0:
            return
        self.outcome.gpu_seconds += spent_s * self._speeds.gpus
        tokens = spent_s / self._speeds.decode_step_s
        for number in list(self._decoding):
            self._decoding[number] -= tokens
            if self._decoding[number] <= 1e-6:
                del self._decoding[number]
                self._replied(self._requests[number], now_s)

    def _decoded(self, phase: int, now_s: float) -> None:
        if phase == self._phase and not self._is_prefilling:
            self._dispatch(now_s)

    def _replied(self, request: Request, now_s: float) -> None:
        self._save(request, request.stored, now_s)
        follower = self._followers.pop(request.number, None)
        if follower is not None:
            self._at(now_s + follower.think_s, partial(self._arrive, follower))
