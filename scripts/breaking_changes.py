"""breaking_changes: what in a contract would stop the clients of the released one from working.

Covers: comparing two FileDescriptorSets, as data. Does not cover: making or storing them (`check_protos`).

Stricter than the wire format: a rename or a change between wire-compatible types also counts, because
people read the contract as text and tools address its fields by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

Label = FieldDescriptorProto.Label
Type = FieldDescriptorProto.Type


def breaking_changes(released: FileDescriptorSet, current: FileDescriptorSet) -> list[str]:
    """Name every breaking change, one line each, in the released contract's order.

    Additions are fine: messages, fields (also to a oneof), enum values, services, rpcs. So is removing a
    field whose number and name are both reserved.
    """
    now = {file.name: file for file in current.file}
    return [line for before in released.file for line in _file_changes(before, now.get(before.name))]


def _file_changes(before: FileDescriptorProto, now: FileDescriptorProto | None) -> Iterator[str]:
    if now is None:
        yield f"{before.name}: file removed"
        return
    if before.package != now.package:
        # Every name below would differ: one line says it all.
        yield f"{before.name}: package changed from {before.package} to {now.package}"
        return
    if before.syntax != now.syntax:
        yield f"{before.name}: syntax changed from {before.syntax} to {now.syntax}"
    yield from _messages_changes(before.package, before.message_type, now.message_type)
    yield from _enums_changes(before.package, before.enum_type, now.enum_type)
    services = {service.name: service for service in now.service}
    for service in before.service:
        yield from _service_changes(f"{before.package}.{service.name}", service, services.get(service.name))


# -------------------------------------------------------------------- messages


def _messages_changes(scope: str, before: Iterable[DescriptorProto], now: Iterable[DescriptorProto]) -> Iterator[str]:
    messages = {message.name: message for message in now}
    for message in before:
        name = f"{scope}.{message.name}"
        if message.name not in messages:
            yield f"{name}: message removed"
        else:
            yield from _message_changes(name, message, messages[message.name])


def _message_changes(name: str, before: DescriptorProto, now: DescriptorProto) -> Iterator[str]:
    by_name = {field.name: field for field in now.field}
    by_number = {field.number: field for field in now.field}
    for field in before.field:
        here = f"{name}.{field.name}"
        # A field is known by its name; only where that is gone, by its number.
        successor = by_name.get(field.name) or by_number.get(field.number)
        if successor is None:
            yield from _removed_field(here, field, now)
            continue
        if successor.number != field.number:
            yield f"{here}: field renumbered from {field.number} to {successor.number}"
        if successor.name != field.name:
            yield f"{here}: field {field.number} renamed to {successor.name}"
        yield from _field_changes(here, (before, field), (now, successor))
    yield from _released_reservations(name, before, now)
    yield from _messages_changes(name, before.nested_type, now.nested_type)
    yield from _enums_changes(name, before.enum_type, now.enum_type)


def _removed_field(here: str, field: FieldDescriptorProto, now: DescriptorProto) -> Iterator[str]:
    missing = []
    if _first_free(field.number, field.number + 1, now) <= field.number:
        missing.append(f"number {field.number}")
    if field.name not in now.reserved_name:
        missing.append(f'name "{field.name}"')
    if missing:
        yield f"{here}: field removed without reserving its {' and its '.join(missing)}"


def _released_reservations(name: str, before: DescriptorProto, now: DescriptorProto) -> Iterator[str]:
    for reserved in before.reserved_range:
        free = _first_free(reserved.start, reserved.end, now)
        if free < reserved.end:
            yield f"{name}: number {free} is no longer reserved"
    for reserved_name in before.reserved_name:
        if reserved_name not in now.reserved_name:
            yield f'{name}: name "{reserved_name}" is no longer reserved'


def _first_free(start: int, end: int, message: DescriptorProto) -> int:
    """The first number in [start, end) that the message does not reserve; `end` or more when it reserves all."""
    number = start
    # A released range may have been split or widened since; ranges exclude their end.
    for reserved in sorted(message.reserved_range, key=lambda reserved: reserved.start):
        if reserved.start <= number < reserved.end:
            number = reserved.end
        if number >= end:
            break
    return number


FieldInMessage = tuple[DescriptorProto, FieldDescriptorProto]


def _field_changes(here: str, before: FieldInMessage, now: FieldInMessage) -> Iterator[str]:
    if _type_name(before[1]) != _type_name(now[1]):
        yield f"{here}: type changed from {_type_name(before[1])} to {_type_name(now[1])}"
    if before[1].label != now[1].label:
        yield f"{here}: label changed from {_label_name(before[1])} to {_label_name(now[1])}"
    if before[1].proto3_optional != now[1].proto3_optional:
        yield f"{here}: explicit presence (optional) {'added' if now[1].proto3_optional else 'removed'}"
    oneof_before, oneof_now = _oneof_name(*before), _oneof_name(*now)
    if oneof_before == oneof_now:
        return
    if not oneof_before:
        yield f"{here}: moved into oneof {oneof_now}"
    elif not oneof_now:
        yield f"{here}: moved out of oneof {oneof_before}"
    else:
        yield f"{here}: moved from oneof {oneof_before} to {oneof_now}"


def _type_name(field: FieldDescriptorProto) -> str:
    return field.type_name.removeprefix(".") or Type.Name(field.type).removeprefix("TYPE_").lower()


def _label_name(field: FieldDescriptorProto) -> str:
    return Label.Name(field.label).removeprefix("LABEL_").lower()


def _oneof_name(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    """The oneof as written in the contract; empty when there is none."""
    # protoc wraps an `optional` field in a oneof of its own, which nobody wrote.
    if not field.HasField("oneof_index") or field.proto3_optional:
        return ""
    return message.oneof_decl[field.oneof_index].name


# ---------------------------------------------------------- enums and services


def _enums_changes(
    scope: str, before: Iterable[EnumDescriptorProto], now: Iterable[EnumDescriptorProto]
) -> Iterator[str]:
    enums = {enum.name: enum for enum in now}
    for enum in before:
        name = f"{scope}.{enum.name}"
        if enum.name not in enums:
            yield f"{name}: enum removed"
            continue
        numbers = {value.name: value.number for value in enums[enum.name].value}
        for value in enum.value:
            if value.name not in numbers:
                yield f"{name}.{value.name}: enum value {value.number} removed or renamed"
            elif numbers[value.name] != value.number:
                yield f"{name}.{value.name}: enum value renumbered from {value.number} to {numbers[value.name]}"


def _service_changes(name: str, before: ServiceDescriptorProto, now: ServiceDescriptorProto | None) -> Iterator[str]:
    if now is None:
        yield f"{name}: service removed"
        return
    methods = {method.name: method for method in now.method}
    for method in before.method:
        here = f"{name}.{method.name}"
        if method.name not in methods:
            yield f"{here}: rpc removed"
            continue
        successor = methods[method.name]
        compared: Sequence[tuple[str, object, object]] = (
            ("request type", method.input_type.removeprefix("."), successor.input_type.removeprefix(".")),
            ("response type", method.output_type.removeprefix("."), successor.output_type.removeprefix(".")),
            ("client streaming", method.client_streaming, successor.client_streaming),
            ("server streaming", method.server_streaming, successor.server_streaming),
        )
        for what, old, new in compared:
            if old != new:
                yield f"{here}: {what} changed from {old} to {new}"
