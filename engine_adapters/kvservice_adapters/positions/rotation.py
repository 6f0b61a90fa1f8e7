"""rotation: keys from the positions they were computed at to the positions their tokens have now."""

from __future__ import annotations

import torch

from kvservice_adapters.positions.rope import Rope, RopeForm


def moved(keys: torch.Tensor, rope: Rope, *, computed_at: torch.Tensor, now_at: torch.Tensor) -> torch.Tensor:
    """Keys as the engine itself would have made them at other positions.

    The angle between two positions is taken between the angles that engines use (float32 products of position and
    frequency, off by up to 2e-3 at position 32,768), so that the result agrees with theirs and not with the ideal. The
    rotation is made in float32 and rounded once; a token that does not move comes back bit for bit.

    Args:
        keys: [..., tokens, head_dim], any floating dtype and device.
        computed_at: int64, broadcastable to keys.shape[:-1]: where each token stood when its key was computed.
        now_at: the same: where it stands now.

    Returns:
        A new tensor of the same shape and dtype, or `keys` itself where no key carries a position.

    Raises:
        ValueError: the head is smaller than what is rotated.
    """
    if keys.shape[-1] < rope.rotary_dims:
        raise ValueError(f"heads of {keys.shape[-1]} dimensions, of which {rope.rotary_dims} are rotated")
    if not rope.rotates:
        return keys
    cosine, sine = _turn(rope, computed_at.to(keys.device), now_at.to(keys.device))
    first, second = _pairs(keys.float(), rope)
    result = keys.clone()
    new_first, new_second = _pairs(result, rope)
    new_first.copy_(first * cosine - second * sine)
    new_second.copy_(second * cosine + first * sine)
    stays = (computed_at == now_at).to(keys.device)
    return torch.where(stays[..., None], keys, result)  # 0 * inf and the sign of zero would not survive


def _turn(rope: Rope, computed_at: torch.Tensor, now_at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the angle of each token and pair, float32 [..., tokens, pairs]."""
    inverse = torch.tensor(rope.inverse_frequencies, dtype=torch.float32, device=now_at.device)
    before = computed_at[..., None].float() * inverse
    after = now_at[..., None].float() * inverse
    angle = after.double() - before.double()
    return angle.cos().float(), angle.sin().float()


def _pairs(keys: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
    """Views [..., pairs] of the first and the second dimension of each pair."""
    dims = rope.rotary_dims
    if rope.form is RopeForm.INTERLEAVED:
        return keys[..., 0:dims:2], keys[..., 1:dims:2]
    return keys[..., : dims // 2], keys[..., dims // 2 : dims]
