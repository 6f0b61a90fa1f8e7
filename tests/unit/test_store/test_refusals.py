"""Every wrong call is refused by the error of the table, says what is wrong, and changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvservice import errors
from kvservice.instances import Identity
from kvservice.store import Peer, explain
from kvservice.store.outcomes import Granted, Reserved
from tests.stores import HASH_BYTES, PAGE_BYTES, Engine, Workplace, chain, small_config, spec_of

pytestmark = pytest.mark.unit

HASHES_MAX = 20
UNKNOWN = 12_345


class Scene:
    """A full arena in use: 3 blocks leased, 2 being written, 11 committed and leased, and more of each by others."""

    def __init__(self, workplace: Workplace) -> None:
        self.workplace = workplace
        self.store = workplace.store
        self.engine = workplace.engine()
        self.other = workplace.engine()
        workplace.save(self.engine, chain("a", 3), session_id="talk")
        workplace.save(self.engine, chain("b", 7))
        self.leased: Granted = self.engine.get(chain("a", 3))
        self.engine.get(chain("b", 7))
        self.reserved: Reserved = workplace.put(self.engine, chain("w", 2))
        self.partly: Reserved = workplace.put(self.engine, chain("p", 3))
        self.engine.commit(self.partly, [0])
        self.others_lease: Granted = self.other.get(chain("a", 2))
        self.others_reservation: Reserved = workplace.put(self.other, chain("o", 1))
        self.released: Granted = self.other.get(chain("a", 1))
        self.store.release(self.other.peer, [self.released.hold_id], "")
        self.stranger = self.connected()
        self.detached = workplace.engine()
        self.store.detach(self.detached.peer)

    def connected(self) -> Peer:
        return self.store.connect(Identity("uid:1"))

    def expired(self) -> Scene:
        """Later: every hold has passed its time."""
        self.workplace.clock.advance(31.0)
        self.workplace.upkeep()
        return self


@pytest.fixture
def scene() -> Iterator[Scene]:
    config = small_config(
        hashes_per_call_max=HASHES_MAX,
        leases_per_instance_max=4,
        reservations_per_instance_max=3,
        instances_max=2,
        connections_max=4,
    )
    # Detached instances make room for others, and connections for whoever comes.
    with Workplace(small_config()) as workplace:
        found = Scene(workplace)
        assert found.engine.namespace.pool.free_slots == 0
        del config
        yield found


Call = Callable[[Scene], Any]


def refuse(scene: Scene, call: Call, error: type[errors.KVServiceError], message: str) -> errors.KVServiceError:
    with scene.workplace.unchanged(), pytest.raises(error, match=message) as refusal:
        answer = call(scene)
        if asyncio.iscoroutine(answer):
            scene.workplace.run(answer)
    assert type(refusal.value) is error
    return refusal.value
