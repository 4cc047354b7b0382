# SPDX-License-Identifier: Apache-2.0
"""Attention forward for Hopper: TMA, WGMMA, warp-specialised (FlashAttention-3, algorithm 2),
persistent.

One CTA per multiprocessor computes query tiles one after another, in the order of
`kernels.common.scheduler`. For each it visits the key tiles that its queries see, last to first,
keeps an online softmax, and writes out and lse. Consumer warpgroups own 64 query rows each, and sit
out the key tiles that none of these sees. Inside a warpgroup the scores of the next key tile are
computed while the current probabilities multiply v; between warpgroups a named-barrier ring lets
one do softmax while the other feeds the tensor cores. The ring and the pipelines run on from tile
to tile: while a warpgroup writes its rows of out, the others compute and the next tile's q, k and v
arrive.

    warps                   role      registers (2 / 3 consumer warpgroups)
    0                       load      24 / 32
    1-3                     idle      24 / 32
    4 ...                   consume   240 / 160

    load --[q]--> consume      a tile's q: two stages, or one
    load --[k]--> consume      `stages` deep
    load --[v]--> consume      `stages` deep

Shared memory: the k and v rings, one or two q (`Tiles.q_stages`), and out, if `Tiles.epilogue` says
so. A warp stores its own 16 rows of out, so that no warp waits for another.
"""

from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers as sm90

from fa4_jax._variants import Epilogue, Feature, Variant
from kernels.common.copy_sm90 import accumulator_to_gmem, accumulator_to_smem
from kernels.common.dtypes import element_type
from kernels.common.fast_math import tanh, thread_again
from kernels.common.mask import (
    Band,
    Coordinates,
    Intervals,
    accumulator_coordinates,
    mask_scores,
)
from kernels.common.mma_sm90 import (
    as_a_operand,
    issue_gemm,
    make_accumulator,
    round_into,
    rows_and_columns,
    stage,
    to_16_bit,
)
from kernels.common.pipelines import WARPGROUP, load_tile_pipeline, register_split
from kernels.common.query_tile import (
    Problem,
    QueryTile,
    Tma,
    kernel_views,
    own_visits,
    query_tile,
    query_tiles,
    sink_of,
)
from kernels.common.scheduler import (
    announce,
    claim,
    first_ticket,
    last_ticket,
    next_ticket,
    open_queue,
    queue_storage,
    reserve,
)
from kernels.common.softmax import (
    LOG2_E,
    OnlineSoftmax,
    finish,
    make_online_softmax,
    online_softmax,
    rescale,
    spoil,
)
from kernels.common.tma import tma_atom, tma_store_begin, tma_store_wait, tma_tiles

# Named barriers; 0 is sync_threads. TURN + i is consumer warpgroup i's turn at the tensor cores.
TURN = 1
# Rows of an accumulator that one warp holds, and stores.
WARP_ROWS = 16
# A consumer warpgroup's.
GROUP_ROWS = 64


class Smem(NamedTuple):
    """Shared-memory tiles, stages last."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    out: cute.Tensor | None


class Results(NamedTuple):
    """In global memory: out (rows, V, head, batch), lse (batch, head, rows)."""

    out: cute.Tensor
    lse: cute.Tensor


class Layouts(NamedTuple):
    """Shared-memory layouts (rows, columns, stages)."""

    q: cute.ComposedLayout
    k: cute.ComposedLayout
    v: cute.ComposedLayout
    out: cute.ComposedLayout


class Mma(NamedTuple):
    """scores = q k^T (both in shared memory); out += p v (p in registers)."""

    scores: cute.TiledMma
    out: cute.TiledMma


class ForwardSm90:
    """Host entry and kernel of one table row; `__call__` follows `Variant.signature`."""

    def __init__(self, variant: Variant):
        self.dtype = element_type(variant.dtype)
        self.head_dim, self.head_dim_v = variant.head_dim, variant.head_dim_v
        self.tile_m, self.tile_n = variant.tiles.tile_m, variant.tiles.tile_n
        self.tile_mn = self.tile_m, self.tile_n
        self.stages = variant.tiles.stages
        self.has_intervals = Feature.interval in variant.features
        self.has_softcap = Feature.softcap in variant.features
        self.warpgroups = variant.tiles.mma_warpgroups
        self.threads = (self.warpgroups + 1) * WARPGROUP
        self.registers = register_split(self.warpgroups)
        self.q_stages, self.epilogue = variant.tiles.q_stages, variant.tiles.epilogue
        self.softmax = variant.tiles.softmax
        assert self.tile_m == GROUP_ROWS * self.warpgroups, "a warpgroup owns 64 query rows"
        assert self.epilogue is not Epilogue.over_q or (
            self.head_dim_v <= self.head_dim and self.q_stages == 1
        ), "out takes q's place"

    @cute.jit
    def __call__(  # noqa: PLR0913 - the C ABI is flat
        self,
        stream: cuda.CUstream,
        softmax_scale: Float32,
        softcap: Float32,
        band_lower: Int32,
        band_upper: Int32,
        num_sms: Int32,
        *buffers: cute.Tensor,
    ):
        q, k, v, sinks, *intervals, out, lse = buffers[: len(buffers) - self.has_intervals]
        q, k, v, out = kernel_views(q, k, v, out)
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

        def rows_layout(rows: int, columns: int, stages: int = 1) -> cute.ComposedLayout:
            tile = (rows, self.tile_n, columns)
            return sm90.make_smem_layout_a(LayoutEnum.ROW_MAJOR, tile, self.dtype, stages)

        layouts = Layouts(
            q=rows_layout(self.tile_m, self.head_dim, self.q_stages),
            k=sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, scores_tile, self.dtype, self.stages),
            v=sm90.make_smem_layout_b(LayoutEnum.COL_MAJOR, out_tile, self.dtype, self.stages),
            out=rows_layout(self.tile_m, self.head_dim_v),
        )

        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        warp_tile = (WARP_ROWS, self.head_dim_v)
        tma = Tma(
            *tma_atom(load, q, layouts.q, (self.tile_m, self.head_dim)),
            *tma_atom(load, k, layouts.k, (self.tile_n, self.head_dim)),
            *tma_atom(load, v, layouts.v, (self.head_dim_v, self.tile_n)),
            *tma_atom(store, out, rows_layout(*warp_tile), warp_tile),
        )

        ring, ring_barriers = queue_storage(self.has_intervals)

        @cute.struct
        class Storage:
            tile_ring: ring
            tile_barriers: ring_barriers
            q_barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.q_stages]
            k_barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.stages]
            v_barriers: cute.struct.MemRange[cutlass.Int64, 2 * self.stages]
            q: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layouts.q)], 1024]
            k: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layouts.k)], 1024]
            v: cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layouts.v)], 1024]
            out: cute.struct.Align[
                cute.struct.MemRange[
                    self.dtype,
                    cute.cosize(layouts.out) if self.epilogue is Epilogue.own else 0,
                ],
                1024,
            ]

        self.storage = Storage
        problem = query_tiles(
            *(q, k, (self.tile_m, GROUP_ROWS), self.head_dim_v),
            (softmax_scale, softcap if const_expr(self.has_softcap) else None),
            Band(band_lower, band_upper),
            sinks,
            tuple(intervals),
            buffers[len(buffers) - self.has_intervals :],
            num_sms,
        )
        self.kernel(tma, mma, layouts, Results(out, lse), problem).launch(
            grid=(problem.order.ctas, 1, 1),
            block=(self.threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(self, tma: Tma, mma: Mma, layouts: Layouts, results: Results, problem: Problem):
        thread, _, _ = cute.arch.thread_idx()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = SmemAllocator().allocate(self.storage)
        s_out = storage.q if const_expr(self.epilogue is Epilogue.over_q) else storage.out
        smem = Smem(
            storage.q.get_tensor(layouts.q.outer, swizzle=layouts.q.inner),
            storage.k.get_tensor(layouts.k.outer, swizzle=layouts.k.inner),
            storage.v.get_tensor(layouts.v.outer, swizzle=layouts.v.inner),
            None
            if const_expr(self.epilogue is Epilogue.registers)
            else s_out.get_tensor(layouts.out.outer, swizzle=layouts.out.inner),
        )
        consumer_warps = 4 * self.warpgroups
        q_pipe = load_tile_pipeline(storage.q_barriers, layouts.q, self.dtype, consumer_warps)
        k_pipe = load_tile_pipeline(storage.k_barriers, layouts.k, self.dtype, consumer_warps)
        v_pipe = load_tile_pipeline(storage.v_barriers, layouts.v, self.dtype, consumer_warps)
        if const_expr(self.has_intervals):
            places = (storage.tile_ring, storage.tile_barriers)
            order = open_queue(problem.order, *places, consumer_warps)
            problem = problem._replace(order=order)
        pipeline.pipeline_init_arrive()
        pipeline.pipeline_init_wait()

        if warp_idx < 4:
            cute.arch.setmaxregister_decrease(self.registers.load)
            if warp_idx == 0:
                self.load(tma, smem, (q_pipe[0], k_pipe[0], v_pipe[0]), problem)
        else:
            cute.arch.setmaxregister_increase(self.registers.consume)
            consumers = (q_pipe[1], k_pipe[1], v_pipe[1])
            self.consume(thread - WARPGROUP, mma, smem, consumers, tma, results, problem)

    @cute.jit
    def load(self, tma: Tma, smem: Smem, producers: tuple, problem: Problem):
        """Per tile: q; k and v of every visited tile, last to first, k one tile ahead of v. The
        first k comes before q, whose place may be free later."""
        q_producer, k_producer, v_producer = producers
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        while ticket < last:
            reserved = reserve(problem.order)
            tile = query_tile(problem, self.tile_mn, ticket)
            g_q = cute.local_tile(
                cute.domain_offset((tile.first_row, 0), tma.g_q[None, None, tile.head, tile.batch]),
                (self.tile_m, self.head_dim),
                (0, 0),
            )
            g_k = cute.local_tile(
                tma.g_k[None, None, tile.kv_head, tile.batch],
                (self.tile_n, self.head_dim),
                (None, 0),
            )
            g_v = cute.local_tile(
                tma.g_v[None, None, tile.kv_head, tile.batch],
                (self.head_dim_v, self.tile_n),
                (0, None),
            )
            s_q, g_q = tma_tiles(tma.q, smem.q, g_q)
            s_k, g_k = tma_tiles(tma.k, smem.k, g_k)
            s_v, g_v = tma_tiles(tma.v, smem.v, g_v)
            blocks = tile.blocks
            n = blocks.end - 1
            if blocks.end > blocks.begin:
                slot = k_producer.acquire_and_advance()
                cute.copy(tma.k, g_k[None, n], s_k[None, slot.index], tma_bar_ptr=slot.barrier)
            slot = q_producer.acquire_and_advance()
            cute.copy(tma.q, g_q, s_q[None, slot.index], tma_bar_ptr=slot.barrier)
            if blocks.end > blocks.begin:
                for i in cutlass.range(blocks.end - blocks.begin - 1, unroll=1):
                    n = blocks.end - 1 - i
                    slot = k_producer.acquire_and_advance()
                    i_k, barrier = slot.index, slot.barrier
                    cute.copy(tma.k, g_k[None, n - 1], s_k[None, i_k], tma_bar_ptr=barrier)
                    slot = v_producer.acquire_and_advance()
                    cute.copy(tma.v, g_v[None, n], s_v[None, slot.index], tma_bar_ptr=slot.barrier)
                slot = v_producer.acquire_and_advance()
                n = blocks.begin
                cute.copy(tma.v, g_v[None, n], s_v[None, slot.index], tma_bar_ptr=slot.barrier)
            following = claim(problem.order, ticket, reserved)
            announce(problem.order, ticket, following)
            ticket = following
        k_producer.tail()
        v_producer.tail()

    @cute.jit
    def consume(
        self,
        thread: Int32,
        mma: Mma,
        smem: Smem,
        consumers: tuple,
        tma: Tma,
        results: Results,
        problem: Problem,
    ):
        """Scores, softmax and out of this warpgroup's 64 rows of every tile."""
        q_consumer, k_consumer, v_consumer = consumers
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        # Descriptors are the warpgroup's: from its first thread, which is uniform.
        first_thread = group * WARPGROUP
        scores_thread = mma.scores.get_slice(first_thread)
        out_thread = mma.out.get_slice(first_thread)
        f_q = mma.scores.make_fragment_A(scores_thread.partition_A(smem.q))
        f_k = mma.scores.make_fragment_B(scores_thread.partition_B(smem.k))
        f_v = mma.out.make_fragment_B(out_thread.partition_B(smem.v))
        coords = accumulator_coordinates(mma.scores, thread, self.tile_mn)
        scale_log2 = problem.softmax_scale * LOG2_E

        self.first_turn(group)
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        while ticket < last:
            tile = query_tile(problem, self.tile_mn, ticket)
            first_row = tile.first_row + group * GROUP_ROWS
            own = (GROUP_ROWS, self.tile_n)
            blocks = own_visits(problem, own, tile, first_row)
            acc = make_accumulator(mma.out, (self.tile_m, self.head_dim_v))
            acc.fill(0.0)
            acc_rows = rows_and_columns(acc)
            softmax = make_online_softmax(cute.size(acc_rows, mode=[0]), self.softmax)
            seen = self.seen(coords, tile, problem)
            q_slot = q_consumer.wait_and_advance()

            missed = tile.blocks.end - blocks.end
            k_consumer, v_consumer = self.sit_out(missed, group, k_consumer, v_consumer)
            if blocks.end > blocks.begin:
                q_tile = stage(f_q, q_slot)
                scores = make_accumulator(mma.scores, self.tile_mn)
                k_slot = k_consumer.wait_and_advance()
                self.wait_turn(group)
                issue_gemm(mma.scores, scores, q_tile, stage(f_k, k_slot), zero=True)
                self.pass_turn(group)
                warpgroup.wait_group(0)
                k_slot.release()
                self.cap(scores, problem)
                if blocks.needs_mask(blocks.end - 1):
                    self.mask(scores, coords, seen, (tile.first_row, blocks.end - 1), problem)
                online_softmax(softmax, rows_and_columns(scores), scale_log2, self.softmax)
                probabilities = to_16_bit(scores, self.dtype)
                p_operand = as_a_operand(probabilities)
                k_is_full, v_is_full = k_consumer.try_wait(), v_consumer.try_wait()

                for first, end, masked in reversed(blocks.segments(blocks.end - 1)):
                    for i in cutlass.range(end - first, unroll=1):
                        scores = make_accumulator(mma.scores, self.tile_mn)
                        k_slot = k_consumer.wait_and_advance(k_is_full)
                        v_slot = v_consumer.wait_and_advance(v_is_full)
                        self.wait_turn(group)
                        issue_gemm(mma.scores, scores, q_tile, stage(f_k, k_slot), zero=True)
                        issue_gemm(mma.out, acc, p_operand, stage(f_v, v_slot), zero=False)
                        self.pass_turn(group)
                        warpgroup.wait_group(1)
                        k_slot.release()
                        # Where p v is waited for anyway: a wait between the softmax and the next
                        # MMAs costs 150 to 200 of a key tile's 2,700 cycles (d=128).
                        k_is_full, v_is_full = k_consumer.try_wait(), v_consumer.try_wait()
                        self.cap(scores, problem)
                        if const_expr(masked):
                            place = (tile.first_row, end - 1 - i)
                            self.mask(scores, coords, seen, place, problem)
                        online_softmax(softmax, rows_and_columns(scores), scale_log2, self.softmax)
                        warpgroup.wait_group(0)
                        v_slot.release()
                        rescale(acc_rows, softmax.decay)
                        round_into(probabilities, scores)

                v_slot = v_consumer.wait_and_advance(v_is_full)
                issue_gemm(mma.out, acc, p_operand, stage(f_v, v_slot), zero=False)
                warpgroup.wait_group(0)
                v_slot.release()
            missed = blocks.begin - tile.blocks.begin
            k_consumer, v_consumer = self.sit_out(missed, group, k_consumer, v_consumer)

            if const_expr(self.epilogue is not Epilogue.over_q):
                q_slot.release()
            self.normalise(softmax, seen, tile, problem)
            rescale(acc_rows, softmax.decay)
            if tile.first_row + group * GROUP_ROWS >= 0:
                self.store(mma, smem, tile, tma, (acc, softmax.row_max), coords, results)
            if const_expr(self.epilogue is Epilogue.over_q):
                q_slot.release()
            ticket = next_ticket(problem.order, ticket)
        self.last_turn()
        tma_store_wait()

    @cute.jit
    def sit_out(self, tiles: Int32, group: Int32, k_consumer, v_consumer):
        """Let key tiles pass that the tile visits and this warpgroup's rows don't see, in turn."""
        for _ in cutlass.range(tiles, unroll=1):
            k_slot = k_consumer.wait_and_advance()
            self.wait_turn(group)
            self.pass_turn(group)
            k_slot.release()
            v_slot = v_consumer.wait_and_advance()
            v_slot.release()
        return k_consumer, v_consumer

    @cute.jit
    def cap(self, scores: cute.Tensor, problem: Problem):
        """scores <- tanh(softmax_scale * scores / softcap), with a softcap."""
        if const_expr(self.has_softcap):
            for i in cutlass.range_constexpr(cute.size(scores)):
                scores[i] = tanh(scores[i] * problem.tanh_scale)

    @cute.jit
    def seen(self, coords: Coordinates, tile: QueryTile, problem: Problem) -> Band | Intervals:
        """Which keys this thread's queries of a tile see.

        Four registers for the whole tile, and they fit: loaded where they are needed, they'd make a
        masked key tile wait, and 30 instructions longer.
        """
        seen = problem.band
        if const_expr(self.has_intervals):
            m_start = tile.first_row
            last = problem.seqlen_q - m_start - 1
            rows = cute.size(coords.offsets, mode=[0])
            seen = Intervals(*(cute.make_rmem_tensor(rows, Int32) for _ in range(2)))
            for bounds, registers in zip(problem.intervals[:2], seen, strict=True):
                bounds = cute.domain_offset((m_start,), bounds[tile.batch, None])
                for r in cutlass.range_constexpr(rows):
                    row = coords.row + coords.offsets[r, 0][0]
                    registers[r] = bounds[cutlass.min(row, last)]
        return seen

    @cute.jit
    def mask(
        self,
        scores: cute.Tensor,
        coords: Coordinates,
        seen: Band | Intervals,
        place: tuple[Int32, Int32],
        problem: Problem,
    ):
        """Mask what the tile's queries, from place[0] on, don't see of key tile place[1]."""
        m_start, n_start = place[0], place[1] * self.tile_n
        extent = (problem.seqlen_q - m_start, problem.seqlen_k - n_start)
        seen = seen.from_tile(m_start, n_start)
        mask_scores(rows_and_columns(scores), coords, seen, extent)

    @cute.jit
    def normalise(
        self, softmax: OnlineSoftmax, seen: Band | Intervals, tile: QueryTile, problem: Problem
    ):
        """The factors of the rows of out, and lse; NaN in broken rows."""
        finish(softmax, sink_of(problem, tile))
        if const_expr(self.has_intervals):
            spoil(softmax, seen)

    @cute.jit
    def store(
        self,
        mma: Mma,
        smem: Smem,
        tile: QueryTile,
        tma: Tma,
        rows: tuple[cute.Tensor, cute.Tensor],
        coords: Coordinates,
        results: Results,
    ):
        """`rows`, normalised out and lse of a warpgroup's rows, of which none is before the first
        query, to global memory."""
        acc, row_lse = rows
        g_lse = cute.domain_offset((tile.first_row,), results.lse[tile.batch, tile.head, None])
        self.store_lse(row_lse, coords, g_lse, results.lse.shape[2] - tile.first_row)
        # `thread` would need a register through the loop: d=64 with a softcap has none left.
        writer = thread_again() - WARPGROUP
        if const_expr(self.epilogue is Epilogue.registers):
            g_out = results.out[None, None, tile.head, tile.batch]
            accumulator_to_gmem(rows_and_columns(acc), writer, g_out, tile.first_row + coords.row)
        else:
            self.store_out(writer, mma, smem, tile, tma, acc)

    @cute.jit
    def store_lse(
        self, row_lse: cute.Tensor, coords: Coordinates, g_lse: cute.Tensor, extent: Int32
    ):
        """One entry per row of this thread, by the first of the lanes that share the row."""
        for r in cutlass.range_constexpr(cute.size(row_lse)):
            row = coords.row + coords.offsets[r, 0][0]
            if coords.column == 0 and row < extent:
                g_lse[row] = row_lse[r]

    @cute.jit
    def store_out(
        self, thread: Int32, mma: Mma, smem: Smem, tile: QueryTile, tma: Tma, acc: cute.Tensor
    ):
        """acc -> 16 bit -> shared memory (stmatrix) -> TMA store of this warp's rows, which clips
        those past seqlen_q. The memory is free again before the next store into it, or, where it is
        q's, when this returns."""
        if const_expr(self.epilogue is Epilogue.own):
            tma_store_wait()
        s_out = smem.out[None, None, 0]
        accumulator_to_smem(acc, mma.out, thread, s_out)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        warp = cute.arch.make_warp_uniform(thread // 32)
        tile_shape = (WARP_ROWS, self.head_dim_v)
        g_out = tma.g_out[None, None, tile.head, tile.batch]
        g_out = cute.domain_offset((tile.first_row + warp * WARP_ROWS, 0), g_out)
        g_out = cute.local_tile(g_out, tile_shape, (0, 0))
        tma_store_begin(tma.out, cute.local_tile(s_out, tile_shape, (warp, 0)), g_out)
        if const_expr(self.epilogue is Epilogue.over_q):
            tma_store_wait()

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
    def last_turn(self):
        """Close the ring: the first warpgroup takes the one grant that is still open, so that no
        barrier is left half full."""
        if thread_again() < 2 * WARPGROUP:
            cute.arch.barrier(barrier_id=TURN, number_of_threads=2 * WARPGROUP)
