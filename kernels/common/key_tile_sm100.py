# SPDX-License-Identifier: Apache-2.0
"""What Blackwell's backwards share beside `kernels.common.key_tile`: loads, what is known of a
query tile's rows, p of scores, and a key's row of dk or dv."""

import cutlass
from cutlass import Boolean, Float32, Int32, const_expr, cute
from cutlass.cute.nvgpu import cpasync

from kernels.common import tmem
from kernels.common.key_lanes import (
    capped_probabilities,
    gaps,
    mask_queries,
    packed,
    probabilities,
    statistic,
)
from kernels.common.key_tile import Problem, Scalars, Statistics
from kernels.common.mask import mask_row
from kernels.common.roles_sm100 import mma_tiles

PIECE = tmem.STEP  # numbers that a thread reads from its lane at a time


def at(fragment: cute.Tensor, stage: Int32) -> cute.Tensor:
    """The descriptors of one stage."""
    if cute.size(fragment, mode=[3]) == 1:
        return fragment[None, None, None, 0]
    return fragment[None, None, None, cute.arch.make_warp_uniform(stage)]


def operand_tiles(
    atom: cute.CopyAtom, smem: cute.Tensor, gmem: cute.Tensor, rows: int, partition
) -> tuple:
    """(smem, gmem) as `atom` copies tiles of so many rows of an operand (rows, dim), which is
    partitioned as one of an MMA."""
    tiles = cute.local_tile(gmem, (rows, gmem.shape[1]), (None, 0))
    return mma_tiles(atom, smem, partition(tiles))


@cute.jit
def fetch(atom: cute.CopyAtom, tiles: tuple, place: Int32, ring: tuple, slot: tuple[Int32, Int32]):
    """Tile `place` of (shared memory, global memory), when slot (index, phase) of the ring (full,
    empty) is free. Called by one warp."""
    smem, gmem = tiles
    full, empty = ring
    index, phase = slot
    cute.arch.mbarrier_wait(empty + index, phase ^ 1)
    stage = smem[None, index]
    with cute.arch.elect_one():
        size = cute.size(stage) * smem.element_type.width // 8
        cute.arch.mbarrier_arrive_and_expect_tx(full + index, size)
    cute.copy(atom, gmem[None, place], stage, tma_bar_ptr=full + index)


@cute.jit
def fetch_rows(rows: tuple, m: Int32, ring: tuple, phase: Int32):
    """What is known of the rows of query tile m: (global memory, shared memory) of each. Called by
    one warp."""
    full, empty = ring
    number = cute.size(rows[0][1])
    cute.arch.mbarrier_wait(empty, phase ^ 1)
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive_and_expect_tx(full, 4 * number * len(rows))
    for gmem, smem in rows:
        bulk = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), gmem.element_type)
        with cute.arch.elect_one():
            cute.copy(bulk, cute.local_tile(gmem, (number,), (m,)), smem, mbar_ptr=full)


def rows_of_head(gmem: Statistics, smem: Statistics, head: Int32, batch: Int32) -> tuple:
    """What `fetch_rows` takes of a head: lse_log2 with intervals, and dpsum."""
    interval = tuple(bound[batch, None] for bound in gmem.interval)
    first = (gmem.lse_log2[batch, head, None], smem.lse_log2)
    return (
        (first, *zip(interval, smem.interval, strict=True)),
        ((gmem.dpsum[batch, head, None], smem.dpsum),),
    )


@cute.jit
def weigh(  # noqa: PLR0913 - a mask, and what a score is weighed by
    scores: list[Float32],
    first: Int32,
    key: Int32,
    seen: tuple[Int32, Int32],
    masked: Boolean,
    rows: Statistics,
    scalars: Scalars,
) -> tuple[list[Float32], list[Float32]]:
    """p, and the factors of dp - dpsum, of scores of the queries of a tile from `first` on; queries
    [seen[0], seen[1]) of the tile see the key, unless `rows` has intervals."""
    lse_log2 = statistic(rows.lse_log2, first, len(scores))
    if const_expr(len(scalars.softcap) > 0):
        scores = gaps(scores, scalars.softcap.exponent_scale)
    if masked:
        if const_expr(len(rows.interval) > 0):
            scores = mask_queries(scores, key, first, rows.interval)
        else:
            scores = mask_row(scores, seen[0] - first, seen[1] - first)
    if const_expr(len(scalars.softcap) > 0):
        p, factors = capped_probabilities(scores, lse_log2, scalars.scale_log2())
    else:
        p = factors = probabilities(scores, lse_log2, scalars.scale_log2())
    return p, factors


@cute.jit
def queries_of(problem: Problem, key: Int32) -> tuple[Int32, Int32]:
    """The queries [first, end) that see a key by the band, none of one past the end."""
    band = problem.scalars.band
    first = key - band.upper
    return first, key - band.lower + 1 if key < problem.seqlen_k else first


@cute.jit
def write_gradient(
    acc: Int32,
    scale: Float32,
    to: tuple[cute.Tensor, Int32],
    columns: tuple[Int32, int],
    rows: Int32,
):
    """This thread's row of an accumulator, times `scale`: columns [columns[0], columns[0] +
    columns[1]) to a row of an array (rows, dim), if it has it."""
    array, row = to
    first, count = columns
    target = array[cutlass.min(row, rows - 1), None]
    words = cute.make_rmem_tensor(PIECE // 2, Int32)
    rounded = cute.make_tensor(
        cute.recast_ptr(words.iterator, dtype=array.element_type), cute.make_layout(PIECE)
    )
    for place in cutlass.range_constexpr(count // PIECE):
        values = tmem.load_columns(acc + first + place * PIECE, PIECE)
        scaled = packed([value * scale for value in values], array.element_type)
        for i in cutlass.range_constexpr(PIECE // 2):
            words[i] = scaled[i]
        if row < rows:
            piece = first // PIECE + place
            cute.autovec_copy(rounded, cute.local_tile(target, (PIECE,), (piece,)))
