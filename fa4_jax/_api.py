# SPDX-License-Identifier: Apache-2.0
"""The public calls: signatures, defaults, and every check that needs a shape or a dtype.

A call becomes a `Plan` (arrays in kernel layout, an `AttentionSpec`, checked operands beside q, k
and v, and the reasons why the kernels can't serve it), and a plan runs. ValueError and TypeError
mean that the caller made a mistake; NotImplementedError means that we don't support it, with every
reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fa4_jax import _autodiff, _dispatch, _intervals, _variants
from fa4_jax._autodiff import OneCall
from fa4_jax._intervals import Limits
from fa4_jax._reference import Extras
from fa4_jax._spec import (
    BOTTOM_RIGHT,
    TOP_LEFT,
    AttentionSpec,
    is_numpy,
    message,
    normalise_scale,
    normalise_softcap,
    normalise_window,
    one_of,
    static_flag,
)
from fa4_jax._variants import Kernel

KERNELS = "fa4"
REFERENCE = "reference"
IMPLEMENTATIONS = (None, KERNELS, REFERENCE)

Shape = tuple[Any, ...]
"""Of ints, but for a symbolic batch."""


class SharedOptions(TypedDict, total=False):
    """For type checkers: keywords of both functions. Their meanings are in `flash_attention`."""

    softcap: float | None
    sinks: ArrayLike | None
    q_segment_ids: ArrayLike | None
    kv_segment_ids: ArrayLike | None
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    kv_start: ArrayLike | None
    kv_end: ArrayLike | None
    deterministic: bool
    implementation: str | None


class FlashOptions(SharedOptions, total=False):
    """For type checkers: `flash_attention`'s keywords but `return_lse`, which picks an overload."""

    softmax_scale: float | None
    causal: bool
    causal_alignment: str
    window_size: tuple[int | None, int | None]


class AllFlashOptions(FlashOptions, total=False):
    """For type checkers: all of `flash_attention`'s keywords."""

    return_lse: bool


class VarlenOptions(TypedDict, total=False):
    """For type checkers: `flash_attention_varlen`'s keywords but `return_lse`."""

    softmax_scale: float | None
    causal: bool
    causal_alignment: str
    window_size: tuple[int | None, int | None]
    softcap: float | None
    sinks: ArrayLike | None
    deterministic: bool
    implementation: str | None


class JaxNnOptions(SharedOptions, total=False):
    """For type checkers: `dot_product_attention`'s keywords but `return_residual`."""

    scale: float | None
    is_causal: bool
    local_window_size: int | tuple[int | None, int | None] | None


@overload
def flash_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[FlashOptions],
) -> Array: ...
@overload
def flash_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[FlashOptions],
) -> tuple[Array, Array]: ...
def flash_attention(  # noqa: PLR0913 - the public options of attention; they are bundled right below
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
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
    """Exact attention, softmax(softmax_scale q k^T + mask) v, without the T x S matrix in memory.

    B is the batch size, T and S the query and key lengths, N the query heads, K the key/value heads
    (N is a multiple of K: query head n uses key/value head n // (N // K)), D and V the head dims.
    Differentiable once, in reverse mode, through out and lse.

    A query sees the keys that `causal`, `window_size`, segment ids, lengths, `kv_start` and
    `kv_end` all let it see. One that sees no key gets out 0, lse -inf and zero gradients. T, S or
    B = 0 gives an empty or zero result. Keys and values that a query doesn't see change nothing in
    its row as long as they are finite: 0 times NaN is NaN.

    Integer arrays are traced values and may hold anything: a length or bound outside its range
    means the end of the range.

    Args:
      q: [B, T, N, D], or [T, N, D]. bfloat16 or float16 for the kernels; the reference takes
        float32 and float64 too. Head dims without a kernel are zero-padded to the next that has
        one: it costs that kernel's time and a copy of q, k and v, also in the backward pass.
      k: [B, S, K, D], or [S, K, D]; q's dtype.
      v: [B, S, K, V], or [S, K, V]; q's dtype.
      softmax_scale: static number, finite in float32; any sign. 1 / sqrt(D) by default.
      causal: query i sees keys j <= i + offset; offset is 0, or S - T with "bottom_right".
      causal_alignment: "top_left", as in jax.nn, or "bottom_right", as in FlashAttention. They
        differ if T != S, for `window_size` as well. With lengths, "bottom_right" aligns the ends of
        each sequence: offset is key_value_seq_lengths[b] - query_seq_lengths[b], where a missing
        one is S or T.
      window_size: (left, right): query i sees keys i + offset - left <= j <= i + offset + right.
        Static ints >= 0, both inclusive; None is unbounded. `causal` sets right to 0.
      softcap: static number > 0: logits become softcap * tanh(logits / softcap).
      sinks: floats [N]: one more logit of every row of a head, as it is (neither scaled nor
        capped), without a value: out = sum_j exp(x_j) v_j / (sum_j exp(x_j) + exp(sink)). lse
        includes it, so it is the sink in a row that sees no key. -inf is none. Differentiable.
      q_segment_ids: integers [B, T] (or [T]): query i sees keys whose id equals its own. Any id is
        one like any other, negative ones too; queries whose id no key has see no key, so give
        padding ids that the other side lacks. The keys of an id have to be contiguous: out and lse
        of its queries are NaN where they aren't, and so are gradients. `causal` and `window_size`
        count positions in the whole row, as in TPU flash and splash attention.
      kv_segment_ids: integers [B, S] (or [S]), q_segment_ids' dtype; both or neither.
      query_seq_lengths: integers [B] (or [1]): queries at and beyond a length see no key.
      key_value_seq_lengths: integers [B] (or [1]): keys at and beyond a length aren't seen.
      kv_start: integers [B, T] (or [T]): query i sees no key before kv_start[b, i].
      kv_end: integers [B, T] (or [T]): query i sees no key from kv_end[b, i] on.
        Prefix-LM, causal after prefix[b] keys that every query sees: leave `causal` out and give
        jnp.maximum(jnp.arange(1, T + 1), prefix[:, None]).
      return_lse: return (out, lse).
      deterministic: bitwise repeatable gradients: dq is added up in one order.
      implementation: "fa4" runs the FA4 kernels or raises; "reference" runs `_reference`; None runs
        the kernels where they can serve the call and else the reference, with one `FallbackWarning`
        that names the reasons.

    Returns:
      out [B, T, N, V] in q's dtype; with `return_lse`, also lse [B, N, T], the natural logarithm of
      the sum of exponentiated logits, in float32 (float64 for float64 inputs). Without B if q had
      none.

    Raises:
      TypeError: an argument is the wrong kind of object, or has the wrong kind of dtype.
      ValueError: shapes or values are inconsistent.
      NotImplementedError: the call is consistent but not supported; the message lists all reasons.
      LibraryError: `implementation="fa4"` and the kernel library is missing or broken.
    """
    options = _Options(
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
    out, lse = _plan(_as_arrays(options, q, k, v), options).run()
    return (out, lse) if options.return_lse else out


@overload
def flash_attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[VarlenOptions],
) -> Array: ...
@overload
def flash_attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[VarlenOptions],
) -> tuple[Array, Array]: ...
def flash_attention_varlen(  # noqa: PLR0913 - as flash_attention
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    causal_alignment: str = BOTTOM_RIGHT,
    window_size: tuple[int | None, int | None] = (None, None),
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """`flash_attention` of M sequences of any lengths, packed one after another along one axis.

    Sequence m is queries cu_seqlens_q[m] to cu_seqlens_q[m + 1] (exclusive) and the keys that
    cu_seqlens_k says likewise, and sees nothing else. Lengths may be 0, of queries, keys or both.
    Rows before the first sequence and after the last are padding: out 0, lse -inf, no gradients.

    Args:
      q: [total_q, N, D].
      k: [total_k, K, D].
      v: [total_k, K, V].
      cu_seqlens_q: integers [M + 1], the cumulated lengths, such as [0, 3, 3, 10]; may be traced.
        Values outside [0, total_q] mean the end of that range, and one that is less than its
        predecessor means the predecessor.
      cu_seqlens_k: integers [M + 1]; cu_seqlens_q by default, where total_k is total_q. Leave it
        out for self-attention: causal and window masks are the same band for every sequence then,
        and are skipped by the block.
      softmax_scale: as in `flash_attention`.
      causal: as in `flash_attention`, in each sequence.
      causal_alignment: as in `flash_attention`, but "bottom_right" by default: the last query of
        each sequence is aligned with its last key.
      window_size: as in `flash_attention`, in each sequence.
      softcap: as in `flash_attention`.
      sinks: as in `flash_attention`.
      return_lse: as in `flash_attention`.
      deterministic: as in `flash_attention`.
      implementation: as in `flash_attention`.

    Returns:
      out [total_q, N, V] in q's dtype; with `return_lse`, also lse [N, total_q].

    Raises:
      TypeError, ValueError, NotImplementedError, LibraryError: as `flash_attention`.
    """
    options = _Options(
        softmax_scale=softmax_scale,
        causal=causal,
        causal_alignment=causal_alignment,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        return_lse=return_lse,
        deterministic=deterministic,
        implementation=implementation,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        is_packed=True,
    )
    out, lse = _plan(_as_arrays(options, q, k, v), options).run()
    return (out, lse) if options.return_lse else out


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    return_residual: Literal[False] = False,
    **options: Unpack[JaxNnOptions],
) -> Array: ...
@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    return_residual: Literal[True],
    **options: Unpack[JaxNnOptions],
) -> tuple[Array, Array]: ...
def dot_product_attention(  # noqa: PLR0913 - jax.nn's signature, then ours
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    softcap: float | None = None,
    sinks: ArrayLike | None = None,
    q_segment_ids: ArrayLike | None = None,
    kv_segment_ids: ArrayLike | None = None,
    kv_start: ArrayLike | None = None,
    kv_end: ArrayLike | None = None,
    deterministic: bool = False,
) -> Array | tuple[Array, Array]:
    """`jax.nn.dot_product_attention`, served by `flash_attention`.

    The arguments up to `return_residual` are jax.nn's, with its meanings: causal and window masks
    are aligned top-left. `implementation` takes this package's names (None, "fa4", "reference").
    What else differs on purpose is in the README's table of libraries; above all, a query that sees
    no key gets 0 here, and the average of `value` in jax.nn.

    Args:
      query: [B, T, N, D], or [T, N, D].
      key: [B, S, K, D], or [S, K, D].
      value: [B, S, K, V], or [S, K, V].
      bias: [B, N, T, S] or broadcastable to it, leading axes may be missing: added to the scaled
        logits. Differentiable. Reference only.
      mask: bool, shaped as bias: True where a query may see a key. Reference only.
      scale: `flash_attention`'s softmax_scale.
      is_causal: query i sees keys j <= i.
      query_seq_lengths: as in `flash_attention`.
      key_value_seq_lengths: as in `flash_attention`.
      local_window_size: (left, right), both inclusive; an int w is (w, w).
      implementation: as in `flash_attention`.
      return_residual: return (out, residual): the lse as [B, T, N] (or [T, N]) in query's dtype,
        without a gradient, as in jax.nn. `flash_attention(return_lse=True)` has the differentiable
        fp32 one.
      softcap: as in `flash_attention`; applied after the bias.
      sinks: as in `flash_attention`.
      q_segment_ids: as in `flash_attention`.
      kv_segment_ids: as in `flash_attention`.
      kv_start: as in `flash_attention`.
      kv_end: as in `flash_attention`.
      deterministic: as in `flash_attention`.

    Returns:
      [B, T, N, V] in query's dtype, and the residual if asked for.

    Raises:
      TypeError, ValueError, NotImplementedError, LibraryError: as `flash_attention`.
    """
    is_pair = isinstance(local_window_size, (tuple, list))
    options = _Options(
        softmax_scale=scale,
        causal=is_causal,
        window_size=local_window_size if is_pair else (local_window_size, local_window_size),
        softcap=softcap,
        sinks=sinks,
        q_segment_ids=q_segment_ids,
        kv_segment_ids=kv_segment_ids,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        kv_start=kv_start,
        kv_end=kv_end,
        return_lse=return_residual,
        deterministic=deterministic,
        implementation=implementation,
        bias=bias,
        mask=mask,
        names=_JAX_NN_NAMES,
    )
    out, lse = _plan(_as_arrays(options, query, key, value), options).run()
    if not options.return_lse:
        return out
    return out, jax.lax.stop_gradient(jnp.swapaxes(lse, -1, -2).astype(out.dtype))


def export_disabled_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export(..., disabled_checks=...)` needs to let our custom calls through.

    JAX vouches only for its own targets. Ours carry a version in their name. A process that runs an
    exported program, and lowers none of our calls itself, calls `fa4_jax.register()` first.
    """
    return [
        jax.export.DisabledSafetyCheck.custom_call(_variants.target_name(kernel))
        for kernel in Kernel
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """`flash_attention`'s keywords with their defaults, what the other two functions take beside
    them, and how the caller's function names the arguments."""

    softmax_scale: Any = None
    causal: Any = False
    causal_alignment: Any = TOP_LEFT
    window_size: Any = (None, None)
    softcap: Any = None
    sinks: Any = None
    q_segment_ids: Any = None
    kv_segment_ids: Any = None
    query_seq_lengths: Any = None
    key_value_seq_lengths: Any = None
    kv_start: Any = None
    kv_end: Any = None
    return_lse: Any = False
    deterministic: Any = False
    implementation: Any = None
    bias: Any = None
    mask: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    is_packed: bool = False
    names: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])

    def name(self, argument: str) -> str:
        return self.names.get(argument, argument)


_JAX_NN_NAMES = {
    "q": "query",
    "k": "key",
    "v": "value",
    "softmax_scale": "scale",
    "causal": "is_causal",
    "window_size": "local_window_size",
    "return_lse": "return_residual",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked call. `q`, `k`, `v` have a batch axis; `reasons` say why the kernels can't serve
    it."""

    q: Any
    k: Any
    v: Any
    spec: AttentionSpec
    limits: Limits
    bias: Any
    mask: Any
    sinks: Any
    implementation: str | None
    reasons: tuple[str, ...]
    has_batch: bool

    def run(self) -> tuple[Array, Array]:
        """(out, lse), without the batch axis if the caller's arrays had none."""
        use_kernels = self.use_kernels()
        q, spec = self.folded_scale()
        spec, interval = _intervals.resolve(spec, self.limits, q.shape[1], self.k.shape[1])
        kv_start, kv_end = interval or (None, None)
        extras = Extras(self.bias, self.mask, kv_start, kv_end, self.sinks)
        method = OneCall(spec, use_kernels)
        return self.without_batch(_autodiff.attention(method, q, self.k, self.v, extras))

    def use_kernels(self) -> bool:
        """Whether the primitives run rather than the reference. A reason against it is an error or
        a warning."""
        if self.implementation == REFERENCE:
            _dispatch.tell('reference: implementation="reference"')
            return False
        if self.reasons and self.implementation == KERNELS:
            raise NotImplementedError(
                f'fa4_jax: implementation="fa4" can\'t run this call: {"; ".join(self.reasons)}; '
                "use implementation=None, which falls back to the reference"
            )
        if self.reasons:
            _dispatch.tell(f"reference: {'; '.join(self.reasons)}")
            _dispatch.fall_back(self.reasons)
        return not self.reasons

    def folded_scale(self) -> tuple[Array, AttentionSpec]:
        """q and the spec that kernels take, whose scale is > 0: a sign goes into q, exactly, and
        scale 0 is that of all-zero logits."""
        scale = self.spec.softmax_scale
        if np.float32(scale) > 0:
            return self.q, self.spec
        if np.float32(scale) == 0:
            return jnp.zeros_like(self.q), dataclasses.replace(self.spec, softmax_scale=1.0)
        return -self.q, dataclasses.replace(self.spec, softmax_scale=-scale)

    def without_batch(self, results: tuple[Array, Array]) -> tuple[Array, Array]:
        """(out, lse) with a batch axis if the caller's arrays had one."""
        return results if self.has_batch else (results[0][0], results[1][0])


def check(q: Any, k: Any, v: Any, **options: Any) -> Plan:
    """The plan of a call with `flash_attention`'s keywords."""
    parsed = _Options(**options)
    return _plan(_as_arrays(parsed, q, k, v), parsed)


def _plan(operands: tuple[Array, Array, Array], options: _Options) -> Plan:
    """Check everything, once."""
    _check_operands(options, *operands)
    has_batch = len(operands[0].shape) == 4
    q, k, v = operands if has_batch else (x[None] for x in operands)
    one_of(options.implementation, IMPLEMENTATIONS, "implementation")
    one_of(options.causal_alignment, (TOP_LEFT, BOTTOM_RIGHT), "causal_alignment")
    causal = static_flag(options.causal, options.name("causal"))
    static_flag(options.return_lse, options.name("return_lse"))
    window_left, window_right = normalise_window(
        options.window_size, causal, options.name("window_size")
    )
    is_band = window_left is not None or window_right is not None
    spec = AttentionSpec(
        softmax_scale=normalise_scale(
            options.softmax_scale, q.shape[-1], options.name("softmax_scale")
        ),
        window_left=window_left,
        window_right=window_right,
        alignment=options.causal_alignment if is_band else TOP_LEFT,
        softcap=normalise_softcap(options.softcap),
        deterministic=static_flag(options.deterministic, "deterministic"),
        require_kernel=options.implementation == KERNELS,
    )
    arrays = _Arrays(options, q, k, has_batch)
    head_dims = q.shape[-1], v.shape[-1]
    reasons = _dispatch.missing_kernels(_dispatch.FORWARD_KERNELS, q.dtype, head_dims)
    reasons += tuple(
        f"{name} isn't in the kernels yet"
        for name in ("bias", "mask")
        if getattr(options, name) is not None
    )
    return Plan(
        q=q,
        k=k,
        v=v,
        spec=spec,
        limits=arrays.limits(),
        bias=arrays.scores("bias"),
        mask=arrays.scores("mask"),
        sinks=arrays.sinks(),
        implementation=options.implementation,
        reasons=reasons,
        has_batch=has_batch,
    )


def _as_arrays(options: _Options, q: Any, k: Any, v: Any) -> tuple[Array, Array, Array]:
    names = map(options.name, "qkv")
    q, k, v = map(as_array, names, (q, k, v))
    return q, k, v


def as_array(name: str, x: Any) -> Array:
    """`x`, called `name` in errors, as JAX's array. Lists and numbers aren't taken for arrays."""
    if isinstance(x, jax.Array):
        return x
    is_numeric = is_numpy(x) and x.dtype.kind not in "OSUMm"
    if not (is_numeric or hasattr(x, "__jax_array__")):
        kind = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
        got = f"numpy.ndarray of {x.dtype}" if is_numpy(x) else kind
        raise TypeError(message(name, got, "a jax.Array or a numeric numpy.ndarray"))
    return jnp.asarray(x)


def _check_operands(options: _Options, q: Array, k: Array, v: Array) -> None:
    """dtypes, ranks and shapes of q, k, v, before anything is done with them."""
    names = tuple(map(options.name, "qkv"))
    for name, x in zip(names, (q, k, v), strict=True):
        _check_dtype(name, x.dtype)
        if options.is_packed and len(x.shape) != 3:
            expected = "rank 3 [total length, heads, head_dim]"
            raise ValueError(message(name, f"rank {len(x.shape)}, shape {x.shape}", expected))
        if len(x.shape) not in (3, 4):
            expected = "rank 4 [batch, length, heads, head_dim] or rank 3 without batch"
            raise ValueError(message(name, f"rank {len(x.shape)}, shape {x.shape}", expected))
    for name, x in zip(names[1:], (k, v), strict=True):
        if x.dtype != q.dtype:
            raise ValueError(
                message(name, f"dtype {x.dtype.name}", f"{names[0]}'s dtype {q.dtype.name}")
            )
        if len(x.shape) != len(q.shape):
            shapes = f"rank {len(x.shape)}, shape {x.shape}"
            raise ValueError(
                message(name, shapes, f"{names[0]}'s rank {len(q.shape)} (shape {q.shape})")
            )
    _check_shapes(names, q.shape, k.shape, v.shape)


def _check_dtype(name: str, dtype: Any) -> None:
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(message(name, f"dtype {dtype}", "a floating dtype", "cast to bfloat16"))
    if dtype.itemsize < 2:
        raise NotImplementedError(
            message(
                name,
                f"dtype {dtype.name}",
                "bfloat16, float16, float32 or float64",
                "cast to bfloat16",
            )
        )


def _check_shapes(names: tuple[str, ...], q: Shape, k: Shape, v: Shape) -> None:
    q_name, k_name, v_name = names

    def same(
        name: str, shape: Shape, axis: int, other_name: str, other: Shape, dimension: str
    ) -> None:
        if shape[axis] != other[axis]:
            expected = f"{dimension} {other[axis]} as in {other_name}, shape {other}"
            raise ValueError(message(name, f"{dimension} {shape[axis]} in shape {shape}", expected))

    for name, shape in zip(names, (q, k, v), strict=True):
        if any(isinstance(size, int) and size > _variants.MAX_DIMENSION for size in shape):
            raise ValueError(
                message(name, f"shape {shape}", f"dimensions <= {_variants.MAX_DIMENSION}")
            )
        if not all(isinstance(size, int) for size in shape[-3:]):
            raise NotImplementedError(
                message(
                    name,
                    f"shape {shape}",
                    "static length, heads and head_dim",
                    "only batch may be symbolic",
                )
            )
        for axis, dimension in ((-2, "heads"), (-1, "head_dim")):
            if shape[axis] == 0:
                raise ValueError(
                    message(name, f"{dimension} 0 in shape {shape}", f"{dimension} >= 1")
                )
    if len(q) == 4:
        same(k_name, k, 0, q_name, q, "batch size")
        same(v_name, v, 0, q_name, q, "batch size")
    same(k_name, k, -1, q_name, q, "head_dim")
    same(v_name, v, -3, k_name, k, "length")
    same(v_name, v, -2, k_name, k, "heads")
    if q[-2] % k[-2]:
        expected = f"a multiple of {k_name}'s {k[-2]} heads, shape {k}"
        raise ValueError(message(q_name, f"{q[-2]} heads in shape {q}", expected))


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """Checks the arrays of a call beside q, k and v, and brings them into one form."""

    options: _Options
    q: Array
    k: Array
    has_batch: bool

    def limits(self) -> Limits:
        """What says, with values, which keys a query may see."""
        batch, seqlen_q, seqlen_k = *self.q.shape[:2], self.k.shape[1]
        q_ids, kv_ids = self._segment_ids((batch, seqlen_q), (batch, seqlen_k))
        cu_seqlens_q, cu_seqlens_k = self._cu_seqlens(seqlen_q, seqlen_k)
        return Limits(
            kv_start=self._bounds("kv_start", (batch, seqlen_q), self.has_batch),
            kv_end=self._bounds("kv_end", (batch, seqlen_q), self.has_batch),
            q_segment_ids=q_ids,
            kv_segment_ids=kv_ids,
            query_seq_lengths=self._bounds("query_seq_lengths", (batch,)),
            key_value_seq_lengths=self._bounds("key_value_seq_lengths", (batch,)),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )

    def scores(self, name: str) -> Any:
        """`bias` or `mask`: broadcastable to [B, N, T, S] axis by axis, with its four axes."""
        x = self._array(name)
        if x is None:
            return None
        kind, kind_name = (
            (np.bool_, "bool") if name == "mask" else (jnp.floating, "a floating dtype")
        )
        if not jnp.issubdtype(x.dtype, kind):
            raise TypeError(message(name, f"dtype {x.dtype}", kind_name))
        if len(x.shape) < 4:
            x = x.reshape(*(1,) * (4 - len(x.shape)), *x.shape)
        batch, seqlen_q, heads, _ = self.q.shape
        full = (batch, heads, seqlen_q, self.k.shape[1])
        if len(x.shape) != 4 or any(a not in (1, b) for a, b in zip(x.shape, full, strict=True)):
            expected = f"{full if self.has_batch else full[1:]} or 1 in place of a size"
            raise ValueError(message(name, f"shape {x.shape}", expected))
        return x

    def sinks(self) -> Any:
        """Floats [N]."""
        x = self._array("sinks")
        if x is not None:
            _check_dtype("sinks", x.dtype)
            expected = f"({self.q.shape[2]},), one for each query head"
            self._check_shape("sinks", x, (self.q.shape[2],), expected)
        return x

    def _segment_ids(self, q_shape: Shape, kv_shape: Shape) -> tuple[Any, Any]:
        names = ("q_segment_ids", "kv_segment_ids")
        given = [name for name in names if getattr(self.options, name) is not None]
        if not given:
            return None, None
        if len(given) == 1:
            (missing,) = set(names) - set(given)
            raise ValueError(
                message(missing, "None", f"ids, as {given[0]} has them", "pass both or neither")
            )
        q_ids, kv_ids = (
            self._integers(name, self._ids(name), shape, self.has_batch)
            for name, shape in zip(names, (q_shape, kv_shape), strict=True)
        )
        if q_ids.dtype != kv_ids.dtype:
            expected = f"q_segment_ids' dtype {q_ids.dtype}"
            raise ValueError(message("kv_segment_ids", f"dtype {kv_ids.dtype}", expected))
        return q_ids, kv_ids

    def _ids(self, name: str) -> Any:
        value, x = getattr(self.options, name), self._array(name)
        # Where 64-bit types are off, JAX wraps around, and two ids become one.
        if is_numpy(value) and not np.array_equal(value, value.astype(x.dtype)):
            raise ValueError(
                message(name, f"{value.dtype} ids that {x.dtype} can't hold", f"{x.dtype} ids")
            )
        return x

    def _cu_seqlens(self, seqlen_q: int, seqlen_k: int) -> tuple[Any, Any]:
        if not self.options.is_packed:
            return None, None
        cu_seqlens_q = as_array("cu_seqlens_q", self.options.cu_seqlens_q)
        if len(cu_seqlens_q.shape) != 1 or not cu_seqlens_q.shape[0]:
            expected = "shape (M + 1,) for M sequences"
            raise ValueError(message("cu_seqlens_q", f"shape {cu_seqlens_q.shape}", expected))
        if self.options.cu_seqlens_k is None and seqlen_q != seqlen_k:
            hint = f"cu_seqlens_q's sequences have {seqlen_q} rows and k has {seqlen_k}"
            raise ValueError(message("cu_seqlens_k", "None", "the sequences of k and v", hint))
        shape = cu_seqlens_q.shape
        return self._bounds("cu_seqlens_q", shape), self._bounds("cu_seqlens_k", shape)

    def _bounds(self, name: str, shape: Shape, has_batch: bool = True) -> Any:
        """Integers of `shape` as int32 >= 0; whoever reads them knows what they mustn't exceed."""
        value = getattr(self.options, name)
        if is_numpy(value) and value.dtype.kind in "iu":
            value = _clip(np, value)
        if value is None:
            return None
        x = self._integers(name, as_array(name, value), shape, has_batch)
        return _clip(jnp, x)

    def _integers(self, name: str, x: Any, shape: Shape, has_batch: bool) -> Any:
        """`x`, checked and with a batch axis; `shape` has one, whether the call's arrays do or
        not."""
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(message(name, f"dtype {x.dtype}", "an integer dtype"))
        expected = shape if has_batch else shape[1:]
        self._check_shape(name, x, expected, f"{expected}")
        return x.reshape(shape)

    def _check_shape(self, name: str, x: Any, shape: Shape, expected: str) -> None:
        if x.shape != shape:
            raise ValueError(message(name, f"shape {x.shape}", f"shape {expected}"))

    def _array(self, name: str) -> Any:
        value = getattr(self.options, name)
        return None if value is None else as_array(name, value)


def _clip(xp: Any, x: Any) -> Any:
    """`x` as int32 in [0, 2^31 - 1]. On NumPy arrays before JAX has them: it would wrap int64
    around."""
    bound = min(np.iinfo(np.int32).max, np.iinfo(x.dtype).max)
    return xp.clip(x, 0, bound).astype(np.int32)
