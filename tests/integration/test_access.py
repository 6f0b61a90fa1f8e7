"""Who may do what: tokens, users and groups, tenants."""

from __future__ import annotations

import os
import stat
from typing import Any

import pytest

from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.blocks import chain, namespace
from tests.commands import CommandFailed
from tests.connections import FrameSocket
from tests.daemons import DaemonThread
from tests.engines import EngineProcess
from tests.integration.books import Code, books, refused
from tests.integration.conftest import MakeConnection, MakeDaemon, MakeDaemonThread, MakeEngine
from tests.waiting import eventually

pytestmark = pytest.mark.integration

UNAUTHENTICATED = (Code.UNAUTHENTICATED, pb.ERROR_REASON_UNAUTHENTICATED)
LEASE_UNKNOWN = (Code.NOT_FOUND, pb.ERROR_REASON_LEASE_UNKNOWN)

STRANGER_UID, STRANGER_GID = 54_321, 54_322
OTHER_UID, OTHER_GID = 54_331, 54_332

ONE = chain("a", 1)[0]
CALLS: tuple[tuple[str, Any], ...] = (
    ("Lookup", pb.LookupRequest(namespace_id=1, hashes=ONE)),
    ("Get", pb.GetRequest(namespace_id=1, hashes=ONE)),
    ("Load", pb.LoadRequest(namespace_id=1, hashes=ONE)),
    ("Renew", pb.RenewRequest()),
    ("Release", pb.ReleaseRequest()),
    ("Put", pb.PutRequest(namespace_id=1, hashes=ONE)),
    ("Commit", pb.CommitRequest(reservation_id=1)),
    ("Abort", pb.AbortRequest(reservation_id=1)),
    ("Prefetch", pb.PrefetchRequest(namespace_id=1, hashes=ONE)),
    ("Truncate", pb.TruncateRequest(namespace_id=1, session_id="s", drop_ratio=0.5)),
    ("RegisterDevice", pb.RegisterDeviceRequest(namespace_id=1, unavailable="no GPU")),
    ("UnregisterDevice", pb.UnregisterDeviceRequest(registration_id=1)),
    ("UpdateQueue", pb.UpdateQueueRequest(namespace_id=1, epoch=1, snapshot=pb.QueueSnapshot())),
    ("HintSessions", pb.HintSessionsRequest(namespace_id=1)),
    ("PlanLoad", pb.PlanLoadRequest(namespace_id=1, hashes=ONE)),
    ("Forget", pb.ForgetRequest(namespace_id=1, whole_namespace=pb.WholeNamespace())),
    ("Stats", pb.StatsRequest()),
    ("Explain", pb.ExplainRequest(hash=ONE)),
)


# --------------------------------------------------------------------- tokens


def test_every_call_demands_a_token_that_was_issued_and_has_not_ended(
    daemon_thread: DaemonThread, make_connection: MakeConnection
) -> None:
    assert {method for method, _ in CALLS} | {"Attach"} == set(
        pb.DESCRIPTOR.services_by_name["KVCacheService"].methods_by_name
    )
    connection = make_connection(daemon_thread.socket_dir, namespace())
    connection.save(chain("a", 3))
    ended = make_connection(daemon_thread.socket_dir, namespace())
    token_of_the_dead = ended.token
    ended.close()
    eventually(lambda: daemon_thread.on_loop(lambda: len(daemon_thread.store.instances)) == 1)
    before = books(daemon_thread)
    flipped = bytes([connection.token[0] ^ 1]) + connection.token[1:]
    for token in (b"", b"\0", connection.token[:-1], connection.token + b"\0", flipped, bytes(32), token_of_the_dead):
        for method, request in CALLS:
            refused(lambda m=method, r=request, t=token: connection.call(m, r, token=t), *UNAUTHENTICATED)  # type: ignore[misc]  # bound now
        intruder = make_connection(daemon_thread.socket_dir)
        intruder.token = token
        refused(lambda i=intruder: i.attach(namespace()), *UNAUTHENTICATED)  # type: ignore[misc]  # bound now
        intruder.close()
    eventually(lambda: books(daemon_thread) == before)
    assert connection.lookup(chain("a", 3)).hit_blocks == 3


def test_a_token_is_one_per_connection_and_says_nothing_about_another(
    daemon_thread: DaemonThread, make_connection: MakeConnection
) -> None:
    connections = [make_connection(daemon_thread.socket_dir) for _ in range(20)]
    assert len({connection.token for connection in connections}) == 20
    assert all(len(connection.token) == 32 for connection in connections)
    # A process that shows another's token is that other: it has no namespace before that one attaches.
    refused(
        lambda: connections[0].call("Lookup", CALLS[0][1], token=connections[1].token),
        Code.FAILED_PRECONDITION,
        pb.ERROR_REASON_NAMESPACE_UNKNOWN,
    )


def test_an_attachment_of_two_namespaces_keeps_them_apart(
    daemon_thread: DaemonThread, make_connection: MakeConnection
) -> None:
    connection = make_connection(daemon_thread.socket_dir, namespace("one"), namespace("two"))
    connection.save(chain("a", 3), namespace_id=1)
    assert connection.lookup(chain("a", 3), namespace_id=1).hit_blocks == 3
    assert connection.lookup(chain("a", 3), namespace_id=2).hit_blocks == 0
    found = connection.call("Explain", pb.ExplainRequest(hash=ONE, fingerprint=namespace("two").fingerprint))
    assert list(found.explanations[0].namespace_mismatch.held_under_labels) == ["one"]


def test_segments_are_handed_to_instances_of_their_namespace_only(
    daemon_thread: DaemonThread, make_connection: MakeConnection
) -> None:
    owner = make_connection(daemon_thread.socket_dir)
    segment_id = owner.attach(namespace("one")).segment_ids[0]
    owner.segment(segment_id).close()
    other = make_connection(daemon_thread.socket_dir, namespace("two"))
    idle = make_connection(daemon_thread.socket_dir)
    for connection in (other, idle):
        for wanted in (segment_id, 0, 99, 2**32 - 1):
            answer, descriptors = connection.frames.segment(wanted)
            assert answer.error.reason == pb.ERROR_REASON_INVALID_REQUEST
            assert (answer.error.field, descriptors) == ("segment_id", [])
    # Being told so is no reason to be cut off.
    segment_id = other.attach_again(namespace("one")).segment_ids[0]
    other.segment(segment_id).close()


# ------------------------------------------------------------ users and groups


def attach_as(daemon_socket_dir: str, engine: EngineProcess) -> str:
    """The status of an attachment, or the class of what it raised."""
    try:
        return engine.attach(daemon_socket_dir, namespace(), timeout_s=1.0)
    except CommandFailed as failed:
        return failed.kind


@pytest.mark.usefixtures("needs_root")
def test_another_user_does_not_even_reach_the_sockets(make_daemon: MakeDaemon, make_engine: MakeEngine) -> None:
    daemon = make_daemon(allowed_uids=f"{os.getuid()},{STRANGER_UID}")
    assert stat.S_IMODE(os.stat(daemon.socket_dir).st_mode) == 0o700
    for name in ("control.sock", "memory.sock"):
        assert stat.S_IMODE(os.stat(os.path.join(daemon.socket_dir, name)).st_mode) == 0o600
    stranger = make_engine(uid=STRANGER_UID, gid=STRANGER_GID)
    assert attach_as(daemon.socket_dir, stranger) == "reconnecting"
    assert stranger.do("load", name="a", blocks=1) == {"blocks": 0, "reason": "unavailable", "wrong": 0}


@pytest.mark.usefixtures("needs_root")
@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, "PermissionDenied"),
        ({"allowed_uids": f"0,{OTHER_UID}"}, "PermissionDenied"),
        ({"allowed_gids": f"{OTHER_GID}"}, "PermissionDenied"),
        ({"allowed_uids": f"0,{STRANGER_UID}"}, "attached"),
        ({"allowed_gids": f"{STRANGER_GID}"}, "attached"),
    ],
)
def test_a_peer_in_the_sockets_group_is_let_in_by_uid_or_gid_only(
    make_daemon: MakeDaemon, make_engine: MakeEngine, knobs: dict[str, str], expected: str
) -> None:
    daemon = make_daemon(socket_group=str(STRANGER_GID), **knobs)
    status = os.stat(daemon.socket_dir)
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o750, STRANGER_GID)
    stranger = make_engine(uid=STRANGER_UID, gid=STRANGER_GID)
    assert attach_as(daemon.socket_dir, stranger) == expected
    if expected == "attached":
        assert stranger.do("save", name="a", blocks=2)["saved"] == 2
        return
    refusal = daemon.wait_event("peer_refused")
    assert (refusal["uid"], refusal["gid"]) == (STRANGER_UID, STRANGER_GID)
    assert refusal["process_id"] == stranger.process_id
    assert "kvservice_refused_peers_total" in daemon.get("/metrics")[1]
    # Whom we know is served as before.
    assert make_engine(daemon.socket_dir).do("save", name="a", blocks=2)["saved"] == 2


@pytest.mark.usefixtures("needs_root")
def test_users_are_tenants_that_do_not_see_each_other(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection, make_engine: MakeEngine
) -> None:
    daemon = make_daemon_thread(socket_group=str(STRANGER_GID), allowed_uids=(0, STRANGER_UID))
    mine = make_connection(daemon.socket_dir)
    mine_segments = mine.attach(namespace()).segment_ids
    mine.save(chain("a", 4))
    stranger = make_engine(uid=STRANGER_UID, gid=STRANGER_GID)
    assert stranger.attach(daemon.socket_dir, namespace()) == "attached"
    # The same fingerprint, the same hashes: another tenant's blocks are not there, and nothing tells of them.
    assert stranger.do("lookup", name="a", blocks=4)["blocks"] == 0
    assert stranger.do("load", name="a", blocks=4) == {"blocks": 0, "reason": "not_held", "wrong": 0}
    assert stranger.do("explain", name="a") == ["not_remembered"]
    seen = stranger.do("stats")
    assert seen["tenants"] == [f"uid:{STRANGER_UID}"]
    assert seen["blocks"] == 0
    assert len(seen["instances"]) == 1
    # Nor does it disturb them: it stores its own under the same hashes.
    assert stranger.do("save", name="a", blocks=2)["saved"] == 2
    assert stranger.do("load", name="a", blocks=4) == {"blocks": 2, "reason": "not_held", "wrong": 0}
    assert mine.lookup(chain("a", 4)).hit_blocks == 4
    stranger.do("forget")
    assert mine.lookup(chain("a", 4)).hit_blocks == 4
    assert not set(stranger.mapped_segments()) & {f"kvservice-segment-{number} (deleted)" for number in mine_segments}
    own = mine.call("Stats", pb.StatsRequest())
    assert [of.tenant for of in own.namespaces] == ["uid:0"]
    assert [of.tenant for of in own.attached_instances] == ["uid:0"]


@pytest.mark.usefixtures("needs_root")
def test_identities_can_be_one_tenant_by_configuration(
    make_daemon_thread: MakeDaemonThread, make_connection: MakeConnection, make_engine: MakeEngine
) -> None:
    daemon = make_daemon_thread(
        socket_group=str(STRANGER_GID),
        allowed_uids=(0, STRANGER_UID),
        tenants={"uid:0": "team", f"uid:{STRANGER_UID}": "team"},
    )
    make_connection(daemon.socket_dir, namespace()).save(chain("a", 4))
    stranger = make_engine(uid=STRANGER_UID, gid=STRANGER_GID)
    assert stranger.attach(daemon.socket_dir, namespace()) == "attached"
    assert stranger.do("lookup", name="a", blocks=4)["blocks"] == 4


@pytest.mark.usefixtures("needs_root")
def test_a_refused_peer_is_told_so_even_before_it_speaks(make_daemon_thread: MakeDaemonThread) -> None:
    daemon = make_daemon_thread(allowed_uids=(STRANGER_UID,))
    frames = FrameSocket(daemon.socket_dir)
    answer, _ = frames.receive()
    assert answer.error.reason == pb.ERROR_REASON_PERMISSION_DENIED
    assert "uid 0" in answer.error.message
    with pytest.raises(EOFError):
        frames.receive()
    frames.close()
