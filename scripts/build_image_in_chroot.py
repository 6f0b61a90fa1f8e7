"""Run the Dockerfile's stages in plain directories, where no container engine is: as root, with debootstrap and chroot.

    python scripts/build_image_in_chroot.py BASE WORK [--device-plane off]

BASE is what the stages start from: a directory that `debootstrap --variant=minbase bookworm BASE` filled. WORK gets one
directory per stage. Then the daemon is started in its stage as its user, on a read-only root, and its HEALTHCHECK runs.

What it understands is what our Dockerfile uses: FROM, ARG, ENV, WORKDIR, COPY, RUN, USER, HEALTHCHECK, ENTRYPOINT, CMD,
EXPOSE. It proves the commands, not the layers, the caches, the registry or the engine's stage. PIP_* variables of this
process and /etc/pip.conf, /etc/resolv.conf and the CA bundle of this machine are lent to RUN, so that pip works here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LENT = {
    "/etc/pip.conf": "/etc/pip.conf",
    "/etc/resolv.conf": "/etc/resolv.conf",
    "/etc/ssl/certs/ca-certificates.crt": "/etc/ssl/lent.crt",
}
"""Files of this machine, and where they lie in a stage; ca-certificates would overwrite its own."""
READY_S = 30


@dataclass
class Stage:
    """One stage: its directory, and what its instructions have set so far."""

    directory: Path
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    working_directory: str = "/"
    user: str = "0:0"
    health: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def run(self, command: list[str], *, user: str = "0:0") -> subprocess.CompletedProcess[bytes]:
        """A command in the stage."""
        return subprocess.run(self.chrooted(command, user=user), env=self._variables(), check=True)

    def chrooted(self, command: list[str], *, user: str) -> list[str]:
        """The command line that runs `command` in the stage as that user."""
        inside = f'cd {shlex.quote(self.working_directory)} && exec "$@"'
        return ["chroot", f"--userspec={user}", str(self.directory), "/bin/sh", "-c", inside, "sh", *command]

    def _variables(self) -> dict[str, str]:
        lent = {name: value for name, value in os.environ.items() if name.startswith("PIP_") and value[:1] != "/"}
        lent["PIP_CERT"] = LENT["/etc/ssl/certs/ca-certificates.crt"]
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {"PATH": path, "HOME": "/", **lent, **self.environment, **self.arguments}


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its text), with continuation lines joined and comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(word, rest) for line in joined.splitlines() if line for word, _, rest in [line.partition(" ")]]


def build(base: Path, work: Path, *, device_plane: str) -> Stage:
    """Run every stage but the engine's; the daemon's."""
    stages: dict[str, Stage] = {}
    stage = Stage(base)
    for word, rest in instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
        if word == "FROM":
            name = rest.split(" AS ")[1]
            if name == "engine":
                break
            stage = stages[name] = Stage(work / name)
            subprocess.run(["cp", "-a", str(base), str(stage.directory)], check=True)
            _lend(stage.directory)
        elif stages:
            print(f"{word} {rest[:100]}", flush=True)
            _apply(stage, stages, word, rest, device_plane=device_plane)
    return stages["daemon"]


def _apply(stage: Stage, stages: dict[str, Stage], word: str, rest: str, *, device_plane: str) -> None:
    match word:
        case "ARG":
            name, _, value = rest.partition("=")
            stage.arguments[name] = device_plane if name == "DEVICE_PLANE" else value
        case "ENV":
            for name, value in stage.arguments.items():
                rest = rest.replace(f"${{{name}}}", value)
            stage.environment |= dict(part.split("=", 1) for part in shlex.split(rest))
        case "WORKDIR":
            stage.working_directory = rest
            (stage.directory / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        case "COPY":
            _copy(stage, stages, rest.split())
        case "RUN":
            stage.run(["/bin/sh", "-c", rest])
        case "USER":
            stage.user = rest
        case "HEALTHCHECK":
            stage.health = json.loads(rest[rest.index("CMD ") + 4 :])
        case "ENTRYPOINT" | "CMD":
            stage.command += json.loads(rest)
        case "EXPOSE":
            pass
        case _:
            raise SystemExit(f"the Dockerfile uses {word}, which this script does not know")


def _copy(stage: Stage, stages: dict[str, Stage], words: list[str]) -> None:
    source = ROOT
    if words[0].startswith("--from="):
        source = stages[words.pop(0).removeprefix("--from=")].directory
    *names, target = words
    into = stage.directory / (Path(stage.working_directory) / target).as_posix().lstrip("/")
    for name in names:
        origin = source / name.lstrip("/")
        if origin.is_dir():
            shutil.copytree(origin, into, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copy2(origin, into)


def _lend(directory: Path) -> None:
    for path, name in LENT.items():
        if Path(path).exists():
            target = directory / name.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def prove(stage: Stage) -> None:
    """Start the daemon on a read-only root, its sockets in a tmpfs; HEALTHCHECK must pass, SIGTERM must end it."""
    directory = shlex.quote(str(stage.directory))
    mounts = " && ".join(
        [
            f"mount --bind {directory} {directory}",
            f"mount -t tmpfs -o mode=0755,uid=65532,gid=65532 tmpfs {directory}/run/kvservice",
            f"mount --rbind /proc {directory}/proc",
            f"mount -o remount,ro,bind {directory}",
        ]
    )
    serve = shlex.join(stage.chrooted([*stage.command, "--dram-bytes", "64MiB"], user=stage.user))
    variables = {**stage._variables(), "PATH": stage.environment["PATH"] + ":/usr/sbin:/usr/bin:/sbin:/bin"}
    command = ["unshare", "--mount", "/bin/sh", "-c", f"{mounts} && exec {serve}"]
    with subprocess.Popen(command, env=variables) as daemon:
        ends_at_s = time.monotonic() + READY_S
        health = stage.chrooted(stage.health, user=stage.user)
        while subprocess.run(health, env=variables, check=False, stderr=subprocess.DEVNULL).returncode:
            if time.monotonic() > ends_at_s or daemon.poll() is not None:
                raise SystemExit("HEALTHCHECK never passed")
            time.sleep(0.5)
        owner = Path(f"/proc/{daemon.pid}").stat().st_uid
        print(f"HEALTHCHECK passed; the daemon runs as uid {owner} on a read-only root", flush=True)
        daemon.terminate()
    print(f"after SIGTERM: status {daemon.returncode}")


def main() -> None:
    """Build and prove."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--device-plane", default="off", choices=("off", "auto"))
    chosen = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("chroot needs root")
    chosen.work.mkdir(parents=True)
    daemon = build(chosen.base, chosen.work, device_plane=chosen.device_plane)
    prove(daemon)
    added = [subprocess.run(["du", "-sm", str(of)], capture_output=True, text=True, check=True).stdout.split()[0]
             for of in (chosen.base, daemon.directory)]  # fmt: skip
    print(f"size: base {added[0]} MiB, daemon {added[1]} MiB")


if __name__ == "__main__":
    main()
