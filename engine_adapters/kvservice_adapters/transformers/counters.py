"""counters: what the adapter did and did not do, by reason."""

import threading
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class AdapterStats:
    """Counts since the adapter was made. Reasons are names of `kvservice_client.Reason` or of the error."""

    lookups: int
    loaded_blocks: int
    # Those whose load had begun while their request waited.
    ahead_blocks: int
    # Of the loaded ones, those whose keys were rotated, because their conversation was truncated.
    shifted_blocks: int
    # Asked for and recomputed, by why: NOT_HELD, UNAVAILABLE, ...
    missed_blocks: dict[str, int]
    # Loads that the service had announced and did not deliver, and calls that raised.
    failed_loads: dict[str, int]
    saved_blocks: int
    # Not written because they were there already, or because another writer has them.
    already_held_blocks: int
    # Given to the save queue and not stored, by why.
    unsaved_blocks: dict[str, int]
    # Never given to the save queue: no daemon, or the queue was full when the sequence ended.
    skipped_blocks: dict[str, int]


@dataclass
class AdapterCounters:
    """The mutable side of AdapterStats; any thread may count."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _plain: Counter[str] = field(default_factory=Counter)
    _by_reason: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, name: str, amount: int = 1, *, reason: str = "") -> None:
        """Count `amount` under a field of AdapterStats, and under a reason where that field has reasons."""
        if amount == 0:
            return
        with self._lock:
            if reason:
                self._by_reason.setdefault(name, Counter())[reason] += amount
            else:
                self._plain[name] += amount

    def snapshot(self) -> AdapterStats:
        """All counts at one moment."""
        with self._lock:
            return AdapterStats(
                lookups=self._plain["lookups"],
                loaded_blocks=self._plain["loaded_blocks"],
                ahead_blocks=self._plain["ahead_blocks"],
                shifted_blocks=self._plain["shifted_blocks"],
                missed_blocks=dict(self._by_reason.get("missed_blocks", {})),
                failed_loads=dict(self._by_reason.get("failed_loads", {})),
                saved_blocks=self._plain["saved_blocks"],
                already_held_blocks=self._plain["already_held_blocks"],
                unsaved_blocks=dict(self._by_reason.get("unsaved_blocks", {})),
                skipped_blocks=dict(self._by_reason.get("skipped_blocks", {})),
            )
