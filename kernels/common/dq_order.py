# SPDX-License-Identifier: Apache-2.0
"""One order for the additions to dq (`Feature.deterministic`): from a head's last key tile to its
first.

Key tiles of a head run at the same time and visit its query tiles in ascending order. Each that
visits any has a word in global memory: before which query tile it, and every later one, has added
its part. A tile adds to query tile m when the word of the next such tile is past m, then moves its
own.

Under a causal band the tiles of a head then never meet: a key tile begins with the query tile that
the one after it has left. Tiles are taken from the last to the first, so whoever is waited for has
begun.
"""

from typing import NamedTuple

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


@cute.jit
def turn_of(
    progress: cute.Tensor,
    problem: Problem,
    tile_mn: tuple[int, int],
    tile: KeyTile,
    head: Int32,
) -> Turn:
    """The turn of a key tile that visits some, for one query head. `progress` is (batch, heads, key
    tiles or more)."""
    later = tile.n_block
    searching = later + 1 < problem.n_blocks
    while searching:
        later += 1
        blocks = visits(problem, tile_mn, later, tile.batch)
        is_empty = blocks.end == blocks.begin
        if is_empty & (later + 1 == problem.n_blocks):
            later = tile.n_block
        searching = is_empty & (later != tile.n_block)
    return Turn(
        words=progress[tile.batch, head, None],
        n_block=tile.n_block,
        later=later,
        reached=Int32(DONE) if later == tile.n_block else Int32(0),
    )


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
