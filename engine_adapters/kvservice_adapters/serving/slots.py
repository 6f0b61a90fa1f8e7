"""slots: one KV cache for several sequences of different lengths, without re-padding.

    row 0 |###############............|   every row has room for the whole window;
    row 1 |######.....................|   rows 0..n-1 decode together, row n is free for the
    row 2 |##########.................|   next prompt. A row that ends is filled with the last
    row 3 |...........................|   one, once, so that the rows in use stay together.

A decode step writes each row at its own position and attends over a view of the rows in use,
up to the longest of them; a mask hides what lies behind a row's own end.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kvservice_adapters.transformers import BlockLayout, KVRows, PrefixLoad


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values, [rows, kv_heads, window, head_dim]; where to write is set by SlotCache."""

    def __init__(self, layout: BlockLayout, rows: int, window_tokens: int, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        shape = (rows, layout.kv_heads, window_tokens, layout.head_dim)
        # Zeros: what a mask hides is still multiplied by zero, and memory full of NaN would survive that.
        self.row_keys = torch.zeros(shape, dtype=layout.dtype, device=device)
        self.row_values = torch.zeros(shape, dtype=layout.dtype, device=device)
        self.is_initialized = True
        self._window_tokens = window_tokens
        self._first_row = 0
        self._positions: torch.Tensor | int = 0
        self._end = 0

    def place_prompt(self, row: int, start: int) -> None:
        """The next update holds one row's tokens from position `start` on."""
        self._first_row, self._positions = row, start

    def place_step(self, positions: torch.Tensor, end: int) -> None:
        """The next update holds one token for each row from 0 on, at `positions`, all below `end`."""
        self._first_row, self._positions, self._end = 0, positions, end

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the memory is there from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [rows, kv_heads, tokens, head_dim] where it was placed; return views of all that is to be attended."""
        if isinstance(self._positions, int):
            start, end = self._positions, self._positions + key_states.shape[2]
            rows = slice(self._first_row, self._first_row + 1)
            self.row_keys[rows, :, start:end] = key_states
            self.row_values[rows, :, start:end] = value_states
            return self.row_keys[rows, :, :end], self.row_values[rows, :, :end]
        count = key_states.shape[0]
        index = torch.arange(count, device=key_states.device)
        self.row_keys[index, :, self._positions] = key_states[:, :, 0]
        self.row_values[index, :, self._positions] = value_states[:, :, 0]
        return self.row_keys[:count, :, : self._end], self.row_values[:count, :, : self._end]

    def get_seq_length(self) -> int:
        """Tokens before the ones of the next update, for a prompt; a step brings its own positions and mask."""
        return self._positions if isinstance(self._positions, int) else self._end - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of what the next update returns."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """The window."""
        return self._window_tokens


class SlotCache(Cache):
    """All layers of the batch."""

    def __init__(self, layout: BlockLayout, *, rows: int, window_tokens: int, device: torch.device) -> None:
        self._slot_layers = [SlotLayer(layout, rows, window_tokens, device) for _ in range(layout.layers)]
        self._load: PrefixLoad | None = None
        super().__init__(layers=list(self._slot_layers))

    def row(self, row: int) -> KVRows:
        """One row's keys and values per layer, [kv_heads, window, head_dim]: views."""
        return [(layer.row_keys[row], layer.row_values[row]) for layer in self._slot_layers]

    def place_prompt(self, row: int, start: int, load: PrefixLoad | None = None) -> None:
        """The next forward runs tokens of one row, from position `start` on; what is before them may be arriving."""
        self._load = load
        for layer in self._slot_layers:
            layer.place_prompt(row, start)

    def place_step(self, positions: Sequence[int], device: torch.device) -> torch.Tensor:
        """The next forward runs one token of each of the first rows; returns their positions, [rows]."""
        self._load = None
        indices = torch.tensor(positions, dtype=torch.long, device=device)
        for layer in self._slot_layers:
            layer.place_step(indices, max(positions) + 1)
        return indices

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write and return one layer's keys and values, as the layer does, behind the wait for what is arriving."""
        if self._load is not None:
            self._load.wait_layer(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def move_row(self, source: int, target: int, length_tokens: int) -> None:
        """Copy one row's tokens over another row."""
        for layer in self._slot_layers:
            layer.row_keys[target, :, :length_tokens] = layer.row_keys[source, :, :length_tokens]
            layer.row_values[target, :, :length_tokens] = layer.row_values[source, :, :length_tokens]
