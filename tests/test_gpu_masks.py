# SPDX-License-Identifier: Apache-2.0
"""Rows with intervals, softcap and sinks on a GPU, through the public calls, against float64.

Masks are traced arrays, so that one compiled program serves many. The oracle and the baseline run
on the GPU at a few padded shapes, heads folded as `gpu` says, the mask as data. A mask written out
in full, by `reference.visible` and `visible_packed`, is the only thing that says who sees whom.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu import COMPILER_OPTIONS, GROUP, HEADS, NAMES, ROWS, poison, record
from reference import (
    FAMILIES,
    Oracle,
    failures,
    inputs,
    judge,
    measure,
    verdicts,
    visible,
    visible_packed,
    xla_attention,
    xla_gradients,
)

from fa4_jax import _ffi, explain, flash_attention, flash_attention_varlen
from fa4_jax._variants import Variant

pytestmark = pytest.mark.gpu

IMPLEMENTATION = "fa4"
# Padded lengths and head dims of the oracle: few, so that few programs are compiled.
LENGTHS = (128, 384, 1024, 2176, 3200)
HEAD_DIMS = (64, 128, 256)
# What folding pads (batch, key/value head) pairs to a multiple of.
PAIRS = 4

BOTTOM_RIGHT = {"causal": True, "causal_alignment": "bottom_right"}
CAUSAL = {"causal": True}

Arrays = Mapping[str, np.ndarray]


# --- Kinds of masks: a static band, and the arrays that a call with it is given.
# -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a call that isn't packed; a packed one has one batch entry of B T queries, B S keys."""

    batch: int
    seqlen_q: int
    seqlen_k: int


def bounds(rng: np.random.Generator, sizes: Sizes) -> dict[str, np.ndarray]:
    """Of any rows, some of them beyond the keys and some backwards."""
    shape = sizes.batch, sizes.seqlen_q
    start = rng.integers(-5, sizes.seqlen_k + 5, shape)
    return {"kv_start": start, "kv_end": start + rng.integers(-9, sizes.seqlen_k + 1, shape)}


def wide_bounds(rng: np.random.Generator, sizes: Sizes) -> dict[str, np.ndarray]:
    """Runs of rows that see the same keys, so that there are whole tiles."""
    found = {}
    for name, x in bounds(rng, sizes).items():
        held = x[:, rng.integers(sizes.seqlen_q, size=3)]
        which = np.sort(rng.integers(0, 3, (sizes.batch, sizes.seqlen_q)), 1)
        found[name] = np.take_along_axis(held, which, 1)
    return found


def runs(rng: np.random.Generator, length: int, ids: np.ndarray) -> np.ndarray:
    """[length]: each of `ids` once, in runs of random lengths, some of them 0."""
    cuts = np.sort(rng.integers(0, length + 1, len(ids) - 1))
    return np.repeat(ids, np.diff(cuts, prepend=0, append=length))


def segments(rng: np.random.Generator, sizes: Sizes) -> dict[str, np.ndarray]:
    """Few or many, in the same order on both sides; some ids lack on one."""
    ids = np.arange(rng.choice([1, 3, 12]), dtype=np.int32)
    lengths = {"q_segment_ids": sizes.seqlen_q, "kv_segment_ids": sizes.seqlen_k}
    return {
        name: np.stack([runs(rng, length, ids) for _ in range(sizes.batch)])
        for name, length in lengths.items()
    }


def self_segments(rng: np.random.Generator, sizes: Sizes) -> dict[str, np.ndarray]:
    """The same on both sides as far as they go, as in training on packed documents."""
    longest = max(sizes.seqlen_q, sizes.seqlen_k)
    ids = np.stack([runs(rng, longest, np.arange(5, dtype=np.int32)) for _ in range(sizes.batch)])
    return {"q_segment_ids": ids[:, : sizes.seqlen_q], "kv_segment_ids": ids[:, : sizes.seqlen_k]}


def lengths(rng: np.random.Generator, sizes: Sizes) -> dict[str, np.ndarray]:
    """From 0 to more than there is."""
    return {
        "query_seq_lengths": rng.integers(0, sizes.seqlen_q + 2, sizes.batch),
        "key_value_seq_lengths": rng.integers(0, sizes.seqlen_k + 2, sizes.batch),
    }


def prefix_lm(rng: np.random.Generator, sizes: Sizes) -> dict[str, np.ndarray]:
    """Causal, after a prefix that every query sees."""
    prefix = rng.integers(0, sizes.seqlen_k + 1, (sizes.batch, 1))
    return {"kv_end": np.maximum(np.arange(1, sizes.seqlen_q + 1), prefix)}


def packed(rng: np.random.Generator, sizes: Sizes) -> dict[str, np.ndarray]:
    """Sequences of any lengths, some 0, with padding behind or without."""
    number = 9

    def cumulated(total: int) -> np.ndarray:
        last = rng.choice([total, rng.integers(total + 1)])
        return np.sort(np.r_[0, rng.integers(0, last + 1, number - 1), last])

    return {
        "cu_seqlens_q": cumulated(sizes.batch * sizes.seqlen_q),
        "cu_seqlens_k": cumulated(sizes.batch * sizes.seqlen_k),
    }


def self_packed(rng: np.random.Generator, sizes: Sizes) -> dict[str, np.ndarray]:
    """One `cu_seqlens` for queries and keys, where they are as many."""
    found = packed(rng, sizes)
    if sizes.seqlen_q == sizes.seqlen_k:
        del found["cu_seqlens_k"]
    return found


def nothing(rng: np.random.Generator, sizes: Sizes) -> dict[str, np.ndarray]:
    """Only the band."""
    return {}


def both(*makes: Callable) -> Callable:
    """Everything that each of them says."""
    return lambda rng, sizes: {n: x for make in makes for n, x in make(rng, sizes).items()}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A static band and what makes the arrays."""

    band: dict[str, Any]
    make: Callable[[np.random.Generator, Sizes], dict[str, np.ndarray]]

    @property
    def is_packed(self) -> bool:
        return self.make in (packed, self_packed)

    def seen(self, sizes: Sizes, arrays: Arrays) -> np.ndarray:
        """bool [B, T, S], or [1, B T, B S] of packed sequences."""
        if not self.is_packed:
            seen = visible(sizes.seqlen_q, sizes.seqlen_k, **self.band, **arrays)
            shape = sizes.batch, sizes.seqlen_q, sizes.seqlen_k
            return np.broadcast_to(seen[:, 0, 0] if seen.ndim == 5 else seen, shape)
        cu_q = arrays["cu_seqlens_q"]
        cu_k = arrays.get("cu_seqlens_k", cu_q)
        totals = sizes.batch * sizes.seqlen_q, sizes.batch * sizes.seqlen_k
        band = {"causal_alignment": "bottom_right", **self.band}
        return visible_packed(cu_q, cu_k, *totals, **band)[None]


KINDS = {
    "full": Kind({}, nothing),
    "causal": Kind(CAUSAL, nothing),
    "causal_bottom_right": Kind(BOTTOM_RIGHT, nothing),
    "bounds": Kind({}, bounds),
    "wide_bounds_causal": Kind(CAUSAL, wide_bounds),
    "bounds_window": Kind({"window_size": (90, 33)}, wide_bounds),
    "segments": Kind({}, segments),
    "segments_causal": Kind(CAUSAL, self_segments),
    "segments_window": Kind({"window_size": (70, 20)}, self_segments),
    "lengths": Kind({}, lengths),
    "lengths_bottom_right": Kind(BOTTOM_RIGHT, lengths),
    "segments_lengths_bottom_right": Kind(BOTTOM_RIGHT, both(segments, lengths)),
    "prefix_lm": Kind({}, prefix_lm),
    "prefix_lm_window": Kind({"window_size": (40, None)}, prefix_lm),
    "packed": Kind({}, packed),
    "packed_causal": Kind(CAUSAL, self_packed),
    "packed_causal_top_left": Kind({"causal": True, "causal_alignment": "top_left"}, packed),
    "packed_window": Kind({"window_size": (30, 5)}, packed),
}


# --- Calls, and their verdicts.
# ------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """What a compiled program knows of a call beside the shapes."""

    kind: str
    scale: float | None = None
    softcap: float | None = None
    has_sinks: bool = False
    deterministic: bool = False

    def __str__(self) -> str:
        parts = [self.kind, self.softcap and f"softcap {self.softcap}", self.has_sinks and "sinks"]
        return " ".join(filter(None, [*parts, self.deterministic and "deterministic"]))

    def __call__(self, q, k, v, sinks, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        """out and lse; of packed sequences with a batch axis of 1."""
        kind = KINDS[self.kind]
        options = {**kind.band, "softmax_scale": self.scale, "softcap": self.softcap}
        options |= {"return_lse": True, "implementation": IMPLEMENTATION}
        options |= {"deterministic": self.deterministic}
        options |= {"sinks": sinks} if self.has_sinks else {}
        if not kind.is_packed:
            return flash_attention(q, k, v, **options, **arrays)
        out, lse = flash_attention_varlen(q[0], k[0], v[0], **options, **arrays)
        return out[None], lse[None]

    def flatten(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] as the call takes it: [1, B T, ...] if it is packed."""
        return x.reshape(1, -1, *x.shape[2:]) if KINDS[self.kind].is_packed else x


def given(arrays: Arrays) -> dict[str, jax.Array]:
    """As traced arrays."""
    return {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()}


def bucket(size: int, sizes: tuple[int, ...]) -> int:
    """The smallest of `sizes` that is large enough."""
    return next(x for x in sizes if size <= x)


@functools.partial(jax.jit, static_argnums=0, compiler_options=COMPILER_OPTIONS)
def answers(call: Call, operands, cotangents, arrays: Arrays):
    """out, lse, dq, dk, dv, dsinks."""
    *qkv, sinks = operands
    results, vjp = jax.vjp(lambda q, k, v, sinks: call(q, k, v, sinks, arrays), *qkv, sinks)
    return (*results, *vjp(cotangents))


def folding(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Callable, Callable, Callable]:
    """Functions that fold queries, keys and statistics to the oracle's shapes."""
    num_kv = k.shape[2]
    rows = columns = bucket(max(q.shape[1], k.shape[1]), LENGTHS)
    dim = bucket(max(q.shape[3], v.shape[3]), HEAD_DIMS)
    pairs = -k.shape[0] * num_kv % PAIRS

    def whole(x: jax.Array, fill: float = 0.0) -> jax.Array:
        return jnp.pad(x, ((0, pairs), *((0, 0),) * (x.ndim - 1)), constant_values=fill)

    def width(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0),) * 3 + ((0, dim - x.shape[3]),))

    return (
        lambda x: whole(width(gpu.fold_queries(x, rows, num_kv))),
        lambda x: whole(width(gpu.fold_keys(x, columns))),
        lambda x, fill=0.0: whole(gpu.fold_stats(x, rows, num_kv, fill), fill),
    )


@jax.jit
def fold(operands, cotangents, ours):
    """What `judge_folded` takes."""
    q, k, v, sinks = operands
    queries, keys, stats = folding(q, k, v)
    out, lse, dq, dk, dv = ours
    each_row = jnp.broadcast_to(sinks[None, :, None], lse.shape)
    heads = stats(each_row, -jnp.inf)[..., :1]
    # A row that pads a head sees no key, but the head's sink.
    lse = jnp.where(stats(jnp.ones_like(lse)) > 0, stats(lse), heads)
    return (
        (queries(q), keys(k), keys(v)),
        (queries(cotangents[0]), stats(cotangents[1])),
        (queries(out), lse, queries(dq), keys(dk), keys(dv)),
        heads[..., 0],
    )


def fold_seen(seen: np.ndarray, q: Any, k: Any, v: Any) -> np.ndarray:
    """[B, T, S] to [pairs, 1, 4, rows, columns]; what pads sees nothing."""
    num_kv, group = k.shape[2], q.shape[2] // k.shape[2]
    size = bucket(max(q.shape[1], k.shape[1]), LENGTHS)
    pairs = -(-k.shape[0] * num_kv // PAIRS) * PAIRS
    folded = np.zeros((pairs, 1, 1, size, size), bool)
    folded[: len(seen) * num_kv, 0, 0, : seen.shape[1], : seen.shape[2]] = np.repeat(
        seen, num_kv, 0
    )
    return folded & (np.arange(GROUP) < group)[:, None, None]


@functools.partial(jax.jit, static_argnames="has_softcap", compiler_options=COMPILER_OPTIONS)
def judge_folded(operands, cotangents, ours, sinks, seen, numbers, has_softcap: bool):
    """`measure` of out, lse, dq, dk, dv: [5, 7]. `numbers`: scale and softcap, in float64."""
    q, k, v = operands
    scale, softcap = numbers if has_softcap else (numbers[0], None)
    wide = [x.astype(jnp.float64) for x in (*operands, *cotangents)]
    oracle = Oracle(seen, scale, softcap=softcap, sinks=sinks.astype(jnp.float64), xp=jnp)
    expected = (*oracle.forward(*wide[:3]), *oracle.backward(*wide)[:3])
    scale = scale.astype(jnp.float32)
    softcap = None if softcap is None else softcap.astype(jnp.float32)
    baseline = (
        *xla_attention(q, k, v, seen, scale, sinks, softcap),
        *xla_gradients(operands, ours[:2], cotangents, seen, scale, softcap),
    )
    judged = zip(ours, expected, baseline, strict=True)
    return jnp.stack([measure(*(x.astype(jnp.float64) for x in case), xp=jnp) for case in judged])


def run(call: Call, operands: tuple, cotangents: tuple, arrays: Arrays) -> jax.Array:
    """Runs a call and measures it, on the GPU: [5, 7], not waited for."""
    q, k, v, sinks = operands
    batch = Sizes(q.shape[0], q.shape[1], k.shape[1])
    dout, dlse = cotangents
    flat = (*map(call.flatten, (q, k, v)), sinks)
    dlse = call.flatten(dlse.swapaxes(1, 2)).swapaxes(1, 2)
    *ours, _ = answers(call, flat, (call.flatten(dout), dlse), given(arrays))
    if not call.has_sinks:
        flat = (*flat[:3], jnp.full_like(sinks, -jnp.inf))
    *folded, sinks = fold(flat, (call.flatten(dout), dlse), tuple(ours))
    seen = fold_seen(KINDS[call.kind].seen(batch, arrays), *flat[:3])
    scale = 1 / math.sqrt(q.shape[-1]) if call.scale is None else call.scale
    with jax.enable_x64(True):
        numbers = np.array([scale, call.softcap or 1.0])
        return judge_folded(*folded, sinks, seen, numbers, has_softcap=call.softcap is not None)


def judged(measures: Any, dtype: Any, call: Call) -> list:
    """The rule, on what `run` returned."""
    found = []
    for name, x in zip(NAMES, np.asarray(measures), strict=True):
        is_lse = name == "lse"
        of = jnp.float32 if is_lse else dtype
        found += verdicts(name, of, x, call.softcap or 0.0 if is_lse else 0.0)
    return found


def make_operands(
    rng: np.random.Generator, shapes: tuple, dtype: Any, family: str = "normal"
) -> tuple:
    """q, k, v and sinks, of which one in three is -inf."""
    num_q = shapes[0][2]
    sinks = np.where(rng.random(num_q) < 1 / 3, -np.inf, 3 * rng.standard_normal(num_q))
    return (*inputs(family, rng, shapes, dtype), jnp.asarray(sinks, jnp.float32))


# --- Values and gradients.
# -------------------------


def pairwise(factors: Mapping[str, list], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Cases in which any two values of two factors meet, greedily few."""
    names = list(factors)
    open_pairs = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in range(len(factors[a]))
        for y in range(len(factors[b]))
    }
    while open_pairs:
        best: tuple[int, dict[str, int]] = (-1, {})
        first = sorted(open_pairs)[rng.integers(len(open_pairs))]
        for _ in range(60):
            case = {name: int(rng.integers(len(factors[name]))) for name in names}
            case |= {first[0]: first[1], first[2]: first[3]}
            covered = sum(
                (a, case[a], b, case[b]) in open_pairs for a, b in itertools.combinations(names, 2)
            )
            best = max(best, (covered, case), key=lambda found: found[0])
        case = best[1]
        open_pairs -= {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)}
        yield {name: factors[name][case[name]] for name in names}


FACTORS: dict[str, list] = {
    "head_dims": sorted({(v.head_dim, v.head_dim_v) for v in ROWS}),
    "dtype": sorted({v.dtype for v in ROWS}),
    "kind": list(KINDS),
    "heads": list(HEADS),
    "lengths": [(1, 1), (1, 113), (257, 1), (113, 257), (384, 384), (777, 300), (300, 777)],
    "softcap": [None, 0.7, 30.0],
    "has_sinks": [False, True],
    "deterministic": [False, True],
    "has_dlse": [False, True],
}
PAIRWISE = list(pairwise(FACTORS, np.random.default_rng(0)))


def row_of(case: Mapping[str, Any]) -> Variant:
    wanted = case["dtype"], case["head_dims"]
    return next(v for v in ROWS if (v.dtype, (v.head_dim, v.head_dim_v)) == wanted)


def label(case: Mapping[str, Any]) -> str:
    """A test id."""
    lengths = "x".join(map(str, case["lengths"]))
    parts = [row_of(case).key.removeprefix("forward_"), case["kind"], case["heads"], lengths]
    parts += [f"cap{case['softcap']}"] * bool(case["softcap"])
    parts += [name for name in ("sinks", "dlse") if case[f"has_{name}"]]
    parts += ["deterministic"] * case["deterministic"]
    return "-".join(parts)


def check(  # noqa: PLR0913 - a case
    worst: dict,
    call: Call,
    row: Variant,
    lengths: tuple[int, int],
    heads: str,
    has_dlse: bool = True,
    family: str = "normal",
) -> None:
    """A call of new inputs, poisoned, judged."""
    dtype = row.dtype.numpy_name
    rng = np.random.default_rng([*lengths, list(KINDS).index(call.kind), HEADS[heads][1]])
    shapes = gpu.case_shapes(row, lengths, heads)
    operands = make_operands(rng, shapes, dtype, family)
    dout, dlse = gpu.cotangents(rng, shapes, dtype)
    arrays = KINDS[call.kind].make(rng, Sizes(shapes[0][0], *lengths))
    poison()
    measures = run(call, operands, (dout, dlse if has_dlse else jnp.zeros_like(dlse)), arrays)
    found = judged(measures, dtype, call)
    record(worst, f"{row.name} {call} {lengths} {heads} {family}", found)
    assert not failures(found), failures(found)


@pytest.mark.parametrize("case", PAIRWISE, ids=label)
def test_any_two_choices_together(case: dict, worst: dict) -> None:
    options = {name: case[name] for name in ("softcap", "has_sinks", "deterministic")}
    call = Call(case["kind"], **options)
    check(worst, call, row_of(case), case["lengths"], case["heads"], case["has_dlse"])


@pytest.mark.parametrize("kind", ["segments_causal", "bounds_window", "lengths_bottom_right"])
@pytest.mark.parametrize("row", ROWS, ids=lambda v: v.name)
def test_long_rows(row: Variant, kind: str, worst: dict) -> None:
    """Whole tiles, skipped ones and a persistent kernel's many."""
    check(worst, Call(kind, has_sinks=True), row, (2049, 2049), "gqa4")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("row", ROWS, ids=lambda v: v.name)
def test_families(row: Variant, softcap: float | None, family: str, worst: dict) -> None:
    """Kinds of inputs; the larger ones reach the cap."""
    call = Call("segments_causal", softcap=softcap, has_sinks=True)
    check(worst, call, row, (390, 517), "gqa4", family=family)


@pytest.mark.parametrize("head_dims", [(1, 1), (80, 80), (40, 100), (130, 60)], ids=str)
def test_head_dims_without_a_row(head_dims: tuple[int, int], worst: dict) -> None:
    """Zero-padded to a row's."""
    row = dataclasses.replace(ROWS[0], head_dim=head_dims[0], head_dim_v=head_dims[1])
    rng = np.random.default_rng(head_dims)
    shapes = gpu.case_shapes(row, (200, 300), "gqa4")
    operands = make_operands(rng, shapes, row.dtype.numpy_name)
    arrays = segments(rng, Sizes(2, 200, 300))
    call = Call("segments", softcap=5.0, has_sinks=True)
    measures = run(call, operands, gpu.cotangents(rng, shapes, row.dtype.numpy_name), arrays)
    found = judged(measures, row.dtype.numpy_name, call)
    record(worst, f"{head_dims} {call}", found)
    assert not failures(found), failures(found)


FUZZ_SEED = int(os.environ.get("FA4_JAX_FUZZ_SEED", "0"))
FUZZ_PROGRAMS = int(os.environ.get("FA4_JAX_FUZZ_PROGRAMS", "80"))
FUZZ_MASKS = 25
FUZZ_LENGTHS = (1, 2, 3, 63, 64, 65, 100, 127, 128, 129, 192, 193, 200, 255, 256, 257, 320, 384)
FUZZ_HEADS = ((1, 4, 4), (2, 8, 2), (4, 4, 1), (2, 4, 2), (1, 12, 4))


@pytest.mark.parametrize("program", range(FUZZ_PROGRAMS))
def test_fuzz(program: int, worst: dict) -> None:
    """Any arguments: a program's shapes and static ones, with new inputs and masks for each call.

    FA4_JAX_FUZZ_SEED gives others, FA4_JAX_FUZZ_PROGRAMS more.
    """
    rng = np.random.default_rng([FUZZ_SEED, program])
    row = ROWS[program % len(ROWS)]
    dtype = row.dtype.numpy_name
    batch, num_q, num_kv = FUZZ_HEADS[rng.integers(len(FUZZ_HEADS))]
    kind = list(KINDS)[rng.integers(len(KINDS))]
    # Packed sequences lie one after another, and the oracle has no longer rows than these.
    limit = 384 // batch if KINDS[kind].is_packed else 384
    seqlen_q, seqlen_k = rng.choice([n for n in FUZZ_LENGTHS if n <= limit], 2)
    if rng.random() < 0.4:
        seqlen_k = seqlen_q
    sizes = Sizes(batch, int(seqlen_q), int(seqlen_k))
    call = Call(
        kind,
        scale=[None, None, 1.0, 0.01, -0.3][rng.integers(5)],
        softcap=[None, None, 0.3, 4.0, 50.0][rng.integers(5)],
        has_sinks=bool(rng.integers(2)),
        deterministic=bool(rng.integers(4) == 0),
    )
    shapes = (
        (batch, sizes.seqlen_q, num_q, row.head_dim),
        (batch, sizes.seqlen_k, num_kv, row.head_dim),
        (batch, sizes.seqlen_k, num_kv, row.head_dim_v),
    )
    poison()
    measures = []
    for _ in range(FUZZ_MASKS):
        operands = make_operands(rng, shapes, dtype, rng.choice(FAMILIES))
        cotangents = gpu.cotangents(rng, shapes, dtype)
        measures.append(run(call, operands, cotangents, KINDS[kind].make(rng, sizes)))
    wrong = []
    for i, x in enumerate(jax.device_get(measures)):
        found = judged(x, dtype, call)
        record(worst, f"fuzz {program} {i} {row.name} {call} {sizes}", found)
        wrong += [f"mask {i}: {text}" for text in failures(found).splitlines()]
    assert not wrong, "\n".join([f"{row.name} {call} {sizes} {num_q} {num_kv}", *wrong])


def test_a_thousand_short_sequences_in_a_batch(worst: dict) -> None:
    """Each with lengths of its own, 0 among them."""
    row, rng = ROWS[0], np.random.default_rng(1)
    shapes = (1000, 40, 4, row.head_dim), (1000, 45, 2, row.head_dim), (1000, 45, 2, row.head_dim_v)
    check_whole(worst, Call("lengths_bottom_right", has_sinks=True), row, shapes, rng)


def test_a_thousand_short_sequences_in_a_row(worst: dict) -> None:
    """Packed, of 0 to 4 positions."""
    row, rng = ROWS[0], np.random.default_rng(2)
    cu_seqlens = np.r_[0, np.cumsum(rng.integers(0, 5, 1000))]
    total = int(cu_seqlens[-1]) + 10
    shapes = (1, total, 4, row.head_dim), (1, total, 4, row.head_dim), (1, total, 4, row.head_dim_v)
    check_whole(worst, Call("packed_causal"), row, shapes, rng, {"cu_seqlens_q": cu_seqlens})


def check_whole(  # noqa: PLR0913 - a case
    worst: dict,
    call: Call,
    row: Variant,
    shapes: tuple,
    rng: np.random.Generator,
    arrays: Arrays | None = None,
) -> None:
    """A call of these shapes, judged."""
    dtype = row.dtype.numpy_name
    sizes = Sizes(shapes[0][0], shapes[0][1], shapes[1][1])
    arrays = KINDS[call.kind].make(rng, sizes) if arrays is None else arrays
    poison()
    measures = run(
        call, make_operands(rng, shapes, dtype), gpu.cotangents(rng, shapes, dtype), arrays
    )
    found = judged(measures, dtype, call)
    record(worst, f"{row.name} {call} {shapes[0]}", found)
    assert not failures(found), failures(found)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("row", ROWS[:1] + ROWS[-1:], ids=lambda v: v.name)
def test_the_gradient_of_sinks(row: Variant, softcap: float | None, worst: dict) -> None:
    rng = np.random.default_rng(4)
    dtype, sizes = row.dtype.numpy_name, Sizes(2, 200, 200)
    shapes = gpu.case_shapes(row, (200, 200), "gqa4")
    operands = make_operands(rng, shapes, dtype)
    grads = gpu.cotangents(rng, shapes, dtype)
    call = Call("segments_causal", softcap=softcap, has_sinks=True)
    arrays = self_segments(rng, sizes)
    dsinks = answers(call, operands, grads, {n: jnp.asarray(x) for n, x in arrays.items()})[-1]
    *qkv, sinks = operands
    seen, scale = KINDS[call.kind].seen(sizes, arrays)[:, None, None], 1 / math.sqrt(row.head_dim)

    @jax.jit
    def baseline(qkv, sinks, grads):
        _, vjp = jax.vjp(lambda sinks: xla_attention(*qkv, seen, scale, sinks, softcap), sinks)
        return vjp(grads)[0]

    with jax.enable_x64(True):
        wide = (jnp.asarray(x, jnp.float64) for x in (*qkv, *grads))
        oracle = Oracle(seen, scale, softcap=softcap, sinks=sinks.astype(jnp.float64), xp=jnp)
        expected = np.asarray(oracle.dsinks(*wide))
    found = judge("dsinks", np.asarray(dsinks), expected, np.asarray(baseline(qkv, sinks, grads)))
    record(worst, f"{row.name} {call}", found)
    assert not failures(found), failures(found)


# --- What a query doesn't see.
# -----------------------------

# Both ways in which a backward divides its work.
FEW_ROWS = [v for v in ROWS if v.head_dim in (64, 192) and v.dtype == ROWS[0].dtype]


def bits(x: Any) -> np.ndarray:
    """Integers, so that NaN equals itself and 0 isn't -0."""
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", FEW_ROWS, ids=lambda v: v.name)
def test_an_unseen_key_changes_no_bit(row: Variant, kind: str) -> None:
    """Of out, lse and dq in the rows that don't see it; and it changes the rows that do.

    There are two key tiles at most, so that dq, which is summed by atomic additions, is repeatable.
    """
    rng = np.random.default_rng(list(KINDS).index(kind))
    sizes = Sizes(1 if KINDS[kind].is_packed else 2, 200, 128)
    shapes = (
        (sizes.batch, 200, 4, row.head_dim),
        (sizes.batch, 128, 2, row.head_dim),
        (sizes.batch, 128, 2, row.head_dim_v),
    )
    q, k, v, sinks = make_operands(rng, shapes, row.dtype.numpy_name)
    grads = gpu.cotangents(rng, shapes, row.dtype.numpy_name)
    call = Call(kind, softcap=None if row.head_dim == 64 else 30.0, has_sinks=True)
    for _ in range(4):
        arrays = KINDS[kind].make(rng, sizes)
        seen = KINDS[kind].seen(sizes, arrays)

        def rows(k, v, arrays=arrays):
            out, lse, dq, dk, dv, _ = answers(call, (q, k, v, sinks), grads, given(arrays))
            found = [bits(x) for x in (out, lse.swapaxes(1, 2)[..., None], dq)]
            return found, np.asarray(dk, np.float32), np.asarray(dv, np.float32)

        before, dk, dv = rows(k, v)
        nobody = ~seen.any(1)
        assert not dk[nobody].any() and not dv[nobody].any()
        keys = rng.choice(128, 3, replace=False)
        after, *_ = rows(k.at[:, keys].add(100), v.at[:, keys].add(1000))
        unseen = ~seen[:, :, keys].any(-1)
        same = [(x == y).all((2, 3)) for x, y in zip(before, after, strict=True)]
        for name, x in zip(("out", "lse", "dq"), same, strict=True):
            assert x[unseen].all(), name
        assert unseen.all() or same[0][~unseen].mean() < 0.2


@pytest.mark.parametrize("row", FEW_ROWS, ids=lambda v: v.name)
def test_a_scattered_segment_is_nan_and_no_other(row: Variant) -> None:
    rng = np.random.default_rng(6)
    shapes = gpu.case_shapes(row, (200, 128), "gqa4")
    operands = make_operands(rng, shapes, row.dtype.numpy_name)
    grads = gpu.cotangents(rng, shapes, row.dtype.numpy_name)
    arrays = {"q_segment_ids": np.arange(200) // 50, "kv_segment_ids": np.arange(128) // 32}
    arrays = {name: np.tile(x, (2, 1)) for name, x in arrays.items()}
    arrays["kv_segment_ids"][1, 5] = 2
    # The same, but for queries that see nothing instead.
    others = {
        **arrays,
        "q_segment_ids": np.where(arrays["q_segment_ids"] == 2, 77, arrays["q_segment_ids"]),
    }
    others["q_segment_ids"][0] = arrays["q_segment_ids"][0]
    call = Call("segments", has_sinks=True)
    broken = np.zeros((2, 200), bool)
    broken[1] = arrays["q_segment_ids"][1] == 2
    results = [answers(call, operands, grads, given(x)) for x in (arrays, others)]
    for x, y in zip(*((r[0], r[1].swapaxes(1, 2), r[2]) for r in results), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert np.isnan(x[broken].astype(np.float32)).all()
        assert (bits(x)[~broken] == bits(y)[~broken]).all()
    for x, y in zip(*(r[3:5] for r in results), strict=True):
        assert (bits(x[0]) == bits(y[0])).all()
        assert np.isnan(np.asarray(x[1], np.float32)).any()


def test_absurd_bounds_give_something_and_leave_the_gpu_well() -> None:
    """Values that the arguments' own arithmetic could wrap around."""
    row, rng = ROWS[0], np.random.default_rng(8)
    sizes, shapes = Sizes(2, 200, 300), gpu.case_shapes(row, (200, 300), "gqa4")
    operands = make_operands(rng, shapes, row.dtype.numpy_name)
    grads = gpu.cotangents(rng, shapes, row.dtype.numpy_name)
    wild = np.array([-(2**31), -1, 0, 1, 63, 300, 2**30, 2**31 - 1])
    for kind in ("wide_bounds_causal", "lengths_bottom_right", "packed", "bounds_window"):
        for _ in range(10):
            arrays = KINDS[kind].make(rng, sizes)
            arrays = {name: rng.choice(wild, x.shape) for name, x in arrays.items()}
            call = Call(kind, has_sinks=True)
            flat = (*map(call.flatten, operands[:3]), operands[3])
            dlse = call.flatten(grads[1].swapaxes(1, 2)).swapaxes(1, 2)
            results = answers(call, flat, (call.flatten(grads[0]), dlse), given(arrays))
            assert all(
                np.isfinite(np.asarray(x, np.float32)).all() for x in (results[0], *results[2:])
            )


# --- Many calls.
# ---------------


@pytest.mark.parametrize("kind", ["segments_causal", "bounds", "packed_causal"])
@pytest.mark.parametrize(
    ("row", "deterministic"),
    [*((v, False) for v in FEW_ROWS), *((v, True) for v in ROWS if v.dtype == ROWS[0].dtype)],
    ids=lambda x: x.name if isinstance(x, Variant) else "deterministic" * x,
)
def test_a_thousand_runs_are_the_same(row: Variant, deterministic: bool, kind: str) -> None:
    """Bit by bit; dq only if it is deterministic: else it is summed by atomic additions."""
    rng = np.random.default_rng(9)
    sizes = Sizes(1, 1000, 1000)
    shapes = (
        (1, 1000, 4, row.head_dim),
        (1, 1000, 2, row.head_dim),
        (1, 1000, 2, row.head_dim_v),
    )
    operands = make_operands(rng, shapes, row.dtype.numpy_name)
    grads = gpu.cotangents(rng, shapes, row.dtype.numpy_name)
    call = Call(kind, softcap=10.0, has_sinks=True, deterministic=deterministic)
    arrays = given(KINDS[kind].make(rng, sizes))
    names = [name for name in NAMES if deterministic or name != "dq"]

    def repeatable() -> list[jax.Array]:
        results = dict(zip(NAMES, answers(call, operands, grads, arrays)[:5], strict=True))
        return [results[name] for name in names]

    @jax.jit
    def same(x, y):
        words = {2: jnp.uint16, 4: jnp.uint32}
        equal = [
            (
                jax.lax.bitcast_convert_type(a, words[a.dtype.itemsize])
                == jax.lax.bitcast_convert_type(b, words[b.dtype.itemsize])
            ).all()
            for a, b in zip(x, y, strict=True)
        ]
        return jnp.stack(equal)

    first, equal = repeatable(), jnp.ones(len(names), bool)
    for i in range(1000):
        if i % 100 == 0:
            poison()
        equal &= same(first, repeatable())
    assert np.asarray(equal).all(), dict(zip(names, np.asarray(equal), strict=True))


def test_ten_thousand_calls_take_no_more_memory_and_compile_nothing() -> None:
    row, rng = ROWS[0], np.random.default_rng(10)
    sizes, shapes = Sizes(2, 150, 170), gpu.case_shapes(row, (150, 170), "gqa4")
    operands = make_operands(rng, shapes, row.dtype.numpy_name)
    grads = gpu.cotangents(rng, shapes, row.dtype.numpy_name)
    call = Call("bounds", softcap=10.0, has_sinks=True)
    masks = [given(bounds(rng, sizes)) for _ in range(16)]
    device = jax.devices()[0]

    def calls(number: int) -> tuple[int, int, int]:
        for i in range(number):
            results = answers(call, operands, grads, masks[i % 16])
        jax.block_until_ready(results)
        del results
        in_use = device.memory_stats()["bytes_in_use"]
        return in_use, _ffi.module_loads(0), answers._cache_size()

    assert calls(100) == calls(10_000)


# --- The rest of JAX.
# --------------------


def test_none_chooses_the_rows_silently() -> None:
    """Warnings are errors here, so a fallback would raise."""
    row, rng = ROWS[0], np.random.default_rng(11)
    q, k, v, sinks = make_operands(
        rng, gpu.case_shapes(row, (150, 170), "gqa4"), row.dtype.numpy_name
    )
    options = given(segments(rng, Sizes(2, 150, 170)))
    target = row.arch.cuda_target
    for more, features in (
        ({}, "_interval"),
        ({"softcap": 3.0, "sinks": sinks}, "_interval_softcap"),
    ):
        key = row.key + features
        assert explain(q, k, v, **options, **more).startswith(f"fa4 on {target}: {key};")
        ours = flash_attention(q, k, v, **options, **more)
        asked = flash_attention(q, k, v, **options, **more, implementation=IMPLEMENTATION)
        assert np.array_equal(bits(ours), bits(asked))


def test_sinks_alone_need_no_intervals() -> None:
    """A plain row computes them: the same with bounds that say nothing, up to rounding."""
    row, rng = ROWS[0], np.random.default_rng(12)
    q, k, v, sinks = make_operands(
        rng, gpu.case_shapes(row, (150, 170), "gqa4"), row.dtype.numpy_name
    )
    options = {"causal": True, "sinks": sinks, "return_lse": True, "implementation": IMPLEMENTATION}
    told = explain(q, k, v, causal=True, sinks=sinks)
    assert told.startswith(f"fa4 on {row.arch.cuda_target}: {row.key};")
    plain = flash_attention(q, k, v, **options)
    bounded = flash_attention(q, k, v, kv_end=jnp.full((2, 150), 170), **options)
    np.testing.assert_allclose(np.asarray(plain[1]), np.asarray(bounded[1]), 1e-6, 1e-6)


def test_vmap_over_masks_and_sinks() -> None:
    row, rng = ROWS[0], np.random.default_rng(13)
    shapes = gpu.case_shapes(row, (150, 170), "gqa4")
    *qkv, _ = make_operands(rng, shapes, row.dtype.numpy_name)
    grads = gpu.cotangents(rng, shapes, row.dtype.numpy_name)
    sinks = jnp.asarray(rng.standard_normal((5, shapes[0][2])), jnp.float32)
    masks = [given(bounds(rng, Sizes(2, 150, 170))) for _ in range(5)]
    call = Call("bounds", has_sinks=True)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *masks)

    def one(sinks, arrays):
        return answers(call, (*qkv, sinks), grads, arrays)

    together = jax.vmap(one)(sinks, stacked)
    for i, arrays in enumerate(masks):
        alone = one(sinks[i], arrays)
        for name, x, y in zip((*NAMES, "dsinks"), together, alone, strict=True):
            if name in ("dq", "dsinks"):
                x, y = np.asarray(x[i], np.float32), np.asarray(y, np.float32)
                np.testing.assert_allclose(x, y, 0, 1e-2 * np.abs(y).max(), err_msg=name)
            else:
                assert (bits(x[i]) == bits(y)).all(), name
