# SPDX-License-Identifier: Apache-2.0
"""A training step's attention, exported on a machine without a GPU and run on one with.

`python tests/export_roundtrip.py write PATH` exports forward and backward for CPU and CUDA, with a
symbolic batch. `python tests/export_roundtrip.py check PATH`, on any machine, runs the file and
compares with float64. `test_gpu.py` checks the file that the environment variable FA4_JAX_EXPORTED
names.
"""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from reference import Oracle, failures, judge, visible, xla_attention, xla_gradients

import fa4_jax

# Odd lengths, grouped heads, and a band that isn't a plain one.
SEQLEN_Q, SEQLEN_K, HEADS, KV_HEADS, HEAD_DIM = 113, 257, 4, 2, 64
MASK = {"causal": True, "causal_alignment": "bottom_right", "window_size": (70, None)}


def step(q, k, v, dout, dlse):
    """(out, lse), (dq, dk, dv)."""

    def attention(q, k, v):
        return fa4_jax.flash_attention(q, k, v, return_lse=True, **MASK)

    results, vjp = jax.vjp(attention, q, k, v)
    return results, vjp((dout, dlse))


def shapes(batch) -> list[jax.ShapeDtypeStruct]:
    q = (batch, SEQLEN_Q, HEADS, HEAD_DIM)
    k = (batch, SEQLEN_K, KV_HEADS, HEAD_DIM)
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (q, k, k, q)]
    return [*operands, jax.ShapeDtypeStruct((batch, HEADS, SEQLEN_Q), jnp.float32)]


def export(platforms: Sequence[str]) -> jax.export.Exported:
    """The step for `platforms`, with a symbolic batch."""
    (batch,) = jax.export.symbolic_shape("batch")
    checks = fa4_jax.export_disabled_checks()
    exporter = jax.export.export(jax.jit(step), platforms=platforms, disabled_checks=checks)
    return exporter(*shapes(batch))


def write(path: str) -> None:
    """Export for CPU and CUDA and write the serialised program."""
    pathlib.Path(path).write_bytes(export(("cpu", "cuda")).serialize())


def check(exported: jax.export.Exported) -> str:
    """Run it for two batch sizes; what is wrong with the values, or nothing."""
    if jax.default_backend() == "gpu":
        fa4_jax.register()
    names = ("out", "lse", "dq", "dk", "dv")
    seen, scale = visible(SEQLEN_Q, SEQLEN_K, **MASK), 1 / math.sqrt(HEAD_DIM)
    verdicts = []
    for batch in (1, 3):
        rng = np.random.default_rng(batch)
        operands = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in shapes(batch)]
        (out, lse), gradients = jax.jit(exported.call)(*operands)
        q, k, v, dout, dlse = operands
        oracle = Oracle(seen, scale)
        wide = [np.asarray(x, np.float64) for x in operands]
        expected = (*oracle.forward(*wide[:3]), *oracle.backward(*wide)[:3])
        baseline = (
            *xla_attention(q, k, v, seen, scale),
            *xla_gradients((q, k, v), (out, lse), (dout, dlse), seen, scale),
        )
        judged = zip(names, (out, lse, *gradients), expected, baseline, strict=True)
        verdicts += [verdict for case in judged for verdict in judge(*case)]
    return failures(verdicts)


def read(path: str) -> jax.export.Exported:
    return jax.export.deserialize(bytearray(pathlib.Path(path).read_bytes()))


if __name__ == "__main__":
    command, file = sys.argv[1:]
    if command == "write":
        write(file)
    else:
        sys.exit(check(read(file)) or None)
