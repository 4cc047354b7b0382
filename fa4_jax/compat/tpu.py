# SPDX-License-Identifier: Apache-2.0
"""`jax.experimental.pallas.ops.tpu.flash_attention` on a GPU: change the import.

    from fa4_jax.compat.tpu import BlockSizes, SegmentIds, flash_attention

Layout [B, N, T, D], scale 1 and causal masks aligned top-left, as there. What differs: a query that
sees no key gets 0 rather than the average of the values, segments have to be contiguous (else NaN),
and lengths, head dims and the ratio of heads are any that `fa4_jax.flash_attention` takes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fa4_jax import _api
from fa4_jax._spec import message, static_flag, static_number
from fa4_jax.compat._common import note_ignored, refuse


class SegmentIds(NamedTuple):
    """Which tokens may see each other: those with equal ids.

    Attributes:
      q: integers [B, T].
      kv: integers [B, S], of q's dtype.
    """

    q: ArrayLike
    kv: ArrayLike


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tile sizes of the TPU kernel. Our kernels have their own: these change nothing."""

    block_q: int
    block_k_major: int
    block_k: int
    block_b: int
    block_q_major_dkv: int | None = None
    block_k_major_dkv: int | None = None
    block_k_dkv: int | None = None
    block_q_dkv: int | None = None
    block_k_major_dq: int | None = None
    block_k_dq: int | None = None
    block_q_dq: int | None = None

    @property
    def has_backward_blocks(self) -> bool:
        """Whether every tile size of the backward pass is given."""
        backward = [f.name for f in dataclasses.fields(self)][4:]
        return all(getattr(self, name) is not None for name in backward)

    @classmethod
    def get_default(
        cls, batch_size: int, num_heads: int, q_seq_len: int, kv_len: int, d_model: int
    ) -> BlockSizes:
        """128 throughout, and one batch entry, for any shape."""
        del batch_size, num_heads, q_seq_len, kv_len, d_model
        sizes = {field.name: 128 for field in dataclasses.fields(cls)}
        return cls(**sizes | {"block_b": 1})


def flash_attention(  # noqa: PLR0913 - JAX's arguments
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    ab: ArrayLike | None = None,
    segment_ids: SegmentIds | None = None,
    *,
    causal: bool = False,
    sm_scale: float = 1.0,
    block_sizes: Any = None,
    debug: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(sm_scale (q k^T + ab) + mask) v, as JAX's TPU function of this name.

    Args:
      q: [B, N, T, D].
      k: [B, K, S, D]; N is a multiple of K.
      v: [B, K, S, V].
      ab: bias [B, N, T, S], which `sm_scale` scales, too. Differentiable. Reference only.
      segment_ids: `SegmentIds`, or JAX's: a query sees keys with its own id, which have to be
        contiguous.
      causal: query i sees keys j <= i.
      sm_scale: static number.
      block_sizes: ignored, with an `IgnoredArgumentWarning`.
      debug: False.
      implementation: as in `fa4_jax.flash_attention`.

    Returns:
      [B, N, T, V] in q's dtype.

    Raises:
      NotImplementedError: `debug`; and as `fa4_jax.flash_attention`.
      TypeError, ValueError, LibraryError: as `fa4_jax.flash_attention`.
    """
    if static_flag(debug, "debug"):
        refuse("debug", True, "False", "look at the lowered program instead")
    if block_sizes is not None:
        note_ignored("flash_attention: block_sizes", "the kernels choose their own tiles")
    operands: dict[str, jax.Array] = {}
    for name, x in (("q", q), ("k", k), ("v", v)):
        x = _api.as_array(name, x)
        if x.ndim != 4:
            expected = "rank 4 [batch, heads, length, head_dim]"
            raise ValueError(message(name, f"shape {x.shape}", expected))
        operands[name] = jnp.swapaxes(x, 1, 2)
    bias = None
    if ab is not None:
        bias = _api.as_array("ab", ab)
        batch, seqlen_q, heads, _ = operands["q"].shape
        full = (batch, heads, seqlen_q, operands["k"].shape[1])
        if bias.shape != full:
            raise ValueError(message("ab", f"shape {bias.shape}", f"shape {full}"))
        bias *= static_number(sm_scale, "sm_scale")
    q_ids, kv_ids = (None, None) if segment_ids is None else (segment_ids.q, segment_ids.kv)
    plan = _api.check(
        **operands,
        bias=bias,
        softmax_scale=sm_scale,
        causal=causal,
        q_segment_ids=q_ids,
        kv_segment_ids=kv_ids,
        implementation=implementation,
        names={"softmax_scale": "sm_scale"},
    )
    out, _ = plan.run()
    return jnp.swapaxes(out, 1, 2)
