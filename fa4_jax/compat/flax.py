# SPDX-License-Identifier: Apache-2.0
"""Attention for Flax: `attention_fn` of `nnx.MultiHeadAttention` and of
`linen.MultiHeadDotProductAttention`.

    nnx.MultiHeadAttention(..., attention_fn=fa4_jax.compat.flax.attention_fn)
    nnx.MultiHeadAttention(..., attention_fn=fa4_jax.compat.flax.AttentionFn(causal=True))

The second replaces a dense `nn.make_causal_mask`, which the kernels can't take: leave `mask` out.

Flax computes in float32 unless a module has `dtype=jnp.bfloat16`, and float32 runs on the
reference. Give modules that dtype, or `AttentionFn(compute_dtype=jnp.bfloat16)`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fa4_jax import _api
from fa4_jax._spec import message, static_flag
from fa4_jax.compat._common import promote, refuse

# What a default `precision` may be called. Products of 16-bit operands are exact, whatever it is.
_DEFAULT_PRECISIONS = (None, "default", "fastest", "bfloat16", jax.lax.Precision.DEFAULT)


@dataclasses.dataclass(frozen=True)
class AttentionFn:
    """An `attention_fn`, and the masks it has beside the `mask` that a module passes.

    Equal options make equal objects, so that a Flax module with one can be a static argument.

    Attributes:
      causal: query i sees keys j <= i. For self-attention: T has to equal S, but in a decode step,
        T = 1 < S, where the module's `mask` alone says which cached keys there are.
      window_size: `flash_attention`'s; self-attention only, and not in a decode step.
      softcap: `flash_attention`'s.
      compute_dtype: dtype in which attention runs, whatever the module's; the result is cast back.
        None is the module's.
      implementation: `flash_attention`'s: None, "fa4" or "reference".
    """

    causal: bool = False
    window_size: tuple[int | None, int | None] = (None, None)
    softcap: float | None = None
    compute_dtype: Any = None
    implementation: str | None = None

    def __call__(  # noqa: PLR0913 - the arguments of both modules; linen filters them by these names
        self,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        bias: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: ArrayLike | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Callable[..., Any] | None = None,
        attn_weights_value_einsum: Callable[..., Any] | None = None,
        is_causal: bool = False,
    ) -> jax.Array:
        """What `nnx.dot_product_attention` and `linen.dot_product_attention` return, but 0 for a
        query that sees no key, where they average the values.

        Args:
          query: [batch..., T, N, D], any number of batch axes.
          key: [batch..., S, K, D]; N is a multiple of K.
          value: [batch..., S, K, V].
          bias: [batch..., N, T, S] or broadcastable to it: added to the scaled logits. Reference
            only.
          mask: any dtype, shaped as `bias`: non-zero where a query may see a key. Reference only.
          broadcast_dropout: says how to drop out; there is no dropout.
          dropout_rng: as `broadcast_dropout`.
          dropout_rate: 0, unless `deterministic`.
          deterministic: no dropout.
          dtype: of the computation and the result; by default what those of query, key and value
            promote to.
          precision: None or the default, unless the computation is in 16 bits: products of 16-bit
            numbers are exact and are summed in float32.
          module: None. Flax passes one for `sow_weights=True`.
          force_fp32_for_softmax: the softmax is in float32, with or without.
          qk_attn_weights_einsum: None.
          attn_weights_value_einsum: None.
          is_causal: query i sees keys j <= i, in any case and for any T and S.

        Returns:
          [batch..., T, N, V] in `dtype`.

        Raises:
          NotImplementedError: dropout, sown weights, another einsum, or a precision that we don't
            have; and as `flash_attention`.
          TypeError, ValueError, LibraryError: as `flash_attention`.
        """
        if dropout_rate > 0 and not deterministic:
            refuse(
                "dropout_rate",
                dropout_rate,
                "0, or deterministic=True: there is no dropout of attention weights",
                "drop out the attention's output instead",
            )
        if module is not None:
            refuse("module", "one", "None: the weights never exist", "leave sow_weights=True out")
        for name, einsum in (
            ("qk_attn_weights_einsum", qk_attn_weights_einsum),
            ("attn_weights_value_einsum", attn_weights_value_einsum),
        ):
            if einsum is not None:
                refuse(name, einsum, "None", "quantized products need Flax's own attention")
        query, key, value = promote((query, key, value), dtype)
        result_dtype = query.dtype
        if self.compute_dtype is not None:
            query, key, value = promote((query, key, value), self.compute_dtype)
        if precision not in _DEFAULT_PRECISIONS and query.dtype.itemsize > 2:
            refuse(
                "precision",
                precision,
                f"None in {query.dtype.name}",
                "set the jax_default_matmul_precision option, which the reference follows",
            )
        batch = query.shape[:-3]
        window_size = self._window(query.shape[-3], key.shape[-3], mask)
        causal = static_flag(self.causal, "causal") and window_size is not None
        out = _api.dot_product_attention(
            *(x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)),
            bias=_flatten_scores(bias, "bias", batch),
            mask=None if mask is None else _flatten_scores(mask, "mask", batch) != 0,
            is_causal=causal or static_flag(is_causal, "is_causal"),
            local_window_size=window_size,
            softcap=self.softcap,
            implementation=self.implementation,
        )
        return out.reshape(*batch, *out.shape[1:]).astype(result_dtype)

    def _window(
        self, seqlen_q: int, seqlen_k: int, mask: ArrayLike | None
    ) -> tuple[int | None, int | None] | None:
        """`window_size`, or None for a decode step, where positions of q and k aren't aligned."""
        if seqlen_q == seqlen_k or not (self.causal or self.window_size != (None, None)):
            return self.window_size
        lengths = f"T = {seqlen_q}, S = {seqlen_k}"
        if self.window_size != (None, None):
            refuse("window_size", lengths, "self-attention, T = S", "give these calls a dense mask")
        if seqlen_q == 1 and mask is not None:
            return None
        hint = "give a mask and an AttentionFn() that isn't causal"
        raise ValueError(message("causal", lengths, "self-attention or a decode step", hint))


attention_fn = AttentionFn()
"""For modules whose masks, if any, come with their calls. `AttentionFn.__call__` has the
arguments: shapes, dtypes and errors."""


def _flatten_scores(x: ArrayLike | None, name: str, batch: tuple[int, ...]) -> Any:
    """[batch..., N, T, S], or broadcastable to it, with one batch axis."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.ndim > len(batch) + 3:
        expected = f"at most {len(batch) + 3} axes, [batch..., heads, T, S]"
        raise ValueError(message(name, f"shape {x.shape}", expected))
    x = x.reshape(*(1,) * (len(batch) + 3 - x.ndim), *x.shape)
    given, scores = x.shape[: len(batch)], x.shape[len(batch) :]
    if all(size == 1 for size in given):
        return x.reshape(1, *scores)
    if any(size not in (1, full) for size, full in zip(given, batch, strict=True)):
        expected = f"batch axes that broadcast to {batch}"
        raise ValueError(message(name, f"shape {x.shape}", expected))
    return jnp.broadcast_to(x, (*batch, *scores)).reshape(math.prod(batch), *scores)
