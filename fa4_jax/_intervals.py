# SPDX-License-Identifier: Apache-2.0
"""The interval: which keys a query may see, as far as values rather than static numbers say it.

Everything such that a call may carry (bounds, lengths, segment ids, packed sequences) becomes one
pair of int32 arrays [B, T] here: query i of batch b sees keys j with kv_start[b, i] <= j <
kv_end[b, i] that the static band of its `AttentionSpec` lets through too. `KernelInterval` is what
kernels get of it.

What the arrays promise to whoever reads them: 0 <= kv_start <= kv_end <= S, whatever values the
caller's arrays hold, so a row with kv_start == kv_end sees nothing. One exception: a row with
kv_start == kv_end == `BROKEN` sees nothing and its out and lse are NaN. It stands for segment ids
that no interval can express, which mustn't come back as numbers.

Work and memory are O((T + S) log S) for segment ids, O(T log M) for M packed sequences and O(T)
else, for each batch entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from fa4_jax._spec import BOTTOM_RIGHT, TOP_LEFT, AttentionSpec, Window
from fa4_jax._untyped import jit, lax
from fa4_jax._variants import BLOCK, ROW_MULTIPLE, round_up

BROKEN = -1


class Limits(NamedTuple):
    """The caller's arrays, with a batch axis. All but the ids are int32 and >= 0; None says
    nothing."""

    kv_start: Array | None = None
    """[B, T]"""
    kv_end: Array | None = None
    """[B, T]"""
    q_segment_ids: Array | None = None
    """[B, T], any integer dtype; None if and only if `kv_segment_ids` is."""
    kv_segment_ids: Array | None = None
    """[B, S], the same dtype."""
    query_seq_lengths: Array | None = None
    """[B]"""
    key_value_seq_lengths: Array | None = None
    """[B]"""
    cu_seqlens_q: Array | None = None
    """[M + 1]: sequence m is rows [cu_seqlens_q[m], cu_seqlens_q[m + 1]) of the only batch
    entry."""
    cu_seqlens_k: Array | None = None
    """[M + 1], or None: sequences have the same rows in keys as in queries."""


def resolve(
    spec: AttentionSpec, limits: Limits, seqlen_q: int, seqlen_k: int
) -> tuple[AttentionSpec, tuple[Array, Array] | None]:
    """The band and the interval (kv_start, kv_end) that say what `spec` and `limits` say.

    A band that is aligned with each sequence's own end, or with a sequence's place among packed
    keys, is a different one for each sequence. It moves into the interval, and the spec comes back
    without it. Any other band stays where kernels know its block range when they are launched.
    """
    if all(x is None for x in limits) or 0 in (seqlen_q, seqlen_k):
        return spec, None
    has_lengths = limits.query_seq_lengths is not None or limits.key_value_seq_lengths is not None
    bottom_right = spec.alignment == BOTTOM_RIGHT
    moves = limits.cu_seqlens_k is not None or (has_lengths and bottom_right)
    window = (spec.window_left, spec.window_right) if moves else (None, None)
    rows = jnp.arange(seqlen_q, dtype=jnp.int32)
    interval = _interval(limits, rows, (seqlen_q, seqlen_k), window, bottom_right)
    return (without_band(spec) if moves else spec), interval


def of_rows(
    spec: AttentionSpec, limits: Limits, rows: Array, lengths: tuple[int, int]
) -> tuple[Array, Array] | None:
    """The interval (kv_start, kv_end) that says what `spec` and `limits` say, the band included.

    For some of the queries of a sequence: those at positions `rows` [T] among the first of
    `lengths`, which may be traced. Keys are counted among the second, and `kv_segment_ids` are all
    of theirs. None if every query sees every key. A batch axis may be 1.
    """
    window = spec.window_left, spec.window_right
    if window == (None, None) and all(x is None for x in limits):
        return None
    return _interval(limits, rows, lengths, window, spec.alignment == BOTTOM_RIGHT)


def without_band(spec: AttentionSpec) -> AttentionSpec:
    """`spec` with nothing but intervals to say who sees what."""
    return dataclasses.replace(spec, window_left=None, window_right=None, alignment=TOP_LEFT)


class KernelInterval(NamedTuple):
    """The operands of kernels with `Feature.interval`; `_variants` says what they hold."""

    kv_start: Array
    """[B, R]"""
    kv_end: Array
    """[B, R]"""
    key_range: Array
    """[B, M, 4]"""
    query_range: Array
    """[B, J, 4]"""

    @property
    def of_queries(self) -> tuple[Array, Array, Array]:
        """What a kernel needs that visits keys for queries."""
        return self.kv_start, self.kv_end, self.key_range

    @property
    def of_keys(self) -> tuple[Array, Array, Array]:
        """What a kernel needs that visits queries for keys."""
        return self.kv_start, self.kv_end, self.query_range


@jit(static_argnums=(0, 3))
def for_kernels(
    band: tuple[int, int], kv_start: Array, kv_end: Array, seqlen_k: int
) -> KernelInterval:
    """Intervals [B, T], and the band in them, as kernels take them.

    Blocks of queries meet blocks of keys pair by pair: B T S / 4096 comparisons without memory, for
    a million by a million 2.7e8, and a few launches, where a running maximum would be dozens. What
    is reduced over the same axis is one reduction with several results, so that it's one launch.
    """
    row = jnp.arange(kv_start.shape[1], dtype=jnp.int32)
    broken = kv_start == BROKEN
    start = jnp.clip(jnp.maximum(kv_start, row + band[0]), 0, seqlen_k)
    end = jnp.clip(jnp.minimum(kv_end, row + band[1] + 1), start, seqlen_k)
    # A row without keys widens no block's interval, and is no part of one that sees all of a key.
    # Nor does a broken row widen one: it is NaN whatever is visited for it, and the last bits of
    # its neighbours depend on what is.
    empty = start == end
    first, last = jnp.where(empty, seqlen_k, start), jnp.where(empty, 0, end)
    high_start, low_end, low_start, high_end, spoiled = _reduce(
        (_blocks(jnp.where(broken, 0, first), 0), jnp.maximum, 0),
        (_blocks(jnp.where(broken, seqlen_k, last), seqlen_k), jnp.minimum, seqlen_k),
        (_blocks(jnp.where(broken, seqlen_k, first), seqlen_k), jnp.minimum, seqlen_k),
        (_blocks(jnp.where(broken, 0, last), 0), jnp.maximum, 0),
        (_blocks(broken, False), jnp.logical_or, False),
    )

    key = jnp.arange(0, seqlen_k, BLOCK, dtype=jnp.int32)[:, None]
    key_end = jnp.minimum(key + BLOCK, seqlen_k)
    queries = jnp.arange(low_start.shape[1], dtype=jnp.int32)
    past = jnp.int32(low_start.shape[1])

    low_start_, high_end_, high_start_, low_end_ = (
        x[:, None] for x in (low_start, high_end, high_start, low_end)
    )
    # But the NaN of a broken row has to meet every key.
    some = ((low_start_ < key_end) & (high_end_ > key)) | spoiled[:, None]
    every = (high_start_ <= key) & (low_end_ >= key_end)
    # [B, J] each. Of several runs of blocks that see all of a key's block, the first.
    begin, finish, full_begin = _reduce(
        (jnp.where(some, queries, past), jnp.minimum, past),
        (jnp.where(some, queries + 1, 0), jnp.maximum, 0),
        (jnp.where(every, queries, past), jnp.minimum, past),
    )
    behind = ~every & (queries >= full_begin[..., None])
    full_end = jnp.where(behind, queries, past).min(-1)

    def rows(x: Array) -> Array:
        missing = round_up(x.shape[1], ROW_MULTIPLE) - x.shape[1]
        return jnp.pad(x, ((0, 0), (0, missing)))

    return KernelInterval(
        kv_start=rows(jnp.where(broken, BROKEN, start)),
        kv_end=rows(jnp.where(broken, seqlen_k, end)),
        key_range=jnp.stack((low_start, high_end, high_start, low_end), -1),
        query_range=BLOCK * jnp.stack((begin, finish, full_begin, full_end), -1),
    )


def _blocks(x: Array, neutral: int) -> Array:
    """[B, T] to [B, M, BLOCK], padded."""
    missing = round_up(x.shape[1], BLOCK) - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, missing)), constant_values=neutral)
    return x.reshape(x.shape[0], -1, BLOCK)


def _reduce(*parts: tuple[Array, Callable[[Array, Array], Array], int | Array]) -> list[Array]:
    """The last axis of arrays of one shape, each (array, operation, what it starts with)."""
    arrays, operations, starts = zip(*parts, strict=True)

    def combine(left: Sequence[Array], right: Sequence[Array]) -> tuple[Array, ...]:
        return tuple(f(x, y) for f, x, y in zip(operations, left, right, strict=True))

    starts = tuple(jnp.asarray(x, a.dtype) for x, a in zip(starts, arrays, strict=True))
    return lax.reduce(arrays, starts, combine, (arrays[0].ndim - 1,))


@jit(static_argnums=(2, 3, 4))
def _interval(
    limits: Limits, rows: Array, lengths: tuple[int, int], window: Window, bottom_right: bool
) -> tuple[Array, Array]:
    seqlen_k = lengths[1]
    start, end = _sequences(limits, rows[None], lengths, window, bottom_right)
    if limits.kv_start is not None:
        start = jnp.maximum(start, jnp.minimum(limits.kv_start, seqlen_k))
    if limits.kv_end is not None:
        end = jnp.minimum(end, limits.kv_end)
    broken = None
    if limits.q_segment_ids is not None and limits.kv_segment_ids is not None:
        first, last, contiguous = _segments(limits.q_segment_ids, limits.kv_segment_ids)
        start, end = jnp.maximum(start, first), jnp.minimum(end, last)
        # A row that sees no key of its segment anyway needs no run.
        broken = ~contiguous & (start < end)
    start, end, _ = jnp.broadcast_arrays(start, jnp.maximum(start, end), rows)
    if broken is not None:
        start, end = (jnp.where(broken, BROKEN, x) for x in (start, end))
    return start, end


def _sequences(
    limits: Limits, row: Array, lengths: tuple[int, int], window: Window, bottom_right: bool
) -> tuple[Array, Array]:
    """[start, end) of what `cu_seqlens` or lengths, and a band of each sequence, leave visible to
    queries `row` [1, T]."""
    seqlen_q, seqlen_k = lengths
    # No side of a window reaches further than this, and sums stay within int32.
    left, right = (None if side is None else min(side, max(lengths)) for side in window)
    window = left, right
    if limits.cu_seqlens_q is not None:
        cu_q = _monotone(limits.cu_seqlens_q, seqlen_q)
        cu_k = cu_q if limits.cu_seqlens_k is None else _monotone(limits.cu_seqlens_k, seqlen_k)
        # The last sequence that starts at or before a row: the one that isn't empty.
        sequence = _count(jnp.less_equal, cu_q, row) - 1

        def bounds(cu: Array) -> tuple[Array, Array]:
            # For a row before the first sequence or after the last, both are the same end.
            first, last = (_take(cu, sequence + i) for i in (0, 1))
            return first, last - first

        (first_q, len_q), (first_k, len_k) = bounds(cu_q), bounds(cu_k)
        start, end = _band(row - first_q, len_q, len_k, window, bottom_right)
        return first_k + start, first_k + end
    len_q, len_k = jnp.int32(seqlen_q), jnp.int32(seqlen_k)
    if limits.query_seq_lengths is not None:
        len_q = jnp.minimum(limits.query_seq_lengths, seqlen_q)[:, None]
    if limits.key_value_seq_lengths is not None:
        len_k = jnp.minimum(limits.key_value_seq_lengths, seqlen_k)[:, None]
    start, end = _band(row, len_q, len_k, window, bottom_right)
    # Without query lengths every row is one of the sequence.
    return start, end if limits.query_seq_lengths is None else jnp.where(row < len_q, end, 0)


def _band(
    row: Array, len_q: Array, len_k: Array, window: Window, bottom_right: bool
) -> tuple[Array, Array]:
    """[start, end) of the keys that a row sees among the `len_k` of its sequence, counted there."""
    left, right = window
    aligned = row + (len_k - len_q) if bottom_right else row
    start = jnp.int32(0) if left is None else jnp.clip(aligned - left, 0, len_k)
    end = len_k if right is None else jnp.clip(aligned + right + 1, 0, len_k)
    return start, end


def _monotone(cu_seqlens: Array, total: int) -> Array:
    """[1, M + 1]: any integers as offsets of sequences, <= total and none before its
    predecessor."""
    return lax.cummax(jnp.minimum(cu_seqlens, total))[None]


def _segments(q_ids: Array, kv_ids: Array) -> tuple[Array, Array, Array]:
    """For each query, [first, last) around the keys with its id, and whether all there have it."""
    seqlen_k = kv_ids.shape[1]
    # Made from the ids, positions are sharded and vary over a mesh as those do, which a sort needs.
    position = jnp.zeros_like(kv_ids, jnp.int32) + jnp.arange(seqlen_k, dtype=jnp.int32)
    # Stable: an id's positions stay in order.
    ids, position = lax.sort((kv_ids, position), dimension=1, num_keys=1)
    low, high = _count(jnp.less, ids, q_ids), _count(jnp.less_equal, ids, q_ids)
    found = high > low
    first = jnp.where(found, _take(position, low), 0)
    last = jnp.where(found, _take(position, high - 1) + 1, 0)
    return first, last, last - first == high - low


def _count(compare: Callable[[Array, Array], Array], x: Array, than: Array) -> Array:
    """How many of `x` [B, S], in order, are less (or equal) than each of `than` [B, T].

    A binary search, as `jnp.searchsorted`, which refuses a batch that is sharded over an explicit
    mesh (JAX 0.10).
    """
    size = x.shape[1]
    count = jnp.zeros_like(than, jnp.int32)
    for bit in reversed(range(size.bit_length())):
        more = count + (1 << bit)
        count = jnp.where((more <= size) & compare(_take(x, more - 1), than), more, count)
    return count


def _take(x: Array, index: Array) -> Array:
    """x[b, index[b, i]], at the nearest index that there is."""
    return jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1), axis=1)
