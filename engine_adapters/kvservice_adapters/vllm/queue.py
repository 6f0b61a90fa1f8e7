"""queue: tells the daemon which requests wait, in order, so that it fetches ahead and keeps what they need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import kvservice_client as kv
from kvservice_adapters.vllm.waiting import TrackedRequest


class QueueTeller:
    """Called after every step of the scheduler; costs nothing while nothing changed, and never waits."""

    def __init__(self, clients: Sequence[kv.Client], *, tokens_per_block: int) -> None:
        self._clients = clients
        self._tokens_per_block = tokens_per_block
        self._told: dict[str, kv.WaitingRequest] = {}

    def tell(self, in_order: Iterable[TrackedRequest], is_unfinished: Iterable[TrackedRequest]) -> None:
        """This is the queue after a step.

        Args:
            in_order: the requests that do not run, the next first; those that are loaded, or have been, have begun.
            is_unfinished: all requests of the engine.
        """
        waiting = {
            tracked.request_id: self._waiting(tracked)
            for tracked in in_order
            if tracked.hashes and not tracked.loading_ids and not tracked.request.num_computed_tokens
        }
        if list(waiting.items()) == list(self._told.items()):
            return
        gone = self._told.keys() - waiting.keys()
        started = {tracked.request_id for tracked in is_unfinished if tracked.request_id in gone}
        self._told = waiting
        for client in self._clients:
            client.update_queue(list(waiting.values()), started=started)

    def _waiting(self, tracked: TrackedRequest) -> kv.WaitingRequest:
        before = self._told.get(tracked.request_id)
        if before is not None and len(before.hashes) == len(tracked.hashes):
            return before
        return kv.WaitingRequest(
            tracked.request_id,
            tuple(tracked.hashes),
            session_id=tracked.session_id,
            new_tokens=max(0, tracked.request.num_tokens - len(tracked.hashes) * self._tokens_per_block),
            priority=tracked.request.priority,
        )
