# SPDX-License-Identifier: Apache-2.0
"""Context parallelism: attention of one sequence whose positions several devices share.

    context_parallel_attention    checks; which interval of the sequence's keys each query sees
    _Ring, _AllGather             how out, lse and gradients come about: `_autodiff.Method`s
    _Layout                       which positions a device holds, in every order

All masks are intervals here. A device holds its rows in the order of their positions, so the keys
of an interval [start, end) that a device holds are neighbours there too: the rows from how many of
its positions are < start to how many are < end. So every device runs one and the same program,
whatever the order, and the kernels skip the tiles that nobody sees: all of them in a causal step
whose keys all lie ahead.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Required, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fa4_jax import _api, _autodiff, _intervals, _reference, _variants
from fa4_jax._autodiff import OneCall
from fa4_jax._intervals import BROKEN, Limits
from fa4_jax._reference import NO_EXTRAS, Extras
from fa4_jax._spec import BOTTOM_RIGHT, TOP_LEFT, AttentionSpec, message, one_of
from fa4_jax._untyped import lax, tree
from fa4_jax._varying import match_varying

RING = "ring"
ALL_GATHER = "all_gather"
STRATEGIES = (RING, ALL_GATHER)

CONTIGUOUS = "contiguous"
ZIGZAG = "zigzag"
STRIPED = "striped"
ORDERS = (CONTIGUOUS, ZIGZAG, STRIPED)

AxisName = str | tuple[str, ...]
Rank = TypeVar("Rank", int, Array)
Tree = TypeVar("Tree")
AnyArray = TypeVar("AnyArray", Array, np.ndarray)


class ContextParallelOptions(_api.FlashOptions, total=False):
    """For type checkers: `context_parallel_attention`'s keywords but `return_lse`."""

    axis_name: Required[AxisName]
    strategy: str
    order: str


@overload
def context_parallel_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[ContextParallelOptions],
) -> Array: ...
@overload
def context_parallel_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[ContextParallelOptions],
) -> tuple[Array, Array]: ...
def context_parallel_attention(  # noqa: PLR0913 - as flash_attention
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    axis_name: AxisName,
    strategy: str = RING,
    order: str = CONTIGUOUS,
    softmax_scale: float | None = None,
    causal: bool = False,
    causal_alignment: str = TOP_LEFT,
    window_size: tuple[int | None, int | None] = (None, None),
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    q_segment_ids: ArrayLike | None = None,
    kv_segment_ids: ArrayLike | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    kv_start: ArrayLike | None = None,
    kv_end: ArrayLike | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """`flash_attention` of a sequence whose positions the devices of a mesh axis share.

    Call it inside `jax.shard_map`, with T and S sharded over `axis_name`; batch and heads may be
    sharded over other axes. T and S below are one device's share, c is the number of devices along
    the axis, and the sequence has c T queries and c S keys. Masks speak of positions in the
    sequence, whatever `order` the arrays are in. Results are those of `flash_attention` on the
    whole sequence, but for rounding, and so are gradients, which are reverse-mode and once, as
    there.

    Keys and values travel (Liu, Zaharia and Abbeel 2023, "Ring Attention with Blockwise
    Transformers"), queries stay. With "ring", a device holds two shares of k and v at a time, and
    the transfer of the next share waits for nothing that is computed with the last; gradients of k
    and v travel along. With "all_gather", every device holds all of k and v, in the backward pass
    as well, though none is kept from one pass to the other.

    With a causal mask most pairs of a query and a key that see each other are the last devices', if
    each holds neighbours: in order "contiguous" the first ones wait. "zigzag" gives each device the
    same work, and "striped" nearly; `reorder_causal_load_balancing` brings arrays into these
    orders. Neither helps without a causal mask. With a window, prefer "contiguous": a ring then
    ends when nothing that is left is in anyone's window, provided that no mask looks ahead.

    Args:
      q: [B, T, N, D], or [T, N, D]: this device's queries.
      k: [B, S, K, D], or [S, K, D]: this device's keys.
      v: [B, S, K, V], or [S, K, V].
      axis_name: the mesh axis that T and S are sharded over, or a tuple of axes, the first of which
        is the slowest.
      strategy: "ring" or "all_gather".
      order: which positions device r holds, in ascending order. "contiguous": r T to (r + 1) T - 1.
        "zigzag": of 2 c chunks, chunks r and 2 c - 1 - r, so T and S are even. "striped": r, r + c,
        r + 2 c, ... Keys likewise.
      softmax_scale: as in `flash_attention`.
      causal: as in `flash_attention`.
      causal_alignment: as in `flash_attention`, between the ends of the whole sequences.
      window_size: as in `flash_attention`.
      softcap: as in `flash_attention`.
      sinks: as in `flash_attention`: [N], the same on all devices of the axis.
      q_segment_ids: integers [B, T] (or [T]): this device's, in q's order. As in `flash_attention`,
        the keys of an id have to be contiguous in the sequence.
      kv_segment_ids: integers [B, S] (or [S]): this device's, in k's order; both or neither.
      query_seq_lengths: integers [B] (or [1]): lengths of the whole sequences.
      key_value_seq_lengths: integers [B] (or [1]), likewise.
      kv_start: integers [B, T] (or [T]): for each of this device's queries, the position in the
        sequence of the first key that it may see.
      kv_end: integers [B, T] (or [T]): likewise, of the first that it may not see any more.
      return_lse: return (out, lse).
      deterministic: as in `flash_attention`.
      implementation: as in `flash_attention`.

    Returns:
      This device's out [B, T, N, V] in q's dtype; with `return_lse`, also lse [B, N, T]. As in
      `flash_attention`.

    Raises:
      TypeError, ValueError, NotImplementedError, LibraryError: as `flash_attention`. ValueError
        also if `axis_name` isn't bound, or if T or S is odd in order "zigzag".
    """
    one_of(strategy, STRATEGIES, "strategy")
    one_of(order, ORDERS, "order")
    axis_size = _axis_size(axis_name)
    plan = _api.check(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        causal_alignment=causal_alignment,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        kv_start=kv_start,
        kv_end=kv_end,
        return_lse=return_lse,
        deterministic=deterministic,
        implementation=implementation,
    )
    queries = _layout("q", order, axis_size, plan.q.shape[1])
    keys = _layout("k", order, axis_size, plan.k.shape[1])
    out, lse = _run(plan, strategy, _Axis(axis_name, axis_size), queries, keys)
    return (out, lse) if return_lse else out


def reorder_causal_load_balancing(
    x: AnyArray, *, order: str, cp_size: int, seq_dim: int = 1
) -> AnyArray:
    """`x`, whose `seq_dim` is in the order of positions, in an order of
    `context_parallel_attention`.

    Do it once, outside the model, to tokens, targets, segment ids and positions (which rotary
    embeddings need): sharding the result over `cp_size` devices gives each its share.

    Args:
      x: [..., length, ...]. A NumPy array stays one, so that a data loader can do it.
      order: "contiguous", "zigzag" or "striped", as in `context_parallel_attention`.
      cp_size: number of devices that share the sequence.
      seq_dim: the axis of positions, 1 by default; may be negative.

    Returns:
      An array like `x`.

    Raises:
      TypeError: x isn't an array.
      ValueError: the length isn't divisible by `cp_size` (by 2 `cp_size` in order "zigzag"), or
        another argument isn't what it may be.
    """
    return _reorder(x, order, cp_size, seq_dim, inverse=False)


def inverse_reorder_causal_load_balancing(
    x: AnyArray, *, order: str, cp_size: int, seq_dim: int = 1
) -> AnyArray:
    """What undoes `reorder_causal_load_balancing`, with the same arguments and errors."""
    return _reorder(x, order, cp_size, seq_dim, inverse=True)


def _reorder(x: AnyArray, order: str, cp_size: int, seq_dim: int, inverse: bool) -> AnyArray:
    if not isinstance(x, (np.ndarray, jax.Array)):
        raise TypeError(message("x", type(x).__name__, "a jax.Array or a numpy.ndarray"))
    one_of(order, ORDERS, "order")
    if not isinstance(cp_size, int) or cp_size < 1:
        raise ValueError(message("cp_size", cp_size, "an int >= 1"))
    if not -x.ndim <= seq_dim < x.ndim:
        raise ValueError(message("seq_dim", seq_dim, f"an axis of x, shape {x.shape}"))
    seq_dim %= x.ndim
    length, multiple = x.shape[seq_dim], cp_size * (2 if order == ZIGZAG else 1)
    if length % multiple:
        expected = f"a multiple of {multiple} for order {order!r} on {cp_size} devices"
        raise ValueError(message("x", f"length {length} in shape {x.shape}", expected, "pad it"))
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    if order == CONTIGUOUS or cp_size == 1:
        return x

    def split(*sizes: int) -> Any:
        return x.reshape(*x.shape[:seq_dim], *sizes, *x.shape[seq_dim + 1 :])

    if order == STRIPED:
        share = length // cp_size
        rows = split(cp_size, share) if inverse else split(share, cp_size)
        return xp.swapaxes(rows, seq_dim, seq_dim + 1).reshape(x.shape)
    # Neither slices of single chunks nor a gather: sharded over 8 devices, XLA makes 5 collectives
    # of this, 73 of those slices, and a gather is refused where axes are explicit.
    chunk = length // (2 * cp_size)
    chunks = split(cp_size, 2, chunk) if inverse else split(2 * cp_size, 1, chunk)
    old, new = (seq_dim + 1, seq_dim) if inverse else (seq_dim, seq_dim + 1)
    first, last = xp.split(chunks, 2, old)
    return xp.concatenate((first, xp.flip(last, seq_dim)), new).reshape(x.shape)


def _zigzag(rank: Rank, size: int) -> tuple[Rank, Rank]:
    """The chunks, of 2 `size`, that a device holds in order "zigzag"."""
    return rank, 2 * size - 1 - rank


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the positions of a sequence are, of queries or of keys."""

    order: str
    size: int
    """Devices that share it."""
    length: int
    """Positions that each has."""

    @property
    def total(self) -> int:
        return self.size * self.length

    def positions(self, rank: Array) -> Array:
        """int32 [length], ascending: those of device `rank`."""
        if self.order == STRIPED:
            return rank + self.size * jnp.arange(self.length, dtype=jnp.int32)
        starts, size = self._chunks(rank)
        return jnp.concatenate([start + jnp.arange(size, dtype=jnp.int32) for start in starts])

    def count_before(self, rank: Array, position: Array) -> Array:
        """How many of the positions of device `rank` are less than each of `position` >= 0."""
        if self.order == STRIPED:
            count = (position - rank + self.size - 1) // self.size
            return jnp.clip(count, 0, self.length)
        starts, size = self._chunks(rank)
        count = jnp.zeros_like(position)
        for start in starts:
            count += jnp.clip(position - start, 0, size)
        return count

    def _chunks(self, rank: Array) -> tuple[list[Array], int]:
        """Where runs of neighbours start, and how long they are."""
        indices = _zigzag(rank, self.size) if self.order == ZIGZAG else (rank,)
        size = self.length // len(indices)
        return [index * size for index in indices], size


@dataclasses.dataclass(frozen=True)
class _Axis:
    """The mesh axis, or axes, that a sequence is sharded over."""

    name: AxisName
    size: int

    def rank(self) -> Array:
        return lax.axis_index(self.name)

    def shift(self, arrays: Tree, distance: int) -> Tree:
        """Every device's `arrays` to the one `distance` behind it in the ring."""
        if distance % self.size == 0:
            return arrays
        pairs = [(rank, (rank + distance) % self.size) for rank in range(self.size)]

        def send(x: Array) -> Array:
            return lax.ppermute(x, self.name, pairs)

        return tree.map(send, arrays)

    def gather(self, x: Array, order: str) -> Array:
        """[B, length, ...] of every device to [B, total, ...], in the order of positions."""
        x = lax.all_gather(x, self.name, axis=1, tiled=True)
        return _reorder(x, order, self.size, 1, inverse=True)

    def sum_shares(self, x: Array, order: str, acc_dtype: jnp.dtype) -> Array:
        """Transposes `gather`: [B, total, ...] to the sum over devices of one's own share.

        An all-to-all and a sum rather than a reduce-scatter: 16-bit summands travel as they are and
        are added in `acc_dtype`, in one order; a reduce-scatter would add in 16 bits, or move twice
        the bytes. In JAX 0.10 to 0.12 it can't be lowered, either, where other axes of the mesh are
        explicit.
        """
        x = _reorder(x, order, self.size, 1, inverse=False)
        x = lax.all_to_all(x, self.name, 1, 1, tiled=True)
        summands = x.reshape(x.shape[0], self.size, x.shape[1] // self.size, *x.shape[2:])
        return summands.astype(acc_dtype).sum(1).astype(x.dtype)


def _axis_size(axis_name: AxisName) -> int:
    expected = "an axis, or a tuple of axes, of an enclosing jax.shard_map"
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(message("axis_name", repr(axis_name), expected))
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            message(
                "axis_name",
                f"{axis_name!r}, which isn't bound",
                expected,
                "call it in a function that jax.shard_map maps over that axis",
            )
        ) from None


def _layout(name: str, order: str, size: int, length: int) -> _Layout:
    """Of queries or keys, checked."""
    if order == ZIGZAG and length % 2:
        expected = f"an even length on each device for order {order!r}"
        hint = f"pad the sequence to a multiple of {2 * size}"
        raise ValueError(message(name, f"length {length}", expected, hint))
    layout = _Layout(order, size, length)
    if layout.total > _variants.MAX_DIMENSION:
        expected = f"at most {_variants.MAX_DIMENSION} in all"
        raise ValueError(message(name, f"length {length} on each of {size} devices", expected))
    return layout


def _run(
    plan: _api.Plan, strategy: str, axis: _Axis, queries: _Layout, keys: _Layout
) -> tuple[Array, Array]:
    q, spec = plan.folded_scale()
    local = OneCall(_intervals.without_band(spec), plan.use_kernels())
    rank = axis.rank()
    if _reference.is_empty(q, plan.k):
        method, interval = local, None
    else:
        limits = _whole_ids(plan.limits, axis, keys.order)
        lengths = queries.total, keys.total
        interval = _intervals.of_rows(spec, limits, queries.positions(rank), lengths)
        num_steps = _num_steps(spec, plan.limits, queries, keys)
        ring = _Ring(local, axis, keys, num_steps)
        method = ring if strategy == RING else _AllGather(local, axis, keys.order)
    # Made from q, they are sharded as it is.
    zeros = jnp.zeros_like(q[..., 0, 0], jnp.int32)
    kv_start, kv_end = (zeros + x for x in interval) if interval else (None, None)
    extras = Extras(kv_start=kv_start, kv_end=kv_end, sinks=plan.sinks)
    operands = match_varying((q, plan.k, plan.v, extras), like=rank)
    return plan.without_batch(_autodiff.attention(method, *operands))


def _whole_ids(limits: Limits, axis: _Axis, order: str) -> Limits:
    """`limits` with the ids of all keys; queries' remain this device's."""
    ids = limits.kv_segment_ids
    if ids is None:
        return limits
    return limits._replace(kv_segment_ids=axis.gather(match_varying(ids, axis.rank()), order))


def _num_steps(spec: AttentionSpec, limits: Limits, queries: _Layout, keys: _Layout) -> int:
    """How many devices' keys, one's own and those of how many before it, the band lets anyone
    see."""
    size, (rows, columns) = queries.size, (queries.length, keys.length)
    lengths = limits.query_seq_lengths, limits.key_value_seq_lengths
    is_traced = spec.alignment == BOTTOM_RIGHT and any(x is not None for x in lengths)
    if queries.order != CONTIGUOUS or is_traced:
        return size
    lower, upper = spec.band(queries.total, keys.total)

    def meets(rank: int, source: int) -> bool:
        # From the last query to the first key, and from the first query to the last key.
        least = source * columns - ((rank + 1) * rows - 1)
        most = (source + 1) * columns - 1 - rank * rows
        return least <= upper and most >= lower

    pairs = ((rank, source) for rank in range(size) for source in range(size))
    return 1 + max(
        ((rank - source) % size for rank, source in pairs if meets(rank, source)), default=0
    )


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Shares of k and v go round, one device a step; results of the steps are merged.

    A loop rather than steps one after another: in its body, the transfers of one step have the
    kernels of one step to hide behind, and no more than two shares exist, whatever the scheduler
    thinks that a kernel costs. The first and last steps that transfer less than others are outside.
    """

    local: OneCall
    axis: _Axis
    keys: _Layout
    num_steps: int

    def forward(self, q: Array, k: Array, v: Array, extras: Extras) -> tuple[Array, Array]:
        def visit(shift: Array | int, kv: tuple[Array, Array], total: tuple[Array, Array]):
            return _merge(total, self.local.forward(q, *kv, self._visible(shift, extras)))

        def step(
            carry: tuple[tuple[Array, Array], tuple[Array, Array]], shift: Array
        ) -> tuple[Any, None]:
            kv, total = carry
            return (self.axis.shift(kv, 1), visit(shift, kv, total)), None

        carry = (k, v), _start(q, v, extras.sinks)
        last = self.num_steps - 1
        if last:
            carry, _ = lax.scan(step, carry, jnp.arange(last, dtype=jnp.int32))
        out, lse = visit(last, *carry)
        return out.astype(q.dtype), lse

    def backward(
        self,
        operands: tuple[Array, Array, Array],
        residuals: tuple[Array, Array],
        cotangents: tuple[Array, Array],
        extras: Extras,
    ) -> tuple[Array, Array, Array, None]:
        """With the lse of the whole sequence, a step's gradients are its summands of the whole
        sequence's. Those of k and v travel with k and v, and in the end back home."""
        q, k, v = operands
        acc_dtype = _reference.lse_dtype(q.dtype)

        def visit(shift: Array | int, kv: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
            visible = self._visible(shift, extras)
            parts = self.local.backward((q, *kv), residuals, cotangents, visible)
            dq, dk, dv = (x.astype(acc_dtype) for x in parts[:3])
            return dq, (dk, dv)

        def follow(grads: tuple[Array, tuple[Array, Array]]) -> tuple[Array, tuple[Array, Array]]:
            dq, dkv = grads
            return dq, self.axis.shift(dkv, 1)

        def step(
            carry: tuple[tuple[Array, Array], tuple[Array, tuple[Array, Array]]], shift: Array
        ) -> tuple[Any, None]:
            kv, grads = carry
            next_kv, arriving = self.axis.shift(kv, 1), follow(grads)
            return (next_kv, tree.map(jnp.add, arriving, visit(shift, kv))), None

        last = self.num_steps - 1
        grads = visit(0, (k, v))
        if last:
            carry = self.axis.shift((k, v), 1), grads
            (kv, grads), _ = lax.scan(step, carry, jnp.arange(1, last, dtype=jnp.int32))
            grads = tree.map(jnp.add, follow(grads), visit(last, kv))
        dq, (dk, dv) = grads
        # Rounded before they go home, a transfer that nothing hides.
        dk, dv = self.axis.shift((dk.astype(k.dtype), dv.astype(v.dtype)), -last)
        return dq.astype(q.dtype), dk, dv, None

    def _visible(self, shift: Array | int, extras: Extras) -> Extras:
        """Intervals among the keys that are here after `shift` steps."""
        if extras.kv_start is None or extras.kv_end is None:
            return NO_EXTRAS
        source = (self.axis.rank() - shift) % self.axis.size

        def count(position: Array) -> Array:
            return jnp.where(position == BROKEN, BROKEN, self.keys.count_before(source, position))

        return Extras(kv_start=count(extras.kv_start), kv_end=count(extras.kv_end))


def _start(q: Array, v: Array, sinks: Array | None) -> tuple[Array, Array]:
    """out and lse before any key: nothing, or the sinks, which so count once."""
    # Made from q, they are sharded and vary over a mesh as it does, which a loop carry has to.
    zeros = jnp.zeros_like(q[..., :1], _reference.lse_dtype(q.dtype))
    lse = zeros[..., 0].swapaxes(1, 2)
    lse += -jnp.inf if sinks is None else sinks.astype(lse.dtype)[:, None]
    return jnp.broadcast_to(zeros, (*q.shape[:-1], v.shape[-1])), lse


def _merge(total: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[Array, Array]:
    """out and lse of the keys of both, which are disjoint; out in lse's dtype."""
    (out, lse), (part_out, part_lse) = total, part
    both = jnp.logaddexp(lse, part_lse)
    # A row that has seen no key yet: 0 instead avoids inf - inf.
    shift = jnp.where(both == -jnp.inf, 0, both)

    def weight(x: Array) -> Array:
        return jnp.exp(x - shift).swapaxes(1, 2)[..., None]

    return out * weight(lse) + part_out * weight(part_lse), both


@dataclasses.dataclass(frozen=True)
class _AllGather:
    """All of k and v come here, in the order of positions, for one call."""

    local: OneCall
    axis: _Axis
    order: str

    def forward(self, q: Array, k: Array, v: Array, extras: Extras) -> tuple[Array, Array]:
        return self.local.forward(q, *self._gather(k, v), extras)

    def backward(
        self,
        operands: tuple[Array, Array, Array],
        residuals: tuple[Array, Array],
        cotangents: tuple[Array, Array],
        extras: Extras,
    ) -> tuple[Array, Array, Array, None]:
        q, k, v = operands
        operands = q, *self._gather(k, v)
        dq, dk, dv, _ = self.local.backward(operands, residuals, cotangents, extras)
        acc_dtype = _reference.lse_dtype(q.dtype)
        dk, dv = (self.axis.sum_shares(x, self.order, acc_dtype) for x in (dk, dv))
        return dq, dk, dv, None

    def _gather(self, k: Array, v: Array) -> tuple[Array, Array]:
        return self.axis.gather(k, self.order), self.axis.gather(v, self.order)
