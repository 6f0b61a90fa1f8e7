"""A load on its way into GPU memory, and the thread that makes sure that nobody waits for one for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from kvservice_client.device.lanes import Lanes
from kvservice_client.outcomes import LoadResult, Reason, ShiftedBlocks
from kvservice_client.truncation import shifted_blocks
from kvservice_cuda.copier import progress
from kvservice_cuda.driver import Context, stream_handle

_TICK_S = 0.002
_POLL_S_MIN, _POLL_S_MAX = 20e-6, 1e-3
_LATE = 1 / 256
"""Who waits notices the end late by this part of the time that it took."""
_GRACE_S = 1.0
"""After a daemon's end: its queued copies end with it, or within the time that the bus needs for them."""


class Transfer:
    """One copy that uses a lane, seen from this process."""

    def __init__(
        self,
        lanes: Lanes,
        lane: int,
        sequence: int,
        *,
        is_settled: Callable[[], bool],
        is_hung_up: Callable[[], bool],
        on_quiet: Callable[[], bool],
        deadline_s: float,
    ) -> None:
        """Args:
        is_settled: whether nothing more can begin on the lane; asked where the copy never ends.
        is_hung_up: whether the copying process is gone.
        on_quiet: called once, by any thread, when no byte moves any more; says whether what was read was what was
            asked for.
        deadline_s: from now; then it has failed.
        """
        self.lanes = lanes
        self.lane = lane
        self.sequence = sequence
        self.has_begun = False
        """Whether the copying side said that it queued the copy; before that it may never."""
        self._is_settled = is_settled
        self._is_hung_up = is_hung_up
        self._on_quiet = on_quiet
        self._ends_at_s = time.monotonic() + deadline_s
        self._gone_since_s: float | None = None
        self._lock = threading.Lock()
        self._is_quiet = False
        self._has_failed = False

    @property
    def is_ok(self) -> bool:
        """Whether all bytes arrived, in time."""
        return self.look() and not self._has_failed

    @property
    def has_failed(self) -> bool:
        """Whether it is known that not all bytes arrived in time."""
        with self._lock:  # once it is quiet, the lane's words are another copy's
            return self._has_failed or (not self._is_quiet and self.lanes.has_failed(self.lane, self.sequence))

    def look(self) -> bool:
        """Take notice of what happened; whether no byte moves any more. Releases waits of a copy that is late."""
        with self._lock:
            if not self._is_quiet:
                self._take_notice()
            return self._is_quiet

    def fail(self) -> None:
        """The engine goes on without it; whether bytes still move, `look` finds out."""
        with self._lock:
            self._has_failed = self._has_failed or not self._is_quiet
        self.look()

    def wait(self, timeout_s: float) -> bool:
        """Wait until no byte moves any more; whether that came in time. Blocks."""
        return _wait(self.look, timeout_s)

    def wait_outcome(self, timeout_s: float) -> bool:
        """Wait until it is known whether all bytes arrived; whether that came in time. Blocks."""
        return _wait(lambda: self.look() or self._has_failed, timeout_s)

    def _take_notice(self) -> None:
        if self.lanes.has_ended(self.lane, self.sequence):
            self._end(has_failed=self.lanes.has_failed(self.lane, self.sequence))
        elif self._is_over_without_end():
            self._end(has_failed=True)
        elif self._is_lost() or time.monotonic() > self._ends_at_s:
            self._has_failed = True
        if self._has_failed:
            self.lanes.release(self.lane, self.sequence)
        if self._is_quiet:
            self.lanes.give_back(self.lane)

    def _end(self, *, has_failed: bool) -> None:
        self._is_quiet = True
        self._has_failed = self._has_failed or has_failed
        if not self._on_quiet():
            self._has_failed = True

    def _is_over_without_end(self) -> bool:
        if not self.has_begun and self._is_settled():
            return True
        return self._gone_since_s is not None and time.monotonic() - self._gone_since_s > _GRACE_S

    def _is_lost(self) -> bool:
        if self._gone_since_s is None and self._is_hung_up():
            self._gone_since_s = time.monotonic()
        return self._gone_since_s is not None


def _wait(is_so: Callable[[], bool], timeout_s: float) -> bool:
    began_s = time.monotonic()
    while not is_so():
        waited_s = time.monotonic() - began_s
        if waited_s > timeout_s:
            return False
        time.sleep(min(max(_POLL_S_MIN, _LATE * waited_s), _POLL_S_MAX))
    return True


class Watchdog:
    """Looks at every transfer under way. One thread, asleep while there is none."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._transfers: list[Transfer] = []
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="kvservice-watchdog", daemon=True)
        self._thread.start()

    def watch(self, transfer: Transfer) -> None:
        """Look at it until it is quiet."""
        with self._changed:
            self._transfers.append(transfer)
            self._changed.notify_all()

    @property
    def under_way(self) -> int:
        """Transfers that are not known to be quiet."""
        return len(self._transfers)

    def stop(self) -> None:
        """End when the last transfer is quiet."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._transfers or self._is_stopping)
                if not self._transfers:
                    return
                looked = list(self._transfers)
            quiet = {id(transfer) for transfer in looked if transfer.look()}
            with self._changed:
                self._transfers = [each for each in self._transfers if id(each) not in quiet]
            if len(quiet) < len(looked):
                time.sleep(_TICK_S)


class DeviceLoad:
    """Leading blocks on their way into GPU memory.

    Attributes:
        blocks: how many leading blocks are being copied; the rest: recompute.
        reason: why not more.
        shifts: by how many tokens each block's keys must be rotated once they are there; 0 unless shifts are accepted.
    """

    def __init__(
        self,
        context: Context | None,
        transfer: Transfer | None,
        blocks: int,
        reason: Reason,
        shifts: Sequence[int] = (),
    ) -> None:
        """`transfer`: None where nothing was begun."""
        self._context = context
        self._transfer = transfer
        self.blocks = blocks
        self.reason = reason
        self.shifts = tuple(shifts)

    @property
    def shifted(self) -> tuple[ShiftedBlocks, ...]:
        """The same as runs of blocks that moved, the first loaded block being 0."""
        return shifted_blocks(self.shifts, self.blocks)

    def wait_layer(self, layer: int, stream: Any) -> None:
        """Let the stream's work from now on wait until the layer's bytes are there. The CPU does not wait.

        Args:
            layer: as named in the cache's parts.
            stream: a torch stream, or a CUstream as an int.

        Raises:
            CudaError.
        """
        transfer, context = self._transfer, self._context
        if self.blocks and transfer is not None and context is not None:
            address = transfer.lanes.device_address(transfer.lane)
            context.await_flag(stream_handle(stream), address, progress(transfer.sequence, layer + 1))

    @property
    def has_failed(self) -> bool:
        """Whether it is known that not all blocks arrived: recompute. Ask again after the stream has passed."""
        return self._transfer is not None and self._transfer.has_failed

    def result(self, timeout_s: float = 10.0) -> LoadResult:
        """Wait until it is known how many leading blocks are in place. Blocks.

        A load that is late has failed: nothing of it counts, and `is_quiet` says when its blocks may be reused.
        """
        if self._transfer is None or not self.blocks:
            return LoadResult(0, self.reason)
        if not self._transfer.wait_outcome(timeout_s):
            self._transfer.fail()
        if self._transfer.is_ok:
            return LoadResult(self.blocks, self.reason, self.shifted)
        return LoadResult(0, Reason.CHANGED if self._transfer.has_failed and self.is_quiet else Reason.TIMEOUT)

    def cancel(self) -> None:
        """Go on without it: no stream waits any more."""
        if self._transfer is not None:
            self._transfer.fail()

    @property
    def is_quiet(self) -> bool:
        """Whether nothing will be written into the destination any more: only then may it be used for anything else."""
        return self._transfer is None or self._transfer.look()

    def wait_quiet(self, timeout_s: float) -> bool:
        """Wait for `is_quiet`. Blocks."""
        return self._transfer is None or self._transfer.wait(timeout_s)
