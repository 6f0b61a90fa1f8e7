"""Geometry: what does not fit its regions is refused, with its numbers."""

from __future__ import annotations

import pytest

from kvservice_cuda.geometry import Geometry, Piece

pytestmark = pytest.mark.unit


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
