"""blocks: the engine's blocks as loads and saves see them: filled from the service, and stored in it.

How the bytes travel is the business of a `BlockMemory`: `HostBlocks` here copies from address to address; those of
`gpu_blocks` have the daemon copy to and from a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import kvservice_client as kv
from kvservice_adapters.vllm.keys import KeyTurner
from kvservice_adapters.vllm.layout import KVLayout
from kvservice_adapters.vllm.orders import LoadOrder
from kvservice_client.memory import Copy, ThreadedCopier
from kvservice_client.outcomes import reason_of

_BLOCKS_PER_PUT_MAX = 512
_PUT_SHRINK = 8  # a full arena still takes a prefix, in smaller pieces
_COMMIT_S_MIN = 0.1


class Fence(Protocol):
    """A point in the engine's work on its device."""

    def synchronize(self) -> None:
        """Block until that work is done."""
        ...


@dataclass(frozen=True, slots=True)
class Filled:
    """What became of a load.

    Attributes:
        blocks: how many leading blocks of the order hold their bytes now, with keys that are right where they stand.
        reason: why not all.
        moved: of how many of these the tokens stand elsewhere than when they were computed.
        is_quiet: whether nobody writes into the order's blocks any more. Until it says so they are the load's.
    """

    blocks: int
    reason: str
    moved: int = 0
    is_quiet: Callable[[], bool] = lambda: True


class Owner(Protocol):
    """The request whose blocks are being saved. Any thread."""

    @property
    def keeps_blocks(self) -> bool:
        """Whether they have been its own until now."""
        ...

    def reading(self) -> AbstractContextManager[bool]:
        """Whether they are its own; where they are, they stay so inside. For milliseconds: the engine may wait."""
        ...


@dataclass(frozen=True, slots=True)
class SaveCall:
    """Where blocks belong in the service.

    Attributes:
        parent: hash of the block before the first; b"": there is none.
    """

    hashes: Sequence[bytes]
    parent: bytes
    session_id: str
    request_id: str
    deadline_s: float


class Source(Protocol):
    """Full blocks on their way into the service."""

    @property
    def needs_blocks(self) -> bool:
        """Whether the engine's blocks have to stay what they are until `save` is over."""
        ...

    def save(self, call: SaveCall) -> kv.SaveResult:
        """Store them. Blocks. A failure of the service is a result; called once."""
        ...

    def discard(self) -> None:
        """Instead of `save`."""
        ...


class BlockMemory(Protocol):
    """The engine's blocks. Any thread, where nothing else is said."""

    @property
    def layout(self) -> KVLayout:
        """Where they are."""
        ...

    def fence(self) -> Fence | None:
        """On the engine's thread: behind all that it has launched so far. None: that is done already."""
        ...

    def fill(self, order: LoadOrder, after: Fence | None, timeout_s: float) -> Filled:
        """Load these blocks, which the engine's work before `after` may still use. Blocks.

        Raises:
            KVServiceError, and whatever else goes wrong: nothing is in place, and nobody writes.
        """
        ...

    def sources(self, blocks: Sequence[tuple[Sequence[int], Owner]]) -> list[Source]:
        """On the engine's thread, when it has launched the step that fills these blocks: one source per owner."""
        ...

    def later_source(self, block_ids: Sequence[int], owner: Owner) -> Source:
        """Of blocks that were full when `sources` was called last."""
        ...

    def close(self) -> None:
        """Nothing touches the blocks when this returns. Blocks."""
        ...


class HostCopies:
    """Copies between KV tensors in host memory and other memory, from address to address."""

    def __init__(self, layout: KVLayout, copier: ThreadedCopier) -> None:
        self.layout = layout
        self._copier = copier

    def read(self, block_ids: Sequence[int], addresses: Sequence[int]) -> None:
        """Copy engine blocks to plain memory: block block_ids[i], all layers, to addresses[i]. Blocks."""
        self._copier.copy([Copy(there, here, size) for there, here, size in self._pieces(block_ids, addresses)])

    def write(self, block_ids: Sequence[int], addresses: Sequence[int]) -> None:
        """Copy plain memory into engine blocks: from addresses[i] into block block_ids[i]. Blocks."""
        self._copier.copy([Copy(here, there, size) for there, here, size in self._pieces(block_ids, addresses)])

    def _pieces(self, block_ids: Sequence[int], addresses: Sequence[int]) -> list[tuple[int, int, int]]:
        pieces = []
        for block_id, start in zip(block_ids, addresses, strict=True):
            there = start
            for here, size in self.layout.addresses(block_id):
                pieces.append((there, here, size))
                there += size
        return pieces


class HostBlocks:
    """KV tensors in host memory: straight copies to and from the daemon's, by this process's threads."""

    def __init__(self, client: kv.Client, copies: HostCopies, *, keys: KeyTurner | None = None) -> None:
        """`keys`: turns those of blocks that moved; None: such blocks are misses."""
        self.client = client
        self.copies = copies
        self.keys = keys

    @property
    def layout(self) -> KVLayout:
        """See BlockMemory."""
        return self.copies.layout

    def fence(self) -> Fence | None:
        """None: the CPU backend's step is over when it returns."""
        return None

    def fill(self, order: LoadOrder, after: Fence | None, timeout_s: float) -> Filled:
        """See BlockMemory."""
        with self.client.get(
            order.hashes,
            session_id=order.session_id,
            request_id=order.request_id,
            deadline_s=timeout_s,
            accepts_shifts=order.is_truncated and self.keys is not None,
        ) as lease:
            wanted = lease.blocks[order.first :]
            self.copies.write(order.block_ids[: len(wanted)], [view.address for view in wanted])
            # Asked after copying: what was current before and after was these blocks' bytes.
            filled = max(0, lease.valid_prefix() - order.first)
            shifts = lease.shifts[order.first : order.first + filled]
        moved = 0
        if self.keys is not None:
            places = range(order.first, order.first + filled)
            moved = self.keys.turn(order.block_ids[:filled], places, shifts)
        return Filled(filled, "changed" if filled < len(wanted) else "not_held", moved)

    def sources(self, blocks: Sequence[tuple[Sequence[int], Owner]]) -> list[Source]:
        """See BlockMemory."""
        return [self.later_source(block_ids, owner) for block_ids, owner in blocks]

    def later_source(self, block_ids: Sequence[int], owner: Owner) -> Source:
        """See BlockMemory."""
        return _HostSource(self.client, self.copies, block_ids, owner)

    def close(self) -> None:
        """Copies end with the calls that make them."""


@dataclass(frozen=True, slots=True)
class _HostSource:
    """Blocks that are read when it is known which of them the service wants."""

    client: kv.Client
    copies: HostCopies
    block_ids: Sequence[int]
    owner: Owner
    needs_blocks: bool = True

    def save(self, call: SaveCall) -> kv.SaveResult:
        """See Source."""
        ends_at_s = time.monotonic() + call.deadline_s
        blocks, start, at_once = len(call.hashes), 0, _BLOCKS_PER_PUT_MAX
        result = kv.SaveResult()
        while start < blocks:
            end = min(start + at_once, blocks)
            try:
                with self.client.put(
                    call.hashes[start:end],
                    parent=call.hashes[start - 1] if start else call.parent,
                    session_id=call.session_id,
                    request_id=call.request_id,
                    deadline_s=max(_COMMIT_S_MIN, ends_at_s - time.monotonic()),
                ) as reservation:
                    if reservation.refused:
                        return result.with_rest_refused(blocks, reservation.refused_reason)
                    result = result.plus(kv.SaveResult(held=reservation.held, being_written=reservation.being_written))
                    if reservation.reserved and not self._read(start, reservation):
                        return result.with_rest_refused(blocks, kv.Reason.CHANGED)
                    result = result.plus(_committed(reservation, ends_at_s))
            except kv.CapacityExhausted:
                if end - start == 1:
                    return result.with_rest_refused(blocks, kv.Reason.CAPACITY)
                at_once = max(1, (end - start) // _PUT_SHRINK)
                continue
            except kv.KVServiceError as error:
                return result.with_rest_refused(blocks, reason_of(error))
            start = end
        return result

    def discard(self) -> None:
        """See Source."""

    def _read(self, start: int, reservation: kv.Reservation) -> bool:
        """Whether the blocks were there to be read."""
        with self.owner.reading() as is_allowed:
            if is_allowed:
                self.copies.read(
                    [self.block_ids[start + position] for position, _ in reservation.reserved],
                    [view.address for _, view in reservation.reserved],
                )
            return is_allowed


def _committed(reservation: kv.Reservation, ends_at_s: float) -> kv.SaveResult:
    if not reservation.reserved:
        return kv.SaveResult()
    committed = reservation.commit(timeout_s=max(_COMMIT_S_MIN, ends_at_s - time.monotonic()))
    return kv.SaveResult.of_commit(committed)
