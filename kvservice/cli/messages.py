"""messages: protobuf messages as plain objects for --json, and their names and bytes as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message


def as_plain(message: Message) -> dict[str, object]:
    """Every field of `message` under its own name, present or not (of a oneof only the one that is set).

    Integers stay numbers, bytes become hex, enum values their short lower-case names.
    """
    plain: dict[str, object] = {}
    for field in message.DESCRIPTOR.fields:
        if field.containing_oneof is not None and message.WhichOneof(field.containing_oneof.name) != field.name:
            continue
        value = getattr(message, field.name)
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        # The stubs know the C implementation's class as well, which has the same attributes.
        enum = cast("EnumDescriptor | None", field.enum_type)
        plain[field.name] = [_plain(item, enum) for item in value] if is_list else _plain(value, enum)
    return plain


def enum_name(enum: EnumDescriptor, number: int) -> str:
    """The value's name without its enum's prefix: DROP_REASON_CAPACITY is "capacity"; "unknown 42" for a newer one."""
    if number not in enum.values_by_number:
        return f"unknown {number}"
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return enum.values_by_number[number].name.removeprefix(prefix).lower()


def _plain(value: object, enum: EnumDescriptor | None) -> object:
    if isinstance(value, Message):
        return as_plain(value)
    if isinstance(value, bytes):
        return value.hex()
    if enum is not None and isinstance(value, int):
        return enum_name(enum, value)
    return value
