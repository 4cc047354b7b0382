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

But the role that loads, which is ahead of the others, decides: it calls `reserve` when it begins a
tile, and ends with `claim` and `announce`. A ticket that it doesn't announce is its own.

`TileOrder` is fixed before the launch, without atomics, for blocks of which the later ones are
longer: all of them (a causal band), only the first (a window, which the first queries see less
of), or none. Its tickets are rounds. Blocks that are alike come head after head, then those before
them from the longest to the shortest, all heads at once. A window of 4,096 keys among 16,384 or
32,768 then has its longest CTA at 1.00 to 1.01 of the mean, where head after head with all blocks
gives 1.03 to 1.18 (computed, 132 CTAs, the tiles of head dim 64 to 256). If no two are alike:

    pairs     Two heads at a time: block M-1-j of the first, then block j of the second. Every pair
              costs the same and a round of them covers few heads. A CTA takes one pair every two
              rounds.
    singles   The heads that are left, two to four rounds of tiles, from the longest tile to the
              shortest, in a snake, as rounds of alike tiles, too: even ones give place c to CTA
              c, odd ones place G-1-c. Where the pairs of the heads before don't fill a round, it
              ends with pairs of these tiles: the i-th longest, then the i-th shortest.

The longest CTA, in units of the mean, causal, 132 CTAs, batch x length 16,384, heads x dim 2,048
(computed, a tile's overhead counted as one key tile): 1.01 for head dim 128 at lengths 1,024 to
16,384, at most 1.05 for 64 and 256. Taking heads one after another in a snake gives 1.03 to 1.8,
because blocks per head and CTAs have common factors; a snake over all heads gives 1.03 at most, but
each of its rounds reads every head.

`TileQueue` is for rows whose tiles' lengths only values say (intervals): a CTA takes the next tile
when it is done with one, from a counter in global memory. The queue goes through groups of heads,
in a group from the last block to the first, and head after head within a block. A group fits in the
L2, or else leaves eight CTAs to each of its heads, which read the same at about the same time. Nine
packed sequences of 33 to 7,000 tokens, causal, 16,384 in all (computed with the tiles of d=64, 128
and 256): the longest CTA has 1.00 to 1.03 of the mean; if every group fitted in the L2, 1.01 to
1.16, because the last one has long tiles, too; the order above gives it 1.37 to 1.70.
"""

from typing import NamedTuple

import cutlass
from cutlass import Int32, Int64, const_expr, cute

# What the heads of a group may read repeatedly. An H200's L2 has 50 MiB, in two halves that copy
# from each other.
L2_BYTES = 32 * 2**20
# With so many at neighbouring blocks of a head, memory is asked for an eighth of what they read.
CTAS_OF_A_HEAD = 8
RING = 2  # announced tiles that not everybody has taken notice of


class TileOrder(NamedTuple):
    """The order as kernel arguments: computed on the host, where divisions are cheap."""

    blocks: cute.FastDivmodDivisorV2  # blocks per head
    alike: cute.FastDivmodDivisorV2  # the last blocks of a head, or 1 if none are alike
    shorter: Int32  # the others
    alike_tiles: Int32
    single_heads: cute.FastDivmodDivisorV2
    ctas: Int32
    paired_rounds: Int32
    pairs: Int32  # of blocks of the paired heads
    paired_heads: Int32
    single_tiles: Int32  # of the single heads, those paired among themselves included
    first_single: Int32  # how many of the longest are paired with the shortest


class TileQueue(NamedTuple):
    """The queue as kernel arguments, and, once in the kernel, where a CTA's roles meet."""

    blocks: Int32  # blocks per head
    group_tiles: cute.FastDivmodDivisorV2  # of a group of heads
    group_heads: cute.FastDivmodDivisorV2
    last_group: Int32
    last_heads: cute.FastDivmodDivisorV2  # of the last group
    ctas: Int32
    tiles: Int32
    taken: cute.Tensor  # (1,), beside each CTA's first
    ring: cute.Tensor | tuple[()] = ()
    full: cute.Pointer | tuple[()] = ()
    empty: cute.Pointer | tuple[()] = ()


class Place(NamedTuple):
    """A tile: block of a head, heads counted over the batch."""

    block: Int32
    head: Int32


def tile_order(blocks: Int32, heads: Int32, shorter: Int32, num_sms: Int32) -> TileOrder:
    """The order of `blocks` x `heads` tiles for min(tiles, num_sms) CTAs. The first `shorter`
    blocks of a head are shorter than those after them, the others alike."""
    tiles = blocks * heads
    ctas = cutlass.min(tiles, num_sms)
    alike = blocks - shorter
    pair_rounds = cutlass.max(tiles // (2 * ctas) - 1, 0) * (1 - cutlass.min(alike, 1))
    head_pairs = pair_rounds * ctas // blocks
    single_heads = heads - 2 * head_pairs
    return TileOrder(
        blocks=cute.fast_divmod_create_divisor_v2(blocks),
        alike=cute.fast_divmod_create_divisor_v2(cutlass.max(alike, 1)),
        shorter=shorter,
        alike_tiles=alike * heads,
        single_heads=cute.fast_divmod_create_divisor_v2(single_heads),
        ctas=ctas,
        paired_rounds=2 * pair_rounds,
        pairs=head_pairs * blocks,
        paired_heads=2 * head_pairs,
        single_tiles=single_heads * blocks,
        first_single=pair_rounds * ctas - head_pairs * blocks,
    )


def tile_queue(  # noqa: PLR0913 - what there is, how it's grouped, and where it's counted
    blocks: Int32,
    heads: tuple[Int32, Int32],
    head_bytes: Int64,
    num_sms: Int32,
    taken: cute.Tensor,
    at_least: Int32 = 1,
) -> TileQueue:
    """The queue of the tiles of (heads, how many share what a tile reads), for min(tiles, num_sms)
    CTAs; `head_bytes` is what the tiles of such heads read. `taken` is 0. A group has `at_least` so
    many heads, if there are."""
    heads, sharing = heads
    fitting = cutlass.max(Int32(1), Int32(cutlass.min(L2_BYTES // head_bytes, Int64(heads))))
    group = cutlass.max(fitting * sharing, cutlass.max(num_sms // CTAS_OF_A_HEAD, at_least))
    group = cutlass.min(group, heads)
    last_group = (heads - 1) // group
    return TileQueue(
        blocks=blocks,
        group_tiles=cute.fast_divmod_create_divisor_v2(group * blocks),
        group_heads=cute.fast_divmod_create_divisor_v2(group),
        last_group=last_group,
        last_heads=cute.fast_divmod_create_divisor_v2(heads - last_group * group),
        ctas=cutlass.min(blocks * heads, num_sms),
        tiles=blocks * heads,
        taken=taken,
    )


def queue_storage(has_queue: bool) -> tuple:
    """(ring, barriers) in a kernel's shared memory; of no size without a queue."""
    ring = RING if has_queue else 0
    return (
        cute.struct.Align[cute.struct.MemRange[Int32, ring], 8],
        cute.struct.MemRange[cutlass.Int64, 2 * ring],
    )


@cute.jit
def open_queue(queue: TileQueue, ring, barriers, followers: cutlass.Constexpr) -> TileQueue:
    """The queue in the kernel, from its `queue_storage`. `followers` warps will call `next_ticket`.
    Called by everybody, before the barriers of pipelines are made visible."""
    full = barriers.data_ptr()
    empty = full + RING
    if cute.arch.make_warp_uniform(cute.arch.warp_idx()) == 0:
        with cute.arch.elect_one():
            for i in cutlass.range_constexpr(RING):
                cute.arch.mbarrier_init(full + i, 1)
                cute.arch.mbarrier_init(empty + i, followers)
    ring = ring.get_tensor(cute.make_layout(RING))
    return queue._replace(ring=ring, full=full, empty=empty)


# A ticket of a queue is 4 * tile + the CTA's number of tiles before, modulo 4. That number's last
# bit says where in the ring the next tile is announced, the other one is the phase.


@cute.jit
def first_ticket(order: TileOrder | TileQueue) -> Int32:
    """The CTA's first ticket."""
    cta, _, _ = cute.arch.block_idx()
    return 4 * cta if const_expr(isinstance(order, TileQueue)) else Int32(0)


@cute.jit
def last_ticket(order: TileOrder | TileQueue) -> Int32:
    """No ticket is this or more."""
    if const_expr(isinstance(order, TileQueue)):
        end = 4 * order.tiles
    else:
        cta, _, _ = cute.arch.block_idx()
        snake = order.single_tiles - 2 * order.first_single
        full = snake // order.ctas
        place = order.ctas - 1 - cta if full % 2 == 1 else cta
        last = Int32(1) if place < snake - full * order.ctas else Int32(0)
        end = order.paired_rounds + full + last
    return end


@cute.jit
def next_ticket(order: TileOrder | TileQueue, ticket: Int32) -> Int32:
    """The CTA's ticket after this one, for a role that follows; called by whole warps."""
    if const_expr(isinstance(order, TileQueue)):
        slot, phase = ticket % RING, ticket // RING % 2
        cute.arch.mbarrier_wait(order.full + slot, phase)
        tile = order.ring[slot]
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(order.empty + slot)
        following = _ticket(tile, ticket)
    else:
        following = ticket + 1
    return following


@cute.jit
def reserve(order: TileOrder | TileQueue) -> Int32:
    """A tile for this CTA to compute after this one. Called by the warp that loads, early: the
    answer takes a round trip to the L2."""
    tile = Int32(0)
    if const_expr(isinstance(order, TileQueue)):
        if cute.arch.lane_idx() == 0:
            tile = cute.arch.atomic_add(
                order.taken.iterator.llvm_ptr, Int32(1), sem="relaxed", scope="gpu"
            )
    return tile


@cute.jit
def claim(order: TileOrder | TileQueue, ticket: Int32, reserved: Int32) -> Int32:
    """The ticket after this one, for the warp that loads."""
    if const_expr(isinstance(order, TileQueue)):
        following = _ticket(order.ctas + cute.arch.shuffle_sync(reserved, 0), ticket)
    else:
        following = ticket + 1
    return following


@cute.jit
def announce(order: TileOrder | TileQueue, ticket: Int32, following: Int32):
    """Tell the others what follows this ticket, when they have taken notice of the one announced
    two before."""
    if const_expr(isinstance(order, TileQueue)):
        slot, phase = ticket % RING, ticket // RING % 2
        cute.arch.mbarrier_wait(order.empty + slot, 1 - phase)
        with cute.arch.elect_one():
            order.ring[slot] = following // 4
            cute.arch.mbarrier_arrive(order.full + slot)


def _ticket(tile: Int32, before: Int32) -> Int32:
    """Of a queue's tile, after another ticket."""
    return 4 * tile + (before + 1) % 4


@cute.jit
def place_of(order: TileOrder | TileQueue, ticket: Int32) -> Place:
    """The tile of one of this CTA's tickets."""
    if const_expr(isinstance(order, TileQueue)):
        place = _place_in_queue(order, ticket // 4)
    else:
        place = _place_in_round(order, ticket)
    return place


@cute.jit
def _place_in_queue(queue: TileQueue, tile: Int32) -> Place:
    group, in_group = divmod(tile, queue.group_tiles)
    rank, head = divmod(in_group, queue.group_heads)
    last_rank, last_head = divmod(in_group, queue.last_heads)
    if group == queue.last_group:
        rank, head = last_rank, last_head
    return Place(block=queue.blocks - 1 - rank, head=group * queue.group_heads.divisor + head)


@cute.jit
def _place_in_round(order: TileOrder, round_: Int32) -> Place:
    cta, _, _ = cute.arch.block_idx()
    odd = round_ % 2 == 1
    pair = round_ // 2 * order.ctas + cta
    longest = pair - order.pairs
    paired_single = order.single_tiles - 1 - longest if odd else longest
    place = order.ctas - 1 - cta if odd else cta
    snaked = order.first_single + (round_ - order.paired_rounds) * order.ctas + place
    in_pairs = round_ < order.paired_rounds
    single = paired_single if in_pairs else snaked
    head_pair, j = divmod(pair, order.blocks)
    rank, single_head = divmod(single - order.alike_tiles, order.single_heads)
    longest_single = order.shorter - 1
    if single < order.alike_tiles:
        single_head, rank = divmod(single, order.alike)
        longest_single = order.blocks.divisor - 1
    of_pair = in_pairs & (pair < order.pairs)
    descending = order.blocks.divisor - 1 - j if of_pair else longest_single - rank
    block = j if of_pair & odd else descending
    second = Int32(1) if odd else Int32(0)
    head = 2 * head_pair + second if of_pair else order.paired_heads + single_head
    return Place(block=block, head=head)
