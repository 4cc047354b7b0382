# SPDX-License-Identifier: Apache-2.0
"""Attention backward for Hopper, head dims whose dk and dv fill one warpgroup's registers each.

Same algorithm and results as `backward_sm90`. There a warpgroup computes all five products for its
half of the keys and holds its half of dk and dv; from 192 columns on, that and its scores are more
than 240 registers a thread. Here the warpgroups divide the products: one makes p and dv, the other
dS and dk, for all keys of the tile, and each a part of dq's columns.

    warps   role            registers
    0       load            24
    1       order           24        dq's additions, with `Feature.deterministic`; else idle
    2-3     idle            24
    4-7     probabilities   240       p  = exp2(scale_log2 k q^T - lse_log2)     dv += p dout
    8-11    gradients       240       dS = p (v dout^T - dpsum)                  dk += dS q
                            both      dq_accum += dS^T k

    load --[q, lse_log2]--> both                 `stages` deep; with the intervals, if any
    load --[dout, dpsum]--> both                 `stages` deep
    load --[k]--> both                           with a key tile's first q, `k_stages` deep
    load --[v]--> gradients                      with a key tile's first dout, `v_stages` deep
    probabilities --[p, fp32]--> gradients       one stage, named barrier P_FULL; with a softcap,
                                                 p (1 - t^2): see `key_tile`
    gradients --[dS]--> both                     one stage, named barrier DS_FULL
    order --[turn]--> both --> order             DS_FULL and ADDED, see `order_additions`

Scores are transposed (keys by queries), so p and dS are the register operands of dv and dk, and
each operand of the scores is read by one MMA of 64 by 64 and not by two of half its size, which
shared memory would bound. p goes to the other warpgroup in fp32, thread to thread; dS as a tile,
for dq. The two edges need no empty barriers: before P_FULL of the next tile both warpgroups have
finished this tile's dq, and before DS_FULL of this tile p has been read. So they run on from key
tile to key tile.

Each warpgroup issues its scores of the next tile before it adds its last part of dq of this one,
and the probabilities' warpgroup has fewer of dq's columns: its exponentials then run while the
other's dk and scores keep the tensor cores busy.

dq goes from registers to global memory by vector reductions: through shared memory and TMA it would
cost 128 KiB of shared-memory traffic per tile at d=256 beside the 256 KiB of all operands, and a
tile that isn't left.
"""

import functools
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, const_expr, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers as sm90

from fa4_jax._variants import Feature, Variant
from kernels.common.copy_sm90 import (
    accumulator_to_gmem,
    add_to_gmem,
    reduction_address,
    store_matrix,
)
from kernels.common.dq_order import DONE, later_tiles, pass_turn, turn_of, wait_for_turn
from kernels.common.dtypes import element_type
from kernels.common.key_tile import (
    KeyTile,
    Operands,
    Problem,
    Scalars,
    Statistics,
    cap,
    capped_probabilities,
    column_statistic,
    key_tile,
    key_tiles,
    load_operands,
    make_softcap,
    mask_transposed,
    next_stage,
    probabilities,
    resident,
)
from kernels.common.mask import Band, accumulator_coordinates
from kernels.common.mma_sm90 import (
    LANES_PER_ROW,
    as_a_operand,
    issue_gemm,
    make_accumulator,
    rows_and_columns,
    stage,
    to_16_bit,
)
from kernels.common.pipelines import WARPGROUP, load_tile_pipeline, meet, register_split
from kernels.common.scheduler import (
    first_ticket,
    last_ticket,
    next_ticket,
    open_queue,
    queue_storage,
)
from kernels.common.tma import tma_atom

# Named barriers; 0 is sync_threads.
P_FULL, DS_FULL, ADDED = 1, 2, 3
BOTH = 2 * WARPGROUP
TILE_M = 64  # queries per tile: the rows of one MMA of dq


class Results(NamedTuple):
    """dk, dv and dq's accumulator (rows, dim, head, batch); the words of `dq_order`, if dq's
    additions have an order."""

    dk: cute.Tensor
    dv: cute.Tensor
    dq: cute.Tensor
    progress: tuple[cute.Tensor, ...]


class Layouts(NamedTuple):
    """Shared-memory layouts, stages last. `*_t` are the same bytes seen as the transposed
    operand."""

    q: cute.ComposedLayout
    q_t: cute.ComposedLayout
    dout: cute.ComposedLayout
    dout_t: cute.ComposedLayout
    k: cute.ComposedLayout
    k_t: cute.ComposedLayout
    v: cute.ComposedLayout
    ds: cute.ComposedLayout
    ds_t: cute.ComposedLayout


class Smem(NamedTuple):
    """Shared-memory tiles, stages last."""

    operands: Operands
    q_t: cute.Tensor
    dout_t: cute.Tensor
    k_t: cute.Tensor
    ds: cute.Tensor
    ds_t: cute.Tensor
    p: cute.Tensor  # (4, column pair, block of 64 keys, thread) of the accumulator
    rows: Statistics  # (tile_m, stages)


class Mma(NamedTuple):
    """scores: k q^T and v dout^T; dk, dv: register operand times q, dout; dq: dS^T k, by parts of
    its columns."""

    scores: cute.TiledMma
    dk: cute.TiledMma
    dv: cute.TiledMma
    dq: tuple[cute.TiledMma, ...]


class BackwardWideSm90:
    """Host entry and kernel of one table row; `__call__` follows `Variant.signature`."""

    def __init__(self, variant: Variant):
        self.dtype = element_type(variant.dtype)
        self.head_dim, self.head_dim_v = variant.head_dim, variant.head_dim_v
        self.tile_m, self.tile_n = variant.tiles.tile_m, variant.tiles.tile_n
        self.stages = variant.tiles.stages
        self.has_intervals = Feature.interval in variant.features
        self.has_softcap = Feature.softcap in variant.features
        self.is_deterministic = Feature.deterministic in variant.features
        # Who meets before dq is added, and after.
        self.ordered = BOTH + 32 * self.is_deterministic
        self.registers = register_split(variant.tiles.mma_warpgroups)
        # (first column, columns) of dq's products: the probabilities' one, then the
        # gradients'. A product must not start inside a swizzle atom of k, 64 columns, or 32 at
        # d=96. At d=256, one of 128 beside dk and dS makes ptxas serialise every MMA for want of
        # registers.
        widths = {96: (64, 32), 192: (64, 128), 256: (64, 64, 64, 64)}[self.head_dim]
        self.dq_parts = tuple((sum(widths[:i]), width) for i, width in enumerate(widths))
        assert sum(widths) == self.head_dim
        self.width = variant.static_dims["E"]
        self.k_stages, self.v_stages = variant.tiles.k_stages, variant.tiles.v_stages
        assert self.tile_m == TILE_M and self.tile_n % 64 == 0
        assert variant.tiles.mma_warpgroups == 2, "the products are divided into two"

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
        q, k, v, dout, lse_log2, dpsum, dq_accum, *rest = buffers
        intervals, (dk, dv, *own) = rest[: 3 * self.has_intervals], rest[3 * self.has_intervals :]
        # (batch, rows, heads, dim) -> (rows, dim, heads, batch)
        q, k, v, dout, dk, dv = (
            cute.make_tensor(t.iterator, cute.select(t.layout, mode=[1, 3, 2, 0]))
            for t in (q, k, v, dout, dk, dv)
        )
        dq = cute.make_tensor(dq_accum.iterator, cute.select(dq_accum.layout, mode=[2, 3, 1, 0]))
        layouts = self.layouts()
        load = cpasync.CopyBulkTensorTileG2SOp()
        loads = [
            tma_atom(load, array, layout, (rows, dim))
            for array, layout, rows, dim in (
                (q, layouts.q, self.tile_m, self.head_dim),
                (k, layouts.k, self.tile_n, self.head_dim),
                (v, layouts.v, self.tile_n, self.head_dim_v),
                (dout, layouts.dout, self.tile_m, self.head_dim_v),
            )
        ]
        atoms, coordinates = (Operands(*part) for part in zip(*loads, strict=True))
        stages = self.stages
        bounds = self.tile_m * stages if self.has_intervals else 0

        def room(layout: cute.ComposedLayout):
            return cute.struct.Align[cute.struct.MemRange[self.dtype, cute.cosize(layout)], 1024]

        ring, ring_barriers = queue_storage(self.has_intervals)

        @cute.struct
        class Storage:
            tile_ring: ring
            tile_barriers: ring_barriers
            q_barriers: cute.struct.MemRange[cutlass.Int64, 2 * stages]
            dout_barriers: cute.struct.MemRange[cutlass.Int64, 2 * stages]
            lse_log2: cute.struct.Align[cute.struct.MemRange[Float32, self.tile_m * stages], 128]
            dpsum: cute.struct.Align[cute.struct.MemRange[Float32, self.tile_m * stages], 128]
            kv_start: cute.struct.Align[cute.struct.MemRange[Int32, bounds], 128]
            kv_end: cute.struct.Align[cute.struct.MemRange[Int32, bounds], 128]
            q: room(layouts.q)
            dout: room(layouts.dout)
            k: room(layouts.k)
            v: room(layouts.v)
            ds: room(layouts.ds)
            p: cute.struct.Align[cute.struct.MemRange[Float32, self.tile_n * self.tile_m], 128]

        self.storage = Storage
        scalars = Scalars(
            softmax_scale,
            make_softcap(softcap, softmax_scale) if const_expr(self.has_softcap) else (),
            Band(band_lower, band_upper),
        )
        ranges = tuple(intervals[2:])
        tile_mn = (self.tile_m, self.tile_n)
        problem = key_tiles(q, k, tile_mn, scalars, ranges, tuple(own), num_sms)
        rows, results = (
            Statistics(lse_log2, dpsum, tuple(intervals[:2])),
            Results(dk, dv, dq, tuple(own[1:])),
        )
        self.kernel(atoms, coordinates, results, self.mma(), layouts, rows, problem).launch(
            grid=(problem.order.ctas, 1, 1),
            block=(3 * WARPGROUP, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )

    def layouts(self) -> Layouts:
        """Every operand is loaded once and read in both majors: `cute-dsl` layouts of the same
        bytes."""
        row_major, col_major = LayoutEnum.ROW_MAJOR, LayoutEnum.COL_MAJOR
        m, n, d, dv = self.tile_m, self.tile_n, self.head_dim, self.head_dim_v
        a, b = sm90.make_smem_layout_a, sm90.make_smem_layout_b
        return Layouts(
            q=b(row_major, (n, m, d), self.dtype, self.stages),
            q_t=b(col_major, (n, d, m), self.dtype, self.stages),
            dout=b(row_major, (n, m, dv), self.dtype, self.stages),
            dout_t=b(col_major, (n, dv, m), self.dtype, self.stages),
            k=a(row_major, (n, m, d), self.dtype, self.k_stages),
            k_t=b(col_major, (m, d, n), self.dtype, self.k_stages),
            v=a(row_major, (n, m, dv), self.dtype, self.v_stages),
            ds=a(row_major, (n, d, m), self.dtype, 1),
            ds_t=a(col_major, (m, d, n), self.dtype, 1),
        )

    def mma(self) -> Mma:
        """The five products (`Mma`), each by one warpgroup."""
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        make = functools.partial(sm90.make_trivial_tiled_mma, self.dtype, self.dtype)
        one, registers = (1, 1, 1), warpgroup.OperandSource.RMEM
        return Mma(
            scores=make(k_major, k_major, Float32, one, (64, self.tile_m)),
            dk=make(k_major, mn_major, Float32, one, (64, self.head_dim), registers),
            dv=make(k_major, mn_major, Float32, one, (64, self.head_dim_v), registers),
            dq=tuple(
                make(mn_major, mn_major, Float32, one, (64, width)) for _, width in self.dq_parts
            ),
        )

    @cute.kernel
    def kernel(
        self,
        atoms: Operands,
        coordinates: Operands,
        results: Results,
        mma: Mma,
        layouts: Layouts,
        statistics: Statistics,
        problem: Problem,
    ):
        thread, _, _ = cute.arch.thread_idx()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = SmemAllocator().allocate(self.storage)
        smem = self.shared_memory(storage, layouts)
        row_bytes = 4 * self.tile_m
        pipes = tuple(
            load_tile_pipeline(barriers, layout, self.dtype, BOTH // 32, extra)
            for barriers, layout, extra in (
                (storage.q_barriers, layouts.q, (3 if self.has_intervals else 1) * row_bytes),
                (storage.dout_barriers, layouts.dout, row_bytes),
            )
        )
        producers, consumers = zip(*pipes, strict=True)
        if const_expr(self.has_intervals):
            places = (storage.tile_ring, storage.tile_barriers)
            followers = BOTH // 32 + self.is_deterministic
            problem = problem._replace(order=open_queue(problem.order, *places, followers))
        pipeline.pipeline_init_arrive()
        pipeline.pipeline_init_wait()

        if warp_idx < 4:
            cute.arch.setmaxregister_decrease(self.registers.load)
            if warp_idx == 0:
                rows = (statistics, smem.rows)
                grads = (results.dk, results.dv)
                load_operands(atoms, coordinates, smem.operands, producers, rows, problem, grads)
            if const_expr(self.is_deterministic):
                if warp_idx == 1:
                    self.order_additions(results.progress[0], problem)
        elif warp_idx < 8:
            cute.arch.setmaxregister_increase(self.registers.consume)
            self.probability_side(thread % WARPGROUP, mma, smem, consumers, problem, results)
        else:
            cute.arch.setmaxregister_increase(self.registers.consume)
            self.gradient_side(thread % WARPGROUP, mma, smem, consumers, problem, results)

    def shared_memory(self, storage, layouts: Layouts) -> Smem:
        """The tiles and their transposed views."""

        def tile(field, layout: cute.ComposedLayout) -> cute.Tensor:
            return field.get_tensor(layout.outer, swizzle=layout.inner)

        def view(s: cute.Tensor, layout: cute.ComposedLayout) -> cute.Tensor:
            return cute.make_tensor(
                cute.recast_ptr(s.iterator, layout.inner, self.dtype), layout.outer
            )

        q, dout = tile(storage.q, layouts.q), tile(storage.dout, layouts.dout)
        k, ds = tile(storage.k, layouts.k), tile(storage.ds, layouts.ds)
        pairs, blocks = self.tile_m // 8, self.tile_n // 64
        # 16 bytes of a thread beside those of the next: no bank conflicts.
        p = cute.make_layout(
            (4, pairs, blocks, WARPGROUP),
            stride=(1, 4 * WARPGROUP, 4 * WARPGROUP * pairs, 4),
        )
        rows = cute.make_layout((self.tile_m, self.stages))
        bounds = (storage.kv_start, storage.kv_end) if const_expr(self.has_intervals) else ()
        interval = tuple(bound.get_tensor(rows) for bound in bounds)
        return Smem(
            operands=Operands(q=q, k=k, v=tile(storage.v, layouts.v), dout=dout),
            q_t=view(q, layouts.q_t),
            dout_t=view(dout, layouts.dout_t),
            k_t=view(k, layouts.k_t),
            ds=ds,
            ds_t=view(ds, layouts.ds_t),
            p=storage.p.get_tensor(p),
            rows=Statistics(
                storage.lse_log2.get_tensor(rows), storage.dpsum.get_tensor(rows), interval
            ),
        )

    def as_quads(self, acc: cute.Tensor) -> cute.Tensor:
        """View a scores accumulator as (4, column pair, block of 64 keys): two columns of two rows
        are consecutive registers."""
        return cute.make_tensor(
            acc.iterator, cute.make_layout((4, self.tile_m // 8, self.tile_n // 64))
        )

    @cute.jit
    def probability_side(  # noqa: C901 - a main loop, in the order in which it runs
        self,
        thread: Int32,
        mma: Mma,
        smem: Smem,
        consumers: tuple,
        problem: Problem,
        results: Results,
    ):
        """For every key tile, p, dv and the first part of dq for every visited query tile; then
        dv."""
        q_consumer, dout_consumer = consumers
        scores_thread = mma.scores.get_slice(thread)
        s_k, s_q = smem.operands.k, smem.operands.q
        f_k = mma.scores.make_fragment_A(scores_thread.partition_A(s_k))
        f_q = mma.scores.make_fragment_B(scores_thread.partition_B(s_q))
        f_dout_t = mma.dv.make_fragment_B(mma.dv.get_slice(thread).partition_B(smem.dout_t))
        f_dq = self.dq_operands(thread, mma, smem, 0)
        tile_nm = (self.tile_n, self.tile_m)
        coords = accumulator_coordinates(mma.scores, thread, tile_nm)
        scores = make_accumulator(mma.scores, tile_nm)
        s_lse, *s_interval = (
            column_statistic(rows, scores_thread, self.tile_n)
            for rows in (smem.rows.lse_log2, *smem.rows.interval)
        )
        s_p = smem.p[None, None, None, thread]
        scale_log2 = problem.scalars.scale_log2()
        k_stage = Int32(0)
        tile_mn = (self.tile_m, self.tile_n)
        ticket, end = first_ticket(problem.order), last_ticket(problem.order)
        tile = key_tile(problem, tile_mn, ticket)
        while ticket < end:
            blocks = tile.blocks
            dv = make_accumulator(mma.dv, (self.tile_n, self.head_dim_v))
            dv.fill(0.0)
            if blocks.end > blocks.begin:
                k_tile, dq_tile = resident(f_k, k_stage), (f_dq[0], resident(f_dq[1], k_stage))
                q_slot = q_consumer.wait_and_advance()
                first_q = stage(f_q, q_slot)
                issue_gemm(mma.scores, scores, k_tile, first_q, zero=True)
                m = blocks.begin
                g_dq, wrap = self.dq_addresses(results.dq, problem, tile, thread)
                for count, last in self.visits(problem, tile):
                    for _ in cutlass.range(count, unroll=1):
                        lse_log2 = self.statistic(s_lse[None, None, q_slot.index])
                        warpgroup.wait_group(0)
                        if const_expr(self.has_softcap):
                            cap(scores, problem.scalars)
                        if blocks.needs_mask(m):
                            interval = tuple(s[None, None, q_slot.index] for s in s_interval)
                            start = (m * self.tile_m, tile.n_block * self.tile_n)
                            rows = rows_and_columns(scores)
                            mask_transposed(rows, coords, start, problem, interval)
                        if const_expr(self.has_softcap):
                            p = capped_probabilities(scores, lse_log2, scale_log2, self.dtype)
                        else:
                            probabilities(rows_and_columns(scores), lse_log2, scale_log2)
                        if const_expr(not last):
                            q_slot.release()
                        self.store_quads(self.as_quads(scores), s_p)
                        cute.arch.barrier_arrive(barrier_id=P_FULL, number_of_threads=BOTH)
                        if const_expr(not self.has_softcap):
                            p = to_16_bit(scores, self.dtype)
                        dout_slot = dout_consumer.wait_and_advance()
                        f_b = stage(f_dout_t, dout_slot)
                        issue_gemm(mma.dv, dv, as_a_operand(p), f_b, zero=False)
                        meet(DS_FULL, self.ordered)
                        dq = self.issue_dq(mma, dq_tile, 0)
                        # dv first: the scores would not fit beside p. They follow dq without a gap.
                        warpgroup.wait_group(1)
                        dout_slot.release()
                        if const_expr(not last):
                            q_slot = q_consumer.wait_and_advance()
                            f_b = stage(f_q, q_slot)
                            issue_gemm(mma.scores, scores, k_tile, f_b, zero=True)
                        warpgroup.wait_group(const_expr(int(not last)))
                        if const_expr(last):
                            q_slot.release()  # and k
                        self.add_last_dq(dq, g_dq, 0)
                        m, g_dq = self.next_visit(tile, m, g_dq, wrap)
                self.store_gradient(dv, results.dv, thread, tile)
                k_stage = next_stage(k_stage, s_k)
            ticket = next_ticket(problem.order, ticket)
            tile = key_tile(problem, tile_mn, cutlass.min(ticket, end - 1))

    @cute.jit
    def gradient_side(  # noqa: C901 - a main loop, in the order in which it runs
        self,
        thread: Int32,
        mma: Mma,
        smem: Smem,
        consumers: tuple,
        problem: Problem,
        results: Results,
    ):
        """For every key tile, dS, dk and the other parts of dq for every visited query tile; then
        dk."""
        q_consumer, dout_consumer = consumers
        scores_thread = mma.scores.get_slice(thread)
        s_v, s_dout = smem.operands.v, smem.operands.dout
        f_v = mma.scores.make_fragment_A(scores_thread.partition_A(s_v))
        f_dout = mma.scores.make_fragment_B(scores_thread.partition_B(s_dout))
        f_q_t = mma.dk.make_fragment_B(mma.dk.get_slice(thread).partition_B(smem.q_t))
        parts = len(self.dq_parts)
        f_dq = [self.dq_operands(thread, mma, smem, part) for part in range(parts)]
        dp = make_accumulator(mma.scores, (self.tile_n, self.tile_m))
        ds_copy = store_matrix(self.dtype, mma.scores)
        s_ds = ds_copy.get_slice(thread).partition_D(smem.ds[None, None, 0])
        s_dpsum = column_statistic(smem.rows.dpsum, scores_thread, self.tile_n)
        s_p = smem.p[None, None, None, thread]
        k_stage, v_stage = Int32(0), Int32(0)
        tile_mn = (self.tile_m, self.tile_n)
        ticket, end = first_ticket(problem.order), last_ticket(problem.order)
        tile = key_tile(problem, tile_mn, ticket)
        while ticket < end:
            blocks = tile.blocks
            dk = make_accumulator(mma.dk, (self.tile_n, self.head_dim))
            dk.fill(0.0)
            if blocks.end > blocks.begin:
                v_tile = resident(f_v, v_stage)
                dq_tile = [(ds_t, resident(k_t, k_stage)) for ds_t, k_t in f_dq]
                dout_slot = dout_consumer.wait_and_advance()
                first_dout = stage(f_dout, dout_slot)
                issue_gemm(mma.scores, dp, v_tile, first_dout, zero=True)
                q_consumer.wait()  # k comes with it
                m = blocks.begin
                g_dq, wrap = self.dq_addresses(results.dq, problem, tile, thread)
                for count, last in self.visits(problem, tile):
                    for _ in cutlass.range(count, unroll=1):
                        dpsum = self.statistic(s_dpsum[None, None, dout_slot.index])
                        warpgroup.wait_group(0)
                        self.centre(self.as_quads(dp), dpsum)
                        dout_slot.release()
                        cute.arch.barrier(barrier_id=P_FULL, number_of_threads=BOTH)
                        self.times_p(self.as_quads(dp), s_p)
                        ds = to_16_bit(dp, self.dtype)
                        cute.copy(ds_copy, ds_copy.retile(ds), s_ds)
                        cute.arch.fence_view_async_shared()
                        meet(DS_FULL, self.ordered)
                        dq = self.issue_dq(mma, dq_tile[1], 1)
                        q_slot = q_consumer.wait_and_advance()
                        f_b = stage(f_q_t, q_slot)
                        issue_gemm(mma.dk, dk, as_a_operand(ds), f_b, zero=False)
                        warpgroup.wait_group(1)
                        for part in cutlass.range_constexpr(2, parts):
                            if const_expr(part == 2):
                                self.add_dq(dq, g_dq, part - 1)
                                dq = self.issue_dq(mma, dq_tile[part], part)
                                warpgroup.wait_group(1)  # dk
                                if const_expr(last):
                                    cute.arch.sync_warp()
                                else:
                                    q_slot.release()
                            else:
                                following = self.issue_dq(mma, dq_tile[part], part)
                                warpgroup.wait_group(1)
                                self.add_dq(dq, g_dq, part - 1)
                                dq = following
                        if const_expr(not last):
                            dout_slot = dout_consumer.wait_and_advance()
                            f_b = stage(f_dout, dout_slot)
                            issue_gemm(mma.scores, dp, v_tile, f_b, zero=True)
                        ahead = const_expr(int(not last))
                        if const_expr(parts > 2):
                            warpgroup.wait_group(ahead)
                        if const_expr(parts > 2 and last):
                            q_slot.release()  # and k
                        self.add_last_dq(dq, g_dq, parts - 1)
                        if const_expr(parts == 2):
                            warpgroup.wait_group(ahead)  # dk
                            q_slot.release()
                        m, g_dq = self.next_visit(tile, m, g_dq, wrap)
                dk.store(dk.load() * problem.scalars.softmax_scale)
                self.store_gradient(dk, results.dk, thread, tile)
                k_stage = next_stage(k_stage, smem.operands.k)
                v_stage = next_stage(v_stage, s_v)
            ticket = next_ticket(problem.order, ticket)
            tile = key_tile(problem, tile_mn, cutlass.min(ticket, end - 1))

    def visits(self, problem: Problem, tile: KeyTile) -> tuple[tuple[Int32, bool], ...]:
        """(query tiles, whether it is the last one): a loop each, as the last one issues nothing
        ahead, and a branch around that would make ptxas wait for what is in flight."""
        total = problem.group * (tile.blocks.end - tile.blocks.begin)
        return ((total - 1, False), (Int32(1), True))

    @cute.jit
    def next_visit(self, tile: KeyTile, m: Int32, g_dq: Int64, wrap: Int64) -> tuple[Int32, Int64]:
        """The query tile after m, and where its dq is: of the same head, or of the next's first."""
        last = m + 1 == tile.blocks.end
        g_dq = g_dq + 4 * self.tile_m * self.width
        return (tile.blocks.begin if last else m + 1, g_dq + wrap if last else g_dq)

    def dq_operands(
        self, thread: Int32, mma: Mma, smem: Smem, part: int
    ) -> tuple[cute.Tensor, cute.Tensor]:
        """dS^T and the columns of k (all stages) of this part of dq."""
        first, width = self.dq_parts[part]
        mine = mma.dq[part].get_slice(thread)
        k_t = cute.domain_offset((first, 0, 0), smem.k_t)
        k_t = cute.local_tile(k_t, (width, self.tile_n), (0, 0, None))
        return (
            mma.dq[part].make_fragment_A(mine.partition_A(smem.ds_t[None, None, 0])),
            mma.dq[part].make_fragment_B(mine.partition_B(k_t)),
        )

    def issue_dq(
        self, mma: Mma, operands: tuple[cute.Tensor, cute.Tensor], part: int
    ) -> cute.Tensor:
        """The accumulator of this part of dq, in flight."""
        dq = make_accumulator(mma.dq[part], (self.tile_m, self.dq_parts[part][1]))
        issue_gemm(mma.dq[part], dq, *operands, zero=True)
        return dq

    def dq_addresses(
        self, dq_accum: cute.Tensor, problem: Problem, tile: KeyTile, thread: Int32
    ) -> tuple[Int64, Int64]:
        """This thread's place in the accumulator of the first visited query tile, and what leads
        from behind the last tile of a head to the first of the next. One address that moves: its
        parts would take registers that d=256 hasn't."""
        blocks = tile.blocks
        g_dq = dq_accum[None, None, tile.kv_head * problem.group, tile.batch]
        tile_bytes = 4 * self.tile_m * self.width
        address = reduction_address(g_dq, thread) + Int64(blocks.begin) * tile_bytes
        visited = Int64(blocks.end - blocks.begin) * tile_bytes
        return address, 4 * dq_accum.stride[2] - visited

    def add_dq(self, dq: cute.Tensor, address: Int64, part: int):
        """Add this part of dq to the accumulator."""
        add_to_gmem(dq, address, self.dq_parts[part][0], self.width)

    @cute.jit
    def add_last_dq(self, dq: cute.Tensor, address: Int64, part: cutlass.Constexpr):
        """`add_dq` of the last part of a warpgroup."""
        self.add_dq(dq, address, part)
        if const_expr(self.is_deterministic):
            cute.arch.barrier_arrive(barrier_id=ADDED, number_of_threads=self.ordered)

    @cute.jit
    def order_additions(self, progress: cute.Tensor, problem: Problem):
        """Lets the warpgroups add to dq when it is this key tile's turn, and passes that on."""
        tile_mn = (self.tile_m, self.tile_n)
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        while ticket < last:
            tile = key_tile(problem, tile_mn, ticket)
            heads = problem.group if tile.blocks.end > tile.blocks.begin else 0
            later = later_tiles(problem, tile_mn, tile)
            for h in cutlass.range(heads, unroll=1):
                head = tile.kv_head * problem.group + h
                turn = turn_of(progress, tile, later, head)
                for m in cutlass.range(tile.blocks.begin, tile.blocks.end, unroll=1):
                    turn = wait_for_turn(turn, m)
                    cute.arch.barrier_arrive(barrier_id=DS_FULL, number_of_threads=self.ordered)
                    cute.arch.barrier(barrier_id=ADDED, number_of_threads=self.ordered)
                    pass_turn(turn, m + 1)
                pass_turn(wait_for_turn(turn, DONE - 1), DONE)
            ticket = next_ticket(problem.order, ticket)

    @cute.jit
    def statistic(self, smem: cute.Tensor) -> cute.Tensor:
        """A register copy of this thread's (2, column pairs) of a row statistic, so that its reads
        overlap the product that is in flight."""
        pairs = cute.size(smem, mode=[1])
        statistic = cute.make_rmem_tensor((2, pairs), Float32)
        for pair in cutlass.range_constexpr(pairs):
            cute.autovec_copy(smem[None, pair], statistic[None, pair])
        return statistic

    @cute.jit
    def store_quads(self, p: cute.Tensor, s_p: cute.Tensor):
        """Hand p to the thread of the other warpgroup that holds the same elements of dS."""
        for block in cutlass.range_constexpr(cute.size(p, mode=[2])):
            for pair in cutlass.range_constexpr(cute.size(p, mode=[1])):
                cute.autovec_copy(p[None, pair, block], s_p[None, pair, block])

    @cute.jit
    def centre(self, dp: cute.Tensor, dpsum: cute.Tensor):
        """dp <- dp - dpsum, as `as_quads`."""
        for block in cutlass.range_constexpr(cute.size(dp, mode=[2])):
            for pair in cutlass.range_constexpr(cute.size(dp, mode=[1])):
                for i in cutlass.range_constexpr(4):
                    dp[i, pair, block] = dp[i, pair, block] - dpsum[i % 2, pair]

    @cute.jit
    def times_p(self, dp: cute.Tensor, s_p: cute.Tensor):
        """dp <- p * dp, the gradient of the scaled scores, as `as_quads`."""
        for block in cutlass.range_constexpr(cute.size(dp, mode=[2])):
            for pair in cutlass.range_constexpr(cute.size(dp, mode=[1])):
                p = cute.make_rmem_tensor(4, Float32)
                cute.autovec_copy(s_p[None, pair, block], p)
                for i in cutlass.range_constexpr(4):
                    dp[i, pair, block] = p[i] * dp[i, pair, block]

    @cute.jit
    def store_gradient(
        self, gradient: cute.Tensor, array: cute.Tensor, thread: Int32, tile: KeyTile
    ):
        """A key tile's dk or dv."""
        row = tile.n_block * self.tile_n + thread // 32 * 16 + thread % 32 // LANES_PER_ROW
        array = array[None, None, tile.kv_head, tile.batch]
        accumulator_to_gmem(rows_and_columns(gradient), thread, array, row)
