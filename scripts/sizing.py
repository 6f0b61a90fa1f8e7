"""How much memory and disk conversations take: the formulas of docs/OPERATIONS.md, and the table that it shows.

    python -m scripts.sizing --bytes-per-token 131072 --tokens 8192 --per-hour 1000 --at-once 32

The capacity model is the paper's (CachedAttention, USENIX ATC'24, section 4.3.6): what could be wanted again within the
time to live is the distinct conversations of that time, each at its full size; with a quarter of that as capacity the
paper measured 98 % hits on its trace, with a tenth 51 %.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "OPERATIONS.md"
BEGIN, END = "<!-- sizing: made by scripts/sizing.py -->\n", "<!-- end of sizing -->\n"

CAPACITY_SHARE = 0.25
"""Of what could be wanted again; 98 % hits in the paper."""
CONTAINER_OVERHEAD_BYTES = 2 << 30
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Model:
    """What of a model's configuration decides the size of its KV.

    `latent_width` is that of multi-head latent attention (kv_lora_rank + qk_rope_head_dim), which caches one vector per
    token and layer instead of keys and values per head; 0: none.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    latent_width: int = 0

    def bytes_per_token(self, *, element_bytes: int = 2) -> int:
        """KV of one token over all layers and all tensor-parallel ranks; 2 bytes an element for bf16, 1 for fp8."""
        width = self.latent_width or 2 * self.kv_heads * self.head_dim
        return self.layers * width * element_bytes


MODELS = (
    Model("Llama 3.1 8B, Mistral 7B v0.3", 32, 8, 128),
    Model("Qwen3 8B", 36, 8, 128),
    Model("Qwen3 30B-A3B", 48, 4, 128),
    Model("Qwen3 32B", 64, 8, 128),
    Model("Llama 3.1 70B", 80, 8, 128),
    Model("Llama 3.1 405B", 126, 8, 128),
    Model("DeepSeek V3, R1", 61, 1, 0, latent_width=512 + 64),
    Model("Llama 2 13B (the paper's; no grouped heads)", 40, 40, 128),
)


def conversation_bytes(bytes_per_token: int, tokens: int) -> int:
    """KV of one conversation at that length."""
    return bytes_per_token * tokens


def nvme_bytes(conversation: int, *, distinct_per_ttl: float, share: float = CAPACITY_SHARE) -> int:
    """What the tiers should hold together so that conversations are found again within their time to live.

    Args:
        conversation: bytes of one, at the longest that it gets.
        distinct_per_ttl: different conversations that are active within the time to live.
        share: of all that could be wanted again.
    """
    return math.ceil(conversation * distinct_per_ttl * share)


def dram_bytes(conversation: int, *, running: int, waiting: int) -> int:
    """What DRAM should hold: those that compute or save, and those whose prefetch the queue has started."""
    return conversation * (running + waiting)


def table() -> str:
    """The table for the page."""
    tokens, per_hour, at_once = 8192, 1000, 32
    head = (
        f"| model, bf16 | KV per token | a conversation of {tokens:,} tokens | DRAM for {at_once} running or waiting "
        f"| NVMe for {per_hour:,} an hour |"
    )
    lines = [head, "|---|---|---|---|---|"]
    for model in MODELS:
        one = conversation_bytes(model.bytes_per_token(), tokens)
        dram = dram_bytes(one, running=at_once, waiting=0)
        nvme = nvme_bytes(one, distinct_per_ttl=per_hour)
        lines.append(
            f"| {model.name} | {model.bytes_per_token() / 1024:.0f} KiB | {one / GIB:.1f} GiB | {dram / GIB:.0f} GiB "
            f"| {nvme / GIB:,.0f} GiB |"
        )
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/OPERATIONS.md as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


def main() -> None:
    """Print what one deployment needs, or rewrite the page."""
    parser = argparse.ArgumentParser(description="memory and disk for so many conversations")
    parser.add_argument("--bytes-per-token", type=int, help="of the model; without it the page is rewritten")
    parser.add_argument("--tokens", type=int, default=8192, help="of a conversation at its longest")
    parser.add_argument("--per-hour", type=float, default=1000, help="distinct conversations in an hour (the TTL)")
    parser.add_argument("--at-once", type=int, default=32, help="running, or waiting and prefetched")
    chosen = parser.parse_args()
    if chosen.bytes_per_token is None:
        PAGE.write_text(page(), encoding="utf-8")
        print(f"wrote {PAGE}")
        return
    one = conversation_bytes(chosen.bytes_per_token, chosen.tokens)
    dram = dram_bytes(one, running=chosen.at_once, waiting=0)
    print(f"one conversation   {one / GIB:10.2f} GiB")
    print(
        f"dram_bytes         {dram / GIB:10.2f} GiB, container limit {(dram + CONTAINER_OVERHEAD_BYTES) / GIB:.2f} GiB"
    )
    print(f"nvme_bytes         {nvme_bytes(one, distinct_per_ttl=chosen.per_hour) / GIB:10.2f} GiB")


if __name__ == "__main__":
    main()
