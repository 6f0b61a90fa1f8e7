"""demo: conversations that resume from the service, beside the same ones recomputed.

Read in this order: `run` (the phases and the exit status), `scenario` (conversations, and how
their turns interleave), `checks` (what a row must fulfil), `processes` (daemon and engines as
subprocesses), `protocol` (what is said to an engine), `engine` (the subprocess itself),
`model` (the small Llama), `table` (what is shown).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

_NEEDED = ("numpy", "rich", "safetensors", "torch", "transformers")


def main(argv: Sequence[str]) -> int:
    """Run the demo; 0: everything held, 1: something was off or is not installed, 2: wrong arguments."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"kvservice demo: {', '.join(missing)} not installed; pip install 'kvservice[daemon,transformers]'",
            file=sys.stderr,
        )
        return 1
    from kvservice.demo import run  # noqa: PLC0415 - after it is known that what it needs is there

    return run.main(argv)
