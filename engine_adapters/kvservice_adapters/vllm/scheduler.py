"""scheduler: the half in the engine's scheduler: what to load, what to save, and who waits.

Everything here runs on the scheduler's thread, between its steps, and returns at once: the daemon is only ever asked by
`lookups`, in a thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import kvservice_client as kv
from kvservice_adapters.speed import PrefillSpeed
from kvservice_adapters.vllm.counters import Counters
from kvservice_adapters.vllm.hashing import BlockNames
from kvservice_adapters.vllm.lookups import Kept, Lookups
from kvservice_adapters.vllm.messages import StepOrders
from kvservice_adapters.vllm.options import AdapterOptions
from kvservice_adapters.vllm.orders import LoadOrder, SaveOrder
from kvservice_adapters.vllm.queue import QueueTeller
from kvservice_adapters.vllm.status import LOG, StatusLog
from kvservice_adapters.vllm.truncation import TruncationOutcome, TruncationRefused, resalt, stated_truncation
from kvservice_adapters.vllm.waiting import TrackedRequest, WaitingRequests, tags_of

_IDLE_STEP_S = 0.001
_REFRESH_S = 1.0
"""An answer older than this is asked for again, while the old one serves."""


class SchedulerHalf:
    """One per engine. Until `attach` there is no reuse."""

    def __init__(
        self,
        options: AdapterOptions,
        names: BlockNames,
        *,
        tokens_per_block: int,
        by_priority: bool,
        loads: bool,
        saves: bool,
    ) -> None:
        self.counters = Counters()
        self.truncation_refusal = "its worker has not started"
        self.requests = WaitingRequests(by_priority=by_priority)
        self._options = options
        self._names = names
        self._tokens_per_block = tokens_per_block
        self._loads = loads
        self._saves = saves
        self._clients: list[kv.Client] = []
        self._lookups: Lookups | None = None
        self._queue: QueueTeller | None = None
        self._speed = PrefillSpeed()
        self._step: tuple[int, float] | None = None  # (tokens, when it began) of the step under way
        self._status: StatusLog | None = None
        # Taken whole by the next step's orders; nothing in between may lose one, or the engine waits for ever.
        self._load_orders: list[LoadOrder] = []
        self._retained: list[str] = []
        self._refusals_told: set[str] = set()

    @property
    def is_attached(self) -> bool:
        """Whether a lookup can hit."""
        return bool(self._clients) and all(client.attached for client in self._clients)

    def attach(self, namespaces: Iterable[kv.Namespace], *, truncation_refusal: str) -> None:
        """Begin, with one namespace per rank; why keys cannot be turned, "": they can."""
        self.truncation_refusal = truncation_refusal
        for namespace in namespaces:
            self._clients.append(
                kv.attach(
                    namespace,
                    socket_dir=self._options.socket_dir or None,
                    instance_name="vllm scheduler",
                    attach_timeout_s=self._options.attach_wait_s,
                    copy_threads=1,
                )
            )
        self._lookups = Lookups(
            self._clients,
            self.counters,
            lookup_wait_s=self._options.lookup_wait_s,
            promotion_wait_s=self._options.promotion_wait_s,
            speed=self._speed if self._options.recompute_if_faster else PrefillSpeed(),
        )
        self._queue = QueueTeller(self._clients, tokens_per_block=self._tokens_per_block)
        self._status = StatusLog("scheduler", self._clients[0])

    # ---------------------------------------------------------------- arrivals

    def on_new_request(self, request: Any) -> None:
        """A request arrived: look its blocks up before its turn comes; the queue has them fetched."""
        if request.resumable:
            return  # its input comes in pieces, and may replace what it has generated: no chain to rely on
        session_id, params = tags_of(request)
        tracked = TrackedRequest(request, session_id, params)
        if "truncation" in params:
            self._truncate(tracked)
        self._names.extend(request, tracked.hashes)
        self.requests.add(tracked)
        if self._loads and tracked.hashes and not request.skip_reading_prefix_cache:
            self._ask(tracked, is_due=False)

    def matched_tokens(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """(tokens to load beyond those, whether they come between steps); (None, False): ask again."""
        tracked = self.requests.get(request.request_id)
        if tracked is None or not self._loads or self._lookups is None or tracked.has_failed_load:
            return 0, False
        self._names.extend(request, tracked.hashes)
        tracked.local_blocks = computed_tokens // self._tokens_per_block
        self._reused(tracked, tracked.local_blocks)
        if len(tracked.hashes) <= tracked.local_blocks or request.skip_reading_prefix_cache:
            return 0, False
        held = self._lookups.answer(request.request_id)
        # An answer about fewer blocks is one of before a preemption: what was computed since may be there as well.
        is_open = held is None or held.asked_blocks < len(tracked.hashes) or held.is_early
        if is_open and not self._lookups.is_pending(request.request_id):
            self._ask(tracked)
        if held is None or is_open:
            return self._waited(tracked, self._options.lookup_wait_s)
        if held.blocks <= tracked.local_blocks:
            return 0, False
        if not held.is_ready:
            if not self._lookups.is_pending(request.request_id):
                self._ask(tracked)  # its turn has come before its blocks: they are fetched, and waited for
            return self._waited(tracked, self._options.promotion_wait_s + self._options.lookup_wait_s)
        if time.monotonic() - held.at_s > _REFRESH_S and not self._lookups.is_pending(request.request_id):
            self._ask(tracked)
        return (held.blocks - tracked.local_blocks) * self._tokens_per_block, True

    # -------------------------------------------------------------------- loads

    def blocks_allocated(self, request: Any, block_ids: list[int], external_tokens: int) -> None:
        """The engine made room for what `matched_tokens` promised: order the load."""
        tracked = self.requests.get(request.request_id)
        if tracked is None or external_tokens == 0:
            return
        first = tracked.local_blocks
        end = first + external_tokens // self._tokens_per_block
        ids = tuple(block_ids[first:end])
        tracked.loading_ids = frozenset(ids)
        is_truncated = tracked.truncation is not None
        self._load_orders.append(
            LoadOrder(tracked.request_id, tracked.session_id, tuple(tracked.hashes[:end]), first, ids, is_truncated)
        )
        self._reused(tracked, end)
        self.counters.add("hit_blocks", len(ids))

    def abandon_load(self, request_id: str, block_ids: list[int]) -> None:
        """Something went wrong in between: order a load that cannot succeed, so that the request is computed."""
        self._load_orders.append(LoadOrder(request_id, "", (), 0, tuple(block_ids)))
        tracked = self.requests.get(request_id)
        if tracked is not None:
            tracked.has_failed_load = True  # or it would be promised again, for ever

    def loads_ended(self, request_ids: Iterable[str], failed_block_ids: set[int]) -> None:
        """The workers are done with these requests; those blocks were not filled."""
        if failed_block_ids:
            for tracked in self.requests:
                if not failed_block_ids.isdisjoint(tracked.loading_ids):
                    tracked.has_failed_load = True
        for request_id in request_ids:
            ended = self.requests.get(request_id)
            if ended is not None:
                ended.loading_ids = frozenset()

    # -------------------------------------------------------------------- steps

    def take_orders(self, *, preempted: Iterable[str], finished: Iterable[str]) -> StepOrders:
        """What must reach the workers with this step, whatever else fails."""
        released = {*preempted, *finished}.difference(self._retained)
        orders = StepOrders(loads=self._load_orders, released=sorted(released), retained=self._retained)
        self._load_orders, self._retained = [], []
        return orders

    def step_began(self, scheduler_output: Any) -> None:
        """The engine has chosen what runs next: tell the daemon who waits."""
        self._step = scheduler_output.total_num_scheduled_tokens, time.monotonic()
        if self._lookups is not None and scheduler_output.total_num_scheduled_tokens == 0:
            # Nothing runs but requests that wait for their lookups. An engine that goes round without a pause takes
            # processor and interpreter from the thread that asks.
            self._lookups.wait_for_any(_IDLE_STEP_S)
        if self._queue is not None:
            self._queue.tell(self.requests.in_order() if self._loads else (), self.requests)

    def step_ended(self) -> None:
        """What `step_began` was told of has gone through the model."""
        if self._step is not None:
            tokens, began_at_s = self._step
            self._speed.computed(tokens, time.monotonic() - began_at_s)
            self._step = None

    def plan_saves(self, orders: StepOrders, scheduler_output: Any) -> None:
        """Order saves of the blocks that this step fills."""
        if self._status is not None:
            self._status.look()
        if not self._saves or not self.is_attached:
            return  # nothing is marked as saved: once attached, a request's chain is saved from its root
        for request_id, tokens in scheduler_output.num_scheduled_tokens.items():
            tracked = self.requests.get(request_id)
            if tracked is not None:
                self._plan_save(orders, tracked, tokens, scheduler_output.kv_connector_block_state)

    def truncation_told(self, request: Any) -> dict[str, Any] | None:
        """What became of the request's truncation, for the application; None: it said nothing of one."""
        tracked = self.requests.get(request.request_id)
        if tracked is None or tracked.truncation_outcome is None:
            return None
        outcome = tracked.truncation_outcome
        held = None if self._lookups is None else self._lookups.answer(tracked.request_id)
        if tracked.truncation is not None:
            size = self._tokens_per_block
            outcome.usable_tokens = min(tracked.truncation.usable_blocks, len(tracked.hashes)) * size
            if tracked.has_failed_load:
                outcome.reason = "load_failed"
            elif tracked.is_late:
                outcome.reason = "late"
            elif held is None or held.kept is None:
                outcome.reason = "not_looked_up"
            else:
                outcome.held_tokens = held.kept.blocks * size
                # The conversation's last tokens were never computed, as a rule: that they are not held is no fault.
                is_as_it_should_be = held.kept.reason is kv.Reason.NOT_HELD and held.kept.blocks
                outcome.reason = "ok" if is_as_it_should_be else held.kept.reason.value
        return outcome.told()

    def request_finished(self, request: Any) -> bool:
        """Whether the engine must keep the request's blocks until the workers have saved them."""
        if self._lookups is not None:
            self._lookups.forget(request.request_id)
        tracked = self.requests.pop(request.request_id)
        # While a load is under way the engine keeps the blocks by itself, until it has ended.
        if tracked is None or tracked.loading_ids or not self._has_saves(tracked):
            return False
        self._retained.append(tracked.request_id)
        return True

    # -------------------------------------------------------------------- admin

    def forget_all(self) -> bool:
        """Drop every stored block of this engine's namespaces; whether that was done. Blocks: somebody asked for it."""
        try:
            for client in self._clients:
                client.forget_namespace()
        except kv.KVServiceError as error:
            LOG.warning("kvservice: the store's blocks could not be dropped: %s", error)
            return False
        return bool(self._clients)

    def close(self) -> None:
        """Detach."""
        if self._lookups is not None:
            self._lookups.stop()
        for client in self._clients:
            client.close()

    # ---------------------------------------------------------------- privately

    def _truncate(self, tracked: TrackedRequest) -> None:
        """Take what the request says of its truncation, or note why not. Before its hashes are looked at."""
        try:
            truncation = stated_truncation(
                tracked.request,
                tracked.params,
                session_id=tracked.session_id,
                tokens_per_block=self._tokens_per_block,
                unsupported=self.truncation_refusal,
            )
        except TruncationRefused as refused:
            tracked.truncation_outcome = TruncationOutcome(refused.reason, str(refused), self._tokens_per_block)
            self.counters.add("refused_truncations", reason=refused.reason)
            level = logging.DEBUG if refused.reason in self._refusals_told else logging.WARNING
            self._refusals_told.add(refused.reason)
            LOG.log(level, "kvservice: a truncation was refused (%s): %s", refused.reason, refused)
            return
        resalt(tracked.request, truncation.salt)
        tracked.truncation = truncation
        tracked.truncation_outcome = TruncationOutcome("ok", truncation.rounding, self._tokens_per_block)
        self.counters.add("truncated_requests")

    def _reused(self, tracked: TrackedRequest, blocks: int) -> None:
        if tracked.truncation_outcome is not None:
            tracked.truncation_outcome.reused_tokens = blocks * self._tokens_per_block

    def _kept(self, tracked: TrackedRequest) -> Kept | None:
        truncation = tracked.truncation
        if truncation is None:
            return None
        blocks = min(truncation.usable_blocks, len(tracked.hashes))
        return Kept(blocks, lambda: truncation.former_names(tracked.request, self._names_of, blocks_max=blocks))

    def _names_of(self, request: Any) -> list[bytes]:
        hashes: list[bytes] = []
        self._names.extend(request, hashes)
        return hashes

    def _ask(self, tracked: TrackedRequest, *, is_due: bool = True) -> None:
        if self._lookups is not None and self.is_attached:
            tracked.asked_at_s = time.monotonic()
            self._lookups.ask(
                tracked.request_id,
                tracked.session_id,
                tuple(tracked.hashes),
                is_due=is_due,
                kept=self._kept(tracked),
            )
            self.counters.add("lookups")

    def _waited(self, tracked: TrackedRequest, limit_s: float) -> tuple[int | None, bool]:
        if not self.is_attached:
            return 0, False
        if not tracked.is_late and time.monotonic() - tracked.asked_at_s < limit_s:
            return None, False
        if not tracked.is_late:
            tracked.is_late = True
            self.counters.add("late_lookups")
        return 0, False

    def _has_saves(self, tracked: TrackedRequest) -> bool:
        return tracked.saved_blocks > 0 and tracked.preemptions == tracked.request.num_preemptions

    def _plan_save(self, orders: StepOrders, tracked: TrackedRequest, tokens: int, block_state: Any) -> None:
        request = tracked.request
        if not self._has_saves(tracked):
            # Its blocks are others than those that were saved before, or none were.
            tracked.saved_blocks, tracked.preemptions = 0, request.num_preemptions
        filled = (request.num_computed_tokens + tokens) // self._tokens_per_block
        first = tracked.saved_blocks
        if filled <= first:
            return
        self._names.extend(request, tracked.hashes)
        # A block has a hash once all its tokens are decided: drafts that may be rejected have none.
        filled = min(filled, len(tracked.hashes))
        if filled <= first:
            return
        ids = block_state.resolve_block_ids(tracked.request_id)[0][first:filled]
        orders.saves.append(
            SaveOrder(tracked.request_id, tracked.session_id, tuple(tracked.hashes[first:filled]), first, tuple(ids))
        )
        tracked.saved_blocks = filled
