"""transformers: the adapter for Hugging Face transformers 5.

Read in this order: `layout` (a block's bytes), `support` (which models, and their namespace),
`sequence` (one request's tokens and hashes), `paths` (how bytes travel), `saving` (the background
thread), `loading` (what is loaded), `cache` and `adapter` (what an engine calls).
"""

from kvservice_adapters.transformers.adapter import AdapterOptions, TransformersAdapter, token_list
from kvservice_adapters.transformers.cache import PrefixCache
from kvservice_adapters.transformers.counters import AdapterStats
from kvservice_adapters.transformers.layout import BlockLayout, KVRows
from kvservice_adapters.transformers.loading import PrefixLoad
from kvservice_adapters.transformers.positions import positions_of
from kvservice_adapters.transformers.saving import DrainOutcome
from kvservice_adapters.transformers.sequence import TrackedSequence
from kvservice_adapters.transformers.support import ServedModel, UnsupportedModel, layout_of, serve_model

__all__ = [
    "AdapterOptions",
    "AdapterStats",
    "BlockLayout",
    "DrainOutcome",
    "KVRows",
    "PrefixCache",
    "PrefixLoad",
    "ServedModel",
    "TrackedSequence",
    "TransformersAdapter",
    "UnsupportedModel",
    "layout_of",
    "positions_of",
    "serve_model",
    "token_list",
]
