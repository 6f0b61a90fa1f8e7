"""blocks: chains of hashes, and for each hash the bytes that its block must have, in every process the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from hashlib import sha256

import kvservice_client as kv

HASH_BYTES = 32


def chain(name: str, blocks: int, *, start: int = 0) -> list[bytes]:
    """Hashes of blocks start, start + 1, ... of the chain of that name, root first."""
    return [sha256(f"{name}/{position}".encode()).digest() for position in range(start, start + blocks)]


def content(block_hash: bytes, size_bytes: int) -> bytes:
    """What the block of that hash contains."""
    return random.Random(block_hash).randbytes(size_bytes)


def contents(hashes: Sequence[bytes], size_bytes: int) -> bytearray:
    """The blocks of a chain, one after the other."""
    return bytearray().join(content(block_hash, size_bytes) for block_hash in hashes)


def namespace(
    name: str = "test",
    *,
    block_size_bytes: int = 4096,
    tokens_per_block: int = 16,
    hash_size_bytes: int = HASH_BYTES,
    label: str = "",
) -> kv.Namespace:
    """A namespace whose fingerprint follows from its name alone."""
    return kv.Namespace(
        fingerprint=sha256(name.encode()).digest(),
        label=label or name,
        block_size_bytes=block_size_bytes,
        tokens_per_block=tokens_per_block,
        hash_size_bytes=hash_size_bytes,
    )
