"""model: makes the demo's small Llama, with seeded random weights, without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

_SEED = 20_260


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama; by default a prompt's prefill costs about 0.3 ms per token on two idle cores."""

    layers: int = 6
    hidden: int = 512
    intermediate: int = 1408
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    vocabulary: int = 4096
    window_tokens: int = 8192


# On a GPU a small model waits for its kernels to be launched, with and without history.
GPU_SHAPE = ModelShape(
    layers=12, hidden=2048, intermediate=5632, heads=16, kv_heads=4, head_dim=128, vocabulary=8192, window_tokens=16_384
)
QUICK_SHAPE = ModelShape(
    layers=3, hidden=256, intermediate=512, heads=4, kv_heads=2, head_dim=64, vocabulary=1024, window_tokens=2048
)


def write_model(folder: Path, shape: ModelShape | None = None) -> None:
    """Write config.json and model.safetensors (float32) into a folder; the same bytes every time.

    The weights are scaled so that attention is selective and its output a good part of every layer's:
    a freshly initialised model hardly looks at its history, and wrong keys and values would not show.
    """
    shape = shape or ModelShape()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_weights(shape), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.window_tokens,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "dtype": "float32",
        "vocab_size": shape.vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _weights(shape: ModelShape) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    random = np.random.default_rng(_SEED)

    def matrix(rows: int, columns: int, gain: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        # With inputs of unit variance the outputs have standard deviation `gain`.
        scale = np.float32(gain / columns**0.5)
        return random.standard_normal((rows, columns), dtype=np.float32) * scale

    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    ones = np.ones(shape.hidden, dtype=np.float32)
    weights = {
        "model.embed_tokens.weight": random.standard_normal((shape.vocabulary, shape.hidden), dtype=np.float32),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(shape.vocabulary, shape.hidden, 2.0),
    }
    for layer in range(shape.layers):
        name = f"model.layers.{layer}"
        weights |= {
            f"{name}.input_layernorm.weight": ones,
            f"{name}.post_attention_layernorm.weight": ones,
            f"{name}.self_attn.q_proj.weight": matrix(queries, shape.hidden, 1.5),
            f"{name}.self_attn.k_proj.weight": matrix(keys, shape.hidden, 1.5),
            f"{name}.self_attn.v_proj.weight": matrix(keys, shape.hidden, 1.0),
            f"{name}.self_attn.o_proj.weight": matrix(shape.hidden, queries, 3.0),
            f"{name}.mlp.gate_proj.weight": matrix(shape.intermediate, shape.hidden, 1.0),
            f"{name}.mlp.up_proj.weight": matrix(shape.intermediate, shape.hidden, 1.0),
            f"{name}.mlp.down_proj.weight": matrix(shape.hidden, shape.intermediate, 0.5),
        }
    # Shared arrays would be written as shared tensors, which the format does not allow.
    return {name: array.copy() for name, array in weights.items()}
