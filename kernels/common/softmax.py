# SPDX-License-Identifier: Apache-2.0
"""Online softmax over register tiles (Milakov & Gimelshein 2018; FlashAttention, section 3.1).

Per row of this thread: the running maximum of the scores, as an exponent of 2, and this thread's
share of the running sum. Four adjacent lanes share a row (`mma_sm90`), so the maximum is reduced
over them for every tile, the sum once at the end.
"""

import math
from typing import NamedTuple

import cutlass
from cutlass import Float32, const_expr, cute

from fa4_jax._variants import Softmax
from kernels.common.fast_math import max3
from kernels.common.mask import Intervals
from kernels.common.mma_sm90 import LANES_PER_ROW

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
# `Softmax.finite`'s maximum of a row that has seen no key.
LOWEST = -3.0e38
# `raise_kept_maximum` keeps a maximum until a new one is larger by more, as a power of two.
KEPT = 8.0


class OnlineSoftmax(NamedTuple):
    """Register state, one entry per row of this thread."""

    row_max: cute.Tensor  # times scale_log2, rounded
    row_sum: cute.Tensor
    decay: cute.Tensor  # exp2(old maximum - new maximum), to rescale what was summed before


def make_online_softmax(rows: int, order: Softmax) -> OnlineSoftmax:
    """The state before any tile: nothing seen, sum 0. `order` is the variant's."""
    state = OnlineSoftmax(*(cute.make_rmem_tensor(rows, Float32) for _ in OnlineSoftmax._fields))
    state.row_max.fill(LOWEST if order is Softmax.finite else -Float32.inf)
    state.row_sum.fill(0.0)
    return state


def row_maximum(scores: cute.Tensor, row: int) -> Float32:
    """Maximum of a row over its four lanes. Four chains: one of 32 dependent maxima would be
    latency bound."""
    chains = [scores[row, c] for c in range(4)]
    for c in range(4, cute.size(scores, mode=[1])):
        chains[c % 4] = cute.arch.fmax(chains[c % 4], scores[row, c])
    maximum = cute.arch.fmax(
        cute.arch.fmax(chains[0], chains[1]), cute.arch.fmax(chains[2], chains[3])
    )
    return cute.arch.warp_reduction(maximum, cute.arch.fmax, threads_in_group=LANES_PER_ROW)


@cute.jit
def online_softmax(
    state: OnlineSoftmax, scores: cute.Tensor, scale_log2: Float32, order: cutlass.Constexpr
):
    """scores (rows, columns), raw q k^T with -inf where masked -> exp2(scale_log2 * (scores -
    maximum)).

    Updates the state and leaves in `state.decay` the factor for everything accumulated so far.
    `order` is the variant's `Softmax`.
    """
    rows = cute.size(scores, mode=[0])
    shifts = [Float32(0.0)] * rows
    for r in cutlass.range_constexpr(rows):
        shifts[r] = _raise_maximum(state, scores, r, scale_log2, order)
    for r in cutlass.range_constexpr(rows):
        probabilities = cute.math.exp2(
            scores[r, None].load() * scale_log2 + shifts[r], fastmath=True
        )
        scores[r, None].store(probabilities)
        # A tile's sum by itself: one of a million terms in turn would be 2e-5 off. Started from a
        # zero that takes the factor, it lets ptxas rescale out before the exponentials.
        start = Float32(0.0)
        if const_expr(order is Softmax.maxima_first):
            start = state.decay[r] * Float32(0.0)
        total = probabilities.reduce(cute.ReductionOp.ADD, start, 0)
        state.row_sum[r] = state.row_sum[r] * state.decay[r] + total


@cute.jit
def _raise_maximum(
    state: OnlineSoftmax,
    scores: cute.Tensor,
    r: cutlass.Constexpr,
    scale_log2: Float32,
    order: cutlass.Constexpr,
) -> Float32:
    """Take row r of `scores` into the maximum; returns the summand of its exponents."""
    # Rounded, then compared: the difference below is of numbers that were kept, 0 where the maximum
    # stays. An fma of the old raw maximum and the new product would leave that product's rounding
    # error, the same for each tile: after a million keys lse was off by 5e-4.
    new_max = cute.arch.fmax(state.row_max[r], row_maximum(scores, r) * scale_log2)
    base = new_max
    if const_expr(order is not Softmax.finite):
        # A row that has seen no key yet: subtracting its maximum would give -inf + inf.
        base = Float32(0.0) if new_max == -Float32.inf else new_max
    state.decay[r] = cute.math.exp2(state.row_max[r] - base, fastmath=True)
    state.row_max[r] = new_max
    return -base


@cute.jit
def rescale(acc: cute.Tensor, factors: cute.Tensor):
    """Multiply row r of `acc` (rows, columns) by factors[r]."""
    for r in cutlass.range_constexpr(cute.size(acc, mode=[0])):
        acc[r, None].store(acc[r, None].load() * factors[r])


@cute.jit
def finish(state: OnlineSoftmax, sink: Float32):
    """Turn the state into results: decay <- `normalise`'s factor, row_max <- its lse."""
    for r in cutlass.range_constexpr(cute.size(state.row_sum)):
        total = cute.arch.warp_reduction(
            state.row_sum[r], lambda a, b: a + b, threads_in_group=LANES_PER_ROW
        )
        state.decay[r], state.row_max[r] = normalise(total, state.row_max[r] * LN_2, sink)


@cute.jit
def normalise(total: Float32, highest: Float32, sink: Float32) -> tuple[Float32, Float32]:
    """(factor, lse) of a row, from the sum of exp(scaled score - highest): 1 / sum, 0 for a row
    that saw nothing, and the natural logarithm of exp(sink) + the sum of exp(scaled score), -inf
    for an empty row."""
    weight = Float32(1.0)
    if sink > -Float32.inf:
        # A sink may be far above all scores, or alone.
        keys, highest = highest, cute.arch.fmax(highest, sink)
        weight = cute.math.exp2((keys - highest) * LOG2_E, fastmath=True)
        total = total * weight + cute.math.exp2((sink - highest) * LOG2_E, fastmath=True)
    factor = Float32(0.0) if total == 0.0 else weight * cute.arch.rcp_approx(total)
    return factor, highest + cute.math.log2(total, fastmath=True) * LN_2


@cute.jit
def spoil(state: OnlineSoftmax, seen: Intervals):
    """NaN for the results of broken rows."""
    for r in cutlass.range_constexpr(cute.size(seen.first)):
        if seen.first[r] < 0:
            state.decay[r] = state.row_max[r] = Float32.nan


@cute.jit
def raise_kept_maximum(
    row_max: Float32, scores: list[Float32], scale_log2: Float32
) -> tuple[Float32, Float32]:
    """(maximum of the row, factor of what was summed before): the old maximum and 1, unless the new
    one is larger by more than 2^`KEPT` (FlashAttention-4, section 3.2). Without a branch; for a
    thread that has a whole row."""
    chains = [row_max, *scores[:3]]
    for i in cutlass.range_constexpr(3, len(scores) - 1, 2):
        chain = i // 2 % 4
        chains[chain] = max3(chains[chain], scores[i], scores[i + 1])
    chains[0] = cute.arch.fmax(chains[0], scores[len(scores) - 1])
    highest = max3(max3(chains[0], chains[1], chains[2]), chains[3], row_max)
    # NaN where the row has seen nothing yet, and still doesn't.
    raised = (highest - row_max) * scale_log2
    exponent = -raised
    factor = cute.math.exp2(exponent, fastmath=True) if raised > KEPT else Float32(1.0)
    return (highest if raised > KEPT else row_max), factor
