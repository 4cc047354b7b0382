# SPDX-License-Identifier: Apache-2.0
"""What a forward CTA of any architecture does for its query tiles: their order, the key tiles that
they visit, and what their rows see."""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, const_expr, cute

from kernels.common.block_range import BlockRange, blocks_of_ranges, visible_blocks
from kernels.common.fast_math import TANH_EXPONENT
from kernels.common.mask import Band
from kernels.common.scheduler import TileOrder, TileQueue, place_of, tile_order, tile_queue


class QueryIntervals(NamedTuple):
    """Of every query, and of every `BLOCK` queries, which keys it sees."""

    kv_start: cute.Tensor
    kv_end: cute.Tensor
    key_range: cute.Tensor


class Problem(NamedTuple):
    """What all tiles share: their order, the run-time sizes and scalars, and what a query sees."""

    order: TileOrder | TileQueue
    heads: cute.FastDivmodDivisorV2
    group: cute.FastDivmodDivisorV2  # query heads per key/value head
    early: Int32  # rows of a head's first tile that are before its first query
    seqlen_q: Int32
    seqlen_k: Int32
    tanh_scale: Float32  # from q k^T to the exponent of `tanh`, with a softcap
    softmax_scale: Float32  # from there to the logarithm of a weight
    sinks: cute.Tensor
    band: Band
    intervals: QueryIntervals | tuple[()]  # instead of the band


class QueryTile(NamedTuple):
    """A query tile and the key tiles it visits."""

    first_row: Int32  # may be negative: see `query_tiles`
    head: Int32
    kv_head: Int32
    batch: Int32
    blocks: BlockRange


class Tma(NamedTuple):
    """TMA atoms with the coordinate tensors of q, k (rows, D, head, batch), v (V, rows, head,
    batch), out."""

    q: cute.CopyAtom
    g_q: cute.Tensor
    k: cute.CopyAtom
    g_k: cute.Tensor
    v: cute.CopyAtom
    g_v: cute.Tensor
    out: cute.CopyAtom
    g_out: cute.Tensor


def kernel_views(q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, out: cute.Tensor) -> tuple:
    """The buffers (batch, rows, heads, dim) as (rows, dim, heads, batch); v as (dim, rows, ...),
    the B operand of p v. On the host."""
    q, k, out = (
        cute.make_tensor(t.iterator, cute.select(t.layout, mode=[1, 3, 2, 0])) for t in (q, k, out)
    )
    return q, k, cute.make_tensor(v.iterator, cute.select(v.layout, mode=[3, 1, 2, 0])), out


@cute.jit
def query_tiles(  # noqa: PLR0913 - what a row is given
    q: cute.Tensor,
    k: cute.Tensor,
    tile_m: tuple[int, int],
    values_dim: cutlass.Constexpr,
    scales: tuple[Float32, Float32 | None],
    band: Band,
    sinks: cute.Tensor,
    intervals: tuple[cute.Tensor, ...],
    taken: tuple[cute.Tensor, ...],
    num_sms: Int32,
) -> Problem:
    """The query tiles of q and k (rows, dim, heads, batch), of tile_m[0] rows, of which each
    tile_m[1] have visits of their own.

    Where later queries see more keys, the tile that isn't full comes first: rows that it has too
    many, whole `tile_m[1]`, are before the first query. At the end it would visit the most keys for
    the fewest queries: of 1,024 queries in tiles of 192, 8 key tiles of 128 for 64, now 1.

    `scales` are softmax_scale and the
    softcap, if there is one; `taken` is, with intervals, how many tiles the queue has given. On the
    host."""
    seqlen_q, head_dim, heads, batch = q.shape
    seqlen_k, _, kv_heads, _ = k.shape
    tile_m, own_m = tile_m
    blocks, early = cute.ceil_div(seqlen_q, tile_m), Int32(0)
    if const_expr(len(intervals) > 0):
        read = Int64(seqlen_k) * ((head_dim + values_dim) * q.element_type.width // 8)
        sharing = (heads * batch, heads // kv_heads)
        order = tile_queue(blocks, sharing, read, num_sms, taken[0])
    else:
        # A band that only one side bounds is longer for some queries than for others. A window is
        # cut short for the first ones.
        bounded_below, bounded_above = band.lower > -seqlen_q + 1, band.upper < seqlen_k - 1
        shorter = blocks if bounded_below ^ bounded_above else Int32(0)
        if bounded_below & bounded_above:
            shorter = cutlass.min(cute.ceil_div(cutlass.max(-band.lower, 0), tile_m), blocks)
        order = tile_order(blocks, heads * batch, shorter, num_sms)
        if bounded_above & (bounded_below ^ True):
            early = (blocks * tile_m - seqlen_q) // own_m * own_m
    softmax_scale, softcap = scales
    has_softcap = const_expr(softcap is not None)
    return Problem(
        order=order,
        heads=cute.fast_divmod_create_divisor_v2(heads),
        group=cute.fast_divmod_create_divisor_v2(heads // kv_heads),
        early=early,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        tanh_scale=softmax_scale / softcap * TANH_EXPONENT if has_softcap else softmax_scale,
        softmax_scale=softcap if has_softcap else softmax_scale,
        sinks=sinks,
        band=band,
        intervals=QueryIntervals(*intervals) if const_expr(len(intervals) > 0) else (),
    )


@cute.jit
def query_tile(problem: Problem, tile: tuple[int, int], ticket: Int32) -> QueryTile:
    """The query tile of a ticket, of `tile` (queries, keys)."""
    m_block, head_of_all = place_of(problem.order, ticket)
    batch, head = divmod(head_of_all, problem.heads)
    first_row = m_block * tile[0] - problem.early
    return QueryTile(
        first_row=first_row,
        head=head,
        kv_head=head // problem.group,
        batch=batch,
        blocks=visits(problem, tile, batch, first_row),
    )


@cute.jit
def visits(problem: Problem, tile: tuple[int, int], batch: Int32, first: Int32) -> BlockRange:
    """The key tiles, of tile[1] keys, that tile[0] queries from `first` on see."""
    rows, tile_n = tile
    keys = (problem.seqlen_k, tile_n)
    if const_expr(isinstance(problem.intervals, QueryIntervals)):
        ranges = problem.intervals.key_range[batch, None, None]
        blocks = blocks_of_ranges(ranges, first, rows, *keys)
    else:
        last = cutlass.min(first + rows, problem.seqlen_q) - 1
        blocks = visible_blocks(first, last, *problem.band, *keys)
    return blocks


@cute.jit
def own_visits(
    problem: Problem, own: tuple[int, int], query_tile: QueryTile, first: Int32
) -> BlockRange:
    """Those of a query tile's key tiles that own[0] of its queries from `first` on see; none if
    they are before the first query or past the last."""
    blocks = visits(problem, own, query_tile.batch, first).within(query_tile.blocks)
    exist = (first >= 0) & (first < problem.seqlen_q)
    begin = blocks.begin if exist else blocks.end
    return blocks._replace(begin=begin)


@cute.jit
def sink_of(problem: Problem, tile: QueryTile) -> Float32:
    """The head's sink, -inf if there is none."""
    sink = -Float32.inf
    if problem.sinks.shape[0] > 0:
        sink = problem.sinks[tile.batch, tile.head]
    return sink
