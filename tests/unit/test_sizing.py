"""The sizes that the documentation promises follow from the models' own numbers."""

from __future__ import annotations

import pytest

from scripts import sizing

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("name", "size_bytes"),
    [
        ("Llama 3.1 8B", 131_072),  # 2 x 32 layers x 8 heads x 128 x 2 bytes
        ("Llama 3.1 70B", 327_680),
        ("DeepSeek V3", 70_272),  # 61 layers x 576 x 2 bytes
        ("Llama 2 13B", 819_200),  # the paper's "about 0.78 MB a token"
    ],
)
def test_kv_per_token(name: str, size_bytes: int) -> None:
    (model,) = [model for model in sizing.MODELS if model.name.startswith(name)]
    assert model.bytes_per_token() == size_bytes
    assert model.bytes_per_token(element_bytes=1) * 2 == size_bytes


def test_the_papers_capacity_model() -> None:
    """13B at a 4K window and one new session a second: a quarter of 3600 sessions of 3.1 GB."""
    (model,) = [model for model in sizing.MODELS if model.name.startswith("Llama 2 13B")]
    one = sizing.conversation_bytes(model.bytes_per_token(), 4096)
    assert one == pytest.approx(3.1e9, rel=0.1)
    everything = sizing.nvme_bytes(one, distinct_per_ttl=3600, share=1)
    assert everything == 3600 * one
    assert sizing.nvme_bytes(one, distinct_per_ttl=3600) == everything // 4
    assert sizing.dram_bytes(one, running=20, waiting=12) == 32 * one


def test_the_committed_page_is_current() -> None:
    assert sizing.PAGE.read_text(encoding="utf-8") == sizing.page(), "run .venv/bin/python -m scripts.sizing"
