# SPDX-License-Identifier: Apache-2.0
"""Intervals, segments, lengths, packed sequences and sinks, against masks written out in full.

Long because all of them become one interval, and share the masks and the oracle they are compared
with: values, leaks, transformations and meshes of each.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
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
    visible_packed,
    xla_attention,
    xla_gradients,
)

from fa4_jax import _intervals, dot_product_attention, flash_attention, flash_attention_varlen
from fa4_jax._intervals import Limits
from fa4_jax._spec import AttentionSpec

pytestmark = pytest.mark.usefixtures("small_blocks")

B, T, S, N, K = 2, 37, 45, 4, 2
SCALE = 1 / math.sqrt(8)
INT32 = np.iinfo(np.int32)

reference = functools.partial(flash_attention, implementation="reference", return_lse=True)
packed = functools.partial(flash_attention_varlen, implementation="reference", return_lse=True)

causal = {"causal": True}
bottom_right = {"causal": True, "causal_alignment": "bottom_right"}
window = {"window_size": (7, 3)}
window_bottom_right = {"window_size": (6, 2), "causal_alignment": "bottom_right"}


def bounds(rng: np.random.Generator) -> dict[str, np.ndarray]:
    start = rng.integers(-5, S + 5, (B, T))
    return {"kv_start": start, "kv_end": start + rng.integers(-2, 25, (B, T))}


def lengths(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "query_seq_lengths": np.array([T - 5, rng.integers(T)]),
        "key_value_seq_lengths": np.array([rng.integers(1, S), S + 7]),
    }


def runs(rng: np.random.Generator, length: int, ids: np.ndarray) -> np.ndarray:
    """[length]: each of `ids` once, in runs of random lengths, some of them 0."""
    cuts = np.sort(rng.integers(0, length + 1, len(ids) - 1))
    return np.repeat(ids, np.diff(cuts, prepend=0, append=length))


def segments(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Keys in runs of unordered ids, negative and extreme ones too; queries of any id, in any
    order, some that no key has."""
    ids = np.array([3, -1, 0, INT32.max, INT32.min, 8], np.int32)
    q_ids = np.stack([runs(rng, T, rng.permutation(ids)) for _ in range(B)])
    q_ids[1] = rng.permutation(q_ids[1])
    q_ids[0, 3] = 77
    return {
        "q_segment_ids": q_ids,
        "kv_segment_ids": np.stack([runs(rng, S, rng.permutation(ids)) for _ in range(B)]),
    }


def prefix_lm(rng: np.random.Generator) -> dict[str, np.ndarray]:
    prefix = rng.integers(0, 20, B)
    return {"kv_end": np.maximum(np.arange(1, T + 1), prefix[:, None])}


def only(name: str, make: Any) -> Any:
    return lambda rng: {name: make(rng)[name]}


def both(*makes: Any) -> Any:
    return lambda rng: {name: x for make in makes for name, x in make(rng).items()}


KINDS = {
    "kv_start": ({}, only("kv_start", bounds)),
    "kv_end": ({}, only("kv_end", bounds)),
    "interval": ({}, bounds),
    "interval, causal": (causal, bounds),
    "interval, window": (window, bounds),
    "q lengths": ({}, only("query_seq_lengths", lengths)),
    "kv lengths": ({}, only("key_value_seq_lengths", lengths)),
    "lengths, causal": (causal, lengths),
    "lengths, window": (window, lengths),
    "lengths, bottom-right": (bottom_right, lengths),
    "q lengths, bottom-right": (bottom_right, only("query_seq_lengths", lengths)),
    "kv lengths, bottom-right": (bottom_right, only("key_value_seq_lengths", lengths)),
    "lengths, window bottom-right": (window_bottom_right, lengths),
    "segments": ({}, segments),
    "segments, causal": (causal, segments),
    "segments, bottom-right": (bottom_right, segments),
    "segments, window": (window, segments),
    "segments, lengths": ({}, both(segments, lengths)),
    "prefix": ({}, prefix_lm),
    "prefix, window": ({"window_size": (9, None)}, prefix_lm),
    "everything": (window_bottom_right, both(segments, lengths, bounds)),
}


def operands(rng: np.random.Generator, dtype: Any = jnp.float32) -> list[jax.Array]:
    return arrays(rng, (B, T, N, 8), (B, S, K, 8), (B, S, K, 5), dtype=dtype)


def cotangents(rng: np.random.Generator, dtype: Any = jnp.float32) -> list[jax.Array]:
    return [*arrays(rng, (B, T, N, 5), dtype=dtype), *arrays(rng, (B, N, T))]


def check(attention: Any, oracle: Oracle, primals: Any, dout: Any, dlse: Any, sinks: Any) -> None:
    """out, lse and every gradient of `attention(q, k, v, sinks)` against the oracle's."""
    results, vjp = jax.vjp(attention, *primals, sinks)
    wide = as64(*primals)
    for name, x, y in zip(("out", "lse"), results, oracle.forward(*wide), strict=True):
        assert_close(x, y, name)
    *gradients, dsinks = vjp((dout, dlse))
    expected = oracle.backward(*wide, *as64(dout, dlse))[:3]
    for name, x, y in zip(("dq", "dk", "dv"), gradients, expected, strict=True):
        assert_close(x, y, name)
    if sinks is not None:
        assert_close(dsinks, oracle.dsinks(*wide, *as64(dout, dlse)), "dsinks")


SINKS = np.array([0.7, -np.inf, 9.0, -2.5], np.float32)


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, sinks: np.ndarray | None) -> None:
    band, make = KINDS[kind]
    rng = np.random.default_rng(list(KINDS).index(kind))
    mask = make(rng)
    seen = visible(T, S, **band, **mask)
    assert 0 < seen.mean() < 1
    check(
        lambda q, k, v, sinks: reference(q, k, v, sinks=sinks, **band, **mask),
        Oracle(seen, SCALE, sinks=None if sinks is None else as64(sinks)[0]),
        operands(rng),
        *cotangents(rng),
        None if sinks is None else jnp.asarray(sinks),
    )
    assert np.all(np.asarray(seen.any(-1)) == 1) or kind != "prefix"


@pytest.mark.parametrize("kind", KINDS)
def test_an_unseen_key_changes_no_bit(kind: str) -> None:
    """Of out, lse and dq in the rows that don't see it; and it changes the rows that do."""
    band, make = KINDS[kind]
    rng = np.random.default_rng(100 + list(KINDS).index(kind))
    mask = make(rng)
    q, k, v = operands(rng)
    dout, dlse = cotangents(rng)
    seen = visible(T, S, **band, **mask)[:, 0, 0]

    @jax.jit
    def rows(k, v):
        (out, lse), vjp = jax.vjp(lambda q: reference(q, k, v, **band, **mask), q)
        return out, lse.swapaxes(1, 2)[..., None], vjp((dout, dlse))[0]

    before = rows(k, v)
    for j in (0, 17, S - 1):
        after = rows(k.at[:, j].add(1e4), v.at[:, j].add(1e4))
        pairs = zip(before, after, strict=True)
        same = [np.all(np.asarray(x) == np.asarray(y), (2, 3)) for x, y in pairs]
        assert np.all(np.stack(same)[:, ~seen[:, :, j]]), (kind, j)
        assert not np.any(same[0][seen[:, :, j]]), (kind, j)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits_err_at_most_twice_as_much_as_xla(family: str, dtype: str) -> None:
    rng = np.random.default_rng(FAMILIES.index(family))
    q, k, v = inputs(family, rng, ((B, T, N, 32), (B, S, K, 32), (B, S, K, 32)), dtype)
    (dout,), (dlse,) = arrays(rng, q.shape, dtype=dtype), arrays(rng, (B, N, T))
    mask, sinks, scale = segments(rng), jnp.asarray(SINKS, dtype), 1 / math.sqrt(32)
    seen = visible(T, S, **causal, **mask)
    results, vjp = jax.vjp(
        lambda q, k, v, sinks: reference(q, k, v, sinks=sinks, **causal, **mask), q, k, v, sinks
    )
    oracle = Oracle(seen, scale, sinks=as64(sinks)[0])
    wide, wide_cotangents = as64(q, k, v), as64(dout, dlse)
    expected = (
        *oracle.forward(*wide),
        *oracle.backward(*wide, *wide_cotangents)[:3],
        oracle.dsinks(*wide, *wide_cotangents),
    )
    theirs, their_vjp = jax.vjp(lambda sinks: xla_attention(q, k, v, seen, scale, sinks), sinks)
    baseline = (
        *theirs,
        *jax.jit(xla_gradients)((q, k, v), results, (dout, dlse), seen, scale),
        *their_vjp((dout, jnp.where(theirs[1] == -jnp.inf, 0, dlse))),
    )
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    judged = zip(names, (*results, *vjp((dout, dlse))), expected, baseline, strict=True)
    assert not failures([verdict for case in judged for verdict in judge(*case)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize(
    "window_size", [(None, None), (0, 0), (11, None), (None, 4), (5, 9)], ids=str
)
def test_random_masks(window_size: tuple, alignment: str, sinks: bool, seed: int) -> None:
    """Everything at once: each array says something, nothing, or what makes no sense."""
    rng = np.random.default_rng([seed, sinks, alignment == "top_left", hash(window_size) % 1000])
    wild = np.array([INT32.min, -1, 0, 1, S, S + 1, INT32.max])

    def some(x: np.ndarray, neutral: Any) -> np.ndarray:
        return np.where(rng.random(x.shape) < rng.choice([0.0, 0.2, 1.0]), x, neutral)

    mask = bounds(rng) | lengths(rng)
    mask["kv_start"] = some(mask["kv_start"], some(rng.choice(wild, (B, T)), INT32.min))
    mask["kv_end"] = some(mask["kv_end"], some(rng.choice(wild, (B, T)), INT32.max))
    mask["query_seq_lengths"] = some(rng.integers(-3, T + 3, B), INT32.max)
    mask["key_value_seq_lengths"] = some(rng.integers(-3, S + 3, B), INT32.max)
    mask |= segments(rng) if rng.random() < 0.7 else _one_segment()
    band = {"window_size": window_size, "causal_alignment": alignment}
    # The oracle counts in int64.
    seen = visible(T, S, **band, **{name: x.astype(np.int64) for name, x in mask.items()})
    mask = {name: jnp.asarray(x.astype(np.int32)) for name, x in mask.items()}
    values = jnp.asarray(rng.choice([-np.inf, -1.0, 0.5, 30.0], N), jnp.float32) if sinks else None

    def attention(q, k, v, values):
        return reference(q, k, v, sinks=values, **band, **mask)

    oracle = Oracle(seen, SCALE, sinks=None if values is None else as64(values)[0])
    check(attention, oracle, operands(rng), *cotangents(rng), values)


def _one_segment() -> dict[str, np.ndarray]:
    return {"q_segment_ids": np.zeros((B, T)), "kv_segment_ids": np.zeros((B, S))}


@pytest.mark.parametrize("seed", range(3))
def test_a_scattered_segment_is_nan_where_it_is_seen_and_nowhere_else(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = segments(rng)
    # Ids 5 and 6 lie in two places each, 6 only among keys; all of 5 in batch 1 is out of sight.
    mask["kv_segment_ids"][:, [2, 30]] = 5
    mask["kv_segment_ids"][:, [7, 9]] = 6
    mask["q_segment_ids"][:, ::3] = 5
    mask["kv_start"] = np.repeat([[0], [31]], T, 1)
    ids, q_ids = mask["kv_segment_ids"], mask["q_segment_ids"]
    scattered = np.array([[_is_scattered(ids[b], x) for x in q_ids[b]] for b in range(B)])
    seen = visible(T, S, **mask)
    broken = scattered & np.stack([_hull(ids[b], q_ids[b], mask["kv_start"][b]) for b in range(B)])
    assert broken.any() and not broken.all()
    q, k, v = operands(rng)
    (out, lse), vjp = jax.vjp(lambda *x: reference(*x, **mask), q, k, v)
    expected_out, expected_lse = Oracle(seen, SCALE).forward(*as64(q, k, v))
    expected_out[broken] = np.nan
    expected_lse.swapaxes(1, 2)[broken] = np.nan
    for x, y in ((out, expected_out), (lse, expected_lse)):
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        finite = np.isfinite(y)
        np.testing.assert_allclose(np.asarray(x)[finite], y[finite], 0, 1e-5)
    given = cotangents(rng)
    alone = [
        jax.vjp(
            lambda *x, b=b: reference(*x, **{n: a[b : b + 1] for n, a in mask.items()}),
            *(x[b : b + 1] for x in (q, k, v)),
        )[1](tuple(x[b : b + 1] for x in given))
        for b in range(B)
    ]
    for dq, dk, dv in (vjp(tuple(given)), map(jnp.concatenate, zip(*alone, strict=True))):
        assert np.array_equal(np.isnan(dq).all((2, 3)), broken)
        assert np.array_equal(np.isnan(dq).any((2, 3)), broken)
        for gradient in (dk, dv):
            assert np.isnan(gradient[broken.any(1)]).any()


def test_gradients_of_nothing_but_scattered_rows_are_nan() -> None:
    rng = np.random.default_rng(28)
    q, k, v = (x[:1] for x in operands(rng))
    ids = {"q_segment_ids": np.zeros((1, T), int), "kv_segment_ids": np.zeros((1, S), int)}
    ids["kv_segment_ids"][0, 20] = 1
    results, vjp = jax.vjp(lambda *x: reference(*x, **ids), q, k, v)
    for x in (*results, *vjp(tuple(x[:1] for x in cotangents(rng)))):
        assert np.all(np.isnan(x))


def _is_scattered(ids: np.ndarray, one: int) -> bool:
    places = np.flatnonzero(ids == one)
    return len(places) > 0 and places[-1] - places[0] + 1 != len(places)


def _hull(ids: np.ndarray, q_ids: np.ndarray, kv_start: np.ndarray) -> np.ndarray:
    """bool [T]: does some key at or after kv_start lie up to the last one of the query's id."""
    last = np.array([np.flatnonzero(ids == x).max(initial=-1) for x in q_ids])
    return last >= kv_start


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_values_out_of_range_mean_the_end_of_the_range(dtype: Any) -> None:
    rng = np.random.default_rng(3)
    q, k, v = operands(rng)
    info = np.iinfo(dtype)
    for low, high in ((0, info.max), (info.min, info.max), (info.min, min(info.max, S + 1))):
        mask = {
            "kv_start": np.full((B, T), low, dtype),
            "kv_end": np.full((B, T), high, dtype),
            "query_seq_lengths": np.full(B, high, dtype),
            "key_value_seq_lengths": np.full(B, high, dtype),
        }
        for wrap in (np.asarray, jnp.asarray) if info.bits <= 32 else (np.asarray,):
            wrapped = {name: wrap(x) for name, x in mask.items()}
            out, lse = reference(q, k, v, **bottom_right, **wrapped)
            expected = reference(q, k, v, **bottom_right)
            np.testing.assert_array_equal(out, expected[0])
            np.testing.assert_array_equal(lse, expected[1])
    out, lse = reference(q, k, v, kv_start=np.full((B, T), info.max, dtype))
    assert np.all(np.asarray(out) == 0) and np.all(np.asarray(lse) == -np.inf)


def test_ids_of_64_bits_are_compared_whole() -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(4)
        q, k, v = operands(rng)
        ids = segments(rng)
        wide = {name: x.astype(np.int64) * 2**20 for name, x in ids.items()}
        assert np.array_equal(reference(q, k, v, **wide)[0], reference(q, k, v, **ids)[0])


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_keeps_its_promise(seed: int) -> None:
    """Whatever the arrays hold: bounds in order and in range, or the mark of a broken row."""
    rng = np.random.default_rng(seed)

    def wild(*shape: int) -> jax.Array:
        return jnp.asarray(rng.choice([0, 1, 5, S - 1, S, S + 1, INT32.max], shape), jnp.int32)

    ids = [jnp.asarray(rng.integers(0, 4, (B, length)), jnp.int32) for length in (T, S)]
    spec = AttentionSpec(
        softmax_scale=1.0, window_left=2**40, window_right=2**31 - 1, alignment="bottom_right"
    )
    limits = [
        Limits(wild(B, T), wild(B, T), *ids, wild(B), wild(B)),
        Limits(None, None, *ids, wild(B), wild(B)),
        Limits(cu_seqlens_q=wild(9), cu_seqlens_k=wild(9)),
    ]
    for limit in limits:
        _, (start, end) = _intervals.resolve(spec, limit, T, S)
        batch = 1 if limit.cu_seqlens_q is not None else B
        assert start.shape == end.shape == (batch, T)
        assert start.dtype == end.dtype == jnp.int32
        broken = (np.asarray(start) == _intervals.BROKEN) & (np.asarray(end) == _intervals.BROKEN)
        assert np.all((0 <= start) & (start <= end) & (end <= S) | broken)


def test_segments_of_long_rows_need_no_square_memory() -> None:
    length = 2**17
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    spec = AttentionSpec(softmax_scale=1.0)

    def interval(q_ids: jax.Array, kv_ids: jax.Array) -> Any:
        limits = Limits(q_segment_ids=q_ids, kv_segment_ids=kv_ids)
        return _intervals.resolve(spec, limits, length, length)[1]

    compiled = jax.jit(interval).lower(ids, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 256 * length


def test_a_band_stays_a_band_where_it_is_the_same_for_every_sequence() -> None:
    """Kernels know its blocks when they are launched; an interval's are read from memory."""
    rng = np.random.default_rng(5)
    spec = AttentionSpec(softmax_scale=1.0, window_right=0, alignment="bottom_right")
    top_left = AttentionSpec(softmax_scale=1.0, window_right=0)
    lens = Limits(key_value_seq_lengths=jnp.array([3, 4]))
    cu_seqlens = jnp.array([0, 5, T])
    segment_ids = [jnp.asarray(x) for x in segments(rng).values()]
    stays = [
        (spec, Limits()),
        (top_left, lens),
        (spec, Limits(cu_seqlens_q=cu_seqlens)),
        (spec, Limits(None, None, *segment_ids)),
    ]
    for given, limits in stays:
        assert _intervals.resolve(given, limits, T, S)[0] is given
    for limits in (lens, Limits(cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)):
        resolved, interval = _intervals.resolve(spec, limits, T, S)
        assert resolved == AttentionSpec(softmax_scale=1.0) and interval is not None


PACKINGS = {
    "one": ([0, 37], [0, 45]),
    "no sequence": ([0], [0]),
    "several": ([0, 9, 21, 37], [0, 20, 23, 45]),
    "longer queries": ([0, 20, 37], [0, 3, 10]),
    "zero-length": ([0, 0, 9, 9, 9, 30, 37, 37], [0, 7, 7, 20, 20, 20, 45, 45]),
    "padding": ([0, 10, 25], [0, 30, 41]),
    "padding before": ([4, 10, 25], [2, 30, 41]),
    "nothing": ([0, 0, 0], [0, 20, 45]),
    "no keys": ([0, 20, 37], [0, 0, 0]),
}
PACKED_BANDS = {
    "full": {},
    "causal": causal,
    "causal top-left": {"causal": True, "causal_alignment": "top_left"},
    "window": window,
    "window top-left": {"window_size": (4, 6), "causal_alignment": "top_left"},
    "causal window": {"causal": True, "window_size": (5, None)},
    "huge window": {"window_size": (2**40, 2**31 - 1)},
}


def packed_operands(rng: np.random.Generator, total_k: int = S) -> list[jax.Array]:
    return arrays(rng, (T, N, 8), (total_k, K, 8), (total_k, K, 5))


@functools.partial(jax.jit, static_argnums=0)
def packed_with_gradients(
    band: str, cu_seqlens_q: jax.Array, cu_seqlens_k: jax.Array, primals: Any, given: Any
) -> Any:
    """(out, lse), (dq, dk, dv) with a batch axis of 1. cu_seqlens are traced."""

    def attention(q, k, v):
        out, lse = packed(
            q[0], k[0], v[0], cu_seqlens_q, cu_seqlens_k, sinks=SINKS, **PACKED_BANDS[band]
        )
        return out[None], lse[None]

    results, vjp = jax.vjp(attention, *primals)
    return results, vjp(given)


@pytest.mark.parametrize("band", PACKED_BANDS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_sequences(packing: str, band: str) -> None:
    rng = np.random.default_rng(6)
    cu_seqlens_q, cu_seqlens_k = PACKINGS[packing]
    if len(cu_seqlens_q) > 1:
        # As many for all, so that they share a compiled program: some more of length 0 at the end.
        more = [(0, 8 - len(cu_seqlens_q))]
        cu_seqlens_q, cu_seqlens_k = (np.pad(x, more, "edge") for x in PACKINGS[packing])
    options = {"causal_alignment": "bottom_right"} | PACKED_BANDS[band]
    seen = visible_packed(cu_seqlens_q, cu_seqlens_k, T, S, **options)
    (dout,), (dlse,) = arrays(rng, (1, T, N, 5)), arrays(rng, (1, N, T))
    primals = [x[None] for x in packed_operands(rng)]
    results, gradients = packed_with_gradients(
        band, jnp.array(cu_seqlens_q), jnp.array(cu_seqlens_k), primals, (dout, dlse)
    )
    oracle = Oracle(seen, SCALE, sinks=as64(SINKS)[0])
    for x, y in zip(results, oracle.forward(*as64(*primals)), strict=True):
        assert_close(x, y)
    expected = oracle.backward(*as64(*primals, dout, dlse))[:3]
    for x, y in zip(gradients, expected, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_one_cu_seqlens_is_two_of_the_same(alignment: str) -> None:
    rng = np.random.default_rng(7)
    q, k, v = packed_operands(rng, T)
    cu_seqlens = np.array([0, 5, 5, 30, 35])
    for window_size in ((None, None), (3, None), (2, 5)):
        band = {"window_size": window_size, "causal_alignment": alignment}
        one = packed(q, k, v, cu_seqlens, **band)
        two = packed(q, k, v, cu_seqlens, cu_seqlens, **band)
        seen = visible_packed(cu_seqlens, cu_seqlens, T, T, **band)
        expected = Oracle(seen, SCALE).forward(*(x[None] for x in as64(q, k, v)))
        for x, y, z in zip(one, two, expected, strict=True):
            assert_close(x, z[0])
            assert_close(y, z[0])


def test_packed_padding_rows_are_zero() -> None:
    rng = np.random.default_rng(8)
    q, k, v = packed_operands(rng, T)
    (out, lse), vjp = jax.vjp(lambda *x: packed(*x, np.array([3, 12, 30]), causal=True), q, k, v)
    gradients = vjp((jnp.ones_like(out), jnp.ones_like(lse)))
    padding = np.r_[0:3, 30:T]
    assert np.all(np.asarray(out)[padding] == 0) and np.all(np.asarray(lse)[:, padding] == -np.inf)
    assert all(np.all(np.asarray(x)[padding] == 0) for x in gradients)
    assert all(np.all(np.isfinite(x)) for x in gradients)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ([0, 20, 10, 37], [0, 20, 20, 37]),
        ([-5, 10, 10**9, 12], [0, 10, 37, 37]),
        ([30, 20, 10, 0], [30, 30, 30, 30]),
        ([10**9] * 4, [37, 37, 37, 37]),
        ([-(10**9)] * 4, [0, 0, 0, 0]),
    ],
    ids=str,
)
def test_cu_seqlens_out_of_order_or_range(given: list[int], meant: list[int]) -> None:
    rng = np.random.default_rng(9)
    q, k, v = packed_operands(rng, T)
    results = [
        packed(q, k, v, np.array(cu), second, causal=True)
        for cu in (given, meant)
        for second in (None, np.array(cu))
    ]
    seen = visible_packed(meant, meant, T, T, causal=True)
    expected = Oracle(seen, SCALE).forward(*(x[None] for x in as64(q, k, v)))
    for result in results:
        for x, y in zip(result, expected, strict=True):
            assert_close(x, y[0])


def test_a_thousand_short_sequences() -> None:
    rng = np.random.default_rng(10)
    cu_seqlens = np.cumsum([0, *rng.integers(0, 4, 1000)])
    total = int(cu_seqlens[-1])
    q, k, v = arrays(rng, (total, 2, 8), (total, 1, 8), (total, 1, 8))
    out, lse = packed(q, k, v, cu_seqlens, cu_seqlens, causal=True)
    for m in rng.choice(1000, 40, replace=False):
        rows = slice(cu_seqlens[m], cu_seqlens[m + 1])
        length = rows.stop - rows.start
        if length == 0:
            continue
        oracle = Oracle(visible(length, length, causal=True), SCALE)
        expected = oracle.forward(*(x[None, rows] for x in as64(q, k, v)))
        assert_close(out[rows], expected[0][0])
        assert_close(lse[:, rows], expected[1][0])


def test_packed_sequences_visit_their_own_blocks_only() -> None:
    """Seen by NaN in all other blocks (of 16), which would come back from any that is visited."""
    rng = np.random.default_rng(27)
    q, k, v = arrays(rng, (64, N, 8), (96, K, 8), (96, K, 8))
    cu_seqlens_q, cu_seqlens_k = np.array([0, 16, 32, 32, 64]), np.array([0, 32, 32, 48, 80])
    for m, rows in enumerate(map(slice, cu_seqlens_q[:-1], cu_seqlens_q[1:])):
        others = np.ones(96, bool)
        others[cu_seqlens_k[m] : cu_seqlens_k[m + 1]] = False

        def attention(q, k, v, others=others):
            k, v = (jnp.where(others[:, None, None], jnp.nan, x) for x in (k, v))
            return packed(q, k, v, cu_seqlens_q, cu_seqlens_k)

        (out, _), vjp = jax.vjp(attention, q, k, v)
        dout = jnp.zeros_like(out).at[rows].set(1.0)
        dq = vjp((dout, jnp.zeros((N, 64))))[0]
        assert np.all(np.isfinite(out[rows])) and np.all(np.isfinite(dq[rows]))


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["no sinks", "sinks"])
def test_a_row_that_sees_no_key_has_its_sink_for_its_lse(sinks: np.ndarray | None) -> None:
    rng = np.random.default_rng(11)
    q, k, v = operands(rng)
    dout, dlse = cotangents(rng)
    given = None if sinks is None else jnp.asarray(sinks)
    for seqlen_k in (S, 0):
        primals = (q, k[:, :seqlen_k], v[:, :seqlen_k], given)

        def attention(q, k, v, sinks):
            return reference(q, k, v, sinks=sinks, kv_end=np.zeros((B, T), int))

        (out, lse), vjp = jax.vjp(attention, *primals)
        *gradients, dsinks = vjp((dout, dlse))
        expected = np.full(N, -np.inf) if sinks is None else sinks
        assert np.all(np.asarray(out) == 0)
        assert np.array_equal(lse, np.broadcast_to(expected[:, None], lse.shape))
        assert all(np.all(np.asarray(x) == 0) for x in gradients)
        if sinks is not None:
            assert_close(dsinks, np.where(sinks > -np.inf, dlse.sum((0, 2)), 0))


def test_a_sink_far_above_or_below_the_logits() -> None:
    rng = np.random.default_rng(12)
    q, k, v = operands(rng)
    sinks = jnp.array([1e4, -1e4, 200.0, -200.0], jnp.float32)
    out, lse = reference(q, k, v, sinks=sinks)
    plain_out, plain_lse = reference(q, k, v)
    above = np.array([True, False, True, False])
    assert np.all(np.asarray(out)[:, :, above] == 0)
    assert np.array_equal(lse[:, above], np.broadcast_to(sinks[above, None], (B, 2, T)))
    assert np.array_equal(out[:, :, ~above], plain_out[:, :, ~above])
    assert np.array_equal(lse[:, ~above], plain_lse[:, ~above])


def test_sinks_with_softcap_bias_and_a_negative_scale() -> None:
    """A sink is a logit as it is: neither scaled, nor capped, nor biased."""
    rng = np.random.default_rng(13)
    q, k, v = operands(rng)
    (bias,) = arrays(rng, (B, N, T, S))
    sinks = jnp.asarray(SINKS)
    dout, _ = cotangents(rng)

    def attention(q, k, v, sinks):
        return dot_product_attention(
            q, k, v, bias, sinks=sinks, softcap=2.0, scale=-0.4, implementation="reference"
        )

    out, vjp = jax.vjp(attention, q, k, v, sinks)
    grouped = as64(bias)[0].reshape(B, K, N // K, T, S)
    oracle = Oracle(visible(T, S), -0.4, grouped, 2.0, sinks=as64(sinks)[0])
    wide, wide_cotangents = as64(q, k, v), (*as64(dout), np.zeros((B, N, T)))
    assert_close(out, oracle.forward(*wide)[0], "out")
    *gradients, dsinks = vjp(dout)
    expected = (
        *oracle.backward(*wide, *wide_cotangents)[:3],
        oracle.dsinks(*wide, *wide_cotangents),
    )
    for name, x, y in zip(
        ("dq", "dk", "dv", "dsinks"), (*gradients, dsinks), expected, strict=True
    ):
        assert_close(x, y, name)


def test_the_oracles_sink_is_what_differentiating_a_dense_softmax_gives() -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(14)
        q, k, v = arrays(rng, (2, 5, 2, 4), (2, 6, 2, 4), (2, 6, 2, 4), dtype=jnp.float64)
        (dout,), (dlse,) = (
            arrays(rng, shape, dtype=jnp.float64) for shape in ((2, 5, 2, 4), (2, 2, 5))
        )
        sinks = jnp.array([0.3, -1.2])

        def dense(q, k, v, sinks):
            x = jnp.einsum("btnd,bsnd->bnts", q, k) / 2
            x = jnp.concatenate([x, jnp.broadcast_to(sinks[:, None, None], (2, 2, 5, 1))], -1)
            out = jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(x)[..., :-1], v)
            return (out * dout).sum() + (jax.nn.logsumexp(x, -1) * dlse).sum()

        expected = jax.grad(dense, (0, 1, 2, 3))(q, k, v, sinks)
        oracle = Oracle(visible(5, 6), 0.5, sinks=np.asarray(sinks))
        given = as64(q, k, v, dout, dlse)
        got = (*oracle.backward(*given)[:3], oracle.dsinks(*given))
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, 1e-10, 1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window_size", [None, (6, 3)])
def test_lengths_are_jax_nns(is_causal: bool, window_size: tuple | None) -> None:
    """Where a query sees a key: jax.nn gives the others the average of the values."""
    rng = np.random.default_rng(15)
    q, k, v = arrays(rng, (B, T, N, 8), (B, S, K, 8), (B, S, K, 8))
    lens = {"query_seq_lengths": np.array([30, 1]), "key_value_seq_lengths": np.array([S, 13])}
    kwargs = {"is_causal": is_causal, "local_window_size": window_size}
    seen = visible(T, S, causal=is_causal, window_size=window_size or (None, None), **lens)
    rows = seen.any(-1)[:, 0, 0]
    past = np.arange(T) >= lens["query_seq_lengths"][:, None]
    (dout,) = arrays(rng, q.shape)
    dout *= rows[..., None, None]
    lens = {name: jnp.asarray(x, jnp.int32) for name, x in lens.items()}
    ours = functools.partial(dot_product_attention, implementation="reference")
    results = [
        jax.vjp(lambda *x, attention=attention: attention(*x, **lens, **kwargs), q, k, v)
        for attention in (ours, jax.nn.dot_product_attention)
    ]
    (out, vjp), (expected, expected_vjp) = results
    assert_close(out[rows], expected[rows])
    assert np.all(np.asarray(expected)[past] == 0) and np.all(np.asarray(out)[past] == 0)
    for x, y in zip(vjp(dout), expected_vjp(dout), strict=True):
        assert_close(x, y)


def test_segments_are_jax_nns_with_a_dense_mask() -> None:
    rng = np.random.default_rng(16)
    q, k, v = arrays(rng, (B, T, N, 8), (B, S, K, 8), (B, S, K, 8))
    ids = segments(rng)
    seen = visible(T, S, **ids)[:, 0]
    ours = dot_product_attention(q, k, v, is_causal=True, implementation="reference", **ids)
    theirs = jax.nn.dot_product_attention(q, k, v, mask=seen, is_causal=True)
    rows = (seen & visible(T, S, causal=True)).any(-1)[:, 0]
    assert_close(ours[rows], theirs[rows])
    assert np.all(np.asarray(ours)[~rows] == 0)


def everything(rng: np.random.Generator) -> dict[str, jax.Array]:
    """Every array that `flash_attention` takes, by keyword."""
    mask = bounds(rng) | lengths(rng) | segments(rng)
    return {name: jnp.asarray(x, jnp.int32) for name, x in mask.items()} | {
        "sinks": jnp.asarray(SINKS)
    }


def loss(q, k, v, keywords):
    out, lse = reference(q, k, v, **window_bottom_right, **keywords)
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    lse = jnp.where(lse == -jnp.inf, 0, lse)
    return (out * weights).sum() + (lse * weights[..., 0].swapaxes(-1, -2)).sum()


def value_and_gradients(q, k, v, keywords):
    integers = {name: x for name, x in keywords.items() if name != "sinks"}

    def of(q, k, v, sinks):
        return loss(q, k, v, integers | {"sinks": sinks})

    return jax.value_and_grad(of, (0, 1, 2, 3))(q, k, v, keywords["sinks"])


@pytest.mark.parametrize("name", [*everything(np.random.default_rng(0)), "all"])
def test_vmap_over_each_array(name: str) -> None:
    rng = np.random.default_rng(17)
    q, k, v = operands(rng)
    choices = [everything(rng) for _ in range(3)]
    names = list(choices[0]) if name == "all" else [name]
    if name.endswith("segment_ids"):
        names = ["q_segment_ids", "kv_segment_ids"]
    stacked = choices[0] | {n: jnp.stack([choice[n] for choice in choices]) for n in names}
    axes = {n: 0 if n in names else None for n in stacked}
    results = jax.vmap(value_and_gradients, (None, None, None, axes))(q, k, v, stacked)
    for i in range(3):
        one = choices[0] | {n: choices[i][n] for n in names}
        expected = jax.jit(value_and_gradients)(q, k, v, one)
        for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
            assert_close(x[i], y, f"{name} {i}", 1e-5)


def test_vmap_over_cu_seqlens() -> None:
    rng = np.random.default_rng(18)
    q, k, v = packed_operands(rng, T)
    cu_seqlens = jnp.array([[0, 10, 20, 37], [0, 0, 5, 30], [1, 2, 3, 4]])
    results = jax.vmap(lambda cu: packed(q, k, v, cu, causal=True))(cu_seqlens)
    for i, cu in enumerate(cu_seqlens):
        for x, y in zip(results, packed(q, k, v, cu, causal=True), strict=True):
            assert_close(x[i], y)


def test_integers_have_float0_cotangents() -> None:
    rng = np.random.default_rng(19)
    q, k, v = operands(rng)
    keywords = everything(rng)
    gradients = jax.grad(loss, 3, allow_int=True)(q, k, v, keywords)
    for name, x in keywords.items():
        expected = jnp.float32 if name == "sinks" else jax.dtypes.float0
        assert (gradients[name].shape, gradients[name].dtype) == (x.shape, expected)


def test_checkpoint_and_scan_change_no_value() -> None:
    rng = np.random.default_rng(20)
    q, k, v = operands(rng)
    keywords = everything(rng)
    policy = jax.checkpoint_policies.save_only_these_names("context")
    expected = jax.grad(loss)(q, k, v, keywords)
    got = jax.grad(jax.checkpoint(loss, policy=policy))(q, k, v, keywords)
    assert_close(got, expected)

    def scanned(q):
        return jax.lax.scan(lambda c, _: (c + loss(q, k, v, keywords), None), 0.0, length=2)[0]

    assert_close(jax.grad(scanned)(q), 2 * expected, tolerance=1e-5)


def batch_spec(x: jax.Array) -> P:
    """Of an array of `everything`, or an operand: batch leads in all but the sinks."""
    return P() if x.ndim == 1 and x.shape[0] == N else P("x")


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma: bool) -> None:
    """The batch is split, sinks are replicated: their gradient comes out summed."""
    rng = np.random.default_rng(21)
    arguments = (*operands(rng), everything(rng))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    specs = jax.tree.map(batch_spec, arguments)

    def total(q, k, v, keywords):
        # The weights of `loss` don't know which shard they are on.
        out, lse = reference(q, k, v, **window_bottom_right, **keywords)
        return jax.lax.psum((out**2).sum() + jnp.where(lse == -jnp.inf, 0, lse).sum(), "x")

    sharded = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)

    def whole(q, k, v, keywords):
        out, lse = reference(q, k, v, **window_bottom_right, **keywords)
        return (out**2).sum() + jnp.where(lse == -jnp.inf, 0, lse).sum()

    def with_gradients(function):
        def of(q, k, v, sinks):
            return function(q, k, v, arguments[3] | {"sinks": sinks})

        return jax.jit(jax.value_and_grad(of, (0, 1, 2, 3)))(*arguments[:3], arguments[3]["sinks"])

    results, expected = with_gradients(sharded), with_gradients(whole)
    for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert_close(x, y, tolerance=1e-5)


def test_shard_map_with_some_arrays_replicated() -> None:
    """Ids and bounds of different types meet, in sorts and searches too."""
    rng = np.random.default_rng(29)
    q, k, v = operands(rng)
    mask = {n: x for n, x in everything(rng).items() if n != "sinks"}
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    for replicated in mask:
        one = {n: x[:1] if n == replicated else x for n, x in mask.items()}
        specs = {n: P() if n == replicated else P("x") for n in mask}
        sharded = jax.shard_map(
            lambda q, k, v, mask: reference(q, k, v, **bottom_right, **mask),
            mesh=mesh,
            in_specs=(P("x"), P("x"), P("x"), specs),
            out_specs=P("x"),
        )
        twice = mask | {replicated: jnp.concatenate([mask[replicated][:1]] * 2)}
        expected = reference(q, k, v, **bottom_right, **twice)
        for x, y in zip(jax.jit(sharded)(q, k, v, one), expected, strict=True):
            assert_close(x, y, replicated)


@pytest.mark.parametrize("axis", ["batch", "heads"])
def test_explicit_sharding(axis: str) -> None:
    rng = np.random.default_rng(22)
    q, k, v = operands(rng)
    keywords = everything(rng)
    expected = jax.jit(value_and_gradients)(q, k, v, keywords)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))

    def place(x: jax.Array) -> jax.Array:
        if axis == "batch":
            return jax.device_put(x, jax.NamedSharding(mesh, batch_spec(x)))
        is_operand = x.ndim == 4
        spec = P(None, None, "x") if is_operand else P("x") if x.shape == (N,) else P()
        return jax.device_put(x, jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        placed = jax.tree.map(place, (q, k, v, keywords))
        results = jax.jit(value_and_gradients)(*placed)
    for x, y in zip(
        jax.tree.leaves(jax.device_get(results)), jax.tree.leaves(expected), strict=True
    ):
        assert_close(x, y, tolerance=1e-5)


def test_a_sharded_batch_needs_no_collective() -> None:
    rng = np.random.default_rng(25)
    arguments = (*operands(rng), everything(rng), tuple(cotangents(rng)))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    placed = jax.tree.map(
        lambda x: jax.device_put(x, jax.NamedSharding(mesh, batch_spec(x))), arguments
    )

    def step(q, k, v, keywords, given):
        results, vjp = jax.vjp(lambda *x: reference(*x, **bottom_right, **keywords), q, k, v)
        return results, vjp(given)

    text = jax.jit(step).lower(*placed).compile().as_text()
    assert "f32[1,37,4,8]" in text
    assert not re.search(r"(all|collective|reduce)-\w+\(", text)


def test_export_with_a_symbolic_batch() -> None:
    rng = np.random.default_rng(26)
    arguments = (*operands(rng), everything(rng))
    (batch,) = jax.export.symbolic_shape("b")
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (batch, *x.shape[1:]) if batch_spec(x) else x.shape, x.dtype
        ),
        arguments,
    )
    exported = jax.export.export(jax.jit(jax.grad(loss)))(*shapes)
    got = jax.export.deserialize(exported.serialize()).call(*arguments)
    assert_close(got, jax.grad(loss)(*arguments))


def test_rank_3_takes_arrays_without_batch() -> None:
    rng = np.random.default_rng(23)
    q, k, v = operands(rng)
    keywords = everything(rng)
    one = {n: x if x.shape in ((N,), (B,)) else x[0] for n, x in keywords.items()}
    one |= {n: x[:1] for n, x in one.items() if n.endswith("lengths")}
    out, lse = reference(q[0], k[0], v[0], **bottom_right, **one)
    expected = reference(q, k, v, **bottom_right, **keywords)
    assert_close(out, expected[0][0])
    assert_close(lse, expected[1][0])


KERNEL_CASES = {
    "bounds": bounds,
    "nothing": lambda rng: {"kv_start": np.full((B, T), S), "kv_end": np.full((B, T), S)},
    "all": lambda rng: {"kv_start": np.zeros((B, T), int), "kv_end": np.full((B, T), S)},
    "packed": lambda rng: {
        "kv_start": np.repeat([[0, 10, 10, 40]], [9, 1, 12, 15], 1)[[0, 0]],
        "kv_end": np.repeat([[10, 10, 40, 45]], [9, 1, 12, 15], 1)[[0, 0]],
    },
    "broken": lambda rng: {
        name: np.where(np.arange(T) % 11 == 3, _intervals.BROKEN, x).astype(np.int32)
        for name, x in bounds(rng).items()
    },
}


@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize("band", [(-T, S), (-T, 0), (-9, 4), (3, 40)])
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_what_kernels_get_says_what_is_seen(monkeypatch, case, band, block) -> None:
    """Rows, and what their blocks promise to a kernel that skips and doesn't mask by them."""
    monkeypatch.setattr(_intervals, "BLOCK", block)
    jax.clear_caches()  # compiled for another block
    given = KERNEL_CASES[case](np.random.default_rng(31))
    # Of scattered rows, a block's interval also has keys between theirs.
    monotone = case in ("nothing", "all", "packed")
    start, end = (jnp.asarray(given[name], jnp.int32) for name in ("kv_start", "kv_end"))
    got = _intervals.for_kernels(band, start, end, S)
    kv_start, kv_end, key_range, query_range = map(np.asarray, got)
    i, j = np.arange(T)[:, None], np.arange(S)
    broken = given["kv_start"] == _intervals.BROKEN
    seen = (j >= given["kv_start"][..., None]) & (j < given["kv_end"][..., None])
    seen = (seen & (j >= i + band[0]) & (j <= i + band[1])) | broken[..., None]
    assert kv_start.shape == kv_end.shape == (B, 128)
    assert ((kv_start[:, :T] == -1) == broken).all() and (kv_start[:, T:] == 0).all()
    assert ((0 <= kv_end) & (kv_end <= S)).all() and (kv_end[:, T:] == 0).all()
    rows = (j >= kv_start[:, :T, None]) & (j < kv_end[:, :T, None])
    assert np.array_equal(rows, seen)
    for b in range(B):
        for m in range(-(-T // block)):
            low_start, high_end, high_start, low_end = key_range[b, m]
            visible_here = seen[b, m * block : (m + 1) * block]
            assert visible_here[:, (j >= high_start) & (j < low_end)].all()
            visible_here = visible_here[~broken[b, m * block : (m + 1) * block]]
            assert not visible_here[:, (j < low_start) | (j >= high_end)].any()
            if visible_here.any():  # tight
                assert visible_here[:, low_start].any() and visible_here[:, high_end - 1].any()
        for n in range(-(-S // block)):
            first, last, full_first, full_last = query_range[b, n]
            assert all(x % block == 0 for x in query_range[b, n])
            visible_here = seen[b, :, n * block : (n + 1) * block]
            rows = np.arange(T)
            assert not visible_here[(rows < first) | (rows >= last)].any()
            assert visible_here[(rows >= full_first) & (rows < full_last)].all()
            blocks = [visible_here[m : m + block] for m in range(0, T, block)]
            if monotone and any(x.any() for x in blocks):
                assert blocks[first // block].any() and blocks[last // block - 1].any()
            if any(x.all() for x in blocks):
                assert full_first < full_last
    jax.clear_caches()


def test_kernels_get_packed_segments_as_few_launches() -> None:
    """No loop and no scan over the length: each would be dozens of launches a call."""
    shape = jax.ShapeDtypeStruct((2, 4096), jnp.int32)
    text = _intervals.for_kernels.lower((-4096, 0), shape, shape, 4096).as_text()
    assert not re.search(r"stablehlo\.(while|sort|reduce_window)", text)
