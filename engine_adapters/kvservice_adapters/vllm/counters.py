"""counters: counts by name, and by reason where there is one, between two reports."""

import threading
from collections import Counter

SEPARATOR = ":"
"""Between a name and its reason, in one key: what crosses vLLM's process boundaries is a flat mapping."""


class Counters:
    """Counts since the last `take`; any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str, amount: float = 1, *, reason: str = "") -> None:
        """Count under a name of metrics.SERIES, and under a reason where it has reasons."""
        if amount:
            with self._lock:
                self._counts[f"{name}{SEPARATOR}{reason}" if reason else name] += amount  # type: ignore[assignment]

    def take(self) -> dict[str, float]:
        """All counts that are not zero; they start anew."""
        if not self._counts:
            return {}
        with self._lock:
            taken, self._counts = self._counts, Counter()
        return dict(taken)
