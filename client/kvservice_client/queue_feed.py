"""A thread that tells the daemon of the engine's waiting queue, so that the engine waits for nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence

from kvservice_client.errors import InvalidRequest, KVServiceError
from kvservice_client.link import Link
from kvservice_client.waiting import QueueLimits, QueueMirror, WaitingRequest
from kvservice_proto.v1 import kvservice_pb2 as pb

_CALL_TIMEOUT_S = 2.0
_RETRY_S = 1.0

_log = logging.getLogger(__name__)


class QueueFeed:
    """Sends the latest queue; what was overtaken by a later one is never sent. Thread-safe."""

    def __init__(self, link: Callable[[], Link]) -> None:
        """`link` gives the link to use now, or raises KVServiceError."""
        self._link_now = link
        self._link: Link | None = None
        self._mirror: QueueMirror | None = None
        self._waiting: Sequence[WaitingRequest] = ()
        self._started: set[str] = set()
        self._is_stale = False
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="kvservice-queue", daemon=True)
        self._thread.start()

    def update(self, waiting: Sequence[WaitingRequest], started: Collection[str]) -> None:
        """This is the queue now. Returns at once."""
        with self._changed:
            self._waiting = waiting
            self._started.update(started)
            self._is_stale = True
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread. May be called twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(_CALL_TIMEOUT_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_stale or self._is_closed)
                if self._is_closed:
                    return
                waiting, started = self._waiting, set(self._started)
                self._is_stale = False
            try:
                is_told = self._tell(waiting, started)
            except Exception as error:  # noqa: BLE001  # hints must neither end this thread nor reach the engine
                if not isinstance(error, KVServiceError):
                    _log.exception("telling the daemon of the queue failed in an unexpected way")
                is_told = False
                if isinstance(error, InvalidRequest):
                    _log.warning("the daemon refuses what it is told of the queue: %s", error)
            with self._changed:
                if is_told:
                    self._started -= started
                    continue
                if self._mirror is not None:
                    self._mirror.lost()
                self._is_stale = True
                self._changed.wait_for(lambda: self._is_closed, _RETRY_S)

    def _tell(self, waiting: Sequence[WaitingRequest], started: Collection[str]) -> bool:
        """Send what is new; whether the daemon now knows this queue.

        Raises:
            KVServiceError.
        """
        link = self._link_now()
        if link is not self._link or self._mirror is None:
            limits = link.welcome.limits
            self._link = link
            self._mirror = QueueMirror(
                QueueLimits(limits.queue_entries_max, limits.queue_blocks_max, limits.hashes_per_call_max)
            )
        if not link.welcome.limits.queue_entries_max:
            return True  # a daemon from before there were queues
        if self._send_all(link, self._mirror, waiting, started):
            return True
        self._mirror.lost()  # it wants everything: once more, at once
        return self._send_all(link, self._mirror, waiting, started)

    def _send_all(
        self, link: Link, mirror: QueueMirror, waiting: Sequence[WaitingRequest], started: Collection[str]
    ) -> bool:
        for request in mirror.updates(waiting, started):
            request.namespace_id = link.welcome.namespace_ids[0]
            response = link.call("UpdateQueue", request, _CALL_TIMEOUT_S)
            if response.outcome != pb.QUEUE_OUTCOME_APPLIED:
                return False
        return True
