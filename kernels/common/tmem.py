# SPDX-License-Identifier: Apache-2.0
"""Tensor memory of sm_100: tiles of 128 lanes, a query row each, between the MMAs that issue there
and the warpgroups whose thread t reaches lane t.

Addresses count 32-bit columns; a 16-bit operand has two elements in one.
"""

from collections.abc import Sequence

import cutlass
from cutlass import Boolean, Float32, Int32, cute
from cutlass.cute.nvgpu import tcgen05

LANES = 128
COLUMNS = 512
STEP = 32  # columns of one load


@cute.jit
def issue_gemm(  # noqa: PLR0913 - an MMA's operands, and which of its steps
    tiled_mma: cute.TiledMma,
    acc: cute.Tensor,
    a: cute.Tensor,
    b: cute.Tensor,
    accumulate: Boolean,
    first: cutlass.Constexpr = 0,
    end: cutlass.Constexpr = None,
):
    """Issue k steps [first, end) of acc (+)= a b from one warp; `commit` tells when they are done.

    The atom is local: setting ACCUMULATE on the caller's inside a loop would leak an SSA value out
    of it.
    """
    atom = cute.make_mma_atom(tiled_mma.op)
    steps = range(first, cute.size(a.shape[2]) if cutlass.const_expr(end is None) else end)
    for k in steps:
        atom.set(tcgen05.Field.ACCUMULATE, accumulate if k == 0 else True)
        cute.gemm(atom, acc, a[None, None, k], b[None, None, k], acc)


@cute.jit
def commit(barrier: cute.Pointer, ctas: cutlass.Constexpr = 1):
    """Arrive at `barrier`, of each CTA of a pair, when all MMAs that this warp has issued are
    done."""
    with cute.arch.elect_one():
        if cutlass.const_expr(ctas == 2):
            tcgen05.commit(barrier, 0b11, tcgen05.CtaGroup.TWO)
        else:
            tcgen05.commit(barrier)


def lane_address(base: Int32, warp: Int32) -> Int32:
    """Where the lanes that warp `warp` of a warpgroup reaches begin."""
    return base + (warp % 4) * (32 << 16)


def load_columns(address: Int32, count: int, apart: int = STEP) -> tuple[Float32, ...]:
    """`count` (a multiple of `STEP`) columns of this thread's lane: `STEP` consecutive ones at a
    time, so far apart.

    One block of instructions, with the wait: nothing else would keep the compiler from using a
    register before it holds the column.
    """
    loads = [
        f"tcgen05.ld.sync.aligned.32x32b.x{STEP}.b32 "
        f"{{ {', '.join(f'{{$w{first + i}}}' for i in range(STEP))} }}, [{{$r0}} + "
        f"{first // STEP * apart}];"
        for first in range(0, count, STEP)
    ]
    return cute.arch.inline_ptx(
        " ".join([*loads, "tcgen05.wait::ld.sync.aligned;"]),
        write_only_types=[Float32] * count,
        read_only_args=[address],
    )


def store_columns(address: Int32, values: Sequence[Int32 | Float32]):
    """Begin to write consecutive columns of this thread's lane, a power of two of them;
    `stored` waits."""
    names = ", ".join(f"{{$r{1 + i}}}" for i in range(len(values)))
    cute.arch.inline_ptx(
        f"tcgen05.st.sync.aligned.32x32b.x{len(values)}.b32 [{{$r0}}], {{ {names} }};",
        read_only_args=[address, *values],
    )


def stored():
    """Wait until this warp's `store_columns` are done, and before what it signals next."""
    cute.arch.fence_view_async_tmem_store()
    before_signal()


def before_signal():
    """What this thread has done in tensor memory comes before what it signals next."""
    cute.arch.inline_ptx("tcgen05.fence::before_thread_sync;")


def after_wait():
    """What this thread does in tensor memory comes after what it has waited for."""
    cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")
