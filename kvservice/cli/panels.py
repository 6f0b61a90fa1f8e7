"""panels: the daemon's stats as tables for a terminal; `stats` prints totals once, `top` rates again and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvservice.cli.messages import enum_name
from kvservice.cli.rates import NamespaceKey, NamespaceRates, key_of
from kvservice.cli.words import count, duration, foreign, share, size
from kvservice_proto.v1 import kvservice_pb2 as pb


def totals(stats: pb.StatsResponse) -> Group:
    """What the daemon holds, and what happened since it started."""
    return _report(stats, _namespace_totals(stats))


def activity(stats: pb.StatsResponse, rates: Mapping[NamespaceKey, NamespaceRates]) -> Group:
    """What the daemon holds, and what happens now; "-" where `rates` has nothing for a namespace."""
    return _report(stats, _namespace_rates(stats, rates))


def _report(stats: pb.StatsResponse, namespaces: Table) -> Group:
    return _stacked(_headline(stats), _tiers(stats), *_disks(stats), namespaces, *_queues(stats), _instances(stats))


def _stacked(*parts: RenderableType) -> Group:
    """With an empty line between."""
    return Group(parts[0], *(line for part in parts[1:] for line in ("", part)))


def _headline(stats: pb.StatsResponse) -> Text:
    held = (
        count(stats.instances, "instance"),
        count(stats.leases, "lease"),
        count(stats.reservations, "reservation"),
        count(stats.quarantined_slots, "quarantined slot"),
    )
    return Text.assemble(
        (f"kvservice {foreign(stats.daemon_version)}  ", "bold"),
        (foreign(stats.state), "bold green" if stats.state == "serving" else "bold yellow"),
        f"  up {duration(stats.uptime_s)}\n{', '.join(held)}\n",
        (f"planes: {foreign(stats.planes)}", "dim"),
    )


def _tiers(stats: pb.StatsResponse) -> Table:
    table = _table(("Tier", "State"), ("Used", "Capacity", "Full"))
    table.add_column("")
    for tier in stats.tiers:
        table.add_row(
            enum_name(pb.Tier.DESCRIPTOR, tier.tier).upper().replace("NVME", "NVMe"),
            Text(foreign(tier.state), style="" if tier.state == "online" else "bold red"),
            size(tier.used_bytes),
            size(tier.capacity_bytes),
            share(tier.used_bytes, tier.capacity_bytes),
            ProgressBar(total=max(tier.capacity_bytes, 1), completed=tier.used_bytes, width=24),
        )
    return table


def _disks(stats: pb.StatsResponse) -> list[Table]:
    """One line for each NVMe directory; nothing without the tier."""
    disks = [disk for tier in stats.tiers for disk in tier.disks]
    if not disks:
        return []
    columns = ("Full", "Read", "Stored", "Written", "per byte", "Drive writes/day", "now", "Bad", "Waiting", "Running")
    table = _table(("Directory", "State"), columns)
    for disk in disks:
        table.add_row(
            Text(foreign(disk.directory), overflow="ellipsis"),
            Text(foreign(disk.state), style="" if disk.state == "online" else "bold red"),
            share(disk.used_bytes, disk.capacity_bytes),
            size(disk.read_bytes),
            size(disk.admitted_bytes),
            size(disk.written_bytes),
            f"{disk.write_amplification:.2f}" if disk.admitted_bytes else "-",
            f"{disk.writes_per_day:.2f}",
            f"{disk.writes_per_day_lately:.2f}",
            f"{disk.checksum_failures:,}",
            _depths(disk, lambda depth: depth.waiting),
            _depths(disk, lambda depth: depth.running),
        )
    return [table]


def _depths(disk: pb.DiskStats, count_of: Callable[[pb.TransferDepth], int]) -> str:
    """Transfers by priority, those with any: "3 get, 12 write"."""
    some = [f"{count_of(depth):,} {foreign(depth.priority)}" for depth in disk.transfers if count_of(depth)]
    return ", ".join(some) or "-"


def _namespace_totals(stats: pb.StatsResponse) -> Table:
    table = _table(
        ("Namespace", "Tenant", "Policy"),
        (
            "Block",
            "Blocks",
            "Memory",
            "Quota",
            "NVMe",
            "Quota",
            "Sessions",
            "Asked",
            "Hit",
            "of it NVMe",
            "Saved",
            "Evicted",
        ),
    )
    for namespace in stats.namespaces:
        hits = namespace.dram_hit_blocks + namespace.nvme_hit_blocks
        table.add_row(
            *_name_cells(namespace),
            foreign(namespace.policy),
            size(namespace.block_size_bytes),
            f"{namespace.blocks:,}",
            size(namespace.dram_bytes),
            size(namespace.quota_bytes) if namespace.quota_bytes else "none",
            size(namespace.nvme_bytes),
            size(namespace.nvme_quota_bytes) if namespace.nvme_quota_bytes else "none",
            f"{namespace.sessions:,}",
            f"{namespace.requested_blocks:,}",
            share(hits, namespace.requested_blocks),
            share(namespace.nvme_hit_blocks, hits),
            f"{namespace.committed_blocks:,}",
            f"{namespace.evicted_blocks:,}",
        )
    return _or_none(table, len(stats.namespaces), "no namespace yet: no engine has attached")


def _namespace_rates(stats: pb.StatsResponse, rates: Mapping[NamespaceKey, NamespaceRates]) -> Table:
    table = _table(
        ("Namespace", "Tenant"),
        ("Blocks", "Memory", "Sessions", "Asked/s", "Hit now", "Hit ever", "Saved/s", "Bytes saved/s", "Evicted/s"),
    )
    for namespace in stats.namespaces:
        now = rates.get(key_of(namespace))
        ever = share(namespace.dram_hit_blocks + namespace.nvme_hit_blocks, namespace.requested_blocks)
        table.add_row(
            *_name_cells(namespace),
            f"{namespace.blocks:,}",
            size(namespace.dram_bytes),
            f"{namespace.sessions:,}",
            f"{now.requested_per_s:,.0f}" if now else "-",
            share(now.hits_per_s, now.requested_per_s) if now else "-",
            ever,
            f"{now.committed_per_s:,.0f}" if now else "-",
            size(now.committed_bytes_per_s) if now else "-",
            f"{now.evicted_per_s:,.0f}" if now else "-",
        )
    return _or_none(table, len(stats.namespaces), "no namespace yet: no engine has attached")


def _queues(stats: pb.StatsResponse) -> list[Table]:
    """What waits and how much of it is in DRAM already; none where no engine tells of its queue."""
    telling = [namespace for namespace in stats.namespaces if namespace.HasField("queue")]
    if not telling:
        return []
    table = _table(("Queue of", "Tenant"), ("Waiting", "Fetched ahead", "Kept", "Blocks needed", "In DRAM"))
    for namespace in telling:
        queue = namespace.queue
        table.add_row(
            *_name_cells(namespace),
            f"{queue.requests:,}",
            f"{queue.prefetch_window_requests:,}",
            f"{queue.eviction_window_requests:,}",
            f"{queue.needed_blocks:,}",
            share(queue.dram_blocks, queue.needed_blocks),
        )
    return [table]


def _instances(stats: pb.StatsResponse) -> Table:
    table = _table(
        ("Instance", "Tenant", "Plane"), ("Process", "Attached", "Queued", "Leases", "Reservations", "Quarantined")
    )
    for instance in stats.attached_instances:
        table.add_row(
            Text(f"{instance.instance_id} {foreign(instance.name)}"),
            Text(foreign(instance.tenant)),
            Text(foreign(instance.plane)),
            f"{instance.process_id}",
            duration(instance.attached_s),
            f"{instance.queued_requests:,}",
            f"{instance.leases:,}",
            f"{instance.reservations:,}",
            f"{instance.quarantined_slots:,}",
        )
    return _or_none(table, len(stats.attached_instances), "no instance attached")


def _name_cells(namespace: pb.NamespaceStats) -> tuple[Text, Text]:
    # Text, so that brackets in a label are not taken for markup.
    label = foreign(namespace.label) or f"fingerprint {namespace.fingerprint.hex()[:12]}"
    return Text(label, overflow="ellipsis"), Text(foreign(namespace.tenant))


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _or_none(table: Table, rows: int, otherwise: str) -> Table:
    if rows == 0:
        table.add_row(Text(otherwise, style="dim"))
    return table
