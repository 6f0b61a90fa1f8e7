"""messages: what the scheduler's half tells the workers with every step, and what a worker tells it once."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

import kvservice_client as kv
from kvservice_adapters.vllm.orders import LoadOrder, SaveOrder


@dataclass
class StepOrders(KVConnectorMetadata):
    """One step's orders.

    Attributes:
        released: requests, preempted or finished, whose blocks are somebody else's from now on.
        retained: finished requests whose blocks the scheduler keeps until the worker says that they are saved.
    """

    loads: list[LoadOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    retained: list[str] = field(default_factory=list)


@dataclass
class WorkerNamespace(KVConnectorHandshakeMetadata):
    """The namespace of one rank, made from its real tensors.

    Attributes:
        truncation_refusal: why this rank cannot turn keys; "": it can.
    """

    namespace: kv.Namespace
    truncation_refusal: str
