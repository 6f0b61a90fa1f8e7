"""Which models are refused, with the reason; which are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvservice_adapters.serving import ServingLoop
from kvservice_adapters.transformers import UnsupportedModel, layout_of, serve_model

pytestmark = [pytest.mark.engines, pytest.mark.timeout(120)]

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": None,
}


def rope(kind: str, **more: object) -> dict[str, object]:
    return {"rope_type": kind, "rope_theta": 10_000.0, **more}


REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "Mistral": (transformers.MistralConfig(**SIZES, sliding_window=16), "sliding-window layers"),
    "Gemma 2": (transformers.Gemma2Config(**SIZES), "sliding-window layers"),
    "Qwen 3 Next": (
        transformers.Qwen3NextConfig(**SIZES, layer_types=["linear_attention", "full_attention"]),
        "hybrid: layers of kind LinearAttentionLayer",
    ),
    "DeepSeek V3": (
        transformers.DeepseekV3Config(**SIZES, kv_lora_rank=8, q_lora_rank=8, n_routed_experts=8, n_group=2),
        "multi-head latent attention",
    ),
    "T5": (transformers.T5Config(d_model=32, d_ff=32, num_layers=2, vocab_size=64), "encoder-decoder"),
    "GPT 2": (transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64), "no rotary position"),
    "dynamic": (
        transformers.LlamaConfig(**SIZES, rope_parameters=rope("dynamic", factor=2.0)),
        "changes with the length of the sequence",
    ),
    "longrope": (
        transformers.LlamaConfig(
            **SIZES,
            rope_parameters=rope(
                "longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=64
            ),
        ),
        "changes with the length of the sequence",
    ),
}

SERVED: dict[str, PreTrainedConfig] = {
    "Llama": transformers.LlamaConfig(**SIZES),
    "Llama 3": transformers.LlamaConfig(
        **SIZES,
        rope_parameters=rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=1024
        ),
    ),
    "Qwen 2": transformers.Qwen2Config(**SIZES),
    "Qwen 3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "Mistral": transformers.MistralConfig(**SIZES, sliding_window=None),
}


def made(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    auto = AutoModel if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config)  # type: ignore[no-untyped-call]
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_whose_cache_is_not_named_by_its_tokens_is_refused(name: str) -> None:
    config, reason = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=reason):
        serve_model(made(config), weights_identity="w")


@pytest.mark.parametrize("name", SERVED)
def test_decoders_with_full_attention_are_served(name: str) -> None:
    config = SERVED[name]
    layout = layout_of(made(config), tokens_per_block=8)
    head_dim = 16 if name == "Qwen 3" else 8
    assert layout.block_shape == (2, 2, 2, 8, head_dim)
    assert layout.block_size_bytes == 2 * 2 * 2 * 8 * head_dim * 4


def test_an_unknown_attention_is_refused_by_the_loop() -> None:
    model = made(SERVED["Llama"])
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModel, match="flex_attention"):
        ServingLoop(model)


def test_a_model_with_peft_adapters_is_refused() -> None:
    model = made(SERVED["Llama"])
    # What transformers sets when it loads an adapter; peft itself is not needed to see the refusal.
    model._hf_peft_config_loaded = True
    with pytest.raises(UnsupportedModel, match="merge them first"):
        serve_model(model, weights_identity="w")
