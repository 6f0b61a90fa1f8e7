"""clients: of the library, in this process."""

from __future__ import annotations

import kvservice_client as kv
from tests.waiting import eventually


def wait_served(*clients: kv.Client) -> None:
    """Wait until calls reach the daemon that runs now; being attached may still mean to the one that has just ended."""
    for client in clients:
        nobodys = [bytes(client.namespace.hash_size_bytes)]
        eventually(lambda c=client, h=nobodys: c.lookup(h).reason is kv.Reason.NOT_HELD)  # type: ignore[misc]  # bound now
