"""A client process that reads commands from its input, one JSON object a line, and answers each on its output.

Between two commands it blocks in a read: a test can stop, kill or continue it in the middle of a save or a load.
Its first two arguments, if any, are the uid and the gid to become.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import Enum
from typing import Any

import kvservice_client as kv
from tests.blocks import chain, content, contents
from tests.integration.programs.background import Background


class Engine:
    """One client and what it holds between commands."""

    def __init__(self) -> None:
        self.client: kv.Client
        self.size_bytes = 0
        self.reservation: kv.Reservation
        self.lease: kv.Lease
        self.reserved: list[bytes] = []
        self.leased: list[bytes] = []
        self.background: Background
        self._parents: set[str] = set()

    # -------------------------------------------------------------------- facade

    def attach(self, socket_dir: str, namespace: dict[str, Any], timeout_s: float) -> str:
        namespace["fingerprint"] = bytes.fromhex(namespace["fingerprint"])
        self.size_bytes = namespace["block_size_bytes"]
        self.client = kv.attach(kv.Namespace(**namespace), socket_dir=socket_dir, attach_timeout_s=timeout_s)
        return self.client.status.value

    def status(self) -> str:
        return self.client.status.value

    def save(self, name: str, blocks: int, start: int = 0, *, as_list: bool = False) -> dict[str, Any]:
        hashes = chain(name, blocks, start=start)
        parent = chain(name, 1, start=start - 1)[0] if start else b""
        source: Any = contents(hashes, self.size_bytes)
        if as_list:
            source = [content(block_hash, self.size_bytes) for block_hash in hashes]
        return dataclasses.asdict(self.client.save(hashes, source, parent=parent))

    def load(self, name: str, blocks: int, *, as_list: bool = False, deadline_s: float = 10.0) -> dict[str, Any]:
        """What was loaded, and how many of the blocks said to be loaded have wrong bytes."""
        hashes = chain(name, blocks)
        pieces = [bytearray(self.size_bytes) for _ in hashes]
        if as_list:
            loaded = self.client.load(hashes, pieces, deadline_s=deadline_s)
        else:
            whole = bytearray(self.size_bytes * blocks)
            loaded = self.client.load(hashes, whole, deadline_s=deadline_s)
            pieces = [whole[at * self.size_bytes : (at + 1) * self.size_bytes] for at in range(blocks)]
        wrong = sum(
            piece != content(block_hash, self.size_bytes)
            for block_hash, piece in zip(hashes[: loaded.blocks], pieces, strict=False)
        )
        return {"blocks": loaded.blocks, "reason": loaded.reason, "wrong": wrong}

    def lookup(self, name: str, blocks: int) -> dict[str, Any]:
        return dataclasses.asdict(self.client.lookup(chain(name, blocks)))

    def explain(self, name: str, position: int = 0) -> list[str]:
        """The kinds of the findings about one block."""
        found = self.client.explain(chain(name, 1, start=position)[0])
        return [str(explanation.WhichOneof("finding")) for explanation in found]

    def stats(self) -> dict[str, Any]:
        """What this tenant is shown: its namespaces' tenants and blocks, its instances' names."""
        shown = self.client.stats()
        return {
            "tenants": [of.tenant for of in shown.namespaces],
            "blocks": sum(of.blocks for of in shown.namespaces),
            "instances": [of.name for of in shown.attached_instances],
        }

    def forget(self) -> int:
        """Forget the whole namespace; how many blocks."""
        return self.client.forget_namespace().blocks_dropped

    def close(self) -> str:
        self.client.close()
        return self.client.status.value

    # --------------------------------------------------------------- lower level

    def put(self, name: str, blocks: int, lease_s: float = 0.0, request_id: str = "") -> int:
        """Reserve; how many blocks are to be written."""
        self.reserved = chain(name, blocks)
        self.reservation = self.client.put(self.reserved, lease_s=lease_s, request_id=request_id)
        return len(self.reservation.reserved)

    def write(self, fraction: float = 1.0) -> int:
        """Write that part of the bytes of all reserved blocks; how many bytes."""
        written = 0
        budget = int(len(self.reservation.reserved) * self.size_bytes * fraction)
        for position, view in self.reservation.reserved:
            piece = content(self.reserved[position], self.size_bytes)[: budget - written]
            view.memory[: len(piece)] = piece
            written += len(piece)
        return written

    def commit(self) -> list[str]:
        return [outcome.value for outcome in self.reservation.commit()]

    def abort(self) -> None:
        self.reservation.abort()

    def get(self, name: str, blocks: int, lease_s: float = 0.0, request_id: str = "") -> int:
        """Lease; how many blocks."""
        self.leased = chain(name, blocks)
        self.lease = self.client.get(self.leased, lease_s=lease_s, request_id=request_id)
        return len(self.lease.blocks)

    def read(self, first: int = 0) -> list[str]:
        """Copy each leased block, as `load` does, and then say of each: right, wrong, or changed."""
        copies = [bytes(view.memory) for view in self.lease.blocks[first:]]
        return [
            "changed"
            if not self.lease.valid(position)
            else ("right" if copied == content(self.leased[position], self.size_bytes) else "wrong")
            for position, copied in enumerate(copies, start=first)
        ]

    def read_raw(self) -> int:
        """How many of the bytes that the reservation may write are not zero now."""
        return sum(len(view.memory) - bytes(view.memory).count(0) for _, view in self.reservation.reserved)

    def renew(self) -> None:
        self.lease.renew()

    def release(self) -> None:
        self.lease.release()

    # ---------------------------------------------------------------- background

    def run_background(self, name: str, chains: int, blocks: int) -> None:
        """Save and load for ever in a thread."""
        self.background = Background(self.client, name, chains=chains, blocks=blocks, size_bytes=self.size_bytes)

    def background_counts(self) -> dict[str, Any]:
        return self.background.counts()

    def stop_background(self) -> dict[str, Any]:
        return self.background.stop()

    # ---------------------------------------------------------------------- fork

    def fork(self, name: str, blocks: int, *, stay: bool = False) -> dict[str, Any]:
        """Fork; what every facade call says in the child, and whether an attachment of its own works.

        `stay`: the child then lives on until it is killed; else it ends as a program does.
        """
        receiver, sender = os.pipe()
        link = self.client._attachment._link
        connections = link.unary._call_socket._connections if link is not None else ()
        self._parents = {os.readlink(f"/proc/self/fd/{each._socket.fileno()}") for each in connections}
        child = os.fork()
        if not child:
            os.close(receiver)
            with os.fdopen(sender, "w") as pipe:
                json.dump(self._in_child(name, blocks), pipe)
            if stay:
                # Not our standard streams: the test waits for their end.
                os.close(0)
                os.close(1)
                while True:
                    signal.pause()
            os._exit(0)
        os.close(sender)
        with os.fdopen(receiver) as pipe:
            report: dict[str, Any] = json.load(pipe)
        if not stay:
            os.waitpid(child, 0)
        return report | {"process_id": child}

    def _in_child(self, name: str, blocks: int) -> dict[str, Any]:
        hashes = chain(name, blocks)
        destination = bytearray(self.size_bytes * blocks)
        with open("/proc/self/maps", encoding="utf-8") as maps:
            mapped = sum("/memfd:kvservice" in line for line in maps)
        loaded = self.client.load(hashes, destination)
        saved = self.client.save(hashes, destination)
        try:
            self.client.get(hashes)
            raised = ""
        except kv.KVServiceError as error:
            raised = type(error).__name__
        self.client.release("some request")
        reasons = [loaded.reason, saved.reason, self.client.lookup(hashes).reason, self.client.prefetch(hashes).reason]
        status = self.client.status.value
        self.client.close()
        return {
            "status": status,
            "reasons": [reason.value for reason in reasons],
            "loaded": loaded.blocks,
            "raised": raised,
            "mapped": mapped,
            "call_connections": {"parent": len(self._parents), "child": len(self._parents & set(open_files()))},
        }


def open_files() -> Iterator[str]:
    """What the descriptors of this process are open on."""
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one of the listing itself
            yield os.readlink(f"/proc/self/fd/{descriptor}")


def plain(value: object) -> object:
    """Named outcomes as their words."""
    if isinstance(value, Enum):
        return value.value
    raise TypeError(f"{value!r} cannot be sent")


def main() -> None:
    """Answer commands until the input ends."""
    if len(sys.argv) > 1:
        uid, gid = int(sys.argv[1]), int(sys.argv[2])
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    engine = Engine()
    for line in sys.stdin:
        request = json.loads(line)
        run: Callable[..., Any] = getattr(engine, request.pop("command"))
        try:
            answer: dict[str, Any] = {"answer": run(**request)}
        except kv.KVServiceError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        print(json.dumps(answer, default=plain), flush=True)  # noqa: T201  # the answer
    if hasattr(engine, "client"):
        engine.client.close()


if __name__ == "__main__":
    main()
