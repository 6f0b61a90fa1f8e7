"""The contract over TCP: Stats and Explain for whoever shows a trusted certificate.

KV bytes cannot follow a TCP connection, so everything that grants or changes is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvservice_proto.v1 import kvservice_pb2 as pb
from kvservice_proto.v1 import kvservice_pb2_grpc

from kvservice.blocks import Tenant
from kvservice.errors import PermissionDenied, Unauthenticated
from kvservice.instances import Identity
from kvservice.metrics import Metrics
from kvservice.service import messages, reports
from kvservice.service.calls import Context, unary
from kvservice.service.control import PLANES, ControlService
from kvservice.store import Store, explain

_REFUSED = ("Lookup", "Renew", "Release", "Put", "Commit", "Abort", "Prefetch", "Forget")


class ObserverService(kvservice_pb2_grpc.KVCacheServiceServicer):
    """KVCacheService for people and dashboards: read-only, inside the certificate's tenant."""

    def __init__(self, store: Store, metrics: Metrics, control: ControlService, *, state: Callable[[], str]) -> None:
        self._store = store
        self._control = control
        self._state = state
        self._started_at_s = store.clock()
        for method in _REFUSED:
            setattr(self, method, unary(metrics.rpc(method), method, _refuse))
        self.Stats = unary(metrics.rpc("Stats"), "Stats", self._stats)
        self.Explain = unary(metrics.rpc("Explain"), "Explain", self._explain)
        refuse = unary(metrics.rpc("Get"), "Get", _refuse)

        async def refuse_stream(request: Any, context: Context) -> None:
            await refuse(request, context)

        self.Get = refuse_stream
        self.Attach = refuse_stream

    def _stats(self, request: pb.StatsRequest, context: Context) -> pb.StatsResponse:
        return reports.stats(
            self._store,
            self._tenant(context),
            epoch=self._control.epoch,
            started_at_s=self._started_at_s,
            state=self._state(),
            planes=PLANES,
        )

    def _explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        store = self._store
        tenant = self._tenant(context)
        found = explain(store.namespaces.values(), tenant, request.hash, request.fingerprint, store.clock())
        return messages.explain_response(found)

    def _tenant(self, context: Context) -> Tenant:
        names = context.auth_context().get("x509_common_name", ())
        if not names:
            raise Unauthenticated("the client certificate has no common name")
        return Identity(f"cn:{bytes(names[0]).decode()}").tenant(self._store.config.tenants)


def _refuse(request: Any, context: Context) -> Any:
    raise PermissionDenied("TCP serves Stats, Explain and health only: KV bytes need the Unix sockets of this node")
