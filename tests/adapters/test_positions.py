"""Moving keys against the models' own rotary positions, for every kind that is supported; refusals for the others."""

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from kvservice_adapters.positions import Rope, RopeForm, UnsupportedPositions, moved, rope_of_config
from kvservice_adapters.transformers.positions import positions_of

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _rope(rope_type: str, **parameters: object) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": rope_type, **parameters}}


def _llama(rope_type: str, **parameters: object) -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(**_SIZES, num_key_value_heads=2, **_rope(rope_type, **parameters))


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
SUPPORTED: dict[str, tuple[Any, RopeForm, int]] = {
    "default, GQA": (lambda: _llama("default"), RopeForm.HALF_SPLIT, 16),
    "linear": (lambda: _llama("linear", factor=4.0), RopeForm.HALF_SPLIT, 16),
    "llama3": (lambda: _llama("llama3", **_LLAMA3), RopeForm.HALF_SPLIT, 16),
    "yarn": (lambda: _llama("yarn", factor=4.0, original_max_position_embeddings=128), RopeForm.HALF_SPLIT, 16),
    "QK-norm": (
        lambda: transformers.Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=16),
        RopeForm.HALF_SPLIT,
        16,
    ),
    "partial": (
        lambda: transformers.GPTNeoXConfig(**_SIZES, **_rope("default", partial_rotary_factor=0.25)),
        RopeForm.HALF_SPLIT,
        4,
    ),
    "partial, half": (
        lambda: transformers.PhiConfig(**_SIZES, **_rope("default", partial_rotary_factor=0.5)),
        RopeForm.HALF_SPLIT,
        8,
    ),
    "interleaved": (lambda: transformers.CohereConfig(**_SIZES, num_key_value_heads=2), RopeForm.INTERLEAVED, 16),
    "interleaved, partial": (
        lambda: transformers.GlmConfig(
            **_SIZES, num_key_value_heads=2, head_dim=16, **_rope("default", partial_rotary_factor=0.5)
        ),
        RopeForm.INTERLEAVED,
        8,
    ),
}


def _model(config: transformers.PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    return model


@torch.inference_mode()
def _first_layer_keys(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[kv_heads, tokens, head_dim]: of the token and its position only, whatever came before."""
    cache = transformers.DynamicCache(config=model.config)
    model(input_ids=tokens[None], past_key_values=cache, use_cache=True)
    keys: torch.Tensor = next(iter(cache))[0][0]
    return keys


@pytest.mark.parametrize("kind", SUPPORTED)
def test_the_rotation_is_found_by_trying(kind: str) -> None:
    make_config, form, rotary_dims = SUPPORTED[kind]
    rope = positions_of(_model(make_config()))
    assert (rope.form, rope.rotary_dims) == (form, rotary_dims)


@pytest.mark.parametrize("kind", SUPPORTED)
@pytest.mark.parametrize("shift", [1, 16, 240])
def test_moved_keys_are_the_models_own_at_the_new_position(kind: str, shift: int) -> None:
    model = _model(SUPPORTED[kind][0]())
    rope = positions_of(model)
    tokens = torch.randint(64, (40,), generator=torch.Generator().manual_seed(1))
    late = _first_layer_keys(model, torch.cat([torch.zeros(shift, dtype=torch.int64), tokens]))[:, shift:]
    early = _first_layer_keys(model, tokens)
    places = torch.arange(40)
    result = moved(late, rope, computed_at=places + shift, now_at=places)
    torch.testing.assert_close(result, early, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(late, early, atol=1e-2), "the shift does not show in these keys: nothing was tested"


def test_moved_twice_is_moved_once() -> None:
    model = _model(_llama("default"))
    rope = positions_of(model)
    keys = _first_layer_keys(model, torch.arange(30))
    at = torch.arange(30)
    twice = moved(moved(keys, rope, computed_at=at, now_at=at + 7), rope, computed_at=at + 7, now_at=at + 90)
    torch.testing.assert_close(twice, moved(keys, rope, computed_at=at, now_at=at + 90), rtol=1e-5, atol=1e-4)


def test_at_large_positions_the_angles_are_the_engines() -> None:
    rope = Rope(tuple(10_000.0 ** (-first / 64) for first in range(0, 64, 2)))
    plain = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(3))

    def engines(position: int) -> torch.Tensor:
        angles = torch.tensor([position]).float()[:, None] * torch.tensor(rope.inverse_frequencies)
        cosine, sine = torch.cat([angles.cos()] * 2, dim=-1), torch.cat([angles.sin()] * 2, dim=-1)
        return plain * cosine + torch.cat([-plain[..., 32:], plain[..., :32]], dim=-1) * sine

    result = moved(engines(100_003), rope, computed_at=torch.tensor([100_003]), now_at=torch.tensor([70_001]))
    torch.testing.assert_close(result, engines(70_001), rtol=0, atol=2e-6)


def test_keys_without_positions_stay_as_they_are() -> None:
    model = _model(transformers.BloomConfig(vocab_size=64, hidden_size=64, n_layer=2, n_head=4))
    rope = positions_of(model)
    keys = torch.randn(2, 5, 16)
    assert not rope.rotates
    assert torch.equal(moved(keys, rope, computed_at=torch.arange(5), now_at=torch.arange(5) + 3), keys)


REFUSED = {
    "dynamic NTK": (lambda: _llama("dynamic", factor=4.0), "dynamic"),
    "learned positions": (
        lambda: transformers.OPTConfig(
            vocab_size=64,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            word_embed_proj_dim=64,
        ),
        "learned or absolute",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_move_is_refused_with_the_reason(kind: str) -> None:
    make_config, reason = REFUSED[kind]
    with pytest.raises(UnsupportedPositions, match=reason):
        positions_of(_model(make_config()))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"kv_lora_rank": 64}, "MLA"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}, "M-RoPE"),
        ({"rope_parameters": {"full": {"rope_type": "default"}, "sliding": {"rope_type": "default"}}}, "different"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "LongRoPE"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "not known"),
    ],
)
def test_a_configuration_that_cannot_move_is_refused(changed: dict[str, object], reason: str) -> None:
    config = _llama("default")
    for name, value in changed.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedPositions, match=reason):
        rope_of_config(config)


def test_a_model_that_does_not_do_what_its_configuration_says_is_refused() -> None:
    model = _model(_llama("default"))
    model.config.rope_parameters["rope_theta"] = 500.0
    with pytest.raises(UnsupportedPositions, match="do not differ by the rotation"):
        positions_of(model)


_DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def _ropes(draw: st.DrawFn) -> Rope:
    pairs = draw(st.integers(1, 32))
    theta = draw(st.sampled_from([500.0, 10_000.0, 1_000_000.0]))
    return Rope(tuple(theta ** (-pair / pairs) for pair in range(pairs)), draw(st.sampled_from(RopeForm)))


@given(rope=_ropes(), spare=st.integers(0, 16), dtype=_DTYPES, seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_no_shift_changes_no_bit(rope: Rope, spare: int, dtype: torch.dtype, seed: int) -> None:
    keys = torch.randn(2, 6, rope.rotary_dims + spare, generator=torch.Generator().manual_seed(seed)).to(dtype)
    keys[0, 0, 0], keys[0, 1, 0], keys[1, 2, 0] = float("inf"), float("nan"), -0.0
    at = torch.tensor([0, 5, 17, 17, 900, 31_000])
    result = moved(keys, rope, computed_at=at, now_at=at)
    assert result.view(torch.uint8).equal(keys.view(torch.uint8))


@given(
    rope=_ropes(),
    spare=st.integers(0, 16),
    start=st.integers(0, 5_000),
    shift=st.integers(-5_000, 5_000),
    dtype=_DTYPES,
)
@settings(max_examples=100, deadline=None)
def test_a_move_is_a_rotation_of_its_pairs(rope: Rope, spare: int, start: int, shift: int, dtype: torch.dtype) -> None:
    keys = torch.randn(3, 4, rope.rotary_dims + spare, generator=torch.Generator().manual_seed(start)).to(dtype)
    before, after = torch.arange(4) + start + 5_000, torch.arange(4) + start + 5_000 + shift
    result = moved(keys, rope, computed_at=before, now_at=after)
    assert result.dtype == dtype
    assert result[..., rope.rotary_dims :].equal(keys[..., rope.rotary_dims :]), "a dimension that carries no position"
    turned, plain = result[..., : rope.rotary_dims].double(), keys[..., : rope.rotary_dims].double()
    half = rope.rotary_dims // 2
    for pair, frequency in enumerate(rope.inverse_frequencies):
        one, other = (2 * pair, 2 * pair + 1) if rope.form is RopeForm.INTERLEAVED else (pair, pair + half)
        angle = torch.tensor(shift * frequency, dtype=torch.float64)
        wanted = plain[..., one] * angle.cos() - plain[..., other] * angle.sin()
        allowed = {torch.float32: 6e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}[dtype]  # engines' float32 angles
        torch.testing.assert_close(turned[..., one], wanted, rtol=0, atol=allowed)


def test_a_head_smaller_than_its_rotation_is_an_error() -> None:
    with pytest.raises(ValueError, match="8 dimensions, of which 16"):
        moved(torch.zeros(1, 8), Rope((1.0,) * 8), computed_at=torch.tensor([0]), now_at=torch.tensor([1]))
