"""machine: engines that save, load, die, freeze and come back late, beside a dictionary of what they stored.

Covers the store with real memory, several processes, two namespaces and a small arena; the clock is the test's. Does
not cover sockets, gRPC and the client library (tests/integration).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvservice import errors
from kvservice.blocks import BlockHash, DropReason
from kvservice.store.outcomes import Committed
from tests.stores import PAGE_BYTES, Engine, Workplace, chain, content_of, small_config, spec_of

NAMESPACES = ("left", "right")
ENGINES = 4
DEPTH_MAX = 6
BRANCHES = 3
CHAINS = 2 * BRANCHES

NUMBER = st.integers(0, 11)
DEPTH = st.integers(1, DEPTH_MAX)
SESSION = st.sampled_from(["", "a", "b", "c", "d"])


def chain_of(number: int, depth: int) -> list[bytes]:
    """One of a few chains, which share prefixes: a trunk of two blocks, then a branch."""
    trunk, branch = divmod(number % CHAINS, BRANCHES)
    return [*chain(f"trunk {trunk}", 2), *chain(f"branch {trunk} {branch}", DEPTH_MAX)][:depth]


@dataclass(eq=False)
class Copying:
    """A process in the middle of a copy from or into slots: it may go on whenever it likes, also much too late."""

    engine: Engine
    hold_id: int
    hashes: list[bytes]
    slots: list[int]
    generations: list[int]
    contents: list[bytes]
    writer: int = 0
    committed: set[int] = field(default_factory=set)


class Stored(RuleBasedStateMachine):
    """The store, and which bytes every hash of every namespace was last published with."""

    @initialize(quota=st.sampled_from([0, 14 * PAGE_BYTES]), growth=st.sampled_from([0, 4 * PAGE_BYTES]))
    def open(self, quota: int, growth: int) -> None:
        self.workplace = Workplace(
            small_config(
                dram_bytes=24 * PAGE_BYTES,
                dram_segment_bytes=3 * PAGE_BYTES,
                dram_quota_bytes=quota,
                dram_grow_ahead_bytes=growth,
                leases_per_instance_max=3,
                reservations_per_instance_max=3,
                sessions_max=3,
                explain_history_blocks=8,
                high_watermark=0.9,
                low_watermark=0.6,
            )
        )
        self.store = self.workplace.store
        self.engines: list[Engine] = []
        self.readers: list[Copying] = []
        self.writers: list[Copying] = []
        self.frozen: list[Copying] = []
        self.published: dict[tuple[str, bytes], bytes] = {}
        self.writers_so_far = 0
        for number in range(ENGINES):
            self._attach(number)

    def teardown(self) -> None:
        if hasattr(self, "workplace"):
            with self.workplace:
                for engine in self.engines:
                    engine.hang_up()
                assert list(self.workplace.store.leases) == []

    # ----------------------------------------------------- what engines do all day

    @rule(which=NUMBER, numbers=st.lists(NUMBER, min_size=1, max_size=4), depth=DEPTH, session=SESSION)
    def save(self, which: int, numbers: list[int], depth: int, session: str) -> None:
        """Put, write and commit one chain after another."""
        for number in numbers:
            copy = self._put(self._one(which), chain_of(number, depth), session=session)
            if copy is not None:
                self._commit(copy, list(range(len(copy.slots))))

    @rule(which=NUMBER, numbers=st.lists(NUMBER, min_size=1, max_size=4), depth=DEPTH, session=SESSION)
    def load(self, which: int, numbers: list[int], depth: int, session: str) -> None:
        """Get, compare and release one chain after another."""
        for number in numbers:
            copy = self._get(self._one(which), chain_of(number, depth), session=session)
            if copy is not None:
                self._release(copy)

    @rule(which=NUMBER, number=NUMBER, depth=DEPTH, session=SESSION)
    def begin_to_read(self, which: int, number: int, depth: int, session: str) -> None:
        self._get(self._one(which), chain_of(number, depth), session=session)

    @rule(which=NUMBER, number=NUMBER, depth=DEPTH, session=SESSION, split=st.integers(0, 2))
    def begin_to_write(self, which: int, number: int, depth: int, session: str, split: int) -> None:
        hashes = chain_of(number, depth)
        if 0 < split < depth:
            self._put(self._one(which), hashes[split:], parent=hashes[split - 1], session=session)
        else:
            self._put(self._one(which), hashes, session=session)

    @rule(which=NUMBER, some=st.integers(1, 63))
    @precondition(lambda self: self.writers)
    def commit(self, which: int, some: int) -> None:
        """Some of what is left, in any order of the chain."""
        copy = self.writers[which % len(self.writers)]
        left = [position for position in range(len(copy.slots)) if position not in copy.committed]
        self._commit(copy, [position for position in left if some >> position & 1] or left)

    @rule(which=NUMBER)
    @precondition(lambda self: self.readers or self.writers)
    def finish(self, which: int) -> None:
        """A reader releases, a writer aborts."""
        both = [*self.readers, *self.writers]
        copy = both[which % len(both)]
        if copy.writer:
            self.writers.remove(copy)
            self.store.abort(copy.engine.peer, copy.hold_id)
        else:
            self._release(copy)

    # ----------------------------------------------------------- what goes wrong

    @rule(seconds=st.sampled_from([1.0, 10.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.workplace.clock.advance(seconds)
        now_s = self.workplace.clock.now_s
        live = {hold.hold_id for hold in self.store.leases if now_s < hold.expires_at_s and not hold.expired}
        self._freeze({copy.hold_id for copy in [*self.readers, *self.writers]} - live)

    @rule()
    def upkeep(self) -> None:
        self.workplace.upkeep()

    @rule(which=NUMBER)
    @precondition(lambda self: self.frozen)
    def acknowledge_late(self, which: int) -> None:
        """A process that was stopped says at last that it touches its slots no more."""
        copy = self.frozen.pop(which % len(self.frozen))
        peer = copy.engine.peer
        if copy.writer:
            with pytest.raises(errors.ReservationLost):
                self.store.commit(peer, copy.hold_id, [])
            self.store.abort(peer, copy.hold_id)
            with pytest.raises(errors.LeaseUnknown):
                self.store.abort(peer, copy.hold_id)
        else:
            with pytest.raises(errors.LeaseExpired):
                self.store.renew(peer, [copy.hold_id], [], 0.0)
            self.store.release(peer, [copy.hold_id], "")

    @rule(which=NUMBER, how=st.sampled_from(["dies", "loses its stream"]))
    def engine(self, which: int, how: str) -> None:
        engine = self._one(which)
        if how == "dies":
            # kill -9: the kernel hangs up for it, and nothing of it copies on.
            self.engines.remove(engine)
            engine.hang_up()
            for copying in (self.readers, self.writers, self.frozen):
                copying[:] = [copy for copy in copying if copy.engine is not engine]
            self._attach(which)
        else:
            # It attaches again on the same token, and its copies go on, too late.
            spec = engine.namespace.spec
            self.store.detach(engine.peer)
            self._freeze({copy.hold_id for copy in [*self.readers, *self.writers] if copy.engine is engine})
            self.workplace.run(self.store.attach(engine.peer, "again", [spec]))

    @rule(which=NUMBER, session=SESSION)
    def forget(self, which: int, session: str) -> None:
        """A session, or without a name everything."""
        engine = self._one(which)
        before = len(engine.namespace.index)
        if session:
            forgotten = self.store.forget_session(engine.peer, 1, session)
        else:
            forgotten = self.store.forget_namespace(engine.peer, 1)
            assert len(engine.namespace.index) == 0
        assert before - len(engine.namespace.index) == forgotten.dropped >= forgotten.in_use

    # ---------------------------------------------------------------- what holds

    @invariant()
    def the_books_agree(self) -> None:
        if hasattr(self, "workplace"):
            self.store.check()
            assert self.store.arena.used_bytes <= self.store.config.dram_bytes
            for namespace in self.store.namespaces.values():
                quota_bytes = namespace.rule.dram_quota_bytes
                assert not quota_bytes or namespace.pool.size_bytes <= quota_bytes
            copies = {copy.hold_id for copy in [*self.readers, *self.writers, *self.frozen]}
            assert {hold.hold_id for hold in self.store.leases} == copies

    @invariant()
    def copies_go_on(self) -> None:
        """All the time, and late or not: readers compare their blocks, writers write over their slots."""
        if hasattr(self, "workplace"):
            for copy in [*self.readers, *self.writers, *self.frozen]:
                if copy.writer:
                    self._write(copy, range(len(copy.slots)))
                else:
                    self._compare(copy)

    @invariant()
    def everything_held_has_its_bytes(self) -> None:
        """Every block that could be read now has the bytes that were committed for it."""
        for engine in getattr(self, "engines", ()):
            for number in range(CHAINS):
                hashes = chain_of(number, DEPTH_MAX)
                held = engine.lookup(hashes).dram_blocks
                rows = engine.namespace.index.rows_of([BlockHash(block_hash) for block_hash in hashes[:held]])
                contents = engine.read(engine.namespace.index.slot[rows])
                for block_hash, content in zip(hashes, contents, strict=False):
                    assert content == self.published[engine.namespace.spec.label, block_hash]

    # ----------------------------------------------------------------- privately

    def _one(self, which: int) -> Engine:
        return self.engines[which % len(self.engines)]

    def _attach(self, number: int) -> None:
        spec = spec_of(NAMESPACES[number % 2], tenant="uid:1")
        try:
            self.engines.append(self.workplace.engine(spec))
        except errors.CapacityExhausted:
            # The other namespace's segments are all in use: it works for that one instead.
            self.engines.append(self.workplace.engine(spec_of(NAMESPACES[1 - number % 2], tenant="uid:1")))

    def _get(self, engine: Engine, hashes: list[bytes], *, session: str) -> Copying | None:
        looked = engine.lookup(hashes)
        try:
            granted = engine.get(hashes, session_id=session)
        except errors.Overloaded:
            return None
        slots = granted.slots.tolist()
        assert len(slots) == looked.dram_blocks == len(hashes) - granted.missed
        assert bool(granted.hold_id) == bool(slots)
        if not slots:
            return None
        contents = [self.published[engine.namespace.spec.label, block_hash] for block_hash in hashes[: len(slots)]]
        copy = Copying(engine, granted.hold_id, hashes, slots, self._generations(engine, slots), contents)
        self.readers.append(copy)
        self._compare(copy)
        return copy

    def _release(self, copy: Copying) -> None:
        self._compare(copy)
        self.readers.remove(copy)
        self.store.release(copy.engine.peer, [copy.hold_id], "")

    def _put(self, engine: Engine, hashes: list[bytes], *, parent: bytes = b"", session: str) -> Copying | None:
        try:
            reserved = self.workplace.put(engine, hashes, parent=parent, session_id=session)
        except (errors.Overloaded, errors.CapacityExhausted):
            return None
        known, slots = sum(blocks for blocks, _ in reserved.known), reserved.slots.tolist()
        assert known + len(slots) == len(hashes)
        assert bool(reserved.hold_id) == bool(slots)
        if not slots:
            return None
        self.writers_so_far += 1
        contents = [content_of(block_hash, self.writers_so_far) for block_hash in hashes[known:]]
        generations = self._generations(engine, slots)
        copy = Copying(
            engine, reserved.hold_id, hashes[known:], slots, generations, contents, writer=self.writers_so_far
        )
        self.writers.append(copy)
        return copy

    def _commit(self, copy: Copying, positions: list[int]) -> None:
        self._write(copy, positions)
        runs = self.store.commit(copy.engine.peer, copy.hold_id, positions)
        outcomes = [outcome for blocks, outcome in runs for _ in range(blocks)]
        for position, outcome in zip(positions, outcomes, strict=True):
            # What waits for its prefix counts as well: once it can be read, it has these bytes.
            if outcome in (Committed.PUBLISHED, Committed.AWAITING_PARENT):
                self.published[copy.engine.namespace.spec.label, copy.hashes[position]] = copy.contents[position]
            else:
                assert outcome is DropReason.PREFIX_LOST
        copy.committed.update(positions)
        if len(copy.committed) == len(copy.slots):
            self.writers.remove(copy)

    def _freeze(self, hold_ids: set[int]) -> None:
        for copying in (self.readers, self.writers):
            self.frozen.extend(copy for copy in copying if copy.hold_id in hold_ids)
            copying[:] = [copy for copy in copying if copy.hold_id not in hold_ids]

    def _generations(self, engine: Engine, slots: list[int]) -> list[int]:
        located = engine.namespace.pool.locate(np.array(slots, dtype=np.int32))
        return [int(generation) for _, _, generations in located for generation in generations]

    def _write(self, copy: Copying, positions: Iterable[int]) -> None:
        # A client does not touch what it committed: those slots are out of its hands.
        for position in [position for position in positions if position not in copy.committed]:
            copy.engine.write(np.array([copy.slots[position]], dtype=np.int32), [copy.contents[position]])

    def _compare(self, copy: Copying) -> None:
        """A reader that has not let go finds its bytes, however late: nobody else gets the slots."""
        assert self._generations(copy.engine, copy.slots) == copy.generations
        assert copy.engine.read(np.array(copy.slots, dtype=np.int32)) == copy.contents
