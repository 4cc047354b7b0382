# SPDX-License-Identifier: Apache-2.0
"""Attention backward for Hopper: TMA, WGMMA, warp-specialised (FlashAttention-2, algorithm 2;
FlashAttention-3), persistent.

One CTA per multiprocessor computes key tiles, each of one key/value head, in the order of
`kernels.common.scheduler`. For each it visits the query tiles that the mask leaves, for every query
head of the group, and accumulates dk and dv in registers, so that grouped heads need neither
atomics nor another pass. Scores are computed transposed, keys by queries: the probabilities
and dS then leave the accumulators as the register operand of dv and dk. dS goes through shared
memory for dq, the one product that reduces over keys, and dq is added to its fp32 accumulator by
the TMA unit (the only result whose summation order is not fixed, unless the row is deterministic:
`dq_order`).

All rings run on from key tile to key tile, and dk and dv go from registers to global memory: while
they are written, the next tile's k, v, q and dout arrive.

    p    = exp2(scale_log2 k q^T - lse_log2)     dv += p dout
    dp   = v dout^T
    dS   = p (dp - dpsum)                        dk += dS q        dq_accum += dS^T k

    warps                   role      registers
    0                       load      24
    1-2                     store_dq  24        one per slab; `Feature.deterministic`: 1 alone
    3                       idle      24
    4-11                    compute   240       each warpgroup owns 64 of the 128 keys

    load --[q, lse_log2]--> compute   `stages` deep; with the queries' intervals, if they have any
    load --[dout, dpsum]--> compute   `stages` deep
    load --[k]--> compute             with a key tile's first q, `k_stages` deep
    load --[v]--> compute             with a key tile's first dout, `v_stages` deep
    compute --[dS]--> compute         q's stages: a warpgroup may write the next dS while the other
                                      still multiplies by this one
    compute --[dq]--> store_dq        one slab per warpgroup, named barriers; announced when the
                                      next visit's MMAs are in flight

The tensor cores take about eight MMAs ahead (240 cycles at 64 columns), then a warp that issues
more waits. So a warpgroup can't compute beside its own products, only beside the other's: the first
one issues its scores and dp, and its dq and dk, before the second may (`wait_for_first`). In step,
as they leave the barrier of dS, both would compute while the tensor cores idle: 4 % more cycles
(d=128), 3 % (d=64).

MMAs of 64 columns with both operands in shared memory take all of its bandwidth, and everything
else waits. So where registers are left, dp's MMAs take the first columns of v from them
(`Tiles.v_columns`): d=128, 48 columns, 3 %.
"""

import functools
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import hopper_helpers as sm90

from fa4_jax._variants import Feature, Variant
from kernels.common.copy_sm90 import (
    SlabPairs,
    accumulator_to_gmem,
    matrix_rows,
    slab_pairs,
    store_matrices,
    store_pairs,
)
from kernels.common.dq_order import DONE, later_tiles, pass_turn, turn_of, wait_for_turn
from kernels.common.dtypes import element_type
from kernels.common.key_tile import (
    Operands,
    Problem,
    Scalars,
    Statistics,
    cap,
    capped_gradients,
    column_statistic,
    key_tile,
    key_tiles,
    load_operands,
    make_softcap,
    mask_transposed,
    next_stage,
    probabilities,
    resident,
    score_gradient,
)
from kernels.common.mask import Band, accumulator_coordinates
from kernels.common.mma_sm90 import (
    as_a_operand,
    issue_gemm,
    issue_mixed_gemm,
    make_accumulator,
    read_columns,
    rows_and_columns,
    stage,
    to_16_bit,
)
from kernels.common.pipelines import WARPGROUP, load_tile_pipeline, register_split
from kernels.common.scheduler import (
    first_ticket,
    last_ticket,
    next_ticket,
    open_queue,
    queue_storage,
)
from kernels.common.tma import tma_atom, tma_tiles

# Named barriers; 0 is sync_threads. DQ_EMPTY + i and DQ_FULL + i belong to warpgroup i's dq slab.
COMPUTE, DQ_EMPTY, DQ_FULL = 1, 2, 4
SCORES_ISSUED, DQ_ISSUED = 6, 7  # by the first warpgroup
DQ_SLAB = 64  # rows and columns of the dq piece that one warpgroup computes


class Stores(NamedTuple):
    """dk and dv (rows, dim, head, batch); the TMA atom and coordinate tensor of dq's
    accumulator."""

    dk: cute.Tensor
    dv: cute.Tensor
    dq: cute.CopyAtom
    g_dq: cute.Tensor
    progress: tuple[cute.Tensor, ...]  # the words of `dq_order`, if dq's additions have an order


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
    dq: cute.ComposedLayout


class Smem(NamedTuple):
    """Shared-memory tiles, stages last."""

    operands: Operands
    q_t: cute.Tensor
    dout_t: cute.Tensor
    k_t: cute.Tensor
    ds: cute.Tensor
    ds_t: cute.Tensor
    dq: cute.Tensor
    dq_flat: cute.Tensor  # the same bytes, by offset
    rows: Statistics  # (tile_m, stages)


class Mma(NamedTuple):
    """scores: k q^T and v dout^T; dp: the latter, v in registers; dk, dv: register operand times q,
    dout; dq: dS^T k; dq_slab: its store."""

    scores: cute.TiledMma
    dp: cute.TiledMma
    dk: cute.TiledMma
    dv: cute.TiledMma
    dq: cute.TiledMma
    dq_slab: cute.TiledMma


class BackwardSm90:
    """Host entry and kernel of one table row; `__call__` follows `Variant.signature`."""

    def __init__(self, variant: Variant):
        self.dtype = element_type(variant.dtype)
        self.head_dim, self.head_dim_v = variant.head_dim, variant.head_dim_v
        self.tile_m, self.tile_n = variant.tiles.tile_m, variant.tiles.tile_n
        self.stages = variant.tiles.stages
        self.has_intervals = Feature.interval in variant.features
        self.has_softcap = Feature.softcap in variant.features
        self.is_deterministic = Feature.deterministic in variant.features
        self.warpgroups = variant.tiles.mma_warpgroups
        self.threads = (self.warpgroups + 1) * WARPGROUP
        self.registers = register_split(self.warpgroups)
        # Whose dq one warp stores. If it were both, a warpgroup would wait for the other one,
        # too (d=64: 3 % more cycles). Additions that have an order are announced together.
        everybody = tuple(range(self.warpgroups))
        self.stored_together = (everybody,) if self.is_deterministic else tuple(zip(everybody))
        # dq is tile_m x head_dim: warpgroups split its rows if there are enough, else its columns.
        self.dq_atoms = (self.tile_m // DQ_SLAB, self.head_dim // DQ_SLAB, 1)
        self.v_columns = variant.tiles.v_columns
        self.k_stages, self.v_stages = variant.tiles.k_stages, variant.tiles.v_stages
        assert self.warpgroups == 2, "the second one's products follow the first's"
        assert self.tile_n == 64 * self.warpgroups, "a warpgroup owns 64 keys"
        assert self.v_columns % 16 == 0, "an MMA multiplies 16"
        assert self.stages >= 2, "dS, too, is written before the last one has been read"
        assert self.dq_atoms[0] * self.dq_atoms[1] == self.warpgroups, (
            "a warpgroup computes one dq slab"
        )

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
        reduce = cpasync.CopyReduceBulkTensorTileS2GOp(cute.ReductionKind.ADD)
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
        stores = Stores(
            dk,
            dv,
            *tma_atom(reduce, dq, layouts.dq, (DQ_SLAB, DQ_SLAB)),
            tuple(own[1:]),
        )
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
            dq: cute.struct.Align[cute.struct.MemRange[Float32, cute.cosize(layouts.dq)], 1024]

        self.storage = Storage
        scalars = Scalars(
            softmax_scale,
            make_softcap(softcap, softmax_scale) if const_expr(self.has_softcap) else (),
            Band(band_lower, band_upper),
        )
        ranges = tuple(intervals[2:])
        tile_mn = (self.tile_m, self.tile_n)
        problem = key_tiles(q, k, tile_mn, scalars, ranges, tuple(own), num_sms)
        rows = Statistics(lse_log2, dpsum, tuple(intervals[:2]))
        self.kernel(atoms, coordinates, stores, self.mma(), layouts, rows, problem).launch(
            grid=(problem.order.ctas, 1, 1),
            block=(self.threads, 1, 1),
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
            ds=a(row_major, (n, d, m), self.dtype, self.stages),
            ds_t=a(col_major, (m, d, n), self.dtype, self.stages),
            dq=sm90.make_smem_layout_epi(Float32, row_major, (DQ_SLAB, DQ_SLAB), self.warpgroups),
        )

    def mma(self) -> Mma:
        """The five products (`Mma`), over all compute warpgroups."""
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        registers, by_keys = warpgroup.OperandSource.RMEM, (self.warpgroups, 1, 1)
        make = functools.partial(sm90.make_trivial_tiled_mma, self.dtype, self.dtype)
        return Mma(
            scores=make(k_major, k_major, Float32, by_keys, (64, self.tile_m)),
            dp=make(k_major, k_major, Float32, by_keys, (64, self.tile_m), registers),
            dk=make(k_major, mn_major, Float32, by_keys, (64, self.head_dim), registers),
            dv=make(k_major, mn_major, Float32, by_keys, (64, self.head_dim_v), registers),
            dq=make(mn_major, mn_major, Float32, self.dq_atoms, (64, DQ_SLAB)),
            dq_slab=make(mn_major, mn_major, Float32, (1, 1, 1), (64, DQ_SLAB)),
        )

    @cute.kernel
    def kernel(
        self,
        atoms: Operands,
        coordinates: Operands,
        stores: Stores,
        mma: Mma,
        layouts: Layouts,
        statistics: Statistics,
        problem: Problem,
    ):
        thread, _, _ = cute.arch.thread_idx()
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = SmemAllocator().allocate(self.storage)
        smem = self.shared_memory(storage, layouts)
        warps, row_bytes = 4 * self.warpgroups, 4 * self.tile_m
        pipes = tuple(
            load_tile_pipeline(barriers, layout, self.dtype, warps, extra)
            for barriers, layout, extra in (
                (storage.q_barriers, layouts.q, (3 if self.has_intervals else 1) * row_bytes),
                (storage.dout_barriers, layouts.dout, row_bytes),
            )
        )
        producers, consumers = zip(*pipes, strict=True)
        if const_expr(self.has_intervals):
            places = (storage.tile_ring, storage.tile_barriers)
            followers = warps + len(self.stored_together)
            problem = problem._replace(order=open_queue(problem.order, *places, followers))
        pipeline.pipeline_init_arrive()
        pipeline.pipeline_init_wait()

        if warp_idx < 4:
            cute.arch.setmaxregister_decrease(self.registers.load)
            if warp_idx == 0:
                rows, grads = (statistics, smem.rows), (stores.dk, stores.dv)
                load_operands(atoms, coordinates, smem.operands, producers, rows, problem, grads)
            for i, groups in enumerate(self.stored_together):
                if warp_idx == 1 + i:
                    for group in groups:
                        self.wait_for_dq(group)  # the first time there is nothing to store
                    self.store_dq(groups, stores, smem, problem)
        else:
            cute.arch.setmaxregister_increase(self.registers.consume)
            self.compute(thread - WARPGROUP, mma, smem, layouts, consumers, problem, stores)

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
            dq=tile(storage.dq, layouts.dq),
            dq_flat=storage.dq.get_tensor(cute.make_layout(cute.cosize(layouts.dq))),
            rows=Statistics(
                storage.lse_log2.get_tensor(rows), storage.dpsum.get_tensor(rows), interval
            ),
        )

    @cute.jit
    def compute(  # noqa: C901 - a main loop, in the order in which it runs
        self,
        thread: Int32,
        mma: Mma,
        smem: Smem,
        layouts: Layouts,
        consumers: tuple,
        problem: Problem,
        stores: Stores,
    ):
        """For every key tile, the five products of the visited query tiles for this warpgroup's 64
        keys, then dk and dv."""
        q_consumer, dout_consumer = consumers
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        # Descriptors are the warpgroup's: from its first thread, which is uniform.
        first_thread = group * WARPGROUP
        scores_thread = mma.scores.get_slice(first_thread)
        dq_thread = mma.dq.get_slice(first_thread)
        s_q, s_k, s_v, s_dout = smem.operands
        f_k = mma.scores.make_fragment_A(scores_thread.partition_A(s_k))
        f_v = mma.scores.make_fragment_A(scores_thread.partition_A(s_v))
        f_q = mma.scores.make_fragment_B(scores_thread.partition_B(s_q))
        f_dout = mma.scores.make_fragment_B(scores_thread.partition_B(s_dout))
        f_q_t = mma.dk.make_fragment_B(mma.dk.get_slice(first_thread).partition_B(smem.q_t))
        f_dout_t = mma.dv.make_fragment_B(mma.dv.get_slice(first_thread).partition_B(smem.dout_t))
        f_ds_t = mma.dq.make_fragment_A(dq_thread.partition_A(smem.ds_t))
        f_k_t = mma.dq.make_fragment_B(dq_thread.partition_B(smem.k_t))

        tile_nm = (self.tile_n, self.tile_m)
        coords = accumulator_coordinates(mma.scores, thread, tile_nm)
        s_ds = matrix_rows(smem.ds, layouts.ds, thread)
        s_dq = slab_pairs(
            smem.dq_flat, layouts.dq, mma.dq_slab, (thread % WARPGROUP, group), (DQ_SLAB, DQ_SLAB)
        )
        mine = mma.scores.get_slice(thread)
        s_lse, s_dpsum, *s_interval = (
            column_statistic(rows, mine, self.tile_n)
            for rows in (smem.rows.lse_log2, smem.rows.dpsum, *smem.rows.interval)
        )
        scale_log2 = problem.scalars.scale_log2()
        k_stage, v_stage = Int32(0), Int32(0)

        tile_mn = (self.tile_m, self.tile_n)
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        tile = key_tile(problem, tile_mn, ticket)
        while ticket < last:
            blocks = tile.blocks
            following, following_tile = ticket, tile
            if blocks.end > blocks.begin:
                dk = make_accumulator(mma.dk, (self.tile_n, self.head_dim))
                dv = make_accumulator(mma.dv, (self.tile_n, self.head_dim_v))
                dk.fill(0.0)
                dv.fill(0.0)
                k_tile, v_tile = resident(f_k, k_stage), resident(f_v, v_stage)
                k_t_tile = resident(f_k_t, k_stage)
                if const_expr(self.v_columns > 0):
                    dout_consumer.wait()  # v comes with it
                v_first = s_v[None, None, v_stage]
                v_first = read_columns(mma.dp, v_first, thread, self.v_columns)
                for _ in cutlass.range(problem.group, unroll=1):
                    for first, end, masked in blocks.segments(blocks.end):
                        for m in cutlass.range(first, end, unroll=1):
                            scores = make_accumulator(mma.scores, tile_nm)
                            dp = make_accumulator(mma.scores, tile_nm)
                            q_slot = q_consumer.wait_and_advance()
                            f_q_m = stage(f_q, q_slot)
                            self.wait_for_first(group, SCORES_ISSUED)
                            issue_gemm(mma.scores, scores, k_tile, f_q_m, zero=True)
                            dout_slot = dout_consumer.wait_and_advance()
                            f_dout_m = stage(f_dout, dout_slot)
                            issue_mixed_gemm((mma.scores, mma.dp), dp, (v_first, v_tile), f_dout_m)
                            self.let_second(group, SCORES_ISSUED)
                            # Of the visit before: its fence waits for stores that queue behind the
                            # MMAs' reads, so better here than before these MMAs.
                            self.announce_dq(group)
                            warpgroup.wait_group(1)
                            lse_log2 = s_lse[None, None, q_slot.index]
                            dpsum = s_dpsum[None, None, dout_slot.index]
                            interval = ()
                            if const_expr(masked):
                                interval = tuple(s[None, None, q_slot.index] for s in s_interval)
                            if const_expr(self.has_softcap):
                                cap(scores, problem.scalars)
                                warpgroup.wait_group(0)
                                p, ds = capped_gradients(
                                    (scores, dp),
                                    Statistics(lse_log2, dpsum, interval),
                                    (coords, tile.n_block * self.tile_n),
                                    scale_log2,
                                    (s_ds, q_slot.index),
                                    self.dtype,
                                )
                            else:
                                if const_expr(masked):
                                    start = (m * self.tile_m, tile.n_block * self.tile_n)
                                    rows = rows_and_columns(scores)
                                    mask_transposed(rows, coords, start, problem, interval)
                                probabilities(rows_and_columns(scores), lse_log2, scale_log2)
                                p = to_16_bit(scores, self.dtype)
                                warpgroup.wait_group(0)
                                rows = rows_and_columns(scores)
                                score_gradient(rows, rows_and_columns(dp), dpsum)
                                ds = to_16_bit(dp, self.dtype)
                            f_dout_m = stage(f_dout_t, dout_slot)
                            issue_gemm(mma.dv, dv, as_a_operand(p), f_dout_m, zero=False)
                            if const_expr(not self.has_softcap):
                                store_matrices(ds, s_ds, q_slot.index, 0, self.tile_m)
                            cute.arch.fence_view_async_shared()
                            cute.arch.barrier(
                                barrier_id=COMPUTE, number_of_threads=self.warpgroups * WARPGROUP
                            )
                            self.wait_for_first(group, DQ_ISSUED)
                            dq = make_accumulator(mma.dq, (self.tile_m, self.head_dim))
                            issue_gemm(mma.dq, dq, stage(f_ds_t, q_slot), k_t_tile, zero=True)
                            f_q_m = stage(f_q_t, q_slot)
                            issue_gemm(mma.dk, dk, as_a_operand(ds), f_q_m, zero=False)
                            self.let_second(group, DQ_ISSUED)
                            warpgroup.wait_group(2)
                            dout_slot.release()
                            warpgroup.wait_group(1)
                            self.write_dq(dq, s_dq, group)
                            warpgroup.wait_group(0)
                            q_slot.release()
                k_stage, v_stage = next_stage(k_stage, s_k), next_stage(v_stage, s_v)
                following = next_ticket(problem.order, ticket)
                # Decoded here, the next tile's loops don't wait for it.
                following_tile = key_tile(problem, tile_mn, cutlass.min(following, last - 1))
                dk.store(dk.load() * problem.scalars.softmax_scale)
                row = tile.n_block * self.tile_n + coords.row
                for gradient, array in ((dk, stores.dk), (dv, stores.dv)):
                    array = array[None, None, tile.kv_head, tile.batch]
                    accumulator_to_gmem(rows_and_columns(gradient), thread, array, row)
            else:
                following = next_ticket(problem.order, ticket)
                following_tile = key_tile(problem, tile_mn, cutlass.min(following, last - 1))
            ticket, tile = following, following_tile
        self.announce_dq(group)

    @cute.jit
    def wait_for_first(self, group: Int32, barrier_id: cutlass.Constexpr):
        """The second warpgroup waits until the first has issued what it also is about to issue."""
        if group == 1:
            cute.arch.barrier(barrier_id=barrier_id, number_of_threads=self.warpgroups * WARPGROUP)

    @cute.jit
    def let_second(self, group: Int32, barrier_id: cutlass.Constexpr):
        """The first warpgroup's side of `wait_for_first`. The barrier of dS keeps it from coming
        here twice before the second one has been there."""
        if group == 0:
            cute.arch.barrier_arrive(
                barrier_id=barrier_id, number_of_threads=self.warpgroups * WARPGROUP
            )

    @cute.jit
    def write_dq(self, dq: cute.Tensor, s_dq: SlabPairs, group: Int32):
        """This warpgroup's slab of dq, for the store warp; `announce_dq` comes later."""
        cute.arch.barrier(barrier_id=DQ_EMPTY + group, number_of_threads=WARPGROUP + 32)
        store_pairs(rows_and_columns(dq), s_dq)

    @cute.jit
    def announce_dq(self, group: Int32):
        """Tell the store warp that this warpgroup's slab is written; the first time, that nothing
        is."""
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(barrier_id=DQ_FULL + group, number_of_threads=WARPGROUP + 32)

    @cute.jit
    def wait_for_dq(self, group: cutlass.Constexpr):
        """Wait for a warpgroup's `announce_dq`."""
        cute.arch.barrier(barrier_id=DQ_FULL + group, number_of_threads=WARPGROUP + 32)

    @cute.jit
    def store_dq(self, groups: cutlass.Constexpr, stores: Stores, smem: Smem, problem: Problem):
        """Add these warpgroups' dq slabs to dq_accum. The reads of a slab must end before it is
        handed back."""
        tile_mn = (self.tile_m, self.tile_n)
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        while ticket < last:
            tile = key_tile(problem, tile_mn, ticket)
            blocks = tile.blocks
            heads = problem.group if blocks.end > blocks.begin else 0
            if const_expr(self.is_deterministic):
                later = later_tiles(problem, tile_mn, tile)
            for h in cutlass.range(heads, unroll=1):
                head = tile.kv_head * problem.group + h
                if const_expr(self.is_deterministic):
                    turn = turn_of(stores.progress[0], tile, later, head)
                g_dq = stores.g_dq[None, None, head, tile.batch]
                g_dq = cute.local_tile(g_dq, (DQ_SLAB, DQ_SLAB), (None, None))
                s_dq, g_dq = tma_tiles(stores.dq, smem.dq, g_dq)
                for m in cutlass.range(blocks.begin, blocks.end, unroll=1):
                    for group in groups:
                        cute.arch.barrier_arrive(
                            barrier_id=DQ_EMPTY + group, number_of_threads=WARPGROUP + 32
                        )
                    if const_expr(self.is_deterministic):
                        # Now the warpgroups compute, so the last additions have time to end.
                        if m > blocks.begin:
                            cute.arch.cp_async_bulk_wait_group(0)
                            pass_turn(turn, m)
                        turn = wait_for_turn(turn, m)
                    self.add_slabs(groups, stores.dq, (s_dq, g_dq), m)
                if const_expr(self.is_deterministic):
                    cute.arch.cp_async_bulk_wait_group(0)
                    pass_turn(wait_for_turn(turn, DONE - 1), DONE)
            ticket = next_ticket(problem.order, ticket)
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def add_slabs(self, groups: cutlass.Constexpr, atom: cute.CopyAtom, tiles: tuple, m: Int32):
        """Add these warpgroups' slabs of query tile m: (shared memory, global memory) of a head."""
        s_dq, g_dq = tiles
        for group in groups:
            row, column = group // self.dq_atoms[1], group % self.dq_atoms[1]
            self.wait_for_dq(group)
            # Unlike a TMA store, the reduction elects its lane itself (seen in the PTX).
            m_slab = m * self.dq_atoms[0] + row
            cute.copy(atom, s_dq[None, group], g_dq[None, m_slab, column])
            cute.arch.cp_async_bulk_commit_group()
        cute.arch.cp_async_bulk_wait_group(0, read=True)
