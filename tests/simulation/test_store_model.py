"""Engines that save, load, die, freeze and come back late, at random, beside a dictionary: a miss is allowed, a wrong
byte never.

Covers the store with real memory, several processes, two namespaces and a small arena; the clock is the test's. Does
not cover sockets, gRPC and the client library (tests/integration).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvservice import errors
from kvservice.blocks import DropReason
from kvservice.leases import HoldKind
from kvservice.store.outcomes import Committed, Written
from tests.stores import PAGE_BYTES, Engine, Workplace, chain, content_of, small_config, spec_of

pytestmark = pytest.mark.unit

NAMESPACES = ("left", "right")
ENGINES_MAX = 4
DEPTH_MAX = 6
BRANCHES = 3

NUMBER = st.integers(0, 1 << 16)
DEPTH = st.integers(1, DEPTH_MAX)


def chain_of(number: int, depth: int) -> list[bytes]:
    """One of a few chains, which share prefixes: a trunk of two blocks, then a branch."""
    trunk, branch = divmod(number % (2 * BRANCHES), BRANCHES)
    return [*chain(f"trunk {trunk}", 2), *chain(f"branch {trunk} {branch}", DEPTH_MAX)][:depth]


@dataclass(eq=False)
class Copying:
    """A process in the middle of a copy from or into slots: it may go on whenever it likes, also much too late."""

    engine: Engine
    hold_id: int
    hashes: list[bytes]
    slots: list[int]
    generations: list[int]
    writer: int = 0
    committed: set[int] = field(default_factory=set)


class Stored(RuleBasedStateMachine):
    """The store, and which bytes every hash of every namespace was last published with."""

    @initialize(quota=st.sampled_from([0, 8 * PAGE_BYTES]), growth=st.sampled_from([0, 4 * PAGE_BYTES]))
    def open(self, quota: int, growth: int) -> None:
        self.workplace = Workplace(
            small_config(
                dram_bytes=12 * PAGE_BYTES,
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
        self.engines: list[Engine] = []
        self.readers: list[Copying] = []
        self.writers: list[Copying] = []
        self.frozen: list[Copying] = []
        self.published: dict[tuple[str, bytes], bytes] = {}
        self.writers_so_far = 0
        self.attach(0)

    def teardown(self) -> None:
        if hasattr(self, "workplace"):
            with self.workplace:
                for engine in self.engines:
                    engine.hang_up()
                assert list(self.workplace.store.leases) == []

    # ---------------------------------------------------------------- processes

    @rule(namespace=NUMBER)
    @precondition(lambda self: len(self.engines) < ENGINES_MAX)
    def attach(self, namespace: int) -> None:
        try:
            spec = spec_of(NAMESPACES[namespace % 2], tenant="uid:1")
            self.engines.append(self.workplace.engine(spec))
        except errors.CapacityExhausted:
            pass  # the other namespace's segments are all in use

    @rule(which=NUMBER)
    @precondition(lambda self: self.engines)
    def die(self, which: int) -> None:
        """By kill -9: the kernel hangs up for it, and nothing of it copies on."""
        engine = self.engines.pop(which % len(self.engines))
        engine.hang_up()
        for copying in (self.readers, self.writers, self.frozen):
            copying[:] = [copy for copy in copying if copy.engine is not engine]

    @rule(which=NUMBER)
    @precondition(lambda self: self.engines)
    def lose_the_stream(self, which: int) -> None:
        """Its stream breaks and it attaches again on the same token; its copies go on, too late."""
        engine = self.engines[which % len(self.engines)]
        spec = engine.namespace.spec
        self.workplace.store.detach(engine.peer)
        self._freeze(lambda copy: copy.engine is engine)
        self.workplace.run(self.workplace.store.attach(engine.peer, "again", [spec]))

    @rule(seconds=st.sampled_from([1.0, 10.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.workplace.clock.advance(seconds)
        now_s = self.workplace.clock.now_s
        live = {hold.hold_id for hold in self.workplace.store.leases if now_s < hold.expires_at_s and not hold.expired}
        self._freeze(lambda copy: copy.hold_id not in live)

    @rule()
    def upkeep(self) -> None:
        self.workplace.upkeep()

    # ------------------------------------------------------------------ reading

    @rule(which=NUMBER, number=NUMBER, depth=DEPTH, session=st.sampled_from(["", "a", "b", "c", "d"]))
    @precondition(lambda self: self.engines)
    def get(self, which: int, number: int, depth: int, session: str) -> None:
        engine = self.engines[which % len(self.engines)]
        hashes = chain_of(number, depth)
        looked = engine.lookup(hashes)
        try:
            granted = engine.get(hashes, session_id=session)
        except errors.Overloaded:
            return
        assert len(granted.slots) == looked.dram_blocks
        assert len(granted.slots) + granted.missed == depth
        if not granted.hold_id:
            assert not len(granted.slots)
            return
        generations = self._generations(engine, granted.slots.tolist())
        copy = Copying(engine, granted.hold_id, hashes, granted.slots.tolist(), generations)
        self.readers.append(copy)
        self._compare(copy)

    @rule(which=NUMBER)
    @precondition(lambda self: self.readers)
    def read_on(self, which: int) -> None:
        """A reader with a live lease: its bytes are there to stay, whatever happened since."""
        self._compare(self.readers[which % len(self.readers)])

    @rule(which=NUMBER)
    @precondition(lambda self: self.readers)
    def release(self, which: int) -> None:
        copy = self.readers.pop(which % len(self.readers))
        self._compare(copy)
        self.workplace.store.release(copy.engine.peer, [copy.hold_id], "")

    # ------------------------------------------------------------------ writing

    @rule(which=NUMBER, number=NUMBER, depth=DEPTH, session=st.sampled_from(["", "a", "b"]), split=st.integers(0, 2))
    @precondition(lambda self: self.engines)
    def put(self, which: int, number: int, depth: int, session: str, split: int) -> None:
        engine = self.engines[which % len(self.engines)]
        hashes = chain_of(number, depth)
        parent, tail = (hashes[split - 1], hashes[split:]) if 0 < split < depth else (b"", hashes)
        try:
            reserved = self.workplace.put(engine, tail, parent=parent, session_id=session)
        except (errors.Overloaded, errors.CapacityExhausted):
            return
        known = sum(blocks for blocks, _ in reserved.known)
        if not reserved.hold_id:
            assert known == len(tail)
            return
        assert Written.PARENT_MISSING not in [written for _, written in reserved.known]
        self.writers_so_far += 1
        slots = reserved.slots.tolist()
        copy = Copying(
            engine, reserved.hold_id, tail[known:], slots, self._generations(engine, slots), self.writers_so_far
        )
        self.writers.append(copy)
        # Half of the copy happens now; the rest when it commits, or too late.
        self._write(copy, len(slots) // 2)

    @rule(which=NUMBER, some=st.integers(0, 63))
    @precondition(lambda self: self.writers)
    def commit(self, which: int, some: int) -> None:
        copy = self.writers[which % len(self.writers)]
        left = [position for position in range(len(copy.slots)) if position not in copy.committed]
        positions = [position for position in left if some >> position & 1] or left
        self._write(copy, len(copy.slots), only=positions)
        outcomes = [
            outcome
            for blocks, outcome in self.workplace.store.commit(copy.engine.peer, copy.hold_id, positions)
            for _ in range(blocks)
        ]
        assert len(outcomes) == len(positions)
        for position, outcome in zip(positions, outcomes, strict=True):
            assert outcome in (Committed.PUBLISHED, Committed.AWAITING_PARENT, DropReason.PREFIX_LOST)
            if outcome is not DropReason.PREFIX_LOST:
                # What waits for its prefix counts: once readable, it has these bytes.
                self._publish(copy, position)
        copy.committed.update(positions)
        if len(copy.committed) == len(copy.slots):
            self.writers.remove(copy)

    @rule(which=NUMBER)
    @precondition(lambda self: self.writers)
    def abort(self, which: int) -> None:
        copy = self.writers.pop(which % len(self.writers))
        self.workplace.store.abort(copy.engine.peer, copy.hold_id)

    # ---------------------------------------------------------------- much too late

    @rule(which=NUMBER)
    @precondition(lambda self: self.frozen)
    def copy_late(self, which: int) -> None:
        """A process that was stopped goes on: it writes over or reads from slots that it lost long ago."""
        copy = self.frozen[which % len(self.frozen)]
        if copy.writer:
            self._write(copy, len(copy.slots))
        else:
            self._compare(copy)

    @rule(which=NUMBER)
    @precondition(lambda self: self.frozen)
    def acknowledge_late(self, which: int) -> None:
        copy = self.frozen.pop(which % len(self.frozen))
        store, peer = self.workplace.store, copy.engine.peer
        if copy.writer:
            with pytest.raises(errors.ReservationLost):
                store.commit(peer, copy.hold_id, [])
            store.abort(peer, copy.hold_id)
            with pytest.raises(errors.LeaseUnknown):
                store.abort(peer, copy.hold_id)
        else:
            with pytest.raises(errors.LeaseExpired):
                store.renew(peer, [copy.hold_id], [], 0.0)
            store.release(peer, [copy.hold_id], "")

    # --------------------------------------------------------------------- forgetting

    @rule(which=NUMBER, session=st.sampled_from(["a", "b", "c", "d"]))
    @precondition(lambda self: self.engines)
    def forget_session(self, which: int, session: str) -> None:
        engine = self.engines[which % len(self.engines)]
        before = len(engine.namespace.index)
        forgotten = self.workplace.store.forget_session(engine.peer, 1, session)
        assert before - len(engine.namespace.index) == forgotten.dropped >= forgotten.in_use

    @rule(which=NUMBER)
    @precondition(lambda self: self.engines)
    def forget_namespace(self, which: int) -> None:
        engine = self.engines[which % len(self.engines)]
        self.workplace.store.forget_namespace(engine.peer, 1)
        assert len(engine.namespace.index) == 0
        for number in range(2 * BRANCHES):
            assert engine.lookup(chain_of(number, DEPTH_MAX)).dram_blocks == 0

    # ---------------------------------------------------------------------- what holds

    @invariant()
    def the_books_agree(self) -> None:
        if not hasattr(self, "workplace"):
            return
        store = self.workplace.store
        store.check()
        assert store.arena.used_bytes <= store.config.dram_bytes
        for namespace in store.namespaces.values():
            assert not namespace.quota_bytes or namespace.pool.size_bytes <= namespace.quota_bytes
        copies = {copy.hold_id for copy in [*self.readers, *self.writers, *self.frozen]}
        assert {hold.hold_id for hold in store.leases} == copies
        assert store.leases.count(HoldKind.WRITE) == sum(1 for hold in store.leases if hold.kind is HoldKind.WRITE)

    @invariant()
    def everything_held_has_its_bytes(self) -> None:
        """Every chain that can be read has the bytes that were committed for it, without asking for a lease."""
        for engine in getattr(self, "engines", ()):
            index, pool = engine.namespace.index, engine.namespace.pool
            for number in range(2 * BRANCHES):
                hashes = chain_of(number, DEPTH_MAX)
                held = engine.lookup(hashes).dram_blocks
                for block_hash, row in zip(hashes, index.rows_of(hashes[:held]).tolist(), strict=False):
                    content = bytes(pool.memory(int(index.slot[row]), 64))
                    assert content == self.published[engine.namespace.spec.label, block_hash]

    # ---------------------------------------------------------------------- privately

    def _freeze(self, is_frozen: object) -> None:
        assert callable(is_frozen)
        for copying in (self.readers, self.writers):
            self.frozen.extend(copy for copy in copying if is_frozen(copy))
            copying[:] = [copy for copy in copying if not is_frozen(copy)]

    def _generations(self, engine: Engine, slots: list[int]) -> list[int]:
        pool = engine.namespace.pool
        segments = dict(pool.live_segments())
        return [int(segments[slot // 3].generations[slot % 3]) for slot in slots]

    def _write(self, copy: Copying, count: int, *, only: list[int] | None = None) -> None:
        pool = copy.engine.namespace.pool
        for position, (block_hash, slot) in enumerate(zip(copy.hashes[:count], copy.slots[:count], strict=True)):
            # A client does not touch what it committed: those slots are out of its hands.
            if position not in copy.committed and (only is None or position in only):
                pool.memory(slot, 64)[:] = content_of(block_hash, copy.writer)

    def _publish(self, copy: Copying, position: int) -> None:
        key = (copy.engine.namespace.spec.label, copy.hashes[position])
        self.published[key] = content_of(copy.hashes[position], copy.writer)

    def _compare(self, copy: Copying) -> None:
        """Every block whose generation is still the lease's has the bytes that were handed out."""
        pool = copy.engine.namespace.pool
        now = self._generations(copy.engine, copy.slots)
        for block_hash, slot, before, after in zip(copy.hashes, copy.slots, copy.generations, now, strict=False):
            assert before == after, "a slot changed hands under its reader"
            content = bytes(pool.memory(slot, 64))
            writers = {content_of(block_hash, writer) for writer in range(1, self.writers_so_far + 1)}
            assert content in writers


TestStored = Stored.TestCase
TestStored.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
