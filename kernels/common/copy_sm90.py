# SPDX-License-Identifier: Apache-2.0
"""Tiles between global memory, shared memory and accumulators."""

import cutlass
from cutlass import Int32, Int64, cute
from cutlass.cute.nvgpu import cpasync, warp

from kernels.common.mma_sm90 import LANES_PER_ROW, to_16_bit


def tma_atom(op, array: cute.Tensor, layout: cute.ComposedLayout, tile: tuple[int, int]):
    """(atom, coordinate tensor of `array`) moving one stage of a shared-memory `layout`."""
    return cpasync.make_tiled_tma_atom(op, array, cute.select(layout, mode=[0, 1]), tile)


def tma_tiles(atom: cute.CopyAtom, smem: cute.Tensor, gmem: cute.Tensor):
    """(smem, gmem) as `atom` copies them: the tile's two modes become one, the others stay."""
    tile_first = (cute.group_modes(t, 0, 2) for t in (smem, gmem))
    return cpasync.tma_partition(atom, 0, cute.make_layout(1), *tile_first)


def store_matrix(dtype: type[cutlass.Numeric], tiled_mma: cute.TiledMma) -> cute.TiledCopy:
    """The copy of an accumulator, rounded to 16 bits, to a row-major shared-memory tile."""
    atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(transpose=False, num_matrices=4), dtype)
    return cute.make_tiled_copy_C(atom, tiled_mma)


@cute.jit
def accumulator_to_smem(
    acc: cute.Tensor, tiled_mma: cute.TiledMma, thread: Int32, smem: cute.Tensor
):
    """Round this thread's part of an accumulator and write it to `smem` (rows, columns)."""
    copy = store_matrix(smem.element_type, tiled_mma)
    rounded = copy.retile(to_16_bit(acc, smem.element_type))
    cute.copy(copy, rounded, copy.get_slice(thread).partition_D(smem))


@cute.jit
def tma_store(atom: cute.CopyAtom, smem: cute.Tensor, gmem: cute.Tensor):
    """Store a tile and wait until it has been read. Called by one warp, after a proxy fence and a
    barrier. Rows past the array's end are clipped."""
    smem, gmem = tma_tiles(atom, smem, gmem)
    # Unlike a TMA load, the copy doesn't elect its lane: all 32 would store (seen in the PTX).
    with cute.arch.elect_one():
        cute.copy(atom, smem, gmem)
        cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)


def reduction_address(gmem: cute.Tensor, thread: Int32) -> Int64:
    """Where in a (64, N) fp32 tile `add_to_gmem` puts this thread's first element, as bytes."""
    warp, lane = thread // 32, thread % 32
    place = (16 * warp + lane // LANES_PER_ROW, 4 * (lane % LANES_PER_ROW))
    return cute.domain_offset(place, gmem).iterator.toint()


@cute.jit
def add_to_gmem(
    acc: cute.Tensor, address: Int64, column: cutlass.Constexpr, row_stride: cutlass.Constexpr
):
    """Add one warpgroup's m64nN accumulator to an fp32 tile in global memory from `column` on, by
    vector reductions, in `Split.products`'s order of columns.

    `address` is the tile's `reduction_address`, rows are 16-byte aligned and N % 16 == 0. In that
    order four consecutive elements are one lane's and the four lanes of a row add 64 consecutive
    bytes. In the natural one, lanes would first have to exchange: two shuffles per vector, each as
    much of shared memory's data path as the operands of a quarter of an MMA.
    """
    values = cute.make_tensor(acc.iterator, cute.make_layout((2, 2, cute.size(acc) // 4)))
    for v in cutlass.range_constexpr(0, cute.size(values, mode=[2]), 2):
        for r in cutlass.range_constexpr(2):
            offset = 4 * (8 * r * row_stride + 8 * v + column)
            cute.arch.inline_ptx(
                f"red.relaxed.gpu.global.add.v4.f32 [{{$r0}} + {offset}], "
                "{ {$r1}, {$r2}, {$r3}, {$r4} };",
                read_only_args=[address, *(values[c, r, v + h] for h in (0, 1) for c in (0, 1))],
            )
