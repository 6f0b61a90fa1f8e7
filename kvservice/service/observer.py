"""The contract over TCP: Stats and Explain for whoever shows a trusted certificate.

KV bytes cannot follow a TCP connection, so everything that grants or changes is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvservice.blocks import Tenant
from kvservice.errors import PermissionDenied, Unauthenticated
from kvservice.instances import Identity
from kvservice.metrics import Metrics
from kvservice.service import reports
from kvservice.service.calls import GrpcContext, unary
from kvservice.service.control import ControlService
from kvservice.store import Store
from kvservice_proto.v1 import kvservice_pb2, kvservice_pb2_grpc
from kvservice_proto.v1 import kvservice_pb2 as pb


class ObserverService(kvservice_pb2_grpc.KVCacheServiceServicer):
    """KVCacheService for people and dashboards: read-only, inside the certificate's tenant."""

    def __init__(self, store: Store, metrics: Metrics, control: ControlService, *, state: Callable[[], str]) -> None:
        self._store = store
        self._control = control
        self._state = state
        self._started_at_s = store.clock()
        answers: dict[str, Callable[[Any, GrpcContext], Any]] = {"Stats": self._stats, "Explain": self._explain}
        for method in kvservice_pb2.DESCRIPTOR.services_by_name["KVCacheService"].methods_by_name:
            answer = unary(metrics.rpc(method), method, answers.get(method, _refuse))
            setattr(self, method, answer.handle)

    def _stats(self, request: pb.StatsRequest, context: GrpcContext) -> pb.StatsResponse:
        return reports.stats(
            self._store,
            self._tenant(context),
            epoch=self._control.epoch,
            started_at_s=self._started_at_s,
            state=self._state(),
        )

    def _explain(self, request: pb.ExplainRequest, context: GrpcContext) -> pb.ExplainResponse:
        return reports.explanation(self._store, self._tenant(context), request)

    def _tenant(self, context: GrpcContext) -> Tenant:
        name = next(iter(context.auth_context().get("x509_common_name", ())), b"")
        if not name:
            raise Unauthenticated("the client certificate has no common name")
        return Identity(f"cn:{name.decode()}").tenant(self._store.config.tenants)


def _refuse(_request: Any, _context: GrpcContext) -> Any:
    raise PermissionDenied("TCP serves Stats, Explain and health only: KV bytes need the Unix sockets of this node")
