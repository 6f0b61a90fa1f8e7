"""Staying attached: a thread that makes a link, follows it to its end, and makes the next one."""

from __future__ import annotations

import logging
import os
import threading
import weakref

from kvservice_client.errors import (
    DaemonUnreachable,
    ForkedClient,
    InvalidRequest,
    KVServiceError,
    LayoutMismatch,
    PermissionDenied,
    Unauthenticated,
)
from kvservice_client.link import Link
from kvservice_client.namespace import Namespace
from kvservice_client.outcomes import Status

_log = logging.getLogger(__name__)

_HANDSHAKE_TIMEOUT_S = 10.0
_BACKOFF_S_MIN, _BACKOFF_S_MAX = 0.1, 5.0

_REFUSALS = (InvalidRequest, LayoutMismatch, PermissionDenied, Unauthenticated)

_attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()


class Attachment:
    """The way to the daemon of one directory, for one namespace. Thread-safe."""

    def __init__(self, namespace: Namespace, *, socket_dir: str, instance_name: str) -> None:
        """Start attaching in the background."""
        self.refusal: KVServiceError | None = None
        self._namespace = namespace
        self._socket_dir = socket_dir
        self._instance_name = instance_name
        self._link: Link | None = None
        self._is_closed = False
        self._is_forked = False
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._stay_attached, name="kvservice-attach", daemon=True)
        _attachments.add(self)
        self._thread.start()

    @property
    def status(self) -> Status:
        """How this process stands with the daemon."""
        if self._is_forked:
            return Status.FORKED
        if self._is_closed:
            return Status.CLOSED
        link = self._link
        if link is not None and not link.is_over:
            return Status.ATTACHED
        return Status.REFUSED if self.refusal is not None else Status.RECONNECTING

    def wait(self, timeout_s: float) -> None:
        """Wait until it is anything but reconnecting."""
        if not self._is_forked:
            with self._changed:
                self._changed.wait_for(lambda: self.status is not Status.RECONNECTING, timeout_s)

    def link(self) -> Link:
        """The link to use now.

        Raises:
            ForkedClient, DaemonUnreachable: there is none.
        """
        if self._is_forked:
            raise ForkedClient("this client belongs to the parent process: attach again in the child")
        link = self._link
        if self._is_closed or link is None or link.is_over:
            raise DaemonUnreachable("not attached to a daemon; the client goes on trying")
        if not link.is_responsive:
            raise DaemonUnreachable("the daemon has not been heard of for a while")
        return link

    def close(self) -> None:
        """Detach for good. Calls in progress finish. May be called twice."""
        if self._is_closed or self._is_forked:
            return
        self._is_closed = True
        self._stop.set()
        link = self._link
        if link is not None:
            link.end()
        self._thread.join(timeout=_HANDSHAKE_TIMEOUT_S)

    def disown_after_fork(self) -> None:
        """In a forked child: nothing of the parent's is ours."""
        self._is_forked = True
        if self._link is not None:
            self._link.disown_after_fork()

    def _stay_attached(self) -> None:
        backoff_s = _BACKOFF_S_MIN
        while not self._stop.is_set():
            try:
                link = self._make_link()
            except Exception as error:  # noqa: BLE001  # this thread is what heals the client: it must not die
                if not isinstance(error, (KVServiceError, OSError)):
                    _log.exception("attaching to %s failed in an unexpected way", self._socket_dir)
                self._set(None, refusal=error if isinstance(error, _REFUSALS) else None)
                self._stop.wait(backoff_s)
                backoff_s = min(2 * backoff_s, _BACKOFF_S_MAX)
                continue
            backoff_s = _BACKOFF_S_MIN
            self._set(link, refusal=None)
            if self._stop.is_set():
                link.end()
            link.run()
            self._set(None, refusal=None)

    def _make_link(self) -> Link:
        return Link(
            self._socket_dir,
            [self._namespace.to_message()],
            instance_name=self._instance_name,
            timeout_s=_HANDSHAKE_TIMEOUT_S,
        )

    def _set(self, link: Link | None, *, refusal: KVServiceError | None) -> None:
        with self._changed:
            self._link = link
            self.refusal = refusal
            self._changed.notify_all()


def _disown_all_after_fork() -> None:
    for attachment in list(_attachments):
        attachment.disown_after_fork()


os.register_at_fork(after_in_child=_disown_all_after_fork)
