# SPDX-License-Identifier: Apache-2.0
"""What rows see inside one tile of an accumulator."""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, Uint32, cute

from kernels.common.mma_sm90 import rows_and_columns

# Elements whose visibility one register holds.
WORD = 32


class Coordinates(NamedTuple):
    """Where a thread's accumulator elements lie in the tile: (row, column) + offsets[r, c].

    The offsets are the first thread's and static, so that only a row's bounds depend on the thread.
    With run-time coordinates the compiler keeps one register per column: the three-warpgroup
    forward, at 160 registers, spilled 588 bytes.
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


class Band(NamedTuple):
    """Row i sees columns [i + lower, i + upper]."""

    lower: Int32
    upper: Int32

    def from_tile(self, row: Int32, column: Int32) -> "Band":
        """The same, counted from (row, column)."""
        return Band(self.lower + (row - column), self.upper + (row - column))

    def interval(self, r: int, row: Int32) -> tuple[Int32, Int32]:
        """The columns [first, end) that a row, this thread's row r, sees."""
        return row + self.lower, row + self.upper + 1


class Intervals(NamedTuple):
    """This thread's row r sees columns [first[r], end[r]); first[r] < 0 says that it is broken."""

    first: cute.Tensor | list[Int32]
    end: cute.Tensor | list[Int32]

    def from_tile(self, row: Int32, column: Int32) -> "Intervals":
        """The same, counted from (row, column)."""
        return Intervals(*([x[r] - column for r in range(cute.size(x))] for x in self))

    def interval(self, r: int, row: Int32) -> tuple[Int32, Int32]:
        """The columns [first, end) that a row, this thread's row r, sees."""
        return self.first[r], self.end[r]


def from_element(column: Int32) -> Uint32:
    """One bit per element of a row of an accumulator, for 32 elements or 128 columns: set from the
    first element on whose column isn't below `column`. Both count from this thread's first.

    An accumulator's elements lie at columns 8v and 8v + 1.
    """
    column = cutlass.max(0, cutlass.min(column, 4 * WORD))
    return from_bit((column >> 3) * 2 + cutlass.min(column & 7, 2))


def from_bit(first: Int32) -> Uint32:
    """Bits `first` and above; first >= 0. In PTX a shift by 32 and more gives 0, in LLVM
    anything."""
    return cute.arch.inline_ptx(
        "shl.b32 {$w0}, 0xFFFFFFFF, {$r0};", write_only_types=[Uint32], read_only_args=[first]
    )


@cute.jit
def mask_scores(
    scores: cute.Tensor,
    coordinates: Coordinates,
    seen: Band | Intervals,
    extent: tuple[Int32, Int32],
):
    """scores[r, c] = -inf unless the row sees the column and (row, column) < extent.

    `scores` is (rows, columns); `seen` and the extent are relative to the tile.

    A row's interval becomes one bit per element, which R2P turns into predicates, 7 at a time: two
    comparisons an element were 263 of a masked tile's 725 to 770 instructions (forward, 128
    columns); all of this is 140.
    """
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        row = coordinates.row + coordinates.offsets[r, 0][0]
        first, end = seen.interval(r, row)
        end = cutlass.min(end, extent[1]) if row < extent[0] else first
        first, end = first - coordinates.column, end - coordinates.column
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            assert coordinates.offsets[r, c][1] == 8 * (c // 2) + c % 2
            if cutlass.const_expr(c % WORD == 0):
                bits = from_element(first - 4 * c) & ~from_element(end - 4 * c)
            visible = (bits & Uint32(1 << c % WORD)) != 0
            scores[r, c] = scores[r, c] if visible else -Float32.inf


@cute.jit
def mask_row(scores: list[Float32], first: Int32, end: Int32) -> list[Float32]:
    """-inf unless first <= column < end, for a thread that has a row's consecutive columns."""
    masked = []
    for start in cutlass.range_constexpr(0, len(scores), WORD):
        bits = from_bit(cutlass.max(first - start, 0)) & ~from_bit(cutlass.max(end - start, 0))
        for i in cutlass.range_constexpr(WORD):
            visible = (bits & Uint32(1 << i)) != 0
            masked.append(scores[start + i] if visible else -Float32.inf)
    return masked
