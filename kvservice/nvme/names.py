"""The namespaces of a volume by name: one small file, replaced as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping

import xxhash

from kvservice.blocks import NamespaceKey, NamespaceSpec, Tenant
from kvservice.nvme.files import Files
from kvservice.nvme.format import namespace_digest

FILES = ("namespaces", "namespaces.copy")  # without the names nothing could be found again
_FILE_SYSTEM_BLOCK_BYTES = 4096


def write_names(files: Files, directory: str, specs: Iterable[NamespaceSpec]) -> None:
    """Replace both copies, durably, one after the other. Blocks. Raises OSError."""
    content = _content(specs)
    for name in FILES:
        path = os.path.join(directory, name)
        if os.path.exists(f"{path}.tmp"):
            files.remove(f"{path}.tmp")  # of a crash; what is longer in it must not show through
        descriptor = files.open(f"{path}.tmp", direct=False, create=True)
        try:
            files.write(descriptor, [content], 0)
            files.flush(descriptor)
        finally:
            files.close(descriptor)
        files.rename(f"{path}.tmp", path)


def names_bytes(specs: Iterable[NamespaceSpec]) -> int:
    """What they take on disk while both copies are being replaced."""
    return (len(FILES) + 1) * -(-len(_content(specs)) // _FILE_SYSTEM_BLOCK_BYTES) * _FILE_SYSTEM_BLOCK_BYTES


def _content(specs: Iterable[NamespaceSpec]) -> bytes:
    text = json.dumps([_to_json(spec) for spec in specs])
    return f"{xxhash.xxh3_64_hexdigest(text.encode())}\n{text}\n".encode()


def _to_json(spec: NamespaceSpec) -> Mapping[str, object]:
    return {
        "tenant": spec.key.tenant,
        "fingerprint": spec.key.fingerprint.hex(),
        "label": spec.label,
        "block_size_bytes": spec.block_size_bytes,
        "tokens_per_block": spec.tokens_per_block,
        "hash_size_bytes": spec.hash_size_bytes,
    }


def read_names(directory: str) -> dict[bytes, NamespaceSpec]:
    """By digest, from the first intact copy. Without one: none, and nothing that was stored can be found. Blocks."""
    text = next((text for name in FILES if (text := intact(os.path.join(directory, name))) is not None), None)
    if text is None:
        return {}
    specs = [
        NamespaceSpec(
            key=NamespaceKey(Tenant(entry["tenant"]), bytes.fromhex(entry["fingerprint"])),
            label=entry["label"],
            block_size_bytes=entry["block_size_bytes"],
            tokens_per_block=entry["tokens_per_block"],
            hash_size_bytes=entry["hash_size_bytes"],
        )
        for entry in json.loads(text)
    ]
    return {namespace_digest(spec): spec for spec in specs}


def intact(path: str) -> bytes | None:
    """What is in that copy; None: it is damaged or not there."""
    try:
        with open(path, "rb") as file:
            digest, _, text = file.read().partition(b"\n")
    except FileNotFoundError:
        return None
    return text if xxhash.xxh3_64_hexdigest(text.rstrip(b"\n")).encode() == digest else None
