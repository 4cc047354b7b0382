# SPDX-License-Identifier: Apache-2.0
"""The elementwise steps of a backward on transposed scores in tensor memory: a thread has a key's
scores of consecutive queries, so what is known of a query is the same for all threads.

    p  = exp2(scale_log2 k q^T - lse_log2)
    dS = p (v dout^T - dpsum)

With a softcap as `kernels.common.key_tile` says. On Hopper the same is done to accumulators.
"""

import cutlass
from cutlass import Float32, Int32, cute

from kernels.common.fast_math import (
    fma,
    gap,
    round_pair,
    select_inside,
    slope_of_gap,
    tanh_of_gap,
)

VECTOR = 4  # numbers of one load


@cute.jit
def statistic(rows: cute.Tensor, first: Int32, count: cutlass.Constexpr) -> list:
    """rows[first:first + count] of shared memory; `first` is a multiple of `VECTOR`."""
    values = []
    for start in cutlass.range_constexpr(0, count, VECTOR):
        copy = cute.make_rmem_tensor(VECTOR, rows.element_type)
        cute.autovec_copy(cute.local_tile(rows, (VECTOR,), ((first + start) // VECTOR,)), copy)
        values += [copy[i] for i in range(VECTOR)]
    return values


@cute.jit
def mask_queries(
    scores: list[Float32], key: Int32, first: Int32, interval: tuple[cute.Tensor, cute.Tensor]
) -> list[Float32]:
    """-inf for queries, from `first` of their tile on, whose interval [start, end) hasn't the
    key."""
    start, end = (statistic(bound, first, len(scores)) for bound in interval)
    return [select_inside(scores[i], key, start[i], end[i]) for i in range(len(scores))]


@cute.jit
def probabilities(
    scores: list[Float32], lse_log2: list[Float32], scale_log2: Float32
) -> list[Float32]:
    """p of scores."""
    p = []
    for i in cutlass.range_constexpr(0, len(scores), 2):
        # Negated: an fma's summand would have to be, and the exponential negates for nothing.
        pair = cute.arch.fma_packed_f32x2(
            (scores[i], scores[i + 1]), (-scale_log2,) * 2, (lse_log2[i], lse_log2[i + 1])
        )
        p += [cute.math.exp2(-x, fastmath=True) for x in pair]
    return p


@cute.jit
def capped_probabilities(
    gaps: list[Float32], lse_log2: list[Float32], scale_log2: Float32
) -> tuple[list[Float32], list[Float32]]:
    """p, and p (1 - t^2), which dS multiplies, of the `gap`s of tanh t. Where masked, they are
    -inf, and both are 0."""
    p = [
        cute.math.exp2(fma(tanh_of_gap(u), scale_log2, -log_sum), fastmath=True)
        for u, log_sum in zip(gaps, lse_log2, strict=True)
    ]
    return p, [x * slope_of_gap(u) for x, u in zip(p, gaps, strict=True)]


@cute.jit
def gaps(scores: list[Float32], exponent_scale: Float32) -> list[Float32]:
    """The `gap`s of scores; see `key_tile.Softcap`."""
    return [gap(score * exponent_scale) for score in scores]


@cute.jit
def score_gradients(p: list[Float32], dp: list[Float32], dpsum: list[Float32]) -> list[Float32]:
    """dS = p * (dp - dpsum)."""
    ds = []
    for i in cutlass.range_constexpr(0, len(p), 2):
        pair = cute.arch.sub_packed_f32x2((dp[i], dp[i + 1]), (dpsum[i], dpsum[i + 1]))
        ds += cute.arch.mul_packed_f32x2(pair, (p[i], p[i + 1]))
    return ds


def packed(values: list[Float32], dtype: type[cutlass.Numeric]) -> list[Int32]:
    """Pairs of numbers as words, rounded to a 16-bit type."""
    return [round_pair(values[i], values[i + 1], dtype) for i in range(0, len(values), 2)]


def swizzled_row(start: Int32, row: Int32) -> Int32:
    """Address, in bytes, of a row of a tile of 128-byte rows from `start` on, such that
    `store_row` finds the 16-byte pieces: the swizzle permutes the eight of a row by the row's
    number modulo 8."""
    return start + 128 * row + 16 * (row % 8)


@cute.jit
def store_row(row: Int32, words: list, offset: cutlass.Constexpr, first: Int32):
    """Write words, as many as a multiple of four, from 16-byte piece `first` on of a
    `swizzled_row`, `offset` bytes further. The row's pieces are the same for every eighth thread,
    so a warp's stores meet no bank twice."""
    for i in cutlass.range_constexpr(0, len(words), 4):
        place = row ^ (16 * (first + i // 4))
        cute.arch.inline_ptx(
            f"st.shared.v4.b32 [{{$r0}} + {offset}], {{ {{$r1}}, {{$r2}}, {{$r3}}, {{$r4}} }};",
            read_only_args=[place, *words[i : i + 4]],
        )
