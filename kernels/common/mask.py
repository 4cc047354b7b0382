# SPDX-License-Identifier: Apache-2.0
"""The band inside one tile of an accumulator."""

import cutlass
from cutlass import Float32, Int32, cute


@cute.jit
def mask_scores(
    scores: cute.Tensor,
    coords: cute.Tensor,
    lower: Int32,
    upper: Int32,
    extent: tuple[Int32, Int32],
):
    """scores[r, c] = -inf unless row + lower <= column <= row + upper and (row, column) < extent.

    `coords` holds (row, column) within the tile for every element of `scores` (rows, columns);
    the bounds and the extent are relative to the tile.
    """
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        row = coords[r, 0][0]
        first = row + lower
        end = cutlass.min(row + upper + 1, extent[1]) if row < extent[0] else first
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            column = coords[r, c][1]
            visible = (column >= first) & (column < end)
            scores[r, c] = scores[r, c] if visible else -Float32.inf
