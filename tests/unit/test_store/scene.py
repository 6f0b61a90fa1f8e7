"""scene: a full arena in use, for calls that must be refused without changing any of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from kvservice import errors
from kvservice.instances import Identity
from tests.stores import Workplace, at_once, chain, spec_of

HASHES_MAX = 20
LIMITS = {
    "hashes_per_call_max": HASHES_MAX,
    "leases_per_instance_max": 2,
    "reservations_per_instance_max": 2,
    "connections_max": 4,
}
"""Knobs of the store that a scene is set in."""


class Scene:
    """An arena of 16 slots that are all in use, by an engine that has as many holds as it may, and by another."""

    def __init__(self, workplace: Workplace) -> None:
        self.workplace = workplace
        self.store = workplace.store
        self.detached = workplace.engine()
        self.store.detach(self.detached.peer)
        self.engine, self.other = workplace.engine(), workplace.engine()
        self.stranger = self.store.connect(Identity("uid:1"))
        workplace.save(self.engine, chain("a", 3), session_id="talk")
        workplace.save(self.engine, chain("b", 7))
        self.lease = self.engine.get(chain("a", 3)).hold_id
        self.long_lease = self.engine.get(chain("b", 7), duration_s=200.0).hold_id
        self.reservation = workplace.put(self.engine, chain("w", 2)).hold_id
        partly = workplace.put(self.engine, chain("p", 3), duration_s=200.0)
        self.engine.commit(partly, [0])
        self.partly_committed = partly.hold_id
        self.others_lease = self.other.get(chain("a", 2)).hold_id
        self.others_reservation = workplace.put(self.other, chain("o", 1)).hold_id
        self.ended = self.other.get(chain("a", 1)).hold_id
        self.store.release(self.other.peer, [self.ended], "")
        assert self.engine.namespace.pool.free_slots == 0

    def lookup(self, packed: bytes, namespace_id: int = 1) -> Any:
        return self.store.lookup(self.engine.peer, namespace_id, packed)

    def get(self, packed: bytes, namespace_id: int = 1) -> Any:
        # By the other engine, which may have another lease.
        return at_once(
            self.store.get(
                self.other.peer, namespace_id, packed, session_id="s", request_id="r", duration_s=0.0, max_blocks=0
            )
        )

    def put(self, packed: bytes, parent: bytes = b"", namespace_id: int = 1) -> Any:
        return self.store.put(
            self.other.peer, namespace_id, parent, packed, session_id="s", request_id="r", duration_s=0.0
        )

    def commit(self, reservation_id: int, *positions: int) -> Any:
        return self.store.commit(self.engine.peer, reservation_id, positions)

    def abort(self, reservation_id: int) -> Any:
        return self.store.abort(self.engine.peer, reservation_id)

    def release(self, *lease_ids: int) -> Any:
        return self.store.release(self.engine.peer, lease_ids, "")

    def renew(self, lease_ids: list[int], reservation_ids: list[int]) -> Any:
        return self.store.renew(self.engine.peer, lease_ids, reservation_ids, 60.0)

    def attach(self, **fields: Any) -> Any:
        return self.store.attach(self.stranger, "stranger", [spec_of(tenant="uid:1", **fields)])


A, B, X = chain("a", 3), chain("b", 7), chain("x", HASHES_MAX + 1)
"""Two chains that are held, and one that is not and too long for a call."""

Call = Callable[[Scene], Any]
Refusal = tuple[Call, type[errors.KVServiceError], str]


def packed(*hashes: bytes) -> bytes:
    return b"".join(hashes)


def is_refused(scene: Scene, call: Call, error: type[errors.KVServiceError], message: str) -> errors.KVServiceError:
    """The call fails with exactly this error and leaves everything as it was."""

    async def made() -> None:
        answer = call(scene)
        if asyncio.iscoroutine(answer):
            await answer

    with scene.workplace.unchanged(), pytest.raises(error, match=message) as refusal:
        scene.workplace.run(made())
    assert type(refusal.value) is error
    return refusal.value
