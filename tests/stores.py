"""stores: a Store in this process with its clock in the test's hand, and engines that write and read real bytes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from kvservice.blocks import NO_ROW, NamespaceKey, NamespaceSpec, Slots, Tenant
from kvservice.config import Config
from kvservice.index import State
from kvservice.instances import Identity, Notice, SegmentsChanged
from kvservice.metrics import Metrics
from kvservice.store import Namespace, Peer, Store
from kvservice.store.outcomes import Granted, Looked, Reserved, Truncated
from kvservice.store.truncating import DropOldest, KeepRanges

PAGE_BYTES = 4096
HASH_BYTES = 16
BLOCK_BYTES = 64
"""Much less than a slot's page, so that arenas of few bytes hold many blocks."""

Answer = TypeVar("Answer")


def at_once(work: Coroutine[Any, Any, Answer]) -> Answer:
    """The result of a coroutine that needs to wait for nothing."""
    try:
        work.send(None)
    except StopIteration as done:
        result: Answer = done.value
        return result
    raise AssertionError("it waits")


class Clock:
    """Seconds that pass only when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


def small_config(**knobs: Any) -> Config:
    """16 slots in segments of 4 pages, nothing taken ahead of need; `knobs` change that."""
    small = {
        "dram_bytes": 16 * PAGE_BYTES,
        "dram_segment_bytes": 4 * PAGE_BYTES,
        "dram_grow_ahead_bytes": 0,
        "dram_huge_pages": False,
        "lease_s": 30.0,
        "lease_s_max": 300.0,
    }
    return Config(**{**small, **knobs})


def chain(name: str, blocks: int, *, size_bytes: int = HASH_BYTES) -> list[bytes]:
    """The hashes of a chain of that name; a longer chain of the same name begins with a shorter one."""
    return [hashlib.sha256(f"{name}/{depth}".encode()).digest()[:size_bytes] for depth in range(blocks)]


def content_of(block_hash: bytes, writer: int = 0, *, size_bytes: int = BLOCK_BYTES) -> bytes:
    """The bytes that a writer stores for a hash: different for every hash and writer."""
    return hashlib.shake_128(block_hash + writer.to_bytes(8, "little")).digest(size_bytes)


def spec_of(
    name: str = "model",
    *,
    tenant: str = "uid:1",
    label: str = "",
    block_size_bytes: int = BLOCK_BYTES,
    tokens_per_block: int = 16,
    hash_size_bytes: int = HASH_BYTES,
) -> NamespaceSpec:
    """The namespace of a model of that name."""
    key = NamespaceKey(Tenant(tenant), hashlib.sha256(name.encode()).digest())
    return NamespaceSpec(key, label or name, block_size_bytes, tokens_per_block, hash_size_bytes)


@dataclass(eq=False)
class Engine:
    """One connected process: the store's calls with plain lists of hashes, and the bytes behind them."""

    store: Store
    peer: Peer
    namespace_id: int = 1
    notices: list[Notice] = field(default_factory=list)

    @property
    def namespace(self) -> Namespace:
        return self.peer.namespaces[self.namespace_id - 1]

    @property
    def added_ids(self) -> list[int]:
        """Segments that it was told to map."""
        return [number for notice in self._changes() for number in notice.added_ids]

    @property
    def retired_ids(self) -> list[int]:
        """Segments that it was told to unmap."""
        return [number for notice in self._changes() for number in notice.retired_ids]

    def lookup(self, hashes: Sequence[bytes]) -> Looked:
        return self.store.lookup(self.peer, self.namespace_id, b"".join(hashes))

    def get(
        self,
        hashes: Sequence[bytes],
        *,
        session_id: str = "",
        request_id: str = "",
        duration_s: float = 0.0,
        max_blocks: int = 0,
        accepts_shifts: bool = False,
    ) -> Granted:
        return at_once(
            self.store.get(
                self.peer,
                self.namespace_id,
                b"".join(hashes),
                session_id=session_id,
                request_id=request_id,
                duration_s=duration_s,
                max_blocks=max_blocks,
                accepts_shifts=accepts_shifts,
            )
        )

    def truncate(
        self,
        session_id: str,
        hashes: Sequence[bytes],
        keep: KeepRanges | DropOldest,
        *,
        source: Sequence[bytes] = (),
    ) -> Truncated:
        return self.store.truncate(
            self.peer, self.namespace_id, b"".join(source), keep, b"".join(hashes), session_id=session_id
        )

    async def put(
        self,
        hashes: Sequence[bytes],
        *,
        parent: bytes = b"",
        session_id: str = "",
        request_id: str = "",
        duration_s: float = 0.0,
    ) -> Reserved:
        return await self.store.put(
            self.peer,
            self.namespace_id,
            parent,
            b"".join(hashes),
            session_id=session_id,
            request_id=request_id,
            duration_s=duration_s,
        )

    async def save(
        self, hashes: Sequence[bytes], *, parent: bytes = b"", session_id: str = "", writer: int = 0
    ) -> Reserved:
        """Put, write every reserved block's content, commit."""
        reserved = await self.put(hashes, parent=parent, session_id=session_id)
        if reserved.hold_id:
            known = sum(blocks for blocks, _ in reserved.known)
            contents = [content_of(block_hash, writer) for block_hash in hashes[known:]]
            self.write(reserved.slots, contents)
            self.store.commit(self.peer, reserved.hold_id, [])
        return reserved

    def write(self, slots: Slots, contents: Sequence[bytes]) -> None:
        """Fill slots as a process that maps the segments would."""
        for slot, content in zip(slots.tolist(), contents, strict=True):
            self.namespace.pool.memory(slot, len(content))[:] = content

    def read(self, slots: Slots) -> list[bytes]:
        """The bytes of slots."""
        return [bytes(self.namespace.pool.memory(slot, BLOCK_BYTES)) for slot in slots.tolist()]

    def load(self, hashes: Sequence[bytes]) -> list[bytes]:
        """Get, read, release: the contents of the leading held blocks."""
        granted = self.get(hashes)
        contents = self.read(granted.slots)
        if granted.hold_id:
            self.store.release(self.peer, [granted.hold_id], "")
        return contents

    def commit(self, reserved: Reserved, positions: Sequence[int] = ()) -> list[tuple[int, Any]]:
        return self.store.commit(self.peer, reserved.hold_id, positions)

    def hang_up(self) -> None:
        self.store.hang_up(self.peer)

    def _changes(self) -> Iterator[SegmentsChanged]:
        return (notice for notice in self.notices if isinstance(notice, SegmentsChanged))


class Workplace:
    """A store, its clock and an event loop. A context manager; checks the store's invariants as it closes."""

    def __init__(self, config: Config | None = None) -> None:
        self.clock = Clock()
        self.store = Store(config or small_config(), Metrics(version="0"), clock=self.clock)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Workplace:
        self._runner.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None:
                self.store.check()
        finally:
            self.store.close()
            self._runner.__exit__(kind, *exception)

    def run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """The event loop works on this until it is done."""
        return self._runner.run(work)

    def engine(self, *specs: NamespaceSpec, uid: int = 1) -> Engine:
        """A process of that user, attached to these namespaces (one called "model" if none are named)."""
        return self.run(self.attached(*specs, uid=uid))

    async def attached(self, *specs: NamespaceSpec, uid: int = 1) -> Engine:
        """`engine`, for tests that attach several at once."""
        peer = self.store.connect(Identity(f"uid:{uid}", process_id=uid))
        engine = Engine(self.store, peer)
        await self.store.attach(peer, f"engine of {uid}", specs or [spec_of(tenant=f"uid:{uid}")])
        peer.notify = engine.notices.append
        return engine

    def save(self, engine: Engine, hashes: Sequence[bytes], *, parent: bytes = b"", session_id: str = "") -> Reserved:
        """`Engine.save`, waited for."""
        return self.run(engine.save(hashes, parent=parent, session_id=session_id))

    def put(self, engine: Engine, hashes: Sequence[bytes], **arguments: Any) -> Reserved:
        """`Engine.put`, waited for."""
        return self.run(engine.put(hashes, **arguments))

    def upkeep(self) -> None:
        """One round of the store's own work."""
        self.run(self.store.upkeep())

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """What happens inside leaves the store's state as it was."""
        before = snapshot(self.store)
        yield
        assert snapshot(self.store) == before
        self.store.check()


def snapshot(store: Store) -> dict[str, Any]:
    """Everything that callers can tell apart, as plain comparable values."""
    return {
        "arena": store.arena.used_bytes,
        "draining": store.is_draining,
        "instances": [
            (peer.instance_id, peer.is_attached, [namespace.spec.key for namespace in peer.namespaces])
            for peer in store.instances
        ],
        "holds": [
            (
                hold.hold_id,
                hold.kind,
                hold.instance_id,
                hold.slots.tolist(),
                hold.positions.tolist(),
                hold.expires_at_s,
                hold.expired,
            )
            for hold in store.leases
        ],
        "namespaces": {key: _namespace_snapshot(namespace) for key, namespace in store.namespaces.items()},
    }


def _namespace_snapshot(namespace: Namespace) -> dict[str, Any]:
    index, pool = namespace.index, namespace.pool
    rows = np.flatnonzero(index.state != State.ABSENT).tolist()
    return {
        "blocks": {
            index.hash_of(row): (
                int(index.state[row]),
                int(index.slot[row]),
                index.hash_of(int(index.parent[row])) if index.parent[row] != NO_ROW else b"",
                int(index.uses[row]),
                float(index.last_used_s[row]),
                namespace.sessions.is_tip(row),
                int(index.source[row]),
            )
            for row in rows
        },
        "aliases": len(namespace.aliases),
        "sessions": len(namespace.sessions),
        "holders": pool.holders.tolist(),
        "free": pool.free_slots,
        "segments": [
            (position, segment.segment_id, segment.generations.tolist()) for position, segment in pool.live_segments()
        ],
        "counters": (
            namespace.counters.requested,
            namespace.counters.dram_hits,
            namespace.counters.misses,
            namespace.counters.committed,
            dict(namespace.counters.dropped),
        ),
    }


def open_descriptors() -> int:
    """How many descriptors this process has open, those of garbage not counted."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def until(condition: Callable[[], bool], *, turns: int = 10_000) -> Coroutine[Any, Any, None]:
    """Let the event loop and its threads go on until the condition holds; fails after so many turns of 1 ms."""

    async def wait() -> None:
        for _ in range(turns):
            if condition():
                return
            await asyncio.sleep(0.001)
        raise AssertionError("the state was not reached")

    return wait()
