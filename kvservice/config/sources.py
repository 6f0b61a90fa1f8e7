"""sources: where values come from and which one wins: defaults < TOML file < environment < flags."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvservice.config.fields import Knob, nearest_name
from kvservice.config.values import (
    RULE_SETTINGS,
    Kind,
    MalformedError,
    NamespaceRule,
    format_size,
    from_text,
    from_toml,
    refusal,
)
from kvservice.errors import ConfigError

SEGMENTS_AT_LEAST = 8
"""The default segment size leaves the arena at least so many."""

DEFAULT = "default"
PREFIX = "KVSERVICE_"
CONFIG_VARIABLE = "KVSERVICE_CONFIG"
FILE_BYTES_MAX = 1 << 20

# Kubernetes puts variables for every Service of the namespace into every container. A Service called "kvservice" or
# "kvservice-something" makes these; they are nobody's configuration.
_SERVICE_LINK = re.compile(
    r"KVSERVICE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://\S+")


@dataclass(slots=True)
class Found:
    """Values that some source gave, and which one; knobs that nobody set are absent."""

    values: dict[str, object] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def put(self, name: str, value: object, origin: str) -> None:
        """Record that `origin` set the knob `name`, over what an earlier source said."""
        self.values[name] = value
        self.origins[name] = origin


def gather(
    knobs: Mapping[str, Knob], flags: Mapping[str, str], environ: Mapping[str, str], *, config_file: str
) -> Found:
    """Read all sources, later ones over earlier ones. Reads the file, blocking. Raises ConfigError."""
    found = Found()
    if environ.get("XDG_RUNTIME_DIR"):
        found.put("socket_dir", f"{environ['XDG_RUNTIME_DIR']}/kvservice", "XDG_RUNTIME_DIR")
    path = config_file or environ.get(CONFIG_VARIABLE, "")
    gaps = _read_file(knobs, path, found) if path else {}
    _read_environment(knobs, environ, found)
    for name, text in flags.items():
        if name not in knobs:
            raise ConfigError(f"{name} is not a knob{nearest_name(name, knobs)}")
        found.put(name, _text_value(knobs[name], text, knobs[name].flag), knobs[name].flag)
    _fill(knobs, found, gaps)
    return found


def _read_environment(knobs: Mapping[str, Knob], environ: Mapping[str, str], found: Found) -> None:
    variables = {knob.variable: knob for knob in knobs.values()}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable == CONFIG_VARIABLE:
            continue
        if variable in variables:
            knob = variables[variable]
            found.put(knob.name, _text_value(knob, text, variable), variable)
        elif _SERVICE_LINK.fullmatch(variable) is None and _SERVICE_LINK_VALUE.fullmatch(text) is None:
            # Compared without the prefix, which would make everything look alike.
            hint = nearest_name(variable.removeprefix(PREFIX).lower(), knobs)
            raise ConfigError(f"environment variable {variable} is not a knob{hint}; unset it or correct its name")


def _text_value(knob: Knob, text: str, origin: str) -> object:
    try:
        return from_text(knob.kind, text)
    except MalformedError as refused:
        link = _SERVICE_LINK_VALUE.fullmatch(text) and origin == knob.variable
        hint = (
            "; Kubernetes sets it for a Service of that name: set enableServiceLinks: false in the pod" if link else ""
        )
        raise refusal(knob.name, f"{refused}{hint}", origin) from None


def _read_file(knobs: Mapping[str, Knob], path: str, found: Found) -> dict[str, dict[str, object]]:
    """Put the file's values into `found`; return the namespace rules as written, gaps and all."""
    origin = f"file {path}"
    rules: dict[str, dict[str, object]] = {}
    for name, value in _parse_file(path).items():
        if name not in knobs:
            raise ConfigError(f"{path}: {name} is not a knob{nearest_name(name, knobs)}")
        try:
            if knobs[name].kind is Kind.RULES:
                rules = _rules(knobs, value)
                found.put(name, {}, origin)
            else:
                found.put(name, from_toml(knobs[name].kind, value), origin)
        except MalformedError as refused:
            raise refusal(name, str(refused), origin) from None
    return rules


def _parse_file(path: str) -> dict[str, object]:
    try:
        with Path(path).open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    if len(content) > FILE_BYTES_MAX:
        raise ConfigError(f"the configuration file {path} is larger than {format_size(FILE_BYTES_MAX)}")
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"the configuration file {path} is not UTF-8: byte {error.start}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the configuration file {path} is not TOML: {error}") from error


def _rules(knobs: Mapping[str, Knob], value: object) -> dict[str, dict[str, object]]:
    kinds = {name: knobs[name].kind for name in RULE_SETTINGS}
    if not isinstance(value, dict):
        raise MalformedError('expected tables, as in [namespaces."llama*"]')
    rules: dict[str, dict[str, object]] = {}
    for glob, settings in value.items():
        if not isinstance(settings, dict):
            raise MalformedError(f'{glob} is not a table; write [namespaces."{glob}"] above its settings')
        rules[glob] = {}
        for name, setting in settings.items():
            if name not in kinds:
                raise MalformedError(f'namespaces."{glob}" knows no {name}{nearest_name(name, kinds)}')
            try:
                rules[glob][name] = from_toml(kinds[name], setting)
            except MalformedError as refused:
                raise MalformedError(f'namespaces."{glob}".{name}: {refused}') from None
    return rules


def _fill(knobs: Mapping[str, Knob], found: Found, rules: Mapping[str, dict[str, object]]) -> None:
    """What depends on other knobs: gaps of namespace rules, and the segment size on a small arena."""

    def effective(name: str) -> object:
        return found.values.get(name, knobs[name].default)

    if rules:
        defaults = {name: effective(name) for name in RULE_SETTINGS}
        found.values["namespaces"] = {
            glob: NamespaceRule(**{**defaults, **rule})  # type: ignore[arg-type]  # read by kind in `_rules`
            for glob, rule in rules.items()
        }
    dram_bytes, segment_bytes = effective("dram_bytes"), effective("dram_segment_bytes")
    assert isinstance(dram_bytes, int)
    assert isinstance(segment_bytes, int)
    # Memory moves between namespaces by segments: a few large ones could not be shared.
    fair_bytes = int(max(knobs["dram_segment_bytes"].at_least, dram_bytes // SEGMENTS_AT_LEAST))
    if "dram_segment_bytes" not in found.values and fair_bytes < segment_bytes:
        found.put("dram_segment_bytes", fair_bytes, f"{DEFAULT}, lowered to an eighth of dram_bytes")
