"""UpdateQueue, HintSessions and PlanLoad: translation only."""

from __future__ import annotations

import math
from collections.abc import Iterable

from kvservice.errors import InvalidRequest
from kvservice.lookahead import Speeds
from kvservice.queues import Applied, Entry, Moved, QueueDelta, QueueSnapshot, QueueUpdate, UpdateOutcome
from kvservice.service.messages import MISSES, TEXT_LENGTH_MAX, require_between, require_text
from kvservice.store.outcomes import PlannedLoad
from kvservice_proto.v1 import kvservice_pb2 as pb

SESSION_HINTS_MAX = 256
"""Of one HintSessions."""

TYPING_RESUMES_IN_S = 5.0
"""Somebody who types sends within a few seconds."""

_OUTCOMES = {
    UpdateOutcome.APPLIED: pb.QUEUE_OUTCOME_APPLIED,
    UpdateOutcome.OUTDATED: pb.QUEUE_OUTCOME_OUTDATED,
    UpdateOutcome.SNAPSHOT_WANTED: pb.QUEUE_OUTCOME_SNAPSHOT_WANTED,
}


def queue_update(request: pb.UpdateQueueRequest) -> QueueUpdate:
    """The update as a noun.

    Raises:
        InvalidRequest: a field is missing or too long.
    """
    require_between(request.epoch, 1, (1 << 63) - 1, "epoch")
    match request.WhichOneof("update"):
        case "snapshot":
            return QueueSnapshot(request.epoch, [_entry(entry) for entry in request.snapshot.entries])
        case "delta":
            delta = request.delta
            require_between(delta.sequence, 1, (1 << 32) - 1, "sequence")
            return QueueDelta(
                epoch=request.epoch,
                sequence=delta.sequence,
                started=_ids(delta.started_ids, "started_ids"),
                removed=_ids(delta.removed_ids, "removed_ids"),
                moved=[Moved(_id(move.request_id, "request_id"), move.position) for move in delta.moves],
                added=[(addition.position, _entry(addition.entry)) for addition in delta.additions],
            )
        case _:
            raise InvalidRequest("send a snapshot or a delta", field="update")


def queue_response(applied: Applied) -> pb.UpdateQueueResponse:
    """UpdateQueue's answer."""
    return pb.UpdateQueueResponse(outcome=_OUTCOMES[applied.outcome], epoch=applied.epoch, sequence=applied.sequence)


def session_hints(request: pb.HintSessionsRequest) -> list[tuple[str, float]]:
    """(session id, seconds until it resumes; inf: never).

    Raises:
        InvalidRequest: too many, or one without a session or a hint.
    """
    require_between(len(request.hints), 1, SESSION_HINTS_MAX, "number of hints")
    return [(_id(hint.session_id, "session_id"), _resumes_in_s(hint)) for hint in request.hints]


def plan_response(planned: PlannedLoad) -> pb.PlanLoadResponse:
    """PlanLoad's answer."""
    looked, plan = planned.looked, planned.plan
    return pb.PlanLoadResponse(
        load_blocks=plan.blocks,
        hit_blocks=looked.hit_blocks,
        dram_blocks=looked.dram_blocks,
        miss=MISSES[looked.miss] if looked.hit_blocks < looked.blocks else pb.MISS_REASON_UNSPECIFIED,
        load_s=plan.load_s,
        recompute_s=plan.recompute_s,
    )


def engine_speeds(request: pb.PlanLoadRequest) -> Speeds:
    """What the caller measured of itself.

    Raises:
        InvalidRequest: a rate is none.
    """
    for field in ("prefill_tokens_per_s", "copy_bytes_per_s"):
        value = getattr(request, field)
        if not (math.isfinite(value) and value >= 0.0):
            raise InvalidRequest(f"{field} is {value}, must be finite and not negative", field=field)
    return Speeds(request.prefill_tokens_per_s, request.copy_bytes_per_s)


def _resumes_in_s(hint: pb.SessionHint) -> float:
    match hint.WhichOneof("hint"):
        case "resumes_in_ms":
            return float(hint.resumes_in_ms) / 1000
        case "typing":
            return TYPING_RESUMES_IN_S
        case "finished":
            return math.inf
        case _:
            raise InvalidRequest("say when it resumes, that its user is typing, or that it is finished", field="hint")


def _entry(entry: pb.QueueEntry) -> Entry:
    return Entry(
        request_id=_id(entry.request_id, "request_id"),
        packed=entry.hashes,
        prefix_request_id=require_text(entry.prefix_request_id, "prefix_request_id"),
        prefix_blocks=entry.prefix_blocks,
        session_id=require_text(entry.session_id, "session_id"),
        new_tokens=entry.new_tokens,
        priority=entry.priority,
    )


def _ids(request_ids: Iterable[str], field: str) -> list[str]:
    return [_id(request_id, field) for request_id in request_ids]


def _id(text: str, field: str) -> str:
    if not 1 <= len(text) <= TEXT_LENGTH_MAX:
        raise InvalidRequest(f"{field} has {len(text)} characters, must be 1 to {TEXT_LENGTH_MAX}", field=field)
    return text
