# SPDX-License-Identifier: Apache-2.0
"""Attention backward for Blackwell (FlashAttention-4, section 4): TMA, tcgen05, tensor memory,
persistent.

One CTA per multiprocessor computes key tiles, each of one key/value head, in the order of
`kernels.common.scheduler`. For each it visits the query tiles that the mask leaves, for every query
head of the group, and accumulates dk and dv in tensor memory, so that grouped heads need neither
atomics nor another pass. Scores are computed transposed: keys are tensor memory's lanes, queries
its columns. p and dS are then, where the scores were, the operands of dv and dk; dS goes through
shared memory, too, for dq, the one product that reduces over keys. dq is added to its fp32
accumulator by the TMA unit (the only result whose summation order is not fixed, unless the row is
deterministic: `dq_order`).

    p    = exp2(scale_log2 k q^T - lse_log2)     dv += p dout
    dp   = v dout^T
    dS   = p (dp - dpsum)                        dk += dS q        dq_accum += dS^T k

    warps    role         registers
    0-3      reduce       144         dq: a query row each, and TMA's additions of 32 of them
    4-11     compute      152         p and dS: a key each, and half of the queries
    12       mma          64
    13       load         64
    14-15    idle         64

    load --[k, v, q, rows, dout, dpsum]--> mma (matrices), compute (rows: lse_log2 and intervals)
    mma --[scores]--> compute --[p_done]--> mma
    mma --[dp]--> compute --[ds_done]--> mma
    mma --[dq_done]--> reduce --[dq_read]--> mma     and compute: the dS in shared memory is read
    mma --[grads]--> compute                         dk and dv of a key tile

What has no barrier of its own is ordered by these. The MMAs execute in the order of issue, so
scores may be issued over the p that products before them read. A thread overwrites columns that it
alone has read: its queries are 32 of either half of the tile, and p and dS are written over those
of the first half. A new tile's dv is issued when p of its first visit is there, which the threads
compute after they have read dk and dv.

Tensor memory, in columns (`tensor_columns`), and the order of issue:

    d         scores      dp          dv          dk          dq
    64        0-127       128-255     256-319     320-383     384-447
    96        0-127       128-255     256-351     352-447     128-223     over dp
    128       0-127       128-255     256-383     384-511     128-255     over dp
    192/128   320-447     384-511     0-127       128-319     320-511     over all

    one visit ahead   scores(i), dk(i-1), dq(i-1), dp(i), dv(i)
    192/128           scores(i), dp(i), dv(i), dk(i), dq(i)
"""

from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Boolean, Float32, Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum
from cutlass.utils import blackwell_helpers as sm100

from fa4_jax._variants import Feature, Variant
from kernels.common import tmem
from kernels.common.dq_order import DONE, later_tiles, pass_turn, turn_of, wait_for_turn
from kernels.common.dtypes import element_type
from kernels.common.fast_math import not_ahead, thread_again
from kernels.common.key_lanes import (
    packed,
    score_gradients,
    statistic,
    store_row,
    swizzled_row,
)
from kernels.common.key_tile import (
    KeyTile,
    Operands,
    Problem,
    Scalars,
    Statistics,
    announce_next,
    key_tile,
    key_tiles,
    make_softcap,
    zero_gradients,
)
from kernels.common.key_tile_sm100 import (
    PIECE,
    at,
    fetch,
    fetch_rows,
    operand_tiles,
    queries_of,
    rows_of_head,
    weigh,
    write_gradient,
)
from kernels.common.mask import Band
from kernels.common.roles_sm100 import (
    WARPGROUP,
    WARPS,
    open_barriers,
    set_registers,
    signal,
)
from kernels.common.scheduler import (
    first_ticket,
    last_ticket,
    next_ticket,
    open_queue,
    queue_storage,
    reserve,
)
from kernels.common.tma import tma_atom, tma_tiles

COMPUTE, MMA, LOAD = 4, 12, 13  # first warps
COMPUTE_WARPS = MMA - COMPUTE
FOLLOWERS = LOAD  # warps that call `next_ticket`
REGISTERS = 144, 152, 64  # reduce, compute, others
TILE = 128  # queries, and keys; a thread has `PIECE` queries of either half
SLAB = 32  # rows of dq that a warp has, `PIECE` columns at a time
ORDER = 1  # named barrier of the warps that add dq; 0 is sync_threads


class Columns(NamedTuple):
    """Where in tensor memory accumulators begin."""

    scores: int
    dp: int
    dv: int
    dk: int
    dq: int


def tensor_columns(head_dim: int, head_dim_v: int) -> Columns:
    """See the table above: dq has columns of its own, or dp's, or those of scores and dp, which
    then share half of theirs."""
    dv, dk = 2 * TILE, 2 * TILE + head_dim_v
    if dk + 2 * head_dim <= tmem.COLUMNS:
        columns = Columns(0, TILE, dv, dk, dk + head_dim)
    elif dk + head_dim <= tmem.COLUMNS:
        columns = Columns(0, TILE, dv, dk, TILE)
    else:
        scores = head_dim_v + head_dim
        columns = Columns(scores, scores + TILE // 2, 0, head_dim_v, scores)
    assert max(columns.dp + TILE, columns.dk + head_dim, columns.dq + head_dim) <= tmem.COLUMNS
    return columns


class Stores(NamedTuple):
    """dk and dv (rows, dim, head, batch); the TMA atom and coordinate tensor of dq's
    accumulator."""

    dk: cute.Tensor
    dv: cute.Tensor
    dq: cute.CopyAtom
    g_dq: cute.Tensor
    progress: tuple[cute.Tensor, ...]  # the words of `dq_order`, if dq's additions have an order


class Layouts(NamedTuple):
    """Shared-memory layouts, stages last. `*_t` are the same bytes seen as the transposed operand;
    of p only the shape counts."""

    q: cute.ComposedLayout
    q_t: cute.ComposedLayout
    k: cute.ComposedLayout
    k_t: cute.ComposedLayout
    v: cute.ComposedLayout
    dout: cute.ComposedLayout
    dout_t: cute.ComposedLayout
    ds: cute.ComposedLayout
    dq: cute.ComposedLayout
    p: cute.ComposedLayout


class Smem(NamedTuple):
    """Shared-memory tiles, stages last."""

    operands: Operands
    q_t: cute.Tensor
    k_t: cute.Tensor
    dout_t: cute.Tensor
    ds: cute.Tensor
    dq: cute.Tensor  # (SLAB, PIECE, stage, warp)
    rows: Statistics  # of a query tile


class Mma(NamedTuple):
    """scores: k q^T and v dout^T; dk, dv: operand in tensor memory times q, dout; dq: dS^T k."""

    scores: cute.TiledMma
    dk: cute.TiledMma
    dv: cute.TiledMma
    dq: cute.TiledMma


class Barriers(NamedTuple):
    """mbarriers, an array of each: who arrives, and who waits. Where there is one of a kind, it has
    a phase a visit, `grads` one a key tile."""

    k_full: cute.Pointer  # [stage] TMA; mma
    k_empty: cute.Pointer  # [stage] mma; load
    v_full: cute.Pointer  # [stage] TMA; mma
    v_empty: cute.Pointer  # [stage] mma; load
    q_full: cute.Pointer  # [stage] TMA; mma
    q_empty: cute.Pointer  # [stage] mma; load
    dout_full: cute.Pointer  # [stage] TMA; mma
    dout_empty: cute.Pointer  # [stage] mma; load
    rows_full: cute.Pointer  # bulk copies; compute
    rows_empty: cute.Pointer  # compute, by warp; load
    dpsum_full: cute.Pointer  # bulk copy; compute
    dpsum_empty: cute.Pointer  # compute, by warp; load
    scores: cute.Pointer  # mma; compute
    p_done: cute.Pointer  # compute, by warp; mma
    dp: cute.Pointer  # mma; compute
    ds_done: cute.Pointer  # compute, by warp; mma
    dq_done: cute.Pointer  # mma; reduce and compute
    dq_read: cute.Pointer  # reduce, by warp; mma
    grads: cute.Pointer  # mma; compute


class BackwardSm100:
    """Host entry and kernel of one table row; `__call__` follows `Variant.signature`."""

    def __init__(self, variant: Variant):
        tiles = variant.tiles
        self.dtype = element_type(variant.dtype)
        self.head_dim, self.head_dim_v = variant.head_dim, variant.head_dim_v
        self.tile_mn = tiles.tile_m, tiles.tile_n
        self.has_intervals = Feature.interval in variant.features
        self.has_softcap = Feature.softcap in variant.features
        self.is_deterministic = Feature.deterministic in variant.features
        self.stages = Operands(tiles.stages, tiles.k_stages, tiles.v_stages, tiles.dout_stages)
        self.dq_stages = tiles.dq_stages
        # Of dq, in registers: tensor memory is free the sooner. With 128 and a softcap ptxas
        # spilled registers of another role, up to 144 bytes.
        self.columns_at_once = self.head_dim
        if self.head_dim > (96 if self.has_softcap else 128):
            self.columns_at_once = PIECE
        self.columns = tensor_columns(self.head_dim, self.head_dim_v)
        self.is_ahead = self.columns.dp - self.columns.scores == TILE
        # Before which product dq of the visit before has to be read.
        own = self.columns.dq not in (self.columns.scores, self.columns.dp)
        self.waits_for_dq = "dq" if own else "dp" if self.is_ahead else "scores"
        # How many of each, and how many arrive.
        q, k, v, dout = ((n, 1) for n in self.stages)
        one, compute = (1, 1), (1, COMPUTE_WARPS)
        self.barriers = Barriers(
            *(k, k, v, v, q, q, dout, dout),
            *(one, compute, one, compute, one, compute, one, compute),
            *(one, (1, COMPUTE), one),
        )
        assert self.tile_mn == (TILE, TILE), "tensor memory's lanes"
        assert all(stages in (1, 2) for stages in self.stages)
        assert not self.is_ahead or self.stages.q == 2, "scores(i) come before dk(i-1)"
        assert self.head_dim // PIECE % self.dq_stages == 0
        assert self.head_dim % PIECE == self.head_dim_v % PIECE == 0

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
        mma = self.mma()
        layouts = self.layouts(mma)
        load = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE)
        make_a, make_b = cute.nvgpu.make_tiled_tma_atom_A, cute.nvgpu.make_tiled_tma_atom_B
        loads = [
            make(
                *(load, array, cute.select(layout, mode=[0, 1, 2]), (TILE, TILE, dim)),
                *(mma.scores, (1, 1, 1, 1)),
            )
            for make, array, layout, dim in (
                (make_b, q, layouts.q, self.head_dim),
                (make_a, k, layouts.k, self.head_dim),
                (make_a, v, layouts.v, self.head_dim_v),
                (make_b, dout, layouts.dout, self.head_dim_v),
            )
        ]
        atoms, coordinates = (Operands(*part) for part in zip(*loads, strict=True))
        add = cpasync.CopyReduceBulkTensorTileS2GOp(cute.ReductionKind.ADD)
        stores = Stores(dk, dv, *tma_atom(add, dq, layouts.dq, (SLAB, PIECE)), tuple(own[1:]))
        ring, ring_barriers = queue_storage(self.has_intervals)
        bounds = TILE if self.has_intervals else 0

        def rows(dtype: type[cutlass.Numeric], number: int):
            return cute.struct.Align[cute.struct.MemRange[dtype, number], 128]

        def tiles(layout: cute.ComposedLayout, dtype: type[cutlass.Numeric] = self.dtype):
            return cute.struct.Align[cute.struct.MemRange[dtype, cute.cosize(layout)], 1024]

        @cute.struct
        class Storage:
            tile_ring: ring
            tile_barriers: ring_barriers
            barriers: cute.struct.MemRange[cutlass.Int64, sum(n for n, _ in self.barriers)]
            tmem_address: Int32
            lse_log2: rows(Float32, TILE)
            dpsum: rows(Float32, TILE)
            kv_start: rows(Int32, bounds)
            kv_end: rows(Int32, bounds)
            q: tiles(layouts.q)
            k: tiles(layouts.k)
            v: tiles(layouts.v)
            dout: tiles(layouts.dout)
            ds: tiles(layouts.ds)
            dq: tiles(layouts.dq, Float32)

        self.storage = Storage
        scalars = Scalars(
            softmax_scale,
            make_softcap(softcap, softmax_scale) if const_expr(self.has_softcap) else (),
            Band(band_lower, band_upper),
        )
        ranges = tuple(intervals[2:])
        problem = key_tiles(q, k, self.tile_mn, scalars, ranges, tuple(own), num_sms)
        statistics = Statistics(lse_log2, dpsum, tuple(intervals[:2]))
        self.kernel(atoms, coordinates, stores, mma, layouts, statistics, problem).launch(
            grid=(problem.order.ctas, 1, 1),
            block=(32 * WARPS, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )

    def mma(self) -> Mma:
        """The five products (`Mma`)."""
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN

        def make(a: OperandMajorMode, b: OperandMajorMode, columns: int, *source):
            group = tcgen05.CtaGroup.ONE
            types = (self.dtype, self.dtype, a, b, Float32, group, (TILE, columns))
            return sm100.make_trivial_tiled_mma(*types, *source)

        return Mma(
            scores=make(k_major, k_major, TILE),
            dk=make(k_major, mn_major, self.head_dim, tcgen05.OperandSource.TMEM),
            dv=make(k_major, mn_major, self.head_dim_v, tcgen05.OperandSource.TMEM),
            dq=make(mn_major, mn_major, self.head_dim),
        )

    def layouts(self, mma: Mma) -> Layouts:
        """Every operand is loaded once and read in both majors: layouts of the same bytes."""
        a, b = sm100.make_smem_layout_a, sm100.make_smem_layout_b
        d, dv, stages = self.head_dim, self.head_dim_v, self.stages
        slab = sm100.make_smem_layout_epi(
            Float32, LayoutEnum.ROW_MAJOR, (SLAB, PIECE), self.dq_stages * COMPUTE
        )
        return Layouts(
            q=b(mma.scores, (TILE, TILE, d), self.dtype, stages.q),
            q_t=b(mma.dk, (TILE, d, TILE), self.dtype, stages.q),
            k=a(mma.scores, (TILE, TILE, d), self.dtype, stages.k),
            k_t=b(mma.dq, (TILE, d, TILE), self.dtype, stages.k),
            v=a(mma.scores, (TILE, TILE, dv), self.dtype, stages.v),
            dout=b(mma.scores, (TILE, TILE, dv), self.dtype, stages.dout),
            dout_t=b(mma.dv, (TILE, dv, TILE), self.dtype, stages.dout),
            ds=a(mma.dq, (TILE, d, TILE), self.dtype, 1),
            dq=slab,
            p=a(mma.dv, (TILE, dv, TILE), self.dtype, 1),
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
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        storage = SmemAllocator().allocate(self.storage)
        smem = self.shared_memory(storage, layouts)
        barriers = open_barriers(storage.barriers, self.barriers, warp)
        if const_expr(self.has_intervals):
            places = (storage.tile_ring, storage.tile_barriers)
            problem = problem._replace(order=open_queue(problem.order, *places, FOLLOWERS))
        if warp == MMA:
            cute.arch.alloc_tmem(tmem.COLUMNS, storage.tmem_address.ptr)
            cute.arch.relinquish_tmem_alloc_permit()
        pipeline.pipeline_init_arrive()
        pipeline.pipeline_init_wait()
        base = cute.arch.retrieve_tmem_ptr(Float32, 16, storage.tmem_address.ptr)
        reduce, compute, others = REGISTERS

        if warp < COMPUTE:
            set_registers(reduce)
            self.reduce(thread, base.toint(), smem, barriers, stores, problem)
        elif warp < MMA:
            set_registers(compute)
            thread = thread - 32 * COMPUTE
            self.compute(thread, base.toint(), smem, barriers, stores, problem)
        else:
            set_registers(others)
            if warp == MMA:
                self.multiply(base, mma, layouts, smem, barriers, problem)
            if warp == LOAD:
                grads = (stores.dk, stores.dv)
                self.load(atoms, coordinates, mma, smem, barriers, statistics, problem, grads)
        cute.arch.sync_threads()
        if warp == MMA:
            cute.arch.dealloc_tmem(base, tmem.COLUMNS)

    def shared_memory(self, storage, layouts: Layouts) -> Smem:
        """The tiles and their transposed views."""

        def tile(field, layout: cute.ComposedLayout) -> cute.Tensor:
            return field.get_tensor(layout.outer, swizzle=layout.inner)

        def view(s: cute.Tensor, layout: cute.ComposedLayout) -> cute.Tensor:
            return cute.make_tensor(
                cute.recast_ptr(s.iterator, layout.inner, self.dtype), layout.outer
            )

        q, k, dout = (
            tile(field, layout)
            for field, layout in (
                (storage.q, layouts.q),
                (storage.k, layouts.k),
                (storage.dout, layouts.dout),
            )
        )
        rows = cute.make_layout(TILE)
        bounds = (storage.kv_start, storage.kv_end) if const_expr(self.has_intervals) else ()
        interval = tuple(bound.get_tensor(rows) for bound in bounds)
        return Smem(
            operands=Operands(q=q, k=k, v=tile(storage.v, layouts.v), dout=dout),
            q_t=view(q, layouts.q_t),
            k_t=view(k, layouts.k_t),
            dout_t=view(dout, layouts.dout_t),
            ds=tile(storage.ds, layouts.ds),
            dq=tile(storage.dq, layouts.dq),
            rows=Statistics(
                storage.lse_log2.get_tensor(rows), storage.dpsum.get_tensor(rows), interval
            ),
        )

    @cute.jit
    def visits(self, problem: Problem, tile: KeyTile) -> Int32:
        """Of a key tile, over all query heads."""
        return (tile.blocks.end - tile.blocks.begin) * problem.group

    # Load -----------------------------------------------------------------------------------------

    @cute.jit
    def load(  # noqa: PLR0913 - four operands, where they are and what guards them
        self,
        atoms: Operands,
        gmem: Operands,
        mma: Mma,
        smem: Smem,
        barriers: Barriers,
        statistics: Statistics,
        problem: Problem,
        gradients: tuple[cute.Tensor, cute.Tensor],
    ):
        """Of every key tile k and v, and of every visited query tile of every head q with lse_log2
        and intervals, and dout with dpsum: in the order in which their memory gets free. dk and dv
        of tiles that visit nothing are zero, and written here."""
        scores = mma.scores.get_slice(0)
        by_keys, by_queries = scores.partition_A, scores.partition_B
        rings = self.rings(barriers)
        s_rows, smem = smem.rows, smem.operands
        visited, tiles = Int32(0), Int32(0)
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        while ticket < last:
            reserved = reserve(problem.order)
            tile = key_tile(problem, self.tile_mn, ticket)
            blocks = tile.blocks
            k, v = (
                operand_tiles(atom, s, g[None, None, tile.kv_head, tile.batch], TILE, by_keys)
                for atom, s, g in ((atoms.k, smem.k, gmem.k), (atoms.v, smem.v, gmem.v))
            )
            k_slot, v_slot = (place_in_ring(tiles, n) for n in (self.stages.k, self.stages.v))
            for h in cutlass.range(problem.group, unroll=1):
                head = tile.kv_head * problem.group + h
                q, dout = (
                    operand_tiles(atom, s, g[None, None, head, tile.batch], TILE, by_queries)
                    for atom, s, g in (
                        (atoms.q, smem.q, gmem.q),
                        (atoms.dout, smem.dout, gmem.dout),
                    )
                )
                rows, dpsum = rows_of_head(statistics, s_rows, head, tile.batch)
                for m in cutlass.range(blocks.begin, blocks.end, unroll=1):
                    is_first = (h == 0) & (m == blocks.begin)
                    if is_first:
                        fetch(atoms.v, v, tile.n_block, rings.v, v_slot)
                        if const_expr(self.stages.k > 1):
                            fetch(atoms.k, k, tile.n_block, rings.k, k_slot)
                    fetch(atoms.q, q, m, rings.q, place_in_ring(visited, self.stages.q))
                    ring = (barriers.rows_full, barriers.rows_empty)
                    fetch_rows(rows, m, ring, visited & 1)
                    slot = place_in_ring(visited, self.stages.dout)
                    fetch(atoms.dout, dout, m, rings.dout, slot)
                    ring = (barriers.dpsum_full, barriers.dpsum_empty)
                    fetch_rows(dpsum, m, ring, visited & 1)
                    if const_expr(self.stages.k == 1):
                        if is_first:
                            fetch(atoms.k, k, tile.n_block, rings.k, k_slot)
                    visited += 1
            if blocks.end > blocks.begin:
                tiles += 1
            else:
                zero_gradients(gradients, problem, tile, TILE)
            ticket = announce_next(problem, self.tile_mn, ticket, reserved, gradients)

    def rings(self, barriers: Barriers) -> Operands:
        """(full, empty) of each operand."""
        return Operands(
            q=(barriers.q_full, barriers.q_empty),
            k=(barriers.k_full, barriers.k_empty),
            v=(barriers.v_full, barriers.v_empty),
            dout=(barriers.dout_full, barriers.dout_empty),
        )

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
        """Issue the products of every key tile."""
        operands = self.operands(mma, smem)
        accumulators = self.accumulators(base, mma, layouts)
        parts = (mma, operands, accumulators, barriers)
        ahead = 1 if const_expr(self.is_ahead) else 0
        visited, tiles = Int32(0), Int32(0)
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        while ticket < last:
            tile = key_tile(problem, self.tile_mn, ticket)
            visits = self.visits(problem, tile)
            if visits > 0:
                k_stage, k_phase = place_in_ring(tiles, self.stages.k)
                v_stage, v_phase = place_in_ring(tiles, self.stages.v)
                cute.arch.mbarrier_wait(barriers.k_full + k_stage, k_phase)
                for i in cutlass.range(visits + ahead, unroll=1):
                    if const_expr(self.is_ahead):
                        if i < visits:
                            self.issue_scores(parts, k_stage, visited)
                        if i > 0:
                            self.issue_dk_and_dq(parts, k_stage, visited - 1, i > 1)
                        if i < visits:
                            if i == 0:
                                cute.arch.mbarrier_wait(barriers.v_full + v_stage, v_phase)
                            self.issue_dp_and_dv(parts, v_stage, visited, i > 0)
                            visited += 1
                    else:
                        self.issue_scores(parts, k_stage, visited)
                        if i == 0:
                            cute.arch.mbarrier_wait(barriers.v_full + v_stage, v_phase)
                        self.issue_dp_and_dv(parts, v_stage, visited, i > 0)
                        self.issue_dk_and_dq(parts, k_stage, visited, i > 0)
                        visited += 1
                tmem.commit(barriers.v_empty + v_stage)
                tmem.commit(barriers.k_empty + k_stage)
                tmem.commit(barriers.grads)
                tiles += 1
            ticket = next_ticket(problem.order, ticket)

    @cute.jit
    def operands(self, mma: Mma, smem: Smem) -> tuple:
        """Those in shared memory, stages last: q, k, v, dout; q, k, dout transposed; dS."""
        q, k, v, dout = smem.operands
        return (
            mma.scores.make_fragment_B(q),
            mma.scores.make_fragment_A(k),
            mma.scores.make_fragment_A(v),
            mma.scores.make_fragment_B(dout),
            mma.dk.make_fragment_B(smem.q_t),
            mma.dq.make_fragment_B(smem.k_t),
            mma.dv.make_fragment_B(smem.dout_t),
            mma.dq.make_fragment_A(smem.ds),
        )

    @cute.jit
    def accumulators(self, base: cute.Pointer, mma: Mma, layouts: Layouts) -> tuple:
        """What tensor memory holds: scores, dp, dv, dk, dq, and the operands p and dS."""
        products = (mma.scores, mma.scores, mma.dv, mma.dk, mma.dq)
        dims = (TILE, TILE, self.head_dim_v, self.head_dim, self.head_dim)
        held = []
        for product, dim, column in zip(products, dims, self.columns, strict=True):
            layout = product.make_fragment_C(product.partition_shape_C((TILE, dim))).layout
            held.append(cute.make_tensor(base + column, layout))
        p = mma.dv.make_fragment_A(cute.make_tensor(held[0].iterator, layouts.p.outer)).layout
        # A step of 16 queries is 8 columns; a thread's own are at 32 * group + 16 * half.
        steps = cute.make_layout(
            (p.shape[0], p.shape[1], (2, 2, 2)), stride=(p.stride[0], p.stride[1], (16, 64, 32))
        )
        for column in (self.columns.scores, self.columns.dp):
            held.append(cute.make_tensor(cute.recast_ptr(base + column, dtype=self.dtype), steps))
        return tuple(held)

    @cute.jit
    def issue_scores(self, parts: tuple, k_stage: Int32, visit: Int32):
        """k q^T."""
        mma, (f_q, f_k, *_), (scores, *_), barriers = parts
        stage, phase = place_in_ring(visit, self.stages.q)
        cute.arch.mbarrier_wait(barriers.q_full + stage, phase)
        self.wait_for_dq("scores", barriers, visit)
        tmem.issue_gemm(mma.scores, scores, at(f_k, k_stage), at(f_q, stage), Boolean(False))
        tmem.commit(barriers.scores)

    @cute.jit
    def issue_dp_and_dv(self, parts: tuple, v_stage: Int32, visit: Int32, adds: Boolean):
        """v dout^T, and dv (+)= p dout."""
        mma, (_, _, f_v, f_dout, _, _, f_dout_t, _), held, barriers = parts
        _, dp, dv, _, _, p, _ = held
        stage, phase = place_in_ring(visit, self.stages.dout)
        cute.arch.mbarrier_wait(barriers.dout_full + stage, phase)
        self.wait_for_dq("dp", barriers, visit)
        if const_expr(not self.is_ahead):
            # dp comes over scores.
            cute.arch.mbarrier_wait(barriers.p_done, visit & 1)
            tmem.after_wait()
        tmem.issue_gemm(mma.scores, dp, at(f_v, v_stage), at(f_dout, stage), Boolean(False))
        tmem.commit(barriers.dp)
        if const_expr(self.is_ahead):
            cute.arch.mbarrier_wait(barriers.p_done, visit & 1)
            tmem.after_wait()
        tmem.issue_gemm(mma.dv, dv, p, at(f_dout_t, stage), adds)
        tmem.commit(barriers.dout_empty + stage)

    @cute.jit
    def issue_dk_and_dq(self, parts: tuple, k_stage: Int32, visit: Int32, adds: Boolean):
        """dk (+)= dS q, and dS^T k."""
        mma, (_, _, _, _, f_q_t, f_k_t, _, f_ds), held, barriers = parts
        _, _, _, dk, dq, _, ds = held
        stage, _ = place_in_ring(visit, self.stages.q)
        cute.arch.mbarrier_wait(barriers.ds_done, visit & 1)
        tmem.after_wait()
        tmem.issue_gemm(mma.dk, dk, ds, at(f_q_t, stage), adds)
        tmem.commit(barriers.q_empty + stage)
        self.wait_for_dq("dq", barriers, visit)
        tmem.issue_gemm(mma.dq, dq, f_ds[None, None, None, 0], at(f_k_t, k_stage), Boolean(False))
        tmem.commit(barriers.dq_done)

    @cute.jit
    def wait_for_dq(self, product: cutlass.Constexpr, barriers: Barriers, visit: Int32):
        """Wait until the dq of the visit before has been read, if `product` comes over it."""
        if const_expr(product == self.waits_for_dq):
            cute.arch.mbarrier_wait(barriers.dq_read, visit & 1 ^ 1)
            tmem.after_wait()

    # Compute --------------------------------------------------------------------------------------

    @cute.jit
    def compute(
        self,
        thread: Int32,
        base: Int32,
        smem: Smem,
        barriers: Barriers,
        stores: Stores,
        problem: Problem,
    ):
        """From scores to p and from dp to dS, for this thread's key and half of the queries; then
        dv, or dk, of this key."""
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        lane = thread % WARPGROUP
        own_base = tmem.lane_address(base, cute.arch.make_warp_uniform(thread // 32))
        visited, tiles = Int32(0), Int32(0)
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        while ticket < last:
            tile = key_tile(problem, self.tile_mn, ticket)
            blocks = tile.blocks
            key = tile.n_block * TILE + lane
            first_query, end_query = queries_of(problem, key)
            for _ in cutlass.range(problem.group, unroll=1):
                for m in cutlass.range(blocks.begin, blocks.end, unroll=1):
                    own = (own_base, group, visited)
                    seen = (first_query - m * TILE, end_query - m * TILE)
                    masked = blocks.needs_mask(m)
                    self.visit(own, (key, seen, masked), smem, barriers, problem)
                    visited += 1
            if blocks.end > blocks.begin:
                cute.arch.mbarrier_wait(barriers.grads, tiles & 1)
                tmem.after_wait()
                of_tile = (None, None, tile.kv_head, tile.batch)
                if group == 0:
                    acc, to = own_base + self.columns.dv, (stores.dv[of_tile], key)
                    columns = (0, self.head_dim_v)
                    write_gradient(acc, Float32(1.0), to, columns, problem.seqlen_k)
                else:
                    acc, to = own_base + self.columns.dk, (stores.dk[of_tile], key)
                    columns, scale = (0, self.head_dim), problem.scalars.softmax_scale
                    write_gradient(acc, scale, to, columns, problem.seqlen_k)
                tmem.before_signal()
                tiles += 1
            ticket = next_ticket(problem.order, ticket)

    @cute.jit
    def visit(
        self,
        own: tuple[Int32, Int32, Int32],
        mask: tuple[Int32, tuple[Int32, Int32], Boolean],
        smem: Smem,
        barriers: Barriers,
        problem: Problem,
    ):
        """p and dS of a query tile. `own` is where this thread's lane is, its half of the queries,
        and the number of the visit; `mask` its key, the queries of this tile, [first, end), that
        see it, and whether that matters."""
        base, group, visit = own
        rows = smem.rows
        phase = visit & 1
        cute.arch.mbarrier_wait(barriers.rows_full, phase)
        cute.arch.mbarrier_wait(barriers.scores, phase)
        tmem.after_wait()
        address = base + self.columns.scores + PIECE * group
        scores = tmem.load_columns(address, 2 * PIECE, TILE // 2)
        kept = []
        for half in cutlass.range_constexpr(2):
            piece = list(scores[half * PIECE : (half + 1) * PIECE])
            first = half * (TILE // 2) + PIECE * group
            p, factors = weigh(piece, first, *mask, rows, problem.scalars)
            kept += factors
            tmem.store_columns(address + half * (PIECE // 2), packed(p, self.dtype))
        tmem.stored()
        signal(barriers.p_done)
        signal(barriers.rows_empty)

        cute.arch.mbarrier_wait(barriers.dpsum_full, phase)
        cute.arch.mbarrier_wait(barriers.dp, phase)
        tmem.after_wait()
        cute.arch.mbarrier_wait(barriers.dq_done, phase ^ 1)
        address = base + self.columns.dp + PIECE * group
        # A register that isn't needed before.
        s_ds = swizzled_row(smem.ds.iterator.toint(), thread_again() % WARPGROUP)
        for half in cutlass.range_constexpr(2):
            first = half * (TILE // 2) + PIECE * group
            dp = list(tmem.load_columns(address + half * (TILE // 2), PIECE))
            dpsum = statistic(rows.dpsum, first, PIECE)
            p = kept[half * PIECE : (half + 1) * PIECE]
            words = packed(score_gradients(p, dp, dpsum), self.dtype)
            tmem.store_columns(address + half * (PIECE // 2), words)
            store_row(s_ds, words, half * TILE * 128, PIECE // 8 * group)
        cute.arch.fence_view_async_shared()
        tmem.stored()
        signal(barriers.ds_done)
        signal(barriers.dpsum_empty)

    # Reduce ---------------------------------------------------------------------------------------

    @cute.jit
    def reduce(  # noqa: C901 - an order of additions, where there is one
        self,
        thread: Int32,
        base: Int32,
        smem: Smem,
        barriers: Barriers,
        stores: Stores,
        problem: Problem,
    ):
        """Add dq to dq_accum: each warp's 32 rows by itself, `PIECE` columns at a time."""
        warp = cute.arch.make_warp_uniform(thread // 32)
        own_base = tmem.lane_address(base, warp) + self.columns.dq
        first_stage = warp * self.dq_stages
        s_row = swizzled_row(smem.dq.iterator.toint(), thread % 32) + first_stage * (128 * SLAB)
        visited = Int32(0)
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        while ticket < last:
            tile = key_tile(problem, self.tile_mn, ticket)
            blocks = tile.blocks
            heads = problem.group if blocks.end > blocks.begin else 0
            if const_expr(self.is_deterministic):
                later = later_tiles(problem, self.tile_mn, tile)
            for h in cutlass.range(heads, unroll=1):
                head = tile.kv_head * problem.group + h
                if const_expr(self.is_deterministic):
                    turn = turn_of(stores.progress[0], tile, later, head)
                g_dq = stores.g_dq[None, None, head, tile.batch]
                g_dq = cute.local_tile(g_dq, (SLAB, PIECE), (None, None))
                s_dq, g_dq = tma_tiles(stores.dq, smem.dq, g_dq)
                for m in cutlass.range(blocks.begin, blocks.end, unroll=1):
                    if const_expr(self.is_deterministic):
                        # The last additions have had time to end.
                        cute.arch.cp_async_bulk_wait_group(0)
                        cute.arch.barrier(barrier_id=ORDER, number_of_threads=WARPGROUP)
                        if warp == 0:
                            if m > blocks.begin:
                                pass_turn(turn, m)
                            turn = wait_for_turn(turn, m)
                        cute.arch.barrier(barrier_id=ORDER, number_of_threads=WARPGROUP)
                    cute.arch.mbarrier_wait(barriers.dq_done, visited & 1)
                    tmem.after_wait()
                    gmem = g_dq[None, m * (TILE // SLAB) + warp, None]
                    to = (s_row, s_dq, gmem, first_stage)
                    self.add(own_base, stores.dq, to, barriers)
                    visited += 1
                if const_expr(self.is_deterministic):
                    cute.arch.cp_async_bulk_wait_group(0)
                    cute.arch.barrier(barrier_id=ORDER, number_of_threads=WARPGROUP)
                    if warp == 0:
                        pass_turn(wait_for_turn(turn, DONE - 1), DONE)
            ticket = next_ticket(problem.order, ticket)
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def add(self, acc: Int32, atom: cute.CopyAtom, to: tuple, barriers: Barriers):
        """Add this warp's rows of a dq. `to`: this thread's row in shared memory, the warp's slabs
        there and their places in global memory, by columns, and its first stage."""
        s_row, smem, gmem, first_stage = to
        pieces = self.head_dim // PIECE
        columns = ()
        for piece in cutlass.range_constexpr(pieces):
            first = piece * PIECE
            if const_expr(first % self.columns_at_once == 0):
                columns = tmem.load_columns(acc + first, self.columns_at_once)
                if const_expr(first + self.columns_at_once == self.head_dim):
                    tmem.before_signal()
                    signal(barriers.dq_read)
            place = first % self.columns_at_once
            part = list(columns[place : place + PIECE])
            stage = piece % self.dq_stages
            # TMA has read what was in this stage.
            cute.arch.cp_async_bulk_wait_group(self.dq_stages - 1, read=True)
            cute.arch.sync_warp()
            store_row(not_ahead(s_row), part, stage * 128 * SLAB, Int32(0))
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
            # The copy elects its lane itself.
            cute.copy(atom, smem[None, first_stage + stage], gmem[None, piece])
            cute.arch.cp_async_bulk_commit_group()


def place_in_ring(count: Int32, stages: int) -> tuple[Int32, Int32]:
    """(index, phase) of a ring's number `count`; it has one or two stages."""
    if stages == 1:
        return Int32(0), count & 1
    return count & 1, count >> 1 & 1
