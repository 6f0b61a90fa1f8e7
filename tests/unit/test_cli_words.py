"""Each finding of the daemon is told in words with a next step, and its figures are shown as people read them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvservice.cli import explain, messages, panels, words
from kvservice.cli.findings import tell
from kvservice.cli.rates import rates_between
from kvservice_proto.v1 import kvservice_pb2 as pb

pytestmark = pytest.mark.unit

HASH = bytes(range(32))

# --------------------------------------------------------------------- findings


def held(**changes: object) -> pb.Explanation:
    facts: dict[str, object] = {
        "tiers": [pb.TIER_DRAM],
        "depth": 3,
        "children": 1,
        "idle_s": 75.0,
        "uses": 2,
        "holders": 1,
        "checksummed": True,
    }
    finding = pb.HeldFinding(**(facts | changes))  # type: ignore[arg-type]
    return pb.Explanation(label="llama", fingerprint=b"f" * 16, held=finding)


def dropped(reason: int) -> pb.Explanation:
    return pb.Explanation(dropped=pb.DroppedFinding(reason=reason, ago_s=12.0, idle_s=300.0))  # type: ignore[arg-type]


FINDINGS: list[tuple[pb.Explanation, str, str]] = [
    (held(), "A hit: held in DRAM.", "Nothing to do"),
    (held(tiers=[pb.TIER_DRAM, pb.TIER_NVME]), "A hit: held in DRAM and NVMe.", "Nothing to do"),
    (
        pb.Explanation(reserved=pb.ReservedFinding(age_s=2, written=False)),
        "reserved 2.0s ago by a writer that has not committed it",
        "Wait for the writer",
    ),
    (
        pb.Explanation(reserved=pb.ReservedFinding(age_s=2, written=True)),
        "written, but the block before it is not readable yet",
        "explain that one",
    ),
    (dropped(pb.DROP_REASON_CAPACITY), "evicted to make room for another block of its namespace", "raise dram_bytes"),
    (dropped(pb.DROP_REASON_RECLAIMED), "went to another namespace", "quota in [namespaces]"),
    (dropped(pb.DROP_REASON_QUOTA), "to keep its namespace within its quota", "Raise dram_quota_bytes"),
    (dropped(pb.DROP_REASON_FORGOTTEN), "asked to forget", "who calls forget"),
    (dropped(pb.DROP_REASON_EXPIRED), "time to live passed", "saving it again"),
    (dropped(pb.DROP_REASON_CORRUPT), "no longer matched their checksum", "kvservice_checksum_failures_total"),
    (dropped(pb.DROP_REASON_PREFIX_LOST), "a block before it in its chain left", "Explain the blocks before it"),
    (dropped(pb.DROP_REASON_SOURCE_LOST), "the block that had its bytes left", "raise dram_bytes"),
    (dropped(pb.DROP_REASON_ALIAS_LIMIT), "later truncations took its place", "aliases_per_session_max"),
    (dropped(pb.DROP_REASON_ABORTED), "reserved but never committed", "raise lease_s"),
    (
        pb.Explanation(namespace_mismatch=pb.NamespaceMismatch(held_under_labels=["a bf16", "b\x1b[2Jfp8"])),
        'held, but under another namespace: "a bf16", "b?[2Jfp8"',
        "Compare their settings",
    ),
    (
        pb.Explanation(not_remembered=pb.NotRemembered(history_blocks=65_536, horizon_s=7200)),
        "never stored since the daemon started, or it left too long ago",
        "explain_history_blocks",
    ),
    (
        pb.Explanation(tier_offline=pb.TierOffline(tier=pb.TIER_NVME, why="I/O error")),
        "held in NVMe, which is offline: I/O error",
        "Bring the tier back",
    ),
]


@pytest.mark.parametrize(("explanation", "summary", "next_step"), FINDINGS)
def test_each_finding_is_told_with_its_next_step(explanation: pb.Explanation, summary: str, next_step: str) -> None:
    told = tell(explanation)
    assert summary in told.summary
    assert next_step in told.next_step
    hits = explanation.WhichOneof("finding") == "held"
    assert told.summary.startswith("A hit" if hits else "A miss")


def test_no_finding_and_no_reason_of_the_contract_is_left_out() -> None:
    told = {explanation.WhichOneof("finding") for explanation, _, _ in FINDINGS}
    assert told == {field.name for field in pb.Explanation.DESCRIPTOR.oneofs_by_name["finding"].fields}
    reasons = {explanation.dropped.reason for explanation, _, _ in FINDINGS if explanation.HasField("dropped")}
    assert reasons == set(pb.DropReason.values()) - {pb.DROP_REASON_UNSPECIFIED}


def test_what_a_newer_daemon_finds_is_not_guessed_at() -> None:
    assert "Update this command" in tell(pb.Explanation()).next_step
    newer = pb.Explanation(dropped=pb.DroppedFinding.FromString(b"\x08\x63"))
    assert "dropped (unknown 99)" in tell(newer).summary
    assert "Update this command" in tell(newer).next_step


def test_the_details_of_a_hit_read_like_sentences() -> None:
    place, use, checksum = tell(held()).details
    assert place == "Place: 3 blocks before it in its chain; 1 block held right after it."
    assert use == "Use: handed out 2 times, last used 1m 15s ago; 1 lease on it now."
    assert checksum == "Checksum: made."
    place, use, checksum = tell(held(depth=0, children=0, uses=0, holders=0, checksummed=False)).details
    assert place == "Place: the first block of its chain; nothing held after it."
    assert use == "Use: never handed out, last used 1m 15s ago; 0 leases on it now."
    assert checksum.startswith("Checksum: not made yet")


@pytest.mark.parametrize(
    ("history_blocks", "horizon_s", "says"),
    [
        (0, 0.0, "remembers no dropped blocks"),
        (10, 0.0, "remembers the last 10 blocks that left; so far none has"),
        (10, 90.0, "remembers the last 10 blocks that left, 1m 30s back"),
    ],
)
def test_how_far_back_the_memory_goes_is_said(history_blocks: int, horizon_s: float, says: str) -> None:
    finding = pb.NotRemembered(history_blocks=history_blocks, horizon_s=horizon_s)
    (memory,) = tell(pb.Explanation(not_remembered=finding)).details
    assert says in memory


def test_explanations_are_printed_for_people_and_for_programs() -> None:
    both = [held(), dropped(pb.DROP_REASON_QUOTA)]
    text = explain.as_text(HASH, both)
    assert text.splitlines()[0] == f"block {HASH.hex()}"
    assert f'in namespace "llama" (fingerprint {"66" * 16})' in text
    assert "  Next: Raise dram_quota_bytes" in text
    answer = json.loads(explain.as_json(HASH, both))
    assert answer["hash"] == HASH.hex()
    first, second = answer["explanations"]
    assert (first["finding"], first["label"], first["fingerprint"]) == ("held", "llama", "66" * 16)
    assert first["held"]["tiers"] == ["dram"]
    assert second["dropped"] == {"reason": "quota", "ago_s": 12.0, "idle_s": 300.0}
    assert second["next_step"].startswith("Raise dram_quota_bytes")
    assert "held" not in second


# ------------------------------------------------------------ stats and top


def response(*, uptime_s: float = 3725.0, epoch: str = "e1", asked: int = 100, hits: int = 75) -> pb.StatsResponse:
    return pb.StatsResponse(
        daemon_version="0.1.0",
        daemon_epoch=epoch,
        uptime_s=uptime_s,
        state="serving",
        planes="shared-memory",
        instances=1,
        leases=2,
        quarantined_slots=1,
        tiers=[pb.TierStats(tier=pb.TIER_DRAM, state="online", capacity_bytes=4 << 30, used_bytes=1 << 30)],
        namespaces=[
            pb.NamespaceStats(
                label="[bold]llama\x1b[2J",
                fingerprint=b"f" * 16,
                tenant="uid:0",
                block_size_bytes=1 << 20,
                blocks=12_345,
                dram_bytes=1 << 30,
                sessions=3,
                requested_blocks=asked,
                dram_hit_blocks=hits,
                miss_blocks=asked - hits,
                committed_blocks=2 * asked,
                evicted_blocks=asked // 2,
                policy="lru",
            )
        ],
        attached_instances=[
            pb.InstanceStats(
                instance_id=7, name="engine-1", process_id=4242, attached_s=61.0, leases=2, plane="cuda-ipc"
            )
        ],
    )


def rendered(what: object) -> str:
    console = Console(width=200, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_totals_show_tiers_namespaces_and_instances() -> None:
    text = rendered(panels.totals(response()))
    assert "kvservice 0.1.0  serving  up 1h 2m" in text
    assert "1 instance, 2 leases, 0 reservations, 1 quarantined slot" in text
    (tier,) = (line for line in text.splitlines() if line.startswith("DRAM"))
    assert tier.split()[:7] == ["DRAM", "online", "1.0", "GiB", "4.0", "GiB", "25.0"]
    (namespace,) = (line for line in text.splitlines() if "llama" in line)
    assert "[bold]llama?[2J" in namespace, "a label is text, neither markup nor terminal commands"
    for shown in ("12,345", "1.0 GiB", "75.0 %", "none", "lru", "200", "50"):
        assert shown in namespace, shown
    (instance,) = (line for line in text.splitlines() if "engine-1" in line)
    assert "cuda-ipc" in instance
    assert instance.split()[:2] == ["7", "engine-1"]
    assert "4242" in instance


def test_each_nvme_directory_has_a_line_of_its_own() -> None:
    stats = response()
    disk = pb.DiskStats(
        directory="/nvme/[bold]a",
        state="read-only",
        capacity_bytes=100 << 30,
        used_bytes=25 << 30,
        read_bytes=7 << 30,
        admitted_bytes=10 << 30,
        written_bytes=11 << 30,
        write_amplification=1.1,
        writes_per_day=0.5,
        writes_per_day_lately=2.25,
        checksum_failures=3,
        transfers=[
            pb.TransferDepth(priority="get", waiting=4, running=2),
            pb.TransferDepth(priority="prefetch"),
            pb.TransferDepth(priority="write", waiting=1_200),
        ],
    )
    stats.tiers.add(tier=pb.TIER_NVME, state="read-only: full", capacity_bytes=100 << 30, disks=[disk])
    for panel in (panels.totals(stats), panels.activity(stats, {})):
        (line,) = (line for line in rendered(panel).splitlines() if "/nvme/" in line)
        for shown in (
            "/nvme/[bold]a",
            "read-only",
            "25.0 %",
            "7.0 GiB",
            "10.0 GiB",
            "11.0 GiB",
            "1.10",
            "0.50",
            "2.25",
            " 3 ",
        ):
            assert shown in line, (shown, line)
        assert "4 get, 1,200 write" in line
        assert "2 get" in line


def test_queues_show_what_waits_and_how_much_of_it_is_in_dram() -> None:
    stats = response()
    assert "Queue of" not in rendered(panels.totals(stats)), "nobody tells of one"
    stats.attached_instances[0].queued_requests = 1_017
    stats.namespaces[0].queue.CopyFrom(
        pb.QueueStats(
            requests=1_017, prefetch_window_requests=31, eviction_window_requests=1_002, needed_blocks=2_000,
            dram_blocks=1_500,
        )
    )  # fmt: skip
    for panel in (panels.totals(stats), panels.activity(stats, {})):
        lines = rendered(panel).splitlines()
        queue = lines[next(at for at, line in enumerate(lines) if line.startswith("Queue of")) + 2]
        assert queue.split() == ["[bold]llama?[2J", "uid:0", "1,017", "31", "1,002", "2,000", "75.0", "%"]
        (instance,) = (line for line in lines if "engine-1" in line)
        assert "1,017" in instance


def test_an_empty_daemon_says_so() -> None:
    text = rendered(panels.totals(pb.StatsResponse(state="serving")))
    assert "no engine has attached" in text
    assert "no instance attached" in text


def test_rates_are_differences_by_the_daemons_own_clock() -> None:
    before, now = response(uptime_s=10, asked=100, hits=75), response(uptime_s=12, asked=200, hits=165)
    (rates,) = rates_between(before, now).values()
    assert (rates.requested_per_s, rates.hits_per_s) == (50, 45)
    assert (rates.committed_per_s, rates.committed_bytes_per_s, rates.evicted_per_s) == (100, 100 << 20, 25)
    (line,) = (row for row in rendered(panels.activity(now, rates_between(before, now))).splitlines() if "llama" in row)
    assert "90.0 %" in line, "hit rate of the interval"
    assert "82.5 %" in line, "hit rate since the start"
    assert "100 MiB" in line


@pytest.mark.parametrize(
    "before",
    [
        response(uptime_s=1, epoch="e0"),
        response(uptime_s=3725),
        response(uptime_s=1, asked=101),
    ],
    ids=["the daemon restarted", "no time passed", "the namespace was made anew"],
)
def test_rates_that_would_be_wrong_are_left_out(before: pb.StatsResponse) -> None:
    now = response()
    assert rates_between(before, now) == {}
    (line,) = (row for row in rendered(panels.activity(now, {})).splitlines() if "llama" in row)
    assert line.split().count("-") == 5


def test_messages_become_plain_objects_with_every_field() -> None:
    plain = messages.as_plain(response())
    assert set(plain) == {field.name for field in pb.StatsResponse.DESCRIPTOR.fields}
    namespaces = plain["namespaces"]
    assert isinstance(namespaces, list)
    assert namespaces[0]["fingerprint"] == "66" * 16
    assert namespaces[0]["nvme_hit_blocks"] == 0
    assert plain["tiers"] == [
        {"tier": "dram", "state": "online", "capacity_bytes": 4 << 30, "used_bytes": 1 << 30, "disks": []}
    ]
    assert json.loads(json.dumps(plain)) == plain


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.size(0), "0 B"),
        (words.size(1023), "1023 B"),
        (words.size(1536), "1.5 KiB"),
        (words.size(150 << 20), "150 MiB"),
        (words.size(5 << 50), "5120 TiB"),
        (words.duration(0.0123), "12ms"),
        (words.duration(59.94), "59.9s"),
        (words.duration(61), "1m 1s"),
        (words.duration(3725), "1h 2m"),
        (words.duration(90_000), "1d 1h"),
        (words.count(1, "block"), "1 block"),
        (words.count(12_345, "block"), "12,345 blocks"),
        (words.share(1, 0), "-"),
        (words.share(1, 3), "33.3 %"),
        (words.foreign("a\x1b[2J\nb\x9b"), "a?[2J?b?"),
    ],
)
def test_quantities_are_said_as_people_say_them(said: str, expected: str) -> None:
    assert said == expected


@given(st.text())
def test_foreign_text_cannot_command_the_terminal(text: str) -> None:
    assert words.foreign(text).isprintable()
    assert len(words.foreign(text)) == len(text)
