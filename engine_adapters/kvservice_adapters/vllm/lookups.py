"""lookups: asks the daemon what it holds, in a thread, so that the engine's scheduler never waits for an answer."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import kvservice_client as kv
from kvservice_adapters.speed import PrefillSpeed
from kvservice_adapters.vllm.counters import Counters
from kvservice_adapters.vllm.status import LOG
from kvservice_adapters.vllm.truncation import FormerNames

_CALL_TIMEOUT_S_MIN = 1.0
_PROMOTION_POLL_S = 0.01
# Said by the daemon about blocks; every other reason says that it could not be asked.
_ANSWERS = frozenset({
    kv.Reason.OK, kv.Reason.NOT_HELD, kv.Reason.BEING_WRITTEN, kv.Reason.CORRUPT, kv.Reason.TIER_OFFLINE,
    kv.Reason.OVER_LIMIT,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class KeptHeld:
    """See Held."""

    blocks: int
    reason: kv.Reason


@dataclass(frozen=True, slots=True)
class Kept:
    """The leading blocks of a truncated request: they may be held under the names they had before the cut.

    Attributes:
        blocks: how many.
        formers: those names, the most likely first; called in the thread, because it hashes a conversation.
    """

    blocks: int
    formers: Callable[[], Sequence[FormerNames]]


@dataclass(frozen=True, slots=True)
class Held:
    """The answer to a lookup.

    Attributes:
        blocks: leading blocks to load: those that every rank holds, in any tier, as far as loading is worth it.
        held_blocks: those that every rank holds.
        ready_blocks: of these, how many lead in DRAM on every rank.
        asked_blocks: length of the chain that was asked for.
        is_due: whether the request could start then; before, what is not worth loading now may come ahead of its turn.
        at_s: when it was given, on the monotonic clock.
        kept: of a truncated request: how many of the blocks that were kept are held under its names, and why no more.
    """

    blocks: int
    held_blocks: int
    ready_blocks: int
    asked_blocks: int
    is_due: bool
    at_s: float
    kept: KeptHeld | None = None

    @property
    def is_early(self) -> bool:
        """Whether it would say more now that the request's turn has come."""
        return not self.is_due and self.blocks < self.held_blocks

    @property
    def is_ready(self) -> bool:
        """Whether nothing is on its way from a slower tier."""
        return self.ready_blocks >= self.blocks


@dataclass(slots=True)
class _Question:
    request_id: str
    session_id: str
    hashes: Sequence[bytes]
    ends_at_s: float
    is_due: bool
    kept: Kept | None
    kept_held: KeptHeld | None = None
    has_prefetched: bool = False
    is_settled: bool = False
    answer: Held | None = None


class Lookups:
    """One question per request at a time. `ask`, `answer` and `forget` return at once, on any thread.

    When a request is due, blocks that are held on NVMe only are prefetched, and asked for again until they are in DRAM
    or the time is over.
    """

    def __init__(
        self,
        clients: Sequence[kv.Client],
        counters: Counters,
        *,
        lookup_wait_s: float,
        promotion_wait_s: float,
        speed: PrefillSpeed,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clients = clients
        self._counters = counters
        # Nobody waits longer; but an answer that comes too late for one step still serves a request that queues.
        self._call_timeout_s = max(lookup_wait_s, _CALL_TIMEOUT_S_MIN)
        self._promotion_wait_s = promotion_wait_s
        self._speed = speed
        self._clock = clock
        self._changed = threading.Condition()
        self._questions: dict[str, _Question] = {}
        self._due: list[tuple[float, int, _Question]] = []
        self._order = itertools.count()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kvservice-lookups", daemon=True)
        self._thread.start()

    def ask(
        self,
        request_id: str,
        session_id: str,
        hashes: Sequence[bytes],
        *,
        is_due: bool = True,
        kept: Kept | None = None,
    ) -> None:
        """Find out in the background; an answer that is there already stays until the new one comes.

        Args:
            is_due: the request could start now; otherwise nothing is fetched and waited for.
            kept: the request is one of a truncated session.
        """
        now_s = self._clock()
        with self._changed:
            before = self._questions.get(request_id)
            question = _Question(
                request_id,
                session_id,
                hashes,
                now_s + self._promotion_wait_s,
                is_due,
                kept,
                answer=before.answer if before else None,
            )
            self._questions[request_id] = question
            heapq.heappush(self._due, (now_s, next(self._order), question))
            self._changed.notify_all()

    def answer(self, request_id: str) -> Held | None:
        """The latest answer; None: there is none yet."""
        question = self._questions.get(request_id)
        return None if question is None else question.answer

    def is_pending(self, request_id: str) -> bool:
        """Whether a better answer is on its way."""
        question = self._questions.get(request_id)
        return question is not None and not question.is_settled

    def wait_for_any(self, timeout_s: float) -> None:
        """Wait until an answer comes, if one is on its way, or the time is over: what else is there to do?"""
        with self._changed:
            if any(not question.is_settled for question in self._questions.values()):
                self._changed.wait(timeout_s)

    def forget(self, request_id: str) -> None:
        """Nobody wants to know any more."""
        with self._changed:
            self._questions.pop(request_id, None)

    def stop(self) -> None:
        """End the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        while True:
            question = self._next()
            if question is None:
                return
            try:
                self._find_out(question)
            except Exception as error:  # noqa: BLE001  # the thread must outlive whatever one lookup met: it is a miss
                LOG.exception("a lookup failed in an unexpected way")
                self._counters.add("hook_errors", reason=type(error).__name__)
                self._answer(question, blocks=0, held=0, ready=0)
                question.is_settled = True
            with self._changed:
                self._changed.notify_all()

    def _next(self) -> _Question | None:
        with self._changed:
            while not self._stopping:
                if self._due:
                    wait_s = self._due[0][0] - self._clock()
                    if wait_s <= 0:
                        question = heapq.heappop(self._due)[2]
                        if self._questions.get(question.request_id) is question:
                            return question
                        continue
                    self._changed.wait(wait_s)
                else:
                    self._changed.wait()
            return None

    def _find_out(self, question: _Question) -> None:
        if question.kept is not None and question.kept_held is None:
            question.kept_held = self._name_kept(question, question.kept)
        blocks = held = ready = len(question.hashes)
        for client in self._clients:
            found = client.plan_load(
                question.hashes[:held],
                prefill_tokens_per_s=self._speed.tokens_per_s,
                deadline_s=self._call_timeout_s,
            )
            if found.reason not in _ANSWERS:
                self._counters.add("failed_lookups", reason=found.reason.value)
            blocks, held, ready = min(blocks, found.blocks), min(held, found.held_blocks), min(ready, found.dram_blocks)
            if held == 0:
                break
        ready = min(ready, blocks)
        if ready < blocks and question.is_due:
            now_s = self._clock()
            if now_s < question.ends_at_s:
                self._promote(question, blocks, now_s)
                self._answer(question, blocks=blocks, held=held, ready=ready)
                return
            blocks = ready  # what has not come by now is recomputed rather than waited for
        self._answer(question, blocks=blocks, held=held, ready=ready)
        question.is_settled = True

    def _answer(self, question: _Question, *, blocks: int, held: int, ready: int) -> None:
        question.answer = Held(
            blocks, held, ready, len(question.hashes), question.is_due, self._clock(), question.kept_held
        )

    def _name_kept(self, question: _Question, kept: Kept) -> KeptHeld:
        """Have every rank's kept blocks named as the request names them."""
        least = KeptHeld(kept.blocks, kv.Reason.OK)
        formers: Sequence[FormerNames] | None = None
        for client in self._clients:
            hashes = question.hashes[: kept.blocks]
            planned = client.plan_load(hashes, deadline_s=self._call_timeout_s)
            held = KeptHeld(planned.held_blocks, planned.reason)
            if held.blocks < kept.blocks:
                formers = kept.formers() if formers is None else formers
                held = max((held, *self._named(client, question, formers)), key=lambda one: one.blocks)
            least = min(least, held, key=lambda one: one.blocks)
        return least

    def _named(self, client: kv.Client, question: _Question, formers: Sequence[FormerNames]) -> Iterator[KeptHeld]:
        for former in formers:
            try:
                named = client.truncate(
                    question.session_id,
                    question.hashes[: former.blocks],
                    source=former.hashes,
                    keep=former.kept,
                    deadline_s=self._call_timeout_s,
                )
            except kv.InvalidRequest as error:
                # More than the daemon takes in one call or for one session.
                LOG.warning("kvservice: a truncation was refused by the daemon: %s", error)
                yield KeptHeld(0, kv.Reason.OVER_LIMIT)
                continue
            yield KeptHeld(named.held_blocks, named.reason)
            if named.held_blocks == former.blocks:
                return

    def _promote(self, question: _Question, blocks: int, now_s: float) -> None:
        if not question.has_prefetched:
            question.has_prefetched = True
            self._counters.add("prefetches")
            for client in self._clients:
                client.prefetch(
                    question.hashes[:blocks], session_id=question.session_id, request_id=question.request_id
                )
        with self._changed:
            if not self._stopping:
                heapq.heappush(self._due, (now_s + _PROMOTION_POLL_S, next(self._order), question))
