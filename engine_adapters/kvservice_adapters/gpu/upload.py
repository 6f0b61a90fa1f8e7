"""upload: small arrays onto the GPU without waiting for what it has to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def uploaded(values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """These values as a tensor [len(values)] there; later work of torch's current stream finds them."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    # From pageable memory torch would wait for the stream, and so for the engine's step.
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
