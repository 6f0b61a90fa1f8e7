"""rotation: keys from the positions they were computed at to the positions their tokens have now."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvservice_adapters.positions.rope import Rope, RopeForm


@dataclass(frozen=True, slots=True)
class Turn:
    """The rotation of some tokens' keys, the same in every layer. Made by `turn_between`.

    Attributes:
        cosine, sine: of the angle of each token and pair of dimensions, float32 [..., tokens, pairs].
        stays: which tokens do not move, bool [..., tokens]; None: every one moves.
    """

    rope: Rope
    cosine: torch.Tensor
    sine: torch.Tensor
    stays: torch.Tensor | None

    def apply(self, keys: torch.Tensor) -> None:
        """Put those tokens' keys [..., tokens, head_dim] where they stand now, in place; see `moved`."""
        if keys.shape[-1] < self.rope.rotary_dims:
            raise ValueError(f"heads of {keys.shape[-1]} dimensions, of which {self.rope.rotary_dims} are rotated")
        if not self.rope.rotates:
            return
        first, second = _pairs(keys, self.rope)
        one, other = first.float(), second.float()
        new_first = (one * self.cosine).sub_(other * self.sine)
        new_second = (other * self.cosine).add_(one * self.sine)
        if self.stays is not None:
            # 0 * inf and the sign of zero would not survive a rotation by nothing.
            new_first = torch.where(self.stays[..., None], first, new_first.to(keys.dtype))
            new_second = torch.where(self.stays[..., None], second, new_second.to(keys.dtype))
        first.copy_(new_first)
        second.copy_(new_second)

    def at(self, place: int) -> Turn:
        """The part of it at a place of its first dimension."""
        stays = None if self.stays is None else self.stays[place]
        return Turn(self.rope, self.cosine[place], self.sine[place], stays)

    def transposed(self) -> Turn:
        """The same, faster for keys of which a dimension's tokens lie next to each other in memory."""
        cosine, sine = (part.mT.contiguous().mT for part in (self.cosine, self.sine))
        return Turn(self.rope, cosine, sine, self.stays)


def turn_between(rope: Rope, *, computed_at: torch.Tensor, now_at: torch.Tensor) -> Turn:
    """The rotation from one position to another; both int64 [..., tokens], as in `moved`.

    The angle between two positions is taken between the angles that engines use (float32 products of position and
    frequency, off by up to 2e-3 at position 32,768), so that the result agrees with theirs and not with the ideal.
    """
    inverse = torch.tensor(rope.inverse_frequencies, dtype=torch.float32, device=now_at.device)
    cosine, sine = cosine_and_sine(inverse, computed_at=computed_at, now_at=now_at)
    stays = computed_at == now_at
    return Turn(rope, cosine, sine, stays if bool(stays.any()) else None)


def cosine_and_sine(
    inverse_frequencies: torch.Tensor, *, computed_at: torch.Tensor, now_at: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of that rotation's angles, float32 [..., tokens, pairs]; on a GPU nothing waits for it.

    Args:
        inverse_frequencies: a Rope's, float32 [pairs], where the positions are.
    """
    before = computed_at[..., None].float() * inverse_frequencies
    after = now_at[..., None].float() * inverse_frequencies
    angle = after.double() - before.double()
    return angle.cos().float(), angle.sin().float()


def moved(keys: torch.Tensor, rope: Rope, *, computed_at: torch.Tensor, now_at: torch.Tensor) -> torch.Tensor:
    """Keys as the engine itself would have made them at other positions.

    The rotation is made in float32 and rounded once; a token that does not move comes back bit for bit.

    Args:
        keys: [..., tokens, head_dim], any floating dtype and device.
        computed_at: int64, broadcastable to keys.shape[:-1]: where each token stood when its key was computed.
        now_at: the same: where it stands now.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        ValueError: the head is smaller than what is rotated.
    """
    result = keys.clone()
    turn_between(rope, computed_at=computed_at.to(keys.device), now_at=now_at.to(keys.device)).apply(result)
    return result


def _pairs(keys: torch.Tensor, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
    """Views [..., pairs] of the first and the second dimension of each pair."""
    dims = rope.rotary_dims
    if rope.form is RopeForm.INTERLEAVED:
        return keys[..., 0:dims:2], keys[..., 1:dims:2]
    return keys[..., : dims // 2], keys[..., dims // 2 : dims]
