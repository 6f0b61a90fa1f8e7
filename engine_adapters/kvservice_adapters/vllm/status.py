"""status: one log line when the adapter finds its daemon, and one when it loses it."""

from __future__ import annotations

import logging

import kvservice_client as kv

LOG = logging.getLogger("vllm.kvservice")
"""Below vLLM's own logger, so that its handlers and levels hold for these lines too."""

_MEANINGS = {
    kv.Status.ATTACHED: "attached to the daemon: KV blocks are reused and saved",
    kv.Status.RECONNECTING: "no daemon answers: everything is computed; attaching again in the background",
    kv.Status.REFUSED: "the daemon refuses this engine: everything is computed",
    kv.Status.FORKED: "this process was forked off an attached one: everything is computed",
}


class StatusLog:
    """Tells changes of one client's status."""

    def __init__(self, part: str, client: kv.Client) -> None:
        self._part = part
        self._client = client
        self._told: kv.Status | None = None
        self.look()

    def look(self) -> None:
        """Log a line if the status is another one than at the last look."""
        status = self._client.status
        if status is self._told or status is kv.Status.CLOSED:
            return
        self._told = status
        level = logging.INFO if status is kv.Status.ATTACHED else logging.WARNING
        refusal = f" ({self._client.refusal})" if status is kv.Status.REFUSED else ""
        LOG.log(level, "kvservice %s: %s%s [%s]", self._part, _MEANINGS[status], refusal, self._client.socket_dir)
