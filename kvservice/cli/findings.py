"""findings: what the daemon found out about a hash, in words a person understands, each with the next step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvservice.cli.messages import enum_name
from kvservice.cli.words import count, duration, foreign
from kvservice_proto.v1 import kvservice_pb2 as pb


@dataclass(frozen=True, slots=True)
class Told:
    """One finding told.

    summary: hit or miss, and why, in one sentence. details: further facts, one each. next_step: what to do about it.
    """

    summary: str
    details: tuple[str, ...]
    next_step: str


def tell(explanation: pb.Explanation) -> Told:
    """The explanation of one hash in one namespace, in words."""
    match explanation.WhichOneof("finding"):
        case "held":
            return _held(explanation.held)
        case "reserved":
            return _reserved(explanation.reserved)
        case "dropped":
            return _dropped(explanation.dropped)
        case "namespace_mismatch":
            return _namespace_mismatch(explanation.namespace_mismatch)
        case "not_remembered":
            return _not_remembered(explanation.not_remembered)
        case "tier_offline":
            return _tier_offline(explanation.tier_offline)
        case _:
            return Told(
                "The daemon's answer is of a kind that this command does not know.",
                (),
                "Update this command to the daemon's version (kvservice stats shows it).",
            )


def _held(held: pb.HeldFinding) -> Told:
    tiers = " and ".join(_tier(tier) for tier in held.tiers)
    place = f"{count(held.depth, 'block')} before it in its chain" if held.depth else "the first block of its chain"
    followed = f"{count(held.children, 'block')} held right after it" if held.children else "nothing held after it"
    used = f"handed out {count(held.uses, 'time')}" if held.uses else "never handed out"
    checksum = "made" if held.checksummed else "not made yet; it is made before the bytes leave DRAM"
    return Told(
        f"A hit: held in {tiers}.",
        (
            f"Place: {place}; {followed}.",
            f"Use: {used}, last used {duration(held.idle_s)} ago; {count(held.holders, 'lease')} on it now.",
            f"Checksum: {checksum}.",
        ),
        "Nothing to do. If a Get still missed it, an earlier block of that prompt was missing then: explain the first "
        "block that missed.",
    )


def _reserved(reserved: pb.ReservedFinding) -> Told:
    age = duration(reserved.age_s)
    if reserved.written:
        return Told(
            f"A miss for now: reserved {age} ago and written, but the block before it is not readable yet.",
            (),
            "It becomes readable together with the block before it, which another writer holds: explain that one.",
        )
    return Told(
        f"A miss for now: reserved {age} ago by a writer that has not committed it.",
        (),
        "Wait for the writer. If the age comes near the lease time, the writer hangs or is slow: kvservice top shows "
        "which instance holds reservations.",
    )


_DROPS: Mapping[int, tuple[str, str]] = {
    pb.DROP_REASON_CAPACITY: (
        "evicted to make room for another block of its namespace",
        "If it was needed soon after it was last used, the tier is too small for the working set: raise dram_bytes.",
    ),
    pb.DROP_REASON_RECLAIMED: (
        "evicted because its memory or disk space went to another namespace",
        "Raise dram_bytes or nvme_bytes, or give the other one a quota in [namespaces]; kvservice stats names it.",
    ),
    pb.DROP_REASON_QUOTA: (
        "evicted to keep its namespace within its quota",
        "Raise dram_quota_bytes or nvme_quota_bytes for its label in [namespaces], if there is room for it.",
    ),
    pb.DROP_REASON_FORGOTTEN: (
        "dropped because somebody asked to forget its session or its namespace",
        "Nothing, if that was meant. Otherwise look in the engine's log for who calls forget.",
    ),
    pb.DROP_REASON_EXPIRED: (
        "dropped because its time to live passed",
        "Nothing, if that was meant; saving it again brings it back. Otherwise raise ttl_s for its label.",
    ),
    pb.DROP_REASON_CORRUPT: (
        "dropped because its bytes no longer matched their checksum",
        "If kvservice_checksum_failures_total keeps rising, suspect the memory, or an engine that writes after commit.",
    ),
    pb.DROP_REASON_PREFIX_LOST: (
        "dropped because a block before it in its chain left, which made it unreachable",
        "Explain the blocks before it in the same prompt: one of them left for a reason of its own.",
    ),
    pb.DROP_REASON_ABORTED: (
        "reserved but never committed: the writer gave up, died, or took longer than its lease",
        "Look in the engine's log for that time. If saves are slow rather than broken, raise lease_s.",
    ),
    pb.DROP_REASON_SOURCE_LOST: (
        "of a truncated conversation, and dropped because the block that had its bytes left",
        "The conversation was not used for long enough: raise dram_bytes or nvme_bytes to keep more of them.",
    ),
    pb.DROP_REASON_ALIAS_LIMIT: (
        "of a truncated conversation, and dropped because later truncations took its place",
        "Raise aliases_per_session_max, aliases_per_instance_max or aliases_max if it was still wanted.",
    ),
}


def _dropped(dropped: pb.DroppedFinding) -> Told:
    reason = enum_name(pb.DropReason.DESCRIPTOR, dropped.reason)
    what, next_step = _DROPS.get(
        dropped.reason, (f"dropped ({reason})", "Update this command to the daemon's version to read the reason.")
    )
    details = () if dropped.reason == pb.DROP_REASON_ABORTED else (f"Unused for {duration(dropped.idle_s)} by then.",)
    return Told(f"A miss: {what}, {duration(dropped.ago_s)} ago.", details, next_step)


def _namespace_mismatch(mismatch: pb.NamespaceMismatch) -> Told:
    labels = ", ".join(f'"{foreign(label)}"' for label in mismatch.held_under_labels)
    return Told(
        f"A miss here: held, but under another namespace: {labels}.",
        (),
        "The two engines differ in something that makes their bytes incompatible: model, revision, dtype, layout, "
        "tokens per block, parallel rank, or the salt. Compare their settings; if they should share, make those equal.",
    )


def _not_remembered(not_remembered: pb.NotRemembered) -> Told:
    if not_remembered.history_blocks == 0:
        memory = "The daemon remembers no dropped blocks: you have no namespace there, or explain_history_blocks is 0."
    elif not_remembered.horizon_s == 0:
        memory = f"It remembers the last {count(not_remembered.history_blocks, 'block')} that left; so far none has."
    else:
        memory = (
            f"It remembers the last {count(not_remembered.history_blocks, 'block')} that left, "
            f"{duration(not_remembered.horizon_s)} back."
        )
    return Told(
        "A miss: never stored since the daemon started, or it left too long ago to be remembered.",
        (memory,),
        "Check that the engine saves (kvservice_block_puts_total by outcome) and that both engines make the same hash: "
        "same tokens from the very first, same namespace, same salt. For a longer memory raise explain_history_blocks.",
    )


def _tier_offline(offline: pb.TierOffline) -> Told:
    return Told(
        f"A miss for now: held in {_tier(offline.tier)}, which is offline: {foreign(offline.why)}.",
        (),
        "Bring the tier back; the block is a hit again then, without being saved again.",
    )


def _tier(tier: int) -> str:
    return enum_name(pb.Tier.DESCRIPTOR, tier).upper().replace("NVME", "NVMe")
