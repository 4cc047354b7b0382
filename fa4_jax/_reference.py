# SPDX-License-Identifier: Apache-2.0
"""Blockwise exact attention in jax.numpy: the CPU and TPU path, and what a call falls back to.

The online softmax of FlashAttention (Dao et al. 2022, algorithm 1) and its recomputing backward
(Dao 2023, algorithm 2), over blocks of 512 x 512. Logits, probabilities' sums and every accumulator
are float32 (float64 for float64 inputs); probabilities and dS enter their matrix products in the
input dtype, as in the kernels. Memory beyond operands and results is O(B N 512 (512 + D)), whatever
T and S are, and K/V are never repeated for grouped query heads. Blocks outside the band aren't
visited; in a batch of 1, neither are blocks outside the intervals.

It takes more than the kernels do: any floating dtype, any head dims, a softcap, and `Extras`.
A row that sees no key has out 0, lse -inf (its sink, if there are sinks) and no gradient. T, S or
B = 0 is an empty or zero result.

`forward` can be differentiated once, through `backward` (see `_autodiff`). Forward-over-reverse
works; reverse-over-reverse raises JAX's own error about loops with dynamic trip counts.
"""

from __future__ import annotations

import sys
import warnings
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from fa4_jax._intervals import BROKEN
from fa4_jax._spec import AttentionSpec
from fa4_jax._untyped import jit, lax, tree
from fa4_jax._variants import round_up
from fa4_jax._varying import match_varying

BLOCK = 512


class FallbackWarning(UserWarning):
    """A call with `implementation=None` runs the reference instead of the FA4 kernels."""


_warned: set[tuple[str, ...]] = set()


def warn_fallback(reasons: tuple[str, ...]) -> None:
    """Say once per process, for each distinct set of reasons, that the reference runs."""
    if reasons in _warned:
        return
    _warned.add(reasons)
    warnings.warn(
        f"fa4_jax: running the reference, not the FA4 kernels: {'; '.join(reasons)}. Pass "
        'implementation="reference" to choose it without this warning, or "fa4" to get an error.',
        FallbackWarning,
        stacklevel=caller_level(),
    )


def caller_level() -> int:
    """`stacklevel` of the innermost frame that is neither ours nor JAX's: lowering runs deep inside
    JAX."""
    level, frame = 1, sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("fa4_jax", "jax"):
        level, frame = level + 1, frame.f_back
    return level


class Extras(NamedTuple):
    """Operands of a call beside q, k, v. Dimensions of `bias` and `mask` may be 1, to broadcast."""

    bias: Array | None = None
    """[B, N, T, S], added to the scaled logits. Differentiable."""
    mask: Array | None = None
    """bool [B, N, T, S], True where a query may see a key."""
    kv_start: Array | None = None
    """int32 [B, T]: query i sees keys j >= kv_start[b, i]. `_intervals` says what holds for it."""
    kv_end: Array | None = None
    """int32 [B, T]: query i sees keys j < kv_end[b, i]. Given if and only if `kv_start` is."""
    sinks: Array | None = None
    """[N] or [B, N], in any floating dtype: a logit of each head that has no value.
    Differentiable."""


NO_EXTRAS = Extras()

Accumulators = tuple[Array, Array, Array | None]
"""Of dk, dv and dbias."""


@jit(static_argnums=0)
def forward(
    spec: AttentionSpec, q: Array, k: Array, v: Array, extras: Extras = NO_EXTRAS
) -> tuple[Array, Array]:
    """out [B, T, N, V] in q's dtype and lse [B, N, T] in float32 (float64 for float64 inputs).

    q [B, T, N, D], k [B, S, K, D], v [B, S, K, V]; B may be symbolic.
    """
    q, k, v, extras = match_varying((q, k, v, extras))
    batch, seqlen_q, heads, _ = q.shape
    if is_empty(q, k):
        out = jnp.zeros((batch, seqlen_q, heads, v.shape[-1]), q.dtype)
        lse = jnp.full((batch, heads, seqlen_q), -jnp.inf, lse_dtype(q.dtype))
        if extras.sinks is not None:
            lse = jnp.maximum(lse, extras.sinks.astype(lse.dtype)[..., None])
        return match_varying((out, lse), like=q)
    blocks = _Blocks.of(spec, q, k, v, extras)

    def block_row(i: Array) -> tuple[Array, Array]:
        q_i = blocks.rows(blocks.q, i)

        def step(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            row_max, row_sum, acc = carry
            logits, _ = blocks.logits(q_i, i, j)
            new_max = jnp.maximum(row_max, logits.max(-1))
            # A row that has seen no key yet has -inf for its maximum: 0 instead avoids inf - inf.
            shift = jnp.where(new_max == -jnp.inf, 0, new_max)
            p = jnp.exp(logits - shift[..., None])
            rescale = jnp.exp(row_max - shift)
            pv = blocks.matmul("bkgts,bksv->bkgtv", p.astype(v.dtype), blocks.columns(blocks.v, j))
            return new_max, row_sum * rescale + p.sum(-1), acc * rescale[..., None] + pv

        # Made from q, zeros are sharded and vary over a mesh as q does, which a loop carry has to.
        zeros = jnp.zeros_like(q_i[..., 0], blocks.acc_dtype)
        init = (
            zeros - jnp.inf,
            zeros,
            jnp.broadcast_to(zeros[..., None], (*zeros.shape, v.shape[-1])),
        )
        row_max, row_sum, acc = lax.fori_loop(*blocks.column_range(i), step, init)
        if blocks.sinks is not None:
            highest = jnp.maximum(row_max, blocks.sinks)
            shift = jnp.where(highest == -jnp.inf, 0, highest)
            rescale = jnp.exp(row_max - shift)
            row_sum = row_sum * rescale + jnp.exp(blocks.sinks - shift)
            row_max, acc = highest, acc * rescale[..., None]
        seen = row_sum > 0
        safe_sum = jnp.where(seen, row_sum, 1)
        out = acc / safe_sum[..., None]
        lse = jnp.where(seen, row_max + jnp.log(safe_sum), -jnp.inf)
        if blocks.kv_start is not None:
            broken = blocks.interval_rows(blocks.kv_start, i) == BROKEN
            out, lse = jnp.where(broken[..., None], jnp.nan, out), jnp.where(broken, jnp.nan, lse)
        return out.astype(q.dtype), lse

    out, lse = lax.map(block_row, jnp.arange(blocks.num_rows))
    return blocks.join_rows(out), _join(lse, 3, seqlen_q).reshape(batch, heads, seqlen_q)


@jit(static_argnums=0)
def backward(
    spec: AttentionSpec,
    operands: tuple[Array, Array, Array],
    residuals: tuple[Array, Array],
    cotangents: tuple[Array, Array],
    extras: Extras = NO_EXTRAS,
) -> tuple[Array, Array, Array, Array | None]:
    """dq, dk, dv and dbias (None without a bias), in the dtypes of what they are gradients of.

    `operands` (q, k, v), `residuals` (out, lse) and `cotangents` (dout, dlse) are shaped as in
    `forward`. Sinks are in lse already, and their own gradient is `_autodiff`'s.
    """
    operands, residuals, cotangents, extras = match_varying(
        (operands, residuals, cotangents, extras)
    )
    (q, k, v), (out, lse), (dout, dlse) = operands, residuals, cotangents
    if is_empty(q, k):
        zeros = tree.map(jnp.zeros_like, (*operands, extras.bias))
        return match_varying(zeros, like=q)

    blocks = _Blocks.of(spec, q, k, v, extras)
    # d logits = p (dp - dpsum), where dpsum gathers both ways in which a row's sum matters.
    dpsum = (
        jnp.einsum("btnv,btnv->bnt", out.astype(blocks.acc_dtype), dout.astype(blocks.acc_dtype))
        - dlse
    )
    dout, dpsum = blocks.split_rows(dout), blocks.split_stats(dpsum)
    # A row that sees no key has only -inf logits: any finite lse makes its probabilities 0.
    lse = blocks.split_stats(jnp.where(lse == -jnp.inf, 0, lse))

    def block_row(carry: Accumulators, i: Array) -> tuple[Accumulators, Array]:
        q_i, dout_i = blocks.rows(blocks.q, i), blocks.rows(dout, i)
        lse_i, dpsum_i = (
            lax.dynamic_slice_in_dim(x, i * blocks.tile_m, blocks.tile_m, 3) for x in (lse, dpsum)
        )

        def step(
            j: Array, carry: tuple[Array, Array, Array, Array | None]
        ) -> tuple[Array, Array, Array, Array | None]:
            dq_i, dk, dv, dbias = carry
            k_j, v_j = blocks.columns(blocks.k, j), blocks.columns(blocks.v, j)
            logits, dcap = blocks.logits(q_i, i, j)
            p = jnp.exp(logits - lse_i[..., None])
            dp = blocks.matmul("bkgtv,bksv->bkgts", dout_i, v_j)
            ds = p * (dp - dpsum_i[..., None]) * dcap
            ds_io = ds.astype(q.dtype)
            dq_i += blocks.matmul("bkgts,bksd->bkgtd", ds_io, k_j)
            dk = blocks.add_columns(dk, j, blocks.matmul("bkgts,bkgtd->bksd", ds_io, q_i))
            dv = blocks.add_columns(
                dv, j, blocks.matmul("bkgts,bkgtv->bksv", p.astype(dout.dtype), dout_i)
            )
            return dq_i, dk, dv, blocks.add_bias(dbias, i, j, ds)

        dq_i = jnp.zeros_like(q_i, blocks.acc_dtype)
        dq_i, dk, dv, dbias = lax.fori_loop(*blocks.column_range(i), step, (dq_i, *carry))
        return (dk, dv, dbias), (dq_i * spec.softmax_scale).astype(q.dtype)

    def zeros_like(x: Array) -> Array:
        return jnp.zeros_like(x, blocks.acc_dtype)

    accumulators = tree.map(zeros_like, (blocks.k, blocks.v, blocks.bias))
    (dk, dv, dbias), dq = lax.scan(block_row, accumulators, jnp.arange(blocks.num_rows))
    return (
        blocks.join_rows(dq),
        blocks.join_columns(dk * spec.softmax_scale, k.dtype),
        blocks.join_columns(dv, v.dtype),
        None if extras.bias is None else _join_bias(dbias, extras.bias),
    )


def lse_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of logits, sums and lse for inputs of `dtype`."""
    return jnp.promote_types(dtype, jnp.float32)


def is_empty(q: Array, k: Array) -> bool:
    """Whether B, T or S is 0, so that there is nothing to compute. A symbolic B is >= 1."""
    return any(type(size) is int and size == 0 for size in (*q.shape[:2], k.shape[1]))


class _Blocks(NamedTuple):
    """One problem, padded to whole blocks, with grouped query heads beside their key/value head."""

    spec: AttentionSpec
    seqlen_q: int
    seqlen_k: int
    tile_m: int
    tile_n: int
    q: Array  # [B, K, G, rows, D]
    k: Array  # [B, K, columns, D]
    v: Array  # [B, K, columns, V]
    bias: Array | None  # [B, K, G, rows, columns], any of them 1
    mask: Array | None  # likewise
    kv_start: Array | None  # [B, rows]
    kv_end: Array | None  # [B, rows]
    sinks: Array | None  # [K, G, 1], or [B, K, G, 1]

    @classmethod
    def of(cls, spec: AttentionSpec, q: Array, k: Array, v: Array, extras: Extras) -> _Blocks:
        seqlen_q, seqlen_k = q.shape[1], k.shape[1]
        tile_m, tile_n = max(1, min(BLOCK, seqlen_q)), max(1, min(BLOCK, seqlen_k))
        heads = (k.shape[2], q.shape[2] // k.shape[2])
        rows, columns = round_up(seqlen_q, tile_m), round_up(seqlen_k, tile_n)

        def scores(x: Array | None) -> Array | None:
            if x is None:
                return None
            grouped = x.reshape(x.shape[0], *(heads if x.shape[1] != 1 else (1, 1)), *x.shape[2:])
            return _pad(_pad(grouped, 3, rows, seqlen_q), 4, columns, seqlen_k)

        def interval(x: Array | None) -> Array | None:
            return None if x is None else _pad(x, 1, rows, seqlen_q)

        sinks = extras.sinks
        if sinks is not None:
            sinks = sinks.astype(lse_dtype(q.dtype)).reshape(*sinks.shape[:-1], *heads, 1)
        return cls(
            spec=spec,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            tile_m=tile_m,
            tile_n=tile_n,
            q=_split_rows(q, heads, rows),
            k=_pad(jnp.moveaxis(k, 2, 1), 2, columns, seqlen_k),
            v=_pad(jnp.moveaxis(v, 2, 1), 2, columns, seqlen_k),
            bias=scores(extras.bias),
            mask=scores(extras.mask),
            kv_start=interval(extras.kv_start),
            kv_end=interval(extras.kv_end),
            sinks=sinks,
        )

    @property
    def acc_dtype(self) -> jnp.dtype:
        return lse_dtype(self.q.dtype)

    @property
    def num_rows(self) -> int:
        return self.q.shape[3] // self.tile_m

    @property
    def _has_one_entry(self) -> bool:
        batch = self.q.shape[0]
        return type(batch) is int and batch == 1

    def matmul(self, equation: str, x: Array, y: Array) -> Array:
        return jnp.einsum(equation, x, y, preferred_element_type=self.acc_dtype)

    def rows(self, x: Array, i: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, i * self.tile_m, self.tile_m, 3)

    def columns(self, x: Array, j: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, j * self.tile_n, self.tile_n, 2)

    def add_columns(self, x: Array, j: Array, update: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x, self.columns(x, j) + update, j * self.tile_n, 2)

    def column_range(self, i: Array) -> tuple[Array, Array]:
        """Blocks of columns [first, last) around all that some row of block `i` sees.

        Through the band, and through the interval of an only batch entry, which packed sequences
        have. The bounds of several entries would meet in a collective where a mesh splits the
        batch.
        """
        lower, upper = self.spec.band(self.seqlen_q, self.seqlen_k)
        first_row = i * self.tile_m
        num_columns = self.k.shape[2] // self.tile_n
        first = (first_row + lower) // self.tile_n
        last = (first_row + self.tile_m - 1 + upper) // self.tile_n + 1
        first, last = jnp.clip(first, 0, num_columns), jnp.clip(last, 0, num_columns)
        if self.kv_start is not None and self.kv_end is not None and self._has_one_entry:
            start, end = (self.interval_rows(x, i) for x in (self.kv_start, self.kv_end))
            empty, broken = start == end, start == BROKEN
            # The NaN of a broken row has to meet every key.
            start = jnp.where(broken, 0, jnp.where(empty, self.seqlen_k, start)).min()
            end = jnp.where(broken, self.seqlen_k, jnp.where(empty, 0, end)).max()
            first = jnp.maximum(first, start // self.tile_n)
            last = jnp.minimum(last, (end + self.tile_n - 1) // self.tile_n)
        return first, last

    def logits(self, q_i: Array, i: Array, j: Array) -> tuple[Array, Array | float]:
        """Masked logits [B, K, G, tile_m, tile_n] and their derivative with respect to what is
        capped."""
        x = self.matmul("bkgtd,bksd->bkgts", q_i, self.columns(self.k, j)) * self.spec.softmax_scale
        if self.bias is not None:
            x += self._scores_block(self.bias, i, j)
        dcap = 1.0
        if self.spec.softcap is not None:
            tanh = jnp.tanh(x / self.spec.softcap)
            x, dcap = self.spec.softcap * tanh, 1 - tanh * tanh
        return jnp.where(self._visible(i, j), x, -jnp.inf), dcap

    def _visible(self, i: Array, j: Array) -> Array:
        row = i * self.tile_m + jnp.arange(self.tile_m)[:, None]
        column = j * self.tile_n + jnp.arange(self.tile_n)
        lower, upper = self.spec.band(self.seqlen_q, self.seqlen_k)
        visible = (column >= row + lower) & (column <= row + upper) & (column < self.seqlen_k)
        if self.kv_start is not None and self.kv_end is not None:
            visible &= column >= self.interval_rows(self.kv_start, i)[..., None]
            visible &= column < self.interval_rows(self.kv_end, i)[..., None]
        if self.mask is not None:
            visible &= self._scores_block(self.mask, i, j)
        return visible

    def interval_rows(self, x: Array, i: Array) -> Array:
        """[B, 1, 1, tile_m]: block `i` of `kv_start` or `kv_end`."""
        return lax.dynamic_slice_in_dim(x, i * self.tile_m, self.tile_m, 1)[:, None, None]

    def _scores_block(self, x: Array, i: Array, j: Array) -> Array:
        x = self.rows(x, i) if x.shape[3] != 1 else x
        return (
            lax.dynamic_slice_in_dim(x, j * self.tile_n, self.tile_n, 4) if x.shape[4] != 1 else x
        )

    def add_bias(self, dbias: Array | None, i: Array, j: Array, ds: Array) -> Array | None:
        if dbias is None:
            return None
        block = self._scores_block(dbias, i, j)
        broadcast = tuple(axis for axis in range(5) if block.shape[axis] != ds.shape[axis])
        block += ds.sum(broadcast, keepdims=True)
        start = (
            0,
            0,
            0,
            i * self.tile_m * (dbias.shape[3] != 1),
            j * self.tile_n * (dbias.shape[4] != 1),
        )
        return lax.dynamic_update_slice(dbias, block, start)

    def split_rows(self, x: Array) -> Array:
        """[B, T, N, D] -> [B, K, G, rows, D]."""
        return _split_rows(x, (self.q.shape[1], self.q.shape[2]), self.q.shape[3])

    def split_stats(self, x: Array) -> Array:
        """[B, N, T] -> [B, K, G, rows]."""
        return _pad(
            x.reshape(x.shape[0], *self.q.shape[1:3], self.seqlen_q),
            3,
            self.q.shape[3],
            self.seqlen_q,
        )

    def join_rows(self, x: Array) -> Array:
        """[blocks, B, K, G, tile_m, D] -> [B, T, N, D]."""
        x = jnp.moveaxis(_join(x, 3, self.seqlen_q), 3, 1)
        return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], x.shape[4])

    def join_columns(self, x: Array, dtype: jnp.dtype) -> Array:
        """[B, K, columns, D] -> [B, S, K, D]."""
        return jnp.moveaxis(x[:, :, : self.seqlen_k], 2, 1).astype(dtype)


def _split_rows(x: Array, heads: tuple[int, int], rows: int) -> Array:
    batch, seqlen, _, dim = x.shape
    return _pad(jnp.moveaxis(x.reshape(batch, seqlen, *heads, dim), 1, 3), 3, rows, seqlen)


def _join(x: Array, axis: int, length: int) -> Array:
    """Stacked blocks [blocks, ..., tile, ...] -> [..., length, ...] without the padding."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return lax.slice_in_dim(x, 0, length, axis=axis)


def _join_bias(dbias: Array, bias: Array) -> Array:
    dbias = dbias[..., : bias.shape[2], : bias.shape[3]]
    return dbias.reshape(bias.shape).astype(bias.dtype)


def _pad(x: Array, axis: int, length: int, current: int) -> Array:
    """`x` with zeros appended to `axis`, unless that axis is a broadcast one of size 1."""
    if length == current or x.shape[axis] != current:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - current)
    return jnp.pad(x, widths)
