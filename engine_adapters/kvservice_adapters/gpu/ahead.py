"""ahead: blocks that wait in the buffer for a place in the engine's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvservice_adapters.gpu.loads import BufferedLoad, Mover, Piece
from kvservice_client import InvalidRequest


class LoadAhead:
    """Leading blocks on their way into the buffer, or there. Forgetting it cancels it.

    They stay there until `into` or `cancel`; nobody else's load takes their room.

    Attributes:
        blocks: how many.
        reason: why not more.
    """

    def __init__(self, piece: Piece, go_on: Callable[[Mover, Sequence[int]], BufferedLoad]) -> None:
        """`go_on`: says where the blocks go."""
        self.blocks = piece.blocks
        self.reason = piece.load.reason
        self._piece = piece
        self._go_on = go_on

    @property
    def has_failed(self) -> bool:
        """Whether it is known that they do not arrive."""
        return self._piece.has_failed

    def into(self, mover: Mover, block_ids: Sequence[int]) -> BufferedLoad:
        """Go on into the engine's cache, behind this thread's stream; once.

        Args:
            block_ids: where each of the `blocks` goes, no two the same.

        Raises:
            InvalidRequest: the mover is of another layout, or the block ids are not as many.
        """
        if len(block_ids) != self.blocks:
            raise InvalidRequest(f"{len(block_ids)} block ids for {self.blocks} blocks")
        return self._go_on(mover, block_ids)

    def cancel(self) -> None:
        """They are not needed."""
        self._piece.cancel()
