"""books: what a refused call must leave as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.connections import CallFailed
from tests.daemons import DaemonThread

Code = grpc.StatusCode


def books(daemon: DaemonThread) -> dict[str, Any]:
    """Everything of the store that a call may change, but for the time of a block's last use."""
    store = daemon.store
    daemon.wait_checksummed()

    def read() -> dict[str, Any]:
        return {
            "namespaces": {
                namespace.spec.label: (
                    len(namespace.index),
                    namespace.pool.free_slots,
                    namespace.pool.holders.tolist(),
                    len(namespace.sessions),
                )
                for namespace in store.namespaces.values()
            },
            "holds": sorted((hold.hold_id, hold.expired, hold.slots.tolist()) for hold in store.leases),
            "instances": [(instance.instance_id, instance.is_attached) for instance in store.instances],
            "arena": store.arena.used_bytes,
        }

    return daemon.on_loop(read)


def refused(
    call: Callable[[], Any], code: Code, reason: pb.ErrorReason, *, field: str = "", says: str = ""
) -> pb.ErrorDetail:
    """The call fails with exactly this status and detail; returns the detail."""
    with pytest.raises(CallFailed) as caught:
        call()
    error = caught.value
    assert error.code is code, error
    assert pb.ErrorReason.Name(error.detail.reason) == pb.ErrorReason.Name(reason)
    assert error.detail.message, "an error without a word"
    assert error.detail.field == field, error.detail
    assert says in error.detail.message
    if reason == pb.ERROR_REASON_INTERNAL:
        assert error.detail.error_id
    return error.detail
