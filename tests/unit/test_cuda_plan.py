"""Plan: every byte that a move names is one that was registered, rows and pieces together move each once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice_cuda.copier import shares
from kvservice_cuda.geometry import Geometry, Piece
from kvservice_cuda.plan import PITCH_MAX_BYTES, ROWS_MIN, Moves, Pieces, Plan, Rows, merged

pytestmark = pytest.mark.unit


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Geometry, list[int]]:
    """Some geometry, sane or not, and the sizes of its regions."""
    regions = draw(st.lists(st.integers(0, 4000), min_size=1, max_size=3))
    pieces = draw(
        st.lists(
            st.builds(
                Piece,
                region=st.integers(0, 3),
                offset_bytes=st.integers(0, 500),
                block_stride_bytes=st.integers(0, 300),
                size_bytes=st.integers(0, 300),
                layer=st.integers(0, 5),
            ),
            min_size=1,
            max_size=6,
        )
    )
    return Geometry(draw(st.integers(0, 12)), tuple(pieces)), regions


def fits(geometry: Geometry, regions: list[int]) -> bool:
    try:
        geometry.require_fits(regions, block_size_bytes=geometry.block_size_bytes)
    except ValueError:
        return False
    return True


@st.composite
def block_lists(draw: st.DrawFn, blocks: int) -> list[int]:
    """Any blocks, or some that are equally spaced, with others around them."""
    any_block = st.integers(0, blocks - 1)
    if draw(st.booleans()) or blocks < ROWS_MIN:
        return draw(st.lists(any_block, max_size=8))
    step = draw(st.integers(1, max(1, (blocks - 1) // ROWS_MIN)))
    first = draw(st.integers(0, step))
    run = list(range(first, blocks, step))
    return draw(st.lists(any_block, max_size=3)) + run + draw(st.lists(any_block, max_size=3))


@given(geometries(), st.data())
def test_what_fits_stays_inside_its_regions_and_copies_every_byte_once(
    described: tuple[Geometry, list[int]], data: st.DataObject
) -> None:
    geometry, regions = described
    if not fits(geometry, regions):
        return
    blocks = data.draw(block_lists(geometry.blocks))
    # Regions far apart, so that no byte of one passes for a byte of another.
    starts = np.array([1_000_000 * (number + 1) for number in range(len(regions))], dtype=np.uint64)
    size = geometry.block_size_bytes
    shuffled = data.draw(st.booleans())
    places = data.draw(st.permutations(range(len(blocks)))) if shuffled else list(range(len(blocks)))
    host = np.array([50_000_000 + size * place for place in places], dtype=np.uint64)
    group_bytes = data.draw(st.integers(0, 5000))
    groups = list(Plan(geometry, starts).moves(np.array(blocks, dtype=np.uint32), host, group_bytes=group_bytes))
    assert groups[-1].layers_done == geometry.layers
    found = sorted(pair for moves in groups for pair in bytes_of(moves))
    assert all(len(bytes_of(moves)) >= group_bytes for moves in groups[:-1])
    expected = sorted(
        (
            int(starts[piece.region]) + piece.offset_bytes + block * piece.block_stride_bytes + byte,
            int(place) + at + byte,
        )
        for block, place in zip(blocks, host, strict=True)
        for of_layer in geometry.by_layer
        for at, piece in of_layer
        for byte in range(piece.size_bytes)
    )
    assert found == expected
    for device, _ in found:
        region = device // 1_000_000 - 1
        assert device < int(starts[region]) + regions[region]


@given(geometries())
def test_each_layer_s_pieces_are_copied_with_their_layer(described: tuple[Geometry, list[int]]) -> None:
    geometry, regions = described
    if not fits(geometry, regions):
        return
    plan = Plan(geometry, np.arange(len(regions), dtype=np.uint64) * np.uint64(1 << 20))
    groups = list(plan.moves(np.arange(geometry.blocks), np.arange(geometry.blocks) * (1 << 20), group_bytes=0))
    for layer, moves in enumerate(groups):
        size_bytes = sum(piece.size_bytes for piece in geometry.pieces if piece.layer == layer)
        assert len(bytes_of(moves)) == geometry.blocks * size_bytes
    assert [moves.layers_done for moves in groups] == list(range(1, geometry.layers + 1))


def bytes_of(moves: Moves) -> list[tuple[int, int]]:
    """(device address, host address) of every byte."""
    return [
        (rows.device + row * rows.device_pitch_bytes + byte, rows.host + row * rows.host_pitch_bytes + byte)
        for rows in moves.rows
        for row in range(rows.rows)
        for byte in range(rows.width_bytes)
    ] + bytes_of_pieces(moves.pieces)


def bytes_of_pieces(pieces: Pieces) -> list[tuple[int, int]]:
    return [
        (int(device) + byte, int(host) + byte)
        for device, host, size in zip(pieces.device, pieces.host, pieces.sizes, strict=True)
        for byte in range(int(size))
    ]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(100, 140), st.integers(1, 5)), max_size=12))
def test_merging_keeps_every_byte_and_leaves_no_neighbours(pieces: list[tuple[int, int, int]]) -> None:
    device, host, sizes = (np.array([piece[part] for piece in pieces], dtype=np.uint64) for part in range(3))
    joined = merged(device, host, sizes)
    assert bytes_of_pieces(joined) == bytes_of_pieces(Pieces(device, host, sizes))
    for left in range(len(joined) - 1):
        ends = (joined.device[left] + joined.sizes[left], joined.host[left] + joined.sizes[left])
        assert ends != (joined.device[left + 1], joined.host[left + 1])


LAYERED = Geometry(1 << 20, tuple(Piece(layer, 0, 100, 100, layer) for layer in range(3)))
INTERLEAVED = Geometry(64, tuple(Piece(0, layer * 100, 300, 100, layer) for layer in range(3)))


def moves_of(geometry: Geometry, blocks: list[int], host: list[int], *, group_bytes: int = 0) -> list[Moves]:
    regions = max(piece.region for piece in geometry.pieces) + 1
    plan = Plan(geometry, np.arange(regions, dtype=np.uint64) * np.uint64(1 << 32))
    return list(plan.moves(np.array(blocks), np.array(host, dtype=np.uint64), group_bytes=group_bytes))


def test_adjacent_blocks_that_are_contiguous_across_layers_are_one_run_of_bytes() -> None:
    geometry = Geometry(64, (Piece(0, 0, 100, 100),))
    (few,) = moves_of(geometry, list(range(10, 15)), [at * 100 for at in range(5)])
    assert (few.pieces.device.tolist(), few.pieces.host.tolist(), few.pieces.sizes.tolist()) == ([1000], [0], [500])
    (many,) = moves_of(geometry, list(range(10, 40)), [at * 100 for at in range(30)])
    assert not len(many.pieces)
    assert many.rows[0].is_contiguous
    assert (many.rows[0].device, many.rows[0].host, many.rows[0].rows) == (1000, 0, 30)


def test_equally_spaced_blocks_are_one_command_per_layer() -> None:
    groups = moves_of(LAYERED, list(range(0, 60, 3)), [7 + at * 900 for at in range(20)])
    assert [moves.rows for moves in groups] == [
        (Rows((layer << 32), 300, 7 + 100 * layer, 900, 100, 20),) for layer in range(3)
    ]
    assert not any(len(moves.pieces) for moves in groups)


def test_layers_that_are_neighbours_in_a_block_are_wider_rows_when_they_go_together() -> None:
    apart = moves_of(INTERLEAVED, list(range(20)), [at * 300 for at in range(20)])
    assert [moves.rows[0].width_bytes for moves in apart] == [100, 100, 100]
    (together,) = moves_of(INTERLEAVED, list(range(20)), [at * 300 for at in range(20)], group_bytes=1 << 30)
    assert [(rows.width_bytes, rows.rows, rows.is_contiguous) for rows in together.rows] == [(300, 20, True)]


def test_scattered_blocks_go_in_longer_pieces_where_layers_are_neighbours() -> None:
    scattered = [0, 7, 3, 50, 12]
    (joined,) = moves_of(INTERLEAVED, scattered, [at * 300 for at in range(5)])
    assert joined.pieces.sizes.tolist() == [300] * 5
    assert len(moves_of(LAYERED, scattered, [at * 300 for at in range(5)])) == 3, "waiting makes these no longer"


@pytest.mark.parametrize(
    ("blocks", "host_step"),
    [
        (list(range(ROWS_MIN - 1)), 1000),
        (list(range(40, 0, -1)), 1000),
        ([5] * 40, 1000),
        (list(range(20)), PITCH_MAX_BYTES + 1),
        ([at * (PITCH_MAX_BYTES // 100 + 1) for at in range(20)], 1000),
    ],
    ids=["few", "downwards", "the same", "too far apart on the host", "too far apart on the GPU"],
)
def test_what_a_command_cannot_express_goes_as_pieces(blocks: list[int], host_step: int) -> None:
    groups = moves_of(LAYERED, blocks, [at * host_step for at in range(len(blocks))])
    assert not any(moves.rows for moves in groups)
    assert sum(moves.pieces.size_bytes for moves in groups) == 300 * len(blocks)


@given(st.integers(0, 600), st.integers(1, 4 << 20))
def test_shares_cover_all_pieces_once(count: int, size: int) -> None:
    sizes = np.full(count, size, dtype=np.uint64)
    cut = shares(Pieces(sizes, sizes, sizes))
    assert [place for part in cut for place in range(count)[part]] == list(range(count))


@pytest.mark.parametrize(("size_kib", "streams"), [(4096, 1), (1024, 1), (512, 2), (64, 16), (4, 16)])
def test_small_pieces_are_shared_out_among_more_streams(size_kib: int, streams: int) -> None:
    sizes = np.full(512, size_kib << 10, dtype=np.uint64)
    assert len(shares(Pieces(sizes, sizes, sizes))) == streams
