"""The namespaces of a volume by name: one small file, replaced as a whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping

import xxhash

from kvservice.blocks import NamespaceKey, NamespaceSpec, Tenant
from kvservice.nvme.files import Files
from kvservice.nvme.format import namespace_digest

_FILES = ("namespaces", "namespaces.copy")  # without the names nothing could be found again


def write_names(files: Files, directory: str, specs: Iterable[NamespaceSpec]) -> None:
    """Replace both copies, durably, one after the other. Blocks. Raises OSError."""
    text = json.dumps([_to_json(spec) for spec in specs])
    content = f"{xxhash.xxh3_64_hexdigest(text.encode())}\n{text}\n".encode()
    for name in _FILES:
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
    """From the first intact copy. Without one: none, and nothing that was stored can be found."""
    text = next((text for name in _FILES if (text := _intact(os.path.join(directory, name)))), None)
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


def _intact(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            digest, _, text = file.read().rstrip(b"\n").partition(b"\n")
    except FileNotFoundError:
        return None
    return text if xxhash.xxh3_64_hexdigest(text).encode() == digest else None
