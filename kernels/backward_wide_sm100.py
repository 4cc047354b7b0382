# SPDX-License-Identifier: Apache-2.0
"""Attention backward for Blackwell, head dims whose dk and dv fill tensor memory.

Same algorithm and results as `backward_sm100`. At d=256 dv and dk are all 512 columns. So a CTA
goes through a key tile's visits twice, computing p again: first for dv, then, in the same columns,
for dk and dq. That makes six products of five. A tile has 64 queries: of 128, the operands of the
second pass are more than shared memory.

    first pass     p    = exp2(scale_log2 k q^T - lse_log2)     dv += p dout
    second pass    p, dp = v dout^T
                   dS   = p (dp - dpsum)       dk += dS q       dq_accum += dS^T k

    warps    role         registers
    0-3      reduce       152         dq: a dimension each, of the first 128 and of the last
    4-11     compute      128         p and dS: a key each, and half of the queries
    12       mma          104
    13       load         104
    14-15    idle         104

    load --[k, v, q, rows, dout, dpsum]--> mma (matrices), compute (rows: lse_log2 and intervals)
    mma --[scores]--> compute --[p_done]--> mma      p_done in the first pass
    mma --[dp]--> compute --[ds_done]--> mma
    mma --[dq_done]--> reduce --[dq_read]--> mma     and compute: the dS in shared memory is read
    mma --[grads]--> compute                         dv, then dk, of a key tile

dq is computed transposed, dimensions by queries: its MMAs are of 128 rows, and a tile has 64
queries. (At d=192 the last 128 dimensions overlap the first, and half of them are not added.) A
warp's lanes have 32 neighbouring dimensions of a query, and add them from registers, 128 bytes at a
time: shared memory, where the operands of MMAs of 64 columns are the bottleneck, has no part in it.

Order of issue: scores(i), dv(i-1); then dk(i-1), dp(i), the first half of dq(i-1), scores(i), its
second half. So q(i), whose only stage dk(i-1) frees, comes while the tensor cores have something to
do, and so do they while p(i) is computed.

Tensor memory, in columns:

    0-255      dv, then dk (0-191 at d=192)
    256-319    scores, p over them; in the first pass, those of every other visit
    320-383    those of the others; in the second pass dp, dS over it
    384-511    dq: the first 128 dimensions, the last

Shared memory: k; q and dout, two stages of each in the first pass; v in the second, in place of the
second stages; dS.
"""

from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Boolean, Float32, Int32, Int64, const_expr, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.memory import SmemAllocator
from cutlass.utils import blackwell_helpers as sm100

from fa4_jax._variants import Feature, Variant
from kernels.common import tmem
from kernels.common.dq_order import DONE, later_tiles, pass_turn, turn_of, wait_for_turn
from kernels.common.dtypes import element_type
from kernels.common.fast_math import thread_again
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

COMPUTE, MMA, LOAD = 4, 12, 13  # first warps
COMPUTE_WARPS = MMA - COMPUTE
FOLLOWERS = LOAD  # warps that call `next_ticket`
REGISTERS = 152, 128, 104  # reduce, compute, others
TILE_M, TILE_N = 64, 128  # queries, keys; a thread has `PIECE` queries
SLOTS = 2
SCORES, DQ = 256, 384  # first columns
HALF = 128  # dimensions of dq that one MMA computes
SLAB = 64  # dimensions in a row of shared memory
ORDER = 1  # named barrier of the warps that add dq; 0 is sync_threads


class Layouts(NamedTuple):
    """Shared-memory layouts, stages last. `*_t` are the same bytes seen as the transposed operand:
    `k_t` of half of the dimensions; of p only the shape counts."""

    q: cute.ComposedLayout
    q_t: cute.ComposedLayout
    k: cute.ComposedLayout
    k_t: cute.ComposedLayout
    v: cute.ComposedLayout
    dout_t: cute.ComposedLayout
    ds: cute.ComposedLayout
    p: cute.ComposedLayout


class Smem(NamedTuple):
    """Shared-memory tiles, stages last."""

    operands: Operands
    q_t: cute.Tensor
    k_t: tuple[cute.Tensor, cute.Tensor]  # of the first dimensions, and of the last
    dout_t: cute.Tensor
    ds: cute.Tensor
    rows: Statistics  # of a query tile


class Mma(NamedTuple):
    """scores: k q^T and v dout^T; grads: operand in tensor memory times q, dout; dq: k^T dS."""

    scores: cute.TiledMma
    grads: cute.TiledMma
    dq: cute.TiledMma


class Stores(NamedTuple):
    """dk and dv (rows, dim, head, batch); dq's accumulator (batch, head, rows, dim)."""

    dk: cute.Tensor
    dv: cute.Tensor
    dq: cute.Tensor
    progress: tuple[cute.Tensor, ...]  # the words of `dq_order`, if dq's additions have an order


class Barriers(NamedTuple):
    """mbarriers, an array of each: who arrives, and who waits."""

    k_full: cute.Pointer  # TMA; mma
    k_empty: cute.Pointer  # mma; load
    v_full: cute.Pointer  # TMA; mma
    v_empty: cute.Pointer  # mma; load
    q_full: cute.Pointer  # [slot] TMA; mma
    q_empty: cute.Pointer  # [slot] mma; load
    dout_full: cute.Pointer  # [slot] TMA; mma
    dout_empty: cute.Pointer  # [slot] mma; load
    rows_full: cute.Pointer  # bulk copies; compute
    rows_empty: cute.Pointer  # compute, by warp; load
    dpsum_full: cute.Pointer  # bulk copy; compute
    dpsum_empty: cute.Pointer  # compute, by warp; load
    scores: cute.Pointer  # [slot] mma; compute
    p_done: cute.Pointer  # [slot] compute, by warp; mma
    dp: cute.Pointer  # mma; compute
    ds_done: cute.Pointer  # compute, by warp; mma
    dq_done: cute.Pointer  # mma; reduce and compute
    dq_read: cute.Pointer  # reduce, by warp; mma
    grads: cute.Pointer  # mma; compute


class Counts(NamedTuple):
    """Of a CTA's key tiles so far, from which all phases follow: tiles that visit something, their
    visits, and the uses of either slot in the first pass. The second pass uses slot 0."""

    tiles: Int32
    visits: Int32
    firsts: Int32
    seconds: Int32

    def second_pass(self, i: Int32, visits: Int32) -> Int32:
        """The phase of visit i's q, dout and scores, in slot 0, of a tile of so many visits."""
        return self.visits + self.firsts + (visits + 1 >> 1) + i & 1

    def after(self, visits: Int32) -> "Counts":
        """With another tile of so many visits, or none."""
        return Counts(
            self.tiles + cutlass.min(visits, 1),
            self.visits + visits,
            self.firsts + (visits + 1 >> 1),
            self.seconds + (visits >> 1),
        )


@cute.jit
def first_pass(counts: Counts, i: Int32) -> tuple[Int32, Int32, Int32]:
    """Visit i of a tile: (slot, phase of its q, dout and scores, phase of its p)."""
    slot = i & 1
    uses = counts.visits + counts.firsts if slot == 0 else counts.seconds
    ps = counts.firsts if slot == 0 else counts.seconds
    return slot, uses + (i >> 1) & 1, ps + (i >> 1) & 1


def no_counts() -> Counts:
    """Before the first tile."""
    return Counts(*[Int32(0)] * 4)


class BackwardWideSm100:
    """Host entry and kernel of one table row; `__call__` follows `Variant.signature`."""

    def __init__(self, variant: Variant):
        self.dtype = element_type(variant.dtype)
        self.head_dim = variant.head_dim
        self.tile_mn = variant.tiles.tile_m, variant.tiles.tile_n
        self.has_intervals = Feature.interval in variant.features
        self.has_softcap = Feature.softcap in variant.features
        self.is_deterministic = Feature.deterministic in variant.features
        # How many of each, and how many arrive.
        one, two, compute = (1, 1), (SLOTS, 1), (1, COMPUTE_WARPS)
        self.barriers = Barriers(
            *(one, one, one, one, two, two, two, two),
            *(one, compute, one, compute, two, (SLOTS, COMPUTE_WARPS)),
            *(one, compute, one, (1, COMPUTE), one),
        )
        assert self.tile_mn == (TILE_M, TILE_N)
        assert self.head_dim == variant.head_dim_v and self.head_dim in (192, 256)

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
        mma = self.mma()
        layouts = self.layouts(mma)
        load = cpasync.CopyBulkTensorTileG2SOp(tcgen05.CtaGroup.ONE)
        make_a, make_b = cute.nvgpu.make_tiled_tma_atom_A, cute.nvgpu.make_tiled_tma_atom_B
        loads = [
            make(
                *(load, array, cute.select(layout, mode=[0, 1, 2])),
                *((TILE_N, TILE_M, self.head_dim), mma.scores, (1, 1, 1, 1)),
            )
            for make, array, layout in (
                (make_b, q, layouts.q),
                (make_a, k, layouts.k),
                (make_a, v, layouts.v),
                (make_b, dout, layouts.q),
            )
        ]
        atoms, coordinates = (Operands(*part) for part in zip(*loads, strict=True))
        ring, ring_barriers = queue_storage(self.has_intervals)
        bounds = TILE_M if self.has_intervals else 0

        def rows(dtype: type[cutlass.Numeric], number: int):
            return cute.struct.Align[cute.struct.MemRange[dtype, number], 128]

        def tiles(elements: int):
            return cute.struct.Align[cute.struct.MemRange[self.dtype, elements], 1024]

        @cute.struct
        class Storage:
            tile_ring: ring
            tile_barriers: ring_barriers
            barriers: cute.struct.MemRange[cutlass.Int64, sum(n for n, _ in self.barriers)]
            tmem_address: Int32
            lse_log2: rows(Float32, TILE_M)
            dpsum: rows(Float32, TILE_M)
            kv_start: rows(Int32, bounds)
            kv_end: rows(Int32, bounds)
            k: tiles(cute.cosize(layouts.k))
            queries: tiles(2 * SLOTS * TILE_M * self.head_dim)  # q, dout, q, dout
            ds: tiles(cute.cosize(layouts.ds))

        self.storage = Storage
        scalars = Scalars(
            softmax_scale,
            make_softcap(softcap, softmax_scale) if const_expr(self.has_softcap) else (),
            Band(band_lower, band_upper),
        )
        ranges = tuple(intervals[2:])
        problem = key_tiles(q, k, self.tile_mn, scalars, ranges, tuple(own), num_sms)
        statistics = Statistics(lse_log2, dpsum, tuple(intervals[:2]))
        stores = Stores(dk, dv, dq_accum, tuple(own[1:]))
        self.kernel(atoms, coordinates, stores, mma, layouts, statistics, problem).launch(
            grid=(problem.order.ctas, 1, 1),
            block=(32 * WARPS, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )

    def mma(self) -> Mma:
        """The products (`Mma`)."""
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN

        def make(a: OperandMajorMode, b: OperandMajorMode, columns: int, *source):
            group = tcgen05.CtaGroup.ONE
            types = (self.dtype, self.dtype, a, b, Float32, group, (tmem.LANES, columns))
            return sm100.make_trivial_tiled_mma(*types, *source)

        return Mma(
            scores=make(k_major, k_major, TILE_M),
            grads=make(k_major, mn_major, self.head_dim, tcgen05.OperandSource.TMEM),
            dq=make(mn_major, mn_major, TILE_M),
        )

    def layouts(self, mma: Mma) -> Layouts:
        """Every operand is loaded once and read in both majors: layouts of the same bytes."""
        a, b = sm100.make_smem_layout_a, sm100.make_smem_layout_b
        scores, grads = (TILE_N, TILE_M, self.head_dim), (TILE_N, self.head_dim, TILE_M)
        dq = (HALF, TILE_M, TILE_N)
        return Layouts(
            q=b(mma.scores, scores, self.dtype, 1),
            q_t=b(mma.grads, grads, self.dtype, 1),
            k=a(mma.scores, scores, self.dtype, 1),
            k_t=a(mma.dq, dq, self.dtype, 1),
            v=a(mma.scores, scores, self.dtype, 1),
            dout_t=b(mma.grads, grads, self.dtype, 1),
            ds=b(mma.dq, dq, self.dtype, 1),
            p=a(mma.grads, grads, self.dtype, 1),
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
            self.reduce(thread, base.toint(), barriers, stores, problem)
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
        elements = TILE_M * self.head_dim

        def view(place, layout: cute.ComposedLayout, stages: int = 1) -> cute.Tensor:
            outer = cute.select(layout.outer, mode=[0, 1, 2])
            outer = cute.append(outer, cute.make_layout(stages, stride=2 * elements))
            return cute.make_tensor(cute.recast_ptr(place, layout.inner, self.dtype), outer)

        queries, k = storage.queries.data_ptr(), storage.k.data_ptr()
        rows = cute.make_layout(TILE_M)
        bounds = (storage.kv_start, storage.kv_end) if const_expr(self.has_intervals) else ()
        interval = tuple(bound.get_tensor(rows) for bound in bounds)
        last = (self.head_dim - HALF) // SLAB * TILE_N * SLAB
        return Smem(
            operands=Operands(
                q=view(queries, layouts.q, SLOTS),
                k=view(k, layouts.k),
                v=view(queries + 2 * elements, layouts.v),
                dout=view(queries + elements, layouts.q, SLOTS),
            ),
            q_t=view(queries, layouts.q_t, SLOTS),
            k_t=(view(k, layouts.k_t), view(k + last, layouts.k_t)),
            dout_t=view(queries + elements, layouts.dout_t, SLOTS),
            ds=view(storage.ds.data_ptr(), layouts.ds),
            rows=Statistics(
                storage.lse_log2.get_tensor(rows), storage.dpsum.get_tensor(rows), interval
            ),
        )

    @cute.jit
    def visits(self, problem: Problem, tile: KeyTile) -> Int32:
        """Of a key tile, over all query heads, in one pass."""
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
        """Of every key tile k, and in the second pass v; in either pass of every visited query tile
        of every head q with lse_log2 and intervals, and dout, in the second with dpsum. dk and dv
        of tiles that visit nothing are zero, and written here."""
        scores = mma.scores.get_slice(0)
        counts = no_counts()
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        while ticket < last:
            reserved = reserve(problem.order)
            tile = key_tile(problem, self.tile_mn, ticket)
            visits = self.visits(problem, tile)
            if visits > 0:
                k, v = (
                    operand_tiles(
                        atom,
                        s,
                        g[None, None, tile.kv_head, tile.batch],
                        TILE_N,
                        scores.partition_A,
                    )
                    for atom, s, g in (
                        (atoms.k, smem.operands.k, gmem.k),
                        (atoms.v, smem.operands.v, gmem.v),
                    )
                )
                slot = (Int32(0), counts.tiles & 1)
                # The second stages of q and dout take v's place.
                cute.arch.mbarrier_wait(barriers.v_empty, slot[1] ^ 1)
                fetch(atoms.k, k, tile.n_block, (barriers.k_full, barriers.k_empty), slot)
                for second in cutlass.range_constexpr(2):
                    if const_expr(second):
                        slot_1 = counts.seconds + (visits >> 1) & 1
                        cute.arch.mbarrier_wait(barriers.q_empty + 1, slot_1 ^ 1)
                        cute.arch.mbarrier_wait(barriers.dout_empty + 1, slot_1 ^ 1)
                        # What waits for v's last use has waited for v_empty above.
                        full = barriers.v_full
                        with cute.arch.elect_one():
                            size = cute.size(smem.operands.v) * self.dtype.width // 8
                            cute.arch.mbarrier_arrive_and_expect_tx(full, size)
                        s_v, g_v = v
                        cute.copy(atoms.v, g_v[None, tile.n_block], s_v[None, 0], tma_bar_ptr=full)
                    of_tile = (scores.partition_B, counts, visits)
                    self.load_queries(
                        *(atoms, gmem, smem, barriers, statistics, problem),
                        *(tile, of_tile, bool(second)),
                    )
            else:
                zero_gradients(gradients, problem, tile, TILE_N)
            counts = counts.after(visits)
            ticket = announce_next(problem, self.tile_mn, ticket, reserved, gradients)

    @cute.jit
    def load_queries(  # noqa: PLR0913 - as `load`
        self,
        atoms: Operands,
        gmem: Operands,
        smem: Smem,
        barriers: Barriers,
        statistics: Statistics,
        problem: Problem,
        tile: KeyTile,
        of_tile: tuple,
        is_second: cutlass.Constexpr,
    ):
        """A pass's query tiles of every head."""
        partition, counts, visits = of_tile
        i = Int32(0)
        for h in cutlass.range(problem.group, unroll=1):
            head = tile.kv_head * problem.group + h
            q, dout = (
                operand_tiles(atom, s, g[None, None, head, tile.batch], TILE_M, partition)
                for atom, s, g in (
                    (atoms.q, smem.operands.q, gmem.q),
                    (atoms.dout, smem.operands.dout, gmem.dout),
                )
            )
            rows, dpsum = rows_of_head(statistics, smem.rows, head, tile.batch)
            for m in cutlass.range(tile.blocks.begin, tile.blocks.end, unroll=1):
                if const_expr(is_second):
                    slot = (Int32(0), counts.second_pass(i, visits))
                    row_phase = visits + i & 1
                else:
                    index, phase, _ = first_pass(counts, i)
                    slot, row_phase = (index, phase), i & 1
                fetch(atoms.q, q, m, (barriers.q_full, barriers.q_empty), slot)
                fetch_rows(rows, m, (barriers.rows_full, barriers.rows_empty), row_phase)
                fetch(atoms.dout, dout, m, (barriers.dout_full, barriers.dout_empty), slot)
                if const_expr(is_second):
                    phase = counts.visits + i & 1
                    fetch_rows(dpsum, m, (barriers.dpsum_full, barriers.dpsum_empty), phase)
                i += 1

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
        q, k, v, dout = smem.operands
        operands = (
            mma.scores.make_fragment_B(q),
            mma.scores.make_fragment_A(k),
            mma.scores.make_fragment_A(v),
            mma.scores.make_fragment_B(dout),
            mma.grads.make_fragment_B(smem.q_t),
            [mma.dq.make_fragment_A(half) for half in smem.k_t],
            mma.grads.make_fragment_B(smem.dout_t),
            mma.dq.make_fragment_B(smem.ds),
        )
        parts = (mma, operands, self.accumulators(base, mma, layouts), barriers)
        counts = no_counts()
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        while ticket < last:
            tile = key_tile(problem, self.tile_mn, ticket)
            visits = self.visits(problem, tile)
            if visits > 0:
                cute.arch.mbarrier_wait(barriers.k_full, counts.tiles & 1)
                self.first_pass(parts, counts, visits)
                tmem.commit(barriers.grads)
                cute.arch.mbarrier_wait(barriers.v_full, counts.tiles & 1)
                self.second_pass(parts, counts, visits)
                tmem.commit(barriers.v_empty)
                tmem.commit(barriers.k_empty)
                tmem.commit(barriers.grads)
            counts = counts.after(visits)
            ticket = next_ticket(problem.order, ticket)

    @cute.jit
    def accumulators(self, base: cute.Pointer, mma: Mma, layouts: Layouts) -> tuple:
        """What tensor memory holds: scores and p by slot, dv or dk, and the halves of dq. The
        second pass has dp and dS in slot 1."""
        scores, acc, dq = (
            product.make_fragment_C(product.partition_shape_C((tmem.LANES, columns))).layout
            for product, columns in (
                (mma.scores, TILE_M),
                (mma.grads, self.head_dim),
                (mma.dq, TILE_M),
            )
        )
        slots = [base + SCORES + slot * TILE_M for slot in range(SLOTS)]
        held = [cute.make_tensor(place, scores) for place in slots]
        p = mma.grads.make_fragment_A(cute.make_tensor(held[0].iterator, layouts.p.outer)).layout
        # A step of 16 queries is 8 columns; a thread's own are at 32 * group.
        steps = cute.make_layout(
            (p.shape[0], p.shape[1], (2, 2)), stride=(p.stride[0], p.stride[1], (16, 64))
        )
        return (
            held,
            [cute.make_tensor(cute.recast_ptr(place, dtype=self.dtype), steps) for place in slots],
            cute.make_tensor(base, acc),
            [cute.make_tensor(base + DQ + half * TILE_M, dq) for half in range(2)],
        )

    @cute.jit
    def first_pass(self, parts: tuple, counts: Counts, visits: Int32):
        """scores(i) in turn in either slot, dv(i-1)."""
        mma, operands, (scores, p, acc, _), barriers = parts
        f_q, f_k, _, _, _, _, f_dout_t, _ = operands
        for i in cutlass.range(visits + 1, unroll=1):
            if i < visits:
                slot, phase, _ = first_pass(counts, i)
                cute.arch.mbarrier_wait(barriers.q_full + slot, phase)
                a, b = f_k[None, None, None, 0], at(f_q, slot)
                for s in cutlass.range_constexpr(SLOTS):
                    if slot == s:
                        tmem.issue_gemm(mma.scores, scores[s], a, b, Boolean(False))
                tmem.commit(barriers.scores + slot)
                tmem.commit(barriers.q_empty + slot)
            if i > 0:
                slot, phase, p_phase = first_pass(counts, i - 1)
                cute.arch.mbarrier_wait(barriers.dout_full + slot, phase)
                cute.arch.mbarrier_wait(barriers.p_done + slot, p_phase)
                tmem.after_wait()
                b = at(f_dout_t, slot)
                for s in cutlass.range_constexpr(SLOTS):
                    if slot == s:
                        tmem.issue_gemm(mma.grads, acc, p[s], b, i > 1)
                tmem.commit(barriers.dout_empty + slot)

    @cute.jit
    def second_pass(self, parts: tuple, counts: Counts, visits: Int32):
        """dk(i-1), dp(i), half of dq(i-1), scores(i), the other half."""
        mma, operands, (scores, p, acc, dq), barriers = parts
        f_q, f_k, f_v, f_dout, f_q_t, f_k_t, _, f_ds = operands
        first = (None, None, None, 0)
        for i in cutlass.range(visits + 1, unroll=1):
            visit = counts.visits + i
            phase = counts.second_pass(i, visits)
            if i > 0:
                cute.arch.mbarrier_wait(barriers.ds_done, visit - 1 & 1)
                tmem.after_wait()
                tmem.issue_gemm(mma.grads, acc, p[1], f_q_t[first], i > 1)
                tmem.commit(barriers.q_empty)
            if i < visits:
                cute.arch.mbarrier_wait(barriers.dout_full, phase)
                a, b = f_v[first], f_dout[first]
                tmem.issue_gemm(mma.scores, scores[1], a, b, Boolean(False))
                tmem.commit(barriers.dp)
                tmem.commit(barriers.dout_empty)
            if i > 0:
                cute.arch.mbarrier_wait(barriers.dq_read, visit & 1)
                tmem.after_wait()
                tmem.issue_gemm(mma.dq, dq[0], f_k_t[0][first], f_ds[first], Boolean(False))
            if i < visits:
                cute.arch.mbarrier_wait(barriers.q_full, phase)
                a, b = f_k[first], f_q[first]
                tmem.issue_gemm(mma.scores, scores[0], a, b, Boolean(False))
                tmem.commit(barriers.scores)
            if i > 0:
                tmem.issue_gemm(mma.dq, dq[1], f_k_t[1][first], f_ds[first], Boolean(False))
                tmem.commit(barriers.dq_done)

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
        """For this thread's key and half of the queries p, then half of this key's dv; p again and
        dS, then half of dk."""
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        own_base = tmem.lane_address(base, cute.arch.make_warp_uniform(thread // 32))
        counts = no_counts()
        ticket, last = first_ticket(problem.order), last_ticket(problem.order)
        while ticket < last:
            tile = key_tile(problem, self.tile_mn, ticket)
            visits = self.visits(problem, tile)
            key = tile.n_block * TILE_N + thread % WARPGROUP
            first_query, end_query = queries_of(problem, key)
            for second in cutlass.range_constexpr(2):
                i = Int32(0)
                for _ in cutlass.range(problem.group, unroll=1):
                    for m in cutlass.range(tile.blocks.begin, tile.blocks.end, unroll=1):
                        seen = (first_query - m * TILE_M, end_query - m * TILE_M)
                        mask = (key, seen, tile.blocks.needs_mask(m))
                        if const_expr(second):
                            phases = (counts.second_pass(i, visits), visits + i & 1)
                            own = (own_base, group, *phases, counts.visits + i & 1)
                            self.second_visit(own, mask, smem, barriers, problem)
                        else:
                            own = (own_base, group, *first_pass(counts, i)[:2], i & 1)
                            self.first_visit(own, mask, smem, barriers, problem)
                        i += 1
                if visits > 0:
                    cute.arch.mbarrier_wait(barriers.grads, second)
                    tmem.after_wait()
                    array = stores.dk if const_expr(second) else stores.dv
                    scale = problem.scalars.softmax_scale if const_expr(second) else Float32(1.0)
                    to = (array[None, None, tile.kv_head, tile.batch], key)
                    columns = (group * (self.head_dim // 2), self.head_dim // 2)
                    write_gradient(own_base, scale, to, columns, problem.seqlen_k)
                    tmem.before_signal()
            counts = counts.after(visits)
            ticket = next_ticket(problem.order, ticket)

    @cute.jit
    def first_visit(
        self,
        own: tuple[Int32, Int32, Int32, Int32, Int32],
        mask: tuple[Int32, tuple[Int32, Int32], Boolean],
        smem: Smem,
        barriers: Barriers,
        problem: Problem,
    ):
        """p of a query tile. `own` is where this thread's lane is, its half of the queries, the
        slot and its phase, and the phase of the rows; `mask` as `weigh` takes it."""
        base, group, slot, phase, row_phase = own
        cute.arch.mbarrier_wait(barriers.rows_full, row_phase)
        cute.arch.mbarrier_wait(barriers.scores + slot, phase)
        tmem.after_wait()
        address = base + SCORES + slot * TILE_M + PIECE * group
        scores = list(tmem.load_columns(address, PIECE))
        p, _ = weigh(scores, PIECE * group, *mask, smem.rows, problem.scalars)
        tmem.store_columns(address, packed(p, self.dtype))
        tmem.stored()
        signal(barriers.p_done + slot)
        signal(barriers.rows_empty)

    @cute.jit
    def second_visit(
        self,
        own: tuple[Int32, Int32, Int32, Int32, Int32],
        mask: tuple[Int32, tuple[Int32, Int32], Boolean],
        smem: Smem,
        barriers: Barriers,
        problem: Problem,
    ):
        """dS of a query tile. `own` is where this thread's lane is, its half of the queries, and
        the phases of scores, of the rows, and of what only this pass has; `mask` as `weigh` takes
        it."""
        base, group, scores_phase, row_phase, phase = own
        cute.arch.mbarrier_wait(barriers.rows_full, row_phase)
        cute.arch.mbarrier_wait(barriers.scores, scores_phase)
        tmem.after_wait()
        address = base + SCORES + PIECE * group
        scores = list(tmem.load_columns(address, PIECE))
        _, factors = weigh(scores, PIECE * group, *mask, smem.rows, problem.scalars)
        signal(barriers.rows_empty)
        cute.arch.mbarrier_wait(barriers.dpsum_full, phase)
        cute.arch.mbarrier_wait(barriers.dp, phase)
        tmem.after_wait()
        address = address + TILE_M
        dp = list(tmem.load_columns(address, PIECE))
        dpsum = statistic(smem.rows.dpsum, PIECE * group, PIECE)
        words = packed(score_gradients(factors, dp, dpsum), self.dtype)
        tmem.store_columns(address, words)
        cute.arch.mbarrier_wait(barriers.dq_done, phase ^ 1)
        s_ds = swizzled_row(smem.ds.iterator.toint(), thread_again() % WARPGROUP)
        store_row(s_ds, words, 0, PIECE // 8 * group)
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
        barriers: Barriers,
        stores: Stores,
        problem: Problem,
    ):
        """Add dq to dq_accum."""
        warp = cute.arch.make_warp_uniform(thread // 32)
        own_base = tmem.lane_address(base, warp) + DQ
        visit = Int32(0)
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
                dq = stores.dq[tile.batch, head, None, None]
                for m in cutlass.range(blocks.begin, blocks.end, unroll=1):
                    cute.arch.mbarrier_wait(barriers.dq_done, visit & 1)
                    tmem.after_wait()
                    columns = tmem.load_columns(own_base, 2 * TILE_M)
                    tmem.before_signal()
                    signal(barriers.dq_read)
                    if const_expr(self.is_deterministic):
                        if warp == 0:
                            turn = wait_for_turn(turn, m)
                        cute.arch.barrier(barrier_id=ORDER, number_of_threads=WARPGROUP)
                    # The rows' stride is static, and a head may have more than 2^31 elements.
                    rows = cute.domain_offset((Int64(m) * TILE_M, thread), dq)
                    self.add(columns[:TILE_M], rows, 0)
                    # Of the last dimensions those that are not among the first.
                    if warp >= (2 * HALF - self.head_dim) // 32:
                        self.add(columns[TILE_M:], rows, self.head_dim - HALF)
                    if const_expr(self.is_deterministic):
                        cute.arch.barrier(barrier_id=ORDER, number_of_threads=WARPGROUP)
                        if warp == 0:
                            pass_turn(turn, m + 1)
                    visit += 1
                if const_expr(self.is_deterministic):
                    if warp == 0:
                        pass_turn(wait_for_turn(turn, DONE - 1), DONE)
            ticket = next_ticket(problem.order, ticket)

    def add(self, values: tuple[Float32, ...], rows: cute.Tensor, column: int):
        """Add a dimension of consecutive queries to `rows`, `column` further."""
        address = rows.iterator.toint()
        for i, value in enumerate(values):
            offset = 4 * (i * rows.stride[0] + column)
            cute.arch.inline_ptx(
                f"red.relaxed.gpu.global.add.f32 [{{$r0}} + {offset}], {{$r1}};",
                read_only_args=[address, value],
            )
