# SPDX-License-Identifier: Apache-2.0
"""Context parallelism on 8 devices of a CPU, against float64 attention of the whole sequence.

Arrays are brought into a device's order by hand, with NumPy, except where the reordering functions
are what is tested. The long name for a device's share is avoided: `T` and `S` are whole lengths.
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
    context_parallel_attention,
    flash_attention,
    inverse_reorder_causal_load_balancing,
    reorder_causal_load_balancing,
)
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
                places = np.array(positions(self.order, self.devices, x.shape[axis]))
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
        self.compiled = jax.jit(self.run)

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
    return np.stack([np.repeat(i, np.diff(c, prepend=0, append=length)) for i, c in zip(ids, cuts)])


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
