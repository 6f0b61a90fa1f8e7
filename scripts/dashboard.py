"""The Grafana dashboard: rows of panels, each a title, a unit and the queries that it draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COLUMNS = 24
PICK = '{namespace=~"$namespace",node=~"$node",instance=~"$instance"}'


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `queries`: legend to PromQL; in PromQL, `{*}` or `{*,label="x"}` stands for the chosen daemons."""

    title: str
    unit: str
    queries: dict[str, str]
    about: str
    kind: str = "timeseries"
    width: int = 8
    height: int = 7
    is_stacked: bool = False


def _rate(series: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({series}[$__rate_interval]))"


def _quantile(quantile: float, series: str, by: str = "") -> str:
    grouped = f"{by}, le" if by else "le"
    return f"histogram_quantile({quantile}, sum by ({grouped}) (rate({series}[$__rate_interval])))"


_REQUESTS = "kvservice_block_requests_total"
_HITS = 'kvservice_block_requests_total{*,outcome!="miss"}'
_HIT_RATE = f"{_rate(_HITS)} / {_rate(_REQUESTS + '{*}')}"

_WINDOW_IN_DRAM = "sum(kvservice_prefetch_window_dram_blocks{*}) / (sum(kvservice_prefetch_window_blocks{*}) > 0)"
_GETS = 'kvservice_operation_duration_seconds_count{*,operation="get"}'
_GETS_FROM_NVME = 'kvservice_operation_duration_seconds_count{*,operation="get",tier="nvme"}'
_GET_FROM_NVME = f"{_rate(_GETS_FROM_NVME)} / {_rate(_GETS)}"


def _stat(title: str, unit: str, query: str, about: str) -> Panel:
    return Panel(title, unit, {title: query}, about, kind="stat", width=4, height=4)


ROWS: dict[str, list[Panel]] = {
    "Overview": [
        _stat("Hit rate", "percentunit", _HIT_RATE, "Blocks found of blocks asked for."),
        _stat("Blocks asked for", "reqps", _rate(_REQUESTS + "{*}"), "By Get, per second."),
        _stat("Tokens not prefilled", "short", _rate("kvservice_saved_tokens_total{*}"), "Estimate, per second."),
        _stat("Engines attached", "short", "sum(kvservice_instances{*})", "On all chosen nodes."),
        _stat("Tiers offline", "short", "count(kvservice_tier_online{*} == 0) or vector(0)", "Must be 0."),
        _stat("Daemons", "short", "count(kvservice_build_info{*})", "That were scraped."),
        Panel(
            "Block requests by outcome",
            "reqps",
            {"{{outcome}}": _rate(_REQUESTS + "{*}", "outcome")},
            "From DRAM, from NVMe, missed.",
            is_stacked=True,
        ),
        Panel(
            "Misses by reason",
            "reqps",
            {"{{reason}}": _rate('kvservice_block_requests_total{*,outcome="miss"}', "reason")},
            "not_held and prefix_missing are also what is new in every prompt; the others deserve a look.",
            is_stacked=True,
        ),
        Panel(
            "Get latency",
            "s",
            {
                "p50 {{tier}}": _quantile(
                    0.5, 'kvservice_operation_duration_seconds_bucket{*,operation="get"}', "tier"
                ),
                "p99 {{tier}}": _quantile(
                    0.99, 'kvservice_operation_duration_seconds_bucket{*,operation="get"}', "tier"
                ),
            },
            "Until the last block was handed out, by the slowest tier needed.",
        ),
    ],
    "Tiers": [
        Panel(
            "Tier in use",
            "percentunit",
            {
                "{{tier}} {{instance}}": "kvservice_tier_used_bytes{*} / kvservice_tier_capacity_bytes{*}",
            },
            "Memory that namespaces own. Full is normal; a cache fills up.",
        ),
        Panel(
            "Bytes between tiers",
            "Bps",
            {"{{direction}}": _rate("kvservice_transfer_bytes_total{*}", "direction")},
            "Write-behind and reads from NVMe.",
        ),
        Panel(
            "Device speed",
            "Bps",
            {
                "{{direction}}": _rate("kvservice_transfer_bytes_total{*}", "direction")
                + " / ("
                + _rate("kvservice_transfer_seconds_total{*}", "direction")
                + " > 0)"
            },
            "Bytes per second of transfer time: what one transfer achieves, not how many there are.",
        ),
        Panel(
            "Blocks leaving by reason",
            "reqps",
            {"{{reason}}": _rate("kvservice_block_drops_total{*}", "reason")},
            "capacity, quota and reclaimed are evictions; corrupt must stay 0.",
            is_stacked=True,
        ),
        Panel(
            "Idle time at eviction",
            "s",
            {
                "median": _quantile(0.5, "kvservice_evicted_block_idle_seconds_bucket{*}"),
                "a tenth below": _quantile(0.1, "kvservice_evicted_block_idle_seconds_bucket{*}"),
            },
            "Short means that the tiers are smaller than the working set.",
        ),
        Panel(
            "Leases, reservations, quarantine",
            "short",
            {
                "leases": "sum(kvservice_leases{*})",
                "reservations": "sum(kvservice_reservations{*})",
                "quarantined slots": "sum(kvservice_quarantined_slots{*})",
            },
            "Quarantine: slots of engines that hang or stopped.",
        ),
        Panel(
            "Trouble with bytes",
            "short",
            {
                "checksum failures": "sum(increase(kvservice_checksum_failures_total{*}[$__range]))",
                "not written to NVMe": "sum(increase(kvservice_write_behind_given_up_blocks_total{*}[$__range]))",
                "waiting for a checksum": "sum(kvservice_unchecksummed_blocks{*})",
            },
            "In the chosen time range.",
        ),
    ],
    "Scheduler-awareness": [
        Panel(
            "Waiting requests seen",
            "short",
            {
                "waiting": "sum(kvservice_queued_requests{*})",
                "fetched ahead": "sum(kvservice_prefetch_window_requests{*})",
                "protected from eviction": "sum(kvservice_eviction_window_requests{*})",
            },
            "None: engines tell nothing of their queues, and every read from NVMe is waited for.",
        ),
        Panel(
            "Window in DRAM",
            "percentunit",
            {"covered": _WINDOW_IN_DRAM},
            "Of the blocks that the next requests need. Empty while nobody waits.",
        ),
        Panel(
            "Blocks fetched ahead by outcome",
            "reqps",
            {"{{outcome}}": _rate("kvservice_prefetch_blocks_total{*}", "outcome")},
            "useful: in DRAM before a Get wanted it. wasted: left DRAM unused.",
        ),
        Panel(
            "Requests at their start",
            "reqps",
            {"{{blocks}}": _rate("kvservice_prefetch_request_starts_total{*}", "blocks")},
            "Where the blocks of a queued request were when it started.",
            is_stacked=True,
        ),
        Panel(
            "Fetched before the start by",
            "s",
            {
                "median": _quantile(0.5, "kvservice_prefetch_lead_seconds_bucket{*}"),
                "a tenth below": _quantile(0.1, "kvservice_prefetch_lead_seconds_bucket{*}"),
            },
            "Near zero: look further ahead. Very long: DRAM is held for nothing.",
        ),
        Panel(
            "Gets that waited for NVMe",
            "percentunit",
            {"share": _GET_FROM_NVME},
            "What look-ahead did not bring in time.",
        ),
        Panel(
            "Prefetch to arrival",
            "s",
            {
                "p50": _quantile(0.5, 'kvservice_operation_duration_seconds_bucket{*,operation="prefetch"}'),
                "p90": _quantile(0.9, 'kvservice_operation_duration_seconds_bucket{*,operation="prefetch"}'),
            },
            "From the submission of a transfer until it is in DRAM; it should be shorter than the queue.",
        ),
    ],
    "Engines": [
        Panel(
            "Attached",
            "short",
            {
                "instances": "sum(kvservice_instances{*})",
                "namespaces": "sum(kvservice_namespaces{*})",
                "conversations": "sum(kvservice_sessions{*})",
            },
            "Engine processes, their namespaces, the conversations remembered.",
        ),
        Panel(
            "Blocks offered by Put",
            "reqps",
            {"{{outcome}}": _rate("kvservice_block_puts_total{*}", "outcome")},
            "held: what engines would have saved twice.",
            is_stacked=True,
        ),
        Panel(
            "Calls by method",
            "reqps",
            {"{{method}}": _rate("kvservice_rpc_duration_seconds_count{*}", "method")},
            "All RPCs.",
        ),
        Panel(
            "RPC errors by code",
            "reqps",
            {
                "{{method}} {{code}}": _rate('kvservice_rpc_duration_seconds_count{*,code!="OK"}', "method, code")
                + " or vector(0)"
            },
            "Engines treat each as a miss.",
        ),
        Panel(
            "RPC latency, p99",
            "s",
            {"{{method}}": _quantile(0.99, "kvservice_rpc_duration_seconds_bucket{*}", "method")},
            "Time in the daemon; a stream until its first message.",
        ),
        Panel(
            "Put latency",
            "s",
            {
                "p50": _quantile(0.5, 'kvservice_operation_duration_seconds_bucket{*,operation="put"}'),
                "p99": _quantile(0.99, 'kvservice_operation_duration_seconds_bucket{*,operation="put"}'),
            },
            "From the reservation to the commit: mostly the engine's copy.",
        ),
    ],
    "Cost": [
        Panel(
            "Prefill saved",
            "s",
            {"GPU seconds": "sum(increase(kvservice_saved_prefill_gpu_seconds_total{*}[$__range]))"},
            "Estimate for the time range, at prefill_tokens_per_gpu_s.",
            kind="stat",
        ),
        Panel(
            "Money saved",
            "short",
            {"money": "sum(increase(kvservice_saved_money_total{*}[$__range]))"},
            "Estimate for the time range, at gpu_hour_price and in its currency; 0 while that is not set.",
            kind="stat",
        ),
        Panel(
            "GPUs' worth of prefill avoided",
            "short",
            {"GPUs": _rate("kvservice_saved_prefill_gpu_seconds_total{*}")},
            "GPU-seconds saved per second.",
        ),
    ],
    "Daemon": [
        Panel(
            "Memory",
            "bytes",
            {"{{instance}}": "kvservice_process_resident_memory_bytes{*}"},
            "Resident, the arena included as far as it is mapped.",
        ),
        Panel(
            "CPU",
            "short",
            {"{{instance}}": "rate(kvservice_process_cpu_seconds_total{*}[$__rate_interval])"},
            "Cores.",
        ),
        Panel(
            "Event loop lag",
            "s",
            {"{{instance}}": "kvservice_event_loop_lag_seconds{*}"},
            "A tenth of a second is normal.",
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    """The document that Grafana imports."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": top},
            }
        )
        top += 1
        left = line = 0
        for panel in row:
            if left + panel.width > COLUMNS:
                left, top, line = 0, top + line, 0
            panels.append(_panel(panel, len(panels) + 1, left, top))
            left, line = left + panel.width, max(line, panel.height)
        top += line
    return {
        "uid": "kvservice",
        "title": "kvservice",
        "description": "KV blocks of conversations: hits, tiers, look-ahead, engines, cost.",
        "tags": ["kvservice", "llm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "panels": panels,
    }


def _panel(panel: Panel, number: int, left: int, top: int) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {
            "drawStyle": "line",
            "fillOpacity": 20 if panel.is_stacked else 0,
            "showPoints": "never",
            "stacking": {"mode": "normal" if panel.is_stacked else "none", "group": "A"},
        }
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"h": panel.height, "w": panel.width, "x": left, "y": top},
        "fieldConfig": {"defaults": {"unit": panel.unit, "custom": custom}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + position),
                "datasource": {"type": "prometheus", "uid": "${datasource}"},
                "expr": query.replace("{*", PICK[:-1]),
                "legendFormat": legend,
                "range": True,
            }
            for position, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _variables() -> list[dict[str, Any]]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    chosen = {"text": "All", "value": "$__all"}
    narrowing = ""
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    ]
    for label in ("namespace", "node", "instance"):
        query = f"label_values(kvservice_build_info{{{narrowing}}}, {label})"
        variables.append(
            {
                "name": label,
                "label": label.capitalize(),
                "type": "query",
                "datasource": source,
                "query": query,
                "definition": query,
                "includeAll": True,
                "allValue": ".*",
                "multi": True,
                "refresh": 2,
                "sort": 1,
                "current": chosen,
            }
        )
        narrowing += f'{", " if narrowing else ""}{label}=~"${label}"'
    return variables
