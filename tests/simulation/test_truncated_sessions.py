"""Conversations that overflow again and again, on two tiers, with crashes: a byte or a shift may never differ."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from kvservice.blocks import BlockHash
from kvservice.errors import CapacityExhausted
from kvservice.index import NO_OWNER
from kvservice.store import recovery
from kvservice.store.arrivals import Landing
from kvservice.store.truncating import KeepRanges
from tests.nodes import Node
from tests.stores import HASH_BYTES, content_of

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

TOKENS = 16
WINDOW = 8
SESSIONS = 4
STEPS = 150
OPERATIONS = ["turn"] * 8 + ["load"] * 4 + ["flush", "forget", "stranger", "crash", "stop"]


Version = tuple[bytes, int]
"""Whose content a block may come with, and the position that this content was computed at."""


@dataclass
class Conversation:
    """What a session's chain is now. A block may come as any version that was ever stored or named for its hash."""

    name: str
    turns: int = 0
    hashes: list[bytes] = field(default_factory=list)
    versions: dict[bytes, set[Version]] = field(default_factory=lambda: defaultdict(set))

    def grow(self, blocks: int) -> None:
        for _ in range(blocks):
            self.turns += 1
            before = self.hashes[-1] if self.hashes else self.name.encode()
            self.hashes.append(hashlib.sha256(before + self.turns.to_bytes(2, "big")).digest()[:HASH_BYTES])

    def computed(self, start: int) -> None:
        """The blocks from `start` on were computed where they stand."""
        for at, block_hash in enumerate(self.hashes[start:], start=start):
            self.versions[block_hash].add((block_hash, at))

    def truncated(self, sinks: int, resume: int) -> Conversation:
        """The same conversation without the blocks from `sinks` to `resume`, under salted names."""
        shorter = Conversation(self.name, self.turns, [], self.versions)
        before = self.name.encode() + self.hashes[resume - 1]
        for at in [*range(sinks), *range(resume, len(self.hashes))]:
            before = hashlib.sha256(before + self.hashes[at]).digest()
            shorter.hashes.append(before[:HASH_BYTES])
            self.versions[shorter.hashes[-1]] |= self.versions[self.hashes[at]]
        return shorter

    def is_right(self, at: int, content: bytes, shift: int) -> bool:
        """Whether bytes and shift belong together and to the block at that place."""
        return any(
            content == content_of(source) and shift == (at - position) * TOKENS
            for source, position in self.versions[self.hashes[at]]
        )


async def load(node: Node, talk: Conversation, session: str) -> int:
    """Load and compare every byte and every shift; how many leading blocks came."""
    granted = await node.store.get(
        node.engine.peer, 1, b"".join(talk.hashes),
        session_id=session, request_id="", duration_s=0.0, max_blocks=0, accepts_shifts=True,
    )  # fmt: skip
    came = len(granted.slots)
    for position, arrival in granted.pending.items():
        if (await arrival.landed)[granted.rows[position]] is not Landing.OK:
            came = min(came, position)
    shifts = list(granted.shifts) or [0] * came
    for at, content in enumerate(node.engine.read(granted.slots[:came])):
        assert talk.is_right(at, content, shifts[at]), "a block came with bytes or a shift that are not its own"
    if granted.hold_id:
        node.store.release(node.engine.peer, [granted.hold_id])
    return came


async def turn(node: Node, chance: random.Random, talk: Conversation) -> tuple[Conversation, bool]:
    """One turn, with a truncation before it if the window overflows; and whether all of the history was found."""
    new = chance.randrange(1, 4)
    if len(talk.hashes) + new > WINDOW:
        sinks = chance.randrange(2)
        shorter = talk.truncated(sinks, sinks + WINDOW // 2)
        ranges = [(0, sinks * TOKENS)] * bool(sinks) + [((sinks + WINDOW // 2) * TOKENS, len(talk.hashes) * TOKENS)]
        if len(talk.hashes) > sinks + WINDOW // 2:
            node.engine.truncate(talk.name, shorter.hashes, KeepRanges(ranges), source=talk.hashes)
        talk = shorter
    history = len(talk.hashes)
    found = await load(node, talk, talk.name) if history else 0
    talk.grow(new)
    talk.computed(found)  # what is missing as well: where it stands now
    with suppress(CapacityExhausted):
        await node.engine.save(
            talk.hashes[found:], parent=talk.hashes[found - 1] if found else b"", session_id=talk.name
        )
    return talk, found == history


async def simulate(directory: Path, seed: int) -> int:
    chance = random.Random(seed)
    node, resumed = Node(directory), 0
    await node.start()
    talks = [Conversation(f"talk {number}") for number in range(SESSIONS)]
    for _ in range(STEPS):
        at = chance.randrange(SESSIONS)
        match chance.choice(OPERATIONS):
            case "turn":
                talks[at], was_found = await turn(node, chance, talks[at])
                resumed += was_found
            case "load" if talks[at].hashes:
                await load(node, talks[at], talks[at].name)
            case "stranger" if talks[at].hashes:
                rows = node.engine.namespace.index.rows_of([BlockHash(one) for one in talks[at].hashes])
                unowned = int((node.engine.namespace.index.owner[rows] == NO_OWNER).sum())
                assert await load(node, talks[at], "somebody else") <= unowned
            case "forget":
                node.store.forget_session(node.engine.peer, 1, talks[at].name)
            case "flush":
                await node.flush()
            case "crash" | "stop" as end:
                await (node.crash() if end == "crash" else node.stop())
                await node.start()
        await node.quiet()
        node.store.check()
    await node.stop()
    return resumed


@pytest.mark.parametrize("seed", range(12))
def test_truncated_sessions_against_a_model(tmp_path: Path, seed: int) -> None:
    assert asyncio.run(simulate(tmp_path / "nvme", seed)) > 5


def test_truncated_sessions_survive_a_restart_with_all_their_blocks(tmp_path: Path) -> None:
    async def run() -> None:
        node = Node(tmp_path / "nvme")
        await node.start()
        talk = Conversation("talk")
        talk.grow(6)
        talk.computed(0)
        await node.engine.save(talk.hashes, session_id="talk")
        for sinks, resume, new in ((0, 3, 4), (1, 4, 5)):
            shorter = talk.truncated(sinks, resume)
            ranges = [(0, sinks * TOKENS)] * bool(sinks) + [(resume * TOKENS, len(talk.hashes) * TOKENS)]
            done = node.engine.truncate("talk", shorter.hashes, KeepRanges(ranges), source=talk.hashes)
            assert done.held_blocks == len(shorter.hashes)
            parent, talk = shorter.hashes[-1], shorter
            talk.grow(new)
            talk.computed(len(talk.hashes) - new)
            await node.engine.save(talk.hashes[-new:], parent=parent, session_id="talk")
        kept = [talk.versions[one] for one in talk.hashes[:4]]
        assert [[position for _, position in of_one] for of_one in kept] == [[3], [4], [5], [6]], "both former chains"
        for end in (node.stop, node.crash):
            await end()
            await node.start()
            assert await load(node, talk, "talk") == len(talk.hashes)
            assert await load(node, talk, "other") == 0
            assert len(node.engine.namespace.aliases) == 3 + 4
            node.store.check()
        await node.stop()

    asyncio.run(run())


def test_an_alias_whose_source_stands_elsewhere_is_forgotten_at_the_start(tmp_path: Path) -> None:
    """Its shift is the difference of two places: with another block at the source's, it would be wrong."""

    async def run() -> None:
        node = Node(tmp_path / "nvme")
        await node.start()
        talk = Conversation("talk")
        talk.grow(6)
        await node.engine.save(talk.hashes, session_id="talk")
        shorter = talk.truncated(0, 3)
        node.engine.truncate("talk", shorter.hashes, KeepRanges([(3 * TOKENS, 6 * TOKENS)]), source=talk.hashes)
        await node.stop()
        await node.start(recover=False)
        (disk,) = node.store.disks.disks
        found = disk.volume.recover()
        assert {alias.block_hash: alias.source_depth - alias.depth for alias in found.aliases} == dict.fromkeys(
            shorter.hashes, 3
        )
        for elsewhere, known in (((), 3), ((2,), 2), ((0,), 0)):
            wrong = {shorter.hashes[at] for at in elsewhere}
            aliases = [
                replace(alias, source_depth=alias.source_depth + 1) if alias.block_hash in wrong else alias
                for alias in found.aliases
            ]
            (restored,) = recovery.restore(
                node.store.disks, [(disk, replace(found, aliases=aliases))], now_s=0.0, wall_now_s=0.0
            )
            index = restored.index
            assert index.rows_of([BlockHash(one) for one in talk.hashes]).size == 6
            assert index.rows_of([BlockHash(one) for one in shorter.hashes]).size == known
        await node.stop()

    asyncio.run(run())
