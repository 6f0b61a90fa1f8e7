"""waiting: for a state to come, with a deadline that fails the test."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

DEADLINE_S = 30.0
"""Far more than anything takes: a machine with many others at work starts a daemon in nine seconds."""
_POLL_S = 0.01


def eventually(is_so: Callable[[], Any], *, within_s: float = DEADLINE_S, what: str = "") -> None:
    """Return once `is_so()` is true; an AssertionError raised in it means "not yet"."""
    ends_at_s = time.monotonic() + within_s
    while True:
        is_last = time.monotonic() >= ends_at_s
        try:
            if is_so():
                return
        except AssertionError:
            if is_last:
                raise
        assert not is_last, f"{what or is_so} did not come true within {within_s} s"
        time.sleep(_POLL_S)
