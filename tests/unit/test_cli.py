"""The command line says what is wrong and what to do next: for every wrong argument, and where no daemon answers."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvservice import __version__
from kvservice.cli import COMMANDS, daemon, flags, main, serve
from kvservice.config import KNOBS, Config, Kind
from kvservice_client import default_socket_dir

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
        (["xyzzy"], "is not a command: serve, demo, stats, top, explain, check, inspect, simulate, config"),
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


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_something_else_behind_the_socket_is_no_daemon(
    answer: bytes, socket_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_dir / "memory.sock"))
        listener.listen()

        def answer_and_hang_up() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(65_536)
                peer.sendall(answer)

        stranger = threading.Thread(target=answer_and_hang_up)
        stranger.start()
        assert main(["stats", "--socket-dir", str(socket_dir)]) == 2
        stranger.join(10)
    assert "memory.sock: something listens" in capsys.readouterr().err


def test_the_origin_of_the_directory_is_told(
    socket_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(socket_dir))
    assert main(["stats"]) == 2
    assert f"{socket_dir}/kvservice (socket_dir from XDG_RUNTIME_DIR)" in capsys.readouterr().err
    monkeypatch.setenv("KVSERVICE_SOCKET_DIR", f"{socket_dir}/other")
    assert main(["stats"]) == 2
    assert f"{socket_dir}/other (socket_dir from KVSERVICE_SOCKET_DIR)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"XDG_RUNTIME_DIR": "/run/user/7"},
        {"XDG_RUNTIME_DIR": ""},
        {"KVSERVICE_SOCKET_DIR": "/srv/kv"},
        {"KVSERVICE_SOCKET_DIR": "/srv/kv", "XDG_RUNTIME_DIR": "/run/user/7"},
    ],
)
def test_daemon_and_client_look_in_the_same_directory(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    assert Config.load({}, os.environ).socket_dir == default_socket_dir()
