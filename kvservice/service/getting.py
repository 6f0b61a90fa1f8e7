"""The Get stream: the lease first, then blocks in order as they arrive from NVMe."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from kvservice.service import messages
from kvservice.store.arrivals import Landing
from kvservice.store.outcomes import Granted, Miss
from kvservice_proto.v1 import kvservice_pb2 as pb

_MISSES = {
    Landing.CORRUPT: Miss.CORRUPT,
    Landing.TIER_OFFLINE: Miss.TIER_OFFLINE,
    Landing.GONE: Miss.NOT_HELD,
}


@dataclass(frozen=True, slots=True)
class Landed:
    """How many blocks of a Get lead in DRAM, and why not more."""

    blocks: int
    miss: Miss


async def landed_prefix(granted: Granted, *, wait_s: float | None) -> Landed:
    """Wait, in order, for what is being read.

    Args:
        wait_s: at most so long; None: as long as the call lasts.
    """
    loop = asyncio.get_running_loop()
    ends_at_s = None if wait_s is None else loop.time() + wait_s
    for position in sorted(granted.pending):
        landing = await _landing(granted, position, None if ends_at_s is None else ends_at_s - loop.time())
        if landing is not Landing.OK:
            return Landed(position, Miss.OVER_LIMIT if landing is None else _MISSES[landing])
    return Landed(len(granted.slots), granted.miss)


async def responses(granted: Granted, *, wait_s: float | None) -> AsyncIterator[pb.GetResponse]:
    """Every message of one Get.

    Args:
        wait_s: how long to wait for blocks that are being read; None: as long as the call lasts.
    """
    yield messages.get_response(granted)
    loop = asyncio.get_running_loop()
    ends_at_s = None if wait_s is None else loop.time() + wait_s
    position = min(granted.pending, default=len(granted.slots))
    while position < len(granted.slots):
        landing = await _landing(granted, position, None if ends_at_s is None else ends_at_s - loop.time())
        if landing is not Landing.OK:
            response = pb.GetResponse()
            rest = granted.asked - position
            messages.add_misses(response, rest, Miss.OVER_LIMIT if landing is None else _MISSES[landing])
            yield response
            return
        end = position + 1
        while end < len(granted.slots) and _has_landed(granted, end):
            end += 1
        response = pb.GetResponse()
        messages.add_handles(response, granted, position, end)
        if end == len(granted.slots):
            messages.add_misses(response, granted.missed, granted.miss)
        yield response
        position = end


async def _landing(granted: Granted, position: int, timeout_s: float | None) -> Landing | None:
    """How the block at that position came; None: not in time."""
    arrival = granted.pending.get(position)
    if arrival is None:
        return Landing.OK
    try:
        async with asyncio.timeout(timeout_s):
            landed = await asyncio.shield(arrival.landed)
    except TimeoutError:
        return None
    return landed[int(granted.rows[position])]


def _has_landed(granted: Granted, position: int) -> bool:
    arrival = granted.pending.get(position)
    if arrival is None:
        return True
    return arrival.landed.done() and arrival.landed.result()[int(granted.rows[position])] is Landing.OK
