"""loading: what of a prompt is loaded rather than computed, when that begins, and what became of it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import kvservice_client
from kvservice_adapters.service import KVClient
from kvservice_adapters.speed import PrefillSpeed
from kvservice_adapters.transformers.counters import AdapterCounters
from kvservice_adapters.transformers.paths import Ahead, Arrival, Arrived, BlockPath, RowsFor
from kvservice_adapters.transformers.saving import BackgroundSaver, DrainOutcome
from kvservice_adapters.transformers.sequence import TrackedSequence

_NOTHING = Arrived(kvservice_client.LoadResult())

_LEAST_SHARE_AHEAD = 4
"""Less than such a part of the room for loads ahead is not worth two loads, where it is not all that is needed."""


class PrefixLoad:
    """The prefix of one sequence on its way into the engine's cache. Of the engine's thread.

    Attributes:
        tokens: how many leading tokens need not be computed, provided that they arrive.
        dram_blocks: how many of their blocks were in DRAM when they were asked for; the others were on NVMe.
        is_complete: whether they are all there already: no layer need be waited for.
    """

    def __init__(
        self,
        arrival: Arrival,
        sequence: TrackedSequence,
        counters: AdapterCounters,
        *,
        asked: int,
        tokens: int,
        dram_blocks: int,
    ) -> None:
        """`asked`: blocks that the service had announced, `dram_blocks` leading ones of them in DRAM."""
        self.tokens = tokens
        self.dram_blocks = min(arrival.blocks, dram_blocks)
        self._arrival = arrival
        self._sequence = sequence
        self._counters = counters
        self._asked_blocks = asked
        self._usable_tokens: int | None = None
        self.is_complete = arrival.is_complete or tokens == 0
        if self.is_complete:
            self.finish()

    def wait_layer(self, layer: int) -> None:
        """Let what this thread's stream does from now on find the layer in the cache. The CPU waits for nothing."""
        if self._usable_tokens is None:
            self._arrival.wait_layer(layer)

    def finish(self) -> int:
        """Wait for its end, behind all that this thread's stream has to do. Blocks.

        Returns:
            `tokens`, or 0: the cache, and whatever was computed from it, is wrong from its first token on.
        """
        if self._usable_tokens is None:
            result = self._arrival.finish()
            self._usable_tokens = self.tokens if result.blocks else 0
            self._account_for(result)
        return self._usable_tokens

    def cancel(self) -> None:
        """Nobody wants it any more; also where it arrived."""
        self._arrival.cancel()

    def _account_for(self, result: kvservice_client.LoadResult) -> None:
        missing = self._asked_blocks - result.blocks
        if missing:
            self._counters.add("failed_loads", reason=result.reason.name)
            self._counters.add("missed_blocks", missing, reason=result.reason.name)
        self._counters.add("loaded_blocks", result.blocks)
        self._counters.add("shifted_blocks", sum(run.blocks for run in result.shifted))
        self._sequence.save_started(0, result.blocks)


class PrefixLoader:
    """Finds prefixes and has them loaded. Of the engine's thread."""

    def __init__(
        self,
        client: KVClient,
        path: BlockPath,
        saver: BackgroundSaver,
        counters: AdapterCounters,
        namespace: kvservice_client.Namespace,
        *,
        deadline_s: float,
        settle_timeout_s: float,
        speed: PrefillSpeed | None,
    ) -> None:
        """`speed`: of this engine, against which loading is weighed; None: whatever is held is loaded."""
        self._client = client
        self._path = path
        self._saver = saver
        self._counters = counters
        self._namespace = namespace
        self._deadline_s = deadline_s
        self._settle_timeout_s = settle_timeout_s
        self._speed = speed
        self._lock = threading.Lock()
        # None: nothing of it is loaded ahead, and that is not asked again.
        self._ahead: dict[TrackedSequence, Ahead | None] = {}

    def begin(self, sequence: TrackedSequence, rows_for: RowsFor) -> PrefixLoad:
        """Begin to load the longest held prefix, or go on with what was begun ahead."""
        hashes = self._loadable(sequence)
        with self._lock:
            ahead = self._ahead.pop(sequence, None)
        if not hashes:
            return self._load_of(_NOTHING, sequence)
        self._counters.add("lookups")
        if self._client.attached:
            # A turn may follow the last one faster than its blocks were saved.
            self._saver.settle(hashes, self._settle_timeout_s)
        try:
            hits = self._find(sequence, hashes)
            early_blocks = ahead.blocks if ahead is not None else 0
            asked = max(hits.blocks, early_blocks)
            held = max(hits.held_blocks, early_blocks)
            arrival = self._arrival(sequence, hashes[:asked], hits, ahead, rows_for)
        except kvservice_client.KVServiceError as error:
            self._counters.add("failed_loads", reason=type(error).__name__)
            self._counters.add("missed_blocks", len(hashes), reason=type(error).__name__)
            return self._load_of(_NOTHING, sequence)
        self._counters.add("missed_blocks", held - asked, reason="RECOMPUTED")
        self._counters.add("missed_blocks", len(hashes) - held, reason=hits.reason.name)
        return self._load_of(arrival, sequence, asked=asked, dram_blocks=max(hits.dram_blocks, early_blocks))

    def begin_ahead(self, sequence: TrackedSequence) -> bool:
        """Begin to load what a sequence that waits will need, or as much of its beginning as the path has room for.

        Returns:
            Whether this sequence was seen to; if not, it is tried again, and before those that wait behind it.
        """
        hashes = self._loadable(sequence)
        with self._lock:
            if sequence in self._ahead or not hashes:
                return True
        # What does not fit is loaded behind it when it is known where it goes.
        fitting = min(len(hashes), self._path.ahead_blocks_now)
        least = min(len(hashes), max(1, self._path.ahead_blocks_max // _LEAST_SHARE_AHEAD))
        if fitting < least or not self._client.attached:
            return False
        if self._saver.settle(hashes, 0.0) is not DrainOutcome.DRAINED:
            return False  # more is held in a moment
        ahead: Ahead | None = None
        try:
            hits = self._find(sequence, hashes)
            early = min(hits.blocks, fitting)
            if hits.dram_blocks < early:
                return False  # the service is fetching it
            if early:
                ahead = self._path.load_ahead(sequence, hashes[:early], deadline_s=self._deadline_s)
        except kvservice_client.KVServiceError:
            pass  # `begin` asks again, and counts what it hears
        with self._lock:
            self._ahead[sequence] = ahead
        return True

    def close(self) -> None:
        """Cancel what was begun ahead."""
        with self._lock:
            ahead, self._ahead = self._ahead, {}
        for each in ahead.values():
            if each is not None:
                each.cancel()

    def _arrival(
        self,
        sequence: TrackedSequence,
        hashes: Sequence[bytes],
        hits: kvservice_client.LoadPlan,
        ahead: Ahead | None,
        rows_for: RowsFor,
    ) -> Arrival:
        if not hashes:
            return Arrived(kvservice_client.LoadResult(reason=hits.reason))
        if ahead is not None:
            if 0 < ahead.blocks <= len(hashes):
                self._counters.add("ahead_blocks", ahead.blocks)
                return ahead.into(rows_for, hashes, wait_s=hits.wait_s, deadline_s=self._deadline_s)
            ahead.cancel()  # it failed
        return self._path.load(sequence, hashes, rows_for, wait_s=hits.wait_s, deadline_s=self._deadline_s)

    def _load_of(
        self, arrival: Arrival, sequence: TrackedSequence, *, asked: int = 0, dram_blocks: int = 0
    ) -> PrefixLoad:
        tokens = arrival.blocks * self._namespace.tokens_per_block
        return PrefixLoad(arrival, sequence, self._counters, asked=asked, tokens=tokens, dram_blocks=dram_blocks)

    def _loadable(self, sequence: TrackedSequence) -> Sequence[bytes]:
        # The last prompt token is always computed: its logits are what the engine is asked for.
        return sequence.chain.hashes[: (len(sequence.chain.tokens) - 1) // self._namespace.tokens_per_block]

    def _find(self, sequence: TrackedSequence, hashes: Sequence[bytes]) -> kvservice_client.LoadPlan:
        # What of a truncated conversation is not held under its present names may be under former ones.
        speed = self._speed.tokens_per_s if self._speed else 0.0
        hits = self._client.plan_load(hashes, prefill_tokens_per_s=speed)
        prompt, namespace = sequence.prompt, self._namespace
        if prompt is None:
            return hits
        for view in prompt.former_views(namespace.fingerprint, namespace.tokens_per_block, len(hashes)):
            if hits.held_blocks >= view.blocks:
                break
            self._saver.settle(view.hashes, self._settle_timeout_s)
            named = self._client.truncate(prompt.session_id, hashes[: view.blocks], source=view.hashes, keep=view.kept)
            if named.held_blocks > hits.held_blocks:
                hits = self._client.plan_load(hashes, prefill_tokens_per_s=speed)
        return hits
