# SPDX-License-Identifier: Apache-2.0
"""Manual-mesh types: inside `shard_map(check_vma=True)` a value's type says over which axes it
varies.

A primitive, a loop carry and a `custom_vjp` need operands that agree. jnp functions cast by
themselves; code that binds primitives or builds carries from constants has to.
"""

from __future__ import annotations

from typing import TypeVar

import jax

from fa4_jax._untyped import lax
from fa4_jax._untyped import tree as untyped_tree

Tree = TypeVar("Tree")


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes over which `x` varies; empty outside `shard_map` and with `check_vma=False`."""
    return jax.typeof(x).manual_axis_type.varying


def match_varying(tree: Tree, like: object = None) -> Tree:
    """`tree` with every array varying over the union of the axes of `tree` and of `like`.

    The cast moves no data. Its transpose is a sum over the added axes, so the gradient of an
    operand that is replicated comes out summed, as it must.
    """
    leaves: list[jax.Array] = untyped_tree.leaves((tree, like))
    union = frozenset[str]().union(*map(varying_axes, leaves))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(union - varying_axes(x), key=str))
        return lax.pcast(x, missing, to="varying") if missing else x

    return untyped_tree.map(cast, tree) if union else tree
