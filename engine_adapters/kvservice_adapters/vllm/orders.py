"""orders: what the scheduler's half has the workers do."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Fill these engine blocks; the worker answers for every order, whatever happens.

    Attributes:
        hashes: the chain from its root, up to the last block to load.
        first: position in the chain of the first block to load.
        block_ids: the engine's blocks for hashes[first:].
        is_truncated: of a truncated session: keys may have to be turned.
    """

    request_id: str
    session_id: str
    hashes: tuple[bytes, ...]
    first: int
    block_ids: tuple[int, ...]
    is_truncated: bool = False


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """These engine blocks are full after this step.

    Attributes:
        hashes: of the chain's blocks from position `first` on.
        first: 0 starts the request's chain anew (its blocks are others now); else it continues where it ended.
        block_ids: the engine's blocks for `hashes`.
    """

    request_id: str
    session_id: str
    hashes: tuple[bytes, ...]
    first: int
    block_ids: tuple[int, ...]
