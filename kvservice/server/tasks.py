"""Background tasks that cannot die unnoticed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from kvservice.logs import event_log
from kvservice.metrics import Metrics

_log = event_log(__name__)


class BackgroundTasks:
    """Runs tasks that must live as long as the daemon; a dead one is for ever in `dead`.

    They are not restarted: what broke one of them may have broken its state, so the daemon
    reports itself unhealthy and whoever supervises it starts a new one.
    """

    def __init__(self, metrics: Metrics, *, on_death: Callable[[], None]) -> None:
        self._metrics = metrics
        self._on_death = on_death
        self._tasks: list[asyncio.Task[None]] = []
        self._is_stopping = False
        self.dead: dict[str, str] = {}

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` until `stop`."""
        task = asyncio.create_task(work, name=name)
        self._metrics.background_task(name).set(1)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    async def stop(self) -> None:
        """Cancel all and wait for them."""
        self._is_stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._is_stopping:
            return
        name = task.get_name()
        error = None if task.cancelled() else task.exception()
        why = "it was cancelled" if task.cancelled() else "it returned" if error is None else repr(error)
        self.dead[name] = why
        self._metrics.background_task(name).set(0)
        _log.exception("background_task_died", error or RuntimeError(why), task=name)
        self._on_death()
