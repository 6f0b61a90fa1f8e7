"""Every wrong call is refused by the error of the table, says what is wrong, and changes nothing."""

from __future__ import annotations

import pytest

from kvservice import errors
from kvservice.instances import Identity
from kvservice.store import explain
from tests.stores import PAGE_BYTES, chain, spec_of
from tests.unit.test_store.scene import HASHES_MAX, A, B, Refusal, Scene, X, is_refused, packed

pytestmark = pytest.mark.unit

UNKNOWN = 12_345

MALFORMED: dict[str, tuple[bytes, str]] = {
    "no hashes": (b"", "no hashes: send at least one"),
    "part of a hash": (packed(*A)[:-1], "47 bytes are not a multiple of the 16-byte hash"),
    "too many hashes": (packed(*X), f"{HASHES_MAX + 1} hashes, at most {HASHES_MAX} per call"),
}

REFUSALS: dict[str, Refusal] = {
    "get of a chain with a hole": (
        lambda scene: scene.get(packed(A[0], X[0], A[2])),
        errors.InvalidRequest,
        "hash 1 is not held but a later one is",
    ),
    "get of blocks of two chains": (
        lambda scene: scene.get(packed(A[0], B[1])),
        errors.InvalidRequest,
        "hash 1 is held behind another block",
    ),
    "get with too many leases": (
        lambda scene: scene.engine.get(A),
        errors.Overloaded,
        "already has 2 leases",
    ),
    "put behind part of a hash": (
        lambda scene: scene.put(packed(X[0]), parent=A[0][:-1]),
        errors.InvalidRequest,
        "15 bytes are not one 16-byte hash",
    ),
    "put behind two hashes": (
        lambda scene: scene.put(packed(X[0]), parent=packed(*A[:2])),
        errors.InvalidRequest,
        "32 bytes are not one 16-byte hash",
    ),
    "put of a hash twice": (
        lambda scene: scene.put(packed(X[0], X[1], X[0])),
        errors.InvalidRequest,
        "a hash is named twice",
    ),
    "put of a chain with a hole": (
        lambda scene: scene.put(packed(A[0], X[0], A[2])),
        errors.InvalidRequest,
        "hash 1 is not held but a later one is",
    ),
    "put of a held tail as a root": (
        lambda scene: scene.put(packed(A[1], A[2])),
        errors.InvalidRequest,
        "hash 0 is held behind another block",
    ),
    "put of a held tail behind another block": (
        lambda scene: scene.put(packed(A[2]), parent=B[1]),
        errors.InvalidRequest,
        "hash 0 is held behind another block",
    ),
    "put of a held root behind a block": (
        lambda scene: scene.put(packed(B[0]), parent=A[2]),
        errors.InvalidRequest,
        "hash 0 is held behind another block",
    ),
    "put of a block behind itself": (
        lambda scene: scene.put(packed(A[0]), parent=A[0]),
        errors.InvalidRequest,
        "hash 0 is held behind another block",
    ),
    "put with too many reservations": (
        lambda scene: scene.engine.put(chain("x", 1)),
        errors.Overloaded,
        "already has 2 reservations",
    ),
    "put into a full arena": (
        lambda scene: scene.put(packed(X[0])),
        errors.CapacityExhausted,
        "1 blocks wanted, 0 could leave: the rest of the arena is in use",
    ),
    "commit of nothing that was reserved": (
        lambda scene: scene.commit(UNKNOWN),
        errors.LeaseUnknown,
        f"no reservation {UNKNOWN} for this instance",
    ),
    "commit of another's reservation": (
        lambda scene: scene.commit(scene.others_reservation),
        errors.LeaseUnknown,
        "no reservation",
    ),
    "commit of a lease": (lambda scene: scene.commit(scene.lease), errors.LeaseUnknown, "no reservation"),
    "commit of a position that was not reserved": (
        lambda scene: scene.commit(scene.reservation, 0, 2),
        errors.InvalidRequest,
        "positions must be distinct, and reserved",
    ),
    "commit of a position twice": (
        lambda scene: scene.commit(scene.reservation, 1, 1),
        errors.InvalidRequest,
        "positions must be distinct",
    ),
    "commit of a position committed before": (
        lambda scene: scene.commit(scene.partly_committed, 0, 1),
        errors.InvalidRequest,
        "not committed yet",
    ),
    "abort of nothing that was reserved": (lambda scene: scene.abort(UNKNOWN), errors.LeaseUnknown, "no reservation"),
    "abort of another's reservation": (
        lambda scene: scene.abort(scene.others_reservation),
        errors.LeaseUnknown,
        "no reservation",
    ),
    "abort of a lease": (lambda scene: scene.abort(scene.lease), errors.LeaseUnknown, "no reservation"),
    "release of nothing that was leased": (lambda scene: scene.release(UNKNOWN), errors.LeaseUnknown, "no lease"),
    "release of another's lease": (
        lambda scene: scene.release(scene.others_lease),
        errors.LeaseUnknown,
        "no lease",
    ),
    "release of a reservation": (lambda scene: scene.release(scene.reservation), errors.LeaseUnknown, "no lease"),
    "release of one unknown among known": (
        lambda scene: scene.release(scene.lease, UNKNOWN, scene.long_lease),
        errors.LeaseUnknown,
        f"no lease {UNKNOWN}",
    ),
    "release of a lease twice in a call": (
        lambda scene: scene.release(scene.lease, scene.lease),
        errors.InvalidRequest,
        "a lease is named twice",
    ),
    "release of a lease a second time": (
        lambda scene: scene.store.release(scene.other.peer, [scene.ended], ""),
        errors.LeaseUnknown,
        "ended before",
    ),
    "renewal of nothing that was leased": (
        lambda scene: scene.renew([UNKNOWN], []),
        errors.LeaseUnknown,
        "no lease",
    ),
    "renewal of a lease as a reservation": (
        lambda scene: scene.renew([], [scene.lease]),
        errors.LeaseUnknown,
        "no reservation",
    ),
    "renewal of another's reservation": (
        lambda scene: scene.renew([], [scene.others_reservation]),
        errors.LeaseUnknown,
        "no reservation",
    ),
    "renewal of one unknown among known": (
        lambda scene: scene.renew([scene.lease, UNKNOWN], [scene.reservation]),
        errors.LeaseUnknown,
        f"no lease {UNKNOWN}",
    ),
    "renewal of a reservation twice": (
        lambda scene: scene.renew([], [scene.reservation, scene.reservation]),
        errors.InvalidRequest,
        "a reservation is named twice",
    ),
    "a connection too many": (
        lambda scene: scene.store.connect(Identity("uid:1")),
        errors.Overloaded,
        r"4 processes are connected \(connections_max\)",
    ),
    "attaching twice": (
        lambda scene: scene.store.attach(scene.engine.peer, "again", [spec_of(tenant="uid:1")]),
        errors.InvalidRequest,
        "attached already",
    ),
    "a block larger than the arena": (
        lambda scene: scene.attach(name="large", block_size_bytes=16 * PAGE_BYTES + 1),
        errors.InvalidRequest,
        "a block takes 69632 bytes, dram_bytes is 65536: raise it or use smaller blocks",
    ),
    "the same fingerprint with other blocks": (
        lambda scene: scene.attach(block_size_bytes=65),
        errors.LayoutMismatch,
        "held with 64 bytes and 16 tokens per block and 16-byte hashes, not 65, 16 and 16",
    ),
    "the same fingerprint with other tokens": (
        lambda scene: scene.attach(tokens_per_block=32),
        errors.LayoutMismatch,
        "not 64, 32 and 16",
    ),
    "the same fingerprint with other hashes": (
        lambda scene: scene.attach(hash_size_bytes=32),
        errors.LayoutMismatch,
        "not 64, 16 and 32",
    ),
    "explaining too short a hash": (
        lambda scene: explain(scene.store.namespaces.values(), scene.engine.peer.tenant, b"1234567", b"", 0.0),
        errors.InvalidRequest,
        "a hash has 8 to 64 bytes, not 7",
    ),
    "explaining too long a hash": (
        lambda scene: explain(scene.store.namespaces.values(), scene.engine.peer.tenant, b"x" * 65, b"", 0.0),
        errors.InvalidRequest,
        "a hash has 8 to 64 bytes, not 65",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_wrong_call_is_refused_and_changes_nothing(scene: Scene, what: str) -> None:
    is_refused(scene, *REFUSALS[what])


@pytest.mark.parametrize("what", MALFORMED)
@pytest.mark.parametrize("method", ["lookup", "get", "put"])
def test_malformed_hashes_are_refused_by_every_call_that_takes_them(scene: Scene, method: str, what: str) -> None:
    sent, message = MALFORMED[what]
    refusal = is_refused(scene, lambda scene: getattr(scene, method)(sent), errors.InvalidRequest, message)
    assert isinstance(refusal, errors.InvalidRequest)
    assert refusal.field == "hashes"
