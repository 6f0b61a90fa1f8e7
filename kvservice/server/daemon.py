"""The daemon's life: start everything in order, serve, drain, stop."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

import uvloop

from kvservice import __version__
from kvservice.call_socket import CallConnections
from kvservice.config import Config
from kvservice.fd_socket import FdSocket
from kvservice.http import HttpServer, Verdict
from kvservice.leases import HoldKind
from kvservice.logs import event_log
from kvservice.metrics import Metrics, Snapshot, TierGauge
from kvservice.server import status_page
from kvservice.server.limits import look_at_limits
from kvservice.server.listeners import Health, listen_tls, make_server
from kvservice.server.sockets import SocketDirectory
from kvservice.server.tasks import BackgroundTasks
from kvservice.service import ControlService, ObserverService
from kvservice.status import Board, render
from kvservice.store import Store
from kvservice_cuda.driver import Driver

_UPKEEP_INTERVAL_S = 0.1
_STATUS_INTERVAL_S = 1.0
_STALL_S = 10.0  # an event loop that did not come round for so long is not live
_DRAIN_POLL_S = 0.02

_log = event_log(__name__)


def run(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status. Blocks.

    Raises:
        StartupError: the message says what to change.
    """
    look_at_limits(config)
    uvloop.run(_serve(config))
    return 0


async def _serve(config: Config) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    # Before "ready" is said: whoever hears it may send SIGTERM at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with Daemon(config) as daemon:
        await stop.wait()
        await daemon.drain()


class Daemon:
    """One daemon. An async context manager: entered, it serves."""

    def __init__(self, config: Config, *, driver: Driver | None = None) -> None:
        """`driver`: of the GPUs; None: the system's, unless the configuration turns the device plane off."""
        self.config = config
        self.metrics = Metrics(
            version=__version__,
            prefill_tokens_per_gpu_s=config.prefill_tokens_per_gpu_s,
            gpu_hour_price=config.gpu_hour_price,
        )
        if driver is None and config.device_plane == "auto":
            driver = Driver()
        self.store = Store(config, self.metrics, driver=driver)
        self._control = ControlService(self.store, self.metrics, state=lambda: self.state)
        self._calls = CallConnections(self._control, self.store, config, self.metrics)
        self.health = Health()
        self.tasks = BackgroundTasks(self.metrics, on_death=self._on_task_death)
        self.http_address = ""
        self.tcp_port = 0
        self._loop: asyncio.AbstractEventLoop
        self._beat_s = time.monotonic()
        self._board = Board(clock=self.store.clock)
        self._stack = AsyncExitStack()
        self._sockets: SocketDirectory

    async def __aenter__(self) -> Daemon:
        async with AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stack.aclose()
        _log.info("stopped")

    @property
    def state(self) -> str:
        """One word, serving or draining, or what is wrong."""
        if self.tasks.dead:
            return "; ".join(f"background task {name} died: {why}" for name, why in self.tasks.dead.items())
        return "draining" if self.store.is_draining else "serving"

    def snapshot(self) -> Snapshot:
        """The state as scraped. Called in HTTP threads: counts and lengths only."""
        store = self.store
        namespaces, ahead = list(store.namespaces.values()), list(store.waiting.ahead.values())
        return Snapshot(
            tiers=[
                TierGauge(tier, usage.capacity_bytes, usage.used_bytes, usage.state == "online")
                for tier, usage in store.tiers()
            ],
            blocks=sum(len(namespace.index) for namespace in namespaces),
            sessions=sum(len(namespace.sessions) for namespace in namespaces),
            instances=store.instances.attached,
            namespaces=len(namespaces),
            call_connections=len(self._calls),
            leases=store.leases.count(HoldKind.READ),
            reservations=store.leases.count(HoldKind.WRITE),
            quarantined_slots=store.leases.quarantined_slots(),
            unchecksummed_blocks=store.checksummer.queued_blocks,
            draining=store.is_draining,
            event_loop_lag_s=time.monotonic() - self._beat_s,
            queued_requests=len(store.waiting),
            prefetch_window_requests=sum(min(one.windows.prefetch, len(one.waiting)) for one in ahead),
            eviction_window_requests=sum(min(one.windows.eviction, len(one.waiting)) for one in ahead),
            prefetch_window_blocks=sum(one.needed_blocks for one in ahead),
            prefetch_window_dram_blocks=sum(one.dram_blocks for one in ahead),
            disks=[disk.usage() for disk in store.disks.disks],
        )

    async def drain(self) -> None:
        """Take no new work; wait until holds have ended, at most `drain_s`."""
        _log.info("draining", deadline_s=self.config.drain_s)
        await self.health.set(serving=False)
        self.store.drain()
        deadline_s = time.monotonic() + self.config.drain_s
        while not self.store.is_idle and time.monotonic() < deadline_s:  # noqa: ASYNC110  # holds end in many places
            await asyncio.sleep(_DRAIN_POLL_S)
        is_durable = await self.store.write_behind.flush(deadline_s)
        await self.store.journal.append_all()
        _log.info("drained", is_durable=is_durable, is_idle=self.store.is_idle)

    async def _start(self, stack: AsyncExitStack) -> None:
        config = self.config
        self._loop = asyncio.get_running_loop()
        # First in, last out: memory is unmapped after everything that uses it has stopped.
        stack.callback(self.store.close)
        await self.store.durability.open()
        stack.push_async_callback(self.store.durability.close)
        sockets = SocketDirectory(config.socket_dir, group=config.socket_group)
        stack.callback(sockets.close)
        control = self._control
        fd_socket = FdSocket(sockets.binding, self.store, config, self.metrics, self._calls, epoch=control.epoch)
        fd_socket.listen()
        sockets.publish(sockets.memory)
        stack.push_async_callback(self.tasks.stop)
        self.tasks.start("fd_socket", fd_socket.run())
        self.tasks.start("upkeep", self._keep_up())
        self.tasks.start("checksums", self.store.checksummer.run())
        self.tasks.start("lookahead", self.store.prefetching.run())
        self.tasks.start("status_page", self._publish_status(control, sockets))
        if self.store.disks:
            self.tasks.start("write_behind", self.store.write_behind.run())
            self.tasks.start("durability", self.store.durability.run())
            recovery = asyncio.create_task(self._recover())
            stack.callback(recovery.cancel)
        server = make_server(control, self.health, message_bytes_max=config.message_bytes_max)
        server.add_insecure_port(f"unix:{sockets.binding}")
        await server.start()
        stack.push_async_callback(server.stop, 0.5)
        stack.push_async_callback(self._calls.stop, 0.5)
        sockets.publish(sockets.control)
        self._sockets = sockets
        if config.tcp_address:
            observer = ObserverService(self.store, self.metrics, control, state=lambda: self.state)
            tcp_server = make_server(observer, self.health, message_bytes_max=config.message_bytes_max)
            self.tcp_port = listen_tls(tcp_server, config)
            await tcp_server.start()
            stack.push_async_callback(tcp_server.stop, 0.5)
        self.metrics.watch(self.snapshot)
        if config.http_port >= 0:
            http = HttpServer(
                host=config.http_host,
                port=config.http_port,
                registry=self.metrics.registry,
                live=self._live,
                ready=self._ready,
                status_page=lambda: render(self._board.latest, self._board.clock()),
            )
            self.http_address = http.start()
            stack.callback(http.stop)
        await self.health.set(serving=not self.tasks.dead)
        _log.info(
            "ready",
            socket_dir=sockets.path,
            http_address=self.http_address,
            tcp_port=self.tcp_port,
            dram_bytes=config.dram_bytes,
            planes=self.store.device_copies.planes,
            version=__version__,
        )

    async def _recover(self) -> None:
        started_s = time.monotonic()
        durability = self.store.durability
        try:
            await durability.recover()
        except Exception as error:  # noqa: BLE001  # whatever is wrong with the disks' memory, DRAM serves on
            _log.exception("recovery_failed", error)
            for disk in self.store.disks.disks:
                disk.health.fail(f"recovery failed: {error}")
            return
        seconds = round(time.monotonic() - started_s, 3)
        _log.info("recovered", blocks=durability.recovered_blocks, seconds=seconds)

    async def _keep_up(self) -> None:
        while True:
            await self.store.upkeep()
            self._beat_s = time.monotonic()
            await asyncio.sleep(_UPKEEP_INTERVAL_S)

    async def _publish_status(self, control: ControlService, sockets: SocketDirectory) -> None:
        is_told = False
        while True:
            if sockets.why_unreachable and not is_told:
                is_told = True
                _log.error("sockets_lost", why=sockets.why_unreachable)
            self._board.publish(status_page.gather(self.store, control.block_requests, state=self.state))
            await asyncio.sleep(_STATUS_INTERVAL_S)

    def _on_task_death(self) -> None:
        self._health_task = self._loop.create_task(self.health.set(serving=False))

    def _live(self) -> Verdict:
        """Called in HTTP threads: reads, never waits."""
        reasons = [f"background task {name} died: {why}" for name, why in self.tasks.dead.items()]
        stalled_s = time.monotonic() - self._beat_s
        if stalled_s > _STALL_S:
            reasons.append(f"the event loop has not come round for {stalled_s:.0f} s")
        return _verdict(reasons)

    def _ready(self) -> Verdict:
        reasons = [*self._live().reasons, self._sockets.why_unreachable, "draining" * self.store.is_draining]
        return _verdict(reasons)


def _verdict(reasons: Sequence[str]) -> Verdict:
    given = tuple(filter(None, reasons))
    return Verdict(ok=not given, reasons=given)
