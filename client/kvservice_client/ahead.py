"""What an engine asks and tells before it reads: what is held, what is worth loading, what it will need next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from kvservice_client.attachment import Attachment
from kvservice_client.errors import InvalidRequest, KVServiceError
from kvservice_client.link import Link
from kvservice_client.namespace import Namespace
from kvservice_client.outcomes import (
    LoadPlan,
    LookupResult,
    PrefetchResult,
    Reason,
    Resumption,
    Status,
    TruncateResult,
    reason_of,
)
from kvservice_client.queue_feed import QueueFeed
from kvservice_client.truncation import kept_blocks, truncate_request
from kvservice_client.waiting import WaitingRequest
from kvservice_proto.v1 import kvservice_pb2 as pb

LOOKUP_TIMEOUT_S = 2.0
_SPEED_SMOOTHING = 0.2
_SPEED_BYTES_MIN = 1 << 20  # smaller copies say more about overhead than about speed

ResultT = TypeVar("ResultT")

MISS_REASONS: dict[int, Reason] = {
    pb.MISS_REASON_UNSPECIFIED: Reason.OK,
    pb.MISS_REASON_NOT_HELD: Reason.NOT_HELD,
    pb.MISS_REASON_BEING_WRITTEN: Reason.BEING_WRITTEN,
    pb.MISS_REASON_PREFIX_MISSING: Reason.NOT_HELD,
    pb.MISS_REASON_CORRUPT: Reason.CORRUPT,
    pb.MISS_REASON_TIER_OFFLINE: Reason.TIER_OFFLINE,
    pb.MISS_REASON_OVER_LIMIT: Reason.OVER_LIMIT,
    pb.MISS_REASON_OTHER_SESSION: Reason.OTHER_SESSION,
}


class AheadOfNeed:
    """The calls of a client that touch no bytes. Thread-safe."""

    def __init__(self, namespace: Namespace, attachment: Attachment) -> None:
        self.namespace = namespace
        self._attachment = attachment
        self._copy_bytes_per_s = 0.0
        self._feed: QueueFeed | None = None
        self._feed_lock = threading.Lock()

    def lookup(self, hashes: Sequence[bytes], *, deadline_s: float = LOOKUP_TIMEOUT_S) -> LookupResult:
        """How many leading blocks of the chain are held. No side effect.

        Raises:
            InvalidRequest: the hashes are malformed or too many.
        """
        if not hashes:
            return LookupResult()

        def ask(link: Link) -> LookupResult:
            request = pb.LookupRequest(namespace_id=self._namespace_id(link), hashes=self.pack(hashes))
            response = link.call("Lookup", request, deadline_s)
            in_dram = sum(run.blocks for run in response.runs if run.held == pb.TIER_DRAM)
            miss: int = next((run.miss for run in response.runs if run.WhichOneof("outcome") == "miss"), 0)
            return LookupResult(response.hit_blocks, in_dram, MISS_REASONS.get(miss, Reason.NOT_HELD))

        return self._answer(ask, failed=lambda reason: LookupResult(reason=reason))

    def plan_load(
        self, hashes: Sequence[bytes], *, prefill_tokens_per_s: float = 0.0, deadline_s: float = LOOKUP_TIMEOUT_S
    ) -> LoadPlan:
        """How many leading blocks to load rather than to recompute, in place of a lookup. No side effect.

        Args:
            prefill_tokens_per_s: how fast this engine computes, as it measures it; 0.0: unknown, load all.

        Raises:
            InvalidRequest: the hashes are malformed or too many.
        """
        if not hashes:
            return LoadPlan()

        def ask(link: Link) -> LoadPlan:
            if not link.welcome.limits.queue_entries_max:  # a daemon from before there were plans
                looked = self.lookup(hashes, deadline_s=deadline_s)
                return LoadPlan(looked.blocks, looked.blocks, looked.dram_blocks, reason=looked.reason)
            request = pb.PlanLoadRequest(
                namespace_id=self._namespace_id(link),
                hashes=self.pack(hashes),
                prefill_tokens_per_s=prefill_tokens_per_s,
                copy_bytes_per_s=self._copy_bytes_per_s,
            )
            response = link.call("PlanLoad", request, deadline_s)
            return LoadPlan(
                response.load_blocks,
                response.hit_blocks,
                response.dram_blocks,
                response.load_s,
                response.recompute_s,
                MISS_REASONS.get(response.miss, Reason.NOT_HELD),
            )

        return self._answer(ask, failed=lambda reason: LoadPlan(reason=reason))

    def truncate(
        self,
        session_id: str,
        hashes: Sequence[bytes],
        *,
        source: Sequence[bytes] = (),
        keep: Sequence[tuple[int, int]] = (),
        drop_ratio: float = 0.5,
        sink_blocks: int = 0,
        deadline_s: float = LOOKUP_TIMEOUT_S,
    ) -> TruncateResult:
        """Keep a part of a session's chain under new hashes, at new positions; nothing is copied.

        Args:
            hashes: one new hash per kept block, which depends on the session and on what was dropped; none: only
                answer what would stay.
            source: the chain as it was; none: the one that the session used last.
            keep: token ranges [start, end) that stay, each shrunk to the whole blocks inside it; none: `drop_ratio`.
            drop_ratio: the part of the blocks that goes, rounded up: the oldest behind the first `sink_blocks`.

        Raises:
            InvalidRequest: no session, bad ranges, or hashes that do not match them or are not salted.
        """

        def ask(link: Link) -> TruncateResult:
            request = truncate_request(
                session_id,
                source=self.pack(source),
                keep=keep,
                drop_ratio=drop_ratio,
                sink_blocks=sink_blocks,
                hashes=self.pack(hashes),
            )
            if not link.welcome.limits.aliases_per_session_max:  # a daemon from before there were truncations
                return TruncateResult(reason=Reason.NOT_HELD)
            request.namespace_id = self._namespace_id(link)
            response = link.call("Truncate", request, deadline_s)
            reason = MISS_REASONS.get(response.miss, Reason.NOT_HELD)
            return TruncateResult(response.chain_blocks, kept_blocks(response), response.held_blocks, reason)

        return self._answer(ask, failed=lambda reason: TruncateResult(reason=reason))

    def prefetch(self, hashes: Sequence[bytes], *, session_id: str = "", request_id: str = "") -> PrefetchResult:
        """Bring blocks closer without waiting for them.

        Raises:
            InvalidRequest: the hashes are malformed or too many.
        """
        if not hashes:
            return PrefetchResult()

        def ask(link: Link) -> PrefetchResult:
            request = pb.PrefetchRequest(
                namespace_id=self._namespace_id(link),
                hashes=self.pack(hashes),
                session_id=session_id,
                request_id=request_id,
            )
            response = link.call("Prefetch", request, LOOKUP_TIMEOUT_S)
            in_dram = sum(run.blocks for run in response.runs if run.held == pb.TIER_DRAM)
            started = sum(run.blocks for run in response.runs if run.WhichOneof("outcome") == "started")
            return PrefetchResult(in_dram, started)

        return self._answer(ask, failed=lambda reason: PrefetchResult(reason=reason))

    def update_queue(self, waiting: Sequence[WaitingRequest], *, started: Collection[str] = ()) -> None:
        """Tell the daemon what this engine will need: its waiting requests, the next to start first.

        Returns at once: a thread sends what changed, and begins anew when the daemon does. It never fails; without it
        the daemon only knows of a request when it reads.

        Args:
            waiting: the whole queue. Not to be changed afterwards; keep each request's `hashes` object.
            started: ids of those that left the queue because they run now.
        """
        if self._attachment.status is Status.FORKED:
            return  # before the lock, which a thread of the parent may have held
        with self._feed_lock:
            if self._attachment.status is Status.CLOSED:
                return
            feed = self._feed = self._feed or QueueFeed(self._attachment.link)
        feed.update(waiting, started)

    def hint_session(self, session_id: str, resumption: Resumption) -> bool:
        """Tell the daemon when an idle conversation resumes; whether it knows the conversation.

        Raises:
            InvalidRequest: the id is empty or too long.
        """
        hint = pb.SessionHint(session_id=session_id)
        if resumption.is_typing:
            hint.typing.SetInParent()
        elif resumption.in_s is None:
            hint.finished.SetInParent()
        else:
            hint.resumes_in_ms = int(1000 * min(max(resumption.in_s, 0.0), 1e6))

        def ask(link: Link) -> bool:
            if not link.welcome.limits.session_hints_max:
                return False  # a daemon from before there were hints
            request = pb.HintSessionsRequest(namespace_id=self._namespace_id(link), hints=[hint])
            return bool(link.call("HintSessions", request, LOOKUP_TIMEOUT_S).known)

        return self._answer(ask, failed=lambda reason: False)

    def _answer(self, ask: Callable[[Link], ResultT], *, failed: Callable[[Reason], ResultT]) -> ResultT:
        """What the daemon says; only the caller's own mistakes raise (InvalidRequest), other errors are a result."""
        try:
            return ask(self._attachment.link())
        except InvalidRequest:
            raise
        except KVServiceError as error:
            return failed(self.reason_of(error))

    def _close_feed(self) -> None:
        with self._feed_lock:
            feed, self._feed = self._feed, None
        if feed is not None:
            feed.close()

    def _copied(self, size_bytes: int, seconds: float) -> None:
        """A load copied so many bytes out of shared memory: remembered for `plan_load`."""
        if size_bytes >= _SPEED_BYTES_MIN and seconds > 0:
            seen, known = size_bytes / seconds, self._copy_bytes_per_s
            self._copy_bytes_per_s = known + _SPEED_SMOOTHING * (seen - known) if known else seen

    def pack(self, hashes: Sequence[bytes]) -> bytes:
        """The hashes as messages carry them. Raises InvalidRequest: one has another size than the namespace's."""
        size = self.namespace.hash_size_bytes
        if list(map(len, hashes)).count(size) != len(hashes):
            raise InvalidRequest(f"every hash of this namespace has {size} bytes")
        return b"".join(hashes)

    def _namespace_id(self, link: Link) -> int:
        return link.welcome.namespace_ids[0]

    def reason_of(self, error: KVServiceError) -> Reason:
        """What the facade answers for an error."""
        return Reason.CLOSED if self._attachment.status is Status.CLOSED else reason_of(error)
