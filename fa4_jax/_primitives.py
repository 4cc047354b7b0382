# SPDX-License-Identifier: Apache-2.0
"""The forward and backward primitives: abstract evaluation, lowering, batching.

They run on one device; `_sharding` puts each device's part of a mesh's call there.
Their static parameters are the `AttentionSpec` and the names of the `Extras` among the operands,
which come last. Lowered for CUDA, `forward` is one FFI call and `backward` three, with every
workspace an extra result that XLA allocates; shapes, dtypes, attributes and aliases all come from
`_variants.signature`, and head dims that no row has are padded with zeros to the next row's.
Lowered for anything else they are the reference, so that one traced program runs anywhere and
exports for several platforms. Nothing here asks which GPU a program will run on: C++ chooses the
architecture when it runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from fa4_jax import _dispatch, _intervals, _reference, _sharding, _variants
from fa4_jax._dispatch import BACKWARD_KERNELS, FORWARD_KERNELS
from fa4_jax._intervals import KernelInterval
from fa4_jax._reference import Extras
from fa4_jax._sharding import Layout
from fa4_jax._spec import AttentionSpec
from fa4_jax._untyped import apply_primitive, bind, lower_fun
from fa4_jax._variants import Buffer, Feature, Kernel

forward_p = Primitive("fa4_forward")
"""(q, k, v, *extras) -> (out, lse)"""
backward_p = Primitive("fa4_backward")
"""(q, k, v, out, lse, dout, dlse, *extras) -> (dq, dk, dv)"""

_QKV = ("BTND", "BSKD", "BSKV")
_EXTRA_DIMS = {"kv_start": "BT", "kv_end": "BT", "sinks": "BN"}

_SCALAR_TYPES = {"f32": np.float32, "i32": np.int32}


def forward(spec: AttentionSpec, q: Array, k: Array, v: Array, extras: Extras) -> Sequence[Array]:
    """out and lse, as `_reference.forward`, but neither a bias nor a mask. On any mesh."""
    names, operands = _given(extras, ("kv_start", "kv_end", "sinks"))
    _dispatch.tell_of_kernels(spec, q, k, v, extras.kv_start is not None)
    if extras.sinks is not None:
        # For each batch entry, because batching folds a mapped axis into the batch.
        sinks = extras.sinks.astype(jnp.float32)
        operands[-1] = jnp.broadcast_to(sinks, (q.shape[0], q.shape[2]))
    return _FORWARD.bind(q, k, v, *operands, spec=spec, extras=names)


def backward(
    spec: AttentionSpec,
    operands: tuple[Array, Array, Array],
    residuals: tuple[Array, Array],
    cotangents: tuple[Array, Array],
    extras: Extras,
) -> Sequence[Array]:
    """dq, dk and dv, as `_reference.backward`, but neither for a bias nor for a mask. On any
    mesh."""
    names, interval = _given(extras, ("kv_start", "kv_end"))
    arrays = (*operands, *residuals, *cotangents, *interval)
    return _BACKWARD.bind(*arrays, spec=spec, extras=names)


def _forward_layout(extras: tuple[str, ...]) -> Layout:
    return Layout((*_QKV, *(_EXTRA_DIMS[name] for name in extras)), ("BTNV", "BNT"))


def _backward_layout(extras: tuple[str, ...]) -> Layout:
    given = ("BTNV", "BNT", "BTNV", "BNT", *(_EXTRA_DIMS[name] for name in extras))
    return Layout((*_QKV, *given), _QKV)


def _given(extras: Extras, names: Sequence[str]) -> tuple[tuple[str, ...], list[Array]]:
    """Which of these the call has, and what they are."""
    assert extras.bias is None and extras.mask is None, "the primitives would drop them"
    given = tuple(name for name in names if getattr(extras, name) is not None)
    return given, [getattr(extras, name) for name in given]


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Sizes of one problem's dimensions, by the letters of `_variants`."""

    sizes: Mapping[str, int]
    like: ShapedArray

    @classmethod
    def of(cls, q: ShapedArray, k: ShapedArray, v: ShapedArray) -> _Problem:
        sizes: dict[str, int] = {}
        for buffer, aval in zip(_variants.QKV, (q, k, v), strict=True):
            sizes |= dict(zip(buffer.dims, aval.shape, strict=True))
        sizes["R"] = _variants.round_up(sizes["T"], _variants.ROW_MULTIPLE)
        sizes["J"] = -(-sizes["S"] // _variants.BLOCK)
        sizes["U"] = 1
        sizes["E"] = _variants.round_up(sizes["D"], _variants.HEAD_DIM_MULTIPLE)
        return cls(sizes, q)

    def aval(self, buffer: Buffer) -> ShapedArray:
        """The type of `buffer`. Built from q's, it varies over the same manual mesh axes as q."""
        shape = tuple(self.sizes[letter] for letter in buffer.dims)
        dtype = np.dtype(buffer.dtype.numpy_name) if buffer.dtype else self.like.dtype
        return _sharding.typed_like(self.like, shape, dtype=dtype)

    def launch(
        self,
        kernel: Kernel,
        spec: AttentionSpec,
        *operands: Array,
        features: tuple[Feature, ...] = (),
    ) -> Sequence[Array]:
        """One FFI call of `kernel`, all operands and results row-major."""
        signature = _variants.signature(kernel, features)
        band_lower, band_upper = spec.band(self.sizes["T"], self.sizes["S"])
        values = {
            "softmax_scale": spec.softmax_scale,
            "softcap": 1.0 if spec.softcap is None else spec.softcap,
            "band_lower": band_lower,
            "band_upper": band_upper,
        }
        call = jax.ffi.ffi_call(
            _variants.target_name(kernel),
            [self.aval(buffer) for buffer in signature.results],
            input_output_aliases=signature.aliases,
        )
        head_dims = self.sizes["D"], self.sizes["V"]
        name = _dispatch.kernel_name(kernel, self.like.dtype, head_dims, features)
        scalars = {s.name: _SCALAR_TYPES[s.kind](values[s.name]) for s in signature.attributes}
        return call(*operands, kernel=name, **scalars)


def _forward_abstract(
    *avals: ShapedArray, spec: AttentionSpec, extras: tuple[str, ...]
) -> list[ShapedArray]:
    del spec, extras
    _sharding.check_varying("fa4_forward", *avals)
    q, k, v = avals[:3]
    out, lse = map(_Problem.of(q, k, v).aval, _variants.signature(Kernel.forward).results)
    return [out, lse.update(dtype=_reference.lse_dtype(q.dtype))]


def _backward_abstract(
    *avals: ShapedArray, spec: AttentionSpec, extras: tuple[str, ...]
) -> list[ShapedArray]:
    del spec, extras
    _sharding.check_varying("fa4_backward", *avals)
    return [x.update(weak_type=False) for x in avals[:3]]


def _forward_kernels(
    q: Array, k: Array, v: Array, *rest: Array, spec: AttentionSpec, extras: tuple[str, ...]
) -> Sequence[Array]:
    if _reference.is_empty(q, k):
        return _forward_reference(q, k, v, *rest, spec=spec, extras=extras)
    given = _extras(extras, rest)
    head_dim, head_dim_v = _dispatch.padded_head_dims(FORWARD_KERNELS, q.dtype, _head_dims(q, v))
    qkv = _pad(q, head_dim), _pad(k, head_dim), _pad(v, head_dim_v)
    # Without sinks an array of no elements, which costs nothing. Made from q, as in `forward`.
    no_sinks = jnp.zeros_like(q[:0, 0, :, 0], jnp.float32)
    sinks = no_sinks if given.sinks is None else given.sinks
    interval, chosen = _kernel_interval(Kernel.forward, spec, q, k, given)
    visible = interval.of_queries if interval else ()
    launch = _Problem.of(*map(jax.typeof, qkv)).launch
    out, lse, *_ = launch(Kernel.forward, spec, *qkv, sinks, *visible, features=chosen)
    return out[..., : v.shape[-1]], lse


def _kernel_interval(
    kernel: Kernel, spec: AttentionSpec, q: Array, k: Array, extras: Extras
) -> tuple[KernelInterval | None, tuple[Feature, ...]]:
    """What rows with `Feature.interval` take of a call that they serve; the features of `kernel`'s
    rows that serve it."""
    chosen = _dispatch.features(kernel, spec, extras.kv_start is not None)
    if Feature.interval not in chosen:
        return None, chosen
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    start, end = extras.kv_start, extras.kv_end
    if start is None or end is None:
        start = jnp.zeros_like(q[..., 0, 0], jnp.int32)
        end = start + seqlen_k
    band = spec.band(seqlen_q, seqlen_k)
    return _intervals.for_kernels(band, start, end, seqlen_k), chosen


def _extras(names: tuple[str, ...], operands: Sequence[Array]) -> Extras:
    return Extras(**dict(zip(names, operands, strict=True)))


def _forward_reference(
    q: Array, k: Array, v: Array, *rest: Array, spec: AttentionSpec, extras: tuple[str, ...]
) -> Sequence[Array]:
    return _reference.forward(spec, q, k, v, _extras(extras, rest))


def _backward_kernels(
    *operands: Array, spec: AttentionSpec, extras: tuple[str, ...]
) -> Sequence[Array]:
    q, k, v, out, lse, dout, dlse, *rest = operands
    if _reference.is_empty(q, k):
        return _backward_reference(*operands, spec=spec, extras=extras)
    head_dim, head_dim_v = _dispatch.padded_head_dims(BACKWARD_KERNELS, q.dtype, _head_dims(q, v))
    qkv = _pad(q, head_dim), _pad(k, head_dim), _pad(v, head_dim_v)
    out, dout = _pad(out, head_dim_v), _pad(dout, head_dim_v)
    launch = _Problem.of(*map(jax.typeof, qkv)).launch
    dpsum, lse_log2, dq_accum = launch(Kernel.backward_preprocess, spec, out, dout, lse, dlse)
    interval, chosen = _kernel_interval(Kernel.backward, spec, q, k, _extras(extras, rest))
    visible = interval.of_keys if interval else ()
    dk, dv, dq_accum, *_ = launch(
        *(Kernel.backward, spec, *qkv, dout, lse_log2, dpsum, dq_accum, *visible), features=chosen
    )
    (dq,) = launch(Kernel.backward_postprocess, spec, dq_accum)
    return dq[..., : q.shape[-1]], dk[..., : q.shape[-1]], dv[..., : v.shape[-1]]


def _head_dims(q: Array, v: Array) -> tuple[int, int]:
    return q.shape[-1], v.shape[-1]


def _pad(x: Array, head_dim: int) -> Array:
    """`x` with zeros up to a row's head dim. They add 0 to logits, and to columns that are cut
    off."""
    if x.shape[-1] == head_dim:
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, head_dim - x.shape[-1])])


def _backward_reference(
    *operands: Array, spec: AttentionSpec, extras: tuple[str, ...]
) -> Sequence[Array]:
    q, k, v, out, lse, dout, dlse, *rest = operands
    given = _extras(extras, rest)
    return _reference.backward(spec, (q, k, v), (out, lse), (dout, dlse), given)[:3]


def _cuda_reasons(ctx: mlir.LoweringRuleContext, spec: AttentionSpec) -> tuple[str, ...]:
    """Why a program for CUDA runs the reference, and says so; empty if it runs the kernels."""
    exporting = ctx.module_context.lowering_parameters.for_export
    return _reasons(_dispatch.CUDA, spec, exporting)


def _other_platform_reasons(ctx: mlir.LoweringRuleContext, spec: AttentionSpec) -> tuple[str, ...]:
    """`_cuda_reasons` of every platform but CUDA."""
    return _reasons(", ".join(ctx.platforms or ctx.module_context.platforms), spec)


def _reasons(platforms: str, spec: AttentionSpec, exporting: bool = False) -> tuple[str, ...]:
    reasons = _dispatch.program_reasons(platforms, spec.require_kernel, exporting)
    if reasons:
        _dispatch.fall_back(reasons)
    return reasons


Reasons = Callable[[mlir.LoweringRuleContext, AttentionSpec], tuple[str, ...]]
Rule = Callable[..., Sequence[Array]]

_REASONS: dict[str | None, Reasons] = {
    _dispatch.CUDA: _cuda_reasons,
    None: _other_platform_reasons,
}


def _lowering(reasons: Reasons, kernels: Rule, reference: Rule) -> Callable[..., Any]:
    """A platform's rule: the kernels, or the reference if it has `reasons`."""

    def rule(
        ctx: mlir.LoweringRuleContext, *operands: Any, spec: AttentionSpec, extras: tuple[str, ...]
    ) -> Any:
        chosen = reference if reasons(ctx, spec) else kernels
        lower = lower_fun(chosen, multiple_results=True)
        return lower(ctx, *operands, spec=spec, extras=extras)

    return rule


def _fold_batch(
    primitive: Primitive, operands: Sequence[Array], axes: Sequence[int | None], **parameters: Any
) -> tuple[list[Array], list[int]]:
    """vmap: the mapped axis joins the batch, which leads in every operand and result."""
    mapped = ((x, axis) for x, axis in zip(operands, axes, strict=True) if axis is not None)
    size = next(x.shape[axis] for x, axis in mapped)

    def lead(x: Array, axis: int | None) -> Array:
        return jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)

    operands = list(map(lead, operands, axes))
    batch = operands[0].shape[1]
    folded = (x.reshape(size * batch, *x.shape[2:]) for x in operands)
    results = bind(primitive, *folded, **parameters)
    return [x.reshape(size, batch, *x.shape[1:]) for x in results], [0] * len(results)


def _define(
    primitive: Primitive,
    abstract: Callable[..., Sequence[ShapedArray]],
    kernels: Rule,
    reference: Rule,
) -> None:
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)
    # Outside jit, a call is a jitted one: compiled once for each shape and spec.
    primitive.def_impl(functools.partial(apply_primitive, primitive))
    for platform, reasons in _REASONS.items():
        rule = _lowering(reasons, kernels, reference)
        mlir.register_lowering(primitive, rule, platform=platform)
    batching.primitive_batchers[primitive] = functools.partial(_fold_batch, primitive)


_define(forward_p, _forward_abstract, _forward_kernels, _forward_reference)
_define(backward_p, _backward_abstract, _backward_kernels, _backward_reference)

_FORWARD = _sharding.Op(forward_p, _forward_abstract, _forward_layout, _REASONS)
_BACKWARD = _sharding.Op(backward_p, _backward_abstract, _backward_layout, _REASONS)
