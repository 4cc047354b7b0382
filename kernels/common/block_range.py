# SPDX-License-Identifier: Apache-2.0
"""Which tiles of the other sequence a tile must visit under the band, and which of them need a
mask.

The band: query i sees key j when i + lower <= j <= i + upper. Seen from a key, that is
j - upper <= i <= j - lower: the same form with bounds (-upper, -lower). So one function serves the
forward (a query tile visits key tiles) and the backward (a key tile visits query tiles).
"""

from typing import NamedTuple

import cutlass
from cutlass import Int32, cute


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


def visible_blocks(
    first: Int32, last: Int32, lower: Int32, upper: Int32, length: Int32, tile: int
) -> BlockRange:
    """Tiles (of `tile` elements, of a sequence of `length`) that elements first..last see.

    Element i of this sequence sees [i + lower, i + upper] of the other.
    """

    def clamp(x: Int32) -> Int32:
        return cutlass.max(0, cutlass.min(x, length))

    begin = clamp(first + lower) // tile
    end = cute.ceil_div(clamp(last + upper + 1), tile)
    return BlockRange(
        begin=begin,
        end=cutlass.max(begin, end),
        full_begin=cute.ceil_div(clamp(last + lower), tile),
        full_end=clamp(first + upper + 1) // tile,
    )
