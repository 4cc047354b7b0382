# SPDX-License-Identifier: Apache-2.0
"""What JAX tests of its own attention, as cases of ours against `dot_product_attention`.

The cases are those of JAX's nn_test (dot_product_attention) and fused_attention_stablehlo_test and
its multi-GPU part (cuDNN attention), in other words and on small shapes. Each comment names what
it stands for. Judged by the error rule of `reference` against float64, not by JAX's tolerances.

Without a counterpart, because the function has no such argument: paged caches, fp8 scales, dropout.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import (
    Oracle,
    arrays,
    as64,
    assert_close,
    failures,
    judge,
    visible,
    xla_attention,
    xla_gradients,
    xla_logit_gradients,
)

from fa4_jax import dot_product_attention

B, T, S, N, K, H = 2, 20, 24, 4, 2, 32
# Programs run once: compiling them is what takes time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def operands(
    q: tuple = (B, T, N, H), kv: tuple = (B, S, K, H), dim_v: int | None = None, dtype="bfloat16"
) -> list[jax.Array]:
    """q, k, v, dout"""
    v, dout = ((*shape[:-1], dim_v or shape[-1]) for shape in (kv, q))
    return arrays(np.random.default_rng(sum(q + kv)), q, kv, v, dout, dtype=dtype)


def pulled(
    attention: Callable, *primals: Any, dout: jax.Array, dresidual: Any = None
) -> tuple[dict, tuple]:
    """out, residual if there is a cotangent for it, dq, dk, dv by name; then all gradients."""
    results, vjp = jax.vjp(attention, *primals)
    gradients = vjp(dout if dresidual is None else (dout, dresidual))
    results = (results,) if dresidual is None else results
    named = dict(zip(("out", "residual"), results, strict=False))
    return named | dict(zip(("dq", "dk", "dv"), gradients, strict=False)), gradients


@jit
def baseline(primals, out, dout, seen, scale, bias, lse) -> dict[str, jax.Array]:
    """What XLA makes of it, by name. `bias`, fp32, and `seen` are [B, K, G, T, S]."""
    theirs, their_lse = xla_attention(*primals, seen, scale, bias=bias)
    given = primals, (out, lse), (dout, jnp.zeros_like(lse)), seen, scale, None, bias
    gradients = dict(zip(("dq", "dk", "dv"), xla_gradients(*given), strict=True))
    ds = xla_logit_gradients(*given)[1]
    residual = their_lse.swapaxes(1, 2).astype(out.dtype)
    return {"out": theirs, "residual": residual, "dbias": ds, **gradients}


def assert_conforms(
    results: dict[str, jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    seen: Any = True,
    scale: float | None = None,
    bias: jax.Array | None = None,
) -> None:
    """`results`, by name, out among them, under the error rule. lse has no cotangent.

    `seen` broadcasts to [B, K, G, T, S].
    """
    grouped = (q.shape[0], k.shape[2], q.shape[2] // k.shape[2], q.shape[1], k.shape[1])
    full = (grouped[0], q.shape[2], *grouped[3:])
    scale = scale or 1 / math.sqrt(q.shape[-1])
    wide_bias = np.zeros(full) if bias is None else np.broadcast_to(as64(bias)[0], full)
    wide_bias, seen = wide_bias.reshape(grouped), np.broadcast_to(seen, grouped)
    exact, wide = Oracle(seen, scale, wide_bias), as64(q, k, v)
    out, lse = exact.forward(*wide)
    dq, dk, dv, dbias = exact.backward(*wide, *as64(dout), np.zeros(lse.shape))
    expected = {"out": out, "residual": lse.swapaxes(1, 2), "dq": dq, "dk": dk, "dv": dv}
    theirs = baseline(
        (q, k, v), results["out"], dout, seen, scale,
        jnp.asarray(wide_bias, jnp.float32), jnp.asarray(lse, jnp.float32),
    )  # fmt: skip
    if bias is not None:
        theirs["dbias"], expected["dbias"] = (
            _sum_to(bias.shape, np.asarray(x).reshape(full)) for x in (theirs["dbias"], dbias)
        )
        theirs["dbias"] = jnp.asarray(theirs["dbias"], bias.dtype)
    judged = [judge(name, x, expected[name], theirs[name]) for name, x in results.items()]
    assert not failures([verdict for verdicts in judged for verdict in verdicts])


def _sum_to(shape: tuple, x: np.ndarray) -> np.ndarray:
    """The transpose of broadcasting `shape` to x's."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    return x.sum(tuple(a for a in range(x.ndim) if shape[a] == 1), keepdims=True)


def grouped(mask: Any, kv_heads: int = K) -> np.ndarray:
    """bool [B, N, T, S] or broadcastable to it, as [B, K, G, T, S]."""
    mask = np.asarray(mask)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    heads = (1, 1) if mask.shape[1] == 1 else (kv_heads, mask.shape[1] // kv_heads)
    return mask.reshape(mask.shape[0], *heads, *mask.shape[2:])


# nn_test: testDotProductAttention.
@pytest.mark.parametrize(
    ("dtype", "kv_heads", "mapped"),
    # Every pair of choices, not every triple.
    [
        ("bfloat16", 4, False),
        ("bfloat16", 2, True),
        ("bfloat16", 1, False),
        ("float16", 4, True),
        ("float16", 2, False),
        ("float16", 1, True),
    ],
)
def test_heads_and_residual(dtype: str, kv_heads: int, mapped: bool) -> None:
    """The residual has a cotangent, which changes nothing."""
    *primals, dout = operands(kv=(B, S, kv_heads, H), dtype=dtype)
    (dresidual,) = arrays(np.random.default_rng(1), (B, T, N), dtype=dtype)

    def attention(q, k, v):
        call = functools.partial(dot_product_attention, return_residual=True)
        call = jax.vmap(call, (0, 0, 0, None, None)) if mapped else call
        return call(q, k, v, None, None)

    step = jit(lambda *x: pulled(attention, *x, dout=dout, dresidual=dresidual)[0])
    assert_conforms(step(*primals), *primals, dout)


CUSTOM = np.tri(T, S, dtype=bool)[None, None]
LENGTHS = {
    "query_seq_lengths": np.array([T // 2, T // 4], np.int32),
    "key_value_seq_lengths": np.array([S // 4, S // 2], np.int32),
}
BIAS = arrays(np.random.default_rng(2), (1, N, T, S), dtype="bfloat16")[0]
CAUSAL = {"is_causal": True}
MASKS = {
    "bias": {"bias": BIAS},
    "causal": CAUSAL,
    "padding": LENGTHS,
    "custom": {"mask": CUSTOM},
    "causal, padding": CAUSAL | LENGTHS,
    "custom, padding": {"mask": CUSTOM} | LENGTHS,
    "bias, causal": {"bias": BIAS} | CAUSAL,
    "causal, window": CAUSAL | {"local_window_size": (3, 2)},
    # What cuDNN calls a sliding window of length 4.
    "window": {"local_window_size": (3, 0)},
}


# nn_test: testDotProductAttentionMask. multi-GPU: test_sdpa_var_seq and _sliding_window_length.
# single-GPU: the four tests of which inputs have a bias gradient.
@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind: str) -> None:
    """The arrays of a mask can be differentiated, too: bools and integers have float0 gradients."""
    q, k, v, dout = operands()
    static = {n: x for n, x in MASKS[kind].items() if n in ("is_causal", "local_window_size")}
    given = {n: jnp.asarray(x) for n, x in MASKS[kind].items() if n not in static}
    bias = given.pop("bias", None)

    def attention(q, k, v, bias, given):
        return dot_product_attention(q, k, v, bias, **given, **static, return_residual=True)

    @jit
    def step(q, k, v, bias, given):
        zeros = jnp.zeros((B, T, N), q.dtype)
        results, gradients = pulled(attention, q, k, v, bias, given, dout=dout, dresidual=zeros)
        assert all(x.dtype == jax.dtypes.float0 for x in gradients[4].values())
        return results | ({} if bias is None else {"dbias": gradients[3]})

    lengths = {name: given[name] for name in LENGTHS if name in given}
    window = static.get("local_window_size", (None, None))
    seen = visible(T, S, causal="is_causal" in static, window_size=window, **lengths)
    if "mask" in given:
        seen = seen & grouped(given["mask"])
    assert_conforms(step(q, k, v, bias, given), q, k, v, dout, seen, bias=bias)


# nn_test: testDotProductAttentionFloat64MaskDebugInfs.
def test_float64_and_a_mask_of_keys_under_debug_infs() -> None:
    with jax.enable_x64(True), jax.debug_infs(True):
        shapes = (1, 5, 6, 11), (1, 7, 3, 11)
        q, k, v, dout = operands(*shapes, dtype="float64")
        mask = jnp.arange(7) <= 3

        def attention(q, k, v):
            return dot_product_attention(q, k, v, mask=mask, implementation="reference")

        out, vjp = jax.vjp(attention, q[0], k[0], v[0])
        exact, wide = Oracle(np.asarray(mask), 1 / math.sqrt(11)), as64(q, k, v)
        assert_close(out, exact.forward(*wide)[0][0], tolerance=1e-14)
        gradients = exact.backward(*wide, *as64(dout), np.zeros((1, 6, 5)))[:3]
        for x, y in zip(vjp(dout[0]), gradients, strict=True):
            assert_close(x, y[0], tolerance=1e-14)


# nn_test: testDotProductAttentionBiasGradient. multi-GPU: test_sdpa_dbias, but that a batch of more
# than 1 has a gradient here.
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradient_of_a_bias_with_a_batch(batch: int, mapped: bool) -> None:
    x, _, _, dout = operands((batch, T, N, H), (batch, T, N, H))
    (bias,) = arrays(np.random.default_rng(3), (batch, N, T, T), dtype="bfloat16")
    mask = (np.arange(T) % 5 > 0)[None, None]
    call = jax.vmap(dot_product_attention, (0, 0, 0, 0, None)) if mapped else dot_product_attention

    @jit
    def step(x, bias):
        out, vjp = jax.vjp(lambda bias: call(x, x, x, bias, mask), bias)
        return {"out": out, "dbias": vjp(dout)[0]}

    assert_conforms(step(x, bias), x, x, x, dout, grouped(mask), bias=bias)


# single-GPU: test_sdpa_large_head_size. multi-GPU: test_sdpa_mla.
@pytest.mark.parametrize(("dim", "dim_v"), [(256, 256), (128, 64)])
def test_head_dims(dim: int, dim_v: int) -> None:
    q, k, v, dout = operands((B, T, 2, dim), (B, T, 2, dim), dim_v)
    attention = functools.partial(dot_product_attention, scale=1.0, is_causal=True)
    step = jit(lambda *x: pulled(attention, *x, dout=dout)[0])
    assert_conforms(step(q, k, v), q, k, v, dout, visible(T, T, causal=True), scale=1.0)


# single-GPU: test_jacobian, _with_mask and _gqa_unequal_seqlen.
@pytest.mark.parametrize(
    "mask", [None, np.tri(3, 5, dtype=bool)], ids=["unmasked", "mask without leading axes"]
)
def test_jacobian(mask: np.ndarray | None) -> None:
    """Grouped heads and different lengths: no two dimensions can be mixed up."""
    q, k, v, _ = operands((1, 3, 4, 8), (1, 5, 2, 8))
    out, jacobian = jit(
        lambda q: (
            dot_product_attention(q, k, v, mask=mask),
            jax.jacrev(lambda q: dot_product_attention(q, k, v, mask=mask))(q),
        )
    )(q)
    one_by_one = {"out": out, "dq": jacobian.reshape(-1, *q.shape[1:])}
    _assert_jacobian(one_by_one, q, k, v, True if mask is None else mask)


# single-GPU: test_jacobian_with_bias.
def test_jacobian_of_a_bias() -> None:
    q, k, v, _ = operands((1, 3, 4, 8), (1, 5, 2, 8))
    (bias,) = arrays(np.random.default_rng(4), (1, 4, 3, 5), dtype="bfloat16")
    attention = functools.partial(dot_product_attention, q, k, v)
    out, jacobian = jit(lambda bias: (attention(bias), jax.jacrev(attention)(bias)))(bias)
    results = {"out": out, "dbias": jacobian.reshape(-1, *bias.shape[1:])}
    _assert_jacobian(results, q, k, v, bias=bias)


def _assert_jacobian(results: dict, q, k, v, seen: Any = True, bias: Any = None) -> None:
    """Rows of a Jacobian are gradients: a batch of them, one for each element of out."""
    dout = jnp.eye(q.size, dtype=q.dtype).reshape(q.size, *q.shape[1:])
    results["out"], q, k, v = (jnp.repeat(x, q.size, 0) for x in (results["out"], q, k, v))
    bias = None if bias is None else jnp.repeat(bias, len(q), 0)
    assert_conforms(results, q, k, v, dout, seen, bias=bias)


# single-GPU: test_vmap_of_vjp.
def test_vmap_of_vjp() -> None:
    q, k, v, _ = operands()
    douts = arrays(np.random.default_rng(5), *[q.shape] * 3, dtype=q.dtype)
    out, vjp = jax.vjp(dot_product_attention, q, k, v)
    gradients = jit(jax.vmap(vjp))(jnp.stack(douts))
    for dout, *one in zip(douts, *gradients, strict=True):
        named = dict(zip(("dq", "dk", "dv"), one, strict=True))
        assert_conforms({"out": out, **named}, q, k, v, dout)


# single-GPU: test_vmap_partial_in_axes, _vmap_of_grad, _vmap_of_grad_shared_bias, _all_batched_vmap
# and test_sdpa_mixed_batching_values.
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_q_only", [False, True])
def test_vmap_of_gradients_of_a_sum(is_q_only: bool, has_bias: bool) -> None:
    """All operands are mapped or only q is, the bias isn't; the cotangent of out isn't, either."""
    q, k, v, _ = operands()
    bias = arrays(np.random.default_rng(6), (1, N, T, S), dtype=q.dtype)[0] if has_bias else None
    qs = jnp.stack([q, q + 1, q - 1])
    ks, vs = (x if is_q_only else jnp.stack([x, -x, x[::-1]]) for x in (k, v))
    in_axes = (0, None, None, None) if is_q_only else (0, 0, 0, None)

    def gradients(*x):
        names = ("dq", "dk", "dv", "dbias")[: 3 + has_bias]
        out, vjp = jax.vjp(dot_product_attention, *x)
        return {"out": out, **dict(zip(names, vjp(jnp.ones_like(out)), strict=False))}

    results = jit(jax.vmap(gradients, in_axes))(qs, ks, vs, bias)
    for i in range(3):
        one = q, k, v = qs[i], *(x if is_q_only else x[i] for x in (ks, vs))
        assert_conforms({n: x[i] for n, x in results.items()}, *one, jnp.ones_like(q), bias=bias)


def on_mesh(step: Callable, given: Sequence, specs: Sequence, results: dict[str, P]) -> dict:
    """`step`, with the shardings of operands and results given to `jit`, on 2 x 2 devices."""
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)

    def place(tree: Any) -> Any:
        is_spec = lambda x: isinstance(x, P)  # noqa: E731 - too short for a name of its own
        return jax.tree.map(functools.partial(NamedSharding, mesh), tree, is_leaf=is_spec)

    found = jit(step, in_shardings=place(tuple(specs)), out_shardings=place(results))(*given)
    return off_mesh(found)


def off_mesh(results: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """On one device, where the oracle is."""
    return {name: jnp.asarray(np.asarray(x)) for name, x in results.items()}


# Of q, k, v, dout and what has their shapes.
HEADS_SPLIT = P("dp", None, "tp")
RESULTS = ("out", "dq", "dk", "dv")


# multi-GPU: test_sdpa, _inference, _broadcast_bias_and_dbias and test_layouts.
@pytest.mark.parametrize(
    ("bias_dims", "has_mask", "is_bnth"),
    [
        (None, False, True),
        (None, True, False),
        ((4, N), True, True),
        ((1, N), False, False),
        ((4, 1), False, True),
        ((1, 1), False, False),
    ],
    ids=str,
)
def test_bias_and_mask_on_a_mesh(bias_dims, has_mask: bool, is_bnth: bool) -> None:
    """Layout [B, N, T, H] is a transposition of the operands and of out."""
    dtype = "float16" if is_bnth else "bfloat16"
    *primals, dout = operands((4, T, N, H), (4, S, N, H), dtype=dtype)
    rng, extras, specs = np.random.default_rng(7), {}, {}
    if bias_dims:
        (extras["bias"],) = arrays(rng, (*bias_dims, T, S), dtype=dtype)
        specs["bias"] = P("dp" if bias_dims[0] > 1 else None, "tp" if bias_dims[1] > 1 else None)
    if has_mask:
        extras["mask"], specs["mask"] = jnp.asarray(rng.random((4, N, T, S)) < 0.5), P("dp", "tp")

    def transposed(x):
        return x.swapaxes(1, 2) if is_bnth else x

    def attention(q, k, v, extras):
        return transposed(dot_product_attention(*map(transposed, (q, k, v)), **extras, scale=0.5))

    def step(q, k, v, dout, extras):
        results, gradients = pulled(attention, q, k, v, extras, dout=dout)
        return results | ({"dbias": gradients[3]["bias"]} if bias_dims else {})

    split = P("dp", "tp") if is_bnth else HEADS_SPLIT
    result_specs = dict.fromkeys(RESULTS, split) | ({"dbias": specs["bias"]} if bias_dims else {})
    given = *map(transposed, (*primals, dout)), extras
    found = on_mesh(step, given, (*[split] * 4, specs), result_specs)
    found |= {name: transposed(found[name]) for name in RESULTS}
    seen = grouped(extras["mask"], N) if has_mask else True
    assert_conforms(found, *primals, dout, seen, 0.5, extras.get("bias"))


# multi-GPU: test_sdpa_packed_layout. What is padding has ids that the other side lacks.
PACKED = np.array(
    [
        [0] * 7 + [1] * 7 + [2] * 6,
        [0] * 6 + [1] * 7 + [-1] + [2] * 6,
        [0] * 8 + [1] * 7 + [-1] * 5,
        [0] * 15 + [-1] * 5,
    ]
)


@pytest.mark.parametrize(("kv_heads", "is_causal"), [(4, False), (2, True)])
def test_packed_segments_on_a_mesh(kv_heads: int, is_causal: bool) -> None:
    *primals, dout = operands((4, T, N, H), (4, T, kv_heads, H))
    ids = {"q_segment_ids": PACKED, "kv_segment_ids": np.where(PACKED < 0, -2, PACKED)}

    def step(q, k, v, dout, ids):
        kwargs = {"scale": 0.1, "is_causal": is_causal, **ids}
        return pulled(functools.partial(dot_product_attention, **kwargs), q, k, v, dout=dout)[0]

    given = *primals, dout, {name: jnp.asarray(x) for name, x in ids.items()}
    specs = *[HEADS_SPLIT] * 4, dict.fromkeys(ids, P("dp"))
    found = on_mesh(step, given, specs, dict.fromkeys(RESULTS, HEADS_SPLIT))
    assert_conforms(found, *primals, dout, visible(T, T, causal=is_causal, **ids), 0.1)


# multi-GPU: test_sdpa_residual.
def test_residual_on_a_mesh() -> None:
    *primals, dout = operands((4, T, N, H), (4, S, N, H))
    (dresidual,) = arrays(np.random.default_rng(8), (4, T, N), dtype=dout.dtype)
    attention = functools.partial(dot_product_attention, scale=1.0, return_residual=True)

    def step(q, k, v, dout, dresidual):
        return pulled(attention, q, k, v, dout=dout, dresidual=dresidual)[0]

    results = dict.fromkeys((*RESULTS, "residual"), P("dp"))
    found = on_mesh(step, (*primals, dout, dresidual), [P("dp")] * 5, results)
    assert_conforms(found, *primals, dout, scale=1.0)


# multi-GPU: test_sdpa_grad_sharded_regression_25986.
def test_a_cotangent_that_is_the_same_everywhere_on_a_mesh() -> None:
    *primals, dout = operands(kv=(B, S, N, H))
    mesh = jax.make_mesh((2,), ("dp",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P("dp"))

    def total(q, k, v):
        out = dot_product_attention(q, k, v, scale=0.5)
        return out.sum(), out

    gradients, out = jit(jax.grad(total, (0, 1, 2), has_aux=True))(*jax.device_put(primals, split))
    found = dict(zip(RESULTS, (out, *gradients), strict=True))
    assert all(x.sharding.is_equivalent_to(split, 4) for x in found.values())
    assert_conforms(off_mesh(found), *primals, jnp.ones_like(dout), scale=0.5)


# multi-GPU: test_sdpa_shard_map_grad_regression_36008.
def test_gradient_of_a_shard_map_of_one_operand() -> None:
    *primals, dout = operands((4, T, N, H), (4, T, N, H))
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=HEADS_SPLIT, out_specs=HEADS_SPLIT)
    def attention(qkv):
        return dot_product_attention(*jnp.split(qkv, 3, -1), scale=1.0, is_causal=True)

    def total(qkv):
        out = attention(qkv)
        return out.sum(), out

    gradient, out = jit(jax.grad(total, has_aux=True))(jnp.concatenate(primals, -1))
    found = dict(zip(RESULTS, (out, *jnp.split(gradient, 3, -1)), strict=True))
    seen = visible(T, T, causal=True)
    assert_conforms(off_mesh(found), *primals, jnp.ones_like(dout), seen, 1.0)


# Where we differ from `jax.nn` on purpose: the README's table and its limits, from here on.
theirs = jax.nn.dot_product_attention

REFUSED = {
    "traced scale": lambda f, q, k, v: f(q, k, v, scale=q[0, 0, 0, 0]),
    "lists": lambda f, q, k, v: f(*[[[[0.5]]]] * 3),
    "mixed ranks": lambda f, q, k, v: f(q[0], k[:1], v[:1]),
    "integers": lambda f, q, k, v: f(*(x.astype(int) for x in (q, k, v))),
    "integer bias": lambda f, q, k, v: f(q, k, v, jnp.ones((T, S), int)),
    "negative window": lambda f, q, k, v: f(q, k, v, local_window_size=(4, -1)),
    "forward mode": lambda f, q, k, v: jax.jvp(lambda q: f(q, k, v), (q,), (q,)),
    "second derivative": lambda f, q, k, v: jax.hessian(lambda q: f(q, k, v).sum())(q),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_only_jax_nn_accepts(case: str) -> None:
    primals = operands()[:3]
    jax.eval_shape(functools.partial(REFUSED[case], theirs), *primals)
    with pytest.raises((TypeError, ValueError, NotImplementedError), match="fa4_|forward-mode"):
        jax.jit(functools.partial(REFUSED[case], dot_product_attention)).lower(*primals)


ACCEPTED = {
    "head dim of v": lambda f, q, k, v: f(q, k, v[..., :8]),
    "lengths in int8": lambda f, q, k, v: f(q, k, v, query_seq_lengths=jnp.ones(B, jnp.int8)),
    "half a window": lambda f, q, k, v: f(q, k, v, local_window_size=(4, None)),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_only_we_accept(case: str) -> None:
    primals = operands()[:3]
    jax.eval_shape(functools.partial(ACCEPTED[case], dot_product_attention), *primals)
    with pytest.raises((TypeError, ValueError)):
        jax.eval_shape(functools.partial(ACCEPTED[case], theirs), *primals)


def test_queries_without_a_key_have_no_gradient_and_an_infinite_residual() -> None:
    """`jax.debug_infs` finds it. `jax.nn` averages values; its residual is about -float32's max."""
    q, k, v, dout = operands()
    lengths = {"key_value_seq_lengths": jnp.array([0, S], jnp.int32)}

    def first_entry(attention):
        call = functools.partial(attention, return_residual=True, **lengths)
        zeros = jnp.zeros((B, T, N), q.dtype)
        step = jit(lambda *x: pulled(call, *x, dout=dout, dresidual=zeros)[0])
        return {name: np.asarray(x[0], np.float32) for name, x in step(q, k, v).items()}

    ours, other = first_entry(dot_product_attention), first_entry(theirs)
    assert np.all(ours.pop("residual") == -np.inf)
    assert not any(x.any() for x in ours.values())
    assert np.all(np.isfinite(other["residual"])) and np.all(other["residual"] < -1e38)
    assert other["out"].all() and other["dv"].all()
    with jax.debug_infs(True), pytest.raises(FloatingPointError, match="inf"):
        dot_product_attention(q, k, v, **lengths)


def test_float64_is_float64_throughout() -> None:
    with jax.enable_x64(True):
        q, k, v, _ = operands(dtype="float64")
        expected, _ = Oracle(np.True_, 1 / math.sqrt(H)).forward(*as64(q, k, v))
        out, other = jit(lambda *x: (dot_product_attention(*x), theirs(*x)))(q, k, v)
        assert np.abs(other - expected).max() > 1e-9
        assert_close(out, expected, tolerance=1e-14)
