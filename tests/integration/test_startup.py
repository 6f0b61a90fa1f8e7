"""A daemon that cannot start says in one line what to change, and disturbs nothing that runs already."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.blocks import namespace
from tests.connections import control_socket_path, memory_socket_path
from tests.daemons import MIB, SMALL, DaemonProcess, environment, serve_command
from tests.integration.conftest import MakeConnection, MakeDaemon, MakeEngine
from tests.waiting import DEADLINE_S, eventually

pytestmark = pytest.mark.integration


def fails_to_start(socket_dir: Path | str, **knobs: object) -> str:
    """Start a daemon that must not come up; what it says."""
    ran = subprocess.run(
        serve_command(socket_dir, SMALL | knobs),
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        env=environment(),
        check=False,
    )
    assert ran.returncode == 1, ran
    assert "Traceback" not in ran.stderr
    assert '"ready"' not in ran.stderr
    last = ran.stderr.splitlines()[-1]
    assert last.startswith("kvservice serve: "), ran.stderr
    return last


def test_a_directory_that_cannot_be_written(short_path: Path) -> None:
    if os.geteuid() == 0:
        closed = Path("/proc")  # not even root makes directories there
    else:
        closed = short_path / "closed"
        closed.mkdir(mode=0o500)
    said = fails_to_start(closed / "daemon")
    assert f"cannot use socket_dir {closed}/daemon" in said
    assert "choose one that this user may write" in said


def test_a_file_in_the_directorys_place(short_path: Path) -> None:
    (short_path / "file").write_text("mine")
    for path in (short_path / "file", short_path / "file" / "below"):
        assert f"cannot use socket_dir {path}" in fails_to_start(path)
    assert (short_path / "file").read_text() == "mine"


@pytest.mark.usefixtures("needs_root")
def test_a_directory_of_another_user(short_path: Path) -> None:
    theirs = short_path / "theirs"
    theirs.mkdir(mode=0o777)
    os.chown(theirs, 54_321, 54_321)
    said = fails_to_start(theirs)
    assert "belongs to uid 54321, this daemon is uid 0" in said
    assert not list(theirs.iterdir())
    assert theirs.stat().st_uid == 54_321


def test_a_link_in_the_directorys_place_is_followed_to_a_directory_of_ours_only(
    short_path: Path, make_daemon: MakeDaemon, make_engine: MakeEngine
) -> None:
    (short_path / "real").mkdir()
    (short_path / "link").symlink_to("real")
    daemon = make_daemon("link")
    assert (short_path / "real" / "control.sock").is_socket()
    assert make_engine(daemon.socket_dir).do("save", name="a", blocks=1)["saved"] == 1


def test_a_limit_of_open_files_too_low_for_anything(short_path: Path) -> None:
    command = serve_command(short_path / "daemon", SMALL)
    ran = subprocess.run(
        ["/bin/sh", "-c", 'ulimit -n 32 && exec "$0" "$@"', *command],
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
        env=environment(),
        check=False,
    )
    assert ran.returncode == 1
    assert "this process may open 32 files and needs 64 at least; raise the limit (ulimit -n" in ran.stderr
    assert not list(short_path.iterdir())


def test_closed_standard_streams_do_not_become_files_of_the_disk(short_path: Path, make_engine: MakeEngine) -> None:
    directory = short_path / "daemon"
    knobs = SMALL | {"nvme_dirs": short_path / "nvme", "nvme_bytes": 64 * MIB}
    command = ["/bin/sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *serve_command(directory, knobs)]
    with subprocess.Popen(command, env=environment()) as running:
        try:
            eventually(lambda: (directory / "control.sock").exists() or running.poll() is not None)
            assert make_engine(str(directory)).do("save", name="a", blocks=1)["saved"] == 1
            assert {os.readlink(f"/proc/{running.pid}/fd/{number}") for number in range(3)} == {os.devnull}
            running.terminate()
            assert running.wait(DEADLINE_S) == 0
        finally:
            running.kill()


def test_more_memory_than_there_is_is_warned_of(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(dram_bytes=1 << 50)
    assert daemon.event("dram_exceeds_memory")["memory_bytes"] < 1 << 50


def test_a_path_too_long_for_a_socket(short_path: Path) -> None:
    said = fails_to_start(short_path / ("x" * 100))
    assert "socket_dir" in said
    assert "shorten it" in said
    assert not list(short_path.iterdir())


def test_a_group_that_does_not_exist(short_path: Path) -> None:
    assert "'no-such-group' is not a group" in fails_to_start(short_path / "daemon", socket_group="no-such-group")


def test_a_second_daemon_leaves_the_first_alone(
    short_path: Path, make_daemon: MakeDaemon, make_engine: MakeEngine
) -> None:
    daemon = make_daemon()
    engine = make_engine(daemon.socket_dir)
    engine.do("save", name="a", blocks=3)
    for _ in range(2):
        assert f"another daemon serves {daemon.socket_dir}" in fails_to_start(daemon.socket_dir)
    # Also by another name.
    (short_path / "alias").symlink_to(daemon.socket_dir)
    assert "another daemon serves" in fails_to_start(short_path / "alias")
    assert engine.do("load", name="a", blocks=3) == {"blocks": 3, "reason": "ok", "wrong": 0}
    assert make_engine(daemon.socket_dir).do("load", name="a", blocks=3)["blocks"] == 3
    assert not daemon.errors


def test_what_a_killed_daemon_left_behind_is_in_nobodys_way(make_daemon: MakeDaemon, make_engine: MakeEngine) -> None:
    daemon = make_daemon()
    daemon.kill()
    assert os.path.exists(control_socket_path(daemon.socket_dir))
    assert os.path.exists(memory_socket_path(daemon.socket_dir))
    daemon.restart()
    assert make_engine(daemon.socket_dir).do("save", name="a", blocks=1)["saved"] == 1
    assert daemon.stop() == 0
    assert not os.path.exists(control_socket_path(daemon.socket_dir))
    assert not os.path.exists(memory_socket_path(daemon.socket_dir))


def test_a_directory_in_a_sockets_place(short_path: Path) -> None:
    (short_path / "daemon" / "control.sock" / "mine").mkdir(parents=True)
    assert f"cannot remove {short_path}/daemon/control.sock" in fails_to_start(short_path / "daemon")
    assert (short_path / "daemon" / "control.sock" / "mine").is_dir()


def test_a_daemon_whose_directory_is_gone_leaves_the_next_one_alone(
    short_path: Path, make_daemon: MakeDaemon, make_engine: MakeEngine
) -> None:
    first = make_daemon()
    shutil.rmtree(first.socket_dir)
    second = make_daemon()
    assert first.stop() == 0
    assert make_engine(second.socket_dir).do("save", name="a", blocks=1)["saved"] == 1
    assert second.get("/readyz") == (200, "ok\n")
    assert second.stop() == 0
    assert os.listdir(second.socket_dir) == ["daemon.lock"]


def test_a_port_in_use_leaves_nothing_behind(short_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = fails_to_start(short_path / "daemon", http_port=port)
    assert f"cannot listen for HTTP on 127.0.0.1:{port}" in said
    assert sorted(path.name for path in (short_path / "daemon").iterdir()) == ["daemon.lock"]


def test_a_wrong_knob_names_itself(short_path: Path) -> None:
    assert "dram_bytes" in fails_to_start(short_path / "daemon", dram_bytes="lots")
    assert "allowed_uids" in fails_to_start(short_path / "daemon", allowed_uids="root")
    assert "low_watermark" in fails_to_start(short_path / "daemon", low_watermark="0.99")
    assert "is named twice" in fails_to_start(short_path / "daemon", nvme_dirs=f"{short_path}/n:{short_path}/./n")
    assert not list(short_path.iterdir())


def test_environment_and_flags_make_the_daemon(
    short_path: Path, make_connection: MakeConnection, make_engine: MakeEngine
) -> None:
    file = short_path / "kvservice.toml"
    file.write_text(f'[tenants]\n"uid:{os.getuid()}" = "team"\n')
    environ = {"KVSERVICE_CONFIG": str(file), "KVSERVICE_LEASE_S": "7"}
    with DaemonProcess(short_path / "daemon", environ=environ) as daemon:
        connection = make_connection(daemon.socket_dir, namespace())
        make_engine(daemon.socket_dir).do("save", name="a", blocks=1)
        assert make_engine(daemon.socket_dir).do("stats")["tenants"] == ["team"]
        response = connection.put([bytes(32)])
        assert response.lease_ms == 7000
        connection.close()
        eventually(lambda: "kvservice_reservations 0.0" in daemon.get("/metrics")[1])
