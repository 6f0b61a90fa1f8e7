"""Truncate's request and answer in plain values."""

from __future__ import annotations

from collections.abc import Sequence

from kvservice_client.outcomes import KeptBlocks, ShiftedBlocks
from kvservice_proto.v1 import kvservice_pb2 as pb


def truncate_request(
    session_id: str,
    *,
    source: bytes,
    keep: Sequence[tuple[int, int]],
    drop_ratio: float,
    sink_blocks: int,
    hashes: bytes,
) -> pb.TruncateRequest:
    """The request; `keep` goes before `drop_ratio`."""
    request = pb.TruncateRequest(session_id=session_id, source=source, hashes=hashes)
    if keep:
        ranges = [pb.TokenRange(start=start, end=end) for start, end in keep]
        request.ranges.CopyFrom(pb.TokenRanges(ranges=ranges))
    else:
        request.drop_ratio = drop_ratio
        request.sink_blocks = sink_blocks
    return request


def kept_blocks(response: pb.TruncateResponse) -> tuple[KeptBlocks, ...]:
    """What stays, as the answer says."""
    return tuple(KeptBlocks(run.first_block, run.blocks, run.new_first_block) for run in response.kept_runs)


def shifted_blocks(shifts: Sequence[int], blocks: int) -> tuple[ShiftedBlocks, ...]:
    """Runs of the leading blocks whose shift is the same and not 0."""
    if not any(shifts[:blocks]):  # nearly always
        return ()
    runs: list[ShiftedBlocks] = []
    start = 0
    for position in range(1, blocks + 1):
        if position == blocks or shifts[position] != shifts[start]:
            if shifts[start]:
                runs.append(ShiftedBlocks(start, position - start, shifts[start]))
            start = position
    return tuple(runs)
