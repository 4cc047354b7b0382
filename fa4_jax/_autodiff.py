# SPDX-License-Identifier: Apache-2.0
"""The derivative: which residuals the forward keeps, and which implementation the backward runs.

Residuals are (q, k, v, out, lse). out and lse are named "context", inside the rule and on the very
values that become residuals, so that `jax.checkpoint(policy=save_only_these_names("context"))`
keeps them and runs one forward a step. `optimize_remat` would lose the names and `symbolic_zeros`
breaks under `jax.checkpoint`, so neither is used; an unused lse therefore brings a zero cotangent,
[B, N, T] in fp32.

How out, lse and gradients are computed is a `Method`'s business: one call on this device, or many
on devices that share a sequence (`_context_parallel`).

Reverse mode, once. Forward mode and second derivatives raise JAX's own errors.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name  # pyright: ignore[reportUnknownVariableType]

from fa4_jax import _dispatch, _primitives, _reference
from fa4_jax._reference import NO_EXTRAS, Extras
from fa4_jax._sharding import match_sharding
from fa4_jax._spec import AttentionSpec
from fa4_jax._varying import match_varying

CHECKPOINT_NAME = "context"

Residuals = tuple[Array, Array, Array, Array, Array, Extras]
"""q, k, v, out, lse and the extras"""


class Method(Protocol):
    """How attention and its gradients are computed. Hashable: part of what a program is."""

    def forward(self, q: Array, k: Array, v: Array, extras: Extras) -> tuple[Array, Array]:
        """out and lse, as `_reference.forward`."""
        ...

    def backward(
        self,
        operands: tuple[Array, Array, Array],
        residuals: tuple[Array, Array],
        cotangents: tuple[Array, Array],
        extras: Extras,
    ) -> tuple[Array, Array, Array, Array | None]:
        """dq, dk, dv and dbias, as `_reference.backward`."""
        ...


@dataclasses.dataclass(frozen=True)
class OneCall:
    """Attention by one call of the primitives, or with `use_kernels=False` of the reference, which
    takes a bias and a mask too."""

    spec: AttentionSpec
    use_kernels: bool

    def forward(self, q: Array, k: Array, v: Array, extras: Extras) -> tuple[Array, Array]:
        if self.use_kernels:
            out, lse = _primitives.forward(self.spec, q, k, v, extras)
            return out, lse
        return _reference.forward(self.spec, q, k, v, extras)

    def backward(
        self,
        operands: tuple[Array, Array, Array],
        residuals: tuple[Array, Array],
        cotangents: tuple[Array, Array],
        extras: Extras,
    ) -> tuple[Array, Array, Array, Array | None]:
        q, _, v = operands
        if self.use_kernels and _has_backward_kernels(self.spec, q, v):
            dq, dk, dv = _primitives.backward(self.spec, operands, residuals, cotangents, extras)
            return dq, dk, dv, None
        return _reference.backward(self.spec, operands, residuals, cotangents, extras)


def attention(
    method: Method, q: Array, k: Array, v: Array, extras: Extras = NO_EXTRAS
) -> tuple[Array, Array]:
    """out [B, T, N, V] and lse [B, N, T], differentiable in q, k, v, `extras.bias` and
    `extras.sinks`."""
    return _attention(method, *match_varying((q, k, v, extras)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(method: Method, q: Array, k: Array, v: Array, extras: Extras) -> tuple[Array, Array]:
    return method.forward(q, k, v, extras)


def _attention_fwd(
    method: Method, q: Array, k: Array, v: Array, extras: Extras
) -> tuple[tuple[Array, Array], Residuals]:
    # Not a call of `_attention`: the names have to be on the values saved here.
    results = method.forward(q, k, v, extras)
    out, lse = (checkpoint_name(x, CHECKPOINT_NAME) for x in results)
    return (out, lse), (q, k, v, out, lse, extras)


def _attention_bwd(
    method: Method, residuals: Residuals, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Array, Extras]:
    q, k, v, out, lse, extras = residuals
    dout, dlse = cotangents
    # lse is the constant -inf in a row that sees no key, whatever its cotangent says.
    dlse = jnp.where(lse == -jnp.inf, 0, dlse)
    (q, k, v, out, lse, extras), (dout, dlse) = match_varying((residuals, (dout, dlse)))
    dq, dk, dv, dbias = method.backward((q, k, v), (out, lse), (dout, dlse), extras)
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
    head_dims = q.shape[-1], v.shape[-1]
    reasons = _dispatch.missing_kernels(_dispatch.BACKWARD_KERNELS, q.dtype, head_dims)
    if reasons and spec.require_kernel:
        raise NotImplementedError(
            f'fa4_jax: implementation="fa4": no gradient: {"; ".join(reasons)}; '
            "use implementation=None, which falls back to the reference"
        )
    if reasons:
        _dispatch.fall_back(reasons)
    return not reasons


_attention.defvjp(_attention_fwd, _attention_bwd)
