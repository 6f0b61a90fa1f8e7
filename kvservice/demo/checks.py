"""checks: one turn beside its recomputed twin, and what must hold for the demo to have worked."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvservice.demo.protocol import Finished

# The largest difference of two runs' logits over the largest logit. float32 runs differ in the order of
# sums only; the short formats round every layer's output, so their tokens may differ as well.
LOGITS_TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Row:
    """One turn, recomputed by an engine without the service and resumed by one with it."""

    conversation: int  # from 1
    turn: int  # from 1
    engine: str
    plane: str  # on which blocks travelled between the engine and the daemon
    history_tokens: int
    dropped_tokens: int
    new_tokens: int
    reused_tokens: int
    computed_tokens: int
    dram_blocks: int
    nvme_blocks: int
    ttft_recomputed_ms: float
    ttft_resumed_ms: float
    tokens_identical: bool
    logits_difference_max: float
    problems: tuple[str, ...]

    @property
    def origin(self) -> str:
        """The tier that the reused blocks came from."""
        tiers = [name for name, blocks in (("DRAM", self.dram_blocks), ("NVMe", self.nvme_blocks)) if blocks]
        return "+".join(tiers) or "-"

    @property
    def speed_up(self) -> float:
        """How many times faster the first token came."""
        return self.ttft_recomputed_ms / self.ttft_resumed_ms


@dataclass(frozen=True)
class Control:
    """The last resumed turn again: with corrupted keys and values, and with sound ones."""

    tokens_differ: bool
    logits_difference_max: float
    sound_tokens_identical: bool
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """The whole run in numbers. Turns without history are left out: there is nothing to resume."""

    resumed_turns: int
    nvme_turns: int
    median_speed_up: float
    median_ttft_recomputed_ms: float
    median_ttft_resumed_ms: float
    prompt_tokens: int
    computed_tokens: int
    truncated_turns: int
    """Turns after the window overflowed; not among the following two, as their answers are approximate."""
    identical_turns: int
    turns: int

    @property
    def prefill_saved(self) -> float:
        """Fraction of all prompt tokens that were not computed."""
        return 1 - self.computed_tokens / self.prompt_tokens


def compare(
    reference: Finished,
    resumed: Finished,
    *,
    conversation: int,
    turn: int,
    engine: str,
    plane: str,
    history_tokens: int,
    history_reproduced: bool,
    from_nvme: bool,
    tokens_per_block: int,
    dtype: str,
) -> Row:
    """Lay a resumed turn beside its recomputed twin; `conversation` and `turn` count from 0.

    `history_reproduced` says whether this conversation's earlier answers were the recomputed ones: otherwise
    the service holds the blocks of other answers than those in the history. `from_nvme`: the daemon was restarted
    since the conversation's last turn, so that nothing of it can be in DRAM.
    """
    new_tokens = resumed.prompt_tokens - history_tokens
    identical = reference.tokens == resumed.tokens
    difference = logits_difference(reference, resumed)
    problems = []
    if reference.computed_tokens != reference.prompt_tokens:
        problems.append(f"the reference computed {reference.computed_tokens} of {reference.prompt_tokens} tokens")
    if resumed.reused_tokens + resumed.computed_tokens != resumed.prompt_tokens:
        problems.append(f"reused and computed tokens do not add up to {resumed.prompt_tokens}")
    if history_reproduced and resumed.computed_tokens > new_tokens + tokens_per_block:
        problems.append(
            f"computed {resumed.computed_tokens} tokens; {new_tokens} are new, {tokens_per_block} make a block"
        )
    if from_nvme and (resumed.dram_blocks or not resumed.nvme_blocks):
        problems.append(
            f"after the daemon's restart {resumed.nvme_blocks} blocks came from NVMe, {resumed.dram_blocks} from DRAM"
        )
    if resumed.dropped_tokens and not resumed.reused_tokens:
        problems.append("nothing was reused after the window overflowed")
    # Kept keys and values are those of the longer context, so a truncated turn may say something else.
    is_exact = not resumed.dropped_tokens
    if is_exact and dtype == "float32" and not identical:
        problems.append("the tokens differ from the recomputed ones")
    tolerance = LOGITS_TOLERANCES[dtype] * float(np.abs(reference.logits).max())
    # Not "difference > tolerance": that is false for NaN.
    if (is_exact and not difference <= tolerance) or not np.isfinite(difference):
        problems.append(f"the last token's logits differ by {difference:.2e}, more than {tolerance:.2e}")
    return Row(
        conversation=conversation + 1,
        turn=turn + 1,
        engine=engine,
        plane=plane,
        history_tokens=history_tokens,
        dropped_tokens=resumed.dropped_tokens,
        new_tokens=new_tokens,
        reused_tokens=resumed.reused_tokens,
        computed_tokens=resumed.computed_tokens,
        dram_blocks=resumed.dram_blocks,
        nvme_blocks=resumed.nvme_blocks,
        ttft_recomputed_ms=reference.ttft_s * 1000,
        ttft_resumed_ms=resumed.ttft_s * 1000,
        tokens_identical=identical,
        logits_difference_max=difference,
        problems=tuple(problems),
    )


def judge_control(reference: Finished, corrupted: Finished, sound: Finished, *, dtype: str) -> Control:
    """Corrupted keys and values must change the answer, or the sameness of the others proves nothing."""
    problems = []
    if corrupted.reused_tokens == 0:
        problems.append("control: nothing was loaded that could have been corrupted")
    if corrupted.tokens == reference.tokens:
        problems.append("control: corrupted keys and values gave the same tokens, so what is loaded is not used")
    if dtype == "float32" and sound.tokens != reference.tokens:
        problems.append("control: without the corruption the same turn gave other tokens than recomputed")
    return Control(
        tokens_differ=corrupted.tokens != reference.tokens,
        logits_difference_max=logits_difference(reference, corrupted),
        sound_tokens_identical=sound.tokens == reference.tokens,
        problems=tuple(problems),
    )


def logits_difference(one: Finished, other: Finished) -> float:
    """The largest absolute difference of the last prompt token's logits."""
    return float(np.abs(one.logits - other.logits).max())


def overflow_problems(rows: Sequence[Row], *, window_tokens: int) -> list[str]:
    """What is off with a conversation that was to outgrow its window, beside its single turns."""
    if any(row.dropped_tokens for row in rows):
        return []
    return [
        f"the conversation of {len(rows)} turns never outgrew its window of {window_tokens} tokens: nothing was cut"
    ]


def summarise(rows: Sequence[Row]) -> Summary:
    """The whole run in numbers; `rows` must contain a turn with history."""
    resumed = [row for row in rows if row.history_tokens]
    return Summary(
        resumed_turns=len(resumed),
        nvme_turns=sum(row.nvme_blocks > 0 for row in rows),
        median_speed_up=statistics.median(row.speed_up for row in resumed),
        median_ttft_recomputed_ms=statistics.median(row.ttft_recomputed_ms for row in resumed),
        median_ttft_resumed_ms=statistics.median(row.ttft_resumed_ms for row in resumed),
        prompt_tokens=sum(row.history_tokens + row.new_tokens for row in rows),
        computed_tokens=sum(row.computed_tokens for row in rows),
        truncated_turns=sum(row.dropped_tokens > 0 for row in rows),
        identical_turns=sum(row.tokens_identical for row in rows if not row.dropped_tokens),
        turns=sum(not row.dropped_tokens for row in rows),
    )
