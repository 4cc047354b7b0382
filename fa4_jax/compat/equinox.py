# SPDX-License-Identifier: Apache-2.0
"""Attention for Equinox: `MultiheadAttention`, with the interface and parameters of
`eqx.nn.MultiheadAttention`.

As there, a call is about one sequence, and `jax.vmap` makes a batch of them. Its heads stay
together in one call of `flash_attention`, so that grouped queries share their keys and values,
under `vmap` too.

Equinox's parameters are float32 unless `dtype=jnp.bfloat16` is given, and float32 runs on the
reference. Give that dtype, or `compute_dtype=jnp.bfloat16`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fa4_jax import _api
from fa4_jax._spec import message
from fa4_jax.compat._common import promote, refuse

ProcessHeads = Callable[[Array, Array, Array], tuple[Array, Array, Array]]
"""From (query, key, value) heads, [T, N, D], [S, K, D] and [S, K, V], to arrays of the same shapes.
"""


class CallOptions(TypedDict, total=False):
    """For type checkers: `flash_attention`'s keywords that a call takes, with its meanings."""

    causal: bool
    causal_alignment: str
    window_size: tuple[int | None, int | None]
    softcap: float | None
    sinks: ArrayLike | None
    q_segment_ids: ArrayLike | None
    kv_segment_ids: ArrayLike | None
    kv_start: ArrayLike | None
    kv_end: ArrayLike | None
    implementation: str | None


class MultiheadAttention(eqx.nn.MultiheadAttention):
    """`eqx.nn.MultiheadAttention` whose attention is `flash_attention`.

    An instance of Equinox's class, with the same fields and so the same parameters: models that are
    saved with one load with the other, and `from_equinox` turns one into the other.

    Attributes:
      num_kv_heads: key/value heads, of which `num_heads` is a multiple; fields `key_proj` and
        `value_proj` project to so many.
      compute_dtype: dtype in which attention runs, whatever that of the projections; the result is
        cast back. None is theirs.
    """

    num_kv_heads: int = eqx.field(static=True)
    compute_dtype: Any = eqx.field(static=True)

    def __init__(  # noqa: PLR0913 - Equinox's arguments, then ours
        self,
        num_heads: int,
        query_size: int,
        key_size: int | None = None,
        value_size: int | None = None,
        output_size: int | None = None,
        qk_size: int | None = None,
        vo_size: int | None = None,
        use_query_bias: bool = False,
        use_key_bias: bool = False,
        use_value_bias: bool = False,
        use_output_bias: bool = False,
        dropout_p: float = 0.0,
        inference: bool = False,
        dtype: Any = None,
        *,
        num_kv_heads: int | None = None,
        compute_dtype: Any = None,
        key: Array,
    ):
        """Equinox's arguments, with its meanings and, for the same `key`, its parameters.

        Args:
          num_heads: N, query heads.
          query_size: channels of the query.
          key_size: channels of the key; query_size by default.
          value_size: channels of the value; query_size by default.
          output_size: channels of the result; query_size by default.
          qk_size: D, the head dim of query and key; query_size // num_heads by default.
          vo_size: V, the head dim of value; query_size // num_heads by default.
          use_query_bias: whether the query's projection has a bias.
          use_key_bias: whether the key's projection has a bias.
          use_value_bias: whether the value's projection has a bias.
          use_output_bias: whether the output's projection has a bias.
          dropout_p: probability; calls raise unless it is 0 or they are inference.
          inference: no dropout.
          dtype: of the parameters; JAX's default floating dtype by default.
          num_kv_heads: K, key/value heads; num_heads by default.
          compute_dtype: see the attribute.
          key: a `jax.random` key for the initial parameters.

        Raises:
          ValueError: num_heads isn't a multiple of num_kv_heads.
        """
        super().__init__(
            num_heads,
            query_size,
            key_size,
            value_size,
            output_size,
            qk_size,
            vo_size,
            use_query_bias,
            use_key_bias,
            use_value_bias,
            use_output_bias,
            dropout_p,
            inference,
            dtype,
            key=key,
        )
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.compute_dtype = compute_dtype
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            expected = f"a divisor of num_heads {num_heads}"
            raise ValueError(message("num_kv_heads", num_kv_heads, expected))
        if self.num_kv_heads != num_heads:
            _, key_key, value_key, _ = jax.random.split(key, 4)
            self.key_proj = _of_heads(self.key_proj, self.num_kv_heads * self.qk_size, key_key)
            self.value_proj = _of_heads(
                self.value_proj, self.num_kv_heads * self.vo_size, value_key
            )

    @classmethod
    def from_equinox(
        cls, module: eqx.nn.MultiheadAttention, compute_dtype: Any = None
    ) -> MultiheadAttention:
        """`module`, with its very parameters, but with our attention.

        Args:
          module: Equinox's module, for instance found in a model by `eqx.tree_at`.
          compute_dtype: see the attribute.
        """
        self = object.__new__(cls)
        for name, value in vars(module).items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "num_kv_heads", module.num_heads)
        object.__setattr__(self, "compute_dtype", compute_dtype)
        return self

    def __call__(
        self,
        query: Array,
        key_: Array,
        value: Array,
        mask: Array | None = None,
        *,
        key: Array | None = None,
        inference: bool | None = None,
        deterministic: bool | None = None,
        process_heads: ProcessHeads | None = None,
        **options: Unpack[CallOptions],
    ) -> Array:
        """What Equinox's module returns, but a query that sees no key sees 0, where Equinox
        averages the values.

        Args:
          query: [T, query_size].
          key_: [S, key_size].
          value: [S, value_size].
          mask: bool [T, S] or [N, T, S], True where a query may see a key. Reference only: for
            causal and other masks of `flash_attention`, give its keywords instead.
          key: for dropout; there is none.
          inference: no dropout; by default the module's.
          deterministic: Equinox's old name for `inference`.
          process_heads: changes the projected heads, for instance by a rotary embedding.
          **options: keywords of `flash_attention`, such as `causal=True`: see `CallOptions`.

        Returns:
          [T, output_size].

        Raises:
          NotImplementedError: dropout; `mask` together with `causal_alignment`; and as
            `flash_attention`.
          TypeError, ValueError, LibraryError: as `flash_attention`.
        """
        if deterministic is not None:
            inference = deterministic
            warnings.warn(
                "fa4_jax: deterministic is Equinox's deprecated name for inference", stacklevel=2
            )
        if not (self.dropout.inference if inference is None else inference):
            self._refuse_dropout()
        heads = (
            _project(self.query_proj, query, self.num_heads),
            _project(self.key_proj, key_, self.num_kv_heads),
            _project(self.value_proj, value, self.num_kv_heads),
        )
        if process_heads is not None:
            shapes = [x.shape for x in heads]
            heads = process_heads(*heads)
            got = [x.shape for x in heads]
            if got != shapes:
                raise ValueError(message("process_heads", f"shapes {got}", f"{shapes} again"))
        result_dtype = jnp.result_type(*heads)
        heads = promote(heads, self.compute_dtype)
        if mask is None:
            out = _api.flash_attention(*heads, **options)
        else:
            out = self._masked(heads, mask, options)
        return jax.vmap(self.output_proj)(out.reshape(len(out), -1).astype(result_dtype))

    def _refuse_dropout(self) -> None:
        p = self.dropout.p
        if not (isinstance(p, (int, float)) and p == 0):
            refuse(
                "dropout_p",
                p,
                "0, or inference=True: there is no dropout of attention weights",
                "drop out the module's output instead",
            )

    def _masked(self, heads: tuple[Array, ...], mask: Array, options: CallOptions) -> Array:
        """By the function that takes dense masks, under its names."""
        query, key_, _ = heads
        full = (len(query), len(key_))
        if mask.shape not in (full, (self.num_heads, *full)):
            expected = f"{full} or {(self.num_heads, *full)}"
            raise ValueError(message("mask", f"shape {mask.shape}", expected))
        given: dict[str, Any] = dict(options)
        if given.pop("causal_alignment", "top_left") != "top_left":
            expected = '"top_left" with a mask'
            refuse("causal_alignment", "another", expected, "say it all in the mask")
        renamed = {"causal": "is_causal", "window_size": "local_window_size"}
        given = {renamed.get(name, name): value for name, value in given.items()}
        return _api.dot_product_attention(*heads, mask=mask, **given)


def _of_heads(proj: eqx.nn.Linear, size: int, key: Array) -> eqx.nn.Linear:
    """`proj`, initialised again, to `size` outputs."""
    dtype = proj.weight.dtype
    return eqx.nn.Linear(proj.in_features, size, proj.use_bias, dtype=dtype, key=key)


def _project(proj: eqx.nn.Linear, x: Array, heads: int) -> Array:
    """[T, channels] to [T, heads, head_dim]."""
    return jax.vmap(proj)(x).reshape(len(x), heads, -1)
