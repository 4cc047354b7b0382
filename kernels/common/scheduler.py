# SPDX-License-Identifier: Apache-2.0
"""Which tiles of a persistent kernel a CTA computes, and in which order.

A tile is a block of one head. What is wanted: equal sums for all CTAs, the longest tiles early, and
CTAs that run at the same time reading the same few heads, so that these stay in the L2.

Every role of a CTA goes through the same tickets, one per tile:

    ticket, last = first_ticket(order), last_ticket(order)
    while ticket < last:
        block, head = place_of(order, ticket)
        ...
        ticket = next_ticket(order, ticket)

`TileOrder` is fixed before the launch, without atomics, for blocks of which the later ones are
longer (a causal band) or all are alike. Its tickets are rounds. Where all are alike, head after
head, round after round, is all of it. Else:

    pairs     Two heads at a time: block M-1-j of the first, then block j of the second. Every pair
              costs the same and a round of them covers few heads. A CTA takes one pair every two
              rounds.
    singles   The heads that are left, two to four rounds of tiles, from the longest tile to the
              shortest, in a snake: even rounds give place c to CTA c, odd ones place G-1-c. Where
              the pairs of the heads before don't fill a round, it ends with pairs of these tiles:
              the i-th longest, then the i-th shortest.

The longest CTA, in units of the mean, causal, 132 CTAs, batch x length 16,384, heads x dim 2,048
(computed, a tile's overhead counted as one key tile): 1.01 for head dim 128 at lengths 1,024 to
16,384, at most 1.05 for 64 and 256. Taking heads one after another in a snake gives 1.03 to 1.8,
because blocks per head and CTAs have common factors; a snake over all heads gives 1.03 at most, but
each of its rounds reads every head.
"""

from typing import NamedTuple

import cutlass
from cutlass import Int32, cute


class TileOrder(NamedTuple):
    """The order as kernel arguments: computed on the host, where divisions are cheap."""

    blocks: cute.FastDivmodDivisorV2  # blocks per head
    even: Int32  # 1: all blocks of a head are alike
    single_heads: cute.FastDivmodDivisorV2  # if even, blocks again
    ctas: Int32
    paired_rounds: Int32
    pairs: Int32  # of blocks of the paired heads
    paired_heads: Int32
    single_tiles: Int32  # of the single heads, those paired among themselves included
    first_single: Int32  # how many of the longest are paired with the shortest


class Place(NamedTuple):
    """A tile: block of a head, heads counted over the batch."""

    block: Int32
    head: Int32


def tile_order(blocks: Int32, heads: Int32, even: Int32, num_sms: Int32) -> TileOrder:
    """The order of `blocks` x `heads` tiles for min(tiles, num_sms) CTAs; `even` is 0 or 1."""
    tiles = blocks * heads
    ctas = cutlass.min(tiles, num_sms)
    pair_rounds = cutlass.max(tiles // (2 * ctas) - 1, 0) * (1 - even)
    head_pairs = pair_rounds * ctas // blocks
    single_heads = heads - 2 * head_pairs
    return TileOrder(
        blocks=cute.fast_divmod_create_divisor_v2(blocks),
        even=even,
        single_heads=cute.fast_divmod_create_divisor_v2(even * blocks + (1 - even) * single_heads),
        ctas=ctas,
        paired_rounds=2 * pair_rounds,
        pairs=head_pairs * blocks,
        paired_heads=2 * head_pairs,
        single_tiles=single_heads * blocks,
        first_single=pair_rounds * ctas - head_pairs * blocks,
    )


@cute.jit
def first_ticket(order: TileOrder) -> Int32:
    """The CTA's first ticket."""
    return Int32(0)


@cute.jit
def last_ticket(order: TileOrder) -> Int32:
    """No ticket is this or more: how many tiles this CTA computes."""
    cta, _, _ = cute.arch.block_idx()
    snake = order.single_tiles - 2 * order.first_single
    full = snake // order.ctas
    place = order.ctas - 1 - cta if full % 2 == 1 else cta
    last = Int32(1) if place < snake - full * order.ctas else Int32(0)
    return order.paired_rounds + full + last


@cute.jit
def next_ticket(order: TileOrder, ticket: Int32) -> Int32:
    """The CTA's ticket after this one."""
    return ticket + 1


@cute.jit
def place_of(order: TileOrder, ticket: Int32) -> Place:
    """The tile of one of this CTA's tickets."""
    cta, _, _ = cute.arch.block_idx()
    round_ = ticket
    odd = round_ % 2 == 1
    pair = round_ // 2 * order.ctas + cta
    longest = pair - order.pairs
    paired_single = order.single_tiles - 1 - longest if odd else longest
    place = order.ctas - 1 - cta if odd else cta
    snaked = order.first_single + (round_ - order.paired_rounds) * order.ctas + place
    in_pairs = round_ < order.paired_rounds
    single = paired_single if in_pairs else snaked
    head_pair, j = divmod(pair, order.blocks)
    rank, single_head = divmod(single, order.single_heads)
    if order.even == 1:
        rank, single_head = single_head, rank
    last = order.blocks.divisor - 1
    of_pair = in_pairs & (pair < order.pairs)
    descending = last - j if of_pair else last - rank
    block = j if of_pair & odd else descending
    second = Int32(1) if odd else Int32(0)
    head = 2 * head_pair + second if of_pair else order.paired_heads + single_head
    return Place(block=block, head=head)
