"""positions: how the keys of the engine's model carry positions, proved on its own rotary embedding; or why not.

A connector cannot reach the model, so that three things stand for a try of it: the model's architecture is one of those
whose every layer is known to rotate all its keys alike (each was run: tests/adapters/test_vllm_positions.py), its
configuration describes frequencies that are fixed, and the rotary embedding that vLLM made for it turns keys as these
frequencies say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from kvservice_adapters.positions import Rope, RopeForm, UnsupportedPositions, moved, rope_of_config
from kvservice_adapters.positions.rope import NO_ROTATION
from kvservice_adapters.vllm.keys import CacheWriter, KeyTurner, LayerKeys, layer_keys

ROTARY_ARCHITECTURES = frozenset({
    "CohereForCausalLM", "Glm4ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM",
    "Qwen3ForCausalLM", "StableLmForCausalLM",
})  # fmt: skip
ALIBI_ARCHITECTURES = frozenset({"BloomForCausalLM"})

_PROBED_POSITIONS = (*range(130), 200, 1000, 3000)
_TOLERANCE = {torch.float32: 2e-4, torch.float16: 8e-3, torch.bfloat16: 5e-2}  # of the largest key; a few roundings


def key_turner_of(vllm_config: Any, kv_caches: Mapping[str, torch.Tensor], *, blocks: int) -> KeyTurner:
    """What turns the keys in these tensors.

    Args:
        kv_caches: one tensor per layer, as the engine registers them.
        blocks: how many blocks the engine's block ids count.

    Raises:
        UnsupportedPositions: the reason is in the message.
    """
    known = vllm_config.compilation_config.static_forward_context
    attention = {name: known[name] for name in kv_caches}
    rope = _rope_of(vllm_config, attention.values())
    layers: dict[int, LayerKeys] = {}
    kernel_tokens = set()
    for name, tensor in kv_caches.items():
        layer = attention[name]
        if tensor.data_ptr() not in layers:
            layers[tensor.data_ptr()] = layer_keys(
                tensor,
                backend=layer.attn_backend.get_name(),
                head_dim=layer.head_size,
                write=_cpu_writer(vllm_config, layer.head_size),
            )
        kernel_tokens.add((tensor.shape[0], tensor.shape[2], tensor.device))
    if len(kernel_tokens) != 1:
        raise UnsupportedPositions(f"its layers keep blocks of different sizes: {kernel_tokens}")
    kernel_blocks, tokens, device = kernel_tokens.pop()
    return KeyTurner(rope, layers, device, kernel_blocks=kernel_blocks // blocks, kernel_tokens=tokens)


def _rope_of(vllm_config: Any, attention: Iterable[Any]) -> Rope:
    model = vllm_config.model_config
    config = model.hf_text_config
    (architecture,) = model.architectures[:1] or ("a model without a name",)
    if vllm_config.speculative_config is not None and vllm_config.speculative_config.draft_model_config is not None:
        raise UnsupportedPositions("a draft model keeps keys of its own beside the model's: not proven to move")
    if "fp8" in str(vllm_config.cache_config.cache_dtype):
        raise UnsupportedPositions("keys are kept in fp8: rotating them would round them a second time")
    layers = list(attention)
    if architecture in ALIBI_ARCHITECTURES and all(_has_alibi(layer) for layer in layers):
        return NO_ROTATION
    described = rope_of_config(config)
    if architecture not in ROTARY_ARCHITECTURES:
        raise UnsupportedPositions(f"{architecture} was not tried: its layers may treat positions in different ways")
    embeddings = _rotary_embeddings(config, {layer.head_size for layer in layers})
    for form in RopeForm:
        rope = Rope(described.inverse_frequencies, form)
        if embeddings and all(_turns_like(embedding, rope) for embedding in embeddings):
            return rope
    if not embeddings:
        raise UnsupportedPositions(f"{architecture} does not run with the engine's own rotary embedding: not proven")
    raise UnsupportedPositions(f"{architecture}: its rotary embedding does not turn keys as its configuration says")


def _has_alibi(layer: Any) -> bool:
    return getattr(layer.impl, "alibi_slopes", None) is not None


def _rotary_embeddings(config: Any, head_sizes: set[int]) -> list[Any]:
    """The engine's own modules for that configuration: it keeps one of each kind, for all layers that want it."""
    from vllm.model_executor.layers import rotary_embedding  # noqa: PLC0415  # there only where workers are

    wanted = {name: _hashable(value) for name, value in config.rope_parameters.items()}
    return [
        made
        for key, made in rotary_embedding._ROPE_DICT.items()  # noqa: SLF001  # the only place that knows them
        if key[0] in head_sizes and key[4] is not None and dict(key[4]) == wanted
    ]


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@torch.inference_mode()
def _turns_like(embedding: Any, rope: Rope) -> bool:
    """Whether that module rotates keys as `rope` says, from position 0 to each that is tried."""
    cache = embedding.cos_sin_cache
    if rope.rotary_dims != embedding.rotary_dim:
        return False
    positions = torch.tensor([at for at in _PROBED_POSITIONS if at < len(cache)], device=cache.device)
    random = torch.Generator().manual_seed(0)
    one = torch.randn(embedding.head_size, generator=random).to(cache.device, cache.dtype)
    given = one.expand(len(positions), -1).contiguous()
    _, keys = embedding.forward_native(positions, given.clone(), given.clone())
    expected = moved(keys[:1].expand_as(keys), rope, computed_at=torch.zeros_like(positions), now_at=positions)
    scale = float(keys.float().abs().max())
    return float((keys.float() - expected.float()).abs().max()) <= _TOLERANCE[cache.dtype] * scale


def _cpu_writer(vllm_config: Any, head_dim: int) -> CacheWriter:
    def write(keys: torch.Tensor, tensor: torch.Tensor) -> None:
        from vllm._custom_ops import cpu_attn_reshape_and_cache  # noqa: PLC0415  # not there on every platform
        from vllm.v1.attention.backends import cpu_attn  # noqa: PLC0415

        blocks, heads, tokens, _ = tensor.shape
        halves = tensor.view(blocks, heads, 2 * tokens, head_dim).chunk(2, dim=2)
        isa = cpu_attn._get_attn_isa(  # noqa: SLF001  # private, and the only place that knows
            vllm_config.model_config.dtype, tokens, head_dim, vllm_config.cache_config.cache_dtype
        )
        cpu_attn_reshape_and_cache(keys, torch.zeros_like(keys), *halves, torch.arange(tokens), isa)

    return write
