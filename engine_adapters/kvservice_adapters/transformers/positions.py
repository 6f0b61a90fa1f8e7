"""positions: how the keys of a loaded transformers model carry positions, proved on the model itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from kvservice_adapters.positions import Rope, RopeForm, UnsupportedPositions, moved, rope_of_config
from kvservice_adapters.positions.rope import NO_ROTATION
from kvservice_client import ShiftedBlocks

_PROBED_TOKENS = 201
_TOLERANCE = {torch.float32: 2e-4, torch.float16: 8e-3, torch.bfloat16: 5e-2}  # of the largest key; a few roundings


def positions_of(model: PreTrainedModel) -> Rope:
    """What the model's keys say of positions. Runs one short sequence through it.

    A configuration does not say which dimensions are a pair, and remote code need not do what its configuration
    says. So it is tried: in a sequence of one token repeated, whatever attention looks at is the same, and the keys of
    every layer differ by their positions and by nothing else.

    Raises:
        UnsupportedPositions: the reason is in the message.
    """
    keys = _keys_of_one_token_repeated(model)
    positions = torch.arange(keys.shape[-2])
    if _agree(keys, keys[..., :1, :].expand_as(keys)):
        return NO_ROTATION
    for form in RopeForm:
        rope = rope_of_config(model.config, form=form)
        if rope.rotary_dims > keys.shape[-1]:
            continue
        if _agree(keys, moved(keys[..., :1, :].expand_as(keys), rope, computed_at=0 * positions, now_at=positions)):
            return rope
    raise UnsupportedPositions(
        f"{type(model).__name__}: its keys at two positions do not differ by the rotation that its configuration says"
    )


def move_keys(blocks: torch.Tensor, rope: Rope, shifted: Sequence[ShiftedBlocks]) -> None:
    """Rotate, in place, the keys of blocks whose tokens moved to where they stand now.

    Args:
        blocks: [blocks, layers, 2, kv_heads, tokens_per_block, head_dim], the leading ones of a sequence.
    """
    tokens = blocks.shape[-2]
    for run in shifted:
        keys = blocks[run.first_block : run.first_block + run.blocks, :, 0]
        places = torch.arange(run.first_block * tokens, (run.first_block + run.blocks) * tokens, device=blocks.device)
        now_at = places.view(run.blocks, 1, 1, tokens)
        keys.copy_(moved(keys, rope, computed_at=now_at - run.shift_tokens, now_at=now_at))


@torch.inference_mode()
def _keys_of_one_token_repeated(model: PreTrainedModel) -> torch.Tensor:
    """Every layer's keys, [layers, kv_heads, tokens, head_dim]; the token's position is its place."""
    cache = DynamicCache(config=model.config)
    tokens = torch.ones((1, _PROBED_TOKENS), dtype=torch.long, device=model.device)
    model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return torch.stack([keys[0] for keys, _, _ in cache])


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    scale = float(one.float().abs().max())
    return float((one.float() - other.float()).abs().max()) <= _TOLERANCE[one.dtype] * scale
