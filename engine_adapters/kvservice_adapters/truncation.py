"""truncation: which tokens stay when a conversation outgrows the window, and what names their blocks then.

The rule depends on nothing but the number of tokens, so that every engine, and the same engine after a restart, sees a
conversation in the same way. Each overflow drops another step of tokens behind the sinks:

    tokens   |sinks|  step  |  step  |   step   |  rest  |
    view 0   |sinks|  step  |  step  | ...
    view 1   |sinks|         |  step  |   step   | ...
    view 2   |sinks|                  |   step   |  rest  |

Everything is whole blocks. A view's blocks have names of their own, salted with the session and with what was dropped:
their saved keys and values are those of a longer context, which no other request may take for its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvservice_adapters.hashing import BlockChain

_SALT_TAG = b"kvservice truncated session 1\n"
FORMER_VIEWS_MAX = 4
"""How many former views of a conversation are asked for blocks; older ones share hardly any with the present one."""


class PromptTooLong(ValueError):
    """What is new does not fit into the window even without any history; shorten it."""


@dataclass(frozen=True)
class TruncationPolicy:
    """How a conversation is cut.

    Attributes:
        window_tokens: prompt and answer never get longer than this.
        tokens_per_block: cuts are made between blocks of so many tokens; a multiple of the adapter's blocks.
        drop_ratio: the part of the window that each overflow drops, rounded up to whole blocks.
        sink_tokens: the first tokens, which always stay (attention sinks), rounded up to whole blocks.
    """

    window_tokens: int
    tokens_per_block: int = 16
    drop_ratio: float = 0.5
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.drop_ratio < 1.0:
            raise ValueError(f"drop_ratio is {self.drop_ratio}, not between 0 and 1")
        if self.tokens_per_block < 1 or self.sink_tokens < 0:
            raise ValueError(f"tokens_per_block {self.tokens_per_block}, sink_tokens {self.sink_tokens}")
        if self.sinks + self.step + self.tokens_per_block > self.window_tokens:
            raise ValueError(
                f"a window of {self.window_tokens} tokens has no room for {self.sinks} sink tokens, a step of "
                f"{self.step} and a block of {self.tokens_per_block}"
            )

    @property
    def sinks(self) -> int:
        """Tokens that always stay."""
        return self._whole_blocks(self.sink_tokens)

    @property
    def step(self) -> int:
        """Tokens that one overflow drops."""
        return self._whole_blocks(self.drop_ratio * self.window_tokens)

    def fit(self, tokens: Sequence[int], *, session_id: str, max_new_tokens: int) -> FittedPrompt:
        """What of a conversation is run so that it fits with so many new tokens.

        Raises:
            PromptTooLong: nothing of it would be left.
            ValueError: it must be cut, and no session says whose it is.
        """
        over = len(tokens) + max_new_tokens - self.window_tokens
        number = max(0, -(-over // self.step))
        if number and not session_id:
            raise ValueError("a conversation that outgrows the window must name its session")
        if number and self.sinks + number * self.step >= len(tokens):
            raise PromptTooLong(
                f"{len(tokens)} tokens and {max_new_tokens} new ones do not fit into a window of {self.window_tokens}, "
                f"whatever is dropped of the history"
            )
        return FittedPrompt(self, tuple(tokens), session_id, number)

    def _whole_blocks(self, tokens: float) -> int:
        return int(-(-tokens // self.tokens_per_block)) * self.tokens_per_block


@dataclass(frozen=True)
class FormerView:
    """Where blocks of a view may be found under the names that they had in a former one.

    Attributes:
        hashes: the former chain.
        kept: token ranges [start, end) of it that stay.
        blocks: how many leading blocks of the present view they are.
    """

    hashes: Sequence[bytes]
    kept: Sequence[tuple[int, int]]
    blocks: int


@dataclass(frozen=True)
class FittedPrompt:
    """A conversation as it is run: view `number` of it."""

    policy: TruncationPolicy
    conversation: tuple[int, ...]
    session_id: str
    number: int

    @property
    def dropped_tokens(self) -> int:
        """How many tokens of the conversation are left out."""
        return self.number * self.policy.step

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens to run."""
        return self._tokens_of(self.number)

    def stated(self) -> dict[str, Any]:
        """What a request to vLLM says of it, as "truncation" in kv_transfer_params; see docs/truncation.md."""
        return {
            "conversation": list(self.conversation),
            "keep": self._ranges_of(self.number),
            "kept_before": self._ranges_of(max(0, self.number - 1)),
        }

    def chain(self, fingerprint: bytes, tokens_per_block: int) -> BlockChain:
        """The block hashes of what is run."""
        return self._chain_of(self.number, fingerprint, tokens_per_block)

    def former_views(self, fingerprint: bytes, tokens_per_block: int, usable_blocks: int) -> list[FormerView]:
        """Former views that may have been saved, the last one first.

        Args:
            usable_blocks: how many leading blocks of the present view are wanted.
        """
        views = []
        sinks = self.policy.sinks // tokens_per_block
        for number in range(self.number - 1, max(-1, self.number - 1 - FORMER_VIEWS_MAX), -1):
            moved = (self.number - number) * self.policy.step // tokens_per_block
            blocks = min(usable_blocks, self.policy.window_tokens // tokens_per_block - moved)
            if blocks <= sinks:
                break  # older views are further away
            hashes = self._chain_of(number, fingerprint, tokens_per_block).hashes[: blocks + moved]
            kept = [(0, self.policy.sinks)] * bool(sinks)
            kept.append(((sinks + moved) * tokens_per_block, (blocks + moved) * tokens_per_block))
            views.append(FormerView(hashes, kept, blocks))
        return views

    def _ranges_of(self, number: int) -> list[list[int]]:
        """The conversation's token ranges [start, end) that a view keeps."""
        sinks, whole = self.policy.sinks, len(self.conversation)
        if number == 0:
            return [[0, whole]]
        return [[0, sinks]] * bool(sinks) + [[sinks + number * self.policy.step, whole]]

    def _tokens_of(self, number: int) -> tuple[int, ...]:
        return tuple(token for start, end in self._ranges_of(number) for token in self.conversation[start:end])

    def _chain_of(self, number: int, fingerprint: bytes, tokens_per_block: int) -> BlockChain:
        if number == 0:
            return BlockChain(fingerprint, tokens_per_block, self.conversation)
        cut = self.policy.sinks + number * self.policy.step
        dropped = BlockChain(fingerprint, tokens_per_block, self.conversation[:cut]).hashes[-1]
        session = hashlib.sha256(self.session_id.encode()).digest()
        salt = hashlib.sha256(_SALT_TAG + session + dropped).digest()
        return BlockChain(salt, tokens_per_block, self._tokens_of(number))
