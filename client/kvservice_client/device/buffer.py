"""How much of a history must be loaded ahead, so that a prefill that waits layer by layer is never held up."""

from __future__ import annotations


def read_buffer_bytes(
    *,
    bytes_per_s: float,
    block_bytes_per_token: int,
    prefill_s_per_token: float,
    history_tokens: int,
    new_tokens: int,
) -> int:
    """S_buf = B (T_load L_hist - T_pref L_new), CachedAttention, section 3.2.1; 0 where the prefill is the longer.

    Args:
        bytes_per_s: B, of the bus.
        block_bytes_per_token: KV of one token, all layers; over B it is T_load.
        prefill_s_per_token: T_pref, of the new tokens.
    """
    load_s = history_tokens * block_bytes_per_token / bytes_per_s
    return max(0, round(bytes_per_s * (load_s - prefill_s_per_token * new_tokens)))
