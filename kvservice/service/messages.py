"""Translation between the contract's messages and the store's nouns. No decisions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from kvservice.blocks import DropReason, NamespaceKey, NamespaceSpec, Slots, Tenant, Tier
from kvservice.dram import SlotPool
from kvservice.errors import InvalidRequest
from kvservice.store import outcomes
from kvservice.store.explain import HASH_SIZE_BYTES_MAX, HASH_SIZE_BYTES_MIN
from kvservice.store.truncating import DropOldest, KeepRanges
from kvservice_proto.v1 import kvservice_pb2 as pb

TEXT_LENGTH_MAX = 200
NAME_LENGTH_MAX = 100
FINGERPRINT_BYTES_MIN, FINGERPRINT_BYTES_MAX = 16, 64

TIERS = {Tier.DRAM: pb.TIER_DRAM, Tier.NVME: pb.TIER_NVME}
MISSES = {
    outcomes.Miss.NOT_HELD: pb.MISS_REASON_NOT_HELD,
    outcomes.Miss.BEING_WRITTEN: pb.MISS_REASON_BEING_WRITTEN,
    outcomes.Miss.PREFIX_MISSING: pb.MISS_REASON_PREFIX_MISSING,
    outcomes.Miss.OVER_LIMIT: pb.MISS_REASON_OVER_LIMIT,
    outcomes.Miss.CORRUPT: pb.MISS_REASON_CORRUPT,
    outcomes.Miss.TIER_OFFLINE: pb.MISS_REASON_TIER_OFFLINE,
    outcomes.Miss.OTHER_SESSION: pb.MISS_REASON_OTHER_SESSION,
}
REFUSALS = {
    outcomes.Written.PARENT_MISSING: pb.REFUSED_REASON_PARENT_MISSING,
    outcomes.Written.OTHER_SESSION: pb.REFUSED_REASON_OTHER_SESSION,
}
DROPS = {
    DropReason.CAPACITY: pb.DROP_REASON_CAPACITY,
    DropReason.RECLAIMED: pb.DROP_REASON_RECLAIMED,
    DropReason.QUOTA: pb.DROP_REASON_QUOTA,
    DropReason.FORGOTTEN: pb.DROP_REASON_FORGOTTEN,
    DropReason.EXPIRED: pb.DROP_REASON_EXPIRED,
    DropReason.CORRUPT: pb.DROP_REASON_CORRUPT,
    DropReason.PREFIX_LOST: pb.DROP_REASON_PREFIX_LOST,
    DropReason.ABORTED: pb.DROP_REASON_ABORTED,
    DropReason.SOURCE_LOST: pb.DROP_REASON_SOURCE_LOST,
    DropReason.ALIAS_LIMIT: pb.DROP_REASON_ALIAS_LIMIT,
}


def require_text(text: str, field: str, *, length_max: int = TEXT_LENGTH_MAX) -> str:
    """Raise InvalidRequest if the text is too long."""
    if len(text) > length_max:
        raise InvalidRequest(f"{field} has {len(text)} characters, at most {length_max}", field=field)
    return text


def require_between(value: int, low: int, high: int, field: str) -> int:
    """Raise InvalidRequest if the value is out of bounds."""
    if not low <= value <= high:
        raise InvalidRequest(f"{field} is {value}, must be {low} to {high}", field=field)
    return value


def namespace_spec(message: pb.Namespace, tenant: Tenant, *, block_size_bytes_max: int) -> NamespaceSpec:
    """The declared namespace inside the tenant. Raises InvalidRequest naming field and bound."""
    require_between(len(message.fingerprint), FINGERPRINT_BYTES_MIN, FINGERPRINT_BYTES_MAX, "fingerprint length")
    return NamespaceSpec(
        key=NamespaceKey(tenant, message.fingerprint),
        label=require_text(message.label, "label"),
        block_size_bytes=require_between(message.block_size_bytes, 1, block_size_bytes_max, "block_size_bytes"),
        tokens_per_block=require_between(message.tokens_per_block, 1, 1 << 20, "tokens_per_block"),
        hash_size_bytes=require_between(
            message.hash_size_bytes, HASH_SIZE_BYTES_MIN, HASH_SIZE_BYTES_MAX, "hash_size_bytes"
        ),
    )


def handles(pool: SlotPool, slots: Slots) -> Iterable[tuple[int, pb.Handles]]:
    """(blocks, their handles) for each run of slots in one segment."""
    if not len(slots):
        return
    for segment, places, generations in pool.locate(slots):
        yield (
            len(places),
            pb.Handles(
                shared_memory=pb.SharedMemoryHandles(
                    segment_id=segment.segment_id, slots=places.tolist(), generations=generations.tolist()
                )
            ),
        )


def lookup_response(looked: outcomes.Looked) -> pb.LookupResponse:
    """Lookup's answer."""
    response = pb.LookupResponse(hit_blocks=looked.hit_blocks)
    parts = ((0, looked.dram_blocks, pb.TIER_DRAM), (looked.dram_blocks, looked.hit_blocks, pb.TIER_NVME))
    for start, end, tier in parts:
        for blocks, shift in shift_runs(looked.shifts, start, end):
            response.runs.add(blocks=blocks, held=tier, shift_tokens=shift)
    for blocks, miss in misses(looked.blocks - looked.hit_blocks, looked.miss):
        response.runs.add(blocks=blocks, miss=miss)
    return response


def misses(blocks: int, first: outcomes.Miss) -> Iterable[tuple[int, pb.MissReason]]:
    """(blocks, reason) of the misses after a prefix: why it ends, and that the rest follows a miss."""
    if first is outcomes.Miss.OVER_LIMIT:
        yield from [(blocks, pb.MISS_REASON_OVER_LIMIT)] * bool(blocks)
    elif blocks:
        yield 1, MISSES[first]
        if blocks > 1:
            yield blocks - 1, pb.MISS_REASON_PREFIX_MISSING


def get_response(granted: outcomes.Granted) -> pb.GetResponse:
    """Get's first answer: the lease and the leading blocks that are in DRAM already."""
    response = pb.GetResponse(lease_id=granted.hold_id, lease_ms=int(granted.duration_s * 1000))
    ready = min(granted.pending, default=len(granted.slots))
    add_handles(response, granted, 0, ready)
    if not granted.pending:
        add_misses(response, granted.missed, granted.miss)
    return response


def add_handles(response: pb.GetResponse, granted: outcomes.Granted, start: int, end: int) -> None:
    """Hand out the blocks at positions start to end."""
    for shifted, shift in shift_runs(granted.shifts, start, end):
        for blocks, of_run in handles(granted.pool, granted.slots[start : start + shifted]):
            response.runs.add(blocks=blocks, handles=of_run, shift_tokens=shift)
        start += shifted


def shift_runs(shifts: Sequence[int], start: int, end: int) -> Iterable[tuple[int, int]]:
    """(blocks, shift in tokens) of equal neighbours between two positions; no shifts: all are 0."""
    if not shifts:
        return [(end - start, 0)] if end > start else []
    return [(sum(1 for _ in group), shift) for shift, group in groupby(shifts[start:end])]


def add_misses(response: pb.GetResponse, blocks: int, first: outcomes.Miss) -> None:
    """The rest of the blocks are misses."""
    for count, miss in misses(blocks, first):
        response.runs.add(blocks=count, miss=miss)


def put_response(reserved: outcomes.Reserved, *, is_copied_here: bool = False) -> pb.PutResponse:
    """Put's answer; `is_copied_here`: the daemon writes into what was reserved."""
    response = pb.PutResponse(reservation_id=reserved.hold_id, lease_ms=int(reserved.duration_s * 1000))
    for blocks, written in reserved.known:
        if written is outcomes.Written.HELD:
            response.runs.add(blocks=blocks, held=pb.Held())
        elif written is outcomes.Written.BEING_WRITTEN:
            response.runs.add(blocks=blocks, being_written=pb.BeingWritten())
        else:
            response.runs.add(blocks=blocks, refused=pb.Refused(reason=REFUSALS[written]))
    if is_copied_here and len(reserved.slots):
        response.runs.add(blocks=len(reserved.slots), reserved=pb.Handles(device=pb.DeviceHandles()))
        return response
    for blocks, of_run in handles(reserved.pool, reserved.slots):
        response.runs.add(blocks=blocks, reserved=of_run)
    return response


def commit_response(runs: Iterable[tuple[int, outcomes.Committed | DropReason]]) -> pb.CommitResponse:
    """Commit's answer."""
    response = pb.CommitResponse()
    for blocks, outcome in runs:
        if outcome is outcomes.Committed.PUBLISHED:
            response.runs.add(blocks=blocks, published=pb.Published())
        elif outcome is outcomes.Committed.AWAITING_PARENT:
            response.runs.add(blocks=blocks, awaiting_parent=pb.AwaitingParent())
        elif isinstance(outcome, DropReason):
            response.runs.add(blocks=blocks, dropped=DROPS[outcome])
    return response


def kept_part(request: pb.TruncateRequest) -> KeepRanges | DropOldest:
    """What a Truncate keeps. Raises InvalidRequest if it does not say."""
    match request.WhichOneof("keep"):
        case "ranges":
            return KeepRanges([(one.start, one.end) for one in request.ranges.ranges])
        case "drop_ratio":
            return DropOldest(request.drop_ratio, request.sink_blocks)
        case _:
            raise InvalidRequest("say what stays: ranges or drop_ratio", field="keep")


def truncate_response(truncated: outcomes.Truncated) -> pb.TruncateResponse:
    """Truncate's answer."""
    is_all = truncated.held_blocks == sum(run.blocks for run in truncated.kept) and truncated.kept
    return pb.TruncateResponse(
        chain_blocks=truncated.chain_blocks,
        kept_runs=[
            pb.KeptRun(first_block=run.first_block, blocks=run.blocks, new_first_block=run.new_first_block)
            for run in truncated.kept
        ],
        held_blocks=truncated.held_blocks,
        miss=pb.MISS_REASON_UNSPECIFIED if is_all else MISSES[truncated.miss],
    )


def prefetch_response(prefetched: outcomes.Prefetched) -> pb.PrefetchResponse:
    """Prefetch's answer."""
    response = pb.PrefetchResponse()
    if prefetched.dram_blocks:
        response.runs.add(blocks=prefetched.dram_blocks, held=pb.TIER_DRAM)
    if prefetched.started_blocks:
        response.runs.add(blocks=prefetched.started_blocks, started=pb.Started())
    for blocks, miss in misses(prefetched.missed, prefetched.miss):
        response.runs.add(blocks=blocks, miss=miss)
    return response


def explain_response(explanations: Iterable[outcomes.Explanation]) -> pb.ExplainResponse:
    """Explain's answer."""
    response = pb.ExplainResponse()
    for explanation in explanations:
        message = response.explanations.add()
        if explanation.spec is not None:
            message.label = explanation.spec.label
            message.fingerprint = explanation.spec.key.fingerprint
        _put_finding(message, explanation.finding)
    return response


def _put_finding(message: pb.Explanation, finding: outcomes.Finding) -> None:
    match finding:
        case outcomes.Held():
            message.held.CopyFrom(
                pb.HeldFinding(
                    tiers=[TIERS[tier] for tier in finding.tiers],
                    depth=finding.depth,
                    children=finding.children,
                    idle_s=finding.idle_s,
                    uses=finding.uses,
                    holders=finding.holders,
                    checksummed=finding.is_checksummed,
                )
            )
        case outcomes.BeingStored():
            message.reserved.CopyFrom(pb.ReservedFinding(age_s=finding.age_s, written=finding.is_written))
        case outcomes.Dropped():
            message.dropped.CopyFrom(
                pb.DroppedFinding(reason=DROPS[finding.reason], ago_s=finding.ago_s, idle_s=finding.idle_s)
            )
        case outcomes.Offline():
            message.tier_offline.CopyFrom(pb.TierOffline(tier=TIERS[finding.tier], why=finding.why))
        case outcomes.Elsewhere():
            message.namespace_mismatch.CopyFrom(pb.NamespaceMismatch(held_under_labels=finding.labels))
        case outcomes.NotRemembered():
            message.not_remembered.CopyFrom(
                pb.NotRemembered(history_blocks=finding.history_blocks, horizon_s=finding.horizon_s)
            )
