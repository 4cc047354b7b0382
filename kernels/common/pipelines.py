# SPDX-License-Identifier: Apache-2.0
"""What every warp-specialised Hopper kernel shares: the register split and TMA-fed mbarrier
rings."""

import dataclasses
from typing import NamedTuple

import cutlass
from cutlass import const_expr, cute, pipeline

WARPGROUP = 128


class RegisterSplit(NamedTuple):
    """Registers per thread after setmaxnreg. The CTA starts with 65,536 / threads for everybody."""

    load: int
    consume: int


def register_split(consumer_warpgroups: int) -> RegisterSplit:
    """The largest split that fits 65,536 registers with one loading warpgroup beside the
    consumers."""
    return {1: RegisterSplit(56, 256), 2: RegisterSplit(24, 240), 3: RegisterSplit(32, 160)}[
        consumer_warpgroups
    ]


class LoadTilePipeline(pipeline.PipelineTmaAsync):
    """The library's, whose `try_wait` of a consumer doesn't wait at all.

    `mbarrier.try_wait` suspends a warp for a while: at the end of a tile, where nothing may come
    for long, that cost a forward of 1,024 causal tokens 6 % (d=128).
    """

    def consumer_try_wait(self, state, **_):
        """Whether the consumer's next slot is full."""
        return self.sync_object_full.test_wait(state.index, state.phase)


def load_tile_pipeline(
    barriers,
    layout: cute.ComposedLayout,
    dtype: type[cutlass.Numeric],
    consumer_warps: int,
    extra_bytes: int = 0,
):
    """(producer, consumer) of a ring that TMA fills and `consumer_warps` warps drain.

    One stage receives a tile of `layout` (stages last) plus `extra_bytes` on the same barrier. The
    producer is one elected lane; a consumer warp releases with one lane, so the arrival count is
    warps.
    """
    one = pipeline.CooperativeGroup(pipeline.Agent.Thread)
    consumers = pipeline.CooperativeGroup(pipeline.Agent.Thread, consumer_warps)
    ring = pipeline.PipelineTmaAsync.create(
        num_stages=cute.size(layout, mode=[2]),
        producer_group=one,
        consumer_group=consumers,
        tx_count=cute.size_in_bytes(dtype, cute.select(layout, mode=[0, 1])) + extra_bytes,
        barrier_storage=barriers.data_ptr(),
        defer_sync=True,
    )
    parts = {field.name: getattr(ring, field.name) for field in dataclasses.fields(ring)}
    return LoadTilePipeline(**parts).make_participants()


@cute.jit
def expect_more(slot, size: cutlass.Constexpr):
    """`size` bytes more come on the barrier of an acquired slot. Before anything of the slot is
    copied, so that the phase can't end first."""
    with cute.arch.elect_one():
        cute.arch.mbarrier_expect_tx(slot.barrier, size)


@cute.jit
def wait_until_drained(producer, stages: cutlass.Constexpr):
    """Wait until all that a ring held before its newest slot has been released: consumers release
    in order, so it's the slot before."""
    before = producer.clone()
    if const_expr(stages > 2):
        before.advance(stages - 2)
    free = before.try_acquire()
    while not free:
        free = before.try_acquire()


@cute.jit
def meet(barrier_id: cutlass.Constexpr, threads: cutlass.Constexpr):
    """Wait at a named barrier that whole warps reach at different places in the code.

    `cute.arch.barrier` is the aligned form, whose warps compute-sanitizer's synccheck wants at one
    place (all of the block: PTX asks it of the threads of a warp).
    """
    cute.arch.inline_ptx(f"barrier.sync {barrier_id}, {threads};")
