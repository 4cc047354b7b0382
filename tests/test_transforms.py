# SPDX-License-Identifier: Apache-2.0
"""JAX's transformations, on a CPU: the primitives lower to the reference there, and to FFI calls
for CUDA.

Shapes are tiny and 16-bit, so that the calls bind the primitives. Values are compared with float64
and, under vmap, with a loop over the mapped axis.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import subprocess
import sys
import textwrap

import export_roundtrip
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from programs import assert_close, assert_tree_close, count, cuda_text
from reference import Oracle, visible

from fa4_jax import _primitives, export_disabled_checks, flash_attention
from fa4_jax._spec import AttentionSpec
from fa4_jax._variants import FEATURE_SETS, Feature, Kernel, feature_set, signature, target_name

SHAPES = {"q": (2, 5, 4, 64), "k": (2, 6, 2, 64), "v": (2, 6, 2, 64)}
attention = functools.partial(flash_attention, causal=True, return_lse=True)


def operands(seed: int = 0, lead: dict[str, tuple] | None = None) -> list[jax.Array]:
    rng = np.random.default_rng(seed)
    lead = lead or {}
    shapes = [(*lead.get(name, ()), *shape) for name, shape in SHAPES.items()]
    return [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]


def loss(q, k, v, **kwargs):
    """Depends on out and lse unevenly, so that no gradient is a sum that hides a swap."""
    out, lse = attention(q, k, v, **kwargs)
    out = out.astype(jnp.float32)
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return (out * weights).sum() + (lse * weights[..., 0].swapaxes(-1, -2)).sum()


gradients = jax.grad(loss, (0, 1, 2))


def oracle_gradients(q, k, v) -> tuple:
    out_weights = np.cos(np.arange(q.size)).reshape(q.shape)
    oracle = Oracle(visible(q.shape[1], k.shape[1], causal=True), 1 / math.sqrt(q.shape[-1]))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    return oracle.backward(q, k, v, out_weights, out_weights[..., 0].swapaxes(1, 2))[:3]


def test_gradients_of_out_and_lse_are_the_oracles() -> None:
    q, k, v = operands()
    assert_tree_close(gradients(q, k, v), oracle_gradients(q, k, v))


def test_jit_and_value_and_grad() -> None:
    q, k, v = operands()
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)
    assert_close(value, loss(q, k, v), tolerance=1e-6)
    assert_tree_close(grads, gradients(q, k, v), tolerance=1e-6)


SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations("qkv", n)]


@pytest.mark.parametrize("axis", [0, 1, 2, 3, 4, -1])
@pytest.mark.parametrize("mapped", SUBSETS, ids="".join)
def test_vmap_over_every_subset_and_axis(mapped: tuple[str, ...], axis: int) -> None:
    arrays = dict(zip("qkv", operands(lead={name: (3,) for name in mapped}), strict=True))
    moved = [jnp.moveaxis(arrays[n], 0, axis) if n in mapped else arrays[n] for n in "qkv"]
    in_axes = [axis if n in mapped else None for n in "qkv"]
    out_axes = axis if axis < 3 else 0
    results = jax.vmap(attention, in_axes, out_axes)(*moved)
    grads = jax.vmap(gradients, in_axes, axis)(*moved)
    for i in range(3):
        one = [arrays[n][i] if n in mapped else arrays[n] for n in "qkv"]
        sliced = [jnp.take(x, i, out_axes) for x in results]
        assert_tree_close(sliced, attention(*one), f"slice {i}")
        assert_tree_close([jnp.take(x, i, axis) for x in grads], gradients(*one), f"slice {i}")


def test_vmap_with_different_axes() -> None:
    q, k, v = operands(lead={name: (3,) for name in "qkv"})
    moved = jnp.moveaxis(q, 0, 2), jnp.moveaxis(k, 0, 4), v
    results = jax.vmap(attention, (2, 4, 0), (1, 3))(*moved)
    expected = jax.vmap(attention)(q, k, v)
    assert np.array_equal(jnp.moveaxis(results[0], 1, 0), expected[0])
    assert np.array_equal(jnp.moveaxis(results[1], 3, 0), expected[1])


def test_nested_vmap() -> None:
    q, k, v = operands(lead={"q": (3, 2), "k": (2,), "v": (3,)})
    results = jax.vmap(jax.vmap(attention, (0, 0, None)), (0, None, 0))(q, k, v)
    for i, j in itertools.product(range(3), range(2)):
        assert_tree_close([x[i, j] for x in results], attention(q[i, j], k[j], v[i]))


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("mapped", SUBSETS, ids="".join)
def test_vmap_over_an_axis_of_size_0_or_1(mapped: tuple[str, ...], size: int) -> None:
    arrays = operands(lead={name: (size,) for name in mapped})
    in_axes = [0 if n in mapped else None for n in "qkv"]
    results = jax.vmap(attention, in_axes)(*arrays)
    grads = jax.vmap(gradients, in_axes)(*arrays)
    assert [x.shape for x in results] == [(size, 2, 5, 4, 64), (size, 2, 4, 5)]
    assert [x.shape for x in grads] == [(size, *shape) for shape in SHAPES.values()]
    if size:
        one = [x[0] if n in mapped else x for n, x in zip("qkv", arrays, strict=True)]
        assert_tree_close([x[0] for x in results], attention(*one))
        assert_tree_close([x[0] for x in grads], gradients(*one))


def masked(arrays: dict, **kwargs) -> list:
    """out, lse and the gradients of a call with every feature, sinks' among them."""

    def call(q, k, v, sinks):
        bounds = {name: arrays[name] for name in ("kv_start", "kv_end")}
        return attention(q, k, v, sinks=sinks, softcap=3.0, **bounds, **kwargs)

    results, vjp = jax.vjp(call, *(arrays[name] for name in ("q", "k", "v", "sinks")))
    return [*results, *vjp(jax.tree.map(lambda x: jnp.cos(x).astype(x.dtype), results))]


def masked_operands(mapped: tuple[str, ...]) -> dict:
    rng = np.random.default_rng(3)
    arrays = dict(zip("qkv", operands(lead={name: (3,) for name in mapped}), strict=True))
    lead = {name: (3,) if name in mapped else () for name in ("kv_start", "kv_end", "sinks")}
    arrays["kv_start"] = jnp.asarray(rng.integers(0, 3, (*lead["kv_start"], 2, 5)))
    arrays["kv_end"] = jnp.asarray(rng.integers(2, 7, (*lead["kv_end"], 2, 5)))
    arrays["sinks"] = jnp.asarray(rng.standard_normal((*lead["sinks"], 4)), jnp.float32)
    return arrays


MAPPED = [("q",), ("kv_end",), ("sinks",), ("k", "kv_start"), ("q", "k", "v", "kv_start", "kv_end")]


@pytest.mark.parametrize("mapped", [*MAPPED, (*MAPPED[-1], "sinks")], ids="-".join)
def test_vmap_over_bounds_and_sinks(without_library, mapped: tuple[str, ...]) -> None:
    arrays = masked_operands(mapped)
    in_axes = ({name: 0 if name in mapped else None for name in arrays},)
    results = jax.vmap(masked, in_axes)(arrays)
    for i in range(3):
        one = {name: x[i] if name in mapped else x for name, x in arrays.items()}
        assert_tree_close([x[i] for x in results], masked(one), f"slice {i}")
    text = cuda_text(jax.vmap(masked, in_axes), arrays)
    assert [count(text, kernel) for kernel in Kernel] == [1, 1, 1, 1]
    line = next(x for x in text.splitlines() if count(x, Kernel.forward))
    assert 'kernel = "forward_bf16_d64_interval_softcap"' in line
    assert "tensor<6x4xf32>, tensor<6x128xi32>, tensor<6x128xi32>, tensor<6x1x4xi32>" in line


def test_bounds_and_sinks_that_share_a_scan() -> None:
    """Each step its own mask: one traced program, and the gradients of the sum of all steps."""
    arrays = masked_operands(("kv_start", "kv_end", "sinks"))
    fixed = {name: arrays.pop(name) for name in "qkv"}
    _, stacked = jax.lax.scan(lambda _, step: (None, masked({**fixed, **step})), None, arrays)
    for i in range(3):
        one = masked(fixed | {name: x[i] for name, x in arrays.items()})
        assert_tree_close([x[i] for x in stacked], one, f"step {i}")


def test_vmap_is_one_call_with_a_larger_batch(without_library) -> None:
    arrays = operands(lead={"q": (3,)})
    text = cuda_text(jax.vmap(gradients, (0, None, None)), *arrays)
    assert [count(text, kernel) for kernel in Kernel] == [1, 1, 1, 1]
    assert re.search(
        r"@fa4_jax_forward_v\d+\(.*: \(tensor<6x5x4x64xbf16>, tensor<6x6x2x64xbf16>", text
    )


def test_grad_of_vmap_is_vmap_of_grad() -> None:
    q, k, v = operands(lead={"q": (3,)})

    def total(q, k, v):
        return jax.vmap(loss, (0, None, None))(q, k, v).sum()

    dq, dk, dv = jax.vmap(gradients, (0, None, None))(q, k, v)
    results = jax.grad(total, (0, 1, 2))(q, k, v)
    summed = [x.astype(jnp.float32).sum(0) for x in (dk, dv)]
    assert_tree_close(results, (dq, *summed), tolerance=2e-2)


def test_jacobian() -> None:
    q, k, v = (x[:1, :2, :1] for x in operands())

    def plain(q):
        x = jnp.einsum("btnd,bsnd->bnts", q, k.astype(jnp.float32)) / 8
        x = jnp.where(np.tri(2, dtype=bool), x, -jnp.inf)
        return jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(x), v.astype(jnp.float32))

    jacobian = jax.jacrev(lambda q: attention(q, k, v)[0])(q)
    assert_close(jacobian, jax.jacrev(plain)(q.astype(jnp.float32)), tolerance=2e-2)


def test_scan_forward_and_gradient() -> None:
    q, k, v = operands()

    def scanned(q, k, v):
        q, _ = jax.lax.scan(lambda q, _: (attention(q, k, v)[0], None), q, length=3)
        return q.astype(jnp.float32).sum()

    def unrolled(q, k, v):
        for _ in range(3):
            q = attention(q, k, v)[0]
        return q.astype(jnp.float32).sum()

    assert_close(scanned(q, k, v), unrolled(q, k, v), tolerance=1e-6)
    grad = functools.partial(jax.grad, argnums=(0, 1, 2))
    assert_tree_close(grad(scanned)(q, k, v), grad(unrolled)(q, k, v), tolerance=1e-2)


def test_cond_and_checkpoint_change_no_value() -> None:
    q, k, v = operands()

    def chosen(q, k, v, flag):
        return jax.lax.cond(flag, loss, lambda q, k, v: 2 * loss(q, k, v), q, k, v)

    assert_close(chosen(q, k, v, False), 2 * loss(q, k, v), tolerance=1e-6)
    expected = gradients(q, k, v)
    assert_tree_close(jax.grad(jax.checkpoint(loss), (0, 1, 2))(q, k, v), expected, tolerance=1e-6)


@pytest.mark.parametrize(
    ("policy", "forward_calls"),
    [
        (checkpoint_policies.save_only_these_names("context"), 1),
        (checkpoint_policies.everything_saveable, 1),
        (checkpoint_policies.nothing_saveable, 2),
        (checkpoint_policies.dots_saveable, 2),
    ],
    ids=["context", "everything", "nothing", "dots"],
)
def test_saving_context_runs_one_forward_a_step(without_library, policy, forward_calls) -> None:
    def block(q, k, v):
        """Something before and after, as in a model: only attention is asked to be saved."""
        return loss(jnp.sin(q), jnp.sin(k), v)

    rematerialised = jax.checkpoint(block, policy=policy)
    # The value too: without it, only a recomputed forward would be left.
    text = cuda_text(jax.value_and_grad(rematerialised, (0, 1, 2)), *operands())
    counts = [count(text, kernel) for kernel in Kernel]
    assert counts == [forward_calls, 1, 1, 1]
    assert_tree_close(
        jax.grad(rematerialised, (0, 1, 2))(*operands()), jax.grad(block, (0, 1, 2))(*operands())
    )


def test_eval_shape_runs_nothing() -> None:
    out, lse = jax.eval_shape(attention, *operands())
    assert (out.shape, out.dtype) == ((2, 5, 4, 64), jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 5), jnp.float32)
    grads = jax.eval_shape(gradients, *operands())
    assert [(x.shape, x.dtype) for x in grads] == [(s, jnp.bfloat16) for s in SHAPES.values()]


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("empty", ["B", "T", "S"])
def test_an_empty_dimension(without_library, empty: str, implementation: str | None) -> None:
    sizes = {"B": 2, "T": 5, "S": 6, empty: 0}
    shapes = [
        (sizes["B"], sizes[length], heads, 64) for length, heads in (("T", 4), ("S", 2), ("S", 2))
    ]
    q, k, v = (jnp.ones(shape, jnp.bfloat16) for shape in shapes)
    out, lse = attention(q, k, v, implementation=implementation)
    assert (out.shape, lse.shape) == (q.shape, (sizes["B"], 4, sizes["T"]))
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    assert np.all(np.asarray(out) == 0) and np.all(np.asarray(lse) == -np.inf)

    def total(q, k, v):
        return attention(q, k, v, implementation=implementation)[0].astype(jnp.float32).sum()

    grads = jax.grad(total, (0, 1, 2))(q, k, v)
    assert [x.shape for x in grads] == [x.shape for x in (q, k, v)]
    assert all(np.all(np.asarray(x) == 0) for x in grads)
    text = cuda_text(jax.grad(total, (0, 1, 2)), q, k, v)
    assert not any(count(text, kernel) for kernel in Kernel)


def test_an_unused_lse_costs_no_second_forward(without_library) -> None:
    text = cuda_text(jax.grad(lambda *x: attention(*x)[0].astype(jnp.float32).sum()), *operands())
    assert [count(text, kernel) for kernel in Kernel] == [1, 1, 1, 1]


def test_forward_mode_and_second_derivatives_say_no() -> None:
    q, k, v = operands()
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (q, k, v), (q, k, v))
    with pytest.raises(NotImplementedError, match="fa4_backward|fa4_forward"):
        jax.grad(lambda q: jax.grad(loss)(q, k, v).astype(jnp.float32).sum())(q)


# What asks for each set of features.
CALLS: dict[tuple[Feature, ...], dict] = {
    (): {},
    (Feature.interval,): {"kv_end": np.full((2, 5), 4)},
    (Feature.interval, Feature.softcap): {"softcap": 30.0},
    (Feature.interval, Feature.deterministic): {"deterministic": True},
    (Feature.interval, Feature.softcap, Feature.deterministic): {
        "softcap": 30.0,
        "deterministic": True,
    },
}


def sizes_of(is_with_sinks: bool) -> dict[str, int]:
    """Of `operands`, by the letters of `_variants`."""
    sizes = {"B": 2, "T": 5, "S": 6, "N": 4, "K": 2, "D": 64, "V": 64, "R": 128, "E": 64}
    return sizes | {"M": 1, "J": 1, "W": 4, "U": 1, "Z": 2 if is_with_sinks else 0}


def aval_types(buffers, sizes: dict[str, int]) -> list[str]:
    """MLIR types of some operands or results, as the table promises them."""
    names = {"bf16": "bf16", "f16": "f16", "f32": "f32", "i32": "i32", None: "bf16"}

    def text(buffer) -> str:
        dims = "x".join(str(sizes[letter]) for letter in buffer.dims)
        return f"tensor<{dims}x{names[buffer.dtype and str(buffer.dtype)]}>"

    return [text(buffer) for buffer in buffers]


@pytest.mark.parametrize("sinks", [None, np.zeros(4, np.float32)], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("features", CALLS, ids=lambda x: "-".join(("row", *x)))
@pytest.mark.parametrize("kernel", Kernel)
def test_the_lowered_call_is_the_signature(without_library, kernel, features, sinks) -> None:
    """Operand and result types, row-major layouts, attributes and aliases, against the table."""
    assert set(CALLS) == set(FEATURE_SETS[Kernel.backward])
    call = functools.partial(gradients, softmax_scale=0.25, sinks=sinks, **CALLS[features])
    text = cuda_text(call, *operands())
    (line,) = (x for x in text.splitlines() if f"custom_call @{target_name(kernel)}(" in x)
    asked = (
        {Feature.interval} if "kv_end" in CALLS[features] else set(features) - {Feature.interval}
    )
    chosen = feature_set(kernel, asked)
    expected = signature(kernel, chosen)
    given, got = re.search(r": \((.*)\) -> \(?(.*?)\)?$", line).groups()
    sizes = sizes_of(sinks is not None)
    assert given.split(", ") == aval_types(expected.operands, sizes)
    assert got.split(", ") == aval_types(expected.results, sizes)
    attributes = re.search(r"backend_config = \{(.*?)\}", line).group(1).split(", ")
    softcap = "3.000000e+01" if Feature.softcap in features else "1.000000e+00"
    values = {"softmax_scale": "2.500000e-01", "softcap": softcap}
    values |= {"band_lower": "-5", "band_upper": "0"}
    key = "_".join((kernel, "bf16", "d64", *chosen))
    scalars = [f"{s.name} = {values[s.name]} : {s.kind}" for s in expected.attributes]
    assert sorted(attributes) == sorted([f'kernel = "{key}"', *scalars])
    for name, buffers in (("operand_layouts", given), ("result_layouts", got)):
        layouts = re.search(rf"{name} = \[(.*?xindex>)\]", line).group(1)
        ranks = [x.count("x") for x in buffers.split(", ")]
        row_major = [", ".join(map(str, reversed(range(rank)))) for rank in ranks]
        assert re.findall(r"dense<\[?([\d, ]*)\]?>", layouts) == row_major
    aliases = re.findall(r"output_tuple_indices = \[(\d*)\], operand_index = (\d+)", line)
    assert {int(i): int(o or 0) for o, i in aliases} == expected.aliases


@pytest.mark.parametrize(
    ("kwargs", "band"),
    [
        ({}, (-5, 6)),
        ({"causal": True}, (-5, 0)),
        ({"causal": True, "causal_alignment": "bottom_right"}, (-5, 1)),
        ({"window_size": (2, 1)}, (-2, 1)),
        ({"window_size": (2, 1), "causal_alignment": "bottom_right"}, (-1, 2)),
        ({"window_size": (2**40, 2**31)}, (-5, 6)),
    ],
    ids=str,
)
def test_the_band_reaches_the_kernel(without_library, kwargs: dict, band: tuple[int, int]) -> None:
    text = cuda_text(lambda *x: flash_attention(*x, **kwargs), *operands())
    assert re.search(rf"band_lower = {band[0]} : i32, band_upper = {band[1]} : i32", text)


@pytest.mark.parametrize("scale", [-0.25, 0.25])
def test_the_kernel_gets_a_positive_scale(without_library, scale: float) -> None:
    text = cuda_text(lambda *x: flash_attention(*x, softmax_scale=scale), *operands())
    assert "softmax_scale = 2.500000e-01 : f32" in text
    assert ("stablehlo.negate" in text) == (scale < 0)


@pytest.mark.parametrize("platforms", [("cuda",), ("cpu", "cuda")], ids=str)
def test_export_without_a_gpu_with_a_symbolic_batch(without_library, platforms) -> None:
    exported = export_roundtrip.export(platforms)
    assert exported.platforms == platforms
    text = exported.mlir_module()
    assert [count(text, kernel) for kernel in Kernel] == [1, 1, 1, 1]
    assert "tensor<?x" in text
    restored = jax.export.deserialize(exported.serialize())
    assert list(map(str, restored.in_avals)) == list(map(str, exported.in_avals))
    assert restored.platforms == platforms
    if "cpu" in platforms:
        assert not export_roundtrip.check(restored)


def test_export_needs_the_disabled_checks(without_library) -> None:
    with pytest.raises(ValueError, match="fa4_jax_forward"):
        jax.export.export(jax.jit(loss), platforms=["cuda"])(*operands())
    jax.export.export(jax.jit(loss), platforms=["cuda"], disabled_checks=export_disabled_checks())(
        *operands()
    )


def test_a_symbolic_length_says_no() -> None:
    (length,) = jax.export.symbolic_shape("t")
    q, k, v = (jax.ShapeDtypeStruct((2, length, 2, 64), jnp.bfloat16) for _ in range(3))
    with pytest.raises(NotImplementedError, match="q: got shape .* only batch may be symbolic"):
        jax.export.export(jax.jit(loss), platforms=["cuda"])(q, k, v)


def test_lowering_is_the_same_in_every_process() -> None:
    """The persistent compilation cache and multi-process programs need it."""
    code = (
        f"import sys; sys.path[:0] = {sys.path}; import test_transforms as t; "
        "from fa4_jax import _ffi; _ffi.register = lambda: None; "
        "print(t.cuda_text(t.gradients, *t.operands()))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            check=True,
            env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1 and len(texts.pop()) > 1000


def test_a_second_process_compiles_nothing(tmp_path) -> None:
    """With the persistent compilation cache, as JAX's log tells it: a training step's attention on
    one device, and over an Explicit mesh of four."""
    code = """
        import logging
        import jax, jax.numpy as jnp, fa4_jax
        from jax.sharding import AxisType, NamedSharding, PartitionSpec

        logging.basicConfig()
        logging.getLogger("jax._src.compiler").setLevel("DEBUG")
        jax.config.update("jax_num_cpu_devices", 4)

        def loss(q, lengths):
            out = fa4_jax.flash_attention(q, q, q, causal=True, key_value_seq_lengths=lengths)
            return out.astype(jnp.float32).sum()

        mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
        q, lengths = jnp.ones((2, 16, 2, 8), jnp.bfloat16), jnp.array([9, 16])
        for spec in (None, PartitionSpec("data", None, "model")):
            if spec:
                q = jax.device_put(q, NamedSharding(mesh, spec))
                lengths = jax.device_put(lengths, NamedSharding(mesh, PartitionSpec("data")))
                jax.set_mesh(mesh)
            jax.block_until_ready(jax.jit(jax.value_and_grad(loss))(q, lengths))
    """
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def compiled_and_found(seed: str) -> tuple[int, int]:
        log = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            check=True,
            text=True,
            env={**environment, "PYTHONHASHSEED": seed},
        ).stderr
        return log.count("PERSISTENT COMPILATION CACHE MISS"), log.count("compilation cache hit")

    compiled, found = compiled_and_found("1")
    assert compiled >= 2 and found == 0
    assert compiled_and_found("2") == (0, compiled)


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_replicated_keys(check_vma: bool, implementation: str | None) -> None:
    """Types vary over the mesh as they must, also as a scan's carry, and dk, dv come out summed."""
    q, k, v = operands()
    k, v = k[:1], v[:1]

    def block(q, k, v):
        q, _ = jax.lax.scan(
            lambda q, _: (flash_attention(q, k, v, implementation=implementation), None),
            q,
            length=2,
        )
        return (q.astype(jnp.float32) ** 2).sum()

    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        lambda *x: jax.lax.psum(block(*x), "x"),
        mesh=mesh,
        in_specs=(P("x"), P(), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    value, grads = jax.jit(jax.value_and_grad(sharded, (0, 1, 2)))(q, k, v)

    def whole(q, k, v):
        return block(q, jnp.concatenate([k, k]), jnp.concatenate([v, v]))

    expected, expected_grads = jax.value_and_grad(whole, (0, 1, 2))(q, k, v)
    assert_close(value, expected, tolerance=1e-3)
    assert_tree_close(grads, expected_grads, tolerance=2e-2)


def test_shard_map_lowers_for_cuda(without_library) -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        lambda *x: jax.lax.psum(loss(*x), "x"),
        mesh=mesh,
        in_specs=(P("x"), P(), P()),
        out_specs=P(),
    )
    q, k, v = operands()
    text = cuda_text(jax.grad(sharded, (0, 1, 2)), q, k[:1], v[:1])
    assert [count(text, kernel) for kernel in Kernel] == [1, 1, 1, 1]


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x")], ids=str)
def test_explicit_sharding_is_kept(spec: P, implementation: str | None) -> None:
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x in operands()]
        run = functools.partial(attention, implementation=implementation)
        out, lse = jax.jit(run)(*arrays)
        full = P(*spec, *[None] * (4 - len(spec)))
        assert jax.typeof(out).sharding.spec == full
        assert jax.typeof(lse).sharding.spec == P(full[0], full[2], full[1])

        def total(q, k, v):
            out, lse = run(q, k, v)
            return (out.astype(jnp.float32) ** 2).sum() + lse.sum()

        grads = jax.jit(jax.grad(total, (0, 1, 2)))(*arrays)
        assert all(jax.typeof(x).sharding.spec == full for x in grads)
    plain = jax.grad(total, (0, 1, 2))(*operands())
    assert_tree_close(jax.device_get(grads), plain, tolerance=1e-2)


def test_operands_must_vary_alike_when_bound_directly() -> None:
    """The API casts them; someone who binds the primitive gets told."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    q, k, v = operands()
    spec = AttentionSpec(softmax_scale=0.125)
    bound = jax.shard_map(
        lambda q, k, v: _primitives.forward_p.bind(q, k, v, spec=spec, extras=()),
        mesh=mesh,
        in_specs=(P("x"), P(), P()),
        out_specs=P("x"),
    )
    with pytest.raises(ValueError, match="fa4_forward vary over different mesh axes"):
        jax.eval_shape(bound, q, k[:1], v[:1])
