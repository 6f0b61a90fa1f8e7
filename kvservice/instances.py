"""instances: who is connected, as whom, and since when.

A *connection* is a process on the fd socket: known by its kernel-checked identity, carrying the
token that its RPCs show. It becomes an *instance* when it attaches namespaces. Pure.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kvservice.blocks import Tenant
from kvservice.errors import InvalidRequest, Overloaded, Unauthenticated

TOKEN_BYTES = 32

NamespaceT = TypeVar("NamespaceT")


@dataclass(frozen=True, slots=True)
class Identity:
    """What the kernel, or a verified certificate, says about a peer."""

    name: str
    """"uid:1000" or "cn:ops"."""
    process_id: int = 0

    def tenant(self, tenants: Mapping[str, str]) -> Tenant:
        """The tenant that owns this identity's data: as configured, else the identity itself."""
        return Tenant(tenants.get(self.name, self.name))


@dataclass(frozen=True, slots=True)
class SegmentsChanged:
    """Segments that an instance should map, and those that it should unmap."""

    added_ids: tuple[int, ...] = ()
    retired_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DrainNotice:
    """The daemon stops within this time."""

    deadline_s: float


@dataclass(frozen=True, slots=True)
class HungUp:
    """The process closed its memory socket: its stream has no purpose any more."""


Notice = SegmentsChanged | DrainNotice | HungUp


@dataclass(slots=True, eq=False)
class Instance(Generic[NamespaceT]):
    """One connected process."""

    instance_id: int
    identity: Identity
    tenant: Tenant
    token: bytes
    connected_at_s: float
    name: str = ""
    namespaces: list[NamespaceT] = field(default_factory=list)
    """What it attached; a wire namespace id is a position in here, plus one."""
    is_attached: bool = False
    notify: Callable[[Notice], None] = field(default=lambda notice: None)


class Instances(Generic[NamespaceT]):
    """Every connection, by token."""

    def __init__(self, *, connections_max: int, instances_max: int) -> None:
        self._connections_max = connections_max
        self._instances_max = instances_max
        self._by_token: dict[bytes, Instance[NamespaceT]] = {}
        self._next_id = 1

    def __iter__(self) -> Iterator[Instance[NamespaceT]]:
        return iter(list(self._by_token.values()))

    def __len__(self) -> int:
        return len(self._by_token)

    @property
    def attached(self) -> int:
        """How many have attached namespaces."""
        return sum(instance.is_attached for instance in self._by_token.values())

    def connect(self, identity: Identity, tenant: Tenant, now_s: float) -> Instance[NamespaceT]:
        """A new connection with a token of its own.

        Raises:
            Overloaded: as many are connected as may be.
        """
        if len(self._by_token) >= self._connections_max:
            raise Overloaded(f"{self._connections_max} processes are connected (connections_max)")
        token = secrets.token_bytes(TOKEN_BYTES)
        instance: Instance[NamespaceT] = Instance(self._next_id, identity, tenant, token, now_s)
        self._next_id += 1
        self._by_token[token] = instance
        return instance

    def of_token(self, token: bytes) -> Instance[NamespaceT]:
        """The connection that was issued the token.

        Raises:
            Unauthenticated: none, or it has hung up.
        """
        instance = self._by_token.get(token)
        if instance is None:
            raise Unauthenticated("unknown token: connect to the memory socket first; it issues one per process")
        return instance

    def attach(self, instance: Instance[NamespaceT], name: str) -> None:
        """The connection becomes an instance.

        Raises:
            InvalidRequest: it is one already.
            Overloaded: as many are attached as may be.
        """
        if instance.is_attached:
            raise InvalidRequest("this connection is attached already; open another for another attachment")
        if self.attached >= self._instances_max:
            raise Overloaded(f"{self._instances_max} instances are attached (instances_max)")
        instance.is_attached = True
        instance.name = name

    def tell(self, notice: Notice, *, attached_to: NamespaceT | None = None) -> None:
        """All instances get the notice, or those that attached that namespace."""
        for instance in self:
            if attached_to is None or attached_to in instance.namespaces:
                instance.notify(notice)

    def detach(self, instance: Instance[NamespaceT]) -> None:
        """Its stream ended; the process may still be there."""
        instance.is_attached = False
        instance.notify = lambda notice: None

    def hang_up(self, instance: Instance[NamespaceT]) -> None:
        """Its process is gone: the token ends."""
        self._by_token.pop(instance.token, None)
