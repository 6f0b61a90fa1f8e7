"""Write docs/metrics.md from the series that a daemon has. A test compares the two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prometheus_client.metrics_core import Metric

from kvservice.blocks import Tier
from kvservice.config import Config
from kvservice.server import Daemon
from kvservice.tiers import Depth, DiskUsage
from kvservice.transfers import Priority
from kvservice_proto.v1 import kvservice_pb2 as pb

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"

_HEAD = """# Metrics

Generated from `kvservice/metrics/` by `scripts/generate_metrics_doc.py`; edit there.

`GET /metrics` on the HTTP port, in Prometheus' text format. Counters count since the daemon started. Every label takes
its values from a short list: no series carries a name that a client chose, a hash, a session or a tenant.

| series | type | labels | meaning |
|---|---|---|---|
"""

_OPEN_LISTS = {
    "disk": "one of `nvme_dirs`",
    "method": "an RPC of the contract",
    "code": "a gRPC status code",
    "task": "a background task",
    "version": "",
    "python": "",
}
"""Labels whose values are not spelled out."""

_CLOSED_LISTS = {"tier": [tier.value for tier in Tier]}
"""Labels of which a daemon that has just started may not show every value."""


def page() -> str:
    """The page as it should be."""
    return _HEAD + "".join(f"{_row(family)}\n" for family in sorted(families(), key=lambda family: family.name))


def families() -> list[Metric]:
    """Every family of a daemon's registry, with the label values that it has from the start."""
    daemon = Daemon(Config(socket_dir="/run/kvservice", http_port=-1))
    try:
        metrics = daemon.metrics
        metrics.watch(lambda: replace(daemon.snapshot(), disks=[_a_disk()]))
        metrics.background_task("upkeep").set(1)
        for method in pb.DESCRIPTOR.services_by_name["KVCacheService"].methods_by_name:
            metrics.rpc(method)
        return list(metrics.registry.collect())
    finally:
        daemon.store.close()


def _a_disk() -> DiskUsage:
    """One directory, so that its labels are known."""
    depths = {priority.name.lower(): Depth(0, 0) for priority in Priority}
    return DiskUsage("/nvme", "online", "", 0, 0, 0, 0, 0.0, 0, 0, 0.0, 0, 0.0, 0.0, depths)


def exposed_name(family: Metric) -> str:
    """The name as it is scraped: a counter's ends in _total."""
    return f"{family.name}_total" if family.type == "counter" else family.name


def _row(family: Metric) -> str:
    values: dict[str, list[str]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            if label != "le" and value not in values.setdefault(label, []):
                values[label].append(value)
    labels = "; ".join(_described(label, found) for label, found in values.items())
    about = family.documentation.replace("|", "\\|")
    return f"| `{exposed_name(family)}` | {family.type} | {labels} | {about} |"


def _described(label: str, found: list[str]) -> str:
    if label in _OPEN_LISTS:
        return f"`{label}`" + (f": {_OPEN_LISTS[label]}" if _OPEN_LISTS[label] else "")
    known = list(dict.fromkeys([*_CLOSED_LISTS.get(label, []), *found]))
    return f"`{label}`: " + ", ".join(value or '""' for value in known)


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
