"""A client may do what it likes with the memory it was given: daemon and other namespaces do not notice."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from kvservice_proto.v1 import kvservice_pb2 as pb
from tests.blocks import chain, content, namespace
from tests.connections import Connection, Grant
from tests.daemons import DaemonProcess, DaemonThread
from tests.integration.conftest import MakeConnection, MakeEngine

pytestmark = pytest.mark.integration

F_SEAL_FUTURE_WRITE = 0x0010  # not in the fcntl module
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, FALLOC_FL_COLLAPSE_RANGE = 1, 2, 0x10, 0x08
SIZE_BYTES = 4096

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def fallocate(descriptor: int, mode: int, start: int, size_bytes: int) -> None:
    """Raises OSError."""
    if libc.fallocate(descriptor, mode, start, size_bytes) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def forbidden(attempt: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """The kernel says no."""
    with pytest.raises(PermissionError):
        attempt(*arguments, **named)


def first_grant(connection: Connection, name: str) -> Grant:
    segment_ids = connection.attach(namespace(name, block_size_bytes=SIZE_BYTES)).segment_ids
    return connection.segment(segment_ids[0])


def map_all(grant: Grant) -> mmap.mmap:
    return mmap.mmap(grant.memory_fd, grant.message.size_bytes)


def resize_and_reseal(grant: Grant) -> None:
    """Everything that would let the client kill the daemon with SIGBUS."""
    for descriptor, size_bytes in (
        (grant.memory_fd, grant.message.size_bytes),
        (grant.generations_fd, grant.message.generations_size_bytes),
    ):
        for wanted in (0, size_bytes // 2, size_bytes - 1, size_bytes + 1, 2 * size_bytes):
            forbidden(os.ftruncate, descriptor, wanted)
        forbidden(fallocate, descriptor, 0, size_bytes, mmap.PAGESIZE)
        for seal in (fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK, F_SEAL_FUTURE_WRITE, fcntl.F_SEAL_SEAL):
            forbidden(fcntl.fcntl, descriptor, fcntl.F_ADD_SEALS, seal)
        assert os.fstat(descriptor).st_size == size_bytes
    seals = fcntl.fcntl(grant.memory_fd, fcntl.F_GET_SEALS)
    assert seals & fcntl.F_SEAL_SHRINK
    assert seals & fcntl.F_SEAL_GROW
    assert seals & fcntl.F_SEAL_SEAL


def forge_generations(grant: Grant) -> None:
    """Everything that would make a reader take foreign bytes for its own."""
    descriptor, size_bytes = grant.generations_fd, grant.message.generations_size_bytes
    table = mmap.mmap(descriptor, size_bytes, prot=mmap.PROT_READ)
    before = bytes(table)
    forbidden(mmap.mmap, descriptor, size_bytes, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    forbidden(os.write, descriptor, b"x")
    forbidden(os.pwrite, descriptor, b"x", 0)
    forbidden(os.sendfile, descriptor, grant.memory_fd, 0, 8)
    for mode in (
        FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
        FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
        FALLOC_FL_COLLAPSE_RANGE,
    ):
        with pytest.raises(OSError, match=r"not permitted|not supported|Invalid"):
            fallocate(descriptor, mode, 0, mmap.PAGESIZE)
    address = ctypes.c_void_p.from_buffer_copy(ctypes.c_void_p(_address_of(descriptor, size_bytes)))
    assert libc.mprotect(address, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE) == -1
    assert ctypes.get_errno() in {errno.EACCES, errno.EPERM}
    libc.munmap(address, ctypes.c_size_t(size_bytes))
    # A second opening of the same file is as powerless.
    again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    forbidden(mmap.mmap, again, size_bytes, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    forbidden(os.write, again, b"x")
    os.close(again)
    assert bytes(table) == before
    table.close()


def _address_of(descriptor: int, size_bytes: int) -> int:
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    assert address not in (None, ctypes.c_void_p(-1).value)
    return int(address)


def scribble(grant: Grant) -> None:
    """Random bytes over all of it, then none at all: its pages punched out under the daemon's own mapping."""
    size_bytes = grant.message.size_bytes
    memory = map_all(grant)
    memory[:] = random.Random(1).randbytes(size_bytes)
    fallocate(grant.memory_fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0, size_bytes)
    assert memory[:] == bytes(size_bytes)
    memory[:] = b"\xff" * size_bytes
    memory.close()


ATTACKS = [resize_and_reseal, forge_generations, scribble]


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_daemon_and_other_namespaces_survive(
    daemon: DaemonProcess, make_connection: MakeConnection, make_engine: MakeEngine, attack: Callable[[Grant], None]
) -> None:
    witness = make_engine(daemon.socket_dir, namespace("witness", block_size_bytes=SIZE_BYTES))
    witness.do("save", name="w", blocks=200)
    attacker = make_connection(daemon.socket_dir)
    grant = first_grant(attacker, "attacker")
    # Blocks that are being checksummed and evicted over the very pages.
    attacker.save(chain("before", 200))
    attack(grant)
    attacker.save(chain("after", 200))
    attack(grant)
    assert witness.do("load", name="w", blocks=200) == {"blocks": 200, "reason": "ok", "wrong": 0}
    # Its own namespace still works; whose bytes it destroyed is its own concern.
    reserved = attacker.put(chain("mine", 1))
    shared = reserved.runs[0].reserved.shared_memory
    mine = attacker.segment(shared.segment_id)
    memory = map_all(mine)
    start = shared.slots[0] * mine.message.slot_stride_bytes
    memory[start : start + SIZE_BYTES] = content(chain("mine", 1)[0], SIZE_BYTES)
    attacker.commit(reserved.reservation_id)
    memory.close()
    mine.close()
    grant.close()
    own = make_engine(daemon.socket_dir, namespace("attacker", block_size_bytes=SIZE_BYTES))
    assert own.do("load", name="mine", blocks=1) == {"blocks": 1, "reason": "ok", "wrong": 0}
    assert daemon.get("/readyz") == (200, "ok\n")
    assert not daemon.errors
    assert daemon.stop() == 0


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_books_do_not_live_in_memory_that_clients_can_reach(
    daemon_thread: DaemonThread, make_connection: MakeConnection, attack: Callable[[Grant], None]
) -> None:
    attacker = make_connection(daemon_thread.socket_dir)
    grant = first_grant(attacker, "attacker")
    attacker.save(chain("a", 100))
    leased = attacker.get(chain("a", 100))
    attack(grant)
    daemon_thread.check()
    again = attacker.get(chain("a", 100))
    assert again.runs == leased.runs, "slots and generations are as before"
    attacker.release(leased.lease_id, again.lease_id)
    grant.close()
    daemon_thread.wait_no_holds()


def test_a_writer_that_writes_beyond_its_slots_disturbs_its_own_namespace_only(
    daemon: DaemonProcess, make_connection: MakeConnection, make_engine: MakeEngine
) -> None:
    witness = make_engine(daemon.socket_dir, namespace("witness", block_size_bytes=SIZE_BYTES))
    witness.do("save", name="w", blocks=100)
    attacker = make_connection(daemon.socket_dir)
    grant = first_grant(attacker, "attacker")
    reservation = attacker.put(chain("a", 1))
    memory = map_all(grant)
    attacker.commit(reservation.reservation_id)
    # After the commit, and where nothing was ever reserved.
    memory[:] = b"\xee" * len(memory)
    memory.close()
    grant.close()
    assert (
        attacker.call("Explain", pb.ExplainRequest(hash=chain("a", 1)[0])).explanations[0].WhichOneof("finding")
        == "held"
    )
    assert witness.do("load", name="w", blocks=100)["wrong"] == 0
    assert witness.do("save", name="v", blocks=100)["saved"] == 100
    assert witness.do("load", name="v", blocks=100)["wrong"] == 0
