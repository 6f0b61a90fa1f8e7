"""sampling: from logits to the next token."""

import torch

from kvservice_adapters.serving.requests import Sampling


class TokenChooser:
    """Chooses one request's tokens; a drawn sequence depends on seed and logits only, not on the batch it ran in."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token after logits [vocabulary]; blocks until they are computed."""
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        scaled = logits.float().cpu() / self._sampling.temperature
        if 0 < self._sampling.top_k < scaled.numel():
            least = scaled.topk(self._sampling.top_k).values[-1]
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        return int(torch.multinomial(scaled.softmax(dim=-1), 1, generator=self._generator))
