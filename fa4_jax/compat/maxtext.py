# SPDX-License-Identifier: Apache-2.0
"""Attention for MaxText: a branch of `AttentionOp.apply_attention` (layers/attention_op.py).

    elif self.attention_kernel == "fa4":
      return fa4_jax.compat.maxtext.attention(
          query, key, value, decoder_segment_ids,
          attention_type=self.attention_type, model_mode=model_mode,
          sliding_window_size=self.sliding_window_size,
          chunk_attn_window_size=self.chunk_attn_window_size,
          attn_logits_soft_cap=self.attn_logits_soft_cap, sinks=sinks,
          decoder_segment_ids_kv=decoder_segment_ids_kv, previous_chunk=previous_chunk,
          bidirectional_mask=bidirectional_mask, indexer_mask=indexer_mask,
          compressed_mask=compressed_mask, use_ragged_attention=use_ragged_attention,
          record_max_logits=record_max_logits,
          load_balanced=(self.config.context_parallel_load_balance
                         and self._context_parallel_size() > 1))

Masks are those of MaxText's own `attention: dot_product` path, its definition of them: for training
and prefill, where MaxText's GPU paths drop sliding windows and softcaps. Decoding is refused;
leave that to dot_product.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fa4_jax import _api
from fa4_jax._spec import message, one_of
from fa4_jax.compat._common import refuse

# Of `AttentionType`, with what they let a query see beside segments.
CAUSAL_TYPES = ("global", "mla", "local_sliding", "chunk")
ATTENTION_TYPES = (*CAUSAL_TYPES, "full")
MODEL_MODES = ("train", "prefill")


def attention(  # noqa: PLR0913 - what MaxText knows about a call
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    decoder_segment_ids: ArrayLike | None = None,
    *,
    attention_type: Any = "global",
    model_mode: str = "train",
    sliding_window_size: int | None = None,
    chunk_attn_window_size: int | None = None,
    attn_logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    decoder_segment_ids_kv: ArrayLike | None = None,
    previous_chunk: Any = None,
    bidirectional_mask: Any = None,
    indexer_mask: Any = None,
    compressed_mask: Any = None,
    use_ragged_attention: bool = False,
    record_max_logits: bool = False,
    load_balanced: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, None, None]:
    """softmax(query key^T + mask) value, with MaxText's contract.

    Args:
      query: [B, T, N, D], scaled already.
      key: [B, S, K, D]; N is a multiple of K.
      value: [B, S, K, V].
      decoder_segment_ids: integers [B, T]: a query sees keys with its own id, which have to be
        contiguous (else NaN); none sees a key whose id is negative. 0, MaxText's padding, is an id
        like any other.
      attention_type: an `AttentionType`, or its value. "global" and "mla" are causal,
        "local_sliding" and "chunk" causal in a window or chunk, "full" has no mask but segments.
      model_mode: "train" or "prefill".
      sliding_window_size: w of "local_sliding": a query sees w keys, its own among them.
      chunk_attn_window_size: of "chunk": a query sees keys from the multiple of it before it on.
      attn_logits_soft_cap: `flash_attention`'s softcap; None or 0 for none.
      sinks: floats [N], as in `flash_attention`.
      decoder_segment_ids_kv: integers [B, S]; decoder_segment_ids by default.
      previous_chunk: None: no chunked prefill.
      bidirectional_mask: None.
      indexer_mask: None.
      compressed_mask: None.
      use_ragged_attention: False.
      record_max_logits: False.
      load_balanced: False: positions are in order. `fa4_jax.context_parallel_attention` has other
        orders.
      implementation: as in `flash_attention`.

    Returns:
      (out, None, None): out [B, T, N, V] in query's dtype, normalised, so that there is no maximum
      and no sum to come with it.

    Raises:
      NotImplementedError: decoding, another attention type, or one of the arguments that have to be
        None or False; and as `flash_attention`.
      TypeError, ValueError, LibraryError: as `flash_attention`.
    """
    for name, given in {
        "previous_chunk": previous_chunk is not None,
        "bidirectional_mask": bidirectional_mask is not None,
        "indexer_mask": indexer_mask is not None,
        "compressed_mask": compressed_mask is not None,
        "use_ragged_attention": use_ragged_attention,
        "record_max_logits": record_max_logits,
        "load_balanced": load_balanced,
    }.items():
        if given:
            refuse(name, "one", "None or False", 'set attention: "dot_product" for this model')
    if model_mode not in MODEL_MODES:
        hint = 'decode with attention: "dot_product"'
        refuse("model_mode", repr(model_mode), " or ".join(map(repr, MODEL_MODES)), hint)
    kind = getattr(attention_type, "value", attention_type)
    if kind not in ATTENTION_TYPES:
        expected = f"one of {', '.join(map(repr, ATTENTION_TYPES))}"
        refuse("attention_type", repr(kind), expected, 'set attention: "dot_product"')
    q = _api.as_array("query", query)
    window = (None, None)
    kv_start = None
    if one_of(kind, ATTENTION_TYPES, "attention_type") == "local_sliding":
        window = (_size("sliding_window_size", sliding_window_size) - 1, None)
    if kind == "chunk":
        chunk = _size("chunk_attn_window_size", chunk_attn_window_size)
        rows = jnp.arange(q.shape[1], dtype=jnp.int32) // chunk * chunk
        kv_start = jnp.broadcast_to(rows, q.shape[:2])
    q_ids, kv_ids = _segment_ids(decoder_segment_ids, decoder_segment_ids_kv)
    plan = _api.check(
        q,
        _api.as_array("key", key),
        _api.as_array("value", value),
        softmax_scale=1.0,
        causal=kind in CAUSAL_TYPES,
        window_size=window,
        softcap=attn_logits_soft_cap or None,
        sinks=sinks,
        q_segment_ids=q_ids,
        kv_segment_ids=kv_ids,
        kv_start=kv_start,
        implementation=implementation,
        names={"q": "query", "k": "key", "v": "value"},
    )
    out, _ = plan.run()
    return out, None, None


def _size(name: str, size: int | None) -> int:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(message(name, size, "an int >= 1 for this attention_type"))
    return size


def _segment_ids(q_ids: ArrayLike | None, kv_ids: ArrayLike | None) -> tuple[Any, Any]:
    """Ids such that no query has a negative one of a key's."""
    if q_ids is None:
        if kv_ids is not None:
            expected = "None without decoder_segment_ids"
            raise ValueError(message("decoder_segment_ids_kv", "ids", expected))
        return None, None
    queries = _api.as_array("decoder_segment_ids", q_ids)
    keys = queries if kv_ids is None else _api.as_array("decoder_segment_ids_kv", kv_ids)
    return jnp.maximum(queries, -1), jnp.where(keys < 0, -2, keys).astype(keys.dtype)
