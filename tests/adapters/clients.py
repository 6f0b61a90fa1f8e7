"""clients: one in front of another, for tests that count, harm or kill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import kvservice_client as kv


class PassingClient:
    """Passes everything on; a test's own class changes one call."""

    def __init__(self, client: kv.Client) -> None:
        self._client = client

    @property
    def attached(self) -> bool:
        return self._client.attached

    def plan_load(self, hashes: Sequence[bytes], **more: Any) -> kv.LoadPlan:
        return self._client.plan_load(hashes, **more)

    def update_queue(self, waiting: Sequence[kv.WaitingRequest], **more: Any) -> None:
        self._client.update_queue(waiting, **more)

    def load(self, hashes: Sequence[bytes], destination: Any, **more: Any) -> kv.LoadResult:
        return self._client.load(hashes, destination, **more)

    def truncate(self, session_id: str, hashes: Sequence[bytes], **more: Any) -> kv.TruncateResult:
        return self._client.truncate(session_id, hashes, **more)

    def save(self, hashes: Sequence[bytes], source: object, **more: Any) -> kv.SaveResult:
        return self._client.save(hashes, source, **more)

    def close(self) -> None:
        self._client.close()
