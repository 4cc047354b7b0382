# SPDX-License-Identifier: Apache-2.0
"""AttentionSpec: the meaning of one call, without its shapes, and the checks that build it."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, TypeGuard, cast

import numpy as np
from jax.core import Tracer

TOP_LEFT = "top_left"
BOTTOM_RIGHT = "bottom_right"

Window = tuple[int | None, int | None]
"""(left, right), None for unbounded"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What a call computes, independent of its shapes: the single static parameter of the
    primitives.

    Query i sees keys j with `i + offset - window_left <= j <= i + offset + window_right`, where
    offset is 0 (top_left) or S - T (bottom_right) and None means unbounded. A causal call is
    `window_right=0`.
    """

    softmax_scale: float
    """Multiplies q k^T. Finite and > 0: `_api` folds other signs into q."""
    window_left: int | None = None
    window_right: int | None = None
    alignment: str = TOP_LEFT
    softcap: float | None = None
    """`softcap * tanh(logits / softcap)`; None for none."""
    deterministic: bool = False
    """Gradients are the same bits in every run."""
    require_kernel: bool = False
    """The caller said `implementation="fa4"`: never fall back to the reference."""

    def band(self, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
        """(band_lower, band_upper): query i sees keys j with i + band_lower <= j <= i + band_upper.

        Both are clamped to [-seqlen_q, seqlen_k], which changes no visible key: at the ends a side
        is unbounded or nothing is visible.
        """
        offset = seqlen_k - seqlen_q if self.alignment == BOTTOM_RIGHT else 0
        lower = -seqlen_q if self.window_left is None else offset - self.window_left
        upper = seqlen_k if self.window_right is None else offset + self.window_right
        return _clamp(lower, -seqlen_q, seqlen_k), _clamp(upper, -seqlen_q, seqlen_k)


def _clamp(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


def message(argument: str, got: object, expected: str, hint: str = "") -> str:
    """The one form of our errors: `fa4_jax: <argument>: got X, expected Y; do Z`."""
    return f"fa4_jax: {argument}: got {got}, expected {expected}" + (f"; {hint}" if hint else "")


def normalise_window(
    window_size: Any, causal: bool, name: str = "window_size"
) -> tuple[int | None, int | None]:
    """(left, right) of a call: Python ints >= 0, or None for unbounded. `causal` makes right 0."""
    expected = "a pair (left, right) of static ints >= 0 or None for unbounded"
    if not isinstance(window_size, (tuple, list)):
        raise TypeError(message(name, _describe(window_size), expected))
    sides = cast(Sequence[Any], window_size)
    if len(sides) != 2:
        raise ValueError(message(name, f"{len(sides)} entries", expected))
    left, right = (_window_side(side, f"{name}[{i}]") for i, side in enumerate(sides))
    return left, 0 if causal else right


def _window_side(side: Any, name: str) -> int | None:
    if side is None:
        return None
    refuse_traced(side, name)
    try:
        if isinstance(side, (bool, np.bool_)):
            raise TypeError
        side = operator.index(side)
    except TypeError:
        raise TypeError(message(name, _describe(side), "an int or None")) from None
    if side < 0:
        raise ValueError(
            message(name, side, "an int >= 0 or None", "write None for FlashAttention's -1")
        )
    return side


def normalise_scale(scale: Any, head_dim: int, name: str = "softmax_scale") -> float:
    """The scale as a Python float, finite in float32; None is 1 / sqrt(head_dim)."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    return static_number(scale, name)


def normalise_softcap(softcap: Any) -> float | None:
    """The softcap as a Python float > 0, or None."""
    if softcap is None:
        return None
    softcap = static_number(softcap, "softcap")
    if softcap <= 0:
        raise ValueError(message("softcap", softcap, "a number > 0", "write None for no softcap"))
    return softcap


_NUMBERS: tuple[type[Any], ...] = (int, float, np.integer, np.floating)


def static_number(value: Any, name: str) -> float:
    """`value` as a Python float that is finite in float32, which is how kernels receive it."""
    refuse_traced(value, name)
    is_number = isinstance(value, _NUMBERS)
    is_scalar = is_numpy(value) and value.ndim == 0 and value.dtype.kind in "fiu"
    if isinstance(value, bool) or not (is_number or is_scalar):
        raise TypeError(
            message(name, _describe(value), "a Python or NumPy number", "convert with float()")
        )
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(value)):
            raise ValueError(message(name, value, "a number that is finite in float32"))
    return value


_BOOLS: tuple[type[Any], ...] = (bool, np.bool_)


def static_flag(value: Any, name: str) -> bool:
    """`value` as a Python bool; nothing else is taken for one."""
    refuse_traced(value, name)
    if not isinstance(value, _BOOLS):
        raise TypeError(message(name, _describe(value), "True or False"))
    return bool(value)


def one_of(value: Any, choices: tuple[Any, ...], name: str) -> Any:
    """`value`, which has to be one of `choices`."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(message(name, repr(value), f"one of {', '.join(map(repr, choices))}"))
    return value


def is_numpy(value: object) -> TypeGuard[np.ndarray]:
    """Whether it is a NumPy array."""
    return isinstance(value, np.ndarray)


def refuse_traced(value: Any, name: str) -> None:
    """Options are compiled into the program, so a traced value can't be one."""
    if isinstance(value, Tracer):
        raise NotImplementedError(
            message(
                name, "a traced value", "a static Python value", "mark it static or fold it into q"
            )
        )


def _describe(value: Any) -> str:
    text = repr(value)
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return f"{text} ({kind})" if len(text) <= 40 and "\n" not in text else kind
