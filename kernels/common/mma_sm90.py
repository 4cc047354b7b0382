# SPDX-License-Identifier: Apache-2.0
"""Hopper warpgroup MMA: issuing a group, and the register views of its accumulators.

Value (c, r, v) of an m64nN fp32 accumulator held by thread t of the warpgroup (PTX ISA 9.7.15.5.1,
"Register fragments for wgmma.mma_async", matrix D):

    row    = 16 * (t // 32) + 8 * r + (t % 32) // 4
    column = 8 * v + 2 * (t % 4) + c

so a row lives in four adjacent lanes.
"""

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from cutlass.cute.nvgpu import warp, warpgroup

from kernels.common.fast_math import round_pair

LANES_PER_ROW = 4


@cute.jit
def issue_gemm(
    tiled_mma: cute.TiledMma,
    acc: cute.Tensor,
    a: cute.Tensor,
    b: cute.Tensor,
    zero: cutlass.Constexpr,
):
    """Issue acc (+)= a b as one committed WGMMA group; the caller waits for it.

    The atom is local: setting ACCUMULATE on the caller's inside a loop would leak an SSA value out
    of it.
    """
    atom = cute.make_mma_atom(tiled_mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, not zero)
    warpgroup.fence()
    for k in cutlass.range_constexpr(cute.size(a.shape[2])):
        cute.gemm(atom, acc, a[None, None, k], b[None, None, k], acc)
        atom.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()


@cute.jit
def issue_mixed_gemm(
    mmas: tuple[cute.TiledMma, cute.TiledMma],
    acc: cute.Tensor,
    a: tuple[cute.Tensor | tuple[()], cute.Tensor],
    b: cute.Tensor,
):
    """`issue_gemm` of acc = a b, `mmas` with A (in shared memory, in registers); a is (its first
    columns as `read_columns` gives them, all of it in shared memory).

    The first ones, because MMAs of 64 columns that read both operands from shared memory leave it
    no gap: behind them 1.3 % slower, in turns 0.4 % (backward, d=128).
    """
    registers, shared = a
    in_shared, in_registers = (cute.make_mma_atom(mma.op) for mma in mmas)
    kept = 0
    if const_expr(registers != ()):
        kept = cute.size(registers, mode=[2])
    in_shared.set(warpgroup.Field.ACCUMULATE, kept > 0)
    in_registers.set(warpgroup.Field.ACCUMULATE, False)
    warpgroup.fence()
    for k in cutlass.range_constexpr(kept):
        cute.gemm(in_registers, acc, registers[None, None, k], b[None, None, k], acc)
        in_registers.set(warpgroup.Field.ACCUMULATE, True)
    for k in cutlass.range_constexpr(kept, cute.size(shared.shape[2])):
        cute.gemm(in_shared, acc, shared[None, None, k], b[None, None, k], acc)
        in_shared.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()


@cute.jit
def read_columns(
    tiled_mma: cute.TiledMma, smem: cute.Tensor, thread: Int32, columns: cutlass.Constexpr
) -> cute.Tensor | tuple[()]:
    """The first `columns` of a (rows, columns) tile in shared memory, which may be none, as an
    operand A in registers."""
    operand = ()
    if const_expr(columns > 0):
        dtype, rows = smem.element_type, cute.size(smem, mode=[0])
        shape = tiled_mma.get_slice(0).partition_shape_A((rows, columns))
        operand = cute.make_rmem_tensor(shape, dtype)
        matrices = warp.LdMatrix8x8x16bOp(transpose=False, num_matrices=4)
        copy = cute.make_tiled_copy_A(cute.make_copy_atom(matrices, dtype), tiled_mma)
        source, target = copy.get_slice(thread).partition_S(smem), copy.retile(operand)
        for k in cutlass.range_constexpr(cute.size(operand, mode=[2])):
            cute.copy(copy, source[None, None, k], target[None, None, k])
    return operand


def stage(fragment: cute.Tensor, slot) -> cute.Tensor:
    """The descriptors of a pipeline slot.

    Its index is the same in all threads, but ptxas sees that only behind the shuffle: else it
    computes every MMA's descriptor in vector registers and moves it (R2UR), 50 to 70 of a
    tile's 490 to 660 instructions, and in the way of the next MMA.
    """
    return fragment[None, None, None, cute.arch.make_warp_uniform(slot.index)]


def make_accumulator(tiled_mma: cute.TiledMma, tile: tuple[int, int]) -> cute.Tensor:
    """This thread's registers for an fp32 accumulator of `tile` (rows, columns), uninitialised."""
    return cute.make_rmem_tensor(tiled_mma.get_slice(0).partition_shape_C(tile), Float32)


def rows_and_columns(acc: cute.Tensor) -> cute.Tensor:
    """View an accumulator-shaped tensor ((2, 2, V), M, N) as (rows of this thread, columns of this
    thread)."""
    shape, stride = acc.layout.shape, acc.layout.stride
    return cute.make_tensor(
        acc.iterator,
        cute.make_layout(
            ((shape[0][1], shape[1]), (shape[0][0], shape[0][2], shape[2])),
            stride=((stride[0][1], stride[1]), (stride[0][0], stride[0][2], stride[2])),
        ),
    )


def as_a_operand(acc: cute.Tensor) -> cute.Tensor:
    """View a 16-bit accumulator-shaped tensor ((2, 2, V), M, N) as the register A operand ((2, 2,
    2), M, (V/2, N)).

    The accumulator's layout is the A fragment's, two 8-column groups per k16 step: no data moves.
    """
    shape, stride = acc.layout.shape, acc.layout.stride
    return cute.make_tensor(
        acc.iterator,
        cute.make_layout(
            ((shape[0][0], shape[0][1], 2), shape[1], (shape[0][2] // 2, shape[2])),
            stride=(
                (stride[0][0], stride[0][1], stride[0][2]),
                stride[1],
                (2 * stride[0][2], stride[2]),
            ),
        ),
    )


@cute.jit
def to_16_bit(acc: cute.Tensor, dtype: cutlass.Constexpr) -> cute.Tensor:
    """A register copy of an accumulator, rounded to `dtype`."""
    rounded = cute.make_rmem_tensor(acc.layout, dtype)
    round_into(rounded, acc)
    return rounded


@cute.jit
def round_into(rounded: cute.Tensor, acc: cute.Tensor):
    """Write an accumulator into registers of its layout and a 16-bit type.

    The accumulator's neighbours in memory are neighbours in a row, so pairs pack into one register.
    `rounded.store(acc.load().to(dtype))` keeps halves where their number is no power of two, and
    packs them between the fence and the MMA that reads them.
    """
    packed = cute.recast_tensor(rounded, Int32)
    for i in cutlass.range_constexpr(cute.size(packed)):
        packed[i] = round_pair(acc[2 * i], acc[2 * i + 1], rounded.element_type)
