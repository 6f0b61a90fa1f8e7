"""check_lengths: files stay under 400 lines, functions under 70. No linter at hand counts lines.

    python scripts/check_lengths.py    names what is too long; exit status 1 if something is

Docstrings count, decorators do not. Generated code is left out.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kvservice", "client", "engine_adapters", "tests", "benchmarks", "scripts")
GENERATED = ROOT / "client/kvservice_proto"
FILE_LINES, FUNCTION_LINES = 400, 70
"""The first length that is too long."""


def too_long(source: str) -> Iterator[str]:
    """What of one file's source is too long, in words."""
    lines = source.count("\n")
    if lines >= FILE_LINES:
        yield f"1: {lines} lines: split it by meaning, into a folder of the same name where it is a room"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None, "ast.parse says where nodes end"
            lines = node.end_lineno - node.lineno + 1
            if lines >= FUNCTION_LINES:
                yield f"{node.lineno}: {node.name} has {lines} lines: give its parts names"


def main() -> int:
    """Print each finding as path:line; the exit status."""
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")) if GENERATED not in path.parents]
    findings = [f"{path.relative_to(ROOT)}:{each}" for path in files for each in too_long(path.read_text("utf-8"))]
    print("\n".join(findings) or f"check_lengths: {len(files)} files, none too long")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
