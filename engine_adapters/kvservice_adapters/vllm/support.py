"""support: which vLLM, which settings and which models the adapter works with; others are refused with a reason."""

from __future__ import annotations

from typing import Any

import vllm
from vllm.v1.kv_cache_interface import FullAttentionSpec

SUPPORTED_MINORS = ((0, 32), (0, 33))
HASH_ALGORITHMS = ("sha256", "sha256_cbor")


class UnsupportedEngine(ValueError):
    """The engine was started in a way that cannot work; the message says what to change."""


class UnsupportedModel(ValueError):
    """The engine works, without reuse: this model's blocks cannot be stored by token prefix; the message says why."""


def require_supported_engine(vllm_config: Any) -> None:
    """Check the version and the settings that the adapter's promises rest on.

    Raises:
        UnsupportedEngine: see there.
    """
    release = tuple(int(part) for part in vllm.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    if release not in SUPPORTED_MINORS:
        known = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED_MINORS)
        raise UnsupportedEngine(
            f"kvservice: vLLM {vllm.__version__} is not supported: its connector interface changes between versions. "
            f"Supported are {known}: install one of them, or leave --kv-transfer-config out"
        )
    transfer = vllm_config.kv_transfer_config
    if transfer.kv_load_failure_policy != "recompute":
        raise UnsupportedEngine(
            'kvservice: set "kv_load_failure_policy": "recompute" in --kv-transfer-config: with '
            f"{transfer.kv_load_failure_policy!r} (vLLM's default is 'fail') a request fails when the store does"
        )


def require_supported_model(vllm_config: Any, kv_cache_config: Any) -> None:
    """Check that a prefix of tokens says everything about a block's bytes.

    Raises:
        UnsupportedModel: see there.
    """
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise UnsupportedModel(
            f"its KV cache has {len(groups)} groups (sliding windows, Mamba or other states beside full attention)"
        )
    spec = groups[0].kv_cache_spec
    kinds = getattr(spec, "kv_cache_specs", None)
    for kind in kinds.values() if kinds else (spec,):
        if not isinstance(kind, FullAttentionSpec) or kind.non_causal:
            raise UnsupportedModel(f"its layers keep a {type(kind).__name__}, not keys and values of every token")
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise UnsupportedModel(f"{name} is more than 1: a block's tokens are spread over ranks")
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if algorithm not in HASH_ALGORITHMS:
        raise UnsupportedModel(
            f"--prefix-caching-hash-algo is {algorithm}: blocks that outlive a process need one of "
            f"{', '.join(HASH_ALGORITHMS)}"
        )


def tokens_per_block_of(kv_cache_config: Any) -> int:
    """Tokens that the engine's block ids count in."""
    return int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
