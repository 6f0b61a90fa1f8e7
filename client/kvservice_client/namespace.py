"""What a client attaches, and where it looks for the daemon."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kvservice_proto.v1 import kvservice_pb2 as pb


@dataclass(frozen=True, slots=True)
class Namespace:
    """What makes bytes incompatible, as `fingerprint`; and the sizes its engines must agree on.

    Attributes:
        fingerprint: 16 to 64 bytes; a digest of model, revision, dtype, layout, parallel rank,
            cache group, the engine's block format and a salt.
        label: for people.
        block_size_bytes: all layers' bytes of one block.
        tokens_per_block: tokens that a block spans.
        hash_size_bytes: 8 to 64.
    """

    fingerprint: bytes
    label: str
    block_size_bytes: int
    tokens_per_block: int
    hash_size_bytes: int = 32

    def to_message(self) -> pb.Namespace:
        """As the contract carries it."""
        return pb.Namespace(
            fingerprint=self.fingerprint,
            label=self.label,
            block_size_bytes=self.block_size_bytes,
            tokens_per_block=self.tokens_per_block,
            hash_size_bytes=self.hash_size_bytes,
        )


def default_socket_dir() -> str:
    """$KVSERVICE_SOCKET_DIR, else $XDG_RUNTIME_DIR/kvservice, else /run/kvservice."""
    named = os.environ.get("KVSERVICE_SOCKET_DIR")
    if named:
        return named
    runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
    return os.path.join(runtime_dir, "kvservice") if runtime_dir else "/run/kvservice"
