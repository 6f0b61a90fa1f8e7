"""support: which models can be served, what their blocks look like, and what names their bytes.

Supported: decoders with rotary positions whose every layer keeps keys and values of all
tokens (Llama, Qwen, Mistral without a sliding window, ...). Anything else is refused with the
reason: for those, a prefix of tokens does not say what the cache holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import kvservice_client
from kvservice_adapters.hashing import HASH_SIZE_BYTES, fingerprint_of
from kvservice_adapters.transformers.layout import LAYOUT_NAME, LAYOUT_VERSION, BlockLayout

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LABEL_LENGTH_MAX = 200

# Configuration that says nothing about the bytes of keys and values: where the model came
# from, how its outputs are packed, which tokens end a text. The dtype in use is named apart.
_SILENT_CONFIG = frozenset({
    "_name_or_path", "_attn_implementation", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "label2id", "output_attentions", "output_hidden_states",
    "pad_token_id", "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip


class UnsupportedModel(ValueError):
    """This model's cache cannot be stored by token prefix; the message says why. Run it without the service."""


@dataclass(frozen=True)
class ServedModel:
    """What the adapter must know of a model."""

    layout: BlockLayout
    device: torch.device
    namespace: kvservice_client.Namespace


def serve_model(
    model: PreTrainedModel, *, tokens_per_block: int = 16, weights_identity: str = "", salt: str = ""
) -> ServedModel:
    """Check that a model can be served and name its blocks; runs one token through it.

    Args:
        model: A loaded decoder model, in the dtype and on the device it will run.
        tokens_per_block: Tokens of one block.
        weights_identity: What tells these weights from all others: a revision, or
            `hashing.weights_identity_of(folder)`. Empty: the commit the model was downloaded at.
        salt: Separates namespaces that would otherwise be equal.

    Raises:
        UnsupportedModel: The reason is in the message.
        ValueError: No weights identity is given and none is known.
    """
    layout = layout_of(model, tokens_per_block=tokens_per_block)
    identity = weights_identity or getattr(model.config, "_commit_hash", None) or ""
    if not identity:
        raise ValueError(
            "weights_identity is empty and the model does not know the commit it came from: two models with equal "
            "configurations would share blocks; pass hashing.weights_identity_of(folder)"
        )
    parts = {
        "engine": "transformers",
        "architecture": type(model).__name__,
        "config": _telling_config(model),
        "weights": identity,
        "dtype": str(layout.dtype),
        "layout": [LAYOUT_NAME, LAYOUT_VERSION, *layout.block_shape],
        "salt": salt,
    }
    name = str(model.config.name_or_path or type(model).__name__)
    namespace = kvservice_client.Namespace(
        fingerprint=fingerprint_of(parts),
        label=f"{name[-(LABEL_LENGTH_MAX - 40) :]} {str(layout.dtype).removeprefix('torch.')} x{tokens_per_block}",
        block_size_bytes=layout.block_size_bytes,
        tokens_per_block=tokens_per_block,
        hash_size_bytes=HASH_SIZE_BYTES,
    )
    return ServedModel(layout=layout, device=model.device, namespace=namespace)


def _refuse_unsupported_configuration(model: PreTrainedModel) -> None:
    config: Any = model.config
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder: its cache depends on the encoder's input as well")
    text_config: Any = config.get_text_config(decoder=True)
    if text_config is not config:
        raise UnsupportedModel(
            f"{name} is multimodal: token ids do not say what an image or a sound put into the cache"
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise UnsupportedModel(
            f"{name} uses multi-head latent attention (MLA): its cache is not keys and values per head"
        )
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    if any(getattr(kind, "is_sliding", False) for kind in kinds):
        raise UnsupportedModel(f"{name} has sliding-window layers: they forget the beginning of a prefix")
    if kinds != {DynamicLayer}:
        others = ", ".join(sorted(kind.__name__ for kind in kinds - {DynamicLayer}))
        raise UnsupportedModel(
            f"{name} is a hybrid: layers of kind {others} keep a state, not keys and values per token"
        )
    _refuse_unsupported_rope(name, getattr(config, "rope_parameters", None))
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModel(f"{name} has PEFT adapters loaded: they can change under one name; merge them first")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise UnsupportedModel(f"{name} is spread over several devices: {', '.join(sorted(map(str, devices)))}")


def _refuse_unsupported_rope(name: str, rope: Mapping[str, object] | None) -> None:
    if not rope or "rope_type" not in rope:
        raise UnsupportedModel(f"{name} has no rotary position embedding for all layers alike")
    if rope["rope_type"] in {"dynamic", "longrope"}:
        raise UnsupportedModel(
            f"{name} has rotary positions of type {rope['rope_type']}: the same token's key changes with the "
            "length of the sequence, so a stored key fits one length only"
        )


def _telling_config(model: PreTrainedModel) -> dict[str, object]:
    # Differences from the defaults only: an upgrade of transformers that adds a field keeps the namespace.
    config: dict[str, object] = model.config.to_diff_dict()
    return {name: value for name, value in config.items() if name not in _SILENT_CONFIG}


def layout_of(model: PreTrainedModel, *, tokens_per_block: int) -> BlockLayout:
    """Check that a model can be served and ask its cache for the shape of a block; runs one token through it.

    Raises:
        UnsupportedModel: The reason is in the message.
    """
    _refuse_unsupported_configuration(model)
    # Not read from the configuration: that names head counts and sizes in too many ways.
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(
            input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True
        )
    shapes = {(tuple(tensor.shape), tensor.dtype) for keys, values, _ in cache for tensor in (keys, values)}
    if len(shapes) != 1:
        raise UnsupportedModel(f"{type(model).__name__} keeps keys and values of different shapes or dtypes: {shapes}")
    (shape, dtype) = shapes.pop()
    if dtype not in SUPPORTED_DTYPES:
        raise UnsupportedModel(f"{type(model).__name__} keeps its cache in {dtype}, not in one of {SUPPORTED_DTYPES}")
    return BlockLayout(len(cache.layers), int(shape[1]), tokens_per_block, int(shape[3]), dtype)
