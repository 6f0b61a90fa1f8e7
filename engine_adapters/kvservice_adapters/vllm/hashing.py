"""hashing: what names a block (vLLM's own chained hash) and what names everything that makes bytes incompatible."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import vllm

import kvservice_client as kv
from kvservice_adapters.hashing import HASH_SIZE_BYTES, fingerprint_of
from kvservice_adapters.vllm.layout import KVLayout
from kvservice_adapters.vllm.support import UnsupportedModel, tokens_per_block_of

_FORMAT_VERSION = 1
_LABEL_LENGTH_MAX = 200
_WEIGHT_PATTERNS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.safetensors.index.json",
    "adapter_config.json",
)
_SAMPLES, _SAMPLE_BYTES = 32, 4096
# The Hugging Face cache names a file by a digest of its contents.
_CONTENT_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# Says nothing about keys and values.
_SILENT_CONFIG = frozenset({"_name_or_path", "transformers_version", "architectures"})


def namespace_of(
    vllm_config: Any, kv_cache_config: Any, layout: KVLayout, *, rank: Mapping[str, int], salt: str, weights: str
) -> kv.Namespace:
    """The namespace of one rank's blocks.

    Args:
        layout: of the rank's real KV tensors.
        rank: this worker's place, and how many there are, in every dimension that splits the model.
        weights: what tells these weights from all others; "": found out from the model's files.

    Raises:
        UnsupportedModel: nothing is known that identifies the weights.
    """
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    tokens_per_block = tokens_per_block_of(kv_cache_config)
    dtype = str(model.dtype).removeprefix("torch.")
    parts = {
        "format": _FORMAT_VERSION,
        "engine": ["vllm", vllm.__version__],
        "weights": weights or weights_identity_of(vllm_config),
        "config": hashlib.sha256(_telling_config(model.hf_config)).hexdigest(),
        "dtype": [dtype, str(cache.cache_dtype), str(model.quantization)],
        "tokens_per_block": tokens_per_block,
        "hash": cache.prefix_caching_hash_algo,
        "layout": [str(kv_cache_config.kv_cache_layout), [region.size_bytes for region in layout.regions]],
        "backend": _backends(vllm_config, layout, tokens_per_block),
        "rank": dict(rank),
        "salt": salt,
    }
    place = " ".join(f"{name}{at}" for name, at in rank.items() if not name.endswith("_size"))
    name = str(model.model)[-(_LABEL_LENGTH_MAX - 60) :]
    return kv.Namespace(
        fingerprint=fingerprint_of(parts),
        label=f"{name} vllm {dtype} x{tokens_per_block} {place}",
        block_size_bytes=layout.block_size_bytes,
        tokens_per_block=tokens_per_block,
        hash_size_bytes=HASH_SIZE_BYTES,
    )


def _telling_config(config: Any) -> bytes:
    told = {name: value for name, value in config.to_dict().items() if name not in _SILENT_CONFIG}
    # What JSON cannot say in one way only (a dtype, say) is said by its repr.
    return repr(sorted((name, repr(value)) for name, value in told.items())).encode()


def _backends(vllm_config: Any, layout: KVLayout, tokens_per_block: int) -> list[str]:
    """How the layers' kernels arrange a block's interior, which its shape does not say."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    names = {layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}
    names |= {f"head {layer.head_size}" for layer in layers if hasattr(layer, "head_size")}
    if layout.device.type == "cpu":
        names |= _cpu_formats(vllm_config, layers, tokens_per_block)
    return sorted(names)


def _cpu_formats(vllm_config: Any, layers: Any, tokens_per_block: int) -> set[str]:
    # Private, and the only place that knows: AMX packs keys in another order than the vector code does.
    from vllm.v1.attention.backends import cpu_attn  # noqa: PLC0415  # not there on every platform

    cache_dtype = vllm_config.cache_config.cache_dtype
    return {
        f"isa {cpu_attn._get_attn_isa(vllm_config.model_config.dtype, tokens_per_block, layer.head_size, cache_dtype)}"  # noqa: SLF001
        for layer in layers
        if hasattr(layer, "head_size")
    } | {f"amx {torch.cpu._is_amx_tile_supported()}"}  # noqa: SLF001


def weights_identity_of(vllm_config: Any) -> str:
    """Name the weights that the engine loaded. Reads a few hundred KiB of the model's files.

    Raises:
        UnsupportedModel: they are not files that can be named.
    """
    load_format = str(vllm_config.load_config.load_format)
    if load_format == "dummy":
        raise UnsupportedModel(
            "its weights are made up (load_format dummy): name them with weights_identity in kv_connector_extra_config"
        )
    named = [vllm_config.model_config]
    # A draft model with layers of its own keeps them in the same blocks.
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.draft_model_config is not None:
        named.append(speculative.draft_model_config)
    return " ".join([load_format, *(_model_identity_of(model) for model in named)])


def _model_identity_of(model: Any) -> str:
    folder = Path(model.model)
    return files_identity_of(folder if folder.is_dir() else _snapshot_of(model.model, model.revision))


def _snapshot_of(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # only where a model was named, not a folder

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception as error:
        raise UnsupportedModel(
            f"the files of {name} are not in the local Hugging Face cache ({type(error).__name__}): name the weights "
            "with weights_identity in kv_connector_extra_config"
        ) from error


def files_identity_of(folder: Path) -> str:
    """Name the weight files of a folder by their digests where the folder tells them, else by size, time and samples.

    Raises:
        UnsupportedModel: there are none.
    """
    files = sorted({file for pattern in _WEIGHT_PATTERNS for file in folder.glob(pattern)})
    if not files:
        raise UnsupportedModel(f"no weight files in {folder}: name the weights with weights_identity")
    digest = hashlib.sha256()
    for file in files:
        real = file.resolve()
        digest.update(f"{file.name}\n".encode())
        if _CONTENT_DIGEST.fullmatch(real.name):
            digest.update(real.name.encode())
            continue
        status = real.stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        with real.open("rb") as stream:
            for sample in range(_SAMPLES):
                stream.seek(status.st_size * sample // _SAMPLES)
                digest.update(stream.read(_SAMPLE_BYTES))
    return f"files:{digest.hexdigest()}"


class BlockNames:
    """The store's hash of every full block of a request.

    vLLM's own chained hash, which covers tokens, cache_salt, LoRA name and path, and the contents of images. A LoRA's
    path may hold other weights tomorrow, so for requests with one the identity of its files is added.
    """

    def __init__(self, *, tokens_per_block: int, tokens_per_hash: int) -> None:
        self._hashes_per_block = tokens_per_block // tokens_per_hash

    def extend(self, request: Any, hashes: list[bytes]) -> None:
        """Append the hashes of the blocks that were filled since. Raises UnsupportedModel for an unnamed LoRA."""
        every = self._hashes_per_block
        theirs: Sequence[bytes] = request.block_hashes
        missing = range(len(hashes), len(theirs) // every)
        if not missing:
            return
        # A chained hash: the last of a block's covers it all.
        added = [bytes(theirs[(position + 1) * every - 1]) for position in missing]
        if request.lora_request is not None:
            seed = files_identity_of(Path(request.lora_request.lora_path)).encode()
            added = [hashlib.sha256(seed + one).digest() for one in added]
        hashes.extend(added)
