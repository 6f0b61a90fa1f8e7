"""replay: the plain block replay in the order of arrival: which blocks are held when a request comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvservice.policies import EvictionPolicy, make_policy
from kvservice.simulate.oracle import Belady
from kvservice.simulate.outcome import Outcome
from kvservice.simulate.requests import Request
from kvservice.simulate.tiers import Tiers, Waiting

ORACLE = "belady"


def replay(
    requests: Sequence[Request],
    policy: str,
    *,
    queue_window: int,
    dram_blocks: int,
    block_bytes: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Serve the requests one after the other.

    Before request i the queue is i+1 .. i+queue_window. Its hit is the leading blocks that are held; then all of its
    blocks are touched or stored.
    """
    oracle = Belady(requests) if policy == ORACLE else None
    chosen: EvictionPolicy = oracle or make_policy(policy)
    tiers = Tiers(chosen, make_policy("fifo"), dram_blocks=dram_blocks, nvme_blocks=0, block_bytes=block_bytes)
    if oracle:
        oracle.hash_of = tiers.namespace.index.hash_of
    waiting = Waiting(tiers)
    for order, request in enumerate(requests[1 : 1 + queue_window], 1):
        waiting.add(request.number, request.hashes, float(order))
    outcome = Outcome(policy=policy, queue_window=queue_window, dram_blocks=dram_blocks, nvme_blocks=0)
    for at, request in enumerate(requests):
        now_s = 1.0 + request.arrival_s
        if oracle:
            oracle.at = at
        if request.truncated:
            tiers.truncate(request.hashes, request.truncated)
        rows = tiers.held(request.hashes)
        outcome.hit_of(len(request.hashes), dram=len(rows), nvme=0)
        tiers.namespace.touch(rows, now_s)
        stored = tiers.store(request.stored, now_s)
        waiting.stored([tiers.namespace.index.hash_of(row) for row in stored.tolist()])
        if queue_window and at + 1 < len(requests):
            waiting.remove(requests[at + 1].number)
            if at + 1 + queue_window < len(requests):
                coming = requests[at + 1 + queue_window]
                waiting.add(coming.number, coming.hashes, float(at + 1 + queue_window))
        on_progress(at + 1)
    tiers.check()
    return outcome
