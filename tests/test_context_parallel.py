# SPDX-License-Identifier: Apache-2.0
"""Context parallelism on 8 devices of a CPU, against float64 attention of the whole sequence.

Arrays are brought into an order by hand, with NumPy, and back, except where the functions that do
it are what is tested. T and S are lengths of whole sequences.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies
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
    xla_attention,
    xla_gradients,
)

from fa4_jax import (
    _context_parallel,
    context_parallel_attention,
    flash_attention,
    inverse_reorder_causal_load_balancing,
    reorder_causal_load_balancing,
)
from fa4_jax._intervals import Limits
from fa4_jax._spec import AttentionSpec
from fa4_jax._variants import Kernel, target_name

B, T, S, N, K, D, V = 2, 48, 80, 4, 2, 8, 5
SCALE = 1 / math.sqrt(D)
STRATEGIES = ("ring", "all_gather")
ORDERS = ("contiguous", "zigzag", "striped")

# Axes of an array: batch, positions of queries, positions of keys, anything else.
AXES = {
    "q": "bt..",
    "k": "bs..",
    "v": "bs..",
    "out": "bt..",
    "lse": "b.t",
    "sinks": ".",
    "q_segment_ids": "bt",
    "kv_segment_ids": "bs",
    "kv_start": "bt",
    "kv_end": "bt",
    "query_seq_lengths": "b",
    "key_value_seq_lengths": "b",
}


def positions(order: str, devices: int, length: int) -> list[int]:
    """Of a sequence, device after device: the definition, one position at a time."""
    chunk = length // (2 * devices)

    def holds(device: int, position: int) -> bool:
        match order:
            case "contiguous":
                return position // (2 * chunk) == device
            case "zigzag":
                return position // chunk in (device, 2 * devices - 1 - device)
            case _:
                return position % devices == device

    return [p for device in range(devices) for p in range(length) if holds(device, p)]


# What the CPU's code generator optimises takes longer than these programs run.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Layout:
    """A mesh, and how arrays lie on it: `devices` share each sequence, others share the batch."""

    def __init__(self, order: str, devices: int, batch_devices: int = 1, types: Any = None) -> None:
        types = (types or AxisType.Auto,) * 2
        self.order, self.devices = order, devices
        self.mesh = jax.make_mesh((batch_devices, devices), ("data", "context"), axis_types=types)

    def spec(self, name: str) -> P:
        return P(*({"b": "data", "t": "context", "s": "context"}.get(a) for a in AXES[name]))

    def reorder(self, name: str, x: Any, inverse: bool = False) -> np.ndarray:
        x = np.asarray(x)
        for axis, kind in enumerate(AXES[name]):
            if kind in "ts":
                places = np.array(positions(self.order, self.devices, x.shape[axis]), int)
                x = np.take(x, np.argsort(places) if inverse else places, axis)
        return x

    def put(self, given: dict[str, Any]) -> dict[str, np.ndarray]:
        return {name: self.reorder(name, x) for name, x in given.items()}

    def shard(self, function: Any, names: Any, results: Any, **options: Any) -> Any:
        in_specs = ({name: self.spec(name) for name in names},)
        out_specs = {name: self.spec(name) for name in results}
        options = {"mesh": self.mesh, "in_specs": in_specs, "out_specs": out_specs} | options
        return jax.shard_map(function, **options)


RESULTS = ("out", "lse")


def attend(given: dict[str, Any], **options: Any) -> dict[str, jax.Array]:
    """`context_parallel_attention` of arrays by name."""
    rest = {name: x for name, x in given.items() if name not in "qkv"}
    options = {"axis_name": "context", "return_lse": True} | options
    results = context_parallel_attention(given["q"], given["k"], given["v"], **rest, **options)
    return dict(zip(RESULTS, results, strict=True))


class Program:
    """Results and gradients of a call, by name and in the order of positions; compiled once."""

    def __init__(self, layout: Layout, **options: Any) -> None:
        self.layout, self.options = layout, options
        self.compiled = fast_jit(self.run)

    def run(self, given: dict, cotangents: dict) -> tuple[dict, dict]:
        call = functools.partial(attend, **self.options)
        attention = self.layout.shard(call, given, RESULTS)
        primals = {name: x for name, x in given.items() if name in (*"qkv", "sinks")}
        found, vjp = jax.vjp(lambda x: attention(given | x), primals)
        return found, *vjp(cotangents)

    def __call__(self, given: dict, dout: Any, dlse: Any) -> dict[str, np.ndarray]:
        put = self.layout.put
        found, gradients = self.compiled(put(given), put({"out": dout, "lse": dlse}))
        everything = found | {name: gradients[name] for name in given if name in gradients}
        return {n: self.layout.reorder(n, x, inverse=True) for n, x in everything.items()}


def runs(rng: np.random.Generator, length: int) -> np.ndarray:
    """[B, length]: ids in runs of random lengths, in another order in each row."""
    cuts = np.sort(rng.integers(0, length + 1, (B, 3)))
    ids = np.stack([rng.permutation([-1, 3, 8, 0]) for _ in range(B)])
    return np.stack(
        [np.repeat(i, np.diff(c, prepend=0, append=length)) for i, c in zip(ids, cuts, strict=True)]
    )


def segments(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"q_segment_ids": runs(rng, T), "kv_segment_ids": runs(rng, S)}


def bounds(rng: np.random.Generator) -> dict[str, np.ndarray]:
    start = rng.integers(-5, S + 5, (B, T))
    return {"kv_start": start, "kv_end": start + rng.integers(-2, 40, (B, T))}


def lengths(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"query_seq_lengths": np.array([T - 7, 3]), "key_value_seq_lengths": np.array([S, 50])}


bottom_right = {"causal_alignment": "bottom_right"}
MASKS: dict[str, tuple[dict, Any]] = {
    "full": ({}, None),
    "causal": ({"causal": True}, None),
    "window": ({"window_size": (13, 4)}, None),
    "causal window, bottom-right": ({"causal": True, "window_size": (20, 0), **bottom_right}, None),
    "segments": ({"causal": True}, segments),
    "bounds": ({"window_size": (40, None)}, bounds),
    "lengths, bottom-right": ({"causal": True, **bottom_right}, lengths),
}

# Every strategy in every order on 1 to 8 devices, every mask in both strategies.
CASES = [
    ("ring", "contiguous", 8, "causal", {}),
    ("ring", "contiguous", 4, "window", {"softcap": 2.0}),
    ("ring", "contiguous", 2, "lengths, bottom-right", {"sinks": True}),
    ("ring", "contiguous", 8, "causal window, bottom-right", {}),
    ("ring", "zigzag", 4, "causal", {"sinks": True, "softmax_scale": -0.5}),
    ("ring", "zigzag", 8, "segments", {"softcap": 2.0, "sinks": True}),
    ("ring", "zigzag", 2, "full", {"softmax_scale": 0.0}),
    ("ring", "zigzag", 1, "bounds", {"sinks": True}),
    ("ring", "striped", 2, "segments", {}),
    ("ring", "striped", 8, "full", {"sinks": True}),
    ("ring", "striped", 4, "bounds", {"softcap": 2.0}),
    ("all_gather", "contiguous", 4, "segments", {"sinks": True}),
    ("all_gather", "contiguous", 1, "causal", {}),
    ("all_gather", "contiguous", 2, "full", {"softcap": 2.0}),
    ("all_gather", "zigzag", 8, "causal", {"sinks": True}),
    ("all_gather", "zigzag", 2, "window", {"softmax_scale": -0.5}),
    ("all_gather", "striped", 4, "lengths, bottom-right", {}),
    ("all_gather", "striped", 8, "bounds", {"softcap": 2.0, "sinks": True}),
    ("all_gather", "striped", 2, "causal window, bottom-right", {}),
]


def operands(seed: int = 0, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, D), (B, S, K, D), (B, S, K, V)
    return dict(zip("qkv", arrays(rng, *shapes, dtype=dtype), strict=True))


@pytest.mark.parametrize(("strategy", "order", "devices", "mask", "more"), CASES, ids=str)
def test_values_and_gradients(strategy, order, devices, mask, more) -> None:
    rng = np.random.default_rng(CASES.index((strategy, order, devices, mask, more)))
    static, make = MASKS[mask]
    limits = make(rng) if make else {}
    options = {name: x for name, x in more.items() if name != "sinks"}
    given, (dout, dlse) = operands(), arrays(rng, (B, T, N, V), (B, N, T))
    sinks = arrays(rng, (N,))[0] if "sinks" in more else None
    layout = Layout(order, devices, batch_devices=2 if devices <= 4 else 1)
    arguments = {"strategy": strategy, "order": order, "implementation": "reference"}
    program = Program(layout, **arguments, **static, **options)
    found = program(given | limits | ({} if sinks is None else {"sinks": sinks}), dout, dlse)
    oracle = Oracle(
        visible(T, S, **static, **limits),
        options.get("softmax_scale", SCALE),
        softcap=options.get("softcap"),
        sinks=None if sinks is None else as64(sinks)[0],
    )
    wide, wide_cotangents = as64(*given.values()), as64(dout, dlse)
    expected = dict(zip(("out", "lse"), oracle.forward(*wide), strict=True))
    expected |= dict(zip("qkv", oracle.backward(*wide, *wide_cotangents), strict=False))
    if sinks is not None:
        expected["sinks"] = oracle.dsinks(*wide, *wide_cotangents)
    assert set(found) == set(expected)
    for name, x in found.items():
        assert_close(x, expected[name], name)


@pytest.fixture(scope="module", params=STRATEGIES)
def sixteen_bits(request: pytest.FixtureRequest) -> Program:
    """Causal attention by the primitives, with the most steps and so the most roundings."""
    return Program(Layout("zigzag", 8), strategy=request.param, order="zigzag", causal=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits_err_at_most_twice_as_much_as_xla(sixteen_bits: Program, family: str) -> None:
    rng = np.random.default_rng(FAMILIES.index(family))
    q, k, v = inputs(family, rng, ((B, 64, N, 16), (B, 64, K, 16), (B, 64, K, 16)), "bfloat16")
    (dout,), (dlse,) = arrays(rng, q.shape, dtype="bfloat16"), arrays(rng, (B, N, 64))
    found = sixteen_bits({"q": q, "k": k, "v": v}, dout, dlse)
    seen = visible(64, 64, causal=True)
    oracle, wide = Oracle(seen, 0.25), as64(q, k, v)
    expected = *oracle.forward(*wide), *oracle.backward(*wide, *as64(dout, dlse))[:3]
    residuals = jnp.asarray(found["out"]), jnp.asarray(found["lse"])
    baseline = (
        *jax.jit(xla_attention)(q, k, v, seen, 0.25),
        *jax.jit(xla_gradients)((q, k, v), residuals, (dout, dlse), seen, 0.25),
    )
    names = ("out", "lse", "q", "k", "v")
    judged = zip(names, map(found.get, names), expected, baseline, strict=True)
    assert not failures([verdict for case in judged for verdict in judge(*case)])


def executed(text: str) -> Counter:
    """How often each collective of an optimised HLO module runs, loops included."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    names = (
        "all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|reduce-scatter"
    )
    collectives = rf" ({names})(?:-start)?\("

    def count(name: str) -> Counter:
        total = Counter(re.findall(collectives, bodies[name]))
        for line in bodies[name].splitlines():
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for callee in re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.-]+)", line):
                inside = count(callee)
                assert trips or not inside or " while(" not in line, "collectives in a dynamic loop"
                total += Counter({k: n * int(trips[1] if trips else 1) for k, n in inside.items()})
        return total

    (entry,) = re.findall(r"^ENTRY %?([\w.-]+)", text, re.M)
    return count(entry)


def compiled_text(function: Any, layout: Layout, given: dict) -> str:
    return fast_jit(function).lower(layout.put(given)).compile().as_text()


def total(layout: Layout, **options: Any) -> Any:
    """A function of arrays by name: a sum in which no two elements count alike."""

    def uneven(given: dict) -> jax.Array:
        found = layout.shard(functools.partial(attend, **options), given, RESULTS)(given)
        return sum(
            (x.astype(jnp.float32) * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum()
            for x in found.values()
        )

    return uneven


# Shares of 6 queries and 10 keys: the last device's query 42 sees keys from 32 on, of device 3.
WINDOW = {"causal": True, "window_size": (10, 0)}


@pytest.mark.parametrize(
    ("order", "devices", "mask", "steps"),
    [("zigzag", 4, {"causal": True}, 4), ("contiguous", 8, WINDOW, 5), ("striped", 1, {}, 1)],
    ids=str,
)
def test_a_ring_transfers_no_more_than_it_must(order, devices, mask, steps) -> None:
    """k and v to every step but the first; their gradients likewise, and home."""
    layout, given = Layout(order, devices), operands()
    options = {"order": order, "implementation": "reference", **mask}
    sent, home = 2 * (steps - 1), 2 if steps > 1 else 0
    attention = layout.shard(functools.partial(attend, **options), given, RESULTS)
    forward = executed(compiled_text(attention, layout, given))
    assert forward == Counter({"collective-permute": sent})
    both = executed(compiled_text(jax.grad(total(layout, **options)), layout, given))
    del both["all-reduce"]  # Of `total`.
    assert both == Counter({"collective-permute": sent + 2 * sent + home})


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_a_ring_ends_when_no_window_reaches_further(alignment: str) -> None:
    """Against the whole mask."""
    rng, shortened = np.random.default_rng(6), 0
    for _ in range(200):
        devices, rows, columns = (int(rng.integers(1, high)) for high in (9, 5, 5))
        left, right = int(rng.integers(0, 9)), (0, 0, 2, None)[rng.integers(4)]
        band = {"window_left": left, "window_right": right, "alignment": alignment}
        spec = AttentionSpec(softmax_scale=1.0, **band)
        shares = [_context_parallel._Layout("contiguous", devices, x) for x in (rows, columns)]
        sizes = devices * rows, devices * columns
        seen = visible(*sizes, causal_alignment=alignment, window_size=(left, right))
        pairs = np.argwhere(seen.reshape(devices, rows, devices, columns).any((1, 3)))
        steps = 1 + max(((rank - source) % devices for rank, source in pairs), default=0)
        assert _context_parallel._num_steps(spec, Limits(), *shares) == steps
        # Ends of sequences that are traced may be anywhere.
        ends = Limits(query_seq_lengths=jnp.ones(1, int))
        expected = devices if alignment == "bottom_right" else steps
        assert _context_parallel._num_steps(spec, ends, *shares) == expected
        shortened += 1 < steps < devices
    assert shortened > 10


def scans(jaxpr: Any) -> list:
    """The bodies of all scans in it that transfer something."""
    found = []
    for equation in jaxpr.eqns:
        inner = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(list(equation.params.values()))]
        inner = [x for x in inner if hasattr(x, "eqns")]
        is_scan = equation.primitive.name == "scan"
        found += [x for x in inner if is_scan and "ppermute" in str(x)]
        found += [body for x in inner for body in scans(x)]
    return found


def test_no_transfer_of_a_step_waits_for_its_kernels() -> None:
    """What a loop's body transfers is what came into it, so that it overlaps with the attention."""
    layout = Layout("zigzag", 4)
    function = jax.grad(total(layout, order="zigzag", causal=True))
    jaxpr = jax.make_jaxpr(function)(operands(dtype=jnp.bfloat16)).jaxpr
    forward, backward = scans(jaxpr)
    for body, kernel, transfers in ((forward, "fa4_forward", 2), (backward, "fa4_backward", 4)):
        sent = [e.invars[0] for e in body.eqns if e.primitive.name == "ppermute"]
        assert len(sent) == transfers and set(sent) <= set(body.invars)
        assert str(body).count(kernel) == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_many_devices_are_added_in_float32(strategy: str) -> None:
    """dv is 256 + 7 times 1: in bfloat16, 256 + 1 is 256, and 263 is 264."""
    shape = (1, 64, 1, 8)
    given = {name: jnp.zeros(shape, jnp.bfloat16) for name in "qkv"}
    # Every query sees 64 keys alike, so dv is dout's sum over 64 queries, divided by 64.
    per_device = jnp.full(8, 8.0).at[2].set(8 * 256)
    dout = jnp.zeros(shape, jnp.bfloat16) + jnp.repeat(per_device, 8)[:, None, None]
    program = Program(Layout("contiguous", 8), strategy=strategy)
    found = program(given, dout.astype(jnp.bfloat16), jnp.zeros((1, 1, 64)))
    assert np.all(found["v"] == 264)


def test_all_gather_moves_each_share_once_a_pass() -> None:
    layout, given = Layout("zigzag", 4), operands()
    options = {"strategy": "all_gather", "order": "zigzag", "implementation": "reference"}
    attention = layout.shard(functools.partial(attend, **options), given, RESULTS)
    assert executed(compiled_text(attention, layout, given)) == {"all-gather": 2}
    found = executed(compiled_text(jax.grad(total(layout, **options)), layout, given))
    del found["all-reduce"]  # Of `total`.
    assert found == {"all-gather": 2, "all-to-all": 2}


def cuda_text(function: Any, *operands: Any) -> str:
    """StableHLO of `function` for CUDA; needs no GPU."""
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def kernel_calls(text: str) -> list[int]:
    return [text.count(f"custom_call @{target_name(kernel)}(") for kernel in Kernel]


POLICIES = {
    "context": (checkpoint_policies.save_only_these_names("context"), 1),
    "nothing": (checkpoint_policies.nothing_saveable, 2),
}


@pytest.fixture(scope="module")
def small() -> dict[str, jax.Array]:
    """Operands with a kernel's head dim and dtype."""
    shapes = (B, 16, N, 64), (B, 16, K, 64), (B, 16, K, 64)
    rng = np.random.default_rng(1)
    return dict(zip("qkv", arrays(rng, *shapes, dtype=jnp.bfloat16), strict=True))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_saving_context_runs_one_forward(without_library, small, strategy, policy) -> None:
    """A ring's calls are one in the loop and one behind it; backward, one before it too."""
    layout = Layout("zigzag", 4)
    attention = total(layout, strategy=strategy, order="zigzag", causal=True)
    save, forward_calls = POLICIES[policy]

    def block(given: dict) -> jax.Array:
        """Something before and after, as in a model: only attention is asked to be saved."""
        return jnp.sin(attention(jax.tree.map(jnp.sin, given)))

    text = cuda_text(jax.value_and_grad(jax.checkpoint(block, policy=save)), small)
    forward, backward = (2, 3) if strategy == "ring" else (1, 1)
    assert kernel_calls(text) == [forward_calls * forward, *[backward] * 3]
    assert text.count('kernel = "forward_bf16_d64_interval"') == forward_calls * forward


def test_checkpoint_changes_no_value(small) -> None:
    function = total(Layout("zigzag", 4), order="zigzag", causal=True)
    saved = jax.checkpoint(function, policy=POLICIES["context"][0])
    found, expected = (fast_jit(jax.grad(f))(small) for f in (saved, function))
    for name, x in expected.items():
        assert_close(found[name], x, name)


def projections(rng: np.random.Generator) -> dict[str, jax.Array]:
    width = N * D
    shapes = (width, N, D), (width, K, D), (width, K, D), (N, D, width)
    return dict(zip(("q", "k", "v", "out"), arrays(rng, *shapes), strict=True))


@pytest.mark.parametrize(
    ("strategy", "order", "check_vma"),
    [("ring", "zigzag", True), ("all_gather", "striped", False)],
    ids=str,
)
def test_training_is_the_one_device_run(strategy: str, order: str, check_vma: bool) -> None:
    """Losses of three steps of gradient descent: parameters on every device, a scan of two layers
    that share them, targets that are reordered as the tokens are."""
    rng = np.random.default_rng(4)
    x, y = arrays(rng, (B, T, N * D), (B, T, N * D))
    ids = runs(rng, T)
    layout = Layout(order, 4, batch_devices=2)
    reorder = functools.partial(reorder_causal_load_balancing, order=order, cp_size=4)

    def loss(attention: Any, weights: dict, x: Any, y: Any, ids: Any) -> jax.Array:
        """The sum over what is here."""

        def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            q, k, v = (jnp.einsum("btw,wnd->btnd", x, weights[name] / 6) for name in "qkv")
            out = attention(q, k, v, causal=True, q_segment_ids=ids, kv_segment_ids=ids)
            return x + jnp.einsum("btnd,ndw->btw", out, weights["out"] / 6), None

        return ((jax.lax.scan(layer, x, length=2)[0] - y) ** 2).sum()

    def share(*operands: Any) -> jax.Array:
        options = {"strategy": strategy, "order": order, "implementation": "reference"}
        attention = functools.partial(context_parallel_attention, axis_name="context", **options)
        return jax.lax.psum(loss(attention, *operands), ("data", "context"))

    token = P("data", "context")
    sharded = jax.shard_map(
        share, mesh=layout.mesh, in_specs=(P(), *[token] * 3), out_specs=P(), check_vma=check_vma
    )
    whole = functools.partial(loss, functools.partial(flash_attention, implementation="reference"))

    def losses(function: Any, *data: Any) -> np.ndarray:
        def step(weights: dict, _: None) -> tuple[dict, jax.Array]:
            value, grads = jax.value_and_grad(function)(weights, *data)
            return jax.tree.map(lambda w, g: w - 1e-3 * g, weights, grads), value

        weights = projections(np.random.default_rng(5))
        return fast_jit(lambda w: jax.lax.scan(step, w, length=3)[1])(weights)

    found, expected = losses(sharded, *map(reorder, (x, y, ids))), losses(whole, x, y, ids)
    assert expected[2] < 0.9 * expected[0]
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mesh_that_is_manual_in_part(small, strategy: str, types: Any) -> None:
    """The batch is XLA's to share out, or its sharding is part of the types."""
    layout = Layout("zigzag", 4, batch_devices=2, types=types)
    options = {"strategy": strategy, "order": "zigzag", "causal": True}
    whole = functools.partial(flash_attention, causal=True, return_lse=True)

    def uneven(results: Any) -> jax.Array:
        out, lse = results
        return (out.astype(jnp.float32) ** 2).sum() + jnp.sin(lse).sum()

    def share(given: dict) -> jax.Array:
        found = attend(given, **options)
        return jax.lax.psum(uneven([found[name] for name in RESULTS]), "context")

    with jax.set_mesh(layout.mesh):
        sharding = jax.NamedSharding(layout.mesh, P("data", "context"))
        given = jax.device_put(layout.put(small), sharding)
        specs = {name: P(None, "context") for name in given}
        sharded = jax.shard_map(share, in_specs=(specs,), out_specs=P(), axis_names={"context"})
        found = fast_jit(jax.grad(sharded))(given)
    expected = jax.grad(lambda x: uneven(whole(x["q"], x["k"], x["v"])))(small)
    for name, x in found.items():
        assert_close(layout.reorder(name, x, inverse=True), expected[name], name, tolerance=2e-2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_axis_that_is_two_of_the_mesh(strategy: str) -> None:
    axes = ("data", "context")
    layout, given = Layout("zigzag", 4), operands()
    mesh = jax.make_mesh((2, 2), axes, axis_types=(AxisType.Auto,) * 2)
    options = {"axis_name": axes, "strategy": strategy, "order": "zigzag", "causal": True}

    def share(given: dict) -> jax.Array:
        found = attend(given, implementation="reference", **options)
        return jax.lax.psum((found["out"] ** 2).sum(), axes)

    sharded = jax.shard_map(share, mesh=mesh, in_specs=P(None, axes), out_specs=P())
    found = fast_jit(jax.grad(sharded))(layout.put(given))
    oracle, wide = Oracle(visible(T, S, causal=True), SCALE), as64(*given.values())
    out, lse = oracle.forward(*wide)
    for name, x in zip("qkv", oracle.backward(*wide, 2 * out, 0 * lse), strict=False):
        assert_close(layout.reorder(name, found[name], inverse=True), x, name)


def test_pmap_and_vmap() -> None:
    """Devices by pmap, which has no batch here: vmap brings it, and folds it into the calls'."""
    given = {name: np.asarray(x) for name, x in operands().items()}
    shares = [np.stack(np.split(x, 4, 1)) for x in given.values()]  # [4, B, length, ...]
    call = functools.partial(
        context_parallel_attention,
        axis_name="context",
        causal=True,
        return_lse=True,
        implementation="reference",
    )
    mapped = jax.pmap(jax.vmap(call), axis_name="context")

    def loss(*shares: Any) -> Any:
        out, lse = mapped(*shares)
        return (out**2).sum() + lse.sum(), (out, lse)

    found, (out, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(*shares)
    oracle, wide = Oracle(visible(T, S, causal=True), SCALE), as64(*given.values())
    expected_out, expected_lse = oracle.forward(*wide)
    assert_close(np.concatenate(out, 1), expected_out, "out")
    assert_close(np.concatenate(lse, 2), expected_lse, "lse")
    expected = oracle.backward(*wide, 2 * expected_out, np.ones_like(expected_lse))
    for name, x, y in zip("qkv", found, expected, strict=False):
        assert_close(np.concatenate(x, 1), y, name)


def test_segments_that_are_no_runs_are_nan_and_nothing_else_is() -> None:
    """The second row's keys of id 1 lie apart, on different devices."""
    ids = np.repeat([[0, 1, 2, 3]] * B, 4, 1)
    ids[1, 12:] = 1
    rng = np.random.default_rng(7)
    given = dict(zip("qkv", arrays(rng, (B, 16, N, D), (B, 16, K, D), (B, 16, K, V)), strict=True))
    given |= {"q_segment_ids": ids, "kv_segment_ids": ids}
    layout = Layout("zigzag", 4)
    options = {"order": "zigzag", "implementation": "reference"}
    call = layout.shard(functools.partial(attend, **options), given, RESULTS)
    found = fast_jit(call)(layout.put(given))
    broken = np.isnan(layout.reorder("out", found["out"], inverse=True)).any((2, 3))
    assert np.array_equal(broken, (np.arange(B) == 1)[:, None] & (ids == 1))
    assert np.array_equal(
        np.isnan(layout.reorder("lse", found["lse"], inverse=True)),
        np.broadcast_to(broken[:, None], (B, N, 16)),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_that_sees_nothing_is_zero_whatever_its_cotangents_are(strategy: str) -> None:
    """Bottom-right causal with T > S."""
    rng = np.random.default_rng(9)
    shapes = (B, 32, N, D), (B, 16, K, D), (B, 16, K, V)
    given = dict(zip("qkv", arrays(rng, *shapes), strict=True))
    dout, dlse = arrays(rng, (B, 32, N, V), (B, N, 32))
    options = {"strategy": strategy, "causal": True, "causal_alignment": "bottom_right"}
    program = Program(Layout("contiguous", 4), implementation="reference", **options)
    found = program(given, dout, dlse.at[:, :, :16].set(jnp.nan))
    assert np.all(found["out"][:, :16] == 0) and np.all(found["lse"][:, :, :16] == -np.inf)
    assert np.all(found["q"][:, :16] == 0) and np.all(found["q"][:, 17:] != 0)
    assert all(np.all(np.isfinite(found[name])) for name in "qkv")


@pytest.mark.parametrize(("strategy", "devices"), [("ring", 2), ("all_gather", 2), ("ring", 1)])
@pytest.mark.parametrize("empty", ["b", "t", "s"])
def test_an_empty_dimension(strategy: str, devices: int, empty: str) -> None:
    sizes = {"b": 2, "t": 8, "s": 12, empty: 0}
    given = {
        name: jnp.ones((sizes["b"], sizes[length], heads, D), jnp.bfloat16)
        for name, length, heads in (("q", "t", N), ("k", "s", K), ("v", "s", K))
    }
    lse = jnp.full((sizes["b"], N, sizes["t"]), -jnp.inf, jnp.float32)
    # With sinks on one device only: jaxlib 0.11 crashes where it compiles, for CPUs, a sum of no
    # elements that is summed over a mesh.
    if devices == 1:
        given["sinks"] = jnp.arange(N, dtype=jnp.float32)
        lse = jnp.zeros_like(lse) + given["sinks"][:, None]
    program = Program(Layout("contiguous", devices), strategy=strategy, causal=True)
    found = program(given, jnp.ones_like(given["q"]), jnp.ones_like(lse))
    assert found["out"].shape == given["q"].shape and not found["out"].any()
    assert np.array_equal(found["lse"], lse)
    assert all(found[name].shape == given[name].shape and not found[name].any() for name in "qkv")
    assert devices > 1 or np.array_equal(found["sinks"], np.full(N, lse.size / N))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_forward_mode_and_second_derivatives_say_no(small, strategy: str) -> None:
    # Without jit, JAX 0.10 refuses forward mode through any shard_map of a custom_vjp, obscurely.
    function = jax.jit(total(Layout("contiguous", 2), strategy=strategy, causal=True))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(function, (small,), (small,))
    second = jax.grad(lambda x: jax.grad(function)(x)["q"].astype(jnp.float32).sum())
    with pytest.raises(NotImplementedError, match="fa4_backward|fa4_forward"):
        jax.eval_shape(second, small)


def test_an_axis_that_is_not_bound() -> None:
    q, k, v = operands().values()
    with pytest.raises(ValueError, match=r"fa4_jax: axis_name: got 'context', .* jax.shard_map"):
        context_parallel_attention(q, k, v, axis_name="context")
    for name in (None, 0, (), ["context"]):
        with pytest.raises(TypeError, match=r"fa4_jax: axis_name: got .*, expected an axis"):
            context_parallel_attention(q, k, v, axis_name=name)


@pytest.mark.parametrize(
    ("order", "lengths", "options", "message"),
    [
        ("zigzag", (6, 8), {}, "q: got length 3, expected an even length .* multiple of 4"),
        ("zigzag", (8, 6), {}, "k: got length 3, expected an even length .* multiple of 4"),
        ("zig-zag", (8, 8), {}, "order: got 'zig-zag', expected one of 'contiguous', 'zigzag'"),
        ("striped", (8, 8), {"strategy": "tree"}, "strategy: got 'tree', expected one of 'ring'"),
        ("striped", (8, 8), {"kv_start": np.zeros((B, 8), int)}, r"kv_start: .* shape \(2, 4\)"),
        ("striped", (8, 8), {"softcap": -1.0}, "softcap: got -1.0"),
    ],
)
def test_bad_input(order: str, lengths: tuple[int, int], options: dict, message: str) -> None:
    shapes = (B, lengths[0], N, D), (B, lengths[1], K, D), (B, lengths[1], K, V)
    given = {
        name: jax.ShapeDtypeStruct(x, jnp.bfloat16) for name, x in zip("qkv", shapes, strict=True)
    }
    call = Layout("contiguous", 2).shard(
        functools.partial(attend, order=order, **options), "qkv", RESULTS
    )
    with pytest.raises(ValueError, match="fa4_jax: " + message):
        jax.eval_shape(call, given)


@pytest.mark.parametrize(("xp", "devices"), [(np, 1), (np, 2), (np, 4), (jnp, 4)])
@pytest.mark.parametrize("order", ORDERS)
def test_reordering(order: str, xp: Any, devices: int) -> None:
    x = xp.arange(3 * 16 * 2).reshape(3, 16, 2)
    arguments = {"order": order, "cp_size": devices}
    for seq_dim, moved in ((1, x), (0, xp.moveaxis(x, 1, 0)), (-1, xp.moveaxis(x, 1, 2))):
        found = reorder_causal_load_balancing(moved, seq_dim=seq_dim, **arguments)
        assert isinstance(found, np.ndarray) == (xp is np)
        assert np.array_equal(found, np.take(moved, positions(order, devices, 16), seq_dim))
        back = inverse_reorder_causal_load_balancing(found, seq_dim=seq_dim, **arguments)
        assert np.array_equal(back, moved)


@pytest.mark.parametrize(
    "reorder", [reorder_causal_load_balancing, inverse_reorder_causal_load_balancing]
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": "zigzag", "cp_size": 4}, "x: got length 12 .* a multiple of 8 .* pad"),
        ({"order": "striped", "cp_size": 5}, "x: got length 12 .* a multiple of 5"),
        ({"order": "strip", "cp_size": 4}, "order: got 'strip'"),
        ({"order": "striped", "cp_size": 0}, "cp_size: got 0"),
        ({"order": "striped", "cp_size": 4, "seq_dim": 2}, "seq_dim: got 2"),
    ],
)
def test_bad_reordering(reorder: Any, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match="fa4_jax: " + message):
        reorder(np.zeros((2, 12)), **arguments)
    with pytest.raises(TypeError, match="fa4_jax: x: got list"):
        reorder([1, 2], **arguments)
