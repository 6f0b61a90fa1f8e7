"""versus: our daemon against another store: the same batches, from and into private buffers on both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import kvservice_client as kv
from benchmarks.batches import Batches
from benchmarks.daemon import attached
from benchmarks.measuring import Record, take_turns
from benchmarks.settings import Settings

# Room for several batches of the largest blocks, so that nothing is evicted.
_DRAM_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Shape:
    """What is moved at a time: `blocks` blocks of `block_size_bytes`, called `label` in the figures' names."""

    label: str
    block_size_bytes: int
    blocks: int

    @property
    def size_bytes(self) -> int:
        """Of the whole batch."""
        return self.blocks * self.block_size_bytes


class Opponent(Protocol):
    """The other store, with a batch of some shape. Both methods give seconds and check what can be checked, untimed."""

    def put(self, repetition: int) -> float:
        """Store the batch of that repetition under keys that were never used, after removing the one before it."""
        ...

    def get(self, repetition: int) -> float:
        """Fetch that batch into a private buffer, and compare every byte."""
        ...


def compare(
    name: str, opponent_with: Callable[[Shape], AbstractContextManager[Opponent]], settings: Settings
) -> Iterator[Record]:
    """vs_`name`_get_* and vs_`name`_put_* for every shape; higher is better for us."""
    for shape in (Shape(*batch) for batch in settings.versus_batches):
        label = f"bench versus {shape.label}"
        with (
            attached(label, block_size_bytes=shape.block_size_bytes, dram_bytes=_DRAM_BYTES) as client,
            opponent_with(shape) as opponent,
        ):
            yield from _compare(name, client, opponent, shape, settings)


def _compare(name: str, client: kv.Client, opponent: Opponent, shape: Shape, settings: Settings) -> Iterator[Record]:
    batches = Batches(
        client,
        blocks=shape.blocks,
        block_size_bytes=shape.block_size_bytes,
        repetitions=settings.repetitions,
    )
    batches.warm_up()
    _both(opponent, settings.repetitions)
    turns = take_turns(
        reference=lambda repetition: _both(opponent, repetition),
        ours=lambda repetition: {"put": batches.save(repetition), "get": batches.load(repetition)},
        repetitions=settings.repetitions,
        title=f"{name} {shape.label}",
    )
    for verb in ("get", "put"):
        yield turns.throughput(f"vs_{name}_{verb}_{shape.label}", shape.size_bytes, ours=verb, reference=verb)


def _both(opponent: Opponent, repetition: int) -> Mapping[str, float]:
    return {"put": opponent.put(repetition), "get": opponent.get(repetition)}
