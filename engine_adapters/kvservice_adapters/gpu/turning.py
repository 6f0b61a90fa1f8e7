"""turning: by how much the keys of some blocks turn on their way into the engine's cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvservice_adapters.gpu.upload import uploaded
from kvservice_adapters.positions import Rope, RopeForm, cosine_and_sine


@dataclass(frozen=True, slots=True)
class Turned:
    """The rotation of the keys of the blocks that moved, the same in every layer and head. Made by `turned`.

    Attributes:
        form: which dimensions of a head turn together, of its first 2 * pairs.
        cosine, sine: of the angle of each token and pair of dimensions, float32 [turned blocks, tokens, pairs].
        row: int32 [blocks]: of each block of a run its row in these tables; -1: it did not move, and is copied bit for
            bit.
    """

    form: RopeForm
    cosine: torch.Tensor
    sine: torch.Tensor
    row: torch.Tensor

    @property
    def tokens(self) -> int:
        """Of a block."""
        return int(self.cosine.shape[1])

    @property
    def rotary_dims(self) -> int:
        """How many leading dimensions of a head turn."""
        return 2 * int(self.cosine.shape[2])


def turned(
    rope: Rope, shifts_tokens: Sequence[int], *, first_place: int, tokens: int, device: torch.device
) -> Turned | None:
    """The rotation of consecutive blocks of a request, made on torch's current stream; None: no key turns.

    Args:
        shifts_tokens: where each block's tokens stand now, less where they stood when their keys were computed.
        first_place: of the first block in the request, in blocks.
        tokens: of a block.
    """
    shifted = [at for at, shift in enumerate(shifts_tokens) if shift]
    if not shifted or not rope.rotates:
        return None
    rows = [-1] * len(shifts_tokens)
    for row, at in enumerate(shifted):
        rows[at] = row
    first_tokens = [(first_place + at) * tokens for at in shifted]
    shifts = [shifts_tokens[at] for at in shifted]
    numbers = uploaded(first_tokens + shifts, torch.int64, device).view(2, len(shifted), 1)
    now_at = numbers[0] + torch.arange(tokens, device=device)
    inverse = uploaded(rope.inverse_frequencies, torch.float32, device)
    cosine, sine = cosine_and_sine(inverse, computed_at=now_at - numbers[1], now_at=now_at)
    return Turned(rope.form, cosine, sine, uploaded(rows, torch.int32, device))
