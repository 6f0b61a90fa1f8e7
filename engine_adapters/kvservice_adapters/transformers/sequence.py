"""sequence: one running token sequence, its block hashes and how far it is saved."""

import threading
from collections.abc import Iterable

from kvservice_adapters.hashing import BlockChain
from kvservice_adapters.truncation import FittedPrompt

# A sequence that the service refuses this often in a row is not offered again: its engine
# would copy the same blocks out of the cache over and over.
SAVE_FAILURES_MAX = 3


class TrackedSequence:
    """Tokens of one request, prompt and output, as the engine's thread sees them grow.

    The saving thread reports back with `save_succeeded` and `save_failed`.
    """

    def __init__(
        self, chain: BlockChain, *, session_id: str, request_id: str, prompt: FittedPrompt | None = None
    ) -> None:
        """Follow a chain; `prompt` says of what conversation it is a truncated view, None: of none."""
        self.chain = chain
        self.prompt = prompt
        self.session_id = session_id
        self.request_id = request_id
        self._lock = threading.Lock()
        self._next_save_block = 0
        self._failures = 0

    @property
    def next_save_block(self) -> int:
        """The first block that the saving thread has not been given yet, or gave back."""
        with self._lock:
            return self._next_save_block

    @property
    def gave_up_saving(self) -> bool:
        """Whether saving failed too often for this sequence."""
        with self._lock:
            return self._failures >= SAVE_FAILURES_MAX

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens that were generated."""
        self.chain.extend(tokens)

    def save_started(self, first_block: int, end_block: int) -> None:
        """Called by the engine's thread: these blocks are queued, or need not be saved because they were loaded."""
        with self._lock:
            # Otherwise the saving thread gave earlier blocks back meanwhile: they stay next.
            if self._next_save_block == first_block:
                self._next_save_block = end_block

    def save_succeeded(self) -> None:
        """Called by the saving thread: the service has what it was given."""
        with self._lock:
            self._failures = 0

    def save_failed(self, first_block: int) -> None:
        """Called by the saving thread: everything from this block on must be offered again."""
        with self._lock:
            self._failures += 1
            self._next_save_block = min(self._next_save_block, first_block)
