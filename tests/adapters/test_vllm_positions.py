"""Which models' keys the vLLM adapter turns, and how: tried on the keys that a real engine computes for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Glm4Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from kvservice_adapters.positions import RopeForm, rope_of_config
from tests.adapters.vllm_engine import TOKENS_PER_BLOCK, VllmEngine
from tests.adapters.vllm_scenes import answer
from tests.daemons import DaemonProcess

pytestmark = [pytest.mark.engines, pytest.mark.timeout(180)]

TOKENS = 6 * TOKENS_PER_BLOCK
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED: dict[str, Any] = SHAPE | {"intermediate_size": 256, "num_key_value_heads": 2, "head_dim": 32}
UNSAID = {name: value for name, value in GROUPED.items() if name != "head_dim"}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}


@dataclass(frozen=True)
class Case:
    """A model, and in which pairs its keys turn; None: not at all."""

    config: PretrainedConfig
    form: RopeForm | None = RopeForm.HALF_SPLIT

    def __str__(self) -> str:
        return f"{self.config.model_type} {(getattr(self.config, 'rope_parameters', None) or {}).get('rope_type')}"


CASES = [
    Case(LlamaConfig(**GROUPED, rope_parameters=LLAMA3)),
    Case(MistralConfig(**GROUPED, sliding_window=None, rope_parameters=YARN)),
    Case(Qwen2Config(**GROUPED, rope_parameters=LINEAR)),
    Case(Qwen3Config(**GROUPED)),
    Case(StableLmConfig(**UNSAID, rope_parameters=PARTIAL)),
    Case(Glm4Config(**GROUPED), RopeForm.INTERLEAVED),
    Case(CohereConfig(**UNSAID), RopeForm.INTERLEAVED),
    Case(BloomConfig(**SHAPE, n_layer=2, n_head=4), None),
]


def write(config: PretrainedConfig, folder: Path) -> Path:
    """A model of that kind with random weights, on disk."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    return folder


def turned(key: torch.Tensor, config: PretrainedConfig, form: RopeForm, tokens: int) -> torch.Tensor:
    """A key [..., head_dim] of position 0 at every position [..., tokens, head_dim], in float64."""
    rope = rope_of_config(config, form=form)
    inverse = torch.tensor(rope.inverse_frequencies, dtype=torch.float64)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * inverse
    dims, pairs = rope.rotary_dims, len(inverse)
    is_half_split = form is RopeForm.HALF_SPLIT
    first_at, second_at = (
        (torch.arange(pairs), torch.arange(pairs) + pairs)
        if is_half_split
        else (torch.arange(0, dims, 2), torch.arange(1, dims, 2))
    )
    result = key.double()[..., None, :].repeat_interleave(tokens, dim=-2)
    first, second = result[..., first_at], result[..., second_at]
    result[..., first_at] = first * angle.cos() - second * angle.sin()
    result[..., second_at] = second * angle.cos() + first * angle.sin()
    return result.float()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layer_turns_its_keys_as_the_adapter_says(
    vllm: VllmEngine, served_daemon: DaemonProcess, tmp_path: Path, case: Case
) -> None:
    """In a sequence of one token repeated, keys differ by their positions and by nothing else."""
    vllm.open_attached(write(case.config, tmp_path / "model"), served_daemon, max_model_len=512)
    assert vllm.do("refusal") == ""
    answer(vllm, [7] * (TOKENS + 1), tokens=1)
    vllm.do("keys", path=str(tmp_path / "keys.npy"))
    blocks = torch.from_numpy(np.load(tmp_path / "keys.npy"))
    keys = blocks.transpose(1, 2).flatten(2, 3)
    assert keys.shape[2] == TOKENS
    scale = float(keys.abs().max())
    first = keys[:, :, 0]
    form, dims = vllm.do("rope")
    if case.form is None:
        assert dims == 0
        expected = first[:, :, None].expand_as(keys)
    else:
        assert (form, dims) == (case.form.name, rope_of_config(case.config).rotary_dims)
        expected = turned(first, case.config, case.form, TOKENS)
        assert (keys - first[:, :, None]).abs().max() > 0.1 * scale
    torch.testing.assert_close(keys, expected, atol=2e-4 * scale, rtol=0)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (GPT2Config(vocab_size=512, n_positions=512, n_embd=128, n_layer=2, n_head=4), "learned or absolute positions"),
        (LlamaConfig(**GROUPED, rope_parameters=DYNAMIC), "dynamic NTK"),
    ],
    ids=["learned", "dynamic"],
)
def test_a_model_whose_keys_cannot_move_is_refused_with_the_reason_and_computed(
    vllm: VllmEngine, served_daemon: DaemonProcess, tmp_path: Path, config: PretrainedConfig, why: str
) -> None:
    vllm.open_attached(write(config, tmp_path / "model"), served_daemon, max_model_len=512)
    conversation = [7, *range(TOKENS)]
    answer(vllm, conversation, cache_salt="s", params={"session_id": "s"})
    said = {"conversation": conversation, "keep": [[TOKENS_PER_BLOCK, len(conversation)]]}
    ids = conversation[TOKENS_PER_BLOCK:]
    outcome = answer(vllm, ids, cache_salt="s", params={"session_id": "s", "truncation": said})
    assert outcome["computed"] == len(ids)
    told = outcome["told"]["truncation"]
    assert told["reason"] == "unsupported"
    assert why in told["message"]
    # What needs no turning is reused as ever.
    vllm.do("drop_cache")
    assert answer(vllm, conversation, cache_salt="s")["computed"] == 1


def test_where_keys_stand_is_what_the_kernel_does(served: VllmEngine) -> None:
    """The formulas of the vector code and of AMX, against the engine's own kernels."""
    tokens, dims = 64, 96
    token, dim = torch.arange(tokens)[:, None], torch.arange(dims)
    transposed = dim * tokens + token
    in_tiles = token // 16 * (16 * dims) + dim // 2 * 32 + token % 16 * 2 + dim % 2
    kernels = [("vec", "float32", transposed), ("vec", "bfloat16", transposed), ("vec16", "float32", transposed)]
    if torch.cpu._is_amx_tile_supported():  # vLLM asks the same, and has no such kernel where it is not
        kernels.append(("amx", "bfloat16", in_tiles))
    for isa, dtype, expected in kernels:
        assert served.do("key_places", isa=isa, dtype=dtype, tokens=tokens, head_dim=dims) == expected.tolist()
