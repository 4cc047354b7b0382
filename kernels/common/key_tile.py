# SPDX-License-Identifier: Apache-2.0
"""What a backward CTA does for its key tile whatever its warpgroups divide: decode the tile, load
what it visits, and the elementwise steps on transposed scores (keys by queries).

    p  = exp2(scale_log2 k q^T - lse_log2)
    dS = p (v dout^T - dpsum)
"""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import cpasync

from kernels.common.block_range import BlockRange, visible_blocks
from kernels.common.copy_sm90 import tma_tiles
from kernels.common.fast_math import fma
from kernels.common.mask import Band, Coordinates, mask_scores


class KeyTile(NamedTuple):
    """The key tile of this CTA, the query tiles it visits per head, and the run-time scalars."""

    n_block: Int32
    kv_head: Int32
    group: Int32  # query heads per key/value head
    batch: Int32
    blocks: BlockRange
    softmax_scale: Float32
    band_lower: Int32
    band_upper: Int32
    seqlen_q: Int32
    seqlen_k: Int32


class Statistics(NamedTuple):
    """Row statistics in global memory, (batch, heads, padded rows) fp32."""

    lse_log2: cute.Tensor
    dpsum: cute.Tensor


class Operands(NamedTuple):
    """One of (q, k, v, dout): their TMA atoms, coordinate tensors (rows, dim, head, batch),
    shared-memory tiles (stages last), or one side of their pipelines."""

    q: object
    k: object
    v: object
    dout: object


@cute.jit
def key_tile(
    g_q: cute.Tensor,
    g_k: cute.Tensor,
    tile: tuple[int, int],
    softmax_scale: Float32,
    band_lower: Int32,
    band_upper: Int32,
) -> KeyTile:
    """Decode this CTA's tile of `tile` (queries, keys). Key tiles of a head are neighbours, so that
    its q and dout stay in the L2; under a causal band the first, longest ones start first."""
    tile_m, tile_n = tile
    block, _, _ = cute.arch.block_idx()
    seqlen_q, _, heads, _ = g_q.shape
    seqlen_k, _, kv_heads, _ = g_k.shape
    n_blocks = cute.ceil_div(seqlen_k, tile_n)
    n_block = block % n_blocks
    first = n_block * tile_n
    last = cutlass.min(first + tile_n, seqlen_k) - 1
    blocks = visible_blocks(first, last, -band_upper, -band_lower, seqlen_q, tile_m)
    # Past seqlen_k, k is 0 and p may be inf: without a mask, dq would get inf * 0.
    if first + tile_n > seqlen_k:
        blocks = blocks._replace(full_end=Int32(0))
    return KeyTile(
        n_block=n_block,
        kv_head=block // n_blocks % kv_heads,
        group=heads // kv_heads,
        batch=block // (n_blocks * kv_heads),
        blocks=blocks,
        softmax_scale=softmax_scale,
        band_lower=band_lower,
        band_upper=band_upper,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
    )


def _stage_shape(smem: cute.Tensor) -> tuple[int, int]:
    """(rows, dim) of one stage."""
    return cute.size(smem, mode=[0]), cute.size(smem, mode=[1])


@cute.jit
def load_operands(
    atoms: Operands,
    gmem: Operands,
    smem: Operands,
    producers: Operands,
    statistics: tuple[Statistics, Statistics],
    tile: KeyTile,
):
    """k and v once; q with lse_log2 and dout with dpsum for every visited query tile of every head.

    `statistics` are those in global memory and their (tile_m, stages) in shared memory. Called by
    one warp.
    """
    bulk = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32)
    q_producer, k_producer, v_producer, dout_producer = producers
    blocks = tile.blocks
    if blocks.end > blocks.begin:
        g_k = gmem.k[None, None, tile.kv_head, tile.batch]
        g_v = gmem.v[None, None, tile.kv_head, tile.batch]
        g_k = cute.local_tile(g_k, _stage_shape(smem.k), (tile.n_block, 0))
        g_v = cute.local_tile(g_v, _stage_shape(smem.v), (tile.n_block, 0))
        s_k, g_k = tma_tiles(atoms.k, smem.k, g_k)
        s_v, g_v = tma_tiles(atoms.v, smem.v, g_v)
        slot = k_producer.acquire_and_advance()
        cute.copy(atoms.k, g_k, s_k[None, 0], tma_bar_ptr=slot.barrier)
        for h in cutlass.range(tile.group, unroll=1):
            head = tile.kv_head * tile.group + h
            g_q = gmem.q[None, None, head, tile.batch]
            g_dout = gmem.dout[None, None, head, tile.batch]
            g_q = cute.local_tile(g_q, _stage_shape(smem.q), (None, 0))
            g_dout = cute.local_tile(g_dout, _stage_shape(smem.dout), (None, 0))
            s_q, g_q = tma_tiles(atoms.q, smem.q, g_q)
            s_dout, g_dout = tma_tiles(atoms.dout, smem.dout, g_dout)
            g_rows, s_rows = statistics
            rows = s_rows.lse_log2.shape[:1]
            g_lse = cute.local_tile(g_rows.lse_log2[tile.batch, head, None], rows, (None,))
            g_dpsum = cute.local_tile(g_rows.dpsum[tile.batch, head, None], rows, (None,))
            s_lse, s_dpsum = s_rows
            for m in cutlass.range(blocks.begin, blocks.end, unroll=1):
                slot = q_producer.acquire_and_advance()
                i, barrier = slot.index, slot.barrier
                cute.copy(atoms.q, g_q[None, m], s_q[None, i], tma_bar_ptr=barrier)
                with cute.arch.elect_one():
                    cute.copy(bulk, g_lse[None, m], s_lse[None, i], mbar_ptr=barrier)
                if (h == 0) & (m == blocks.begin):  # behind q: the first scores don't need it
                    slot = v_producer.acquire_and_advance()
                    cute.copy(atoms.v, g_v, s_v[None, 0], tma_bar_ptr=slot.barrier)
                slot = dout_producer.acquire_and_advance()
                i, barrier = slot.index, slot.barrier
                cute.copy(atoms.dout, g_dout[None, m], s_dout[None, i], tma_bar_ptr=barrier)
                with cute.arch.elect_one():
                    cute.copy(bulk, g_dpsum[None, m], s_dpsum[None, i], mbar_ptr=barrier)
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
    scores: cute.Tensor, coords: Coordinates, m: Int32, tile: KeyTile, tile_mn: tuple[int, int]
):
    """Mask what the band and the sequences' ends leave out of query tile m."""
    m_start, n_start = m * tile_mn[0], tile.n_block * tile_mn[1]
    shift = n_start - m_start
    extent = (tile.seqlen_k - n_start, tile.seqlen_q - m_start)
    band = Band(shift - tile.band_upper, shift - tile.band_lower)
    mask_scores(scores, coords, band, extent)


@cute.jit
def probabilities(scores: cute.Tensor, lse_log2: cute.Tensor, scale_log2: Float32):
    """scores <- exp2(scale_log2 * scores - lse_log2).

    The statistics are read from shared memory pair by pair: they don't fit in registers as well.
    """
    for pair in cutlass.range_constexpr(cute.size(lse_log2, mode=[1])):
        statistic = cute.make_rmem_tensor(2, Float32)
        cute.autovec_copy(lse_log2[None, pair], statistic)
        for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
            for c in cutlass.range_constexpr(2):
                scaled = fma(scores[r, 2 * pair + c], scale_log2, -statistic[c])
                scores[r, 2 * pair + c] = cute.math.exp2(scaled, fastmath=True)
