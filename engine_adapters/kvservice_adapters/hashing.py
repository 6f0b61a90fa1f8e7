"""hashing: exact block hashes, chained over the tokens and the namespace's fingerprint.

BlockHash_i = sha256(BlockHash_{i-1} or fingerprint, tokens of block i). A hash names a
block and everything before it, so two sequences share a hash only if they share model,
layout and every token up to there.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

HASH_SIZE_BYTES = 32
_TOKEN_SIZE_BYTES = 4

# What a fingerprint may be made of: everything that JSON writes in one way only.
_CANONICAL_SCALARS = (str, int, float, bool, type(None))

_FINGERPRINT_TAG = b"kvservice namespace fingerprint 1\n"
_FILE_CHUNK_BYTES = 1 << 22
_WEIGHT_PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def fingerprint_of(parts: Mapping[str, object]) -> bytes:
    """Hash everything that makes bytes incompatible: 32 bytes, the same in every process.

    Args:
        parts: Nested mappings, sequences, strings, numbers, booleans and None.

    Raises:
        TypeError: A part has no canonical form (a tensor, a set, a non-string key).
        ValueError: A number is not finite.
    """
    _reject_unsortable(parts)
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(_FINGERPRINT_TAG + text.encode("ascii")).digest()


def _reject_unsortable(value: object) -> None:
    # json turns the keys 1 and "1" into the same text: two different parts, one fingerprint.
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"fingerprint keys are strings, not {key!r}")
            _reject_unsortable(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for inner in value:
            _reject_unsortable(inner)
    elif not isinstance(value, _CANONICAL_SCALARS):
        raise TypeError(f"a {type(value).__name__} has no canonical form for a fingerprint: {value!r}")


def weights_identity_of(model_dir: Path | str) -> str:
    """Read a local model's configuration and weights and name them; blocks while it reads the files.

    Returns:
        "sha256:" and the digest over names and contents of config and weight files.

    Raises:
        FileNotFoundError: The folder holds no weights.
    """
    folder = Path(model_dir)
    files = sorted({file for pattern in _WEIGHT_PATTERNS for file in folder.glob(pattern)}, key=lambda file: file.name)
    if not any(file.suffix in {".safetensors", ".bin"} for file in files):
        raise FileNotFoundError(f"no *.safetensors or *.bin in {folder}: nothing to identify the weights by")
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\n{file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_FILE_CHUNK_BYTES):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


class BlockChain:
    """The block hashes of one growing token sequence; only full blocks have one."""

    def __init__(self, fingerprint: bytes, tokens_per_block: int, tokens: Iterable[int] = ()) -> None:
        if len(fingerprint) != HASH_SIZE_BYTES:
            raise ValueError(f"fingerprint has {len(fingerprint)} bytes, not {HASH_SIZE_BYTES}")
        if tokens_per_block < 1:
            raise ValueError(f"tokens_per_block is {tokens_per_block}, not at least 1")
        self._fingerprint = fingerprint
        self._block_bytes = tokens_per_block * _TOKEN_SIZE_BYTES
        self._tokens: list[int] = []
        self._hashes: list[bytes] = []
        self._unhashed = b""  # tokens of the unfinished block, as they are hashed
        self.extend(tokens)

    @property
    def tokens(self) -> Sequence[int]:
        """All tokens so far, those of the unfinished block included."""
        return self._tokens

    @property
    def hashes(self) -> Sequence[bytes]:
        """One hash per full block, root first."""
        return self._hashes

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens and hash the blocks that they fill.

        Raises:
            ValueError: A token id is negative or does not fit into 32 bits; the chain is unchanged.
        """
        added = list(tokens)
        try:
            packed = self._unhashed + struct.pack(f"<{len(added)}I", *added)
        except struct.error:
            raise ValueError("token ids are whole numbers from 0 to 2**32 - 1") from None
        self._tokens.extend(added)
        size = self._block_bytes
        parent = self._hashes[-1] if self._hashes else self._fingerprint
        end = len(packed) // size * size
        for start in range(0, end, size):
            parent = hashlib.sha256(parent + packed[start : start + size]).digest()
            self._hashes.append(parent)
        self._unhashed = packed[end:]
