"""Connections are known by tokens that cannot be guessed, become instances once, and are bounded."""

from __future__ import annotations

import pytest

from kvservice.blocks import Tenant
from kvservice.errors import InvalidRequest, Overloaded, Unauthenticated
from kvservice.instances import TOKEN_BYTES, DrainNotice, Identity, Instance, Instances, Notice

pytestmark = pytest.mark.unit


@pytest.fixture
def instances() -> Instances[str]:
    return Instances(connections_max=3, instances_max=2)


def connect(instances: Instances[str], uid: int = 1) -> Instance[str]:
    return instances.connect(Identity(f"uid:{uid}", process_id=uid), Tenant(f"tenant-{uid}"), 5.0)


def test_the_tenant_is_what_the_configuration_says_or_the_identity() -> None:
    tenants = {"uid:1000": "research", "cn:ops": "research"}
    assert Identity("uid:1000").tenant(tenants) == "research"
    assert Identity("cn:ops").tenant(tenants) == "research"
    assert Identity("uid:1001").tenant(tenants) == "uid:1001"


def test_a_connection_carries_who_it_is_and_since_when(instances: Instances[str]) -> None:
    instance = connect(instances, 7)
    assert instance.identity == Identity("uid:7", 7)
    assert (instance.tenant, instance.connected_at_s) == ("tenant-7", 5.0)
    assert not instance.is_attached
    assert instance.namespaces == []


def test_tokens_are_long_distinct_and_lead_back_to_their_connection(instances: Instances[str]) -> None:
    first, second = connect(instances), connect(instances)
    assert len(first.token) == len(second.token) == TOKEN_BYTES == 32
    assert first.token != second.token
    assert instances.of_token(first.token) is first
    assert instances.of_token(second.token) is second
    assert first.instance_id != second.instance_id


@pytest.mark.parametrize("token", [b"", b"x", bytes(TOKEN_BYTES)])
def test_a_token_that_was_not_issued_is_refused(instances: Instances[str], token: bytes) -> None:
    connect(instances)
    with pytest.raises(Unauthenticated):
        instances.of_token(token)


def test_a_token_ends_with_its_process(instances: Instances[str]) -> None:
    instance = connect(instances)
    instances.hang_up(instance)
    with pytest.raises(Unauthenticated):
        instances.of_token(instance.token)
    assert len(instances) == 0
    instances.hang_up(instance)
    assert len(instances) == 0


def test_connections_are_bounded(instances: Instances[str]) -> None:
    first = connect(instances)
    connect(instances)
    connect(instances)
    with pytest.raises(Overloaded, match="connections_max"):
        connect(instances)
    assert len(instances) == 3
    instances.hang_up(first)
    assert connect(instances).instance_id == 4


def test_attached_instances_are_bounded(instances: Instances[str]) -> None:
    first, second, third = (connect(instances) for _ in range(3))
    instances.attach(first, "one")
    instances.attach(second, "two")
    with pytest.raises(Overloaded, match="instances_max"):
        instances.attach(third, "three")
    assert not third.is_attached
    assert instances.attached == 2
    instances.detach(first)
    instances.attach(third, "three")
    assert instances.attached == 2
    assert third.name == "three"


def test_a_connection_is_attached_once_at_a_time(instances: Instances[str]) -> None:
    instance = connect(instances)
    instances.attach(instance, "one")
    with pytest.raises(InvalidRequest, match="attached already"):
        instances.attach(instance, "two")
    assert instance.name == "one"
    instances.detach(instance)
    instances.attach(instance, "two")
    assert instance.name == "two"


def test_a_detached_instance_hears_nothing_and_keeps_its_token(instances: Instances[str]) -> None:
    heard: list[Notice] = []
    instance = connect(instances)
    instances.attach(instance, "one")
    instance.notify = heard.append
    instance.notify(DrainNotice(1.0))
    instances.detach(instance)
    instance.notify(DrainNotice(2.0))
    assert heard == [DrainNotice(1.0)]
    assert instances.of_token(instance.token) is instance


def test_everybody_connected_can_be_listed_while_they_leave(instances: Instances[str]) -> None:
    expected = [connect(instances), connect(instances)]
    assert list(instances) == expected
    for instance in instances:
        instances.hang_up(instance)
    assert list(instances) == []
