"""check_protos: hold the contract, its generated code and its released form together.

Covers: client/kvservice_proto is what protos/ generates; the contract keeps the style guide; nothing in it
breaks the clients of the released contract. Does not cover: what counts as a break (`breaking_changes`).

    python scripts/check_protos.py              all of it; exit status 1 if something is off
    python scripts/check_protos.py --release    make the contract as it is now the released one
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet

from scripts.breaking_changes import breaking_changes

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos/kvservice/v1"
RELEASED = PROTOS / "released.binpb"
GENERATED = ROOT / "client/kvservice_proto"
GENERATED_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")
TOOLS = Path(sys.executable).parent
PROTOC_PYTHON = ROOT / "build/protoc-venv/bin/python"


class ToolFailed(Exception):
    """A tool could not do its part; the message is its command and what it printed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or release the contract; returns the exit status."""
    parser = argparse.ArgumentParser(description="Check the contract and the code generated from it.")
    parser.add_argument("--release", action="store_true", help=f"write {RELEASED.relative_to(ROOT)} and stop")
    release = parser.parse_args(arguments).release
    try:
        with tempfile.TemporaryDirectory() as scratch:
            regenerated = regenerate(Path(scratch))
            current = compile_contract(Path(scratch))
            if release:
                RELEASED.write_bytes(current.SerializeToString(deterministic=True))
                print(f"wrote {RELEASED.relative_to(ROOT)}")
                return 0
            findings = {
                "generated code is stale (run `make protos`)": stale_files(GENERATED, regenerated),
                "style": style_violations(),
                "breaks released clients": breaking_changes(read_released(), current),
            }
    except ToolFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    for title, lines in findings.items():
        for line in lines:
            print(f"{title}: {line}", file=sys.stderr)
    if any(findings.values()):
        return 1
    print("protos: generated code is current, style is clean, released clients keep working")
    return 0


def regenerate(scratch: Path) -> Path:
    """Generate the code into `scratch`; returns the folder to compare with client/kvservice_proto."""
    run("bash", "scripts/generate_protos.sh", scratch)
    return scratch / GENERATED.name


def compile_contract(scratch: Path) -> FileDescriptorSet:
    """Compile the contract as it is now, without comments or positions."""
    output = scratch / "current.binpb"
    mapping = f"{GENERATED.name}/v1={PROTOS}"
    protos = sorted(PROTOS.glob("*.proto"))
    run(PROTOC_PYTHON, "-m", "grpc_tools.protoc", "-I", mapping, f"--descriptor_set_out={output}", *protos)
    return FileDescriptorSet.FromString(output.read_bytes())


def read_released() -> FileDescriptorSet:
    """Read the released contract.

    Raises:
        ToolFailed: nothing was released yet.
    """
    if not RELEASED.exists():
        raise ToolFailed(f"{RELEASED.relative_to(ROOT)} is missing: run `python scripts/check_protos.py --release`")
    return FileDescriptorSet.FromString(RELEASED.read_bytes())


def stale_files(committed: Path, regenerated: Path) -> list[str]:
    """Name the generated files that are missing, superfluous or different in `committed`."""
    before, after = _generated_files(committed), _generated_files(regenerated)
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if name not in before:
            lines.append(f"{name} is missing")
        elif name not in after:
            lines.append(f"{name} has no source")
        elif before[name] != after[name]:
            lines.append(f"{name} differs")
    return lines


def _generated_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in GENERATED_PATTERNS
        for path in folder.rglob(pattern)
    }


def style_violations() -> list[str]:
    """Name what protolint finds in the contract, under the rules in protos/.protolint.yaml."""
    config = ROOT / "protos/.protolint.yaml"
    command: list[str | Path] = [TOOLS / "protolint", "lint", "-config_path", config, PROTOS]
    try:
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError as missing:
        raise ToolFailed(f"protolint is not installed beside {sys.executable}: run `make check`") from missing
    return (finished.stdout + finished.stderr).splitlines() if finished.returncode else []


def run(*command: str | Path) -> None:
    """Run a tool in the repository's root, this interpreter first on PATH; blocks.

    Raises:
        ToolFailed: it exited with another status than 0.
    """
    environment = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        printed = (finished.stdout + finished.stderr).strip()
        raise ToolFailed(f"{' '.join(map(str, command))} exited with {finished.returncode}:\n{printed}")


if __name__ == "__main__":
    sys.exit(main())
