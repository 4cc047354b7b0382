# SPDX-License-Identifier: Apache-2.0
"""Which tiles of the other sequence a tile must visit, and which of them need a mask.

The band: query i sees key j when i + lower <= j <= i + upper. Seen from a key, that is
j - upper <= i <= j - lower: the same form with bounds (-upper, -lower). So one function serves the
forward (a query tile visits key tiles) and the backward (a key tile visits query tiles).

Intervals of the queries' own: the caller has a range of every `BLOCK` elements of either sequence,
which again means the same in both directions.
"""

from typing import NamedTuple

import cutlass
from cutlass import Int32, cute

from fa4_jax._variants import BLOCK, RANGE


class BlockRange(NamedTuple):
    """Tiles [begin, end) hold every visible element; those in [full_begin, full_end) hold no
    other."""

    begin: Int32
    end: Int32
    full_begin: Int32
    full_end: Int32

    def needs_mask(self, block: Int32):
        """Whether some element of tile `block` is outside the band or past the end."""
        return (block < self.full_begin) | (block >= self.full_end)

    def within(self, other: "BlockRange") -> "BlockRange":
        """Those that `other` has, too; if none, an empty range inside it."""
        begin = cutlass.max(other.begin, cutlass.min(self.begin, other.end))
        end = cutlass.max(begin, cutlass.min(self.end, other.end))
        return self._replace(begin=begin, end=end)

    def segments(self, end: Int32) -> tuple[tuple[Int32, Int32, bool], ...]:
        """[begin, end) as (first, end, masked) runs, ascending; some may be empty.

        A loop per run, and not a branch around the mask: a branch while an MMA is in flight makes
        ptxas wait for it first, and the softmax then overlaps with nothing (read in the SASS).
        """
        full_begin = cutlass.max(self.begin, cutlass.min(self.full_begin, end))
        full_end = cutlass.max(full_begin, cutlass.min(self.full_end, end))
        return (
            (self.begin, full_begin, True),
            (full_begin, full_end, False),
            (full_end, end, True),
        )


def block_range(
    widest: tuple[Int32, Int32], narrowest: tuple[Int32, Int32], length: Int32, tile: int
) -> BlockRange:
    """Tiles (of `tile` elements, of a sequence of `length`) from elements: all that is visible is
    in `widest` [first, end), and all of `narrowest` is visible."""

    def clamp(x: Int32) -> Int32:
        return cutlass.max(0, cutlass.min(x, length))

    # Not of the clamped element: what begins past the last tile doesn't visit it.
    begin = cutlass.min(cutlass.max(0, widest[0]) // tile, cute.ceil_div(length, tile))
    end = cute.ceil_div(clamp(widest[1]), tile)
    return BlockRange(
        begin=begin,
        end=cutlass.max(begin, end),
        full_begin=cute.ceil_div(clamp(narrowest[0]), tile),
        full_end=clamp(narrowest[1]) // tile,
    )


def visible_blocks(
    first: Int32, last: Int32, lower: Int32, upper: Int32, length: Int32, tile: int
) -> BlockRange:
    """Tiles (of `tile` elements, of a sequence of `length`) that elements first..last see.

    Element i of this sequence sees [i + lower, i + upper] of the other.
    """
    widest = (first + lower, last + upper + 1)
    return block_range(widest, (last + lower, first + upper + 1), length, tile)


def blocks_of_ranges(
    ranges: cute.Tensor, first: Int32, elements: int, length: Int32, tile: int
) -> BlockRange:
    """Tiles (of `tile` elements, of a sequence of `length`) that `elements` of this sequence from
    `first` on see, both multiples of `BLOCK`.

    `ranges` is a batch's `key_range` or `query_range`, (blocks, 4). Its values are the caller's and
    nobody has checked them: they decide what is visited, within the sequence.
    """
    combine = (cutlass.min, cutlass.max, cutlass.max, cutlass.min)
    combined = None
    for block in range(elements // BLOCK):
        # The tile may go on after the last block, which may count twice.
        place = cutlass.min(first // BLOCK + block, ranges.shape[0] - 1)
        values = cute.make_rmem_tensor(RANGE, Int32)
        cute.autovec_copy(ranges[place, None], values)
        values = [values[i] for i in range(RANGE)]
        combined = [f(x, y) for f, x, y in zip(combine, combined or values, values, strict=True)]
    return block_range(combined[:2], combined[2:], length, tile)
