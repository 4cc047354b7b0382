# SPDX-License-Identifier: Apache-2.0
"""Attention forward for Blackwell (FlashAttention-4, section 3): TMA, tcgen05, tensor memory,
persistent.

One CTA per multiprocessor computes query tiles one after another, in the order of
`kernels.common.scheduler`. A tile is two parts of 128 rows in flight (one, where out needs more
than half of the tensor memory). While the tensor cores compute one part's products, the threads of
the other do its softmax, a row each, without shuffles. A part sits out the key tiles that none of
its rows sees. Scores, p and out stay in tensor memory; a thread there keeps the maximum that its
row had, until a new one is 2^8 times as much: few visits rescale out, and a warpgroup beside the
softmax does it. Part of the exponentials is computed by polynomials on the FMA pipes.

With `Tiles.ctas` = 2 a pair of CTAs shares each MMA of a part: 128 rows each, and each loads half
of k and v. The first issues for both: what the MMAs wait for arrives at its barriers alone.

    warps    role         registers (two parts / one)
    0-3      softmax      184 / 240
    4-7      softmax      184 / 24, idle: the second part
    8-11     correction   88 / 160
    12       mma          56
    13       epilogue     56
    14       load         56
    15       idle         56

    load --[q, kv]--> mma --[scores]--> softmax --[p_begun, p_done]--> mma --[acc]--> correction
                                        softmax --[factors]--> correction --[p_begun]--> mma
                                                         correction --[out]--> epilogue

p_begun says that three quarters of p are there, and that out is rescaled; p_done says that the rest
of p is. What has no barrier of its own is ordered by these. The MMAs of a CTA execute in the order
of issue. With two parts, scores of a visit say that the products before are done; with one, whose
scores are computed a visit ahead, `added` does. Scores may be issued over the p that products
before them read.

Tensor memory, in columns: two slots for scores (128), p over the first half of its scores, then
out, a head dim for each part. Two parts have a slot each; of one, the visits take turns.

Shared memory: q of each part, a ring of k and v, and out of each part, in q's place if
`Tiles.epilogue` says so.
"""

from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Boolean, Float32, Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import blackwell_helpers as sm100

from fa4_jax._variants import Epilogue, Feature, Variant
from kernels.common import tmem
from kernels.common.block_range import BlockRange
from kernels.common.dtypes import element_type
from kernels.common.fast_math import exp2_by_polynomial, not_ahead, round_pair, tanh
from kernels.common.mask import Band, mask_row
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
from kernels.common.roles_sm100 import (
    IDLE_REGISTERS,
    WARPGROUP,
    WARPS,
    mma_tiles,
    open_barriers,
    set_registers,
    signal,
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
from kernels.common.softmax import LOG2_E, normalise, raise_kept_maximum
from kernels.common.tma import tma_atom, tma_store_begin

CORRECTION, MMA, EPILOGUE, LOAD = 8, 12, 13, 14  # first warps
SLOTS = 2
QUARTERS = 4  # p becomes operand in pieces; the last one is waited for by itself
# Warps that call `next_ticket`: all that follow the one that loads.
FOLLOWERS = {2: 14, 1: 10}


class Smem(NamedTuple):
    """Shared-memory tiles, stages last; out by part; and what out's rows are to be multiplied by,
    in a visit by slot, and in the end by part."""

    q: cute.Tensor
    k: cute.Tensor
    v: cute.Tensor
    out: tuple[cute.Tensor, ...]
    factors: cute.Tensor
    last_factors: cute.Tensor


class Layouts(NamedTuple):
    """Shared-memory layouts, stages last; of p only the shape counts."""

    q: cute.ComposedLayout
    k: cute.ComposedLayout
    v: cute.ComposedLayout
    out: cute.ComposedLayout
    p: cute.ComposedLayout


class Mma(NamedTuple):
    """scores = q k^T (both in shared memory); out += p v (p in tensor memory)."""

    scores: cute.TiledMma
    out: cute.TiledMma


class Barriers(NamedTuple):
    """mbarriers, an array of each: who arrives, and who waits."""

    q_full: cute.Pointer  # [part] TMA; mma
    q_empty: cute.Pointer  # [part] mma, or the epilogue, where out takes q's place; load
    kv_full: cute.Pointer  # [stage] TMA; mma
    kv_empty: cute.Pointer  # [stage] mma; load
    scores: cute.Pointer  # [slot] mma; softmax
    p_begun: cute.Pointer  # [slot] softmax and correction, by warp; mma
    p_done: cute.Pointer  # [slot] softmax, by warp; mma
    factor: cute.Pointer  # [slot, warp] softmax; correction
    last_factor: cute.Pointer  # [part, warp] softmax; correction
    last_read: cute.Pointer  # [part, warp] correction; softmax
    added: cute.Pointer  # [part] mma, after each visit of a tile of one part; correction
    acc: cute.Pointer  # [part] mma; correction
    acc_seen: cute.Pointer  # [part] correction, by warp; mma, one tile later
    out_full: cute.Pointer  # [part] correction, by warp; epilogue
    out_empty: cute.Pointer  # [part] epilogue; correction


class ForwardSm100:
    """Host entry and kernel of one table row; `__call__` follows `Variant.signature`."""

    def __init__(self, variant: Variant):
        tiles = variant.tiles
        self.dtype = element_type(variant.dtype)
        self.head_dim, self.head_dim_v = variant.head_dim, variant.head_dim_v
        self.tile_m, self.tile_n, self.stages = tiles.tile_m, tiles.tile_n, tiles.stages
        self.tile_mn = self.tile_m, self.tile_n
        self.ctas = tiles.ctas
        self.part_m = self.ctas * tmem.LANES
        self.parts = self.tile_m // self.part_m
        self.exp2, self.epilogue = tiles.exp2, tiles.epilogue
        self.has_intervals = Feature.interval in variant.features
        self.has_softcap = Feature.softcap in variant.features
        self.acc_column = SLOTS * self.tile_n
        self.registers = {2: (184, 88, 56), 1: (240, 160, 56)}[self.parts]
        # How many of each, and how many arrive.
        self.barriers = Barriers(
            q_full=(self.parts, 1),
            q_empty=(self.parts, 1),
            kv_full=(self.stages, 1),
            kv_empty=(self.stages, 1),
            scores=(SLOTS, 1),
            p_begun=(SLOTS, 8 * self.ctas),
            p_done=(SLOTS, 4 * self.ctas),
            factor=(SLOTS * 4, 1),
            last_factor=(self.parts * 4, 1),
            last_read=(self.parts * 4, 1),
            added=(self.parts, 1),
            acc=(self.parts, 1),
            acc_seen=(self.parts, 4 * self.ctas),
            out_full=(self.parts, 4),
            out_empty=(self.parts, 1),
        )
        assert (self.ctas, self.parts) in ((1, 1), (1, 2), (2, 1))
        assert self.ctas == 1 or not self.has_intervals, "a CTA takes tiles from a queue by itself"
        assert self.tile_n == 128, "a slot of scores"
        assert self.acc_column + self.parts * self.head_dim_v <= tmem.COLUMNS
        assert self.head_dim_v % tmem.STEP == 0
        assert self.epilogue is not Epilogue.over_q or self.head_dim_v <= self.head_dim
        assert self.epilogue is not Epilogue.registers

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
        scores_tile = (self.part_m, self.tile_n, self.head_dim)
        out_tile = (self.part_m, self.head_dim_v, self.tile_n)
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        group = tcgen05.CtaGroup.TWO if self.ctas == 2 else tcgen05.CtaGroup.ONE
        mma = Mma(
            scores=sm100.make_trivial_tiled_mma(
                self.dtype, self.dtype, k_major, k_major, Float32, group, scores_tile[:2]
            ),
            out=sm100.make_trivial_tiled_mma(
                *(self.dtype, self.dtype, k_major, mn_major, Float32, group, out_tile[:2]),
                tcgen05.OperandSource.TMEM,
            ),
        )
        layouts = Layouts(
            q=sm100.make_smem_layout_a(mma.scores, scores_tile, self.dtype, self.parts),
            k=sm100.make_smem_layout_b(mma.scores, scores_tile, self.dtype, self.stages),
            v=sm100.make_smem_layout_b(mma.out, out_tile, self.dtype, self.stages),
            out=sm100.make_smem_layout_epi(
                self.dtype, LayoutEnum.ROW_MAJOR, (tmem.LANES, self.head_dim_v), self.parts
            ),
            p=sm100.make_smem_layout_a(mma.out, out_tile, self.dtype, 1),
        )
        cluster = cute.tiled_divide(cute.make_layout((self.ctas, 1, 1)), (mma.scores.thr_id.shape,))
        load, store = cpasync.CopyBulkTensorTileG2SOp(group), cpasync.CopyBulkTensorTileS2GOp()

        def stage(layout: cute.ComposedLayout) -> cute.ComposedLayout:
            return cute.select(layout, mode=[0, 1, 2])

        make_a, make_b = cute.nvgpu.make_tiled_tma_atom_A, cute.nvgpu.make_tiled_tma_atom_B
        shape = cluster.shape
        tma = Tma(
            *make_a(load, q, stage(layouts.q), scores_tile, mma.scores, shape),
            *make_b(load, k, stage(layouts.k), scores_tile, mma.scores, shape),
            *make_b(load, v, stage(layouts.v), out_tile, mma.out, shape),
            *tma_atom(store, out, layouts.out, (tmem.LANES, self.head_dim_v)),
        )
        ring, ring_barriers = queue_storage(self.has_intervals)

        def tiles(elements: int):
            return cute.struct.Align[cute.struct.MemRange[self.dtype, elements], 1024]

        @cute.struct
        class Storage:
            tile_ring: ring
            tile_barriers: ring_barriers
            barriers: cute.struct.MemRange[cutlass.Int64, sum(n for n, _ in self.barriers)]
            tmem_address: Int32
            factors: cute.struct.MemRange[Float32, SLOTS * tmem.LANES]
            last_factors: cute.struct.MemRange[Float32, self.parts * tmem.LANES]
            q: tiles(cute.cosize(layouts.q))
            kv: tiles(max(cute.cosize(layouts.k), cute.cosize(layouts.v)))
            out: tiles(cute.cosize(layouts.out) if self.epilogue is Epilogue.own else 0)

        self.storage = Storage
        problem = query_tiles(
            *(q, k, (self.tile_m, self.part_m), self.head_dim_v),
            (softmax_scale, softcap if const_expr(self.has_softcap) else None),
            Band(band_lower, band_upper),
            sinks,
            tuple(intervals),
            buffers[len(buffers) - self.has_intervals :],
            cutlass.max(num_sms // self.ctas, 1) if const_expr(self.ctas > 1) else num_sms,
        )
        self.kernel(tma, mma, layouts, lse, problem).launch(
            # A pair has one block_idx.x, the scheduler's.
            grid=(problem.order.ctas, self.ctas, 1),
            cluster=(1, self.ctas, 1) if self.ctas > 1 else None,
            block=(32 * WARPS, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(self, tma: Tma, mma: Mma, layouts: Layouts, g_lse: cute.Tensor, problem: Problem):
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        _, rank, _ = cute.arch.block_idx()
        is_pair = self.ctas == 2
        storage = SmemAllocator().allocate(self.storage)
        smem = self.smem_tiles(storage, layouts)
        barriers = open_barriers(storage.barriers, self.barriers, warp)
        if const_expr(self.has_intervals):
            places = (storage.tile_ring, storage.tile_barriers)
            order = open_queue(problem.order, *places, FOLLOWERS[self.parts])
            problem = problem._replace(order=order)
        if warp == MMA:
            cute.arch.alloc_tmem(tmem.COLUMNS, storage.tmem_address.ptr, is_pair)
            cute.arch.relinquish_tmem_alloc_permit(is_pair)
        pair = cute.make_layout((self.ctas, 1, 1))
        pipeline.pipeline_init_arrive(cluster_shape_mn=pair, is_relaxed=True)
        pipeline.pipeline_init_wait(cluster_shape_mn=pair)
        base = cute.arch.retrieve_tmem_ptr(Float32, 16, storage.tmem_address.ptr)
        softmax, correction, others = self.registers

        if warp < CORRECTION:
            part = warp // 4
            if part < self.parts:
                set_registers(softmax)
                thread = thread - part * WARPGROUP
                self.softmax(thread, part, base.toint(), rank, smem, barriers, g_lse, problem)
            else:
                set_registers(IDLE_REGISTERS)
        elif warp < MMA:
            set_registers(correction)
            self.correct(thread - 32 * CORRECTION, base.toint(), smem, barriers, problem)
        else:
            set_registers(others)
            if (warp == MMA) & (rank == 0):
                self.multiply(base, mma, layouts, smem, barriers, problem)
            if warp == EPILOGUE:
                self.store(tma, rank, smem, barriers, problem)
            if warp == LOAD:
                self.load(tma, mma, rank, smem, barriers, problem)
        meet_all(self.ctas)
        if warp == MMA:
            cute.arch.dealloc_tmem(base, tmem.COLUMNS, is_pair)

    @cute.jit
    def smem_tiles(self, storage, layouts: Layouts) -> Smem:
        """The tiles of the kernel's shared memory."""
        ring = storage.kv.data_ptr()
        stride = max(cute.cosize(t) for t in (layouts.k, layouts.v)) // self.stages

        def in_ring(layout: cute.ComposedLayout) -> cute.Tensor:
            outer = cute.select(layout.outer, mode=[0, 1, 2])
            outer = cute.append(outer, cute.make_layout(self.stages, stride=stride))
            return cute.make_tensor(cute.recast_ptr(ring, layout.inner, self.dtype), outer)

        own = const_expr(self.epilogue is Epilogue.own)
        first = storage.out.data_ptr() if own else storage.q.data_ptr()
        step = cute.cosize(layouts.out if own else layouts.q) // self.parts
        one = cute.select(layouts.out.outer, mode=[0, 1])
        out = tuple(
            cute.make_tensor(
                cute.recast_ptr(first + part * step, layouts.out.inner, self.dtype), one
            )
            for part in range(self.parts)
        )
        rows = (cute.make_layout((tmem.LANES, n)) for n in (SLOTS, self.parts))
        return Smem(
            q=storage.q.get_tensor(layouts.q.outer, swizzle=layouts.q.inner),
            k=in_ring(layouts.k),
            v=in_ring(layouts.v),
            out=out,
            factors=storage.factors.get_tensor(next(rows)),
            last_factors=storage.last_factors.get_tensor(next(rows)),
        )

    def slot(self, part: Int32, visits: Int32) -> tuple[Int32, Int32]:
        """(slot, phase) of a part's visit, counted over all of the CTA's tiles."""
        if self.parts == 2:
            return part, visits & 1
        return visits & 1, visits >> 1 & 1

    @cute.jit
    def own(self, problem: Problem, tile: QueryTile, part: Int32) -> BlockRange:
        """The key tiles that a part of a tile visits."""
        first = tile.first_row + part * self.part_m
        return own_visits(problem, (self.part_m, self.tile_n), tile, first)

    # Load -----------------------------------------------------------------------------------------

    @cute.jit
    def load(
        self,
        tma: Tma,
        mma: Mma,
        rank: Int32,
        smem: Smem,
        barriers: Barriers,
        problem: Problem,
    ):
        """Per tile: q, and k and v of every key tile that it visits, last to first, in the order in
        which they are used."""
        scores_cta, out_cta = mma.scores.get_slice(rank), mma.out.get_slice(rank)
        ring = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.stages)
        tile_phase = Int32(1)
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        while ticket < last:
            reserved = reserve(problem.order)
            tile = query_tile(problem, self.tile_mn, ticket)
            g_q = cute.local_tile(
                tma.g_q[None, None, tile.head, tile.batch],
                (self.part_m, self.head_dim),
                (None, 0),
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
            s_q, g_q = mma_tiles(tma.q, smem.q, scores_cta.partition_A(g_q))
            s_k, g_k = mma_tiles(tma.k, smem.k, scores_cta.partition_B(g_k))
            s_v, g_v = mma_tiles(tma.v, smem.v, out_cta.partition_B(g_v))
            for part in cutlass.range_constexpr(self.parts):
                cute.arch.mbarrier_wait(barriers.q_empty + part, tile_phase)
                place = tile.first_row // self.part_m + part
                full = barriers.q_full + part
                self.fetch(tma.q, g_q[None, place], s_q[None, part], full, rank)
            visits = tile.blocks.end - tile.blocks.begin
            # Two parts: k v k v ...; one: k k v k v ... v.
            ahead = 0 if const_expr(self.parts == 2) else 1
            for i in cutlass.range(visits + ahead if visits > 0 else 0, unroll=1):
                n = tile.blocks.end - 1 - i
                if i < visits:
                    cute.arch.mbarrier_wait(barriers.kv_empty + ring.index, ring.phase)
                    stage = s_k[None, ring.index]
                    self.fetch(tma.k, g_k[None, n], stage, barriers.kv_full + ring.index, rank)
                    ring.advance()
                if i >= ahead:
                    cute.arch.mbarrier_wait(barriers.kv_empty + ring.index, ring.phase)
                    stage, g_stage = s_v[None, ring.index], g_v[None, n + ahead]
                    self.fetch(tma.v, g_stage, stage, barriers.kv_full + ring.index, rank)
                    ring.advance()
            tile_phase ^= 1
            following = claim(problem.order, ticket, reserved)
            announce(problem.order, ticket, following)
            ticket = following

    @cute.jit
    def fetch(
        self,
        atom: cute.CopyAtom,
        gmem: cute.Tensor,
        smem: cute.Tensor,
        full: cute.Pointer,
        rank: Int32,
    ):
        """Load a tile, which arrives at `full`; of a pair both halves arrive at the first CTA's."""
        size = self.ctas * cute.size(smem) * self.dtype.width // 8
        if rank == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full, size)
        cute.copy(atom, gmem, smem, tma_bar_ptr=full)

    # MMA ------------------------------------------------------------------------------------------

    @cute.jit
    def multiply(
        self,
        base: cute.Pointer,
        mma: Mma,
        layouts: Layouts,
        smem: Smem,
        barriers: Barriers,
        problem: Problem,
    ):
        """Issue the products of every tile."""
        fragments = self.fragments(base, mma, layouts, smem)
        ring = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.stages)
        tile_phase = Int32(0)
        visited = [Int32(0)] * self.parts
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        while ticket < last:
            tile = query_tile(problem, self.tile_mn, ticket)
            for part in cutlass.range_constexpr(self.parts):
                cute.arch.mbarrier_wait(barriers.q_full + part, tile_phase)
            if const_expr(self.parts == 2):
                own = [self.own(problem, tile, Int32(part)) for part in range(self.parts)]
                ring, visited = self.multiply_two(
                    *(mma, fragments, barriers, tile.blocks, own, ring, visited)
                )
            else:
                ring, visited = self.multiply_one(
                    *(mma, fragments, barriers, tile.blocks, ring, visited)
                )
            for part in cutlass.range_constexpr(self.parts):
                if const_expr(self.epilogue is Epilogue.own):
                    self.commit(barriers.q_empty + part)
                # Where a part visits nothing, nothing else keeps this from running ahead.
                cute.arch.mbarrier_wait(barriers.acc_seen + part, tile_phase ^ 1)
                self.commit(barriers.acc + part)
            tile_phase ^= 1
            ticket = next_ticket(problem.order, ticket)

    def commit(self, barrier: cute.Pointer):
        """Arrive at a barrier, in both CTAs of a pair, when what was issued is done."""
        tmem.commit(barrier, self.ctas)

    @cute.jit
    def fragments(self, base: cute.Pointer, mma: Mma, layouts: Layouts, smem: Smem):
        """q, k, v as operands, stages last; scores and p by slot, out by part."""
        scores = mma.scores.make_fragment_C(
            mma.scores.partition_shape_C((self.part_m, self.tile_n))
        )
        acc = mma.out.make_fragment_C(mma.out.partition_shape_C((self.part_m, self.head_dim_v)))
        p = mma.out.make_fragment_A(cute.make_tensor(scores.iterator, layouts.p.outer))
        p = p[None, None, None, 0]
        slots = [base + slot * self.tile_n for slot in range(SLOTS)]
        accs = [base + self.acc_column + part * self.head_dim_v for part in range(self.parts)]
        return (
            mma.scores.make_fragment_A(smem.q),
            mma.scores.make_fragment_B(smem.k),
            mma.out.make_fragment_B(smem.v),
            [cute.make_tensor(place, scores.layout) for place in slots],
            [
                cute.make_tensor(cute.recast_ptr(place, dtype=self.dtype), p.layout)
                for place in slots
            ],
            [cute.make_tensor(place, acc.layout) for place in accs],
        )

    @cute.jit
    def multiply_two(
        self,
        mma: Mma,
        fragments: tuple,
        barriers: Barriers,
        blocks: BlockRange,
        own: list[BlockRange],
        ring,
        visited: list[Int32],
    ):
        """A tile of two parts: a part's p v, then its next scores, then the other part's."""
        f_q, f_k, f_v, scores, p, acc = fragments
        visits = blocks.end - blocks.begin
        if visits > 0:
            cute.arch.mbarrier_wait(barriers.kv_full + ring.index, ring.phase)
            k_stage = cute.arch.make_warp_uniform(ring.index)
            for part in cutlass.range_constexpr(self.parts):
                if (own[part].end == blocks.end) & (own[part].begin < own[part].end):
                    a, b = f_q[None, None, None, part], f_k[None, None, None, k_stage]
                    tmem.issue_gemm(mma.scores, scores[part], a, b, Boolean(False))
                    self.commit(barriers.scores + part)
            self.commit(barriers.kv_empty + ring.index)
            ring.advance()
        for i in cutlass.range(visits, unroll=1):
            n = blocks.end - 1 - i
            v_ring = ring.clone()
            cute.arch.mbarrier_wait(barriers.kv_full + ring.index, ring.phase)
            v_stage = cute.arch.make_warp_uniform(ring.index)
            ring.advance()
            if i < visits - 1:
                cute.arch.mbarrier_wait(barriers.kv_full + ring.index, ring.phase)
            k_stage = cute.arch.make_warp_uniform(ring.index)
            for part in cutlass.range_constexpr(self.parts):
                if (n >= own[part].begin) & (n < own[part].end):
                    phase = visited[part] & 1
                    b = f_v[None, None, None, v_stage]
                    adds = n < own[part].end - 1
                    self.add(mma, (acc[part], p[part], b), adds, part, phase, barriers)
                    visited[part] = visited[part] + 1
                if (n - 1 >= own[part].begin) & (n - 1 < own[part].end):
                    a, b = f_q[None, None, None, part], f_k[None, None, None, k_stage]
                    tmem.issue_gemm(mma.scores, scores[part], a, b, Boolean(False))
                    self.commit(barriers.scores + part)
            self.commit(barriers.kv_empty + v_ring.index)
            if i < visits - 1:
                self.commit(barriers.kv_empty + ring.index)
                ring.advance()
        return ring, visited

    @cute.jit
    def multiply_one(
        self,
        mma: Mma,
        fragments: tuple,
        barriers: Barriers,
        blocks: BlockRange,
        ring,
        visited: list[Int32],
    ):
        """A tile of one part: the next visit's scores, then this one's p v."""
        f_q, f_k, f_v, scores, p, acc = fragments
        visits = blocks.end - blocks.begin
        count = visited[0]
        for i in cutlass.range(visits + 1 if visits > 0 else 0, unroll=1):
            if i < visits:
                cute.arch.mbarrier_wait(barriers.kv_full + ring.index, ring.phase)
                k_stage = cute.arch.make_warp_uniform(ring.index)
                a, b = f_q[None, None, None, 0], f_k[None, None, None, k_stage]
                for slot in cutlass.range_constexpr(SLOTS):
                    if count + i & 1 == slot:
                        tmem.issue_gemm(mma.scores, scores[slot], a, b, Boolean(False))
                        self.commit(barriers.scores + slot)
                self.commit(barriers.kv_empty + ring.index)
                ring.advance()
            if i > 0:
                cute.arch.mbarrier_wait(barriers.kv_full + ring.index, ring.phase)
                b = f_v[None, None, None, cute.arch.make_warp_uniform(ring.index)]
                before = count + i - 1
                for slot in cutlass.range_constexpr(SLOTS):
                    if before & 1 == slot:
                        phase = before >> 1 & 1
                        self.add(mma, (acc[0], p[slot], b), i > 1, slot, phase, barriers)
                self.commit(barriers.added)
                self.commit(barriers.kv_empty + ring.index)
                ring.advance()
        visited[0] = count + visits
        return ring, visited

    @cute.jit
    def add(
        self,
        mma: Mma,
        operands: tuple,
        adds: Boolean,
        slot: cutlass.Constexpr,
        phase: Int32,
        barriers: Barriers,
    ):
        """out (+)= p v, as p comes."""
        acc, p, v = operands
        steps = cute.size(p.shape[2])
        begun = steps // QUARTERS * (QUARTERS - 1)
        cute.arch.mbarrier_wait(barriers.p_begun + slot, phase)
        tmem.after_wait()
        tmem.issue_gemm(mma.out, acc, p, v, adds, 0, begun)
        cute.arch.mbarrier_wait(barriers.p_done + slot, phase)
        tmem.after_wait()
        tmem.issue_gemm(mma.out, acc, p, v, adds, begun, steps)

    # Softmax --------------------------------------------------------------------------------------

    @cute.jit
    def softmax(
        self,
        thread: Int32,
        part: Int32,
        base: Int32,
        rank: Int32,
        smem: Smem,
        barriers: Barriers,
        g_lse: cute.Tensor,
        problem: Problem,
    ):
        """From scores to p, for this thread's row of a part of every tile; then its lse."""
        warp = cute.arch.make_warp_uniform(thread // 32)
        own_base = tmem.lane_address(base, warp)
        scale_log2 = problem.softmax_scale * LOG2_E
        visited, tile_phase = Int32(0), Int32(1)
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        while ticket < last:
            tile = query_tile(problem, self.tile_mn, ticket)
            blocks = self.own(problem, tile, part)
            row = tile.first_row + part * self.part_m + thread
            if const_expr(self.ctas == 2):
                row = row + rank * tmem.LANES
            first_key, end_key = self.seen(problem, tile, row)
            row_max, row_sum = -Float32.inf, Float32(0.0)
            for first, end, masked in reversed(blocks.segments(blocks.end)):
                for i in cutlass.range(end - first, unroll=1):
                    n = end - 1 - i
                    slot, phase = self.slot(part, visited)
                    address = own_base + slot * self.tile_n
                    cute.arch.mbarrier_wait(barriers.scores + slot, phase)
                    tmem.after_wait()
                    scores = list(tmem.load_columns(address, self.tile_n))
                    if const_expr(self.has_softcap):
                        scores = [tanh(score * problem.tanh_scale) for score in scores]
                    if const_expr(masked):
                        start = n * self.tile_n
                        scores = mask_row(scores, first_key - start, end_key - start)
                    row_max, factor = raise_kept_maximum(row_max, scores, scale_log2)
                    smem.factors[thread, slot] = factor
                    signal(barriers.factor + 4 * slot + warp)
                    base_max = Float32(0.0) if row_max == -Float32.inf else row_max
                    total = self.exponentials(
                        scores, scale_log2, base_max * -scale_log2, address, slot, barriers
                    )
                    row_sum = row_sum * factor + total
                    visited += 1
            factor, lse = normalise(
                row_sum, row_max * problem.softmax_scale, sink_of(problem, tile)
            )
            # Of a broken row; without intervals first_key may be negative.
            if const_expr(self.has_intervals):
                if first_key < 0:
                    factor = lse = Float32.nan
            cute.arch.mbarrier_wait(barriers.last_read + 4 * part + warp, tile_phase)
            smem.last_factors[thread, part] = factor
            signal(barriers.last_factor + 4 * part + warp)
            if (row >= 0) & (row < problem.seqlen_q):
                g_lse[tile.batch, tile.head, row] = lse
            tile_phase ^= 1
            ticket = next_ticket(problem.order, ticket)

    @cute.jit
    def seen(self, problem: Problem, tile: QueryTile, row: Int32) -> tuple[Int32, Int32]:
        """The keys [first, end) that a query sees."""
        if const_expr(self.has_intervals):
            place = cutlass.min(row, problem.seqlen_q - 1)
            first = problem.intervals.kv_start[tile.batch, place]
            end = problem.intervals.kv_end[tile.batch, place]
        else:
            first, end = problem.band.interval(0, row)
        return first, cutlass.min(end, problem.seqlen_k)

    @cute.jit
    def exponentials(
        self,
        scores: list[Float32],
        scale_log2: Float32,
        shift: Float32,
        address: Int32,
        slot: Int32,
        barriers: Barriers,
    ) -> Float32:
        """p = exp2(scale_log2 * scores + shift), to tensor memory by quarters; returns its sum."""
        quarter = self.tile_n // QUARTERS
        sums = [(Float32(0.0), Float32(0.0))] * 2
        for c in cutlass.range_constexpr(QUARTERS):
            words = []
            for i in cutlass.range_constexpr(quarter // 2):
                place = c * quarter + 2 * i
                pair = cute.arch.fma_packed_f32x2(
                    (scores[place], scores[place + 1]), (scale_log2,) * 2, (shift,) * 2
                )
                if const_expr(self.exp2.is_polynomial(place // 2, self.tile_n // 2)):
                    pair = exp2_by_polynomial(pair, self.exp2.degree)
                else:
                    pair = tuple(cute.math.exp2(x, fastmath=True) for x in pair)
                words.append(round_pair(*pair, self.dtype))
                sums[i % 2] = cute.arch.add_packed_f32x2(sums[i % 2], pair)
            tmem.store_columns(address + c * quarter // 2, words)
            if const_expr(c == QUARTERS - 2):
                tmem.stored()
                self.signal_mma(barriers.p_begun + slot)
        tmem.stored()
        self.signal_mma(barriers.p_done + slot)
        low, high = cute.arch.add_packed_f32x2(*sums)
        return low + high

    @cute.jit
    def signal_mma(self, barrier: cute.Pointer):
        """Arrive for this warp where the MMAs are issued: in a pair's first CTA."""
        if const_expr(self.ctas == 2):
            cute.arch.sync_warp()
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(barrier, 0)
        else:
            signal(barrier)

    # Correction -----------------------------------------------------------------------------------

    @cute.jit
    def correct(
        self,
        thread: Int32,
        base: Int32,
        smem: Smem,
        barriers: Barriers,
        problem: Problem,
    ):
        """Rescale out where a maximum was raised, and in the end normalise it."""
        warp = cute.arch.make_warp_uniform(thread // 32)
        acc = tmem.lane_address(base, warp) + self.acc_column
        visited, tile_phase = [Int32(0)] * self.parts, Int32(0)
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        while ticket < last:
            tile = query_tile(problem, self.tile_mn, ticket)
            own = [self.own(problem, tile, Int32(part)) for part in range(self.parts)]
            for i in cutlass.range(tile.blocks.end - tile.blocks.begin, unroll=1):
                n = tile.blocks.end - 1 - i
                for part in cutlass.range_constexpr(self.parts):
                    if (n >= own[part].begin) & (n < own[part].end):
                        slot, phase = self.slot(Int32(part), visited[part])
                        cute.arch.mbarrier_wait(barriers.factor + 4 * slot + warp, phase)
                        if n < own[part].end - 1:
                            if const_expr(self.parts == 1):
                                before = visited[part] - 1 & 1
                                cute.arch.mbarrier_wait(barriers.added + part, before)
                            factor = smem.factors[thread, slot]
                            tmem.after_wait()
                            self.rescale(acc + part * self.head_dim_v, factor)
                        self.signal_mma(barriers.p_begun + slot)
                        visited[part] = visited[part] + 1
            for part in cutlass.range_constexpr(self.parts):
                cute.arch.mbarrier_wait(barriers.last_factor + 4 * part + warp, tile_phase)
                factor = smem.last_factors[thread, part]
                signal(barriers.last_read + 4 * part + warp)
                cute.arch.mbarrier_wait(barriers.acc + part, tile_phase)
                self.signal_mma(barriers.acc_seen + part)
                tmem.after_wait()
                cute.arch.mbarrier_wait(barriers.out_empty + part, tile_phase ^ 1)
                is_empty = own[part].end <= own[part].begin
                # Its swizzled places, computed before the loop, would be 15 registers.
                row_of_out = smem.out[part][not_ahead(thread), None]
                self.write(acc + part * self.head_dim_v, factor, is_empty, row_of_out)
                cute.arch.fence_view_async_shared()
                tmem.before_signal()
                signal(barriers.out_full + part)
            tile_phase ^= 1
            ticket = next_ticket(problem.order, ticket)

    @cute.jit
    def rescale(self, acc: Int32, factor: Float32):
        """Multiply this thread's row of out, if a row of the warp has a factor."""
        if cute.arch.vote_any_sync(factor < 1.0):
            for first in cutlass.range_constexpr(0, self.head_dim_v, tmem.STEP):
                columns = tmem.load_columns(acc + first, tmem.STEP)
                scaled = []
                for i in cutlass.range_constexpr(0, tmem.STEP, 2):
                    pair = (columns[i], columns[i + 1])
                    scaled += cute.arch.mul_packed_f32x2(pair, (factor, factor))
                tmem.store_columns(acc + first, scaled)
            tmem.stored()

    @cute.jit
    def write(self, acc: Int32, factor: Float32, is_empty: Boolean, row: cute.Tensor):
        """This thread's row of out, times `factor`, to shared memory. Nothing has written the
        accumulator of a part that visits nothing."""
        words = cute.make_rmem_tensor(tmem.STEP // 2, Int32)
        rounded = cute.make_tensor(
            cute.recast_ptr(words.iterator, dtype=self.dtype), cute.make_layout(tmem.STEP)
        )
        zero = factor * Float32(0.0)  # or NaN
        for place in cutlass.range_constexpr(self.head_dim_v // tmem.STEP):
            if is_empty:
                words.fill(round_pair(zero, zero, self.dtype))
            else:
                columns = tmem.load_columns(acc + place * tmem.STEP, tmem.STEP)
                for i in cutlass.range_constexpr(0, tmem.STEP, 2):
                    pair = (columns[i], columns[i + 1])
                    pair = cute.arch.mul_packed_f32x2(pair, (factor, factor))
                    words[i // 2] = round_pair(*pair, self.dtype)
            cute.autovec_copy(rounded, cute.local_tile(row, (tmem.STEP,), (place,)))

    # Epilogue -------------------------------------------------------------------------------------

    @cute.jit
    def store(self, tma: Tma, rank: Int32, smem: Smem, barriers: Barriers, problem: Problem):
        """Store the parts' out, and give their memory free."""
        own = const_expr(self.epilogue is Epilogue.own)
        tile_phase = Int32(0)
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        while ticket < last:
            tile = query_tile(problem, self.tile_mn, ticket)
            g_out = tma.g_out[None, None, tile.head, tile.batch]
            for part in cutlass.range_constexpr(self.parts):
                cute.arch.mbarrier_wait(barriers.out_full + part, tile_phase)
                place = ((tile.first_row // self.part_m + part) * self.ctas + rank, 0)
                g_part = cute.local_tile(g_out, (tmem.LANES, self.head_dim_v), place)
                tma_store_begin(tma.out, smem.out[part], g_part)
            with cute.arch.elect_one():
                cute.arch.cp_async_bulk_wait_group(0, read=True)
                for part in cutlass.range_constexpr(self.parts):
                    cute.arch.mbarrier_arrive(barriers.out_empty + part)
                    if const_expr(not own):
                        cute.arch.mbarrier_arrive(barriers.q_empty + part)
            tile_phase ^= 1
            ticket = next_ticket(problem.order, ticket)


@cute.jit
def meet_all(ctas: cutlass.Constexpr):
    """Wait for all threads of the CTA, or of a pair's two."""
    if const_expr(ctas == 2):
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
    else:
        cute.arch.sync_threads()
