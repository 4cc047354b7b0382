# SPDX-License-Identifier: Apache-2.0
"""Attention on a mesh of 8 CPU devices: values and gradients against float64, and how many
collectives a compiled step has.

The primitives lower to the reference on a CPU, by the same rule that puts kernels on GPUs: programs
for CUDA are looked at as far as they can be without one.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import assert_close, assert_tree_close, count, cuda_text
from reference import Oracle, visible

from fa4_jax import ShardingWarning, export_disabled_checks, flash_attention
from fa4_jax._variants import Kernel

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, HEAD_DIM = 8, 4, 5, 8, 16
KINDS = [AxisType.Auto, AxisType.Explicit]
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda x: x.name)

# Of q and what has its heads; of k and v; of lse.
HEADS_SPLIT = P("x", None, "y")
BATCH_SPLIT = P("x")

COLLECTIVES = r"= [^=\n]*\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\("


def mesh_of(shape: tuple[int, int], *kinds: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("x", "y"), axis_types=kinds * 2 if len(kinds) == 1 else kinds)


@functools.cache
def operands(heads: int = HEADS, kv_heads: int = 2, batch: int = BATCH) -> list[jax.Array]:
    """q, k, v, dout, dlse"""
    rng = np.random.default_rng(heads + kv_heads)
    q, k = (batch, SEQLEN_Q, heads, HEAD_DIM), (batch, SEQLEN_K, kv_heads, HEAD_DIM)
    arrays = [jnp.asarray(rng.standard_normal(x), jnp.bfloat16) for x in (q, k, k, q)]
    return [*arrays, jnp.asarray(rng.standard_normal((batch, heads, SEQLEN_Q)), jnp.float32)]


def step(q, k, v, dout, dlse, **options) -> tuple:
    """out, lse, dq, dk, dv"""

    def attention(q, k, v):
        return flash_attention(q, k, v, causal=True, return_lse=True, **options)

    results, vjp = jax.vjp(attention, q, k, v)
    return *results, *vjp((dout, dlse))


def forward(q, k, v) -> jax.Array:
    return flash_attention(q, k, v, causal=True)


def oracle(q, k, v, dout, dlse, sinks=None, **mask) -> tuple:
    """`step` in float64."""
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlse))
    seen = visible(q.shape[1], k.shape[1], causal=True, **mask)
    exact = Oracle(seen, 1 / math.sqrt(q.shape[-1]), sinks=sinks)
    return *exact.forward(q, k, v), *exact.backward(q, k, v, dout, dlse)[:3]


def place(mesh: jax.sharding.Mesh, arrays: Sequence, specs: Sequence[P]) -> list[jax.Array]:
    pairs = zip(arrays, specs, strict=True)
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in pairs]


def step_specs(q: P, k: P) -> list[P]:
    """Of `operands`, where k and v are split alike, and lse as q."""
    full = (*q, *[None] * (4 - len(q)))
    return [q, k, k, q, P(full[0], full[2], full[1])]


def compiled(function: Callable, arrays: Sequence) -> tuple[list, dict[str, int]]:
    """Results, and how many collectives of each kind the program has."""
    program = jax.jit(function).lower(*arrays).compile()
    return list(program(*arrays)), dict(
        collections.Counter(re.findall(COLLECTIVES, program.as_text()))
    )


def is_sharded(x: jax.Array, mesh: jax.sharding.Mesh, spec: P) -> bool:
    return x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


@by_kind
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (8, 1), (4, 2)], ids=str)
def test_batch_and_heads_split_without_a_collective(shape, kv_heads: int, kind) -> None:
    """But where devices share key/value heads: there, dk and dv are summed."""
    mesh = mesh_of(shape, kind)
    is_shared = kv_heads % shape[1] != 0
    specs = step_specs(HEADS_SPLIT, BATCH_SPLIT if is_shared else HEADS_SPLIT)
    arrays = place(mesh, operands(kv_heads=kv_heads), specs)
    results, collectives = compiled(step, arrays)
    assert_tree_close(results, oracle(*arrays))
    if not is_shared:
        assert not collectives
    else:
        # One for both. Over Auto axes, heads come out split as far as they can be, and then whole.
        gathers = {"all-gather": 2} if kind == AxisType.Auto else {}
        assert collectives == {"all-reduce": 1, **gathers}
        assert not compiled(forward, arrays[:3])[1]
    out, lse, dq, dk, dv = specs[0], specs[4], *specs[:3]
    for x, spec in zip(results, (out, lse, dq, dk, dv), strict=True):
        assert is_sharded(x, mesh, spec)


@by_kind
@pytest.mark.parametrize(
    ("shape", "heads", "kv_heads"), [((2, 3), 6, 2), ((1, 4), 12, 6), ((2, 4), 4, 1)], ids=str
)
def test_key_value_heads_that_the_mesh_does_not_divide(shape, heads, kv_heads, kind) -> None:
    """Some devices use two key/value heads, of which others use one, too."""
    mesh = mesh_of(shape, kind)
    arrays = place(mesh, operands(heads, kv_heads), step_specs(HEADS_SPLIT, BATCH_SPLIT))
    results, _ = compiled(step, arrays)
    assert_tree_close(results, oracle(*arrays))


@by_kind
def test_query_heads_over_two_axes_and_key_value_heads_over_one(kind) -> None:
    mesh = mesh_of((2, 4), kind)
    specs = step_specs(P(None, None, ("x", "y")), P(None, None, "x"))
    arrays = place(mesh, operands(), specs)
    results, collectives = compiled(step, arrays)
    assert collectives == {"all-reduce": 1}
    assert_tree_close(results, oracle(*arrays))
    assert is_sharded(results[3], mesh, specs[1])


@by_kind
def test_operands_that_are_sharded_differently(kind) -> None:
    """q decides; the others go where it is."""
    mesh = mesh_of((2, 4), kind)
    specs = [P("x"), P("y"), P(None, None, "x"), P(None, None, "y"), P()]
    if kind == AxisType.Explicit:
        specs[3:] = P("x"), P("x")  # JAX's own check: cotangents have the results' types
    arrays = place(mesh, operands(), specs)
    assert_tree_close(compiled(step, arrays)[0], oracle(*arrays))


@pytest.mark.usefixtures("fresh_warnings")
@by_kind
@pytest.mark.parametrize(
    ("q", "k", "name"),
    [
        (P("x", "y"), P("x"), "query length"),
        (P("x"), P("x", None, None, "y"), "head_dim, v's head_dim"),
    ],
    ids=["T", "D"],
)
def test_a_sharded_length_or_head_dim_is_gathered(q: P, k: P, name: str, kind) -> None:
    mesh = mesh_of((2, 4), kind)
    specs = step_specs(q, k)
    arrays = place(mesh, operands(), specs)
    message = f"over {name}, which .* fa4_jax.context_parallel_attention"
    with pytest.warns(ShardingWarning, match=message) as warned:
        results, collectives = compiled(step, arrays)
    assert [x.category for x in warned].count(ShardingWarning) == 1
    assert collectives["all-gather"]
    assert_tree_close(results, oracle(*arrays))
    if kind == AxisType.Explicit:
        for x, spec in zip(results, (q, specs[4], q, k, k), strict=True):
            assert is_sharded(x, mesh, spec)


@pytest.mark.usefixtures("fresh_warnings")
@by_kind
def test_sharded_keys_are_gathered(kind) -> None:
    mesh = mesh_of((1, 5), kind)
    arrays = place(mesh, operands(), step_specs(P(), P(None, "y")))
    with pytest.warns(ShardingWarning, match="over key length, which"):
        results, _ = compiled(step, arrays)
    assert_tree_close(results, oracle(*arrays))


@by_kind
def test_bounds_and_sinks_are_split_along(kind) -> None:
    mesh = mesh_of((2, 4), kind)
    rng = np.random.default_rng(1)
    start = rng.integers(0, 3, (BATCH, SEQLEN_Q)).astype(np.int32)
    end = rng.integers(2, 6, (BATCH, SEQLEN_Q)).astype(np.int32)
    sinks = rng.standard_normal(HEADS).astype(np.float32)
    specs = [*step_specs(HEADS_SPLIT, HEADS_SPLIT), P("x"), P("x"), P("y")]
    arrays = place(mesh, [*operands(kv_heads=4), start, end, sinks], specs)

    def with_sinks(q, k, v, dout, dlse, start, end, sinks):
        def attention(q, k, v, sinks):
            bounds = {"kv_start": start, "kv_end": end, "sinks": sinks}
            return flash_attention(q, k, v, causal=True, return_lse=True, **bounds)

        results, vjp = jax.vjp(attention, q, k, v, sinks)
        return *results, *vjp((dout, dlse))

    results, collectives = compiled(with_sinks, arrays)
    assert collectives == {"all-reduce": 1}, "the sinks' gradient, over the batch"
    expected = oracle(*arrays[:5], sinks=sinks, kv_start=start, kv_end=end)
    assert_tree_close(results[:5], expected)
    wide = [np.asarray(x, np.float64) for x in arrays[:5]]
    seen = visible(SEQLEN_Q, SEQLEN_K, causal=True, kv_start=start, kv_end=end)
    dsinks = Oracle(seen, 1 / math.sqrt(HEAD_DIM), sinks=sinks).dsinks(*wide)
    assert_close(results[5], dsinks)
    assert is_sharded(results[5], mesh, P("y"))


def test_the_gradient_of_replicated_sinks_has_their_type() -> None:
    mesh = mesh_of((2, 4), AxisType.Explicit)
    specs = [HEADS_SPLIT] * 3 + [P()]
    arrays = place(mesh, [*operands()[:1] * 3, np.zeros(HEADS, np.float32)], specs)

    def loss(q, k, v, sinks):
        return flash_attention(q, k, v, sinks=sinks).astype(jnp.float32).sum()

    assert jax.typeof(jax.eval_shape(jax.grad(loss, 3), *arrays)).sharding.spec == P(None)


MAPPED = {
    "the mapped axis is split": (P("y", "x"), P("y", "x")),
    "keys and values aren't mapped": (P("y", "x", None, None, None), P("x", None, None, None)),
    "heads are split": (P(None, "x", None, "y"), P(None, "x", None, "y")),
}


@by_kind
@pytest.mark.parametrize("case", MAPPED)
def test_vmap_without_a_collective(case: str, kind) -> None:
    mesh = mesh_of((2, 4), kind)
    q_spec, k_spec = MAPPED[case]
    is_kv_mapped = len(k_spec) == len(q_spec)
    q, k, v, dout, _ = (x.reshape(4, 2, *x.shape[1:]) for x in operands(kv_heads=4))
    if not is_kv_mapped:
        k, v = k[0], v[0]

    def gradients(q, k, v, dout):
        out, vjp = jax.vjp(forward, q, k, v)
        return out, *vjp(dout)

    in_axes = (0, 0 if is_kv_mapped else None, 0 if is_kv_mapped else None, 0)
    arrays = place(mesh, [q, k, v, dout], [q_spec, k_spec, k_spec, q_spec])
    results, collectives = compiled(jax.vmap(gradients, in_axes), arrays)
    assert not collectives
    results = jax.device_get(results)
    for i in range(4):
        one = [x[i] if axis == 0 else x for x, axis in zip((q, k, v, dout), in_axes, strict=True)]
        out, _, *gradient = oracle(*one, np.zeros((2, HEADS, SEQLEN_Q)))
        assert_tree_close([x[i] for x in results], (out, *gradient), f"slice {i}")


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    "kinds",
    [(AxisType.Auto, AxisType.Auto), (AxisType.Auto, AxisType.Explicit)],
    ids=lambda x: "-".join(kind.name for kind in x),
)
def test_shard_map_over_one_axis_of_two(kinds, check_vma: bool) -> None:
    mesh = mesh_of((2, 4), *kinds)
    specs = step_specs(HEADS_SPLIT, HEADS_SPLIT)
    arrays = place(mesh, operands(kv_heads=4), specs)
    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=P("x"),
        out_specs=P("x"),
        axis_names={"x"},
        check_vma=check_vma,
    )
    results, collectives = compiled(mapped, arrays)
    assert_tree_close(results, oracle(*arrays))
    if AxisType.Explicit not in kinds:  # JAX 0.10 gathers these at the region's border
        assert not collectives


@pytest.mark.usefixtures("fresh_warnings")
def test_shard_map_over_one_axis_of_two_with_shared_key_value_heads() -> None:
    """XLA's partitioner is asked about one part of the mesh and can't sum over it: heads are
    gathered."""
    mesh = mesh_of((2, 4), AxisType.Auto)
    arrays = place(mesh, operands(), step_specs(HEADS_SPLIT, BATCH_SPLIT))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=P("x"), out_specs=P("x"), axis_names={"x"})
    with pytest.warns(ShardingWarning, match="query heads"):
        results, _ = compiled(mapped, arrays)
    assert_tree_close(results, oracle(*arrays))


@pytest.mark.usefixtures("fresh_warnings")
@pytest.mark.parametrize("has_context", [True, False])
def test_a_mesh_with_both_kinds_of_axes(has_context: bool) -> None:
    mesh = mesh_of((2, 4), AxisType.Explicit, AxisType.Auto)
    arrays = place(mesh, operands(kv_heads=4), step_specs(HEADS_SPLIT, HEADS_SPLIT))
    if not has_context:
        with pytest.warns(ShardingWarning, match="jax.set_mesh"):
            results, _ = compiled(step, arrays)
    else:
        with jax.set_mesh(mesh):
            results, collectives = compiled(step, arrays)
        assert not collectives
    assert_tree_close(results, oracle(*arrays))


@by_kind
def test_constants_and_a_mesh_context(kind) -> None:
    """Operands that no mesh knows, where there is one."""
    mesh = mesh_of((2, 4), kind)
    q, k, v, *_ = operands()
    (placed,) = place(mesh, [q], [HEADS_SPLIT])
    k_constant, v_constant = np.asarray(k), np.asarray(v)
    expected = oracle(*operands())[0]
    with jax.set_mesh(mesh):
        mixed = jax.jit(lambda q: forward(q, k_constant, v_constant))
        assert_close(mixed(placed), expected)
        assert_close(mixed(q), expected)
        assert_close(forward(placed, *place(mesh, [k, v], [P(), P()])), expected)


@pytest.mark.usefixtures("fresh_warnings")
def test_more_devices_than_heads() -> None:
    """Propagation through a reshape splits heads, and head dims, by parts of one axis."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x, weights = operands()[0][:2, :, 0], operands()[1].reshape(-1, 64)[:HEAD_DIM]

    def projected(x, weights):
        q = (x @ weights).reshape(2, SEQLEN_Q, 4, 16)
        return forward(q, q, q)

    split = place(mesh, [x, weights], [P(), P(None, "x")])
    with pytest.warns(ShardingWarning, match="over head_dim"):
        result = jax.jit(projected)(*split)
    assert_close(result, jax.jit(projected)(x, weights))


@pytest.mark.usefixtures("fresh_warnings")
def test_a_batch_and_heads_that_the_mesh_does_not_divide() -> None:
    """A constraint may split unevenly; that isn't done with attention."""
    mesh = mesh_of((2, 4), AxisType.Auto)
    uneven = NamedSharding(mesh, HEADS_SPLIT)
    arrays = operands(heads=6, kv_heads=6, batch=3)

    def constrained(q, k, v):
        return forward(jax.lax.with_sharding_constraint(q, uneven), k, v)

    with pytest.warns(ShardingWarning, match=r"batch \(not evenly\), query heads \(not"):
        result = jax.jit(constrained)(*arrays[:3])
    assert_close(result, oracle(*arrays)[0])


@by_kind
@pytest.mark.parametrize(
    ("policy", "calls"),
    [
        (checkpoint_policies.save_only_these_names("context"), 1),
        (checkpoint_policies.nothing_saveable, 2),
    ],
    ids=["context", "nothing"],
)
def test_saving_context_runs_one_forward_a_step(without_library, policy, calls, kind) -> None:
    mesh = mesh_of((2, 4), kind)
    arrays = place(mesh, operands(kv_heads=4)[:3], [HEADS_SPLIT] * 3)

    @functools.partial(jax.checkpoint, policy=policy)
    def block(q, k, v):
        return forward(jnp.sin(q), k, v).astype(jnp.float32).sum()

    text = cuda_text(jax.value_and_grad(block, (0, 1, 2)), *arrays)
    if kind == AxisType.Explicit:
        assert [count(text, kernel) for kernel in Kernel] == [calls, 1, 1, 1]
        line = next(x for x in text.splitlines() if count(x, Kernel.forward))
        assert "tensor<4x4x2x64xbf16>, tensor<4x5x1x64xbf16>" in line, "one device's, padded"
    else:
        assert text.count("@CustomSPMDPartitioning(") == calls + 1
        assert text.count("sdy.sharding_rule") == calls + 1


def test_one_device_has_nothing_of_the_partitioner(without_library) -> None:
    text = cuda_text(step, *operands())
    assert [count(text, kernel) for kernel in Kernel] == [1, 1, 1, 1]
    assert "CustomSPMDPartitioning" not in text and "sdy." not in text


def explicit_cuda_text() -> str:
    mesh = mesh_of((2, 4), AxisType.Explicit)
    return cuda_text(step, *place(mesh, operands(), step_specs(HEADS_SPLIT, BATCH_SPLIT)))


def test_lowering_over_explicit_axes_is_the_same_every_time(without_library) -> None:
    """Nothing in it is this process' alone, so the persistent compilation cache works."""
    text = explicit_cuda_text()
    jax.clear_caches()
    assert explicit_cuda_text() == text


def test_export_for_several_devices(without_library) -> None:
    mesh = mesh_of((2, 4), AxisType.Explicit)
    arrays = place(mesh, operands(), step_specs(HEADS_SPLIT, BATCH_SPLIT))
    export = jax.export.export(
        jax.jit(step), platforms=["cpu", "cuda"], disabled_checks=export_disabled_checks()
    )
    exported = jax.export.deserialize(export(*arrays).serialize())
    assert exported.nr_devices == 8
    text = exported.mlir_module()
    assert [count(text, kernel) for kernel in Kernel] == [1, 1, 1, 1]
    assert_tree_close(jax.jit(exported.call)(*arrays), oracle(*arrays))


@pytest.mark.usefixtures("fresh_warnings")
def test_export_over_auto_axes_repeats_the_work(without_library) -> None:
    mesh = mesh_of((2, 4), AxisType.Auto)
    arrays = place(mesh, operands(kv_heads=4)[:3], [HEADS_SPLIT] * 3)
    export = jax.export.export(
        jax.jit(forward), platforms=["cuda"], disabled_checks=export_disabled_checks()
    )
    with pytest.warns(ShardingWarning, match="exported"):
        text = export(*arrays).mlir_module()
    assert "tensor<8x4x8x64xbf16>" in text and count(text, Kernel.forward) == 1


@pytest.mark.parametrize("manual", [True, False])
def test_a_mesh_without_devices(without_library, manual: bool) -> None:
    """A program for 64 GPUs, from a machine with none."""
    mesh = jax.sharding.AbstractMesh((8, 8), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    function = forward
    if manual:
        function = jax.shard_map(
            forward, mesh=mesh, in_specs=(HEADS_SPLIT,) * 3, out_specs=HEADS_SPLIT
        )
    sharding = NamedSharding(mesh, HEADS_SPLIT)
    shapes = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in operands(kv_heads=8)[:3]
    ]
    with jax.sharding.use_abstract_mesh(mesh):
        assert count(cuda_text(function, *shapes), Kernel.forward) == 1


@by_kind
def test_errors_come_when_a_program_is_lowered(kind) -> None:
    """Not out of XLA's partitioner."""
    mesh = mesh_of((2, 4), kind)
    arrays = place(mesh, operands(kv_heads=4)[:3], [HEADS_SPLIT] * 3)
    kernels = jax.jit(functools.partial(flash_attention, implementation="fa4"))
    with pytest.raises(NotImplementedError, match="platform cpu, expected cuda"):
        kernels.lower(*arrays)


@by_kind
def test_nan_is_found(kind) -> None:
    mesh = mesh_of((2, 4), kind)
    q, k, v, *_ = operands(kv_heads=4)
    arrays = place(mesh, [q.at[0, 0, 0, 0].set(jnp.nan), k, v], [HEADS_SPLIT] * 3)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        jax.jit(forward)(*arrays)


def test_pmap() -> None:
    arrays = [x[:, None] for x in operands()]
    results = jax.pmap(step)(*arrays)
    assert_tree_close([x[:, 0] for x in jax.device_get(results)], oracle(*operands()))
