# SPDX-License-Identifier: Apache-2.0
"""One order for the additions to dq (`Feature.deterministic`): from a head's last key tile to its
first.

Key tiles of a head run at the same time and visit its query tiles in ascending order. Each that
visits any has a word in global memory: before which query tile it, and every later one, has added
its part. A tile adds to query tile m when the word of the next such tile is past m, then moves its
own. Query tiles that no later key tile visits are free from the start.

Tiles are taken from the last to the first, so whoever is waited for has begun. Under a causal band
a key tile begins with query tiles of its own, but that doesn't keep it off the heels of the one
after it: see `key_tile.APART`.
"""

from typing import NamedTuple

import cutlass
from cutlass import Int32, cute

from fa4_jax._variants import MAX_DIMENSION
from kernels.common.key_tile import KeyTile, Problem, visits

DONE = MAX_DIMENSION  # past every query tile


class Turn(NamedTuple):
    """A key tile's place in the order of one head."""

    words: cute.Tensor  # of the head's key tiles
    n_block: Int32
    later: Int32  # the tile before it in the order
    reached: Int32  # how far that was when last seen


class LaterTiles(NamedTuple):
    """What comes before a key tile in the order of any head."""

    next: Int32  # the key tile that it waits for
    free: Int32  # before which query tile it waits for none


@cute.jit
def later_tiles(problem: Problem, tile_mn: tuple[int, int], tile: KeyTile) -> LaterTiles:
    """Of a key tile that visits some query tiles. Called by one warp: a lane looks at every 32nd
    key tile."""
    following, free = Int32(DONE), Int32(DONE)
    first = tile.n_block + 1 + cute.arch.lane_idx()
    for n_block in cutlass.range(first, problem.n_blocks, 32, unroll=1):
        blocks = visits(problem, tile_mn, n_block, tile.batch)
        if blocks.end > blocks.begin:
            following = cutlass.min(following, n_block)
            free = cutlass.min(free, blocks.begin)
    cute.arch.sync_warp()
    return LaterTiles(*(cute.arch.warp_redux_sync(x, "min") for x in (following, free)))


def turn_of(progress: cute.Tensor, tile: KeyTile, later: LaterTiles, head: Int32) -> Turn:
    """The turn of a key tile for one query head. `progress` is (batch, heads, key tiles or
    more)."""
    words = progress[tile.batch, head, None]
    return Turn(words=words, n_block=tile.n_block, later=later.next, reached=later.free)


@cute.jit
def wait_for_turn(turn: Turn, m: Int32) -> Turn:
    """Wait until later key tiles have left query tile m. Called by one warp."""
    reached = turn.reached
    word = (turn.words.iterator + turn.later).llvm_ptr
    while reached <= m:
        reached = cute.arch.load(word, Int32, sem="acquire", scope="gpu")
    return turn._replace(reached=reached)


@cute.jit
def pass_turn(turn: Turn, m: Int32):
    """This key tile has left query tiles before m, too. Called by one warp, when its additions, and
    those of others that it speaks for, can be seen."""
    cute.arch.sync_warp()
    with cute.arch.elect_one():
        word = (turn.words.iterator + turn.n_block).llvm_ptr
        cute.arch.store(word, m, sem="release", scope="gpu")
