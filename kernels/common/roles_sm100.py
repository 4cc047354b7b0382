# SPDX-License-Identifier: Apache-2.0
"""What the roles of Blackwell's kernels share: registers, barriers and the views of TMA copies."""

import cutlass
from cutlass import Int32, const_expr, cute
from cutlass.cute.nvgpu import cpasync

WARPGROUP = 128
WARPS = 16
LAUNCH_REGISTERS = 65536 // (32 * WARPS)
IDLE_REGISTERS = 24


@cute.jit
def set_registers(number: cutlass.Constexpr):
    """Per thread, from what a CTA of `WARPS` starts with."""
    if const_expr(number > LAUNCH_REGISTERS):
        cute.arch.setmaxregister_increase(number)
    else:
        cute.arch.setmaxregister_decrease(number)


@cute.jit
def open_barriers(storage, barriers: cutlass.Constexpr, warp: Int32):
    """Initialise mbarriers, before all threads meet: the arrays that `barriers` has (number,
    arrivals) of, as pointers in a tuple of its type."""
    place, pointers = storage.data_ptr(), []
    for count, arrivals in barriers:
        pointers.append(place)
        if warp == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(count):
                    cute.arch.mbarrier_init(place + i, arrivals)
        place = place + count
    return type(barriers)(*pointers)


@cute.jit
def signal(barrier: cute.Pointer):
    """Arrive for this warp."""
    cute.arch.sync_warp()
    with cute.arch.elect_one():
        cute.arch.mbarrier_arrive(barrier)


def mma_tiles(atom: cute.CopyAtom, smem: cute.Tensor, gmem: cute.Tensor):
    """(smem, gmem) as `atom` copies an MMA's operand: its three modes become one."""
    operand_first = (cute.group_modes(t, 0, 3) for t in (smem, gmem))
    return cpasync.tma_partition(atom, 0, cute.make_layout(1), *operand_first)
