# SPDX-License-Identifier: Apache-2.0
"""What tests of `fa4_jax.compat` share: operands, gradients, and what "the same numbers" means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from reference import arrays, as64, assert_close, failures, judge


def tokens(*shape: int, seed: int = 0) -> jax.Array:
    """Normal float32 numbers."""
    return arrays(np.random.default_rng(seed), shape)[0]


def cast(tree: Any, dtype: Any) -> Any:
    """Every floating leaf in `dtype`."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def with_gradients(call: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(out, gradients) of `call`, of a loss in which every element of out has its own weight."""

    def loss(operands):
        out = call(*operands)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    def both(*operands):
        (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(operands)
        return out, gradients

    return jax.jit(both)


def assert_same(
    run: Callable[[Any, Any], Callable],
    ours: Any,
    theirs: Any,
    operands: Any,
    baseline: Callable | None = None,
) -> None:
    """`run(attention, dtype)` is a function of `operands`, with ours the same as with theirs.

    Results and gradients in float32, as near to those with theirs in float64 as float32 can be; in
    bfloat16 results alone, by the error rule of `reference`. That rule's baseline for gradients, a
    flash-style backward, isn't any library's. `baseline` stands for a library that has no 16 bits.
    """
    rounded = cast(operands, jnp.bfloat16)
    operands = cast(rounded, jnp.float32)
    with jax.enable_x64(True):
        expected = with_gradients(run(theirs, jnp.float64))(*cast(operands, jnp.float64))
    result = with_gradients(run(ours, jnp.float32))(*cast(operands, jnp.float32))
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for got, wanted in zip(*map(jax.tree.leaves, (result, expected)), strict=True):
        assert got.dtype == jnp.float32
        assert_close(got, wanted)
    result = jax.jit(run(ours, jnp.bfloat16))(*rounded)
    compared = (baseline or jax.jit(run(theirs, jnp.bfloat16)))(*rounded)
    assert result.dtype == compared.dtype == jnp.bfloat16
    wanted = np.asarray(expected[0])[..., : result.shape[-1]]  # beside lse, if that is there
    verdicts = judge("out", result, wanted, compared)
    assert not failures(verdicts), failures(verdicts)


def distance(result: Any, other: Any) -> float:
    """The largest difference of two results."""
    return float(np.abs(np.subtract(*as64(result, other))).max())
