"""cache: a transformers cache that starts with what the service held."""

from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from kvservice_adapters.transformers.layout import BlockLayout, KVRows
from kvservice_adapters.transformers.sequence import TrackedSequence


class PrefixCache(DynamicCache):
    """The cache to pass to `generate` as `past_key_values`; one sequence, batch size 1."""

    def __init__(self, config: PretrainedConfig, sequence: TrackedSequence) -> None:
        super().__init__(config=config)
        self.sequence = sequence
        self.reused_tokens = 0
        self._input_checked = False

    def check_input(self, inputs: dict[str, Any]) -> None:
        """Called with a forward's keyword arguments: refuse what would put other bytes under the tokens' hashes.

        Raises:
            ValueError: Padding, a mask of the caller's own, or positions that do not continue the cache.
        """
        if self._input_checked:
            return
        self._input_checked = True
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        if mask is not None and (mask.dim() != 2 or not bool(mask.all())):
            raise ValueError(
                "attention_mask hides tokens of the prompt: stored blocks are named by tokens alone, so a prompt "
                "must come without padding (generate takes pad_token_id in a prompt for padding: pass a mask of ones)"
            )
        if positions is not None:
            start = self.get_seq_length()
            expected = torch.arange(start, start + positions.shape[-1], device=positions.device)
            if not torch.equal(positions.reshape(-1), expected):
                raise ValueError(f"position_ids do not count from {start}, where the cache ends")

    def preload(self, layout: BlockLayout, blocks: int, device: torch.device) -> KVRows:
        """Make room for this many blocks in every layer and return it for the layout to fill."""
        self.reused_tokens = blocks * layout.tokens_per_block
        if blocks == 0:
            return []
        shape = (1, layout.kv_heads, self.reused_tokens, layout.head_dim)
        for layer in self.layers:
            assert isinstance(layer, DynamicLayer)  # serve_model refuses all others
            keys = torch.empty(shape, dtype=layout.dtype, device=device)
            layer.lazy_initialization(keys, keys)
            layer.keys, layer.values = keys, torch.empty_like(keys)
        return self.rows()

    def rows(self) -> KVRows:
        """Keys and values per layer, [kv_heads, tokens, head_dim] each.

        Raises:
            ValueError: The cache grew to more than one sequence (beams, several return sequences).
        """
        pairs = [(keys, values) for keys, values, _ in self if keys is not None and values is not None]
        if any(tensor.shape[0] != 1 for pair in pairs for tensor in pair):
            raise ValueError(f"the cache holds {pairs[0][0].shape[0]} sequences; only one can be saved")
        return [(keys[0], values[0]) for keys, values in pairs]
