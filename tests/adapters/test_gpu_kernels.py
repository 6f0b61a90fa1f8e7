"""The kernels without a GPU: Triton interprets them on host memory, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has no build for this system")
@pytest.mark.parametrize("check", ["copies_every_byte_and_no_other", "turns_keys_and_nothing_else"])
def test_interpreted(check: str) -> None:
    # Triton looks at the variable when it is imported: no other test may see it.
    program = [sys.executable, "-m", "tests.gpu.kernel_checks", check]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(program, env=environment, cwd=ROOT, timeout=110, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
