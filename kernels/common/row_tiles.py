# SPDX-License-Identifier: Apache-2.0
"""Elementwise kernels over rows: which thread handles which 16-byte piece of which row.

A tile is `tile_m` rows of one (batch, head). A row is split over neighbouring lanes, as 16-byte
vectors of a 16-bit type: one each where that makes a power of two of lanes, else (96, 192) three
each, a third of the row apart. No lane idles, and a row is read in pieces of 64 bytes at least.

Tiles go from the last to the first, because the launch before has left the last ones in the L2, and
the one after begins with the first ones.
"""

from typing import NamedTuple

from cutlass import Int32, cute

THREADS = 256
VECTOR = 8


class RowTile(NamedTuple):
    """This thread's place: the tile's first row, the lane's first row and column, and the (batch,
    head) of the CTA."""

    tile_row: Int32
    first_row: Int32
    column: Int32
    head: Int32
    batch: Int32


def lanes_per_row(head_dim: int, vector: int = VECTOR) -> int:
    """Lanes that share a row: the largest power of two of them that divides its vectors, so that a
    shuffle can reduce over them."""
    vectors = head_dim // vector
    lanes = vectors & -vectors
    assert vectors * vector == head_dim and lanes <= 32
    return lanes


def columns_per_pass(head_dim: int, vector: int = VECTOR) -> int:
    """Columns that a row's lanes handle at a time: a lane's vectors are this far apart."""
    return lanes_per_row(head_dim, vector) * vector


def row_tile(
    padded_rows: Int32, heads: Int32, head_dim: int, tile_m: int, vector: int = VECTOR
) -> RowTile:
    """Decode block and thread index; the grid is batch * heads * padded_rows / tile_m blocks."""
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    blocks, _, _ = cute.arch.grid_dim()
    block = blocks - 1 - block
    tiles = padded_rows // tile_m
    lanes = lanes_per_row(head_dim, vector)
    tile_row = block % tiles * tile_m
    return RowTile(
        tile_row=tile_row,
        first_row=tile_row + thread // lanes,
        column=thread % lanes * vector,
        head=block // tiles % heads,
        batch=block // (tiles * heads),
    )


def rows_per_pass(head_dim: int, vector: int = VECTOR) -> int:
    """Rows that the CTA handles at a time: a thread's rows are this far apart."""
    return THREADS // lanes_per_row(head_dim, vector)


def vector_at(row: cute.Tensor, column: Int32, length: int = VECTOR) -> cute.Tensor:
    """The `length` elements of a contiguous row from `column` (a multiple of `length`) on, for
    16-byte copies."""
    return cute.local_tile(row, (length,), (column // length,))
