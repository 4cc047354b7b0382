# SPDX-License-Identifier: Apache-2.0
"""Tiles between shared memory and accumulators of WGMMA, and from these to global memory."""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute.nvgpu import warp

from kernels.common.fast_math import not_ahead, round_pair
from kernels.common.mask import accumulator_coordinates
from kernels.common.mma_sm90 import LANES_PER_ROW, to_16_bit


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


class MatrixRows(NamedTuple):
    """The row of 8 by 8 matrices that a thread addresses in tiles of 128-byte rows."""

    address: Int32  # in shared memory, bytes
    stage_step: int
    column_step: int  # to the next 64 columns


def matrix_rows(smem: cute.Tensor, layout: cute.ComposedLayout, thread: Int32) -> MatrixRows:
    """`MatrixRows` of `smem`, whose `layout` (rows, columns, stages) is of 16-bit elements with the
    128-byte swizzle. See `slab_pairs`: here the compiler computes four addresses for every tile,
    long before it stores there, and spilled them (backward, d=128)."""
    warp, lane = thread // 32, thread % 32
    linear = layout.outer((16 * warp + lane % 16, 8 * (lane // 16), 0))
    offset = linear ^ (((linear >> 6) & 7) << 3)
    stage_step, column_step = (2 * layout.outer(place) for place in ((0, 0, 1), (0, 64, 0)))
    return MatrixRows(smem.iterator.toint() + 2 * offset, stage_step, column_step)


@cute.jit
def store_matrices(
    acc: cute.Tensor, to: MatrixRows, stage: Int32, first: cutlass.Constexpr, end: cutlass.Constexpr
):
    """Write columns [first, end), multiples of 16, of this thread's part of a 16-bit accumulator of
    64 rows per warpgroup."""
    packed = cute.recast_tensor(acc, Int32)
    address = not_ahead(to.address) + stage * to.stage_step
    for v in cutlass.range_constexpr(first // 16, end // 16):
        offset = v // 4 * to.column_step
        cute.arch.inline_ptx(
            f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [{{$r0}} + {offset}], "
            "{ {$r1}, {$r2}, {$r3}, {$r4} };",
            read_only_args=[address ^ (32 * (v % 4)), *(packed[4 * v + i] for i in range(4))],
        )


class SlabPairs(NamedTuple):
    """Where a thread's pairs of an fp32 accumulator lie in a slab of 128-byte rows."""

    slab: cute.Tensor
    offset: Int32  # where its first store goes
    row: Int32  # its first row
    row_step: int  # to the second, 8 below
    column_step: int  # to the next 32 columns


def slab_pairs(
    slab: cute.Tensor,
    layout: cute.ComposedLayout,
    tiled_mma: cute.TiledMma,
    thread_and_stage: tuple[Int32, Int32],
    tile: tuple[int, int],
) -> SlabPairs:
    """`SlabPairs` of a thread for one stage of `layout` (rows, columns, stages), fp32 with the
    128-byte swizzle, whose elements `slab` sees flat.

    The swizzle permutes the eight 16-byte pieces of a 128-byte row by the row's number modulo 8. So
    an offset and its bits that tell 8 columns from the next are enough, where the compiler, not
    seeing it, keeps 16 addresses in registers.

    Half a warp stores 32 bytes of four rows at a time, and the same columns of an even row and of
    the next one lie in the same banks. So an odd row's first store is 16 columns further:
    without, these stores take twice as long, and a backward 4 % more cycles (d=128).
    """
    thread, stage = thread_and_stage
    first = accumulator_coordinates(tiled_mma, thread, tile)
    linear = layout.outer((first.row, first.column, stage))
    offset = linear ^ (((linear >> 5) & 7) << 2) ^ (16 * (first.row % 2))
    steps = layout.outer((8, 0, 0)), layout.outer((0, 32, 0))
    return SlabPairs(slab, offset, first.row, *steps)


@cute.jit
def store_pairs(acc: cute.Tensor, to: SlabPairs):
    """Write a thread's accumulator (2 rows, columns) to its place in the slab, pair by pair."""
    first = not_ahead(to.offset)
    odd = to.row % 2 == 1
    for r in cutlass.range_constexpr(2):
        for v in cutlass.range_constexpr(cute.size(acc, mode=[1]) // 2):
            pair = cute.make_rmem_tensor(2, Float32)
            for c in cutlass.range_constexpr(2):
                pair[c] = acc[r, 2 * (v ^ 2) + c] if odd else acc[r, 2 * v + c]
            offset = cute.assume(first ^ (8 * (v % 4)), divby=2)
            offset += r * to.row_step + v // 4 * to.column_step
            cute.autovec_copy(
                pair, cute.make_tensor(to.slab.iterator + offset, cute.make_layout(2))
            )


@cute.jit
def accumulator_to_gmem(acc: cute.Tensor, thread: Int32, gmem: cute.Tensor, row: Int32):
    """Round this thread's part of one warpgroup's accumulator of 64 rows or more, (rows, columns),
    and store it to `gmem` (rows, columns); its own first row is row `row`. Rows past the array's
    end are left out. No shared memory, and no barrier.

    A row lies in four lanes, two columns in eight of each. Of two such groups, neighbouring lanes
    exchange two columns each: a lane stores 8 bytes and the four of a row a whole sector of 32, for
    one shuffle, where 16 bytes a lane would take two.
    """
    pair = thread % LANES_PER_ROW
    odd = pair % 2 == 1
    address = cute.domain_offset((row, 2 * pair), gmem).iterator.toint()
    address += Int64(12) if odd else Int64(0)  # its pair of the second group, less its neighbour's
    rows = gmem.shape[0] - row
    for r in cutlass.range_constexpr(cute.size(acc, mode=[0])):
        below = 64 * (r // 2) + 8 * (r % 2)
        to = address + below * 2 * gmem.stride[0]
        for c in cutlass.range_constexpr(0, cute.size(acc, mode=[1]), 4):
            first, second = (
                round_pair(acc[r, c + h], acc[r, c + h + 1], gmem.element_type) for h in (0, 2)
            )
            taken = cute.arch.shuffle_sync_bfly(first if odd else second, offset=1)
            cute.arch.inline_ptx(
                f"{{ .reg .pred inside; setp.gt.s32 inside, {{$r1}}, {below}; "
                f"@inside st.global.v2.b32 [{{$r0}} + {8 * c}], {{ {{$r2}}, {{$r3}} }}; }}",
                read_only_args=[to, rows, taken if odd else first, second if odd else taken],
            )


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
