"""demo: conversations that resume from the service, beside the same ones recomputed.

Read in this order: `run` (the phases and the exit status), `scenario` (conversations, and how
their turns interleave), `checks` (what a row must fulfil), `processes` (daemon and engines as
subprocesses), `protocol` (what is said to an engine), `engine` (the subprocess itself),
`model` (the small Llama), `table` (what is shown).
"""

from kvservice.demo.run import main

__all__ = ["main"]
