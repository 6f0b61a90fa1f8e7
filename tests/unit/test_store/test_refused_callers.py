"""Who is not attached, too late, too many or too large is refused, and nothing changes."""

from __future__ import annotations

import pytest

from kvservice import errors
from kvservice.instances import Identity
from tests.stores import HASH_BYTES, PAGE_BYTES, Workplace, chain, small_config, spec_of
from tests.unit.test_store.scene import HASHES_MAX, A, Call, Refusal, Scene, X, is_refused, packed

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("namespace_id", [0, 2, 4_000_000_000])
@pytest.mark.parametrize("method", ["lookup", "get", "put"])
def test_a_namespace_id_of_another_attachment_is_refused(scene: Scene, method: str, namespace_id: int) -> None:
    is_refused(
        scene,
        lambda scene: getattr(scene, method)(packed(*A), namespace_id=namespace_id),
        errors.NamespaceUnknown,
        f"namespace id {namespace_id} is not of this attachment: attach again",
    )


CALLS_INTO_A_NAMESPACE: dict[str, Call] = {
    "lookup": lambda scene: scene.detached.lookup(A),
    "get": lambda scene: scene.detached.get(A),
    "put": lambda scene: scene.detached.put(chain("x", 1)),
    "forget a session": lambda scene: scene.store.forget_session(scene.detached.peer, 1, "talk"),
    "forget all": lambda scene: scene.store.forget_namespace(scene.detached.peer, 1),
    "lookup of somebody who never attached": lambda scene: scene.store.lookup(scene.stranger, 1, packed(*A)),
    "forget by somebody who never attached": lambda scene: scene.store.forget_namespace(scene.stranger, 1),
}


@pytest.mark.parametrize("what", CALLS_INTO_A_NAMESPACE)
def test_who_is_not_attached_has_no_namespace(scene: Scene, what: str) -> None:
    is_refused(scene, CALLS_INTO_A_NAMESPACE[what], errors.NamespaceUnknown, "attach again")


TOO_LATE: dict[str, Refusal] = {
    "commit": (
        lambda scene: scene.commit(scene.reservation),
        errors.ReservationLost,
        r"reservation \d+ expired 1.0 s ago",
    ),
    "renewal of a lease": (
        lambda scene: scene.renew([scene.lease], []),
        errors.LeaseExpired,
        r"lease \d+ expired 1.0 s ago",
    ),
    "renewal of a reservation": (
        lambda scene: scene.renew([], [scene.reservation]),
        errors.ReservationLost,
        "expired",
    ),
    "renewal of one expired among live": (
        lambda scene: scene.renew([scene.long_lease, scene.lease], [scene.partly_committed]),
        errors.LeaseExpired,
        "expired",
    ),
}


@pytest.mark.parametrize("noticed", [True, False], ids=["after the upkeep", "before the upkeep"])
@pytest.mark.parametrize("what", TOO_LATE)
def test_what_comes_too_late_is_refused_and_changes_nothing(scene: Scene, what: str, noticed: bool) -> None:
    scene.workplace.clock.advance(31.0)
    if noticed:
        scene.workplace.upkeep()
    is_refused(scene, *TOO_LATE[what])


DRAINING: dict[str, Call] = {
    "get": lambda scene: scene.get(packed(*A)),
    "put": lambda scene: scene.put(packed(*X[:1])),
    "attach": lambda scene: scene.attach(),
}


@pytest.mark.parametrize("what", DRAINING)
def test_a_draining_store_takes_no_new_work(scene: Scene, what: str) -> None:
    scene.store.drain()
    refusal = is_refused(scene, DRAINING[what], errors.Draining, "shutting down")
    assert isinstance(refusal, errors.Draining)
    assert refusal.retry_after_s == scene.store.config.drain_s


def test_an_instance_too_many_is_refused() -> None:
    with Workplace(small_config(instances_max=1)) as workplace:
        workplace.engine()
        peer = workplace.store.connect(Identity("uid:1"))
        with workplace.unchanged(), pytest.raises(errors.Overloaded, match="instances_max"):
            workplace.run(workplace.store.attach(peer, "second", [spec_of(tenant="uid:1")]))


def test_a_block_larger_than_the_quota_is_refused() -> None:
    message = "a block takes 8192 bytes, dram_quota_bytes is 4096"
    with Workplace(small_config(dram_quota_bytes=PAGE_BYTES)) as workplace:
        peer = workplace.store.connect(Identity("uid:1"))
        with workplace.unchanged(), pytest.raises(errors.InvalidRequest, match=message) as refusal:
            workplace.run(workplace.store.attach(peer, "x", [spec_of(block_size_bytes=PAGE_BYTES + 1)]))
        assert refusal.value.field == "block_size_bytes"


def test_one_wrong_namespace_of_several_refuses_the_attachment(scene: Scene) -> None:
    good, wrong = spec_of(tenant="uid:1"), spec_of(tenant="uid:1", tokens_per_block=1)
    is_refused(
        scene,
        lambda scene: scene.store.attach(scene.stranger, "stranger", [good, wrong]),
        errors.LayoutMismatch,
        "not 64, 1 and 16",
    )
    assert not scene.stranger.is_attached
    # It may still attach with the right sizes.
    assert scene.workplace.run(scene.store.attach(scene.stranger, "stranger", [good]))


def test_hashes_are_counted_by_the_namespaces_own_size() -> None:
    with Workplace(small_config(hashes_per_call_max=HASHES_MAX)) as workplace:
        engine = workplace.engine(spec_of(hash_size_bytes=2 * HASH_BYTES))
        assert engine.lookup(chain("a", HASHES_MAX, size_bytes=2 * HASH_BYTES)).blocks == HASHES_MAX
        with pytest.raises(errors.InvalidRequest, match="at most 20 per call"):
            engine.lookup(chain("a", HASHES_MAX + 1, size_bytes=2 * HASH_BYTES))
        with pytest.raises(errors.InvalidRequest, match="not a multiple of the 32-byte hash"):
            engine.lookup(chain("a", 1))
