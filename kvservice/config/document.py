"""document: the configuration in writing: as a TOML file with comments, and as the reference page."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from kvservice.config.fields import Knob
from kvservice.config.values import RULE_SETTINGS, Kind, NamespaceRule, literal, quoted

_TABLES = (Kind.PAIRS, Kind.RULES)


def as_toml(knobs: Mapping[str, Knob], values: Mapping[str, object], origins: Mapping[str, str]) -> str:
    """`values` as TOML, each with its help, bounds, default and origin as comments. Tables come last, as TOML wants."""
    lines = ["# kvservice: the effective configuration."]
    section = ""
    # Stable: knobs keep their order, tables move behind everything else.
    for knob in sorted(knobs.values(), key=lambda knob: knob.kind in _TABLES):
        if knob.section != section and knob.kind not in _TABLES:
            section = knob.section
            lines += ["", f"# ---- {section}"]
        lines.append("")
        lines += textwrap.wrap(knob.about, width=110, initial_indent="# ", subsequent_indent="# ")
        lines.append(f"# {knob.facts()}{_origin(knob, origins)}")
        lines += _assignment(knobs, knob, values[knob.name])
    return "\n".join(lines) + "\n"


def as_markdown(knobs: Mapping[str, Knob]) -> str:
    """The reference page: every knob with unit, default, bounds and consequence, by section."""
    lines = [
        "# Configuration reference",
        "",
        "Generated from `kvservice/config/knobs.py` by `scripts/generate_config_doc.py`; edit there.",
        "",
        "Each knob is a key of the TOML file, a variable `KVSERVICE_<NAME>` and a flag `--<name>` of",
        "`kvservice serve`; flags win over variables, variables over the file, the file over the defaults.",
        'Sizes are bytes, or a number with KiB, MiB, GiB or TiB (`"4GiB"`). Durations are seconds.',
        "Lists are arrays in TOML and comma-separated elsewhere.",
        "[OPERATIONS.md](OPERATIONS.md) says more about the sources.",
    ]
    section = ""
    for knob in knobs.values():
        if knob.section != section:
            section = knob.section
            lines += ["", f"## {section}"]
        lines += ["", f"### `{knob.name}`", "", f"*{knob.facts()}*", ""]
        lines += textwrap.wrap(knob.about, width=120)
        if knob.kind is Kind.RULES:
            rule = NamespaceRule(dram_quota_bytes=2 << 30, nvme_quota_bytes=1 << 40, ttl_s=86_400.0)
            lines += ["", "```toml", *_rule(knobs, "llama-3-8b*", rule), "```"]
        elif knob.kind is Kind.PAIRS:
            example = "KVSERVICE_TENANTS=uid:1000=team-a,cn:ops=operations"
            lines += ["", "```toml", "[tenants]", '"uid:1000" = "team-a"', '"cn:ops" = "operations"', "```", ""]
            lines.append(f"As text: `{example}`.")
    return "\n".join(lines) + "\n"


def _origin(knob: Knob, origins: Mapping[str, str]) -> str:
    return f"; from {origins[knob.name]}" if knob.name in origins else ""


def _assignment(knobs: Mapping[str, Knob], knob: Knob, value: object) -> list[str]:
    if knob.kind is Kind.PAIRS and isinstance(value, Mapping):
        return ["[tenants]", *(f"{quoted(identity)} = {quoted(tenant)}" for identity, tenant in value.items())]
    if knob.kind is Kind.RULES and isinstance(value, Mapping):
        return [line for glob, rule in value.items() for line in _rule(knobs, glob, rule)]
    return [f"{knob.name} = {literal(knob.kind, value)}"]


def _rule(knobs: Mapping[str, Knob], glob: str, rule: NamespaceRule) -> list[str]:
    settings = [f"{name} = {literal(knobs[name].kind, getattr(rule, name))}" for name in RULE_SETTINGS]
    return [f"[namespaces.{quoted(glob)}]", *settings]
