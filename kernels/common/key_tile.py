# SPDX-License-Identifier: Apache-2.0
"""What a backward CTA does for its key tiles whatever its warpgroups divide: their order, load what
they visit, and the elementwise steps on transposed scores (keys by queries).

    p  = exp2(scale_log2 k q^T - lse_log2)
    dS = p (v dout^T - dpsum)

With a softcap c and t = tanh(softmax_scale k q^T / c):

    p  = exp2(c log2(e) t - lse_log2)
    dS = p (1 - t^2) (v dout^T - dpsum)
"""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, const_expr, cute
from cutlass.cute.nvgpu import cpasync

from kernels.common.block_range import BlockRange, blocks_of_ranges, visible_blocks
from kernels.common.copy_sm90 import MatrixRows, store_matrices
from kernels.common.fast_math import (
    TANH_EXPONENT,
    fma,
    gap,
    round_pair,
    select_inside,
    slope_of_gap,
    tanh_of_gap,
)
from kernels.common.mask import Band, Coordinates, mask_scores
from kernels.common.mma_sm90 import rows_and_columns
from kernels.common.pipelines import expect_more, wait_until_drained
from kernels.common.scheduler import (
    TileOrder,
    TileQueue,
    announce,
    claim,
    first_ticket,
    last_ticket,
    place_of,
    reserve,
    tile_order,
    tile_queue,
)
from kernels.common.softmax import LOG2_E
from kernels.common.tma import tma_tiles

# How many query tiles apart the key tiles of a head should run, if their additions to dq have
# an order and they visit half of all. One on another's heels waits, at each, until the other's
# addition can be seen, which takes longer than a visit. So few of a head may run at once.
APART = 8


class Softcap(NamedTuple):
    """A softcap, and what leads from q k^T to the exponent of `gap`."""

    softcap: Float32
    exponent_scale: Float32


def make_softcap(softcap: Float32, softmax_scale: Float32) -> Softcap:
    """On the host."""
    return Softcap(softcap, softmax_scale / softcap * TANH_EXPONENT)


class Scalars(NamedTuple):
    """The run-time scalars of a row."""

    softmax_scale: Float32
    softcap: Softcap | tuple[()]
    band: Band

    def scale_log2(self) -> Float32:
        """From scores, or from their tanh, to the binary logarithm of a probability."""
        return (self.softcap[0] if self.softcap else self.softmax_scale) * LOG2_E


class Problem(NamedTuple):
    """What all key tiles share: their order, the run-time sizes and scalars, and which queries see
    a key: empty if the band says it."""

    order: TileOrder | TileQueue
    ascending: Int32  # 1: the scheduler's later blocks are the later keys
    n_blocks: Int32
    kv_heads: cute.FastDivmodDivisorV2
    group: Int32  # query heads per key/value head
    seqlen_q: Int32
    seqlen_k: Int32
    scalars: Scalars
    query_range: tuple[cute.Tensor, ...]


class KeyTile(NamedTuple):
    """A key tile and the query tiles that it visits per head."""

    n_block: Int32
    kv_head: Int32
    batch: Int32
    blocks: BlockRange


class Statistics(NamedTuple):
    """What is known of queries, in global memory: (batch, heads, padded rows) fp32; and which keys
    they see, where a band doesn't say it: kv_start and kv_end, (batch, padded rows)."""

    lse_log2: cute.Tensor
    dpsum: cute.Tensor
    interval: tuple[cute.Tensor, ...]


class Operands(NamedTuple):
    """One of (q, k, v, dout): their TMA atoms, coordinate tensors (rows, dim, head, batch),
    shared-memory tiles (stages last), or one side of their pipelines."""

    q: object
    k: object
    v: object
    dout: object


@cute.jit
def key_tiles(
    q: cute.Tensor,
    k: cute.Tensor,
    tile_mn: cutlass.Constexpr,
    scalars: Scalars,
    query_range: tuple[cute.Tensor, ...],
    own: tuple[cute.Tensor, ...],
    num_sms: Int32,
) -> Problem:
    """The key tiles of q and k (rows, dim, heads, batch). `own` are the results that only the
    kernel reads: with intervals how many tiles the queue has given, and, if additions to dq have an
    order, the words of `dq_order`, which asks for the later keys first. On the host."""
    seqlen_q, head_dim, heads, batch = q.shape
    seqlen_k, _, kv_heads, _ = k.shape
    tile_m, tile_n = tile_mn
    n_blocks = cute.ceil_div(seqlen_k, tile_n)
    # With a causal band the first keys are seen by most queries; with one that is bounded only
    # below, the last.
    band = scalars.band
    below, above = band.lower > -seqlen_q + 1, band.upper < seqlen_k - 1
    one_sided = below ^ above
    ascending = Int32(1) if below & one_sided else Int32(0)
    if const_expr(len(own) > 0):
        ascending = Int32(len(own) - 1)
        # q, dout and dq_accum
        read = Int64(seqlen_q) * (heads // kv_heads) * (8 * head_dim)
        apart = Int32(1)
        if const_expr(len(own) > 1):
            visited = cutlass.max(cute.ceil_div(seqlen_q, tile_m) * (heads // kv_heads), 1)
            apart = cute.ceil_div(2 * APART * num_sms, visited)
        heads_and_sharing = (kv_heads * batch, Int32(1))
        order = tile_queue(n_blocks, heads_and_sharing, read, num_sms, own[0], apart)
    else:
        shorter = n_blocks if one_sided else Int32(0)
        if below & above:
            # The last keys are in the windows of fewer queries.
            fewer = cutlass.max(seqlen_k - (seqlen_q + band.lower), 0)
            shorter = cutlass.min(cute.ceil_div(fewer, tile_n), n_blocks)
        order = tile_order(n_blocks, kv_heads * batch, shorter, num_sms)
    return Problem(
        order=order,
        ascending=ascending,
        n_blocks=n_blocks,
        kv_heads=cute.fast_divmod_create_divisor_v2(kv_heads),
        group=heads // kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        scalars=scalars,
        query_range=query_range,
    )


@cute.jit
def key_tile(problem: Problem, tile: tuple[int, int], ticket: Int32) -> KeyTile:
    """The key tile of a ticket, of `tile` (queries, keys). Where all are alike, those of a head are
    computed in ascending order, so that its q and dout stay in the L2."""
    block, head_of_all = place_of(problem.order, ticket)
    n_block = block if problem.ascending == 1 else problem.n_blocks - 1 - block
    batch, kv_head = divmod(head_of_all, problem.kv_heads)
    blocks = visits(problem, tile, n_block, batch)
    # ptxas computed them again for every head, and kept what it takes: 12 bytes of spills at d=64,
    # and 22 to 25 instructions more per unmasked tile.
    blocks = BlockRange(*(cute.arch.make_warp_uniform(x) for x in blocks))
    return KeyTile(n_block=n_block, kv_head=kv_head, batch=batch, blocks=blocks)


@cute.jit
def visits(problem: Problem, tile: tuple[int, int], n_block: Int32, batch: Int32) -> BlockRange:
    """The query tiles that a key tile visits, of `tile` (queries, keys)."""
    tile_m, tile_n = tile
    seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
    first = n_block * tile_n
    if const_expr(len(problem.query_range) > 0):
        ranges = problem.query_range[0][batch, None, None]
        blocks = blocks_of_ranges(ranges, first, tile_n, seqlen_q, tile_m)
    else:
        last = cutlass.min(first + tile_n, seqlen_k) - 1
        band = problem.scalars.band
        blocks = visible_blocks(first, last, -band.upper, -band.lower, seqlen_q, tile_m)
    # Past seqlen_k, k is 0 and p may be inf: without a mask, dq would get inf * 0.
    if first + tile_n > seqlen_k:
        blocks = blocks._replace(full_end=Int32(0))
    return blocks


def resident(fragment: cute.Tensor, stage: Int32) -> cute.Tensor:
    """The descriptors of k or v of one key tile; see `mma_sm90.stage`."""
    if cute.size(fragment, mode=[3]) == 1:
        return fragment[None, None, None, 0]
    return fragment[None, None, None, cute.arch.make_warp_uniform(stage)]


def next_stage(stage: Int32, smem: cute.Tensor) -> Int32:
    """The stage of k or v of the next key tile that visits something: they have one or two."""
    return stage ^ (cute.size(smem, mode=[2]) - 1)


def _stage_shape(smem: cute.Tensor) -> tuple[int, int]:
    """(rows, dim) of one stage."""
    return cute.size(smem, mode=[0]), cute.size(smem, mode=[1])


def _stage_bytes(smem: cute.Tensor) -> int:
    rows, dim = _stage_shape(smem)
    return rows * dim * smem.element_type.width // 8


@cute.jit
def _load_queries(atom: cute.CopyAtom, tiles: tuple, rows: tuple, m: Int32, slot):
    """Query tile m of q or dout and what is known of its rows, on one barrier: (global memory,
    shared memory) of each."""
    gmem, smem = tiles
    cute.copy(atom, gmem[None, m], smem[None, slot.index], tma_bar_ptr=slot.barrier)
    for gmem, smem in rows:
        bulk = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), gmem.element_type)
        with cute.arch.elect_one():
            cute.copy(bulk, gmem[None, m], smem[None, slot.index], mbar_ptr=slot.barrier)


def _tiles_of_head(
    atoms: Operands,
    gmem: Operands,
    smem: Operands,
    statistics: tuple[Statistics, Statistics],
    head: Int32,
    batch: Int32,
) -> tuple[tuple, tuple]:
    """What `_load_queries` takes of a head: for q, with lse_log2 and intervals; for dout, with
    dpsum."""
    g_rows, s_rows = statistics
    rows = s_rows.lse_log2.shape[:1]
    q, dout = (
        tma_tiles(atom, s, cute.local_tile(g[None, None, head, batch], _stage_shape(s), (None, 0)))
        for atom, s, g in (
            (atoms.q, smem.q, gmem.q),
            (atoms.dout, smem.dout, gmem.dout),
        )
    )
    g_lse, g_dpsum, *g_interval = (
        cute.local_tile(array, rows, (None,))
        for array in (
            g_rows.lse_log2[batch, head, None],
            g_rows.dpsum[batch, head, None],
            *(bound[batch, None] for bound in g_rows.interval),
        )
    )
    interval = tuple(zip(g_interval, s_rows.interval, strict=True))
    return (
        (atoms.q, q[::-1], ((g_lse, s_rows.lse_log2), *interval)),
        (atoms.dout, dout[::-1], ((g_dpsum, s_rows.dpsum),)),
    )


@cute.jit
def _load_keys(atom: cute.CopyAtom, gmem: cute.Tensor, smem: cute.Tensor, place: tuple, to: tuple):
    """A tile of k or v, place (n_block, head, batch), to (stage, slot of a ring)."""
    n_block, head, batch = place
    stage, slot = to
    g = cute.local_tile(gmem[None, None, head, batch], _stage_shape(smem), (n_block, 0))
    s, g = tma_tiles(atom, smem, g)
    cute.copy(atom, g, s[None, stage], tma_bar_ptr=slot.barrier)


@cute.jit
def zero_gradients(
    gradients: tuple[cute.Tensor, cute.Tensor],
    problem: Problem,
    tile: KeyTile,
    tile_n: cutlass.Constexpr,
):
    """dk and dv (rows, dim, head, batch) of a key tile are 0. Called by one warp."""
    for gradient in gradients:
        dim = cute.size(gradient, mode=[1])
        vector = 128 // gradient.element_type.width
        zeros = cute.make_rmem_tensor(vector, gradient.element_type)
        zeros.fill(0.0)
        rows = cutlass.min(tile_n, problem.seqlen_k - tile.n_block * tile_n)
        array = gradient[None, None, tile.kv_head, tile.batch]
        for i in cutlass.range(cute.arch.lane_idx(), rows * (dim // vector), 32, unroll=1):
            row, column = i // (dim // vector), i % (dim // vector)
            place = (tile.n_block * tile_n + row, column * vector)
            target = cute.domain_offset(place, array).iterator
            target = cute.make_tensor(target.align(16), cute.make_layout(vector))
            cute.autovec_copy(zeros, target)


@cute.jit
def announce_next(
    problem: Problem,
    tile_mn: cutlass.Constexpr,
    ticket: Int32,
    reserved: Int32,
    gradients: tuple[cute.Tensor, cute.Tensor],
) -> Int32:
    """The ticket after this one, which others are told, too. A queue's tiles that visit nothing are
    passed over, their `gradients` set to zero."""
    last = last_ticket(problem.order)
    following = claim(problem.order, ticket, reserved)
    if const_expr(isinstance(problem.order, TileQueue)):
        unvisited = following < last
        while unvisited:
            tile = key_tile(problem, tile_mn, following)
            unvisited = tile.blocks.end == tile.blocks.begin
            if unvisited:
                zero_gradients(gradients, problem, tile, tile_mn[1])
                following = claim(problem.order, ticket, reserve(problem.order))
                unvisited = following < last
    announce(problem.order, ticket, following)
    return following


@cute.jit
def load_operands(  # noqa: C901, PLR0913 - four operands, where they are and what guards them
    atoms: Operands,
    gmem: Operands,
    smem: Operands,
    producers: tuple,
    statistics: tuple[Statistics, Statistics],
    problem: Problem,
    gradients: tuple[cute.Tensor, cute.Tensor],
):
    """Of every key tile, for every visited query tile of every head: q with lse_log2 and intervals,
    and dout with dpsum. k comes with the first q, on its barrier, and v with the first dout.

    So neither has barriers of its own. A tile's k is free when its last q has been released, v when
    its last dout has been: with two stages that holds for the one of the tile before when a slot of
    the next has been acquired, else it is waited for.

    `gradients`, dk and dv, of tiles that visit nothing are zero, and written here: others are told
    only of tiles that they have something to do for.
    `statistics` are those in global memory and their (tile_m, stages) in shared memory. Called by
    one warp.

    Intervals come this way because a mask that loaded its 32 pairs itself (d=64) would wait for the
    L2 again and again: it has registers for few of them at a time.
    """
    q_producer, dout_producer = producers
    tile_mn = (cute.size(smem.q, mode=[0]), cute.size(smem.k, mode=[0]))
    stages = cute.size(smem.q, mode=[2])
    of_k, of_v = (atoms.k, gmem.k, smem.k), (atoms.v, gmem.v, smem.v)
    k_stage, v_stage = Int32(0), Int32(0)
    ticket, last = first_ticket(problem.order), last_ticket(problem.order)
    while ticket < last:
        reserved = reserve(problem.order)
        tile = key_tile(problem, tile_mn, ticket)
        place = (tile.n_block, tile.kv_head, tile.batch)
        blocks = tile.blocks
        for h in cutlass.range(problem.group, unroll=1):
            head = tile.kv_head * problem.group + h
            of_q, of_dout = _tiles_of_head(atoms, gmem, smem, statistics, head, tile.batch)
            for m in cutlass.range(blocks.begin, blocks.end, unroll=1):
                first = (h == 0) & (m == blocks.begin)
                q_slot = q_producer.acquire_and_advance()
                if first:
                    expect_more(q_slot, _stage_bytes(smem.k))
                _load_queries(*of_q, m, q_slot)
                if const_expr(cute.size(smem.k, mode=[2]) > 1):
                    if first:
                        _load_keys(*of_k, place, (k_stage, q_slot))
                dout_slot = dout_producer.acquire_and_advance()
                if first:
                    expect_more(dout_slot, _stage_bytes(smem.v))
                _load_queries(*of_dout, m, dout_slot)
                if first:
                    if const_expr(cute.size(smem.v, mode=[2]) == 1):
                        wait_until_drained(dout_producer, stages)
                    _load_keys(*of_v, place, (v_stage, dout_slot))
                    if const_expr(cute.size(smem.k, mode=[2]) == 1):
                        wait_until_drained(q_producer, stages)
                        _load_keys(*of_k, place, (k_stage, q_slot))
        if blocks.end > blocks.begin:
            k_stage, v_stage = next_stage(k_stage, smem.k), next_stage(v_stage, smem.v)
        else:
            zero_gradients(gradients, problem, tile, tile_mn[1])
        ticket = announce_next(problem, tile_mn, ticket, reserved, gradients)
    q_producer.tail()
    dout_producer.tail()


def column_statistic(rows: cute.Tensor, scores_thread, tile_n: int) -> cute.Tensor:
    """A thread's entries of a (tile_m, stages) statistic, as (2, column pairs, stages).

    The accumulator's rows are keys and its columns queries, so a broadcast over rows selects them.
    """
    tile_m, stages = rows.shape
    broadcast = cute.make_tensor(
        rows.iterator, cute.make_layout((tile_n, tile_m, stages), stride=(0, 1, tile_m))
    )
    part = scores_thread.partition_C(broadcast)
    shape, stride = part.layout.shape, part.layout.stride
    return cute.make_tensor(
        part.iterator,
        cute.make_layout(
            (shape[0][0], (shape[0][2], shape[2]), stages),
            stride=(stride[0][0], (stride[0][2], stride[2]), tile_m),
        ),
    )


@cute.jit
def mask_transposed(
    scores: cute.Tensor,
    coords: Coordinates,
    start: tuple[Int32, Int32],
    problem: Problem,
    interval: tuple[cute.Tensor, ...],
):
    """Mask what the band and the sequences' ends leave out of the queries and keys from `start` on,
    or what lies outside the queries' intervals, whose `column_statistic` (2, column pairs) are
    given."""
    m_start, n_start = start
    if const_expr(len(interval) > 0):
        for pair in cutlass.range_constexpr(cute.size(scores, mode=[1]) // 2):
            mask_pair(scores, coords, n_start, interval, pair)
    else:
        shift = n_start - m_start
        extent = (problem.seqlen_k - n_start, problem.seqlen_q - m_start)
        band = problem.scalars.band
        mask_scores(scores, coords, Band(shift - band.upper, shift - band.lower), extent)


def _pair(statistic: cute.Tensor, pair: int) -> cute.Tensor:
    """A register copy of one column pair of a `column_statistic`."""
    copy = cute.make_rmem_tensor(2, statistic.element_type)
    cute.autovec_copy(statistic[None, pair], copy)
    return copy


@cute.jit
def mask_pair(
    scores: cute.Tensor,
    coords: Coordinates,
    n_start: Int32,
    interval: tuple[cute.Tensor, ...],
    pair: cutlass.Constexpr,
):
    """scores[r, c] = -inf, in a pair of columns, unless column c's interval [start, end) has row r;
    rows count from n_start."""
    start, end = (_pair(bound, pair) for bound in interval)
    for c in cutlass.range_constexpr(2):
        for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
            i = 2 * pair + c
            row = n_start + coords.row + coords.offsets[r, i][0]
            scores[r, i] = select_inside(scores[r, i], row, start[c], end[c])


@cute.jit
def cap(scores: cute.Tensor, scalars: Scalars):
    """scores <- the `gap` of softmax_scale * scores / softcap, whose tanh t is."""
    for i in cutlass.range_constexpr(cute.size(scores)):
        scores[i] = gap(scores[i] * scalars.softcap.exponent_scale)


@cute.jit
def probabilities(scores: cute.Tensor, lse_log2: cute.Tensor, scale_log2: Float32):
    """scores <- exp2(scale_log2 * scores - lse_log2).

    The statistics are read from shared memory pair by pair: they don't fit in registers as well.
    """
    for pair in cutlass.range_constexpr(cute.size(lse_log2, mode=[1])):
        statistic = _pair(lse_log2, pair)
        for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
            for c in cutlass.range_constexpr(2):
                scaled = fma(scores[r, 2 * pair + c], scale_log2, -statistic[c])
                scores[r, 2 * pair + c] = cute.math.exp2(scaled, fastmath=True)


@cute.jit
def score_gradient(p: cute.Tensor, dp: cute.Tensor, dpsum: cute.Tensor):
    """dp <- p * (dp - dpsum), the gradient of the scaled scores."""
    for pair in cutlass.range_constexpr(cute.size(dpsum, mode=[1])):
        statistic = _pair(dpsum, pair)
        for r in cutlass.range_constexpr(cute.size(p, mode=[0])):
            for c in cutlass.range_constexpr(2):
                i = 2 * pair + c
                dp[r, i] = p[r, i] * (dp[r, i] - statistic[c])


@cute.jit
def _capped(u: Float32, scale_log2: Float32, lse_log2: Float32) -> tuple[Float32, Float32]:
    """p = exp2(scale_log2 * t - lse_log2), and p (1 - t^2), which dS multiplies, of t's gap. Where
    masked, it is -inf, and both are 0."""
    p = cute.math.exp2(fma(tanh_of_gap(u), scale_log2, -lse_log2), fastmath=True)
    return p, p * slope_of_gap(u)


def _packed_pairs(acc: cute.Tensor, dtype: cutlass.Constexpr) -> tuple[cute.Tensor, cute.Tensor]:
    """16-bit registers of an accumulator's layout, and their view as (rows, column pairs)."""
    rounded = cute.make_rmem_tensor(acc.layout, dtype)
    return rounded, rows_and_columns(cute.recast_tensor(rounded, Int32))


@cute.jit
def capped_probabilities(
    acc: cute.Tensor, lse_log2: cute.Tensor, scale_log2: Float32, dtype: cutlass.Constexpr
) -> cute.Tensor:
    """p of an accumulator of gaps, rounded to `dtype`; acc <- p (1 - t^2)."""
    rounded, packed = _packed_pairs(acc, dtype)
    scores = rows_and_columns(acc)
    for pair in cutlass.range_constexpr(cute.size(lse_log2, mode=[1])):
        statistic = _pair(lse_log2, pair)
        for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
            p = cute.make_rmem_tensor(2, Float32)
            for c in cutlass.range_constexpr(2):
                i = 2 * pair + c
                p[c], scores[r, i] = _capped(scores[r, i], scale_log2, statistic[c])
            packed[r, pair] = round_pair(p[0], p[1], dtype)
    return rounded


@cute.jit
def capped_gradients(
    accs: tuple[cute.Tensor, cute.Tensor],
    rows: Statistics,
    key: tuple[Coordinates, Int32],
    scale_log2: Float32,
    to: tuple[MatrixRows, Int32],
    dtype: cutlass.Constexpr,
) -> tuple[cute.Tensor, cute.Tensor]:
    """p and dS, rounded to `dtype`, of accumulators of gaps and dp; dS also to shared memory (`to`,
    and its stage).

    `rows` are `column_statistic`s of this tile, with intervals if it needs a mask; `key` is where
    the keys are, and the tile's first one. All of p (1 - t^2) in fp32 beside p and dp spilled 984
    bytes (d=64). So everything comes 16 columns after 16, and their stores and the barriers between
    keep ptxas to it: 476 bytes without.
    """
    p_rounded, p_packed = _packed_pairs(accs[0], dtype)
    ds_rounded, ds_packed = _packed_pairs(accs[1], dtype)
    scores, dp = (rows_and_columns(acc) for acc in accs)
    for pair in cutlass.range_constexpr(cute.size(scores, mode=[1]) // 2):
        if const_expr(len(rows.interval) > 0):
            mask_pair(scores, *key, rows.interval, pair)
        lse_log2, dpsum = _pair(rows.lse_log2, pair), _pair(rows.dpsum, pair)
        for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
            p, ds = (cute.make_rmem_tensor(2, Float32) for _ in accs)
            for c in cutlass.range_constexpr(2):
                i = 2 * pair + c
                p[c], slope = _capped(scores[r, i], scale_log2, lse_log2[c])
                ds[c] = slope * (dp[r, i] - dpsum[c])
            p_packed[r, pair] = round_pair(p[0], p[1], dtype)
            ds_packed[r, pair] = round_pair(ds[0], ds[1], dtype)
        if const_expr(pair % 2 == 1):
            store_matrices(ds_rounded, *to, 8 * (pair - 1), 8 * (pair + 1))
            cute.arch.sync_warp()
    return p_rounded, ds_rounded
