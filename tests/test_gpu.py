# SPDX-License-Identifier: Apache-2.0
"""The kernels on a GPU: values and gradients of every row without features against float64,
malformed calls, transforms. `test_gpu_masks` has the others.

A case is a row, a shape, a head grouping and a mask. Ours runs at the true shape, all masks of a
shape in one program. The oracle (float64) and the baseline (XLA in 16 bits) run on the GPU at a
padded shape with the mask as data, heads folded into four groups of four, so that 28 compilations
serve every case. Errors stay on the GPU but for seven numbers a result.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import export_roundtrip
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu import (
    COMPILER_OPTIONS,
    GROUP,
    HEADS,
    NAMES,
    ROWS,
    case_shapes,
    cotangents,
    fold_keys,
    fold_queries,
    fold_stats,
    key_suffix,
    poison,
    record,
    waves,
)
from reference import (
    FAMILIES,
    Oracle,
    failures,
    inputs,
    measure,
    verdicts,
    visible,
    xla_attention,
    xla_gradients,
)

from fa4_jax import explain, flash_attention, is_supported, register
from fa4_jax._spec import AttentionSpec
from fa4_jax._variants import (
    BLOCK,
    Feature,
    Kernel,
    Variant,
    round_up,
    signature,
    target_name,
)

pytestmark = pytest.mark.gpu

LENGTHS = [
    *[(n, n) for n in (1, 3, 113, 257, 1023, 2049)],
    *[(1, 113), (3, 257), (113, 1023), (257, 2049), (1023, 2049), (1, 2049)],
    *[(113, 1), (257, 3), (1023, 113), (2049, 257), (2049, 1023), (257, 113)],
]

MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "causal_bottom_right": {"causal": True, "causal_alignment": "bottom_right"},
    "window": {"window_size": (100, 37)},
    "window_bottom_right": {"window_size": (64, 31), "causal_alignment": "bottom_right"},
    "left_only": {"window_size": (130, None)},
    "right_only": {"window_size": (None, 5)},
    "causal_window": {"causal": True, "window_size": (127, 0)},
    # Top-left, T > S: the queries beyond S see nothing. Bottom-right: the first ones.
    "diagonal": {"window_size": (0, 0)},
    "diagonal_bottom_right": {"window_size": (0, 0), "causal_alignment": "bottom_right"},
}

# A padded shape's lengths: few, so that few programs are compiled.
BUCKETS = (128, 1024, 2176)


def test_poison_reaches_what_is_allocated_next() -> None:
    """The trick works on this machine: new results lie where the poison was."""
    poison()
    size = 1 << 18
    poisoned = [jnp.full(size, jnp.nan, jnp.float32) for _ in range(8)]
    freed = {x.unsafe_buffer_pointer() for x in jax.block_until_ready(poisoned)}
    del poisoned
    assert jnp.zeros(size, jnp.float32).unsafe_buffer_pointer() in freed


def bucket(length: int) -> int:
    return next(size for size in BUCKETS if length <= size)


def run_masks(masks: dict[str, dict], scale: float | None) -> Callable:
    """One program for all masks, that returns what `judge_folded` takes.

    Operands, cotangents and, with a leading axis for the masks, (out, lse, dq, dk, dv), all folded.
    """

    @jax.jit
    def run(q, k, v, dout, dlse):
        num_kv = k.shape[2]
        answers = []
        for mask in masks.values():
            options = {"return_lse": True, "implementation": "fa4", "softmax_scale": scale, **mask}
            results, vjp = jax.vjp(functools.partial(flash_attention, **options), q, k, v)
            answers.append((*results, *vjp((dout, dlse))))
        out, lse, dq, dk, dv = (jnp.stack(x) for x in zip(*answers, strict=True))

        def queries(x, fill=0.0):
            return fold_queries(x, bucket(x.shape[1]), num_kv, fill)

        def stats(x, fill):
            return fold_stats(x, bucket(x.shape[-1]), num_kv, fill)

        def keys(x):
            return fold_keys(x, bucket(x.shape[1]))

        return (
            (queries(q), keys(k), keys(v)),
            (queries(dout), stats(dlse, 0)),
            (
                jax.vmap(queries)(out),
                jax.vmap(functools.partial(stats, fill=-jnp.inf))(lse),
                jax.vmap(queries)(dq),
                jax.vmap(keys)(dk),
                jax.vmap(keys)(dv),
            ),
        )

    return run


@functools.partial(jax.jit, static_argnames="scale", compiler_options=COMPILER_OPTIONS)
def judge_folded(operands, cotangents, ours, seen, real_heads, scale: float):
    """`measure` of one mask's out, lse, dq, dk, dv: [5, 7]."""
    q, k, v = operands
    # Heads that only pad a group see nothing, so that all of theirs is 0 and -inf.
    seen = seen & real_heads[:, None, None]
    wide = [x.astype(jnp.float64) for x in (*operands, *cotangents)]
    oracle = Oracle(seen, scale, xp=jnp)
    expected = (*oracle.forward(*wide[:3]), *oracle.backward(*wide)[:3])
    baseline = (
        *xla_attention(q, k, v, seen, scale),
        *xla_gradients(operands, ours[:2], cotangents, seen, scale),
    )
    judged = zip(ours, expected, baseline, strict=True)
    return jnp.stack([measure(*(x.astype(jnp.float64) for x in case), xp=jnp) for case in judged])


def padded_mask(seqlen_q: int, seqlen_k: int, mask: dict) -> np.ndarray:
    seen = visible(seqlen_q, seqlen_k, **mask)
    return np.pad(seen, [(0, bucket(n) - n) for n in (seqlen_q, seqlen_k)])


def distinct_masks(seqlen_q: int, seqlen_k: int) -> dict[str, dict]:
    """MASKS without those that are the same band at this shape."""
    by_band = {}
    for name, mask in MASKS.items():
        left, right = mask.get("window_size", (None, None))
        spec = AttentionSpec(
            softmax_scale=1.0,
            window_left=left,
            window_right=0 if mask.get("causal") else right,
            alignment=mask.get("causal_alignment", "top_left"),
        )
        by_band.setdefault(spec.band(seqlen_q, seqlen_k), name)
    return {name: MASKS[name] for name in by_band.values()}


def check_masks(
    worst: dict, label: str, operands: tuple, grads: tuple, masks: dict, scale: float | None = None
) -> None:
    """Run every mask poisoned, judge, and fail with a line for each verdict that isn't ok."""
    q, k, _ = operands
    compiled = run_masks(masks, scale).lower(*operands, *grads).compile()
    poison()
    *folded, answers = jax.block_until_ready(compiled(*operands, *grads))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    real_heads = np.arange(GROUP) < q.shape[2] // k.shape[2]
    wrong = []
    for i, (name, mask) in enumerate(masks.items()):
        ours = tuple(x[i] for x in answers)
        seen = padded_mask(q.shape[1], k.shape[1], mask)
        with jax.enable_x64(True):
            measures = np.asarray(judge_folded(*folded, ours, seen, real_heads, scale=scale))
        named = zip(NAMES, ours, measures, strict=True)
        judged = [v for result, x, m in named for v in verdicts(result, x.dtype, m)]
        record(worst, f"{label} {name}", judged)
        if text := failures(judged):
            wrong.append(f"{name}:\n{text}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{x[0]}x{x[1]}")
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("row", ROWS, ids=lambda v: v.name)
def test_values_and_gradients(
    row: Variant, heads: str, lengths: tuple[int, int], worst: dict
) -> None:
    dtype = row.dtype.numpy_name
    rng = np.random.default_rng([*lengths, row.head_dim, HEADS[heads][1]])
    shapes = case_shapes(row, lengths, heads)
    operands = inputs("normal", rng, shapes, dtype)
    label = f"{row.name} {heads} {lengths}"
    check_masks(worst, label, operands, cotangents(rng, shapes, dtype), distinct_masks(*lengths))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("row", ROWS, ids=lambda v: v.name)
def test_families(row: Variant, family: str, worst: dict) -> None:
    dtype = row.dtype.numpy_name
    rng = np.random.default_rng(FAMILIES.index(family))
    shapes = case_shapes(row, (390, 517), "gqa4")
    operands = inputs(family, rng, shapes, dtype)
    masks = {name: MASKS[name] for name in ("full", "causal", "window")}
    label = f"{row.name} {family}"
    check_masks(worst, label, operands, cotangents(rng, shapes, dtype), masks)


@pytest.mark.parametrize("scale", [1.0, 0.01, 3.0])
def test_scales(scale: float, worst: dict) -> None:
    row = ROWS[0]
    rng = np.random.default_rng(3)
    shapes = case_shapes(row, (200, 300), "mqa")
    operands = inputs("normal", rng, shapes, row.dtype.numpy_name)
    masks = {name: MASKS[name] for name in ("full", "causal_bottom_right")}
    grads = cotangents(rng, shapes, row.dtype.numpy_name)
    check_masks(worst, f"{row.name} scale {scale}", operands, grads, masks, scale)


@pytest.mark.parametrize(
    "head_dims", [(1, 1), (32, 32), (80, 80), (96, 64), (40, 100), (127, 128)], ids=str
)
def test_head_dims_without_a_row(head_dims: tuple[int, int], worst: dict) -> None:
    """Zero-padded to a row's."""
    row = dataclasses.replace(ROWS[0], head_dim=head_dims[0], head_dim_v=head_dims[1])
    dtype = row.dtype.numpy_name
    rng = np.random.default_rng(head_dims)
    shapes = case_shapes(row, (200, 300), "gqa4")
    operands = inputs("normal", rng, shapes, dtype)
    masks = {name: MASKS[name] for name in ("full", "causal_bottom_right")}
    label = f"{dtype} {head_dims}"
    check_masks(worst, label, operands, cotangents(rng, shapes, dtype), masks)


def small(seqlen_q: int = 150, seqlen_k: int = 170, lead: tuple = (), seed: int = 0) -> list:
    row = ROWS[0]
    rng = np.random.default_rng(seed)
    shapes = case_shapes(row, (seqlen_q, seqlen_k), "gqa4")
    return [jnp.asarray(rng.standard_normal((*lead, *s)), row.dtype.numpy_name) for s in shapes]


fa4 = functools.partial(flash_attention, implementation="fa4")
causal = functools.partial(fa4, causal=True, return_lse=True)


def loss(q, k, v, **kwargs):
    out, lse = causal(q, k, v, **kwargs)
    return (out.astype(jnp.float32) * waves(out)).sum() + (lse * waves(lse)).sum()


gradients = jax.grad(loss, (0, 1, 2))


def test_none_chooses_the_kernels_silently() -> None:
    """Warnings are errors here, so a fallback would raise."""
    q, k, v = small()
    assert is_supported(q, k, v, causal=True) == (True, ())
    assert explain(q, k, v).startswith("fa4 on sm_")
    assert np.array_equal(flash_attention(q, k, v), fa4(q, k, v))


def test_a_negative_and_a_zero_scale() -> None:
    q, k, v = small()
    expected = fa4(-q, k, v, softmax_scale=0.2)
    assert np.array_equal(fa4(q, k, v, softmax_scale=-0.2), expected)
    zero = fa4(q, k, v, softmax_scale=0.0).astype(jnp.float32)
    mean = jnp.repeat(v.astype(jnp.float32).mean(1, keepdims=True), 4, axis=2)
    np.testing.assert_allclose(zero, jnp.broadcast_to(mean, zero.shape), 0, 2e-3)
    dq, dk, _ = jax.grad(functools.partial(loss, softmax_scale=0.0), (0, 1, 2))(q, k, v)
    assert not np.any(np.asarray(dq)) and not np.any(np.asarray(dk))


def test_the_forward_and_dk_dv_are_repeatable() -> None:
    """dq is summed by atomic additions, so it isn't, unless one key tile covers S."""
    q, k, v = small(1000, 1500)
    run = jax.jit(lambda *x: (fa4(*x), gradients(*x)[1:]))
    first = run(q, k, v)
    for _ in range(20):
        poison()
        again = run(q, k, v)
        for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
            assert np.array_equal(x, y)


@pytest.mark.parametrize("mapped", ["q", "qkv", "kv", "v"])
def test_vmap_of_eight(mapped: str) -> None:
    arrays = dict(zip("qkv", small(), strict=True))
    stacked = dict(zip("qkv", small(lead=(8,)), strict=True))
    arrays = [stacked[name] if name in mapped else arrays[name] for name in "qkv"]
    in_axes = [0 if name in mapped else None for name in "qkv"]
    results = jax.vmap(causal, in_axes)(*arrays)
    grads = jax.vmap(gradients, in_axes)(*arrays)
    for i in range(8):
        one = [x[i] if axis == 0 else x for x, axis in zip(arrays, in_axes, strict=True)]
        for x, y in zip(results, causal(*one), strict=True):
            assert np.array_equal(x[i], y)
        dq, dk, dv = (np.asarray(x[i], np.float64) for x in grads)
        expected = [np.asarray(x, np.float64) for x in gradients(*one)]
        assert np.array_equal(dk, expected[1]) and np.array_equal(dv, expected[2])
        np.testing.assert_allclose(dq, expected[0], 0, 1e-2 * np.abs(expected[0]).max())


def test_a_vmapped_axis_in_the_middle_and_transposed_operands() -> None:
    """XLA has to materialise row-major operands, whatever produced them."""
    q, k, v = small(lead=(3,))
    expected = jax.vmap(gradients)(q, k, v)
    moved = jax.jit(jax.vmap(gradients, (2, 4, 1), 0))(
        jnp.moveaxis(q, 0, 2), jnp.moveaxis(k, 0, 4), jnp.moveaxis(v, 0, 1)
    )
    for x, y in zip(moved[1:], expected[1:], strict=True):
        assert np.array_equal(x, y)


def test_slices_of_a_packed_array() -> None:
    row = ROWS[0]
    rng = np.random.default_rng(1)
    packed = jnp.asarray(rng.standard_normal((2, 3, 4, 130, row.head_dim)), row.dtype.numpy_name)

    def split(packed):
        return (packed[:, i].transpose(0, 2, 1, 3) for i in range(3))

    fused = jax.jit(lambda x: fa4(*split(x), causal=True))(packed)
    assert np.array_equal(fused, fa4(*split(packed), causal=True))


@pytest.mark.parametrize("empty", ["B", "T", "S"])
def test_an_empty_dimension_launches_nothing(empty: str) -> None:
    row = ROWS[0]
    sizes = {"B": 2, "T": 5, "S": 6, empty: 0}
    q = jnp.ones((sizes["B"], sizes["T"], 4, row.head_dim), row.dtype.numpy_name)
    k = jnp.ones((sizes["B"], sizes["S"], 2, row.head_dim), row.dtype.numpy_name)
    poison()
    out, lse = fa4(q, k, k, return_lse=True)
    assert (out.shape, lse.shape) == (q.shape, (sizes["B"], 4, sizes["T"]))
    assert not np.any(np.asarray(out)) and np.all(np.asarray(lse) == -np.inf)

    def total(q, k, v):
        return fa4(q, k, v).astype(jnp.float32).sum()

    for grad, x in zip(jax.grad(total, (0, 1, 2))(q, k, k), (q, k, k), strict=True):
        assert grad.shape == x.shape and not np.any(np.asarray(grad))


def test_a_large_grid() -> None:
    """More (batch, head) pairs than a grid's y or z may have (65,535), one query each."""
    row = ROWS[0]
    rng = np.random.default_rng(4)
    shape = (9000, 1, 8, row.head_dim)
    arrays = (rng.standard_normal(shape) for _ in range(4))
    q, k, v, dout = (jnp.asarray(x, row.dtype.numpy_name) for x in arrays)
    poison()
    out, vjp = jax.vjp(fa4, q, k, v)
    # One key: the weight is 1, so out is v, dv is dout and the logits have no gradient.
    assert np.array_equal(out, v)
    dq, dk, dv = vjp(dout)
    assert np.array_equal(dv, dout)
    assert max(float(jnp.abs(x.astype(jnp.float32)).max()) for x in (dq, dk)) < 1e-2


def test_scan_of_layers_under_jit() -> None:
    q, k, v = small(128, 128)
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))

    def layers(q, length: int, unroll: bool):
        def layer(x, _):
            return fa4(x, k, v, causal=True), None

        if not unroll:
            return jax.lax.scan(layer, q, length=length)[0]
        for _ in range(length):
            q, _ = layer(q, None)
        return q

    scanned = jax.jit(functools.partial(layers, length=6, unroll=False))(q)
    assert np.array_equal(scanned, jax.jit(functools.partial(layers, length=6, unroll=True))(q))


def test_the_exported_step_runs_here() -> None:
    """Written by `python tests/export_roundtrip.py write PATH` on a machine without a GPU."""
    path = os.environ.get("FA4_JAX_EXPORTED")
    if not path:
        pytest.skip("FA4_JAX_EXPORTED names no file")
    assert not export_roundtrip.check(export_roundtrip.read(path))


# --- Malformed calls, straight to the FFI targets.
# -------------------------------------------------


Target = tuple[Kernel, tuple[Feature, ...]]


def raw(target: Target, change: Callable[[dict], None]) -> None:
    """Call a row through its target with good operands, results and attributes, after `change` of
    them."""
    (kernel, features), row = target, ROWS[0]
    register()
    dims = {"B": 2, "T": 64, "S": 96, "N": 4, "K": 2, "D": row.head_dim, "V": row.head_dim_v}
    dims |= {
        "R": 128,
        "E": row.head_dim,
        "M": 1,
        "J": round_up(96, BLOCK) // BLOCK,
        "W": 4,
        "Z": 2,
        "U": 1,
    }
    expected = signature(kernel, features)

    def struct(buffer) -> jax.ShapeDtypeStruct:
        dtype = buffer.dtype.numpy_name if buffer.dtype else row.dtype.numpy_name
        return jax.ShapeDtypeStruct(tuple(dims[letter] for letter in buffer.dims), dtype)

    scalars = {
        "softmax_scale": np.float32(0.125),
        "softcap": np.float32(1),
        "band_lower": np.int32(-64),
        "band_upper": np.int32(96),
    }
    call = {
        "target": target_name(kernel),
        "operands": [struct(buffer) for buffer in expected.operands],
        "results": [struct(buffer) for buffer in expected.results],
        "attributes": {s.name: scalars[s.name] for s in expected.attributes},
        "aliases": expected.aliases,
    }
    call["attributes"]["kernel"] = "_".join((kernel + key_suffix(row), *features))
    change(call)
    ffi_call = jax.ffi.ffi_call(
        call["target"], call["results"], input_output_aliases=call["aliases"]
    )
    run = jax.jit(lambda *operands: ffi_call(*operands, **call["attributes"]))
    with jax.enable_x64(True):
        jax.block_until_ready(run(*(jnp.ones(x.shape, x.dtype) for x in call["operands"])))


def struct_change(part: str, index: int, shape: Any = None, dtype: Any = None) -> Callable:
    """A change of one operand's or result's shape (a function of it) or dtype."""

    def change(call: dict) -> None:
        old = call[part][index]
        new_shape = shape(old.shape) if shape else old.shape
        call[part][index] = jax.ShapeDtypeStruct(new_shape, dtype or old.dtype)

    return change


def attribute(name: str, value: Any) -> Callable:
    def change(call: dict) -> None:
        if value is None:
            del call["attributes"][name]
        else:
            call["attributes"][name] = value

    return change


def drop(part: str) -> Callable:
    return lambda call: call[part].pop()


def extra(part: str) -> Callable:
    return lambda call: call[part].append(call[part][0])


def replace(axis: int, size: int) -> Callable:
    return lambda shape: (*shape[:axis], size, *shape[axis + 1 :])


FORWARD, PREPROCESS, BACKWARD, POSTPROCESS = ((kernel, ()) for kernel in Kernel)
INTERVAL, SOFTCAP = (Feature.interval,), (Feature.interval, Feature.softcap)
TARGETS: tuple[Target, ...] = (
    *(FORWARD, PREPROCESS, BACKWARD, POSTPROCESS),
    *itertools.product((Kernel.forward, Kernel.backward), (INTERVAL, SOFTCAP)),
)

MALFORMED: dict[str, tuple[Target, Callable]] = {
    "no kernel": (FORWARD, attribute("kernel", None)),
    "kernel a number": (FORWARD, attribute("kernel", np.int32(1))),
    "kernel unknown": (FORWARD, attribute("kernel", "forward_bf16_d65")),
    "kernel empty": (FORWARD, attribute("kernel", "")),
    "kernel of another signature": (FORWARD, attribute("kernel", "backward_bf16_d64")),
    "no scale": (FORWARD, attribute("softmax_scale", None)),
    "scale a double": (FORWARD, attribute("softmax_scale", np.float64(0.125))),
    "scale an int": (FORWARD, attribute("softmax_scale", np.int32(1))),
    "scale 0": (FORWARD, attribute("softmax_scale", np.float32(0))),
    "scale negative": (FORWARD, attribute("softmax_scale", np.float32(-1))),
    "scale nan": (BACKWARD, attribute("softmax_scale", np.float32("nan"))),
    "scale inf": (POSTPROCESS, attribute("softmax_scale", np.float32("inf"))),
    "band_lower int64": (FORWARD, attribute("band_lower", np.int64(-64))),
    "no band_upper": (BACKWARD, attribute("band_upper", None)),
    "band_lower below -T": (FORWARD, attribute("band_lower", np.int32(-65))),
    "band_upper beyond S": (BACKWARD, attribute("band_upper", np.int32(97))),
    "extra attribute": (FORWARD, attribute("dropout", np.float32(0.1))),
    "operand missing": (FORWARD, drop("operands")),
    "operand too many": (FORWARD, extra("operands")),
    "result missing": (FORWARD, drop("results")),
    "result too many": (FORWARD, extra("results")),
    "q float32": (FORWARD, struct_change("operands", 0, dtype="float32")),
    "v int16": (FORWARD, struct_change("operands", 2, dtype="int16")),
    "lse bfloat16": (FORWARD, struct_change("results", 1, dtype="bfloat16")),
    "lse float64": (PREPROCESS, struct_change("operands", 2, dtype="float64")),
    "q rank 3": (FORWARD, struct_change("operands", 0, lambda s: (s[0] * s[1], *s[2:]))),
    "q rank 5": (FORWARD, struct_change("operands", 0, lambda s: (1, *s))),
    "k head_dim": (FORWARD, struct_change("operands", 1, replace(3, 32))),
    "k batch": (FORWARD, struct_change("operands", 1, replace(0, 1))),
    "v length": (FORWARD, struct_change("operands", 2, replace(1, 95))),
    "v heads": (BACKWARD, struct_change("operands", 2, replace(2, 1))),
    "heads not a multiple": (PREPROCESS, struct_change("operands", 1, replace(2, 3))),
    "out too short": (FORWARD, struct_change("results", 0, replace(1, 63))),
    "lse too short": (FORWARD, struct_change("results", 1, replace(2, 63))),
    "dk of q's shape": (BACKWARD, struct_change("results", 0, replace(1, 64))),
    "dpsum without padding": (PREPROCESS, struct_change("results", 0, replace(2, 64))),
    "dq_accum without padding": (PREPROCESS, struct_change("results", 2, replace(2, 64))),
    "dq_accum too wide": (PREPROCESS, struct_change("results", 2, replace(3, 32))),
    "dq beyond dq_accum": (POSTPROCESS, struct_change("results", 0, replace(1, 129))),
    "length 0": (FORWARD, struct_change("operands", 0, replace(1, 0))),
    "dq_accum not in place": (BACKWARD, lambda call: call.update(aliases={})),
    "softcap 0": (FORWARD, attribute("softcap", np.float32(0))),
    "no softcap": (BACKWARD, attribute("softcap", None)),
    "sinks bfloat16": (FORWARD, struct_change("operands", 3, dtype="bfloat16")),
    "sinks of one batch entry": (FORWARD, struct_change("operands", 3, replace(0, 1))),
    "sinks of other heads": (FORWARD, struct_change("operands", 3, replace(1, 2))),
    "kv_start int16": (
        (Kernel.forward, INTERVAL),
        struct_change("operands", 4, dtype="int16"),
    ),
    "kv_end without padding": (
        (Kernel.forward, SOFTCAP),
        struct_change("operands", 5, replace(1, 64)),
    ),
    "key_range too long": (
        (Kernel.forward, INTERVAL),
        struct_change("operands", 6, replace(1, 2)),
    ),
    "query_range too short": (
        (Kernel.backward, INTERVAL),
        struct_change("operands", 9, replace(1, 1)),
    ),
    "interval missing": ((Kernel.forward, INTERVAL), drop("operands")),
    "a row with intervals, given none": (
        FORWARD,
        attribute("kernel", f"forward{key_suffix(ROWS[0])}_interval"),
    ),
}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: "_".join((target[0], *target[1])))
def test_a_well_formed_raw_call_runs(target: Target) -> None:
    """So that the malformed ones below fail for what they change. All operands are ones."""
    raw(target, lambda call: None)


def test_sinks_that_are_not_given_are_an_operand_without_elements() -> None:
    raw(FORWARD, struct_change("operands", 3, replace(0, 0)))


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_call_is_an_invalid_argument(case: str) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT.*fa4_jax"):
        raw(*MALFORMED[case])
