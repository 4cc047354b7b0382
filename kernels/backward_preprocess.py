# SPDX-License-Identifier: Apache-2.0
"""Backward, first launch: the row statistics that the main kernel needs, and an empty dq
accumulator.

    dpsum    = rowsum(out * dout) - dlse       0 in padding rows
    lse_log2 = lse * log2(e)                   +inf in padding rows and rows that see no key
    dq_accum = 0

With lse_log2 = +inf the main kernel's exp2(score - lse_log2) is 0 for such a row, so it needs no
query-side mask. The dlse term is FlashAttention's: d lse / d score is the probability itself.
Bound by memory: it reads out and dout once and writes dq_accum once.
"""

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, cute

from fa4_jax._variants import Variant
from kernels.common.row_tiles import (
    THREADS,
    VECTOR,
    RowTile,
    columns_per_pass,
    lanes_per_row,
    row_tile,
    rows_per_pass,
    vector_at,
)
from kernels.common.softmax import LOG2_E

BATCH = 4  # vectors of out, and of dout, that a thread has in flight


class BackwardPreprocess:
    """Host entry and kernel of one row; `__call__` follows `Variant.signature`."""

    def __init__(self, variant: Variant):
        self.head_dim, self.head_dim_v = variant.head_dim, variant.head_dim_v
        self.tile_m = variant.tiles.tile_m

    @cute.jit
    def __call__(
        self,
        stream: cuda.CUstream,
        out: cute.Tensor,
        dout: cute.Tensor,
        lse: cute.Tensor,
        dlse: cute.Tensor,
        dpsum: cute.Tensor,
        lse_log2: cute.Tensor,
        dq_accum: cute.Tensor,
    ):
        batch, heads, padded_rows, _ = dq_accum.shape
        self.kernel(out, dout, lse, dlse, dpsum, lse_log2, dq_accum).launch(
            grid=(padded_rows // self.tile_m * heads * batch, 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        out: cute.Tensor,
        dout: cute.Tensor,
        lse: cute.Tensor,
        dlse: cute.Tensor,
        dpsum: cute.Tensor,
        lse_log2: cute.Tensor,
        dq_accum: cute.Tensor,
    ):
        _, heads, padded_rows, _ = dq_accum.shape
        tile = row_tile(padded_rows, heads, self.head_dim_v, self.tile_m)
        self.zero(dq_accum, tile)
        lanes = lanes_per_row(self.head_dim_v)
        step = rows_per_pass(self.head_dim_v)
        batch = BATCH * columns_per_pass(self.head_dim_v) // self.head_dim_v * step
        for start in cutlass.range_constexpr(0, self.tile_m, batch):
            products = cute.make_rmem_tensor(batch // step, Float32)
            for i in cutlass.range_constexpr(batch // step):
                # A row past the end reads the last one again: a branch would keep the loads of
                # these rows from being in flight together.
                row = cutlass.min(tile.first_row + (start + i * step), out.shape[1] - 1)
                a = out[tile.batch, row, tile.head, None]
                b = dout[tile.batch, row, tile.head, None]
                products[i] = self.dot(a, b, tile.column)
            for i in cutlass.range_constexpr(batch // step):
                row = tile.first_row + (start + i * step)
                product = cute.arch.warp_reduction(
                    products[i], lambda x, y: x + y, threads_in_group=lanes
                )
                if tile.column == 0:
                    statistic, log_sum = Float32(0.0), Float32.inf
                    if row < out.shape[1]:
                        log_sum = lse[tile.batch, tile.head, row]
                        log_sum = Float32.inf if log_sum == -Float32.inf else log_sum * LOG2_E
                        statistic = product - dlse[tile.batch, tile.head, row]
                    dpsum[tile.batch, tile.head, row] = statistic
                    lse_log2[tile.batch, tile.head, row] = log_sum

    @cute.jit
    def zero(self, dq_accum: cute.Tensor, tile: RowTile):
        """Zero the tile's rows of dq_accum, which are contiguous: neighbouring lanes write
        neighbouring 16 bytes, whatever the head dim. Before anything is read: nobody waits for
        it."""
        thread, _, _ = cute.arch.thread_idx()
        rows = dq_accum[tile.batch, tile.head, None, None]
        # The rows' stride is static, and a head may have more than 2^31 elements.
        rows = cute.domain_offset((Int64(tile.tile_row), 0), rows)
        elements = self.tile_m * dq_accum.shape[3]
        flat = cute.make_tensor(rows.iterator, cute.make_layout(elements))
        zeros = cute.make_rmem_tensor(4, Float32)
        zeros.fill(0.0)
        for start in cutlass.range_constexpr(0, elements, 4 * THREADS):
            cute.autovec_copy(zeros, vector_at(flat, 4 * thread + start, 4))

    @cute.jit
    def dot(self, a: cute.Tensor, b: cute.Tensor, column: Int32) -> Float32:
        """This lane's part of the fp32 inner product of two rows in global memory."""
        product = Float32(0.0)
        for start in cutlass.range_constexpr(0, self.head_dim_v, columns_per_pass(self.head_dim_v)):
            x = cute.make_rmem_tensor(VECTOR, a.element_type)
            y = cute.make_rmem_tensor(VECTOR, b.element_type)
            cute.autovec_copy(vector_at(a, column + start), x)
            cute.autovec_copy(vector_at(b, column + start), y)
            products = x.load().to(Float32) * y.load().to(Float32)
            product = products.reduce(cute.ReductionOp.ADD, product, 0)
        return product
