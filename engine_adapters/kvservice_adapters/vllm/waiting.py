"""waiting: the engine's requests as the scheduler's half sees them, and which of them wait, in order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvservice_adapters.vllm.truncation import Truncation, TruncationOutcome

SESSION_LENGTH_MAX = 200


@dataclass(slots=True, eq=False)
class TrackedRequest:
    """One unfinished request.

    Attributes:
        request: the engine's own, live object: status, priority, tokens and hashes are current.
        session_id: the conversation it belongs to; "" when nobody said.
        params: kv_transfer_params as the client sent them.
        hashes: one per full block of its tokens so far; see `hashing`.
        local_blocks: leading blocks that the engine itself held when it last asked for more.
        saved_blocks: leading blocks that the workers were told to save, in the blocks it has since the last preemption.
        preemptions: how many of them `saved_blocks` has seen.
        asked_at_s: when its lookup was asked for.
        is_late: its lookup took too long, it is computed.
        loading_ids: the engine's blocks that a load is filling.
        has_failed_load: a load did not deliver; the rest is computed.
        truncation: how its conversation was cut; None: it was not, or what was said of that was refused.
        truncation_outcome: what became of that; None: nothing was said.
    """

    request: Any
    session_id: str
    params: Mapping[str, Any]
    hashes: list[bytes] = field(default_factory=list)
    local_blocks: int = 0
    saved_blocks: int = 0
    preemptions: int = 0
    asked_at_s: float = 0.0
    is_late: bool = False
    loading_ids: frozenset[int] = frozenset()
    has_failed_load: bool = False
    truncation: Truncation | None = None
    truncation_outcome: TruncationOutcome | None = None

    @property
    def request_id(self) -> str:
        """The engine's name for it."""
        return str(self.request.request_id)


class WaitingRequests:
    """Every unfinished request by its id, and the order in which the waiting ones will run."""

    def __init__(self, *, by_priority: bool) -> None:
        self._by_priority = by_priority
        self._tracked: dict[str, TrackedRequest] = {}

    def add(self, tracked: TrackedRequest) -> None:
        """A request arrived."""
        self._tracked[tracked.request_id] = tracked

    def get(self, request_id: str) -> TrackedRequest | None:
        """None: it arrived before the adapter saw it, or is finished."""
        return self._tracked.get(request_id)

    def pop(self, request_id: str) -> TrackedRequest | None:
        """A request is finished; None: see `get`."""
        return self._tracked.pop(request_id, None)

    def __len__(self) -> int:
        return len(self._tracked)

    def __iter__(self) -> Iterator[TrackedRequest]:
        return iter(list(self._tracked.values()))

    def in_order(self) -> list[TrackedRequest]:
        """Those that wait, next first: by priority where the engine does so, preempted ones, then by arrival."""
        waiting = [tracked for tracked in self._tracked.values() if _is_waiting(tracked.request)]
        return sorted(waiting, key=self._rank)

    def _rank(self, tracked: TrackedRequest) -> tuple[float, ...]:
        request = tracked.request
        if self._by_priority:
            return (request.priority, request.arrival_time)
        return (0 if request.num_preemptions else 1, request.arrival_time)


def _is_waiting(request: Any) -> bool:
    return not request.is_finished() and request.status.name != "RUNNING"


def tags_of(request: Any) -> tuple[str, Mapping[str, Any]]:
    """The session and the kv_transfer_params of an engine's request.

    The session is `session_id` of the API, else "session_id" in kv_transfer_params; a digest of it where it is long.
    """
    params = request.kv_transfer_params
    params = params if isinstance(params, Mapping) else {}
    session = getattr(request, "session_id", None) or params.get("session_id") or ""
    session = str(session)
    if len(session) > SESSION_LENGTH_MAX:
        session = "sha256:" + hashlib.sha256(session.encode()).hexdigest()
    return session, params
