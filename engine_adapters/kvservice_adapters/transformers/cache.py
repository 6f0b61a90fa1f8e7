"""cache: a transformers cache that starts with what the service held."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from kvservice_adapters.transformers.layout import BlockLayout, KVRows
from kvservice_adapters.transformers.loading import PrefixLoad
from kvservice_adapters.transformers.sequence import TrackedSequence


class _Arriving:
    # Shared by a cache and its layers, which do not know the cache: in a cycle its memory would wait to be collected.
    def __init__(self, load: PrefixLoad) -> None:
        self.load = load
        self.is_watched = False
        """Whether somebody asks, behind the forward that runs, if what it computed with had arrived."""

    def wait_layer(self, layer: int) -> None:
        if self.is_watched:
            self.load.wait_layer(layer)
        elif not self.load.finish():
            raise RuntimeError("the cache's blocks did not arrive; give it to the adapter's model, which computes them")


class ArrivingLayer(DynamicLayer):
    """A layer whose keys and values are on their way: whoever asks for them makes the stream wait for them."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, wait: Callable[[], None]) -> None:
        """`keys`, `values`: [1, kv_heads, tokens, head_dim], where they will be; `wait`: called once."""
        super().__init__()  # type: ignore[no-untyped-call]
        _begin_with(self, keys, values)
        self._wait: Callable[[], None] | None = wait

    @property
    def keys(self) -> torch.Tensor | None:
        """As the stream finds them behind the wait."""
        self._await()
        return self._keys

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._keys = keys

    @property
    def values(self) -> torch.Tensor | None:
        """As the stream finds them behind the wait."""
        self._await()
        return self._values

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._values = values

    def get_seq_length(self) -> int:
        """Tokens, those on their way included: known without a wait."""
        return 0 if self._keys is None else int(self._keys.shape[-2])

    def _await(self) -> None:
        wait, self._wait = getattr(self, "_wait", None), None
        if wait is not None:
            wait()


def _begin_with(layer: DynamicLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
    # What `lazy_initialization` does, which makes an empty tensor on the device for each: half a millisecond per model.
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.keys, layer.values = keys, values
    layer.is_initialized = True


class PrefixCache(DynamicCache):
    """The cache to pass to `generate` as `past_key_values`; one sequence, batch size 1."""

    def __init__(self, config: PretrainedConfig, sequence: TrackedSequence) -> None:
        super().__init__(config=config)
        self.sequence = sequence
        self.reused_tokens = 0
        self._input_checked = False
        self._arriving: _Arriving | None = None

    def check_input(self, inputs: dict[str, Any]) -> None:
        """Called with a forward's keyword arguments: refuse what would put other bytes under the tokens' hashes.

        Raises:
            ValueError: Padding, a mask of the caller's own, or positions that do not continue the cache.
        """
        if self._input_checked:
            return
        self._input_checked = True
        if self._arriving is not None:
            self._arriving.is_watched = True
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

    @property
    def is_arriving(self) -> bool:
        """Whether it holds blocks of which it is not known yet that they arrived."""
        return self._arriving is not None

    def make_room(self, layout: BlockLayout, blocks: int, device: torch.device) -> KVRows:
        """Make room for this many blocks in every layer and return it to be filled."""
        shape = (1, layout.kv_heads, blocks * layout.tokens_per_block, layout.head_dim)
        for layer in self._dynamic_layers():
            keys = torch.empty(shape, dtype=layout.dtype, device=device)
            _begin_with(layer, keys, torch.empty_like(keys))
        return self.rows()

    def expect(self, load: PrefixLoad) -> None:
        """Begin with what this load brings into the room that was made for it."""
        tokens = load.finish() if load.is_complete else load.tokens
        self.reused_tokens = tokens
        if not tokens:
            self._drop()
            return
        if self.get_seq_length() > tokens:  # fewer came than there was room made for
            self.crop(tokens - self.get_seq_length())
        if load.is_complete:
            return
        arriving = self._arriving = _Arriving(load)
        layers: list[ArrivingLayer] = []
        for number, layer in enumerate(self._dynamic_layers()):
            keys, values = layer.keys, layer.values
            assert keys is not None, "no room was made"
            assert values is not None, "no room was made"
            layers.append(ArrivingLayer(keys, values, partial(arriving.wait_layer, number)))
        self.layers[:] = layers
        # Who never computes with it must not keep the service's memory.
        weakref.finalize(self, load.cancel).atexit = False

    def arrived(self) -> bool:
        """Wait for what is arriving, behind all that the stream has to do. Blocks.

        Returns:
            Whether it came. If not, what was computed from this cache is wrong, and the cache is empty now.
        """
        arriving, self._arriving = self._arriving, None
        if arriving is None or arriving.load.finish():
            return True
        self._drop()
        return False

    def rows(self) -> KVRows:
        """Keys and values per layer, [kv_heads, tokens, head_dim] each; blocks while they are arriving.

        Raises:
            ValueError: The cache grew to more than one sequence (beams, several return sequences).
        """
        self.arrived()
        pairs = [(keys, values) for keys, values, _ in self if keys is not None and values is not None]
        if any(tensor.shape[0] != 1 for pair in pairs for tensor in pair):
            raise ValueError(f"the cache holds {pairs[0][0].shape[0]} sequences; only one can be saved")
        return [(keys[0], values[0]) for keys, values in pairs]

    def _dynamic_layers(self) -> list[DynamicLayer]:
        return cast("list[DynamicLayer]", self.layers)  # serve_model refuses all others

    def _drop(self) -> None:
        self.reused_tokens = 0
        self.layers[:] = [DynamicLayer() for _ in self.layers]  # type: ignore[no-untyped-call]
