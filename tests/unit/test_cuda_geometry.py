"""Geometry: every byte that a copy names is one that was registered, and merging changes none of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvservice_cuda.copier import shares
from kvservice_cuda.geometry import Geometry, Piece, Pieces, Plan, merged

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


@given(geometries(), st.data())
def test_what_fits_stays_inside_its_regions_and_copies_every_byte_once(
    described: tuple[Geometry, list[int]], data: st.DataObject
) -> None:
    geometry, regions = described
    if not fits(geometry, regions):
        return
    blocks = data.draw(st.lists(st.integers(0, geometry.blocks - 1), max_size=8))
    # Regions far apart, so that no byte of one passes for a byte of another.
    starts = np.array([1_000_000 * (number + 1) for number in range(len(regions))], dtype=np.uint64)
    size = geometry.block_size_bytes
    places = data.draw(st.permutations(range(len(blocks)))) if blocks else []
    host = np.array([50_000_000 + size * place for place in places], dtype=np.uint64)
    group_bytes = data.draw(st.integers(0, 5000))
    groups = list(Plan(geometry, starts).groups(np.array(blocks, dtype=np.uint32), host, group_bytes=group_bytes))
    assert groups[-1][0] == geometry.layers
    assert all(pieces.size_bytes >= group_bytes for _, pieces in groups[:-1])
    found = sorted(pair for _, pieces in groups for pair in bytes_of(pieces))
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
    plan = Plan(geometry, np.zeros(len(regions), dtype=np.uint64))
    groups = list(plan.groups(np.array([0]), np.zeros(1, dtype=np.uint64), group_bytes=0))
    assert [done for done, _ in groups] == list(range(1, geometry.layers + 1))
    for done, pieces in groups:
        assert pieces.size_bytes == sum(piece.size_bytes for piece in geometry.pieces if piece.layer == done - 1)


def bytes_of(pieces: Pieces) -> list[tuple[int, int]]:
    """(device address, host address) of every byte."""
    return [
        (int(device) + byte, int(host) + byte)
        for device, host, size in zip(pieces.device, pieces.host, pieces.sizes, strict=True)
        for byte in range(int(size))
    ]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(100, 140), st.integers(1, 5)), max_size=12))
def test_merging_keeps_every_byte_and_leaves_no_neighbours(pieces: list[tuple[int, int, int]]) -> None:
    device, host, sizes = (np.array([piece[part] for piece in pieces], dtype=np.uint64) for part in range(3))
    joined = merged(device, host, sizes)
    assert bytes_of(joined) == bytes_of(Pieces(device, host, sizes))
    for left in range(len(joined) - 1):
        ends = (joined.device[left] + joined.sizes[left], joined.host[left] + joined.sizes[left])
        assert ends != (joined.device[left + 1], joined.host[left + 1])


def test_adjacent_blocks_that_are_contiguous_across_layers_are_one_copy() -> None:
    geometry = Geometry(64, (Piece(0, 0, 100, 100),))
    host = np.arange(5, dtype=np.uint64) * np.uint64(100)
    plan = Plan(geometry, np.zeros(1, dtype=np.uint64))
    ((_, pieces),) = plan.groups(np.arange(10, 15), host, group_bytes=0)
    assert (pieces.device.tolist(), pieces.host.tolist(), pieces.sizes.tolist()) == ([1000], [0], [500])


@pytest.mark.parametrize(
    ("geometry", "problem"),
    [
        (Geometry(0, (Piece(0, 0, 8, 8),)), "0 blocks"),
        (Geometry(1 << 40, (Piece(0, 0, 8, 8),)), "1099511627776 blocks"),
        (Geometry(1, ()), "0 pieces"),
        (Geometry(2, (Piece(1, 0, 8, 8),)), "region 1, of 1"),
        (Geometry(2, (Piece(0, 0, 7, 8),)), "7 bytes apart and 8 long"),
        (Geometry(2, (Piece(0, -1, 8, 8),)), "8 bytes at -1"),
        (Geometry(2, (Piece(0, 0, 8, 8, layer=1024),)), "layer 1024"),
        (Geometry(3, (Piece(0, 1, 8, 8),)), "ends at byte 25 of region 0, which has 24"),
        (Geometry(2, (Piece(0, 0, 1 << 64, 8),)), "ends at byte 18446744073709551624"),
        (Geometry(3, (Piece(0, 0, 8, 7),)), "have 7 bytes, a block of the namespace 8"),
    ],
)
def test_what_does_not_fit_is_said_with_its_numbers(geometry: Geometry, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        geometry.require_fits([24], block_size_bytes=8)


@given(st.integers(0, 600), st.integers(1, 20))
def test_shares_cover_all_pieces_once_with_one_per_stream_at_most(count: int, streams: int) -> None:
    array = np.ones(count, dtype=np.uint64)
    cut = shares(Pieces(array, array, array), streams)
    assert [place for part in cut for place in range(count)[part]] == list(range(count))
    assert len(cut) <= streams
