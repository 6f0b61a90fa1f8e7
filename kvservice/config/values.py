"""values: how one configuration value is written, read and refused: sizes, seconds, lists, booleans, pairs.

Covers one value at a time and knows no knob by name. Does not cover which source wins (`sources`) nor what values
mean together (`knobs`). TOML gives typed values, the environment and flags give text; both end as the same objects.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum

from kvservice.errors import ConfigError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

SIZE_UNITS: Mapping[str, int] = {"TiB": TIB, "GiB": GIB, "MiB": MIB, "KiB": KIB}
"""Binary units, largest first."""

_SIZE_TEXT = re.compile(r"(?P<number>\d[\d_]*(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)", re.ASCII)
_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_SIZE_DIGITS_MAX = 32
"""A longer number is a mistake; the bound keeps the arithmetic on hostile text small."""


def refusal(name: str, problem: str, origin: str) -> ConfigError:
    """The error for one knob: its name, where its value came from, and what is wrong with it."""
    return ConfigError(f"{name} (from {origin}): {problem}" if origin else f"{name}: {problem}")


class MalformedError(ValueError):
    """One value cannot be read as its kind; `sources` turns it into a ConfigError that says which knob and where."""


class Kind(Enum):
    """How a knob's value is written; the value is what the documentation calls it."""

    TEXT = "text"
    BOOLEAN = "true or false"
    INTEGER = "integer"
    SIZE = "bytes"
    NUMBER = "number"
    INTEGERS = "list of integers"
    PAIRS = "table of text"
    RULES = "table of tables"


@dataclass(frozen=True, slots=True)
class NamespaceRule:
    """What the namespaces whose label matches one glob get instead of the daemon-wide defaults.

    Each setting is called like the knob that it replaces, which says what it means.
    """

    dram_quota_bytes: int = 0
    nvme_quota_bytes: int = 0
    ttl_s: float = 0.0
    policy: str = "lru"


RULE_SETTINGS = tuple(setting.name for setting in fields(NamespaceRule))
"""The knobs that a rule may replace."""

_TYPE_NAMES: Mapping[type, str] = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "an array",
    dict: "a table",
}


def parse_size(text: str) -> int:
    """Bytes from "4GiB", "1.5 MiB", "512" or "65_536". Raises MalformedError with the accepted forms."""
    match = _SIZE_TEXT.fullmatch(text.strip())
    if match is None or len(match["number"]) > _SIZE_DIGITS_MAX:
        raise MalformedError(f"{shown(text)} is not a size; write bytes, or a number with KiB, MiB, GiB or TiB")
    unit = match["unit"].lower()
    factors = {"": 1, "b": 1, **{name.lower(): factor for name, factor in SIZE_UNITS.items()}}
    if unit not in factors:
        binary = {f"{letter}{tail}": f"{letter.upper()}iB" for letter in "kmgt" for tail in ("", "b", "i")}
        hint = f"; write {match['number']}{binary[unit]} (powers of 1024)" if unit in binary else ""
        raise MalformedError(f"{match['unit']} is not a unit this daemon reads: KiB, MiB, GiB, TiB or none{hint}")
    whole, _, fraction = match["number"].replace("_", "").partition(".")
    numerator = int(whole + fraction) * factors[unit]
    denominator: int = 10 ** len(fraction)
    size_bytes, rest = divmod(numerator, denominator)
    if rest:
        raise MalformedError(f"{shown(text)} is not a whole number of bytes")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """The shortest text that `parse_size` reads back exactly: 4294967296 is "4GiB", 4097 is "4097"."""
    for unit, factor in SIZE_UNITS.items():
        if size_bytes >= factor and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return str(size_bytes)


def from_text(kind: Kind, text: str) -> object:
    """A value of `kind` from the text of a flag or an environment variable. Raises MalformedError."""
    stripped = text.strip()
    match kind:
        case Kind.TEXT:
            return text
        case Kind.BOOLEAN:
            if stripped.lower() in _TRUE | _FALSE:
                return stripped.lower() in _TRUE
            raise MalformedError(f"{shown(text)} is not a boolean; write true or false")
        case Kind.INTEGER:
            return _integer(stripped)
        case Kind.SIZE:
            return parse_size(text)
        case Kind.NUMBER:
            return _number(stripped)
        case Kind.INTEGERS:
            return tuple(_integer(part.strip()) for part in stripped.split(",") if part.strip())
        case Kind.PAIRS:
            return dict(_pair(part) for part in stripped.split(",") if part.strip())
        case Kind.RULES:
            raise MalformedError('belongs in the TOML file, as a table [namespaces."LABEL-GLOB"]')


def from_toml(kind: Kind, value: object) -> object:
    """A value of `kind` from what the TOML parser returned (RULES are read by `sources`). Raises MalformedError."""
    match kind:
        case Kind.TEXT if isinstance(value, str):
            return value
        case Kind.BOOLEAN if isinstance(value, bool):
            return value
        case Kind.INTEGER if _is_integer(value):
            return value
        case Kind.SIZE if _is_integer(value):
            return value
        case Kind.SIZE if isinstance(value, str):
            return parse_size(value)
        case Kind.NUMBER if isinstance(value, float) or _is_integer(value):
            return _number(str(value))
        case Kind.INTEGERS if isinstance(value, list) and all(map(_is_integer, value)):
            return tuple(value)
        case Kind.PAIRS if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
            return dict(value)
    raise MalformedError(f"expected {kind.value}, found {_TYPE_NAMES.get(type(value), type(value).__name__)}")


def literal(kind: Kind, value: object) -> str:
    """One value that is not a table, as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if kind is Kind.SIZE and isinstance(value, int):
        text = format_size(value)
        return text if text.isdigit() else quoted(text)
    return quoted(value) if isinstance(value, str) else repr(value)


def quoted(text: str) -> str:
    """A TOML basic string. JSON's escapes are TOML's too, except that TOML wants DEL escaped as well."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def shown(value: object) -> str:
    """`value` as an error message shows it: quoted, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(text: str) -> int:
    if re.fullmatch(r"[+-]?\d[\d_]*", text, re.ASCII) is None or len(text) > _SIZE_DIGITS_MAX or text.endswith("_"):
        raise MalformedError(f"{shown(text)} is not an integer")
    return int(text.replace("_", ""))


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise MalformedError(f"{shown(text)} is not a number; write it like 2.5, without a unit") from None
    if not math.isfinite(number):
        raise MalformedError(f"{shown(text)} is not a finite number")
    return number


def _pair(part: str) -> tuple[str, str]:
    identity, equals, name = part.partition("=")
    if not equals:
        raise MalformedError(f"{shown(part.strip())} is not a pair; write identity=tenant, as in uid:1000=team-a")
    return identity.strip(), name.strip()
