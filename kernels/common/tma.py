# SPDX-License-Identifier: Apache-2.0
"""Tiles between global and shared memory by TMA, on any architecture."""

from cutlass import cute
from cutlass.cute.nvgpu import cpasync


def tma_atom(op, array: cute.Tensor, layout: cute.ComposedLayout, tile: tuple[int, int]):
    """(atom, coordinate tensor of `array`) moving one stage of a shared-memory `layout`."""
    return cpasync.make_tiled_tma_atom(op, array, cute.select(layout, mode=[0, 1]), tile)


def tma_tiles(atom: cute.CopyAtom, smem: cute.Tensor, gmem: cute.Tensor):
    """(smem, gmem) as `atom` copies them: the tile's two modes become one, the others stay."""
    tile_first = (cute.group_modes(t, 0, 2) for t in (smem, gmem))
    return cpasync.tma_partition(atom, 0, cute.make_layout(1), *tile_first)


@cute.jit
def tma_store_begin(atom: cute.CopyAtom, smem: cute.Tensor, gmem: cute.Tensor):
    """Begin to store a tile; `tma_store_wait` comes before it is written again, and before the CTA
    ends. Called by one warp, after a proxy fence and a barrier. Rows past the array's end are
    clipped."""
    smem, gmem = tma_tiles(atom, smem, gmem)
    # Unlike a TMA load, the copy doesn't elect its lane: all 32 would store (seen in the PTX).
    with cute.arch.elect_one():
        cute.copy(atom, smem, gmem)
        cute.arch.cp_async_bulk_commit_group()


@cute.jit
def tma_store_wait():
    """Wait until this warp's stores have read shared memory. elect.sync elects the same lane every
    time, so it's the lane that began them."""
    with cute.arch.elect_one():
        cute.arch.cp_async_bulk_wait_group(0, read=True)
    cute.arch.sync_warp()
