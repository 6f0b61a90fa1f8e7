"""The command line says what is wrong and what to do next: for every finding, every wrong argument, and no daemon."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvservice import __version__
from kvservice.cli import COMMANDS, daemon, explain, flags, main, messages, panels, serve, words
from kvservice.cli.findings import tell
from kvservice.cli.rates import rates_between
from kvservice.config import KNOBS, Config, Kind
from kvservice_proto.v1 import kvservice_pb2 as pb

pytestmark = pytest.mark.unit

HASH = bytes(range(32))


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.startswith("KVSERVICE_") or variable == "XDG_RUNTIME_DIR":
            monkeypatch.delenv(variable)


# -------------------------------------------------------------------- commands


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from kvservice.cli import main; status = main(['--help']); "
        "print([name for name in ('grpc', 'numpy', 'rich', 'torch', 'uvloop') if name in sys.modules]); "
        "sys.exit(status)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert all(f"  {name}" in ran.stdout for name in COMMANDS)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_the_module_runs_as_the_command() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "kvservice", "--version"], capture_output=True, text=True, timeout=30, check=True
    )
    assert ran.stdout == f"kvservice {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["stat"], "'stat' is not a command; did you mean stats?"),
        (["xyzzy"], "is not a command: serve, demo, stats, top, explain, config"),
    ],
)
def test_an_unknown_command_suggests_one(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert says in capsys.readouterr().err


def test_no_command_prints_the_usage_as_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: kvservice COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["serve", "--dram-byte", "4GiB"], "unknown argument --dram-byte; did you mean --dram-bytes?"),
        (["serve", "--http-prot=1"], "did you mean --http-port?"),
        (["serve", "extra"], "unknown argument extra"),
        (["stats", "--jsn"], "did you mean --json?"),
        (["explain"], "the following arguments are required: HASH"),
        (["explain", "xyz"], "'xyz' is not hex"),
        (["explain", "00ff"], "2 bytes long; it must be 8 to 64 bytes"),
        (["explain", HASH.hex(), "--fingerprint", "00"], "1 bytes long; it must be 16 to 64 bytes"),
        (["top", "--interval", "0"], "0 is out of bounds: 0.1 to 3600 seconds"),
        (["top", "--interval", "soon"], "'soon' is not a number of seconds"),
        (["top", "--interval", "nan"], "nan is out of bounds"),
    ],
)
def test_wrong_arguments_are_named(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


# ---------------------------------------------------------------- configuration


def test_every_knob_has_a_flag_that_reaches_the_configuration() -> None:
    texts = {
        Kind.SIZE: "2GiB",
        Kind.INTEGER: "7",
        Kind.NUMBER: "0.5",
        Kind.BOOLEAN: "false",
        Kind.INTEGERS: "3,4",
        Kind.PAIRS: "uid:3=c",
        Kind.TEXT: "text",
    }
    argv: list[str] = []
    for knob in KNOBS.values():
        if knob.kind is not Kind.RULES:
            argv += [knob.flag, knob.choices[0] if knob.choices else texts[knob.kind]]
    parsed = vars(serve.parser().read(argv))
    assert {name for name in KNOBS if parsed.get(name) is not None} == set(KNOBS) - {"namespaces"}


def test_flags_win_and_negative_numbers_are_values() -> None:
    arguments = serve.parser().read(["--http-port", "-1", "--dram-bytes=64MiB", "--socket-dir", "relative"])
    config = flags.read_config(arguments)
    assert (config.http_port, config.dram_bytes) == (-1, 64 << 20)
    assert config.socket_dir == str(Path.cwd() / "relative")


def test_config_prints_what_serve_would_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSERVICE_DRAIN_S", "7")
    assert main(["config", "--dram-bytes", "8GiB"]) == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    monkeypatch.delenv("KVSERVICE_DRAIN_S")
    config = Config.load({}, {}, config_file=str(printed))
    assert (config.drain_s, config.dram_bytes) == (7.0, 8 << 30)


@pytest.mark.parametrize("command", ["config", "serve", "stats", "top", "explain"])
def test_a_wrong_configuration_is_a_message_and_status_1(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSERVICE_DRAM_BYTES", "4GB")
    arguments = [command, HASH.hex()] if command == "explain" else [command]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert f"kvservice {command}: dram_bytes (from KVSERVICE_DRAM_BYTES)" in captured.err
    assert captured.out == ""


def test_a_named_socket_directory_needs_no_valid_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSERVICE_DRAM_BYTES", "4GB")
    monkeypatch.setenv("KVSERVICE_CONFIG", "/does/not/exist")
    arguments = argparse.Namespace(socket_dir="/run/somewhere", config="")
    assert flags.daemon_config(arguments).socket_dir == "/run/somewhere"


def test_the_daemons_file_says_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "kvservice.toml"
    path.write_text(f'socket_dir = "{tmp_path}/sockets"', encoding="utf-8")
    arguments = argparse.Namespace(socket_dir="", config=str(path))
    assert flags.daemon_config(arguments).socket_dir == f"{tmp_path}/sockets"


# -------------------------------------------------------------------- no daemon


@pytest.fixture
def socket_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory whose path is short enough for a socket."""
    path = tmp_path_factory.getbasetemp() / "s"
    path.mkdir(exist_ok=True)
    yield path
    for name in daemon.SOCKETS:
        (path / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    "command", [["stats"], ["stats", "--json"], ["top"], ["top", "--once"], ["explain", HASH.hex()]]
)
def test_without_a_daemon_the_status_is_2_and_the_message_says_how_to_start_one(
    command: list[str], socket_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = f"{socket_dir}/missing"
    assert main([*command, "--socket-dir", missing]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(
        f"kvservice {command[0]}: no daemon answers at {missing} (socket_dir from --socket-dir)"
    )
    assert f"tried {missing}: no such file or directory" in captured.err
    assert f"kvservice serve --socket-dir {missing}" in captured.err
    assert "KVSERVICE_SOCKET_DIR" in captured.err


def test_what_is_in_the_directory_is_told_apart(socket_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--socket-dir", str(socket_dir)]) == 2
    assert "memory.sock: no such socket: no daemon was started" in capsys.readouterr().err
    for name in daemon.SOCKETS:
        with socket.socket(socket.AF_UNIX) as left_behind:
            left_behind.bind(str(socket_dir / name))
    assert main(["stats", "--socket-dir", str(socket_dir)]) == 2
    assert "memory.sock: nobody listens: the daemon died" in capsys.readouterr().err


def test_something_else_behind_the_sockets_is_no_daemon(socket_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listeners = [socket.socket(socket.AF_UNIX) for _ in daemon.SOCKETS]
    for listener, name in zip(listeners, daemon.SOCKETS, strict=True):
        listener.bind(str(socket_dir / name))
        listener.listen()
    try:
        # Answers nothing sensible: hangs up on whoever connects.
        listeners[1].shutdown(socket.SHUT_RDWR)
        assert main(["stats", "--socket-dir", str(socket_dir)]) == 2
    finally:
        for listener in listeners:
            listener.close()
    assert "no daemon answers at" in capsys.readouterr().err


def test_the_origin_of_the_directory_is_told(
    socket_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(socket_dir))
    assert main(["stats"]) == 2
    assert f"{socket_dir}/kvservice (socket_dir from XDG_RUNTIME_DIR)" in capsys.readouterr().err
    monkeypatch.setenv("KVSERVICE_SOCKET_DIR", f"{socket_dir}/other")
    assert main(["stats"]) == 2
    assert f"{socket_dir}/other (socket_dir from KVSERVICE_SOCKET_DIR)" in capsys.readouterr().err


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
    return pb.Explanation(label="llama", fingerprint=b"f" * 16, held=pb.HeldFinding(**{**facts, **changes}))  # type: ignore[arg-type]


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
    (dropped(pb.DROP_REASON_RECLAIMED), "its memory went to another namespace", "quota in [namespaces]"),
    (dropped(pb.DROP_REASON_QUOTA), "to keep its namespace within its quota", "Raise dram_quota_bytes"),
    (dropped(pb.DROP_REASON_FORGOTTEN), "asked to forget", "who calls forget"),
    (dropped(pb.DROP_REASON_EXPIRED), "time to live passed", "saving it again"),
    (dropped(pb.DROP_REASON_CORRUPT), "no longer matched their checksum", "kvservice_checksum_failures_total"),
    (dropped(pb.DROP_REASON_PREFIX_LOST), "a block before it in its chain left", "Explain the blocks before it"),
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


def stats_response(
    *, uptime_s: float = 3725.0, epoch: str = "e1", asked: int = 100, hits: int = 75
) -> pb.StatsResponse:
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
            pb.InstanceStats(instance_id=7, name="engine-1", process_id=4242, attached_s=61.0, leases=2)
        ],
    )


def rendered(what: object) -> str:
    console = Console(width=200, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_totals_show_tiers_namespaces_and_instances() -> None:
    text = rendered(panels.totals(stats_response()))
    assert "kvservice 0.1.0  serving  up 1h 2m" in text
    assert "1 instance, 2 leases, 0 reservations, 1 quarantined slot" in text
    (tier,) = (line for line in text.splitlines() if line.startswith("DRAM"))
    assert tier.split()[:7] == ["DRAM", "online", "1.0", "GiB", "4.0", "GiB", "25.0"]
    (namespace,) = (line for line in text.splitlines() if "llama" in line)
    assert "[bold]llama?[2J" in namespace, "a label is text, neither markup nor terminal commands"
    for shown in ("12,345", "1.0 GiB", "75.0 %", "none", "lru", "200", "50"):
        assert shown in namespace, shown
    (instance,) = (line for line in text.splitlines() if "engine-1" in line)
    assert instance.split()[:2] == ["7", "engine-1"]
    assert "4242" in instance


def test_an_empty_daemon_says_so() -> None:
    text = rendered(panels.totals(pb.StatsResponse(state="serving")))
    assert "no engine has attached" in text
    assert "no instance attached" in text


def test_rates_are_differences_by_the_daemons_own_clock() -> None:
    before, now = stats_response(uptime_s=10, asked=100, hits=75), stats_response(uptime_s=12, asked=200, hits=165)
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
        stats_response(uptime_s=1, epoch="e0"),
        stats_response(uptime_s=3725),
        stats_response(uptime_s=1, asked=101),
    ],
    ids=["the daemon restarted", "no time passed", "the namespace was made anew"],
)
def test_rates_that_would_be_wrong_are_left_out(before: pb.StatsResponse) -> None:
    now = stats_response()
    assert rates_between(before, now) == {}
    (line,) = (row for row in rendered(panels.activity(now, {})).splitlines() if "llama" in row)
    assert line.split().count("-") == 5


def test_messages_become_plain_objects_with_every_field() -> None:
    plain = messages.as_plain(stats_response())
    assert set(plain) == {field.name for field in pb.StatsResponse.DESCRIPTOR.fields}
    (namespace,) = plain["namespaces"]  # type: ignore[misc]
    assert namespace["fingerprint"] == "66" * 16
    assert namespace["nvme_hit_blocks"] == 0
    assert plain["tiers"] == [{"tier": "dram", "state": "online", "capacity_bytes": 4 << 30, "used_bytes": 1 << 30}]
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
