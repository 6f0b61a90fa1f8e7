"""service: the part of the client library that an adapter calls, as a protocol.

`kvservice_client.attach` returns one. An engine may put its own object in front of it, to count or to delay; blocks
then travel through host memory, also on a GPU.
"""

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import kvservice_client


class KVClient(Protocol):
    """Calls that never raise for a service failure: what went wrong is the result's reason."""

    @property
    def attached(self) -> bool:
        """Whether a daemon answers at the moment."""
        ...

    def plan_load(self, hashes: Sequence[bytes], *, prefill_tokens_per_s: float = 0.0) -> kvservice_client.LoadPlan:
        """How many leading blocks are held, and how many of them to load rather than to recompute."""
        ...

    def update_queue(
        self, waiting: Sequence[kvservice_client.WaitingRequest], *, started: Collection[str] = ()
    ) -> None:
        """Which requests wait, the next to start first; returns at once."""
        ...

    def load(
        self,
        hashes: Sequence[bytes],
        destination: Any,
        *,
        session_id: str = "",
        request_id: str = "",
        wait_s: float = 0.0,
        deadline_s: float = 10.0,
        accepts_shifts: bool = False,
    ) -> kvservice_client.LoadResult:
        """Copy the leading held blocks into the caller's buffer; blocks until they are there."""
        ...

    def truncate(
        self,
        session_id: str,
        hashes: Sequence[bytes],
        *,
        source: Sequence[bytes] = (),
        keep: Sequence[tuple[int, int]] = (),
    ) -> kvservice_client.TruncateResult:
        """Keep token ranges of a session's chain under new hashes, at new positions."""
        ...

    def save(
        self,
        hashes: Sequence[bytes],
        source: Any,
        *,
        parent: bytes = b"",
        session_id: str = "",
        request_id: str = "",
        deadline_s: float = 10.0,
    ) -> kvservice_client.SaveResult:
        """Copy blocks into the service and publish them; blocks until that is done."""
        ...

    def close(self) -> None:
        """Detach."""
        ...
