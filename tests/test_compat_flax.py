# SPDX-License-Identifier: Apache-2.0
"""`fa4_jax.compat.flax` in Flax's own modules, against the attention that they have by default."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compat import assert_same, distance, tokens
from flax import linen, nnx
from reference import arrays

from fa4_jax.compat.flax import AttentionFn, attention_fn

T, FEATURES, HEADS = 12, 16, 4
CAUSAL = np.tri(T, dtype=bool)
WINDOW = np.tri(T, k=3, dtype=bool) & ~np.tri(T, k=-3, dtype=bool)
PADDING = np.arange(T) < np.array([T, 5])[:, None]


@functools.cache
def linen_parameters():
    module = linen.MultiHeadDotProductAttention(HEADS)
    return module.init(jax.random.key(0), jnp.ones((1, T, FEATURES)))


@pytest.mark.parametrize(
    ("fn", "mask", "own_mask"),
    [
        (attention_fn, linen.combine_masks(PADDING[:, None, None], CAUSAL[None, None]), "the same"),
        (AttentionFn(causal=True), CAUSAL, None),
        (AttentionFn(window_size=(2, 3)), WINDOW, None),
    ],
    ids=["padding and causal", "causal", "window"],
)
def test_linen_gives_the_same_numbers(fn, mask, own_mask):
    """With options of its own, ours needs no mask: that is what they are for."""
    own_mask = mask if own_mask == "the same" else None

    def run(attention, dtype):
        module = linen.MultiHeadDotProductAttention(
            HEADS, dtype=dtype, attention_fn=attention, force_fp32_for_softmax=True
        )
        seen = mask if attention == theirs else own_mask
        return lambda params, x: module.apply(params, x, mask=seen)

    theirs = linen.dot_product_attention
    assert_same(run, fn, theirs, (linen_parameters(), tokens(2, T, FEATURES)))


def nnx_module(fn, **options):
    return nnx.MultiHeadAttention(
        HEADS, FEATURES, attention_fn=fn, rngs=nnx.Rngs(0), **{"decode": False} | options
    )


@pytest.mark.parametrize(
    ("shape", "options", "call", "their_mask"),
    [
        ((T, FEATURES), {}, {}, None),
        ((2, T, FEATURES), {"num_kv_heads": 2}, {"is_causal": True}, None),
        ((2, 2, T, FEATURES), {}, {"mask": PADDING[:, None, None, None]}, (2, 2, HEADS, T, T)),
        ((2, T, FEATURES), {}, {"mask": PADDING[:, None, None], "is_causal": True}, None),
    ],
    ids=["no batch", "grouped and causal", "mask over one of two batch axes", "mask and causal"],
)
def test_nnx_gives_the_same_numbers(shape, options, call, their_mask):
    their_call = dict(call)
    if their_mask:  # which nnx can't broadcast itself
        their_call["mask"] = np.broadcast_to(call["mask"], their_mask)
    theirs = nnx.dot_product_attention
    _, params = nnx.split(nnx_module(theirs, **options), nnx.Param)

    def run(attention, dtype):
        graph, _ = nnx.split(nnx_module(attention, dtype=dtype, **options), nnx.Param)
        arguments = their_call if attention == theirs else call
        return lambda params, x: nnx.merge(graph, params)(x, **arguments)

    assert_same(run, attention_fn, theirs, (params, tokens(*shape)))


def decoded(fn, steps=5):
    """What nnx's and linen's modules say, token by token."""
    x = tokens(2, steps, FEATURES)
    module = nnx.MultiHeadAttention(HEADS, FEATURES, attention_fn=fn, decode=True, rngs=nnx.Rngs(0))
    module.init_cache((2, T, FEATURES))
    step = nnx.jit(lambda module, x: module(x))
    from_nnx = [step(module, x[:, i : i + 1]) for i in range(steps)]

    module = linen.MultiHeadDotProductAttention(HEADS, attention_fn=fn, decode=True)
    variables = module.init(jax.random.key(0), jnp.ones((2, T, FEATURES)))
    step = jax.jit(lambda variables, x: module.apply(variables, x, mutable=["cache"]))
    from_linen = []
    for i in range(steps):
        out, changed = step(variables, x[:, i : i + 1])
        variables |= changed
        from_linen.append(out)
    return jnp.concatenate(from_nnx, 1), jnp.concatenate(from_linen, 1)


def test_decode_masks_are_honoured():
    """One query of a cache that is filled step by step; a causal `AttentionFn` doesn't mistake it
    for the first of its sequence."""
    expected = decoded(linen_default)
    for fn in (attention_fn, AttentionFn(causal=True)):
        for result, theirs in zip(decoded(fn), expected, strict=True):
            np.testing.assert_allclose(result, theirs, atol=1e-5)


def linen_default(query, key, value, mask=None, **_):
    return linen.dot_product_attention(query, key, value, mask=mask)


def operands(dtype=jnp.float32, seqlen_q=T, seqlen_k=T):
    rng = np.random.default_rng(2)
    lengths = (seqlen_q, seqlen_k, seqlen_k)
    return arrays(rng, *((2, n, 2, 8) for n in lengths), dtype=dtype)


def changes(fn, *args, **options):
    """How much these options change the result."""
    return distance(fn(*args, **options), attention_fn(*args))


def test_every_argument_matters():
    args = operands()
    mask = jnp.asarray(CAUSAL)
    assert changes(attention_fn, *args) == 0
    assert changes(attention_fn, *args, bias=jnp.cos(jnp.arange(T * T)).reshape(T, T)) > 1e-2
    assert changes(attention_fn, *args, mask=mask) > 1e-2
    assert changes(attention_fn, *args, is_causal=True) > 1e-2
    assert changes(AttentionFn(causal=True), *args) > 1e-2
    assert changes(AttentionFn(window_size=(2, 0)), *args) > 1e-2
    assert changes(AttentionFn(softcap=0.5), *args) > 1e-3
    rounded = AttentionFn(compute_dtype=jnp.bfloat16)
    assert 1e-5 < changes(rounded, *args) < 1e-1
    assert rounded(*args).dtype == jnp.float32
    assert attention_fn(*args, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert attention_fn(args[0].astype(jnp.bfloat16), *args[1:]).dtype == jnp.float32
    assert attention_fn(*(x.astype(jnp.int32) for x in args)).dtype == jnp.float32
    # A module's mask and our own are both in force.
    last = jnp.arange(T) == T - 1
    seen = AttentionFn(causal=True)(*args, mask=last)
    assert np.all(seen[:, : T - 1] == 0) and np.any(seen[:, T - 1] != 0)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"dropout_rate": 0.1}, "dropout_rate"),
        ({"module": object()}, "module"),
        ({"qk_attn_weights_einsum": jnp.einsum}, "qk_attn_weights_einsum"),
        ({"attn_weights_value_einsum": jnp.einsum}, "attn_weights_value_einsum"),
        ({"precision": "highest"}, "precision"),
        ({"precision": jax.lax.Precision.HIGH}, "precision"),
    ],
)
def test_what_we_do_not_have_is_refused(options, argument):
    with pytest.raises(NotImplementedError, match=f"fa4_jax: {argument}: got .*, expected .*;"):
        attention_fn(*operands(), **options)


def test_what_changes_nothing_is_accepted():
    args = operands(jnp.bfloat16)
    dropout = {"dropout_rate": 0.5, "deterministic": True, "dropout_rng": jax.random.key(0)}
    for options in (
        dropout,
        {"broadcast_dropout": False},
        {"force_fp32_for_softmax": True},
        {"precision": "highest"},  # of products that are exact
        {"precision": "default"},
    ):
        assert changes(attention_fn, *args, **options) == 0


def test_modules_refuse_what_their_calls_ask_for():
    x = tokens(2, T, FEATURES)
    dropping = linen.MultiHeadDotProductAttention(
        HEADS, attention_fn=attention_fn, dropout_rate=0.1
    )
    params = linen_parameters()
    dropping.apply(params, x, deterministic=True)
    with pytest.raises(NotImplementedError, match="dropout_rate"):
        dropping.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(0)})
    sowing = linen.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn)
    with pytest.raises(NotImplementedError, match="sow_weights"):
        sowing.apply(params, x, sow_weights=True, mutable=["intermediates"])
    module = nnx_module(attention_fn, dropout_rate=0.1)
    with pytest.raises(NotImplementedError, match="dropout_rate"):
        module(x, deterministic=False)
    with pytest.raises(NotImplementedError, match="sow_weights"):
        module(x, deterministic=True, sow_weights=True)


@pytest.mark.parametrize(
    ("fn", "options", "error", "argument"),
    [
        (AttentionFn(causal=True), {}, ValueError, "causal"),  # T = 1 < S and no mask to say more
        (AttentionFn(window_size=(4, 0)), {"mask": jnp.ones(T)}, NotImplementedError, "window"),
        (attention_fn, {"mask": jnp.ones((3, 1, 1, T))}, ValueError, "mask"),
        (attention_fn, {"mask": jnp.ones((1, 1, 1, 1, T))}, ValueError, "mask"),
        (AttentionFn(causal=1), {}, ValueError, "causal"),
        (AttentionFn(implementation="fa4"), {}, NotImplementedError, "float32"),
    ],
)
def test_errors_name_the_argument(fn, options, error, argument):
    with pytest.raises(error, match=argument):
        fn(*operands(seqlen_q=1), **options)


def test_options_are_values():
    """A module that holds one can be a static argument, and isn't compiled again."""
    assert AttentionFn(causal=True) == AttentionFn(causal=True) != attention_fn
    assert hash(AttentionFn(causal=True)) == hash(AttentionFn(causal=True))
