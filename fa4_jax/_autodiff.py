# SPDX-License-Identifier: Apache-2.0
"""The derivative: which residuals the forward keeps, and which implementation the backward runs.

Residuals are (q, k, v, out, lse). out and lse are named "context", inside the rule and on the very
values that become residuals, so that `jax.checkpoint(policy=save_only_these_names("context"))`
keeps them and runs one forward a step. `optimize_remat` would lose the names and `symbolic_zeros`
breaks under `jax.checkpoint`, so neither is used; an unused lse therefore brings a zero cotangent,
[B, N, T] in fp32.

Reverse mode, once. Forward mode and second derivatives raise JAX's own errors.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from fa4_jax import _primitives, _reference
from fa4_jax._reference import NO_EXTRAS, Extras
from fa4_jax._sharding import match_sharding
from fa4_jax._spec import AttentionSpec
from fa4_jax._varying import match_varying

CHECKPOINT_NAME = "context"


def attention(
    spec: AttentionSpec, use_kernels: bool, q: Array, k: Array, v: Array, extras: Extras = NO_EXTRAS
) -> tuple[Array, Array]:
    """out [B, T, N, V] and lse [B, N, T], differentiable in q, k, v, `extras.bias` and
    `extras.sinks`.

    `use_kernels` binds the primitives, which take neither a bias nor a mask; otherwise the
    reference runs.
    """
    return _attention(spec, use_kernels, *match_varying((q, k, v, extras)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    spec: AttentionSpec, use_kernels: bool, q: Array, k: Array, v: Array, extras: Extras
):
    if use_kernels:
        return tuple(_primitives.forward(spec, q, k, v, extras))
    return _reference.forward(spec, q, k, v, extras)


def _attention_fwd(
    spec: AttentionSpec, use_kernels: bool, q: Array, k: Array, v: Array, extras: Extras
):
    # Not a call of `_attention`: the names have to be on the values saved here.
    if use_kernels:
        out, lse = _primitives.forward(spec, q, k, v, extras)
    else:
        out, lse = _reference.forward(spec, q, k, v, extras)
    out, lse = (checkpoint_name(x, CHECKPOINT_NAME) for x in (out, lse))
    return (out, lse), (q, k, v, out, lse, extras)


def _attention_bwd(
    spec: AttentionSpec, use_kernels: bool, residuals, cotangents: tuple[Array, Array]
):
    q, k, v, out, lse, extras = residuals
    dout, dlse = cotangents
    # lse is the constant -inf in a row that sees no key, whatever its cotangent says.
    dlse = jnp.where(lse == -jnp.inf, 0, dlse)
    (q, k, v, out, lse, extras), (dout, dlse) = match_varying((residuals, (dout, dlse)))
    if use_kernels and _has_backward_kernels(spec, q, v):
        dq, dk, dv = _primitives.backward(spec, (q, k, v), (out, lse), (dout, dlse), extras)
        dbias = None
    else:
        dq, dk, dv, dbias = _reference.backward(spec, (q, k, v), (out, lse), (dout, dlse), extras)
    return dq, dk, dv, Extras(bias=dbias, sinks=_dsinks(extras.sinks, out, lse, dout, dlse))


def _dsinks(sinks: Array | None, out: Array, lse: Array, dout: Array, dlse: Array) -> Array | None:
    """The gradient of `sinks` [N], from nothing but what the forward kept.

    A sink is one more logit of its row, with probability p = exp(sink - lse) and value 0: its
    derivative is p (dp - dpsum) as any logit's, where dp = dout . 0 and dpsum = out . dout - dlse.
    """
    if sinks is None:
        return None
    dpsum = jnp.einsum("btnv,btnv->bnt", *(x.astype(lse.dtype) for x in (out, dout))) - dlse
    # lse is -inf only where there is neither a key nor a sink.
    p = jnp.exp(sinks.astype(lse.dtype)[:, None] - jnp.where(lse == -jnp.inf, jnp.inf, lse))
    return match_sharding(-(p * dpsum).sum((0, 2)).astype(sinks.dtype), like=sinks)


def _has_backward_kernels(spec: AttentionSpec, q: Array, v: Array) -> bool:
    reasons = _primitives.missing_kernels(
        _primitives.BACKWARD_KERNELS, q.dtype, (q.shape[-1], v.shape[-1])
    )
    if reasons and spec.require_kernel:
        raise NotImplementedError(
            f'fa4_jax: implementation="fa4": no gradient: {"; ".join(reasons)}; '
            "use implementation=None, which falls back to the reference"
        )
    if reasons:
        _reference.warn_fallback(reasons)
    return not reasons


_attention.defvjp(_attention_fwd, _attention_bwd)
