# SPDX-License-Identifier: Apache-2.0
"""Backward, last launch: dq = softmax_scale * dq_accum, in the 16-bit type and without the padding.

Bound by memory: it reads dq_accum once and writes dq once.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, cute

from fa4_jax._variants import Split, Variant
from kernels.common.row_tiles import (
    THREADS,
    VECTOR,
    RowTile,
    columns_per_pass,
    row_tile,
    rows_per_pass,
    vector_at,
)

BATCH = 32  # columns of dq_accum that a thread has in flight


class BackwardPostprocess:
    """Host entry and kernel of one row; `__call__` follows `Variant.signature`."""

    def __init__(self, variant: Variant):
        self.head_dim, self.tile_m = variant.head_dim, variant.tiles.tile_m
        # Columns that a lane handles at a time, and (shape, stride) of their places in dq_accum.
        self.vector, self.places = VECTOR, ((VECTOR,), (1,))
        if variant.tiles.split is Split.products:
            self.vector, self.places = 16, ((2, 4, 2), (1, 4, 2))

    @cute.jit
    def __call__(
        self,
        stream: cuda.CUstream,
        softmax_scale: Float32,
        dq_accum: cute.Tensor,
        dq: cute.Tensor,
    ):
        batch, heads, padded_rows, _ = dq_accum.shape
        self.kernel(dq_accum, dq, softmax_scale).launch(
            grid=(padded_rows // self.tile_m * heads * batch, 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(self, dq_accum: cute.Tensor, dq: cute.Tensor, softmax_scale: Float32):
        _, heads, padded_rows, _ = dq_accum.shape
        tile = row_tile(padded_rows, heads, self.head_dim, self.tile_m, self.vector)
        passes = self.head_dim // columns_per_pass(self.head_dim, self.vector)
        pieces = self.tile_m // rows_per_pass(self.head_dim, self.vector) * passes
        batch = min(BATCH // self.vector, pieces)
        for start in cutlass.range_constexpr(0, pieces, batch):
            count = min(batch, pieces - start)
            values = cute.make_rmem_tensor((self.vector, count), Float32)
            for i in cutlass.range_constexpr(count):
                # Padding rows, too: a branch would keep these loads from being in flight together.
                row, column = self.place(tile, start + i)
                # Its rows' stride is static, and a head may have more than 2^31 elements.
                accumulator = dq_accum[tile.batch, tile.head, Int64(row), None]
                self.load(accumulator, column, values[None, i])
            for i in cutlass.range_constexpr(count):
                row, column = self.place(tile, start + i)
                if row < dq.shape[1]:
                    target = dq[tile.batch, row, tile.head, None]
                    self.store(values[None, i], softmax_scale, target, column)

    def place(self, tile: RowTile, piece: int) -> tuple[Int32, Int32]:
        """Row and first column of one of this lane's pieces."""
        width = columns_per_pass(self.head_dim, self.vector)
        row, in_row = divmod(piece, self.head_dim // width)
        rows = rows_per_pass(self.head_dim, self.vector)
        return tile.first_row + row * rows, tile.column + in_row * width

    @cute.jit
    def load(self, accumulator: cute.Tensor, column: Int32, values: cute.Tensor):
        """A piece of a row."""
        for i in cutlass.range_constexpr(0, self.vector, 4):
            piece = cute.make_tensor(values.iterator + i, cute.make_layout(4))
            cute.autovec_copy(vector_at(accumulator, column + i, 4), piece)

    @cute.jit
    def store(self, values: cute.Tensor, softmax_scale: Float32, dq: cute.Tensor, column: Int32):
        """dq = softmax_scale * values, with columns in their order."""
        shape, stride = self.places
        ordered = cute.make_tensor(values.iterator, cute.make_layout(shape, stride=stride))
        rounded = cute.make_rmem_tensor(shape, dq.element_type)
        rounded.store((ordered.load() * softmax_scale).to(dq.element_type))
        for i in cutlass.range_constexpr(0, self.vector, VECTOR):
            piece = cute.make_tensor(rounded.iterator + i, cute.make_layout(VECTOR))
            cute.autovec_copy(piece, vector_at(dq, column + i))
