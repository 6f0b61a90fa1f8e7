"""counting: how many positions went through the model's forward, seen from the model's side."""

from typing import Any

import torch
from transformers import PreTrainedModel


class ForwardCounter:
    """Counts input positions by a hook on the model, so that no adapter can flatter itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.positions = 0
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids")
        if ids is None and args:
            ids = args[0]
        if ids is None:
            embeds = kwargs["inputs_embeds"]
            self.positions += int(embeds.shape[0] * embeds.shape[1])
        else:
            self.positions += int(ids.numel())

    def detach(self) -> None:
        """Remove the hook."""
        self._hook.remove()
