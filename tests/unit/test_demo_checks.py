"""What a turn of the demo must fulfil, and how it is told when it does not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kvservice.demo.checks import Row, compare, overflow_problems
from kvservice.demo.protocol import Finished, encode_logits

pytestmark = pytest.mark.unit

RECOMPUTED = Finished(
    request_id="0.2",
    tokens=[1, 2, 3],
    prompt_tokens=100,
    dropped_tokens=0,
    reused_tokens=0,
    computed_tokens=100,
    dram_blocks=0,
    nvme_blocks=0,
    ttft_s=0.5,
    logits_base64=encode_logits(np.ones(8, dtype=np.float32)),
)
RESUMED = dataclasses.replace(RECOMPUTED, reused_tokens=80, computed_tokens=20, nvme_blocks=5, ttft_s=0.1)


def row_of(resumed: Finished, *, from_nvme: bool = True) -> Row:
    return compare(
        RECOMPUTED,
        resumed,
        conversation=0,
        turn=2,
        engine="engine 3",
        plane="shared-memory",
        history_tokens=80,
        history_reproduced=True,
        from_nvme=from_nvme,
        tokens_per_block=16,
        dtype="float32",
    )


def test_a_turn_that_resumed_from_nvme_is_fine_and_says_so() -> None:
    row = row_of(RESUMED)
    assert row.problems == ()
    assert row.origin == "NVMe"
    assert row.speed_up == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"nvme_blocks": 0, "dram_blocks": 5}, "0 blocks came from NVMe, 5 from DRAM"),
        ({"nvme_blocks": 3, "dram_blocks": 2}, "3 blocks came from NVMe, 2 from DRAM"),
        ({"nvme_blocks": 0, "reused_tokens": 0, "computed_tokens": 100}, "0 blocks came from NVMe"),
        ({"tokens": [1, 2, 4]}, "the tokens differ"),
        ({"computed_tokens": 60, "reused_tokens": 40}, "computed 60 tokens"),
        ({"logits_base64": encode_logits(np.full(8, np.nan, dtype=np.float32))}, "logits differ"),
    ],
)
def test_what_is_off_is_named(change: dict[str, object], problem: str) -> None:
    row = row_of(dataclasses.replace(RESUMED, **change))  # type: ignore[arg-type]
    assert any(problem in found for found in row.problems), row.problems


def test_both_tiers_are_named_where_both_gave_blocks() -> None:
    row = row_of(dataclasses.replace(RESUMED, dram_blocks=2, nvme_blocks=3), from_nvme=False)
    assert (row.origin, row.problems) == ("DRAM+NVMe", ())
    assert row_of(dataclasses.replace(RESUMED, nvme_blocks=0), from_nvme=False).origin == "-"


def test_a_truncated_turn_may_say_something_else_but_must_reuse() -> None:
    cut = {"dropped_tokens": 64, "tokens": [9, 9, 9], "logits_base64": encode_logits(np.full(8, 2, dtype=np.float32))}
    assert row_of(dataclasses.replace(RESUMED, **cut)).problems == ()  # type: ignore[arg-type]
    recomputed = {**cut, "reused_tokens": 0, "computed_tokens": 100, "nvme_blocks": 0}
    row = row_of(dataclasses.replace(RESUMED, **recomputed), from_nvme=False)  # type: ignore[arg-type]
    assert any("nothing was reused after the window overflowed" in problem for problem in row.problems)
    lost = {**cut, "logits_base64": encode_logits(np.full(8, np.nan, dtype=np.float32))}
    assert row_of(dataclasses.replace(RESUMED, **lost)).problems  # type: ignore[arg-type]


def test_a_conversation_that_never_outgrew_its_window_shows_nothing() -> None:
    whole, cut = row_of(RESUMED), row_of(dataclasses.replace(RESUMED, dropped_tokens=64))
    assert overflow_problems([whole, cut], window_tokens=128) == []
    (problem,) = overflow_problems([whole, whole], window_tokens=128)
    assert "2 turns never outgrew its window of 128 tokens" in problem
