# SPDX-License-Identifier: Apache-2.0
"""The blockwise reference against float64: values, gradients, masks, memory."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    FAMILIES,
    Oracle,
    arrays,
    as64,
    assert_close,
    failures,
    inputs,
    judge,
    visible,
    xla_attention,
    xla_gradients,
)

from fa4_jax import dot_product_attention, flash_attention

BANDS = {
    "full": {},
    "causal": {"causal": True},
    "causal_bottom_right": {"causal": True, "causal_alignment": "bottom_right"},
    "window": {"window_size": (7, 3)},
    "left_only": {"window_size": (5, None)},
    "right_only": {"window_size": (None, 9)},
    "window_bottom_right": {"window_size": (4, 2), "causal_alignment": "bottom_right"},
    "causal_window": {"window_size": (11, 6), "causal": True},
    "diagonal": {"window_size": (0, 0)},
}


pytestmark = pytest.mark.usefixtures("small_blocks")


def all_gradients(attention, q, k, v, dout, dlse):
    """(out, lse), (dq, dk, dv)."""
    results, vjp = jax.vjp(attention, q, k, v)
    return results, vjp((dout, dlse))


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize(
    ("lengths", "heads"),
    [
        ((1, 1), (2, 2)),
        ((3, 40), (4, 2)),
        ((33, 33), (3, 1)),
        ((40, 3), (2, 2)),
        ((16, 48), (4, 2)),
        ((50, 20), (3, 1)),
    ],
    ids=str,
)
def test_values_and_gradients(band: str, lengths: tuple[int, int], heads: tuple[int, int]) -> None:
    rng = np.random.default_rng(hash((band, lengths, heads)) % 2**32)
    (seqlen_q, seqlen_k), (num_q, num_kv) = lengths, heads
    q, k, v, dout, dlse = arrays(
        rng,
        (2, seqlen_q, num_q, 8),
        (2, seqlen_k, num_kv, 8),
        (2, seqlen_k, num_kv, 5),
        (2, seqlen_q, num_q, 5),
        (2, num_q, seqlen_q),
    )
    results, gradients = all_gradients(
        lambda *x: flash_attention(*x, **BANDS[band], return_lse=True, implementation="reference"),
        q, k, v, dout, dlse,
    )  # fmt: skip
    oracle = Oracle(visible(seqlen_q, seqlen_k, **BANDS[band]), 1 / math.sqrt(8))
    for name, x, y in zip(("out", "lse"), results, oracle.forward(*as64(q, k, v)), strict=True):
        assert_close(x, y, name)
    expected = oracle.backward(*as64(q, k, v, dout, dlse))[:3]
    for name, x, y in zip(("dq", "dk", "dv"), gradients, expected, strict=True):
        assert_close(x, y, name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits_err_at_most_twice_as_much_as_xla(family: str, dtype: str) -> None:
    rng = np.random.default_rng(FAMILIES.index(family))
    q, k, v = inputs(family, rng, ((2, 70, 4, 32), (2, 90, 2, 32), (2, 90, 2, 32)), dtype)
    (dout,), (dlse,) = arrays(rng, q.shape, dtype=dtype), arrays(rng, (2, 4, 70))
    seen, scale = visible(70, 90, causal=True), 1 / math.sqrt(32)
    results, gradients = all_gradients(
        lambda *x: flash_attention(*x, causal=True, return_lse=True, implementation="reference"),
        q, k, v, dout, dlse,
    )  # fmt: skip
    oracle = Oracle(seen, scale)
    expected = (
        *oracle.forward(*as64(q, k, v)),
        *oracle.backward(*as64(q, k, v, dout, dlse))[:3],
    )
    baseline = (
        *jax.jit(xla_attention)(q, k, v, seen, scale),
        *jax.jit(xla_gradients)((q, k, v), results, (dout, dlse), seen, scale),
    )
    names = ("out", "lse", "dq", "dk", "dv")
    judged = zip(names, (*results, *gradients), expected, baseline, strict=True)
    assert not failures([verdict for case in judged for verdict in judge(*case)])


def test_float64_stays_float64() -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(5)
        q, k, v = arrays(rng, (1, 9, 2, 8), (1, 9, 1, 8), (1, 9, 1, 8), dtype=jnp.float64)
        out, lse = flash_attention(q, k, v, return_lse=True, implementation="reference")
        assert (out.dtype, lse.dtype) == (jnp.float64, jnp.float64)
        expected = Oracle(visible(9, 9), 1 / math.sqrt(8)).forward(*as64(q, k, v))
        assert_close(out, expected[0], tolerance=1e-14)
        assert_close(lse, expected[1], tolerance=1e-14)


@pytest.mark.parametrize(
    "bias_shape", [(2, 4, 33, 40), (1, 4, 33, 40), (2, 1, 1, 40), (1, 1, 33, 1)]
)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_bias_mask_and_softcap(bias_shape: tuple[int, ...], softcap: float | None) -> None:
    rng = np.random.default_rng(7)
    q, k, v, dout, bias = arrays(
        rng, (2, 33, 4, 8), (2, 40, 2, 8), (2, 40, 2, 8), (2, 33, 4, 8), bias_shape
    )
    # Row 5 of batch 0 sees nothing.
    mask = rng.random((2, 1, 33, 40)) < 0.7
    mask[0, :, 5] = False

    def attention(q, k, v, bias):
        return dot_product_attention(
            q, k, v, bias, mask, is_causal=True, softcap=softcap, implementation="reference"
        )

    out, vjp = jax.vjp(attention, q, k, v, bias)
    grouped = (2, 2, 2, 33, 40)
    oracle = Oracle(
        visible(33, 40, causal=True) & mask[:, :, None],
        1 / math.sqrt(8),
        np.broadcast_to(as64(bias)[0], (2, 4, 33, 40)).reshape(grouped),
        softcap,
    )
    assert_close(out, oracle.forward(*as64(q, k, v))[0], "out")
    *gradients, ds = oracle.backward(*as64(q, k, v, dout, np.zeros((2, 4, 33))))
    axes = tuple(axis for axis in range(4) if bias_shape[axis] == 1)
    gradients.append(ds.reshape(2, 4, 33, 40).sum(axes, keepdims=True))
    for name, x, y in zip(("dq", "dk", "dv", "dbias"), vjp(dout), gradients, strict=True):
        assert_close(x, y, name)


def test_lengths_and_intervals_hide_keys_and_queries() -> None:
    rng = np.random.default_rng(8)
    q, k, v, dout = arrays(rng, (3, 20, 2, 8), (3, 24, 2, 8), (3, 24, 2, 8), (3, 20, 2, 8))
    q_lengths, kv_lengths = np.array([20, 7, 0]), np.array([24, 24, 100])
    start = rng.integers(-3, 20, (3, 20))
    end = start + rng.integers(0, 9, (3, 20))
    out, vjp = jax.vjp(
        lambda *x: flash_attention(
            *x,
            causal=True,
            query_seq_lengths=q_lengths,
            key_value_seq_lengths=kv_lengths,
            kv_start=start,
            kv_end=end,
            implementation="reference",
        ),
        q, k, v,
    )  # fmt: skip
    i, j = np.arange(20)[:, None], np.arange(24)
    seen = (j <= i) & (j >= start[:, :, None]) & (j < end[:, :, None])
    seen &= (i < q_lengths[:, None, None]) & (j < kv_lengths[:, None, None])
    oracle = Oracle(seen[:, None, None], 1 / math.sqrt(8))
    assert_close(out, oracle.forward(*as64(q, k, v))[0], "out")
    expected = oracle.backward(*as64(q, k, v, dout, np.zeros((3, 2, 20))))[:3]
    for name, x, y in zip(("dq", "dk", "dv"), vjp(dout), expected, strict=True):
        assert_close(x, y, name)


def test_a_row_that_sees_nothing_is_zero_whatever_its_cotangents_are() -> None:
    rng = np.random.default_rng(9)
    q, k, v, dout, dlse = arrays(
        rng, (1, 12, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8), (1, 12, 2, 8), (1, 2, 12)
    )
    # Bottom-right causal with T > S: the first 7 queries see nothing.
    (out, lse), gradients = all_gradients(
        lambda *x: flash_attention(
            *x, causal=True, causal_alignment="bottom_right", return_lse=True,
            implementation="reference"
        ),
        q, k, v, dout, dlse.at[:, :, :7].set(jnp.nan),
    )  # fmt: skip
    assert np.all(np.asarray(out[:, :7]) == 0)
    assert np.all(np.asarray(lse[:, :, :7]) == -np.inf)
    assert np.all(np.asarray(gradients[0][:, :7]) == 0)
    assert all(np.all(np.isfinite(np.asarray(x))) for x in gradients)
    assert np.all(np.asarray(gradients[0][:, 7:]) != 0)


def test_an_unseen_key_has_no_influence_at_all() -> None:
    rng = np.random.default_rng(10)
    q, k, v = arrays(rng, (1, 30, 2, 8), (1, 30, 2, 8), (1, 30, 2, 8))
    window = {"window_size": (4, 2), "implementation": "reference"}
    seen = visible(30, 30, window_size=(4, 2))
    out = np.asarray(flash_attention(q, k, v, **window))
    for j in (0, 13, 29):
        changed = flash_attention(q, k.at[:, j].add(1e4), v.at[:, j].add(1e4), **window)
        same = (np.asarray(changed) == out).all(axis=(0, 2, 3))
        assert np.array_equal(same, ~seen[:, j])


def test_forward_over_reverse_works_and_reverse_over_reverse_says_no() -> None:
    rng = np.random.default_rng(11)
    q, k, v = arrays(rng, (1, 6, 1, 4), (1, 6, 1, 4), (1, 6, 1, 4))

    def loss(q):
        return (flash_attention(q, k, v, implementation="reference") ** 2).sum()

    def plain(q):
        p = jax.nn.softmax(jnp.einsum("btnd,bsnd->bnts", q, k) / 2)
        return (jnp.einsum("bnts,bsnd->btnd", p, v) ** 2).sum()

    _, hessian_product = jax.jvp(jax.grad(loss), (q,), (jnp.ones_like(q),))
    _, expected = jax.jvp(jax.grad(plain), (q,), (jnp.ones_like(q),))
    assert_close(hessian_product, expected, tolerance=1e-5)
    with pytest.raises(ValueError, match="Reverse-mode differentiation"):
        jax.grad(lambda q: jax.grad(loss)(q).sum())(q)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (q,), (q,))


@pytest.mark.parametrize("defect", ["element", "scale", "nan", "infinity", "shape"])
def test_the_rule_fails_what_is_wrong(defect: str) -> None:
    rng = np.random.default_rng(12)
    expected = rng.standard_normal((2, 50, 2, 16))
    expected[0, 0] = -np.inf
    baseline = jnp.asarray(expected, jnp.bfloat16)
    assert not failures(judge("out", baseline, expected, baseline))
    wrong = {
        "element": baseline.at[1, 3, 1, 7].add(0.05),
        "scale": baseline * 1.02,
        "nan": baseline.at[1, 3, 1, 7].set(jnp.nan),
        "infinity": baseline.at[0, 0].set(jnp.inf),
        "shape": baseline[:, :49],
    }
    assert failures(judge("out", wrong[defect], expected, baseline))
