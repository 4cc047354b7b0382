# SPDX-License-Identifier: Apache-2.0
"""The band inside one tile of an accumulator."""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, cute

from kernels.common.mma_sm90 import rows_and_columns


class Coordinates(NamedTuple):
    """Where a thread's accumulator elements lie in the tile: (row, column) + offsets[r, c].

    The offsets are the first thread's and static, so that a comparison needs one thread-dependent
    bound a row. With run-time coordinates the compiler keeps one register per column: the
    three-warpgroup forward, at 160 registers, spilled 588 bytes.
    """

    row: Int32
    column: Int32
    offsets: cute.Tensor


def accumulator_coordinates(
    tiled_mma: cute.TiledMma, thread: Int32, tile: tuple[int, int]
) -> Coordinates:
    """Coordinates of `thread`'s elements in the accumulator of a tile, as (rows, columns)."""
    identity = cute.make_identity_tensor(tile)
    mine, first = (
        rows_and_columns(tiled_mma.get_slice(t).partition_C(identity)) for t in (thread, 0)
    )
    return Coordinates(*mine[0, 0], first)


@cute.jit
def mask_scores(
    scores: cute.Tensor,
    coordinates: Coordinates,
    lower: Int32,
    upper: Int32,
    extent: tuple[Int32, Int32],
):
    """scores[r, c] = -inf unless row + lower <= column <= row + upper and (row, column) < extent.

    `scores` is (rows, columns); the bounds and the extent are relative to the tile.
    """
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        row = coordinates.row + coordinates.offsets[r, 0][0]
        first = row + lower
        end = cutlass.min(row + upper + 1, extent[1]) if row < extent[0] else first
        first, end = first - coordinates.column, end - coordinates.column
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            column = coordinates.offsets[r, c][1]
            visible = (first <= column) & (end > column)
            scores[r, c] = scores[r, c] if visible else -Float32.inf
