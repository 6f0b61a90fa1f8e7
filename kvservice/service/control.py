"""The contract as engines use it, over the Unix socket: decode, one store call, encode."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from kvservice import __version__, errors
from kvservice.instances import DrainNotice, HungUp, Notice, SegmentsChanged
from kvservice.metrics import Metrics
from kvservice.service import getting, hints, messages, reports
from kvservice.service.block_requests import BlockRequests, RequestedBlocks
from kvservice.service.calls import (
    Context,
    GrpcContext,
    Malformed,
    UnaryMethod,
    abort,
    error_detail,
    token_of,
    unary,
    well_formed,
)
from kvservice.service.devices import Devices
from kvservice.service.messages import require_text
from kvservice.store import Peer, Store
from kvservice.store.outcomes import Granted
from kvservice_proto.v1 import kvservice_pb2 as pb
from kvservice_proto.v1 import kvservice_pb2_grpc

PROTOCOL_VERSION_MIN = 1
PROTOCOL_VERSION_MAX = 1

_HELLO_TIMEOUT_S = 10.0
_NOTICES_MAX = 1024


class ControlService(kvservice_pb2_grpc.KVCacheServiceServicer):
    """KVCacheService for engines. Every method runs on the event loop."""

    def __init__(self, store: Store, metrics: Metrics, *, state: Callable[[], str]) -> None:
        """`state` says "serving", "draining" or what is wrong, for Stats."""
        self._store = store
        self._metrics = metrics
        self._state = state
        self.epoch = secrets.token_hex(8)
        self._started_at_s = store.clock()
        self._attach_calls = metrics.rpc("Attach")
        self._get_calls = metrics.rpc("Get")
        self._devices = Devices(store, self._instance)
        self.block_requests = BlockRequests(metrics, clock=store.clock)
        self.unary: dict[str, UnaryMethod] = {}
        for method, answer in (
            ("Lookup", self._lookup),
            ("Load", self._load),
            ("Renew", self._renew),
            ("Release", self._release),
            ("Put", self._put),
            ("Commit", self._commit),
            ("Abort", self._abort),
            ("Truncate", self._truncate),
            ("Prefetch", self._prefetch),
            ("UpdateQueue", self._update_queue),
            ("HintSessions", self._hint_sessions),
            ("PlanLoad", self._plan_load),
            ("Forget", self._forget),
            ("Stats", self._stats),
            ("Explain", self._explain),
            ("RegisterDevice", self._devices.register),
            ("UnregisterDevice", self._devices.unregister),
        ):
            self.unary[method] = unary(metrics.rpc(method), method, answer)
            setattr(self, method, self.unary[method].handle)

    # ------------------------------------------------------------------ streams

    async def Attach(self, requests: AsyncIterator[pb.AttachRequest | Malformed], context: GrpcContext) -> None:  # noqa: N802
        """Handshake, then notices to the instance until its stream ends."""
        started_s = time.perf_counter()
        code = "OK"
        outgoing: asyncio.Queue[pb.AttachResponse | None] = asyncio.Queue(_NOTICES_MAX)
        try:
            instance = self._instance(context)
            hello = await _first_hello(requests)
            welcome = await self._welcome(instance, hello, outgoing)
        except Exception as error:  # noqa: BLE001  # everything must become a status
            status, detail = error_detail(error, where="Attach")
            code = status.name
            await abort(context, status, detail)
        finally:
            self._attach_calls.observe(time.perf_counter() - started_s, code)
        pings = asyncio.create_task(_answer_pings(requests, outgoing))
        try:
            await context.write(pb.AttachResponse(welcome=welcome))
            while (response := await outgoing.get()) is not None:
                await context.write(response)
        finally:
            pings.cancel()
            self._store.detach(instance)

    async def Get(self, request: pb.GetRequest, context: GrpcContext) -> None:  # noqa: N802
        """The lease and what is in DRAM at once; what is on NVMe in order as it arrives."""
        started_s = time.perf_counter()
        try:
            places = self._devices.places(well_formed(request), context)
            granted = await self._granted(request, context)
        except Exception as error:  # noqa: BLE001  # everything must become a status
            status, detail = error_detail(error, where="Get")
            self._get_calls.observe(time.perf_counter() - started_s, status.name)
            await abort(context, status, detail)
        self._get_calls.observe(time.perf_counter() - started_s, "OK")
        # Nothing ran since the blocks were granted: the instance and the namespace are those.
        instance = self._instance(context)
        namespace = self._store.namespace(instance, request.namespace_id)
        wait_s = request.wait_ms / 1000 if request.wait_ms else None
        with RequestedBlocks(
            self.block_requests, granted, namespace, instance_id=instance.instance_id, started_s=started_s
        ) as requested:
            if places is None:
                responses = getting.responses(granted, wait_s=wait_s)
            else:
                responses = self._devices.get_responses(instance, granted, places, wait_s=wait_s)
            async for response in responses:
                requested.answered(response)
                await context.write(response)

    # -------------------------------------------------------------------- unary

    def _lookup(self, request: pb.LookupRequest, context: Context) -> pb.LookupResponse:
        looked = self._store.lookup(self._instance(context), request.namespace_id, request.hashes)
        self._metrics.lookup_held_blocks.inc(looked.hit_blocks)
        self._metrics.lookup_miss_blocks.inc(looked.blocks - looked.hit_blocks)
        return messages.lookup_response(looked)

    async def _load(self, request: pb.LoadRequest, context: Context) -> pb.LoadResponse:
        started_s = time.perf_counter()
        instance = self._instance(context)
        places = self._devices.require_places(request, instance)
        granted = await self._store.get(
            instance,
            request.namespace_id,
            request.hashes,
            session_id=require_text(request.session_id, "session_id"),
            request_id=require_text(request.request_id, "request_id"),
            duration_s=0.0,
            max_blocks=0,
            attempt_id=request.attempt_id,
            accepts_shifts=request.accepts_shifts,
        )
        # Nothing ran since the blocks were granted: the namespace is that one.
        namespace = self._store.namespace(instance, request.namespace_id)
        wait_s = request.wait_ms / 1000 if request.wait_ms else None
        with RequestedBlocks(
            self.block_requests, granted, namespace, instance_id=instance.instance_id, started_s=started_s
        ) as requested:
            landed = await self._devices.begin_load(instance, granted, places, wait_s=wait_s)
            requested.handed_out(landed.blocks)
            copied = slice(places.first, landed.blocks)
            response = pb.LoadResponse(blocks=len(granted.slots[copied]), shift_tokens=granted.shifts[copied])
            for blocks, miss in messages.misses(granted.asked - landed.blocks, landed.miss):
                requested.missed(miss, blocks)
                response.miss = response.miss or miss
        return response

    async def _granted(self, request: pb.GetRequest, context: Context) -> Granted:
        return await self._store.get(
            self._instance(context),
            request.namespace_id,
            request.hashes,
            session_id=require_text(request.session_id, "session_id"),
            request_id=require_text(request.request_id, "request_id"),
            duration_s=request.lease_ms / 1000,
            max_blocks=request.max_blocks,
            attempt_id=request.attempt_id,
            accepts_shifts=request.accepts_shifts,
        )

    def _renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        self._require_few(request.lease_ids, "lease_ids")
        self._require_few(request.reservation_ids, "reservation_ids")
        renewed = self._store.renew(
            self._instance(context), request.lease_ids, request.reservation_ids, request.lease_ms / 1000
        )
        return pb.RenewResponse(lease_ms=int(renewed.duration_s * 1000))

    async def _release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        self._require_few(request.lease_ids, "lease_ids")
        request_id = require_text(request.request_id, "request_id")
        self._require_few(request.attempt_ids, "attempt_ids")
        instance = self._instance(context)
        ended = self._store.release(instance, request.lease_ids, request_id, request.attempt_ids)
        await self._store.device_copies.until_quiet(instance, request.attempt_ids)
        return pb.ReleaseResponse(released=ended.live, expired=ended.expired)

    async def _put(self, request: pb.PutRequest, context: Context) -> pb.PutResponse:
        instance = self._instance(context)
        places = self._devices.places(request, context)
        reserved = await self._store.put(
            instance,
            request.namespace_id,
            request.parent,
            request.hashes,
            session_id=require_text(request.session_id, "session_id"),
            request_id=require_text(request.request_id, "request_id"),
            duration_s=request.lease_ms / 1000,
            attempt_id=request.attempt_id,
        )
        if places is None:
            response = messages.put_response(reserved)
        else:
            response = await self._devices.put_response(instance, request.namespace_id, reserved, places)
        for run in response.runs:
            self._metrics.put_blocks[str(run.WhichOneof("outcome"))].inc(run.blocks)
        return response

    def _commit(self, request: pb.CommitRequest, context: Context) -> pb.CommitResponse:
        self._require_few(request.positions, "positions")
        committed = self._store.commit(self._instance(context), request.reservation_id, request.positions)
        return messages.commit_response(committed)

    def _abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        return pb.AbortResponse(expired=self._store.abort(self._instance(context), request.reservation_id))

    def _truncate(self, request: pb.TruncateRequest, context: Context) -> pb.TruncateResponse:
        truncated = self._store.truncate(
            self._instance(context),
            request.namespace_id,
            request.source,
            messages.kept_part(request),
            request.hashes,
            session_id=require_text(request.session_id, "session_id"),
        )
        return messages.truncate_response(truncated)

    def _prefetch(self, request: pb.PrefetchRequest, context: Context) -> pb.PrefetchResponse:
        request_id = require_text(request.request_id, "request_id")
        prefetched = self._store.prefetch(self._instance(context), request.namespace_id, request.hashes, request_id)
        return messages.prefetch_response(prefetched)

    def _update_queue(self, request: pb.UpdateQueueRequest, context: Context) -> pb.UpdateQueueResponse:
        instance = self._instance(context)
        namespace = self._store.namespace(instance, request.namespace_id)
        return hints.queue_response(self._store.waiting.update(instance, namespace, hints.queue_update(request)))

    async def _hint_sessions(self, request: pb.HintSessionsRequest, context: Context) -> pb.HintSessionsResponse:
        instance, told = self._instance(context), hints.session_hints(request)
        known = await self._store.waiting.hint(lambda: self._store.namespace(instance, request.namespace_id), told)
        return pb.HintSessionsResponse(known=known)

    def _plan_load(self, request: pb.PlanLoadRequest, context: Context) -> pb.PlanLoadResponse:
        instance, engine = self._instance(context), hints.engine_speeds(request)
        return hints.plan_response(self._store.plan_load(instance, request.namespace_id, request.hashes, engine))

    async def _forget(self, request: pb.ForgetRequest, context: Context) -> pb.ForgetResponse:
        instance = self._instance(context)
        match request.WhichOneof("target"):
            case "session_id":
                forgotten = self._store.forget_session(instance, request.namespace_id, request.session_id)
            case "whole_namespace":
                forgotten = self._store.forget_namespace(instance, request.namespace_id)
            case _:
                raise errors.InvalidRequest("name a session or the whole namespace", field="target")
        await self._store.durability.record()
        return pb.ForgetResponse(blocks_dropped=forgotten.dropped, blocks_in_use=forgotten.in_use)

    def _stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsResponse:
        return reports.stats(
            self._store,
            self._instance(context).tenant,
            epoch=self.epoch,
            started_at_s=self._started_at_s,
            state=self._state(),
        )

    def _explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        return reports.explanation(self._store, self._instance(context).tenant, request)

    # ----------------------------------------------------------------- privately

    def _instance(self, context: Context) -> Peer:
        return self._store.instances.of_token(token_of(context))

    def _require_few(self, items: Any, field: str) -> None:
        bound = self._store.config.hashes_per_call_max
        if len(items) > bound:
            raise errors.InvalidRequest(f"{len(items)} {field}, at most {bound} per call", field=field)

    async def _welcome(
        self, instance: Peer, hello: pb.Hello, outgoing: asyncio.Queue[pb.AttachResponse | None]
    ) -> pb.Welcome:
        version = agreed_version(hello.protocol_version_min, hello.protocol_version_max)
        config = self._store.config
        if not hello.namespaces:
            raise errors.InvalidRequest("no namespaces: attach at least one", field="namespaces")
        messages.require_between(len(hello.namespaces), 1, config.namespaces_max, "namespaces")
        specs = [
            messages.namespace_spec(message, instance.tenant, block_size_bytes_max=config.block_size_bytes_max)
            for message in hello.namespaces
        ]
        name = require_text(hello.instance_name, "instance_name", length_max=messages.NAME_LENGTH_MAX)

        def notify(notice: Notice) -> None:
            if isinstance(notice, HungUp) or outgoing.full():
                _end(outgoing)  # it has not read its stream for a thousand notices; it may attach again
            else:
                outgoing.put_nowait(_notice(notice))

        segment_ids = await self._store.attach(instance, name, specs)
        instance.notify = notify
        return pb.Welcome(
            protocol_version=version,
            daemon_version=__version__,
            daemon_epoch=self.epoch,
            instance_id=instance.instance_id,
            namespace_ids=range(1, len(specs) + 1),
            limits=pb.Limits(
                hashes_per_call_max=config.hashes_per_call_max,
                leases_per_instance_max=config.leases_per_instance_max,
                reservations_per_instance_max=config.reservations_per_instance_max,
                lease_ms_max=int(config.lease_s_max * 1000),
                queue_entries_max=config.queue_entries_max,
                queue_blocks_max=config.queue_blocks_max,
                session_hints_max=hints.SESSION_HINTS_MAX,
                aliases_per_session_max=config.aliases_per_session_max,
            ),
            planes=self._store.device_copies.planes,
            segment_ids=segment_ids,
        )


def agreed_version(lowest: int, highest: int) -> int:
    """The newest protocol version that both sides speak.

    Raises:
        InvalidRequest: none.
    """
    if lowest > PROTOCOL_VERSION_MAX or highest < PROTOCOL_VERSION_MIN or lowest > highest:
        raise errors.InvalidRequest(
            f"protocol versions {lowest} to {highest} offered, this daemon speaks {PROTOCOL_VERSION_MIN} to "
            f"{PROTOCOL_VERSION_MAX}: upgrade the older side",
            field="protocol_version",
        )
    return min(highest, PROTOCOL_VERSION_MAX)


async def _first_hello(requests: AsyncIterator[pb.AttachRequest | Malformed]) -> pb.Hello:
    try:
        first = well_formed(await asyncio.wait_for(anext(requests), _HELLO_TIMEOUT_S))
    except (TimeoutError, StopAsyncIteration):
        raise errors.InvalidRequest("the stream must start with Hello", field="hello") from None
    if first.WhichOneof("message") != "hello":
        raise errors.InvalidRequest("the stream must start with Hello", field="hello")
    return first.hello


async def _answer_pings(
    requests: AsyncIterator[pb.AttachRequest | Malformed], outgoing: asyncio.Queue[pb.AttachResponse | None]
) -> None:
    """Read until the client ends its side, then end the stream."""
    try:
        async for request in requests:
            is_ping = not isinstance(request, Malformed) and request.WhichOneof("message") == "ping"
            if is_ping and not outgoing.full():
                outgoing.put_nowait(pb.AttachResponse(pong=pb.Pong()))
    finally:
        _end(outgoing)


def _end(outgoing: asyncio.Queue[pb.AttachResponse | None]) -> None:
    if outgoing.full():
        outgoing.get_nowait()
    outgoing.put_nowait(None)


def _notice(notice: SegmentsChanged | DrainNotice) -> pb.AttachResponse:
    match notice:
        case SegmentsChanged():
            return pb.AttachResponse(
                segments_changed=pb.SegmentsChanged(added_ids=notice.added_ids, retired_ids=notice.retired_ids)
            )
        case DrainNotice():
            return pb.AttachResponse(drain_notice=pb.DrainNotice(deadline_ms=int(notice.deadline_s * 1000)))
