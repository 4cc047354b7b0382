# SPDX-License-Identifier: Apache-2.0
"""What of JAX has no types: its own stubs leave results unknown, and a strict type checker would
report them wherever they go. Here they are `Any`, or what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
from jax import Array
from jax.interpreters import mlir, xla

P = ParamSpec("P")
R = TypeVar("R")

jax_: Any = jax
lax: Any = jax.lax
tree: Any = jax.tree

_mlir: Any = mlir
_xla: Any = xla
apply_primitive: Callable[..., Any] = _xla.apply_primitive
lower_fun: Callable[..., Callable[..., Any]] = _mlir.lower_fun


def bind(primitive: Any, *operands: Array, **parameters: Any) -> Sequence[Array]:
    """`Primitive.bind` of one with several results."""
    return primitive.bind(*operands, **parameters)


def jit(
    *, static_argnums: int | tuple[int, ...] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`jax.jit` as a decorator that keeps a function's types."""

    def decorate(function: Callable[P, R]) -> Any:
        return jax_.jit(function, static_argnums=static_argnums)

    return decorate
