"""fields: what is known about a knob besides its value: unit, default, bounds, consequence."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from kvservice.config.values import Kind, format_size, literal, refusal, shown

Value = TypeVar("Value")

_METADATA = "kvservice knob"


@dataclass(frozen=True, slots=True)
class Knob:
    """One knob of the configuration.

    Attributes:
        kind: how it is written.
        section: where the documentation lists it.
        about: what it does and what a wrong value costs, in full sentences.
        at_least: lower bound, included, in the knob's unit.
        at_most: upper bound, included.
        choices: the only accepted values, where there are any.
    """

    name: str
    kind: Kind
    default: object
    section: str
    about: str
    at_least: float
    at_most: float
    choices: tuple[str, ...]

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return f"KVSERVICE_{self.name.upper()}"

    @property
    def flag(self) -> str:
        """Its command line flag."""
        return f"--{self.name.replace('_', '-')}"

    def in_words(self, value: object) -> str:
        """`value` as messages and documentation show it: sizes with a binary unit."""
        return format_size(int(value)) if self.kind is Kind.SIZE and isinstance(value, (int, float)) else f"{value}"

    def bounds(self) -> str:
        """The accepted values in words; empty where everything of the kind is."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        bounded = self.kind in (Kind.INTEGER, Kind.SIZE, Kind.NUMBER, Kind.INTEGERS)
        parts = [
            f"{word} {self.in_words(bound)}"
            for word, bound in (("at least", self.at_least), ("at most", self.at_most))
            if bounded and abs(bound) != float("inf")
        ]
        return ", ".join(parts)

    def facts(self) -> str:
        """Unit, bounds and default on one line."""
        is_duration = self.kind is Kind.NUMBER and self.name.endswith(("_s", "_s_max"))
        is_table = self.kind in (Kind.PAIRS, Kind.RULES)
        unit = "seconds" if is_duration else self.kind.value
        default = "empty" if is_table else literal(self.kind, self.default)
        return "; ".join(filter(None, (unit, self.bounds(), f"default {default}")))

    def check(self, value: object, origin: str) -> None:
        """Raises ConfigError where `value` is out of bounds or not among the choices."""
        if self.choices and value not in self.choices:
            nearest = nearest_name(str(value), self.choices)
            raise refusal(self.name, f"{shown(value)} is not {self.bounds()}{nearest}", origin)
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, (int, float)) and not self.at_least <= number <= self.at_most:
                raise refusal(self.name, f"{self.in_words(number)} is out of bounds: {self.bounds()}", origin)


def knob(
    default: Value,
    section: str,
    about: str,
    *,
    at_least: float = 0,
    at_most: float = float("inf"),
    choices: tuple[str, ...] = (),
) -> Value:
    """A dataclass field that is a knob. Numbers are at least 0 unless `at_least` says otherwise."""
    facts = {"section": section, "about": about, "at_least": at_least, "at_most": at_most, "choices": choices}
    return dataclasses.field(default=default, metadata={_METADATA: facts})


def table_knob(section: str, about: str) -> Mapping[str, Value]:
    """A dataclass field that is a knob with a table of text or of rules for value, empty by default."""
    facts = {"section": section, "about": about, "at_least": 0, "at_most": float("inf"), "choices": ()}
    return dataclasses.field(default_factory=dict, metadata={_METADATA: facts})


def knobs_of(config_class: type) -> dict[str, Knob]:
    """The knobs of a dataclass, by name, in the order in which they are written there."""
    found = {}
    for field in dataclasses.fields(config_class):
        if _METADATA in field.metadata:
            default = field.default if field.default is not dataclasses.MISSING else {}
            found[field.name] = Knob(
                name=field.name, kind=_kind(field.name, default), default=default, **field.metadata[_METADATA]
            )
    return found


def nearest_name(name: str, known: Iterable[str]) -> str:
    """A question that names the known name nearest to `name`; empty where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _kind(name: str, default: object) -> Kind:
    """Names end with their unit, so that the name and the default's type say how a value is written."""
    if isinstance(default, dict):
        return Kind.RULES if name == "namespaces" else Kind.PAIRS
    if isinstance(default, bool):
        return Kind.BOOLEAN
    if isinstance(default, int):
        return Kind.SIZE if "_bytes" in name else Kind.INTEGER
    kinds: dict[type, Kind] = {float: Kind.NUMBER, tuple: Kind.INTEGERS, str: Kind.TEXT}
    return kinds[type(default)]
