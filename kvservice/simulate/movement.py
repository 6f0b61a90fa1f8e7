"""movement: blocks between the tiers in simulated time: what a Get needs, what the planner fetches, write-behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from kvservice.blocks import NO_ROW, NO_SLOT, Rows, Slots
from kvservice.index import State
from kvservice.lookahead import Fetch, Job, Planner
from kvservice.simulate.device import Device, SimulatedTransfer
from kvservice.simulate.outcome import Outcome
from kvservice.simulate.tiers import Tiers
from kvservice.transfers import Priority

_GROUP = "simulated"
_TRANSFER_BYTES_MAX = 16 * 1024 * 1024
_DRY_S = 0.25
"""Of the device's work; the daemon looks at least as often."""


class Movement:
    """Starts transfers on the device and files what they bring. A block on its way has a holder: it does not leave."""

    def __init__(self, tiers: Tiers, device: Device, outcome: Outcome, *, on_landed: Callable[[float], None]) -> None:
        """Args:
        on_landed: told that blocks arrived in DRAM.
        """
        self._tiers = tiers
        self._namespace = tiers.namespace
        self._device = device
        self._outcome = outcome
        self._on_landed = on_landed
        self._planner = Planner()
        self._transfer_of: dict[int, SimulatedTransfer] = {}  # by row, of those that are arriving
        self._fetches: dict[int, tuple[SimulatedTransfer, Rows, Slots]] = {}
        self._block_bytes = self._namespace.spec.block_size_bytes

    def get(self, rows: Rows, now_s: float) -> Rows:
        """Read at once what is on NVMe only; the front of `rows` that is in DRAM or on its way there."""
        index = self._namespace.index
        for row in rows[index.arriving[rows]].tolist():
            self._device.hurry(self._transfer_of[row], Priority.GET, now_s)
        missing = rows[index.slot[rows] == NO_SLOT]
        room = self._tiers.make_room(len(missing), rows, now_s)
        if room < len(missing):
            rows = rows[: int(np.flatnonzero(rows == missing[room])[0])]
        if room:
            for piece in self._pieces(missing[:room]):
                self._read(piece, Priority.GET, now_s, now_s)
        return rows

    @property
    def nvme_wait_s(self) -> float:
        """How long a Get that comes now waits for the device."""
        return self._device.wait_s(Priority.GET)

    def is_there(self, rows: Rows, slots: Slots) -> bool:
        """Whether the bytes of all rows that got these slots are in DRAM, or left the store meanwhile."""
        return not self._namespace.index.arriving[self._still(rows, slots)].any()

    @property
    def is_running_dry(self) -> bool:
        """Whether so little is on its way that the device may have nothing to read before the next plan."""
        return self._planner.in_flight_bytes <= _DRY_S * self._device.bytes_per_s

    def plan(self, waiting: Sequence[tuple[int, Rows]], now_s: float) -> None:
        """Fetch ahead for the requests of the prefetch window, in their order: (number, held prefix) of each."""
        index, pool = self._namespace.index, self._namespace.pool
        together = np.concatenate([np.zeros(0, dtype=np.int32), *(rows for _, rows in waiting)])
        is_missing, is_arriving = index.slot[together] == NO_SLOT, index.arriving[together]
        is_unready = is_missing | is_arriving
        jobs, end = [], 0
        for position, (number, rows) in enumerate(waiting):
            part = slice(end, end := end + len(rows))
            if is_unready[part].any():
                missing, arriving = rows[is_missing[part]], rows[is_arriving[part]]
                jobs.append(Job(number, _GROUP, float(position), now_s, missing, arriving, self._block_bytes))
        busy = (pool.holders > 0) | (index.dirty[pool.row_of] & (pool.row_of != NO_ROW))
        busy[index.slot[together[~is_missing]]] = True
        room = self._tiers.dram_blocks - int(np.count_nonzero(busy))
        plan = self._planner.plan(jobs, room={_GROUP: room}, bytes_per_s=self._device.bytes_per_s, now_s=now_s)
        for number in plan.cancel:
            transfer, rows, slots = self._fetches[number]
            if self._device.cancel(transfer):
                self._give_up(number, rows, slots)
        for number, order in plan.reorder:
            if number in self._fetches:
                transfer = self._fetches[number][0]
                if transfer.priority is Priority.PREFETCH:
                    self._device.hurry(transfer, Priority.PREFETCH, order)
        for fetch in plan.start:
            self._fetch(fetch, np.unique(together), now_s)

    def write_used(self, rows: Rows, now_s: float) -> None:
        """A request uses these rows: write what of them is in DRAM only."""
        self.write_behind(self._namespace.index.unwritten(rows), now_s)

    def write_behind(self, rows: Rows, now_s: float) -> None:
        """Write stored blocks to NVMe; they do not leave DRAM before."""
        if not self._tiers.nvme_blocks or not len(rows):
            return
        self._namespace.index.dirty[rows] = True
        for piece in self._pieces(rows):
            slots = self._namespace.index.slot[piece]
            self._namespace.pool.hold(slots)
            self._device.submit(
                SimulatedTransfer(
                    Priority.WRITE,
                    now_s,
                    len(piece) * self._block_bytes,
                    partial(self._written, piece, slots),
                ),
                now_s,
            )

    def _fetch(self, fetch: Fetch, needed: Rows, now_s: float) -> None:
        rows = np.array(fetch.blocks, dtype=np.int32)
        has_room = self._tiers.make_room(len(rows), needed, now_s) == len(rows)
        if not has_room or (self._namespace.index.state[rows] != State.RESIDENT).any():
            self._planner.ended(fetch.number)  # room was made at the price of the blocks themselves, or not at all
            return
        self._fetches[fetch.number] = self._read(rows, Priority.PREFETCH, fetch.order, now_s, fetch=fetch.number)

    def _read(
        self, rows: Rows, priority: Priority, order: float, now_s: float, *, fetch: int = 0
    ) -> tuple[SimulatedTransfer, Rows, Slots]:
        namespace = self._namespace
        slots = namespace.pool.allocate(len(rows))
        namespace.index.attach_slots(rows, slots)
        namespace.pool.row_of[slots] = rows
        size_bytes = len(rows) * self._block_bytes
        transfer = SimulatedTransfer(priority, order, size_bytes, partial(self._landed, rows, slots, fetch))
        self._transfer_of.update(dict.fromkeys(rows.tolist(), transfer))
        self._device.submit(transfer, now_s)
        return transfer, rows, slots

    def _landed(self, rows: Rows, slots: Slots, fetch: int, now_s: float) -> None:
        self._outcome.fetched_blocks += len(rows)
        self._namespace.index.arriving[self._still(rows, slots)] = False
        self._namespace.end_hold(slots)
        if fetch:
            del self._fetches[fetch]
            self._planner.ended(fetch)
        self._on_landed(now_s)

    def _give_up(self, fetch: int, rows: Rows, slots: Slots) -> None:
        still = self._still(rows, slots)
        self._namespace.pool.row_of[self._namespace.index.slot[still]] = NO_ROW
        for row in still.tolist():
            self._namespace.index.detach_slot(row)
        self._namespace.end_hold(slots)
        del self._fetches[fetch]
        self._planner.ended(fetch)

    def _written(self, rows: Rows, slots: Slots, now_s: float) -> None:
        namespace = self._namespace
        granted = self._tiers.take_extents(len(rows), now_s)
        still = self._still(rows, slots)
        for row in still[:granted].tolist():
            namespace.index.attach_extent(row, row)  # a number of its own is all that an extent needs
        namespace.index.dirty[still] = False
        namespace.end_hold(slots)
        self._tiers.nvme_used -= granted - len(still[:granted])
        self._outcome.written_blocks += granted

    def _still(self, rows: Rows, slots: Slots) -> Rows:
        """Without those that left while bytes moved: what is behind an alias goes with its source, held or not."""
        still: Rows = rows[self._namespace.pool.row_of[slots] == rows]
        return still

    def _pieces(self, rows: Rows) -> list[Rows]:
        at_once = max(1, _TRANSFER_BYTES_MAX // self._block_bytes)
        return [rows[first : first + at_once] for first in range(0, len(rows), at_once)]
