# SPDX-License-Identifier: Apache-2.0
"""What the modules of this package share: how an argument is refused, and how one is ignored."""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fa4_jax import _reference
from fa4_jax._spec import message


class IgnoredArgumentWarning(UserWarning):
    """An argument that tunes another library's kernel has no meaning for ours; results don't
    depend on it. Given once per process for each argument."""


_noted: set[str] = set()


def note_ignored(argument: str, why: str) -> None:
    """Say once per process that `argument` ("function: name") has no effect, and why."""
    if argument in _noted:
        return
    _noted.add(argument)
    warnings.warn(
        f"fa4_jax: {argument} has no effect: {why}",
        IgnoredArgumentWarning,
        stacklevel=_reference.caller_level(),
    )


def refuse(argument: str, got: object, expected: str, hint: str) -> NoReturn:
    """Raise NotImplementedError for an argument that would change the result, were it honoured."""
    raise NotImplementedError(message(argument, got, expected, hint))


def promote(arrays: tuple[ArrayLike, ...], dtype: Any = None) -> tuple[jax.Array, ...]:
    """All in one floating dtype: `dtype`, or what JAX promotes theirs to, at least float32 for
    integers."""
    if dtype is None:
        dtype = jnp.result_type(*arrays)
        if not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(dtype, jnp.float32)
    return tuple(jnp.asarray(x, dtype) for x in arrays)
