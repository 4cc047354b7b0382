# SPDX-License-Identifier: Apache-2.0
"""The report's lower bounds beside measured times.

    python -m tests.emulator.measured predict PATH    anywhere: emulate, keep the bounds
    python -m tests.emulator.measured measure PATH    on a GPU: time each launch, print the table

A time is the median of rounds of back-to-back launches. A launch of one head finds its inputs in
the L2 cache.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fa4_jax._variants import QKV, VARIANTS, Variant

ROUNDS, ROUND_SECONDS = 9, 0.03

LONG = "B=1,T=4096,S=4096,N=1,K=1"
MANY = "B=4,T=4096,S=4096,N=16,K=16"
CASES = (
    ("fa4_forward_sm90a_bf16_d128", LONG, False),
    ("fa4_forward_sm90a_bf16_d128", MANY, False),
    ("fa4_forward_sm90a_bf16_d128", MANY, True),
    ("fa4_forward_sm90a_bf16_d64", "B=4,T=4096,S=4096,N=32,K=32", False),
    ("fa4_forward_sm90a_bf16_d64", "B=4,T=4096,S=4096,N=32,K=32", True),
    ("fa4_forward_sm90a_bf16_d256", "B=4,T=4096,S=4096,N=8,K=8", False),
    ("fa4_forward_sm90a_bf16_d256", "B=4,T=4096,S=4096,N=8,K=8", True),
    ("fa4_backward_sm90a_bf16_d128", "B=8,T=2048,S=2048,N=16,K=16", False),
    ("fa4_backward_sm90a_bf16_d64", "B=8,T=2048,S=2048,N=32,K=32", True),
    ("fa4_backward_preprocess_sm90a_bf16_d128", MANY, False),
    ("fa4_backward_postprocess_sm90a_bf16_d128", MANY, False),
)


def predict(path: str) -> None:
    """Emulate one part of every case and save its bound."""
    from . import chips, counts
    from .device import device
    from .report import Shape, emulate, memory_bytes

    bounds = []
    for name, text, causal in CASES:
        variant, shape = device().rows[name].variant, Shape.parse(text, causal)
        record, chip = emulate(variant, shape), chips.CHIPS[device().rows[name].variant.arch]
        bound = counts.bound(record.ctas, shape.copies, memory_bytes(variant, shape), chip)
        bounds.append([bound.resource, bound.seconds, bound.boost_seconds])
        print(name, text, bound, flush=True)
    pathlib.Path(path).write_text(json.dumps(bounds))


def launch_of(variant: Variant, text: str, causal: bool) -> Callable[[], object]:
    """A function that enqueues the launch on random operands."""
    from fa4_jax import _primitives
    from fa4_jax._spec import AttentionSpec

    sizes = {key: int(value) for key, _, value in (x.partition("=") for x in text.split(","))}
    # Every T here is a multiple of 128; there are no sinks.
    sizes |= {"R": sizes["T"], "Z": 0, **variant.static_dims}
    rng = np.random.default_rng(0)

    def random(buffer) -> jax.Array:
        shape = [sizes[letter] for letter in buffer.dims]
        dtype = (buffer.dtype or variant.dtype).numpy_name
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    operands = [random(buffer) for buffer in variant.signature.operands]
    if variant.signature.aliases:  # The log-sum-exp and the accumulator, as a forward leaves them.
        operands[4] += 12
    by_name = dict(zip((b.name for b in variant.signature.operands), operands, strict=True))
    like = [by_name[b.name] if b.name in by_name else random(b) for b in QKV]
    problem = _primitives._Problem.of(*map(jax.typeof, like))
    spec = AttentionSpec(softmax_scale=0.05, window_right=0 if causal else None)
    in_place = tuple(variant.signature.aliases)
    step = jax.jit(lambda *x: problem.launch(variant.kernel, spec, *x), donate_argnums=in_place)

    def launch() -> object:
        results = step(*operands)
        for operand, result in variant.signature.aliases.items():
            operands[operand] = results[result]  # donated: the next launch adds to it
        return results

    return launch


def seconds(launch: Callable[[], object]) -> float:
    """Median time of a launch."""
    jax.block_until_ready(launch())
    start = time.perf_counter()
    jax.block_until_ready(launch())
    calls = max(3, int(ROUND_SECONDS / (time.perf_counter() - start)))
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        result = None
        for _ in range(calls):
            result = launch()
        jax.block_until_ready(result)
        rounds.append((time.perf_counter() - start) / calls)
    return statistics.median(rounds)


def measure(path: str) -> None:
    """Time every case and print it beside its bound."""
    from fa4_jax import register

    register()
    rows = {variant.name: variant for variant in VARIANTS}
    bounds = json.loads(pathlib.Path(path).read_text())
    print(
        "| kernel | shape | bound by | bound, us (1.755 GHz / 1.98 GHz) | measured, us | reached |"
    )
    print("|---|---|---|---|---|---|")
    for (name, text, causal), (resource, low, boost) in zip(CASES, bounds, strict=True):
        found = seconds(launch_of(rows[name], text, causal))
        mask = " causal" if causal else ""
        print(
            f"| {name} | {text}{mask} | {resource} | {low * 1e6:.1f} / {boost * 1e6:.1f} "
            f"| {found * 1e6:.1f} | {low / found:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    command, file = sys.argv[1:]
    {"predict": predict, "measure": measure}[command](file)
