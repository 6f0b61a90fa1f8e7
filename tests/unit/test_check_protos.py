"""Each kind of breaking change is named, additions are not, and stale generated code is noticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet

from scripts.breaking_changes import breaking_changes
from scripts.check_protos import read_released, stale_files

pytestmark = pytest.mark.unit

# A contract of our own, so that the real one may grow without touching these tests.
RELEASED = """
file {
  name: "shop/v1/shop.proto" package: "shop.v1" syntax: "proto3"
  message_type {
    name: "Order"
    field { name: "id" number: 1 type: TYPE_UINT64 label: LABEL_OPTIONAL }
    field { name: "lines" number: 2 type: TYPE_MESSAGE type_name: ".shop.v1.Order.Line" label: LABEL_REPEATED }
    field { name: "card" number: 3 type: TYPE_STRING label: LABEL_OPTIONAL oneof_index: 0 }
    field { name: "cash" number: 4 type: TYPE_BOOL label: LABEL_OPTIONAL oneof_index: 0 }
    field { name: "note" number: 5 type: TYPE_STRING label: LABEL_OPTIONAL oneof_index: 1 proto3_optional: true }
    oneof_decl { name: "payment" }
    oneof_decl { name: "_note" }
    nested_type {
      name: "Line"
      field { name: "amount" number: 1 type: TYPE_UINT32 label: LABEL_OPTIONAL }
    }
    enum_type { name: "Speed" value { name: "SPEED_UNSPECIFIED" number: 0 } value { name: "SPEED_FAST" number: 1 } }
    reserved_range { start: 8 end: 11 }
    reserved_name: "discount"
  }
  message_type { name: "Receipt" }
  enum_type { name: "State" value { name: "STATE_UNSPECIFIED" number: 0 } value { name: "STATE_PAID" number: 1 } }
  service {
    name: "Shop"
    method { name: "Buy" input_type: ".shop.v1.Order" output_type: ".shop.v1.Receipt" }
    method { name: "Watch" input_type: ".shop.v1.Order" output_type: ".shop.v1.Receipt" server_streaming: true }
  }
}
"""

Change = Callable[[FileDescriptorProto], object]


def _contract() -> FileDescriptorSet:
    return text_format.Parse(RELEASED, FileDescriptorSet())


def _after(change: Change) -> list[str]:
    current = _contract()
    change(current.file[0])
    return breaking_changes(_contract(), current)


def _order(file: FileDescriptorProto) -> DescriptorProto:
    return file.message_type[0]


def _field(file: FileDescriptorProto, name: str) -> FieldDescriptorProto:
    return next(field for field in _order(file).field if field.name == name)


def _set(target: Callable[[FileDescriptorProto], object], **values: object) -> Change:
    def change(file: FileDescriptorProto) -> None:
        for name, value in values.items():
            setattr(target(file), name, value)

    return change


def _on_field(field: str, /, **values: object) -> Change:
    return _set(lambda file: _field(file, field), **values)


def _remove_field(name: str, *, reserve: str = "") -> Change:
    """Remove an order's field and reserve its `reserve`: "number", "name", both or neither."""

    def change(file: FileDescriptorProto) -> None:
        field = _field(file, name)
        if "number" in reserve:
            _order(file).reserved_range.add(start=field.number, end=field.number + 1)
        if "name" in reserve:
            _order(file).reserved_name.append(name)
        _order(file).field.remove(field)

    return change


def _swap_numbers(file: FileDescriptorProto) -> None:
    _field(file, "card").number, _field(file, "id").number = 1, 3


def _add_oneof(file: FileDescriptorProto) -> None:
    _order(file).oneof_decl.add(name="address")
    _field(file, "cash").oneof_index = 2


def _leave_oneof(file: FileDescriptorProto) -> None:
    _field(file, "cash").ClearField("oneof_index")


def _make_optional(file: FileDescriptorProto) -> None:
    _order(file).oneof_decl.add(name="_id")
    _field(file, "id").oneof_index = 2
    _field(file, "id").proto3_optional = True


def _make_implicit(file: FileDescriptorProto) -> None:
    _field(file, "note").ClearField("oneof_index")
    _field(file, "note").ClearField("proto3_optional")


def _use_reserved_number(file: FileDescriptorProto) -> None:
    del _order(file).reserved_range[:]
    _order(file).reserved_range.add(start=8, end=9)
    _order(file).reserved_range.add(start=10, end=11)


BREAKING: dict[str, tuple[Change, list[str]]] = {
    "package": (_set(lambda file: file, package="shop.v2"), ["package changed from shop.v1 to shop.v2"]),
    "syntax": (_set(lambda file: file, syntax="proto2"), ["syntax changed from proto3 to proto2"]),
    "file moved": (_set(lambda file: file, name="shop/shop.proto"), ["shop/v1/shop.proto: file removed"]),
    "message removed": (lambda file: file.message_type.pop(), ["shop.v1.Receipt: message removed"]),
    "nested message removed": (lambda file: _order(file).nested_type.pop(), ["shop.v1.Order.Line: message removed"]),
    "message renamed": (_set(lambda file: file.message_type[1], name="Bill"), ["shop.v1.Receipt: message removed"]),
    "field removed": (_remove_field("id"), ['removed without reserving its number 1 and its name "id"']),
    "only the number reserved": (_remove_field("id", reserve="number"), ['without reserving its name "id"']),
    "only the name reserved": (_remove_field("id", reserve="name"), ["without reserving its number 1"]),
    "field renumbered": (_on_field("id", number=6), ["Order.id: field renumbered from 1 to 6"]),
    "numbers swapped": (
        _swap_numbers,
        ["Order.id: field renumbered from 1 to 3", "card: field renumbered from 3 to 1"],
    ),
    "field renamed": (_on_field("id", name="key"), ["Order.id: field 1 renamed to key"]),
    "field retyped": (
        _on_field("id", type=FieldDescriptorProto.TYPE_STRING),
        ["Order.id: type changed from uint64 to string"],
    ),
    "field's message retyped": (
        _on_field("lines", type_name=".shop.v1.Receipt"),
        ["Order.lines: type changed from shop.v1.Order.Line to shop.v1.Receipt"],
    ),
    "nested field retyped": (
        _set(lambda file: _order(file).nested_type[0].field[0], type=FieldDescriptorProto.TYPE_SINT32),
        ["Order.Line.amount: type changed from uint32 to sint32"],
    ),
    "label": (
        _on_field("lines", label=FieldDescriptorProto.LABEL_OPTIONAL),
        ["Order.lines: label changed from repeated to optional"],
    ),
    "presence added": (_make_optional, ["Order.id: explicit presence (optional) added"]),
    "presence removed": (_make_implicit, ["Order.note: explicit presence (optional) removed"]),
    "into a oneof": (_on_field("id", oneof_index=0), ["Order.id: moved into oneof payment"]),
    "out of a oneof": (_leave_oneof, ["Order.cash: moved out of oneof payment"]),
    "between oneofs": (_add_oneof, ["Order.cash: moved from oneof payment to address"]),
    "number no longer reserved": (_use_reserved_number, ["shop.v1.Order: number 9 is no longer reserved"]),
    "name no longer reserved": (
        lambda file: _order(file).reserved_name.pop(),
        ['shop.v1.Order: name "discount" is no longer reserved'],
    ),
    "enum removed": (lambda file: file.enum_type.pop(), ["shop.v1.State: enum removed"]),
    "nested enum removed": (lambda file: _order(file).enum_type.pop(), ["shop.v1.Order.Speed: enum removed"]),
    "enum value removed": (
        lambda file: file.enum_type[0].value.pop(),
        ["shop.v1.State.STATE_PAID: enum value 1 removed or renamed"],
    ),
    "enum value renamed": (
        _set(lambda file: file.enum_type[0].value[1], name="STATE_SETTLED"),
        ["shop.v1.State.STATE_PAID: enum value 1 removed or renamed"],
    ),
    "enum value renumbered": (
        _set(lambda file: file.enum_type[0].value[1], number=2),
        ["shop.v1.State.STATE_PAID: enum value renumbered from 1 to 2"],
    ),
    "service removed": (lambda file: file.service.pop(), ["shop.v1.Shop: service removed"]),
    "rpc removed": (lambda file: file.service[0].method.pop(), ["shop.v1.Shop.Watch: rpc removed"]),
    "request type": (
        _set(lambda file: file.service[0].method[0], input_type=".shop.v1.Receipt"),
        ["Shop.Buy: request type changed from shop.v1.Order to shop.v1.Receipt"],
    ),
    "response type": (
        _set(lambda file: file.service[0].method[0], output_type=".shop.v1.Order"),
        ["Shop.Buy: response type changed from shop.v1.Receipt to shop.v1.Order"],
    ),
    "client streaming": (
        _set(lambda file: file.service[0].method[0], client_streaming=True),
        ["Shop.Buy: client streaming changed from False to True"],
    ),
    "server streaming": (
        _set(lambda file: file.service[0].method[1], server_streaming=False),
        ["Shop.Watch: server streaming changed from True to False"],
    ),
}

ACCEPTED: dict[str, Change] = {
    "nothing": lambda _file: None,
    "message": lambda file: file.message_type.add(name="Coupon"),
    "field": lambda file: _order(file).field.add(name="city", number=6, type=FieldDescriptorProto.TYPE_STRING),
    "field in a oneof": lambda file: _order(file).field.add(
        name="voucher", number=6, type=FieldDescriptorProto.TYPE_STRING, oneof_index=0
    ),
    "enum": lambda file: file.enum_type.add(name="Colour"),
    "enum value": lambda file: file.enum_type[0].value.add(name="STATE_SHIPPED", number=2),
    "service": lambda file: file.service.add(name="Returns"),
    "rpc": lambda file: file.service[0].method.add(name="Cancel", input_type=".shop.v1.Order"),
    "reserved field removed": _remove_field("id", reserve="number name"),
    "fields in another order": lambda file: _order(file).field.sort(key=lambda field: -field.number),
    "wider reservation": _set(lambda file: _order(file).reserved_range[0], start=7, end=20),
}


@pytest.mark.parametrize(("change", "expected"), BREAKING.values(), ids=BREAKING.keys())
def test_names_each_breaking_change(change: Change, expected: list[str]) -> None:
    lines = _after(change)
    assert len(lines) == len(expected), lines
    for line, part in zip(lines, expected, strict=True):
        assert part in line


@pytest.mark.parametrize("change", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepts_additions(change: Change) -> None:
    assert _after(change) == []


def test_accepts_another_file_and_names_a_removed_one() -> None:
    both = _contract()
    both.file.add(name="shop/v1/stock.proto", package="shop.v1", syntax="proto3")
    assert breaking_changes(_contract(), both) == []
    assert breaking_changes(both, _contract()) == ["shop/v1/stock.proto: file removed"]


def test_names_several_changes_at_once() -> None:
    current = _contract()
    current.file[0].service[0].method.pop()
    current.file[0].enum_type[0].value.pop()
    assert breaking_changes(_contract(), current) == [
        "shop.v1.State.STATE_PAID: enum value 1 removed or renamed",
        "shop.v1.Shop.Watch: rpc removed",
    ]


def test_the_released_contract_is_a_whole_one() -> None:
    released = read_released()
    services = [f"{file.package}.{service.name}" for file in released.file for service in file.service]
    assert services == ["kvservice.v1.KVCacheService"]
    assert not any(file.HasField("source_code_info") for file in released.file)


def test_stale_generated_code_is_named(tmp_path: Path) -> None:
    committed, regenerated = tmp_path / "committed", tmp_path / "regenerated"
    for folder in (committed, regenerated):
        (folder / "v1").mkdir(parents=True)
        (folder / "v1/same_pb2.py").write_text("same")
    (committed / "__init__.py").write_text("written by hand")
    assert stale_files(committed, regenerated) == []

    (committed / "v1/edited_pb2.py").write_text("edited")
    (regenerated / "v1/edited_pb2.py").write_text("generated")
    (regenerated / "v1/new_pb2.pyi").write_text("generated")
    (committed / "v1/old_pb2_grpc.py").write_text("left behind")
    assert stale_files(committed, regenerated) == [
        "v1/edited_pb2.py differs",
        "v1/new_pb2.pyi is missing",
        "v1/old_pb2_grpc.py has no source",
    ]
