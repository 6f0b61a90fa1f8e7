"""upload: small arrays onto the GPU without waiting for what it has to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def uploaded(
    values: Sequence[int] | Sequence[float] | torch.Tensor, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """These values, of the CPU, as a tensor [len(values)] there; later work of torch's current stream finds them."""
    if isinstance(values, range):  # fifteen times as fast as number by number
        made = torch.arange(values.start, values.stop, values.step, dtype=dtype)
    else:
        made = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return made.to(device)
    # From pageable memory torch would wait for the stream, and so for the engine's step.
    return made.pin_memory().to(device, non_blocking=True)
