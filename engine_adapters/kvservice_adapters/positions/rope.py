"""rope: which dimensions of a key are rotated, in which pairs, how fast; and which models this cannot be said of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_STATIC_TYPES = ("default", "linear", "llama3", "yarn")
_CHANGING_TYPES: Mapping[str, str] = {
    "dynamic": "its frequencies change with the length of the sequence (dynamic NTK)",
    "longrope": "its frequencies change where a sequence outgrows the original window (LongRoPE)",
}


class UnsupportedPositions(ValueError):
    """Saved keys of this model cannot be moved; the message says why. Its truncated conversations are recomputed."""


class RopeForm(Enum):
    """Which two dimensions turn together, of the first `rotary_dims` of a head."""

    HALF_SPLIT = "half-split"
    """i and i + rotary_dims / 2: Llama, Qwen, GPT-NeoX."""
    INTERLEAVED = "interleaved"
    """2 i and 2 i + 1: GPT-J, Cohere, GLM."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Static rotary positions of every head of every layer.

    Attributes:
        inverse_frequencies: radians per position of each pair of dimensions; none where keys carry no position (ALiBi).
        form: which dimensions are a pair.
    """

    inverse_frequencies: tuple[float, ...]
    form: RopeForm = RopeForm.HALF_SPLIT

    @property
    def rotary_dims(self) -> int:
        """How many leading dimensions of a head are rotated; the others stay."""
        return 2 * len(self.inverse_frequencies)

    @property
    def rotates(self) -> bool:
        """Whether keys carry their position at all."""
        return bool(self.inverse_frequencies)


NO_ROTATION = Rope(())
"""Keys that are the same at every position: ALiBi adds its bias to the scores instead."""


def rope_of_config(config: PretrainedConfig, *, form: RopeForm = RopeForm.HALF_SPLIT) -> Rope:
    """The rotary positions that a transformers configuration (vLLM's `hf_config` too) describes.

    Args:
        form: not in configurations; it is the architecture's.

    Raises:
        UnsupportedPositions: the reason is in the message.
    """
    name = str(config.model_type)
    described: Any = getattr(config, "rope_parameters", None)
    if getattr(config, "kv_lora_rank", None) is not None:
        raise UnsupportedPositions(f"{name} keeps a latent vector and one shared rotated key (MLA): not proven to move")
    if not described:
        raise UnsupportedPositions(f"{name} describes no rotary positions: learned or absolute positions cannot move")
    if "rope_type" not in described:
        raise UnsupportedPositions(f"{name} has different rotary positions in different layers")
    if "mrope_section" in described:
        raise UnsupportedPositions(
            f"{name} has positions in several dimensions (M-RoPE): one shift does not say it all"
        )
    rope_type = described["rope_type"]
    if rope_type not in _STATIC_TYPES:
        why = _CHANGING_TYPES.get(rope_type, "that type is not known to have fixed frequencies")
        raise UnsupportedPositions(f"{name} has rotary positions of type {rope_type!r}: {why}")
    return Rope(tuple(_inverse_frequencies(config, rope_type)), form)


def _inverse_frequencies(config: PretrainedConfig, rope_type: str) -> list[float]:
    # The library's own formulas (YaRN: arXiv 2309.00071; linear: 2306.15595; llama3: Llama 3.1's release). YaRN's
    # factor on cosine and sine is in the stored key already, and stays.
    if rope_type == "default":
        described: Any = config
        parameters = described.rope_parameters
        head_dim = getattr(described, "head_dim", None) or described.hidden_size // described.num_attention_heads
        dims = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        return [parameters["rope_theta"] ** (-first / dims) for first in range(0, dims, 2)]
    inverse, _ = ROPE_INIT_FUNCTIONS[rope_type](config, None)
    return [float(value) for value in inverse]
