"""The commands against a real daemon: what they print is what it holds, and top outlives a restart."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from queue import Queue

import pytest

import kvservice_client as kv
from tests.waiting import DEADLINE_S

pytestmark = pytest.mark.integration

BLOCK_BYTES = 64 * 1024
ARENA_BYTES = 16 * BLOCK_BYTES
COMMAND = (sys.executable, "-m", "kvservice")
# Whoever runs the tests may have a configuration of their own.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("KVSERVICE_")}


@dataclass
class Daemon:
    """A daemon process that said that it is ready."""

    process: subprocess.Popen[str]
    socket_dir: str
    ready: dict[str, object]
    lines: Queue[str | None]

    @property
    def url(self) -> str:
        return f"http://{self.ready['http_address']}"

    def terminate(self) -> tuple[int, list[dict[str, object]]]:
        """SIGTERM; the exit status, and the log since it was ready."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(DEADLINE_S)
        return status, [json.loads(line) for line in iter(lambda: self.lines.get(timeout=DEADLINE_S), None)]


@contextmanager
def daemon(socket_dir: Path, *flags: str) -> Iterator[Daemon]:
    argv = [*COMMAND, "serve", "--socket-dir", str(socket_dir), "--http-port", "0", "--dram-bytes", str(ARENA_BYTES)]
    process = subprocess.Popen([*argv, *flags], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stderr is not None
    lines: Queue[str | None] = Queue()

    def read(stream: Iterator[str]) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, args=(process.stderr,))
    reader.start()
    try:
        yield Daemon(process, str(socket_dir), _ready(lines), lines)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(DEADLINE_S)
        process.stderr.close()


def _ready(lines: Queue[str | None]) -> dict[str, object]:
    seen = []
    while (line := lines.get(timeout=DEADLINE_S)) is not None:
        seen.append(line)
        event: dict[str, object] = json.loads(line)
        if event["event"] == "ready":
            return event
    raise AssertionError(f"the daemon ended before it was ready: {''.join(seen)}")


@pytest.fixture
def socket_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kv", numbered=True) / "s"


@pytest.fixture
def running(socket_dir: Path) -> Iterator[Daemon]:
    with daemon(socket_dir) as started:
        yield started


def run(*argv: str, socket_dir: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *argv, "--socket-dir", socket_dir],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=ENVIRONMENT,
    )


def namespace(label: str) -> kv.Namespace:
    return kv.Namespace(
        fingerprint=sha256(label.encode()).digest(),
        label=label,
        block_size_bytes=BLOCK_BYTES,
        tokens_per_block=16,
        hash_size_bytes=32,
    )


def chain(name: str, blocks: int) -> list[bytes]:
    return [sha256(f"{name} {position}".encode()).digest() for position in range(blocks)]


def save(client: kv.Client, hashes: list[bytes]) -> None:
    done = client.save(hashes, bytearray(len(hashes) * BLOCK_BYTES))
    assert done.saved == len(hashes), done


@pytest.fixture
def engine(running: Daemon) -> Iterator[kv.Client]:
    with kv.attach(namespace("tiny-llama f32"), socket_dir=running.socket_dir, instance_name="engine-1") as client:
        assert client.attached
        yield client


def test_stats_show_what_an_engine_did(running: Daemon, engine: kv.Client) -> None:
    hashes = chain("a", 4)
    save(engine, hashes)
    loaded = engine.load([*hashes, *chain("b", 2)], bytearray(6 * BLOCK_BYTES))
    assert loaded.blocks == 4
    stats = json.loads(run("stats", "--json", socket_dir=running.socket_dir).stdout)
    assert (stats["state"], stats["instances"]) == ("serving", 1)
    (held,) = stats["namespaces"]
    assert (held["label"], held["blocks"], held["committed_blocks"]) == ("tiny-llama f32", 4, 4)
    assert held["fingerprint"] == sha256(b"tiny-llama f32").hexdigest()
    assert (held["requested_blocks"], held["dram_hit_blocks"], held["miss_blocks"]) == (6, 4, 2)
    (instance,) = stats["attached_instances"]
    assert (instance["name"], instance["process_id"]) == ("engine-1", os.getpid())
    text = run("stats", socket_dir=running.socket_dir)
    assert (text.returncode, text.stderr) == (0, "")
    assert "engine-1" in text.stdout
    (line,) = (row for row in text.stdout.splitlines() if "tiny-llama f32" in row)
    assert "66.7 %" in line


def test_explain_tells_a_hit_an_evicted_and_a_never_stored_block(running: Daemon, engine: kv.Client) -> None:
    first, second = chain("first", 10), chain("second", 10)
    save(engine, first)
    held = run("explain", first[3].hex(), socket_dir=running.socket_dir)
    assert held.returncode == 0
    assert "A hit: held in DRAM." in held.stdout
    assert "3 blocks before it in its chain; 1 block held right after it" in held.stdout
    assert 'in namespace "tiny-llama f32"' in held.stdout
    save(engine, second)  # both do not fit
    evicted = run("explain", first[-1].hex(), socket_dir=running.socket_dir)
    assert "A miss: evicted to make room for another block of its namespace" in evicted.stdout
    assert "Next: " in evicted.stdout
    never = run("explain", chain("never", 1)[0].hex(), socket_dir=running.socket_dir)
    assert "A miss: never stored since the daemon started" in never.stdout


def test_explain_as_json_and_for_one_namespace(socket_dir: Path) -> None:
    hashes, other = chain("a", 2), namespace("tiny-llama bf16")
    room_for_two = ("--dram-bytes", "4MiB", "--dram-segment-bytes", "1MiB", "--dram-grow-ahead-bytes", "0")
    with (
        daemon(socket_dir, *room_for_two) as started,
        kv.attach(namespace("tiny-llama f32"), socket_dir=started.socket_dir) as first,
        kv.attach(other, socket_dir=started.socket_dir) as second,
    ):
        assert second.attached
        save(first, hashes)
        asked = ("explain", hashes[1].hex(), "--json", "--fingerprint", other.fingerprint.hex())
        answer = json.loads(run(*asked, socket_dir=started.socket_dir).stdout)
    (explanation,) = answer["explanations"]
    assert explanation["finding"] == "namespace_mismatch"
    assert explanation["namespace_mismatch"] == {"held_under_labels": ["tiny-llama f32"]}
    assert 'under another namespace: "tiny-llama f32"' in explanation["summary"]


def test_explain_tells_what_was_forgotten(running: Daemon, engine: kv.Client) -> None:
    hashes = chain("a", 2)
    save(engine, hashes)
    engine.forget_namespace()
    assert "asked to forget" in run("explain", hashes[0].hex(), socket_dir=running.socket_dir).stdout


def test_top_without_a_terminal_is_one_frame_with_rates(running: Daemon, engine: kv.Client) -> None:
    save(engine, chain("a", 3))
    ran = run("top", "--interval", "0.2", socket_dir=running.socket_dir)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "\x1b" not in ran.stdout
    (line,) = (row for row in ran.stdout.splitlines() if "tiny-llama f32" in row)
    assert line.split().count("0") >= 3, "nothing was asked for, saved or evicted in that time"
    assert "Asked/s" in ran.stdout


class Terminal:
    """A pseudo-terminal with `kvservice top` in it."""

    def __init__(self, socket_dir: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 180, 0, 0))
        self.settings_before = termios.tcgetattr(theirs)
        environment = {**ENVIRONMENT, "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            [*COMMAND, "top", "--interval", "0.1", "--socket-dir", socket_dir],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
        )
        self._theirs = theirs
        self.shown = ""

    def press(self, key: str) -> None:
        os.write(self._ours, key.encode())

    def wait_for(self, condition: Callable[[str], object], what: str) -> None:
        """Read what is shown until `condition` holds for what came since the last wait."""
        deadline_s = time.monotonic() + DEADLINE_S
        new = ""
        while not condition(new):
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"never saw {what}; the last was {new[-2000:]!r}"
            if select.select([self._ours], [], [], left_s)[0]:
                new += os.read(self._ours, 65_536).decode(errors="replace")
        self.shown += new

    def settings(self) -> object:
        return termios.tcgetattr(self._theirs)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)


@contextmanager
def top(socket_dir: str) -> Iterator[Terminal]:
    terminal = Terminal(socket_dir)
    try:
        yield terminal
    finally:
        terminal.close()


@pytest.mark.parametrize("key", ["q", "Q", signal.SIGINT, signal.SIGTERM])
def test_top_ends_by_a_key_or_a_signal_and_leaves_the_terminal_as_it_was(
    running: Daemon, engine: kv.Client, key: str | signal.Signals
) -> None:
    assert engine.attached
    with top(running.socket_dir) as terminal:
        terminal.wait_for(lambda shown: shown.count("tiny-llama f32") >= 3, "three frames")
        assert "\x1b[?1049h" in terminal.shown, "the alternate screen, so that the shell's history stays"
        assert terminal.settings() != terminal.settings_before
        terminal.press("x")
        terminal.wait_for(lambda shown: "tiny-llama f32" in shown, "another frame after a key without a meaning")
        assert terminal.process.poll() is None
        if isinstance(key, signal.Signals):
            terminal.process.send_signal(key)  # the terminal is not its controlling one here
        else:
            terminal.press(key)
        terminal.wait_for(lambda shown: "\x1b[?1049l" in shown, "the end of the alternate screen")
        assert terminal.process.wait(DEADLINE_S) == 0
        assert terminal.settings() == terminal.settings_before


def test_top_outlives_the_daemon_and_shows_the_next_one(socket_dir: Path) -> None:
    with daemon(socket_dir) as first, top(first.socket_dir) as terminal:
        terminal.wait_for(lambda shown: "serving" in shown, "a frame")
        first.process.kill()
        first.process.wait()
        terminal.wait_for(lambda shown: "Trying again" in shown, "that the daemon is gone")
        with daemon(socket_dir):
            terminal.wait_for(
                lambda shown: re.search(r"serving.*up \d", shown.rpartition("Trying again")[2], re.DOTALL),
                "a frame of the new daemon",
            )
            terminal.press("q")
            terminal.wait_for(lambda shown: "\x1b[?1049l" in shown, "the end")
            assert terminal.process.wait(DEADLINE_S) == 0


def test_a_uid_that_is_not_allowed_is_told_what_to_change(socket_dir: Path) -> None:
    somebody_else = os.getuid() + 4242
    with daemon(socket_dir, "--allowed-uids", str(somebody_else)) as started:
        ran = run("stats", socket_dir=started.socket_dir)
    assert ran.returncode == 1
    assert f"does not serve uid {os.getuid()}" in ran.stderr
    assert "--allowed-uids" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_second_daemon_in_the_same_directory_says_so_and_leaves_the_first_alone(running: Daemon) -> None:
    second = subprocess.run(
        [*COMMAND, "serve", "--socket-dir", running.socket_dir, "--http-port", "-1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=ENVIRONMENT,
    )
    assert second.returncode == 1
    assert "another daemon serves" in second.stderr
    assert "Traceback" not in second.stderr
    assert json.loads(run("stats", "--json", socket_dir=running.socket_dir).stdout)["state"] == "serving"


def test_health_and_metrics_follow_the_daemon_to_its_end(running: Daemon, engine: kv.Client) -> None:
    save(engine, chain("a", 3))

    def page(path: str) -> str:
        with urllib.request.urlopen(f"{running.url}{path}", timeout=10) as response:
            body: bytes = response.read()
            return body.decode()

    assert page("/livez") == page("/readyz") == "ok\n"
    metrics = page("/metrics")
    assert "kvservice_block_commits_total 3.0" in metrics
    assert "kvservice_blocks 3.0" in metrics
    assert 'kvservice_rpc_duration_seconds_count{code="OK",method="Commit"} 1.0' in metrics
    assert 'kvservice_background_task_up{task="upkeep"} 1.0' in metrics
    engine.close()
    status, log = running.terminate()
    assert status == 0
    assert [line["event"] for line in log if line["level"] == "info"][-3:] == ["draining", "drained", "stopped"]
    with pytest.raises(OSError, match="refused"):
        page("/livez")
