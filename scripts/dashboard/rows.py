"""What the dashboard shows: rows of panels, each a title, a unit and the queries that it draws."""

from __future__ import annotations

from dataclasses import dataclass


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


GPU_ROW = "GPUs"
"""Without a GPU these panels draw zeros, or nothing."""
_GPU_BYTES = 'kvservice_transfer_bytes_total{*,direction=~".*gpu.*"}'
_GPU_SECONDS = 'kvservice_transfer_seconds_total{*,direction=~".*gpu.*"}'


def _written(what: str) -> str:
    return f'sum by (disk) (increase(kvservice_disk_bytes_total{{*,what="{what}"}}[$__range]))'


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
            "Write-behind, reads from NVMe, and copies to and from GPUs.",
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
            "Transfers at the disks",
            "short",
            {"{{priority}} {{is}}": "sum by (priority, is) (kvservice_disk_transfers{*})"},
            "Queue depth: a Get that waits behind others, or write-behind that a disk cannot keep up with.",
            is_stacked=True,
        ),
        Panel(
            "Write amplification",
            "none",
            {"{{disk}}": f"{_written('written')} / ({_written('admitted')} > 0)"},
            "Bytes written over bytes of blocks stored, in the chosen time range. Empty while nothing is stored.",
        ),
        Panel(
            "Drive writes per day",
            "none",
            {"{{disk}}": 'kvservice_disk_drive_writes_per_day{*,window="hour"}'},
            "Over the last hour: what the disk's endurance is rated in.",
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
    GPU_ROW: [
        Panel(
            "Bytes between DRAM and GPUs",
            "Bps",
            {"{{direction}}": _rate(_GPU_BYTES, "direction")},
            "Of the device plane. 0: engines copy themselves; the log's `ready` line says why.",
        ),
        Panel(
            "Loads and saves on the device plane",
            "reqps",
            {"{{direction}}": _rate("kvservice_gpu_copies_total{*}", "direction")},
            "Each is one copy of all blocks of a request.",
        ),
        Panel(
            "Speed of a load or save",
            "Bps",
            {"{{direction}}": f"{_rate(_GPU_BYTES, 'direction')} / ({_rate(_GPU_SECONDS, 'direction')} > 0)"},
            "Its bytes over the time from asking until they are there.",
        ),
        Panel(
            "Copies that failed",
            "short",
            {"{{direction}}": "sum by (direction) (increase(kvservice_gpu_copy_failures_total{*}[$__range]))"},
            "In the chosen time range; each is a miss for its engine. Must be 0.",
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
