"""What a mover is told of parts, keys and turns: what does not fit is refused, before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvservice_adapters.gpu.parts import PART_BYTES_MAX, KeyRows, grouped
from kvservice_adapters.gpu.turning import Turned, turned
from kvservice_adapters.positions import Rope, RopeForm, turn_between
from kvservice_client.device import CachePart

pytest.importorskip("triton", reason="Triton has no build for this system")

from kvservice_adapters.gpu.kernels import BlockMover

CPU = torch.device("cpu")
ROPE = Rope((1.0, 0.1, 0.01, 0.001))
# [2, 3 heads, 4 tokens, 8] in bfloat16.
ROWS = KeyRows(row_elements=8, head_dim=8, key_rows=12, tokens=4, group_rows=12, row_divisor=1)
PARTS = [CachePart(0x1000 * at, 384, 384, at) for at in range(2)]


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (KeyRows(5, 5, 12, 4, 12, 1), "no rows of 5 x 2 bytes"),
        (KeyRows(8, 9, 12, 4, 12, 1), "more than a part of 24 rows"),
        (KeyRows(8, 8, 36, 4, 12, 1), "more than a part of 24 rows"),
        (KeyRows(8, 8, 20, 4, 12, 1), "no whole groups"),
        (KeyRows(8, 8, 12, 4, 12, 2), "no whole tokens"),
        (KeyRows(8, 8, 12, 0, 12, 1), "below 1"),
    ],
)
def test_keys_that_a_part_cannot_have(keys: KeyRows, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        BlockMover(PARTS, dtype=torch.bfloat16, device=CPU, keys=keys)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "0 parts"),
        ([CachePart(0, 8, 0)], "1 parts, must be"),
        ([CachePart(0, 8, PART_BYTES_MAX + 1)], "1 parts, must be"),
        ([CachePart(1, 384, 384)], "aligned to 1 bytes"),
        ([CachePart(0, 385, 384)], "aligned to 1 bytes"),
        ([CachePart(0, 384, 384), CachePart(0, 7, 7)], "aligned to 1 bytes"),
    ],
)
def test_parts_that_cannot_be_moved(parts: list[CachePart], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        BlockMover(parts, dtype=torch.bfloat16, device=CPU, keys={0: ROWS} if parts else None)


def test_keys_of_a_dtype_that_is_not_turned() -> None:
    with pytest.raises(ValueError, match="float8_e4m3fn are not turned"):
        BlockMover(PARTS, dtype=torch.float8_e4m3fn, device=CPU, keys=ROWS)


def _turn(shifts: Sequence[int] = (16, 0), *, tokens: int = 4, rope: Rope = ROPE) -> Turned:
    turn = turned(rope, shifts, first_place=0, tokens=tokens, device=CPU)
    assert turn is not None
    return turn


_RUN, _IDS = torch.zeros((2, 768), dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("run", "block_ids", "layers", "turn", "reason"),
    [
        (_RUN[:, :-1], _IDS, (0, 2), None, r"a run torch.uint8 \(2, 767\)"),
        (_RUN[:1], _IDS, (0, 2), None, "for 2 blocks of 768"),
        (_RUN.view(torch.int8), _IDS, (0, 2), None, "a run torch.int8"),
        (_RUN.mT.contiguous().mT, _IDS, (0, 2), None, "a run"),
        (_RUN, _IDS.long(), (0, 2), None, "block ids of torch.int64"),
        (_RUN, _IDS.to("meta"), (0, 2), None, "block ids on meta"),
        (_RUN, _IDS, (1, 0), None, "layers 1 to 0 of 2"),
        (_RUN, _IDS, (0, 3), None, "layers 0 to 3 of 2"),
        (_RUN, _IDS, (-1, 2), None, "layers -1 to 2 of 2"),
        (_RUN, _IDS, (0, 2), _turn(tokens=8), "8 tokens of 8 dimensions turn"),
        (_RUN, _IDS, (0, 2), _turn(rope=Rope((1.0,) * 5)), "4 tokens of 10 dimensions turn"),
        (_RUN, _IDS, (0, 2), _turn((16, 0, 16)), "a turn of 3 blocks"),
    ],
)
def test_calls_that_do_not_fit(
    run: torch.Tensor, block_ids: torch.Tensor, layers: tuple[int, int], turn: Turned | None, reason: str
) -> None:
    mover = BlockMover(PARTS, dtype=torch.bfloat16, device=CPU, keys=ROWS)
    with pytest.raises(ValueError, match=reason):
        mover.scatter(run, block_ids, first_layer=layers[0], end_layer=layers[1], turn=turn)


def test_a_turn_where_nothing_has_keys() -> None:
    mover = BlockMover(PARTS, dtype=torch.bfloat16, device=CPU)
    with pytest.raises(ValueError, match="without keys"):
        mover.scatter(_RUN, _IDS, first_layer=0, end_layer=2, turn=_turn())


def test_one_group_for_keys_and_values_apart_and_one_for_another_size() -> None:
    parts = [CachePart(0x1000 * at, 512, 256 if at == 4 else 192, at // 2) for at in range(5)]
    groups, table = grouped(parts, dict.fromkeys((0, 2), ROWS), layers=3)
    assert [(group.size_bytes, group.keys is not None, group.first_of_layer) for group in groups] == [
        (192, True, (0, 2, 4, 4)),
        (256, False, (4, 4, 4, 5)),
    ]
    assert table == [
        (0x0000, 512, 0, 12),
        (0x1000, 512, 192, 0),
        (0x2000, 512, 384, 12),
        (0x3000, 512, 576, 0),
        (0x4000, 512, 768, 0),
    ]


@given(
    shifts=st.lists(st.just(0) | st.integers(-5_000, 5_000), max_size=6),
    first_place=st.integers(0, 2_000),
    tokens=st.integers(1, 40),
    form=st.sampled_from(RopeForm),
)
def test_tables_are_those_of_the_blocks_that_moved(
    shifts: list[int], first_place: int, tokens: int, form: RopeForm
) -> None:
    rope = Rope(ROPE.inverse_frequencies, form)
    turn = turned(rope, shifts, first_place=first_place, tokens=tokens, device=CPU)
    if turn is None:
        assert not any(shifts)
        return
    assert (turn.form, turn.tokens, turn.rotary_dims) == (form, tokens, 8)
    rows = turn.row.tolist()
    assert sorted(row for row in rows if row >= 0) == list(range(turn.cosine.shape[0]))
    for at, (shift, row) in enumerate(zip(shifts, rows, strict=True)):
        assert (row == -1) == (shift == 0)
        if shift:
            now_at = torch.arange(tokens) + (first_place + at) * tokens
            wanted = turn_between(rope, computed_at=now_at - shift, now_at=now_at)
            assert torch.equal(turn.cosine[row], wanted.cosine)
            assert torch.equal(turn.sine[row], wanted.sine)


def test_keys_that_carry_no_position_never_turn() -> None:
    assert turned(Rope(()), [16, 16], first_place=0, tokens=4, device=CPU) is None
