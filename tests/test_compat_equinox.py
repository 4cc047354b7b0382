# SPDX-License-Identifier: Apache-2.0
"""`fa4_jax.compat.equinox` in place of `eqx.nn.MultiheadAttention`, with the same parameters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compat import assert_same, distance, tokens
from reference import assert_close

from fa4_jax import flash_attention
from fa4_jax.compat.equinox import MultiheadAttention

T, S, N = 10, 7, 4
SIZES = dict(num_heads=N, query_size=16, key_size=12, value_size=8, output_size=6, qk_size=8)
BIASES = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
KEY = jax.random.key(0)
CAUSAL = jnp.tri(T, S, dtype=bool)
PER_HEAD = jax.random.bernoulli(jax.random.key(1), 0.5, (N, T, S)).at[..., 0].set(True)


def inputs(*batch):
    return tuple(
        tokens(*batch, n, SIZES[f"{name}_size"], seed=seed)
        for seed, (n, name) in enumerate([(T, "query"), (S, "key"), (S, "value")])
    )


def rotate(query, key_, value):
    """A stand-in for a rotary embedding."""
    return query * jnp.cos(query.shape[0] * 1.0), jnp.flip(key_, -1), value


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"mask": CAUSAL}, {"causal": True}),
        ({"mask": PER_HEAD, "process_heads": rotate},) * 2,
    ],
    ids=["full", "causal", "a mask per head and processed heads"],
)
def test_it_gives_the_same_numbers_in_a_batch(theirs, ours):
    module = eqx.nn.MultiheadAttention(**SIZES, **BIASES, key=KEY)
    params, static = eqx.partition(module, eqx.is_array)

    def run(call, dtype):
        def function(params, *operands):
            module = eqx.combine(params, static)
            if call is ours:
                module = MultiheadAttention.from_equinox(module)
            return jax.vmap(lambda q, k, v: module(q, k, v, **call))(*operands)

        return function

    assert_same(run, ours, dict(theirs), (params, *inputs(2)))


def test_parameters_are_equinox_s():
    theirs = eqx.nn.MultiheadAttention(**SIZES, **BIASES, key=KEY)
    ours = MultiheadAttention(**SIZES, **BIASES, key=KEY)
    assert isinstance(ours, eqx.nn.MultiheadAttention)
    for made in (ours, MultiheadAttention.from_equinox(theirs)):
        for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(theirs), strict=True):
            assert np.array_equal(x, y)
        assert vars(made).keys() - vars(theirs).keys() == {"num_kv_heads", "compute_dtype"}


def test_a_model_switches_by_tree_at():
    class Model(eqx.Module):
        attention: eqx.nn.MultiheadAttention

    model = Model(eqx.nn.MultiheadAttention(**SIZES, key=KEY))
    switched = eqx.tree_at(lambda m: m.attention, model, replace_fn=MultiheadAttention.from_equinox)
    x = inputs()
    assert type(switched.attention) is MultiheadAttention
    assert_close(switched.attention(*x), model.attention(*x))


def test_grouped_queries_stay_grouped(monkeypatch):
    """In a batch, too: flash_attention sees two key/value heads."""
    module = MultiheadAttention(**SIZES, num_kv_heads=2, key=KEY)
    assert module.key_proj.weight.shape == (2 * 8, 12)
    seen = []

    def attend(q, k, v, **options):
        seen.append((q.shape, k.shape, v.shape))
        return flash_attention(q, k, v, **options)

    monkeypatch.setattr("fa4_jax._api.flash_attention", attend)
    x = inputs(3)
    out = jax.vmap(module)(*x)
    assert seen == [((T, N, 8), (S, 2, 8), (S, 2, 4))]

    # As Equinox's module with each key/value head's parameters twice.
    def twice(proj):
        weight = proj.weight.reshape(2, -1, proj.in_features)
        return jnp.repeat(weight, 2, 0).reshape(-1, proj.in_features)

    repeated = eqx.tree_at(
        lambda m: (m.query_proj, m.key_proj.weight, m.value_proj.weight, m.output_proj),
        eqx.nn.MultiheadAttention(**SIZES, key=KEY),
        (module.query_proj, twice(module.key_proj), twice(module.value_proj), module.output_proj),
    )
    assert_close(out, jax.vmap(repeated)(*x))


def test_every_argument_matters():
    module, x = MultiheadAttention(**SIZES, key=KEY), inputs()
    ids = jnp.arange(T) // 5, jnp.arange(S) // 5
    plain = module(*x)
    for options in (
        {"mask": CAUSAL},
        {"causal": True},
        {"causal": True, "causal_alignment": "bottom_right"},
        {"window_size": (1, 1)},
        {"softcap": 0.02},
        {"sinks": jnp.ones(N)},
        {"q_segment_ids": ids[0], "kv_segment_ids": ids[1]},
        {"kv_start": jnp.full(T, 2)},
        {"kv_end": jnp.full(T, 5)},
        {"process_heads": rotate},
    ):
        assert distance(module(*x, **options), plain) > 1e-4, options
    # A mask and keywords are both in force.
    assert distance(module(*x, mask=CAUSAL, softcap=0.02), module(*x, mask=CAUSAL)) > 1e-5
    both = module(*x, mask=CAUSAL, window_size=(1, None))
    assert_close(both, module(*x, causal=True, window_size=(1, None)))
    low = MultiheadAttention(**SIZES, key=KEY, compute_dtype=jnp.bfloat16)(*x)
    assert low.dtype == jnp.float32
    assert 1e-5 < distance(low, plain) < 1e-1
    with pytest.raises(NotImplementedError, match="float32"):
        module(*x, implementation="fa4")


def test_what_we_do_not_have_is_refused():
    module, x = MultiheadAttention(**SIZES, dropout_p=0.1, key=KEY), inputs()
    with pytest.raises(NotImplementedError, match="fa4_jax: dropout_p: got 0.1, expected 0"):
        module(*x, key=KEY)
    expected = MultiheadAttention(**SIZES, key=KEY)(*x)
    assert distance(module(*x, inference=True), expected) == 0
    assert distance(eqx.nn.inference_mode(module)(*x), expected) == 0
    with pytest.warns(UserWarning, match="deprecated"):
        assert distance(module(*x, deterministic=True), expected) == 0
    with pytest.raises(NotImplementedError, match="dropout_p"):
        eqx.nn.inference_mode(module)(*x, inference=False)
    alignment = {"causal": True, "causal_alignment": "bottom_right"}
    with pytest.raises(NotImplementedError, match="causal_alignment"):
        module(*x, mask=CAUSAL, inference=True, **alignment)


@pytest.mark.parametrize(
    ("options", "error", "argument"),
    [
        ({"mask": CAUSAL[:1]}, ValueError, "mask: got shape"),
        ({"mask": PER_HEAD[:2]}, ValueError, "mask: got shape"),
        ({"mask": CAUSAL.astype(jnp.float32)}, TypeError, "mask: got dtype"),
        ({"process_heads": lambda q, k, v: (q[:-1], k, v)}, ValueError, "process_heads: got"),
        ({"window": 3}, TypeError, "window"),
    ],
)
def test_errors_name_the_argument(options, error, argument):
    with pytest.raises(error, match=argument):
        MultiheadAttention(**SIZES, key=KEY)(*inputs(), **options)


def test_heads_have_to_fit():
    for kv_heads in (3, 0, 8):
        with pytest.raises(ValueError, match="num_kv_heads: got"):
            MultiheadAttention(**SIZES, num_kv_heads=kv_heads, key=KEY)
