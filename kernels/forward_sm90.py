# SPDX-License-Identifier: Apache-2.0
"""Attention forward for Hopper: TMA, WGMMA, warp-specialised (FlashAttention-3, algorithm 2).

One CTA computes one query tile of one head: it visits the key tiles that the band leaves, last to
first, keeps an online softmax, and writes out and lse. Consumer warpgroups own 64 query rows each.
Inside a warpgroup the scores of the next key tile are computed while the current probabilities
multiply v; between warpgroups a named-barrier ring lets one do softmax while the other feeds the
tensor cores.

    warps                   role      registers (2 / 3 consumer warpgroups)
    0                       load      24 / 32
    1-3                     idle      24 / 32
    4 ...                   consume   240 / 160

    load --[q]--> consume      one stage, loaded once
    load --[k]--> consume      `stages` deep
    load --[v]--> consume      `stages` deep

Shared memory: q, reused by out at the end (a warpgroup overwrites only rows that it alone reads),
and the k and v rings.
"""

from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers as sm90

from fa4_jax._variants import Variant
from kernels.common.block_range import BlockRange, visible_blocks
from kernels.common.copy_sm90 import accumulator_to_smem, tma_atom, tma_store, tma_tiles
from kernels.common.dtypes import element_type
from kernels.common.mask import Coordinates, accumulator_coordinates, mask_scores
from kernels.common.mma_sm90 import (
    as_a_operand,
    issue_gemm,
    make_accumulator,
    rows_and_columns,
    to_16_bit,
)
from kernels.common.pipelines import WARPGROUP, load_tile_pipeline, register_split
from kernels.common.softmax import LOG2_E, finish, make_online_softmax, online_softmax, rescale

# Named barriers; 0 is sync_threads. TURN + i is consumer warpgroup i's turn at the tensor cores.
OUT_WRITTEN, TURN = 1, 2


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


class Smem(NamedTuple):
    """Shared-memory tiles, stages last."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor


class Layouts(NamedTuple):
    """Shared-memory layouts (rows, columns, stages). out uses q's."""

    q: cute.ComposedLayout
    k: cute.ComposedLayout
    v: cute.ComposedLayout


class Mma(NamedTuple):
    """scores = q k^T (both in shared memory); out += p v (p in registers)."""

    scores: cute.TiledMma
    out: cute.TiledMma


class Tile(NamedTuple):
    """The query tile of this CTA, the key tiles it visits, and the run-time scalars."""

    m_block: Int32
    head: Int32
    kv_head: Int32
    batch: Int32
    blocks: BlockRange
    softmax_scale: Float32
    band_lower: Int32
    band_upper: Int32
    seqlen_q: Int32
    seqlen_k: Int32


class ForwardSm90:
    """Host entry and kernel of one table row; `__call__` follows `SIGNATURES[Kernel.forward]`."""

    def __init__(self, variant: Variant):
        self.dtype = element_type(variant.dtype)
        self.head_dim, self.head_dim_v = variant.head_dim, variant.head_dim_v
        self.tile_m, self.tile_n = variant.tiles.tile_m, variant.tiles.tile_n
        self.stages = variant.tiles.stages
        self.warpgroups = variant.tiles.mma_warpgroups
        self.threads = (self.warpgroups + 1) * WARPGROUP
        self.registers = register_split(self.warpgroups)
        assert self.tile_m == 64 * self.warpgroups, "a consumer warpgroup owns 64 query rows"
        assert self.head_dim == self.head_dim_v, "out reuses q's shared memory"

    @cute.jit
    def __call__(  # noqa: PLR0913 - the C ABI is flat
        self,
        q: cute.Tensor,
        k: cute.Tensor,
        v: cute.Tensor,
        out: cute.Tensor,
        lse: cute.Tensor,
        softmax_scale: Float32,
        band_lower: Int32,
        band_upper: Int32,
        stream: cuda.CUstream,
    ):
        # (batch, rows, heads, dim) -> (rows, dim, heads, batch); v as (dim, rows, ...), the B
        # operand of p v.
        q, k, out = (
            cute.make_tensor(t.iterator, cute.select(t.layout, mode=[1, 3, 2, 0]))
            for t in (q, k, out)
        )
        v = cute.make_tensor(v.iterator, cute.select(v.layout, mode=[3, 1, 2, 0]))
        scores_tile = (self.tile_m, self.tile_n, self.head_dim)
        out_tile = (self.tile_m, self.head_dim_v, self.tile_n)
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        atoms = (self.warpgroups, 1, 1)
        mma = Mma(
            scores=sm90.make_trivial_tiled_mma(
                self.dtype, self.dtype, k_major, k_major, Float32, atoms, (64, self.tile_n)
            ),
            out=sm90.make_trivial_tiled_mma(
                self.dtype,
                self.dtype,
                k_major,
                mn_major,
                Float32,
                atoms,
                (64, self.head_dim_v),
                warpgroup.OperandSource.RMEM,
            ),
        )
        layouts = Layouts(
            q=sm90.make_smem_layout_a(LayoutEnum.ROW_MAJOR, scores_tile, self.dtype, 1),
            k=sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, scores_tile, self.dtype, self.stages),
            v=sm90.make_smem_layout_b(LayoutEnum.COL_MAJOR, out_tile, self.dtype, self.stages),
        )

        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        q_tile, k_tile = (self.tile_m, self.head_dim), (self.tile_n, self.head_dim)
        tma = Tma(
            *tma_atom(load, q, layouts.q, q_tile),
            *tma_atom(load, k, layouts.k, k_tile),
            *tma_atom(load, v, layouts.v, (self.head_dim_v, self.tile_n)),
            *tma_atom(store, out, layouts.q, q_tile),
        )

        @cute.struct
        class Storage:
            q_barriers: cute.struct.MemRange[cutlass.Int64, 2]
            k_barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.stages]
            v_barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.stages]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layouts.q)], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layouts.k)], 1024]
            v: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layouts.v)], 1024]

        self.storage = Storage
        m_blocks = cute.ceil_div(q.shape[0], self.tile_m)
        self.kernel(tma, mma, layouts, lse, softmax_scale, band_lower, band_upper).launch(
            grid=(m_blocks * q.shape[2] * q.shape[3], 1, 1),
            block=(self.threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        tma: Tma,
        mma: Mma,
        layouts: Layouts,
        lse: cute.Tensor,
        softmax_scale: Float32,
        band_lower: Int32,
        band_upper: Int32,
    ):
        thread, _, _ = cute.arch.thread_idx()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = SmemAllocator().allocate(self.storage)
        smem = Smem(
            storage.q.get_tensor(layouts.q.outer, swizzle=layouts.q.inner),
            storage.k.get_tensor(layouts.k.outer, swizzle=layouts.k.inner),
            storage.v.get_tensor(layouts.v.outer, swizzle=layouts.v.inner),
        )
        consumer_warps = 4 * self.warpgroups
        q_pipe = load_tile_pipeline(storage.q_barriers, layouts.q, self.dtype, consumer_warps)
        k_pipe = load_tile_pipeline(storage.k_barriers, layouts.k, self.dtype, consumer_warps)
        v_pipe = load_tile_pipeline(storage.v_barriers, layouts.v, self.dtype, consumer_warps)
        pipeline.pipeline_init_arrive()
        pipeline.pipeline_init_wait()

        tile = self.tile(tma, softmax_scale, band_lower, band_upper)
        if warp_idx < 4:
            cute.arch.setmaxregister_decrease(self.registers.load)
            if warp_idx == 0:
                self.load(tma, smem, (q_pipe[0], k_pipe[0], v_pipe[0]), tile)
        else:
            cute.arch.setmaxregister_increase(self.registers.consume)
            self.consume(
                thread - WARPGROUP, mma, smem, (q_pipe[1], k_pipe[1], v_pipe[1]), tile, tma, lse
            )

    def tile(self, tma: Tma, softmax_scale: Float32, band_lower: Int32, band_upper: Int32) -> Tile:
        """Decode this CTA's tile. Query tiles of a head are neighbours, so that its k and v stay in
        the L2; under a causal band the last, longest ones start first."""
        block, _, _ = cute.arch.block_idx()
        seqlen_q, _, heads, _ = tma.g_q.shape
        seqlen_k, _, kv_heads, _ = tma.g_k.shape
        m_blocks = cute.ceil_div(seqlen_q, self.tile_m)
        m_block = m_blocks - 1 - block % m_blocks
        head = block // m_blocks % heads
        first = m_block * self.tile_m
        last = cutlass.min(first + self.tile_m, seqlen_q) - 1
        return Tile(
            m_block=m_block,
            head=head,
            kv_head=head // (heads // kv_heads),
            batch=block // (m_blocks * heads),
            blocks=visible_blocks(first, last, band_lower, band_upper, seqlen_k, self.tile_n),
            softmax_scale=softmax_scale,
            band_lower=band_lower,
            band_upper=band_upper,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
        )

    @cute.jit
    def load(self, tma: Tma, smem: Smem, producers: tuple, tile: Tile):
        """q once; then k and v of every visited tile, last to first, k one tile ahead of v."""
        q_producer, k_producer, v_producer = producers
        g_q = cute.local_tile(
            tma.g_q[None, None, tile.head, tile.batch],
            (self.tile_m, self.head_dim),
            (tile.m_block, 0),
        )
        g_k = cute.local_tile(
            tma.g_k[None, None, tile.kv_head, tile.batch], (self.tile_n, self.head_dim), (None, 0)
        )
        g_v = cute.local_tile(
            tma.g_v[None, None, tile.kv_head, tile.batch], (self.head_dim_v, self.tile_n), (0, None)
        )
        s_q, g_q = tma_tiles(tma.q, smem.q, g_q)
        s_k, g_k = tma_tiles(tma.k, smem.k, g_k)
        s_v, g_v = tma_tiles(tma.v, smem.v, g_v)
        blocks = tile.blocks
        if blocks.end > blocks.begin:
            slot = q_producer.acquire_and_advance()
            cute.copy(tma.q, g_q, s_q[None, 0], tma_bar_ptr=slot.barrier)
            slot = k_producer.acquire_and_advance()
            cute.copy(
                tma.k, g_k[None, blocks.end - 1], s_k[None, slot.index], tma_bar_ptr=slot.barrier
            )
            for i in cutlass.range(blocks.end - blocks.begin - 1, unroll=1):
                n = blocks.end - 1 - i
                slot = k_producer.acquire_and_advance()
                cute.copy(tma.k, g_k[None, n - 1], s_k[None, slot.index], tma_bar_ptr=slot.barrier)
                slot = v_producer.acquire_and_advance()
                cute.copy(tma.v, g_v[None, n], s_v[None, slot.index], tma_bar_ptr=slot.barrier)
            slot = v_producer.acquire_and_advance()
            cute.copy(
                tma.v, g_v[None, blocks.begin], s_v[None, slot.index], tma_bar_ptr=slot.barrier
            )
            k_producer.tail()
            v_producer.tail()

    @cute.jit
    def consume(
        self,
        thread: Int32,
        mma: Mma,
        smem: Smem,
        consumers: tuple,
        tile: Tile,
        tma: Tma,
        lse: cute.Tensor,
    ):
        """Scores, softmax and out of this warpgroup's 64 rows, then the epilogue."""
        q_consumer, k_consumer, v_consumer = consumers
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        scores_thread, out_thread = mma.scores.get_slice(thread), mma.out.get_slice(thread)
        f_q = mma.scores.make_fragment_A(scores_thread.partition_A(smem.q))[None, None, None, 0]
        f_k = mma.scores.make_fragment_B(scores_thread.partition_B(smem.k))
        f_v = mma.out.make_fragment_B(out_thread.partition_B(smem.v))
        tile_mn = (self.tile_m, self.tile_n)
        coords = accumulator_coordinates(mma.scores, thread, tile_mn)
        acc = make_accumulator(mma.out, (self.tile_m, self.head_dim_v))
        acc.fill(0.0)
        acc_rows = rows_and_columns(acc)
        softmax = make_online_softmax(cute.size(acc_rows, mode=[0]))
        scale_log2 = tile.softmax_scale * LOG2_E
        blocks = tile.blocks

        if blocks.end > blocks.begin:
            q_consumer.wait()
            scores = make_accumulator(mma.scores, tile_mn)
            self.first_turn(group)
            k_slot = k_consumer.wait_and_advance()
            self.wait_turn(group)
            issue_gemm(mma.scores, scores, f_q, f_k[None, None, None, k_slot.index], zero=True)
            self.pass_turn(group)
            warpgroup.wait_group(0)
            k_slot.release()
            if blocks.needs_mask(blocks.end - 1):
                self.mask(rows_and_columns(scores), coords, blocks.end - 1, tile)
            online_softmax(softmax, rows_and_columns(scores), scale_log2)
            probabilities = to_16_bit(scores, self.dtype)

            for first, end, masked in reversed(blocks.segments(blocks.end - 1)):
                for i in cutlass.range(end - first, unroll=1):
                    scores = make_accumulator(mma.scores, tile_mn)
                    k_slot = k_consumer.wait_and_advance()
                    self.wait_turn(group)
                    issue_gemm(
                        mma.scores, scores, f_q, f_k[None, None, None, k_slot.index], zero=True
                    )
                    v_slot = v_consumer.wait_and_advance()
                    issue_gemm(
                        mma.out,
                        acc,
                        as_a_operand(probabilities),
                        f_v[None, None, None, v_slot.index],
                        zero=False,
                    )
                    self.pass_turn(group)
                    warpgroup.wait_group(1)
                    k_slot.release()
                    if const_expr(masked):
                        self.mask(rows_and_columns(scores), coords, end - 1 - i, tile)
                    online_softmax(softmax, rows_and_columns(scores), scale_log2)
                    warpgroup.wait_group(0)
                    v_slot.release()
                    rescale(acc_rows, softmax.decay)
                    probabilities.store(scores.load().to(self.dtype))

            self.last_turn(group)
            v_slot = v_consumer.wait_and_advance()
            issue_gemm(
                mma.out,
                acc,
                as_a_operand(probabilities),
                f_v[None, None, None, v_slot.index],
                zero=False,
            )
            warpgroup.wait_group(0)
            v_slot.release()

        finish(softmax, tile.softmax_scale)
        rescale(acc_rows, softmax.decay)
        self.epilogue(thread, mma, smem, tile, tma, acc)
        first_row = tile.m_block * self.tile_m
        for r in cutlass.range_constexpr(cute.size(acc_rows, mode=[0])):
            row = first_row + coords.row + coords.offsets[r, 0][0]
            if coords.column == 0 and row < tile.seqlen_q:
                lse[tile.batch, tile.head, row] = softmax.row_max[r]

    @cute.jit
    def mask(self, scores: cute.Tensor, coords: Coordinates, n: Int32, tile: Tile):
        """Mask what the band and seqlen_k leave out of key tile n."""
        m_start, n_start = tile.m_block * self.tile_m, n * self.tile_n
        shift = m_start - n_start
        extent = (tile.seqlen_q - m_start, tile.seqlen_k - n_start)
        mask_scores(scores, coords, tile.band_lower + shift, tile.band_upper + shift, extent)

    @cute.jit
    def epilogue(self, thread: Int32, mma: Mma, smem: Smem, tile: Tile, tma: Tma, acc: cute.Tensor):
        """acc -> 16 bit -> q's shared memory (stmatrix) -> TMA store, which clips rows past
        seqlen_q."""
        s_out = smem.q[None, None, 0]
        accumulator_to_smem(acc, mma.out, thread, s_out)
        cute.arch.fence_view_async_shared()
        cute.arch.barrier(barrier_id=OUT_WRITTEN, number_of_threads=self.warpgroups * WARPGROUP)
        if cute.arch.make_warp_uniform(thread // 32) == 0:
            g_out = tma.g_out[None, None, tile.head, tile.batch]
            tile_shape = (self.tile_m, self.head_dim_v)
            tma_store(tma.out, s_out, cute.local_tile(g_out, tile_shape, (tile.m_block, 0)))

    @cute.jit
    def first_turn(self, group: Int32):
        """Open the ring: the last warpgroup grants the first its turn."""
        if group == self.warpgroups - 1:
            cute.arch.barrier_arrive(barrier_id=TURN, number_of_threads=2 * WARPGROUP)

    @cute.jit
    def wait_turn(self, group: Int32):
        """Wait until the previous warpgroup has issued its MMAs."""
        cute.arch.barrier(barrier_id=TURN + group, number_of_threads=2 * WARPGROUP)

    @cute.jit
    def pass_turn(self, group: Int32):
        """Let the next warpgroup issue while this one does its softmax."""
        following = Int32(0) if group == self.warpgroups - 1 else group + 1
        cute.arch.barrier_arrive(barrier_id=TURN + following, number_of_threads=2 * WARPGROUP)

    @cute.jit
    def last_turn(self, group: Int32):
        """Close the ring: take the one grant that is still open, so that no barrier is left half
        full."""
        if group == 0:
            cute.arch.barrier(barrier_id=TURN, number_of_threads=2 * WARPGROUP)
