# SPDX-License-Identifier: Apache-2.0
"""Small cases of attention, forward and backward, against float64: what `doctor` runs.

The rule is the tests': a result errs at most twice as much as the same computation with XLA's
roundings, in the largest element and in the root mean square. Nothing but `run` calls the package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax import Array

from fa4_jax._untyped import jax_, jit

B, T, S, N, K = 2, 131, 150, 4, 2
"""Batch, odd lengths, query and key/value heads."""

# An exp2-based lse is rounded twice more than an exp-based one, and a GPU's exp2 is good to 2 units
# in the last place.
_ULPS = {"lse": 4}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of `flash_attention` and, said once more, which keys a query sees."""

    name: str
    options: Mapping[str, Any]
    seen: np.ndarray
    """bool, broadcastable to [B, 1, T, S]"""
    softcap: float | None = None
    sinks: np.ndarray | None = None
    """[N]"""


def cases() -> tuple[Case, ...]:
    """One for the kernels of static masks; one for those of intervals, with all that these do."""
    i, j = np.arange(T)[:, None], np.arange(S)
    query_lengths, key_lengths = np.array([T, 100]), np.array([97, S])
    lengths = (i < query_lengths[:, None, None]) & (j < key_lengths[:, None, None])
    sinks = np.array([0.5, -np.inf, -1.0, 2.0], np.float32)
    everything = {
        "window_size": (70, 20),
        "query_seq_lengths": query_lengths,
        "key_value_seq_lengths": key_lengths,
        "softcap": 10.0,
        "sinks": sinks,
        "deterministic": True,
    }
    in_window = (j >= i - 70) & (j <= i + 20)
    return (
        Case("causal", {"causal": True, "causal_alignment": "bottom_right"}, j <= i + S - T),
        Case("everything", everything, (lengths & in_window)[:, None], 10.0, sinks),
    )


@dataclasses.dataclass(frozen=True)
class Result:
    """The error of one result in one norm, beside what the rule allows."""

    case: str
    name: str
    error: float
    allowed: float

    @property
    def ratio(self) -> float:
        """Right if <= 1; NaN is wrong."""
        return self.error / self.allowed


def run(case: Case, dtype: str, head_dims: tuple[int, int], implementation: str) -> list[Result]:
    """Run a case and judge out, lse, dq, dk and dv."""
    from fa4_jax import flash_attention

    random, (d, v_dim) = np.random.default_rng(0), head_dims
    shapes = (B, T, N, d), (B, S, K, d), (B, S, K, v_dim), (B, T, N, v_dim)
    q, k, v, dout = (jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)
    dlse = jnp.asarray(random.standard_normal((B, N, T)), jnp.float32)

    @jit()
    def forward_backward(
        qkv: tuple[Array, Array, Array], cotangents: tuple[Array, Array]
    ) -> tuple[Array, ...]:
        def attend(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            options = dict(case.options)
            return flash_attention(
                q, k, v, return_lse=True, implementation=implementation, **options
            )

        results, vjp = jax_.vjp(attend, *qkv)
        return *results, *vjp(cotangents)

    names = "out", "lse", "dq", "dk", "dv"
    results = dict(zip(names, forward_backward((q, k, v), (dout, dlse)), strict=True))
    # By the device: tensor cores cut sums off, which is what errs most in an lse.
    products = jnp.einsum(
        "btkgd,bskd->bkgts", q.reshape(B, T, K, -1, d), k, preferred_element_type=jnp.float32
    )
    exact, rounded = (_Attention.of(case, x, (q, k, v, dout, dlse)) for x in (None, q.dtype))
    expected = exact.forward(None)
    baseline = rounded.forward(np.asarray(products).reshape(B, N, T, S))
    # Judged on their own, out and lse are given to the gradients.
    given = (np.asarray(results[name], np.float32) for name in ("out", "lse"))
    expected |= exact.backward(None, expected["out"], expected["lse"])
    baseline |= rounded.backward(np.asarray(products).reshape(B, N, T, S), *given)
    judged = (_judge(name, results[name], expected[name], baseline[name]) for name in names)
    return [
        Result(case.name, f"{name} {norm}", *errors)
        for name, norms in zip(names, judged, strict=True)
        for norm, errors in norms
    ]


@dataclasses.dataclass(frozen=True)
class _Attention:
    """A case in NumPy: in float64, or in float32 with what XLA rounds to 16 bits rounded."""

    case: Case
    rounded: np.dtype | None
    operands: tuple[np.ndarray, ...]
    """q, k, v, dout [B, heads, length, head_dim] with a key/value head for each query head; dlse"""

    @classmethod
    def of(cls, case: Case, rounded: np.dtype | None, operands: tuple[Any, ...]) -> _Attention:
        wide = np.float64 if rounded is None else np.float32
        *heads, dlse = (np.asarray(x, wide) for x in operands)
        swapped = (np.repeat(x.swapaxes(1, 2), N // x.shape[2], 1) for x in heads)
        return cls(case, rounded, (*swapped, dlse))

    def forward(self, products: np.ndarray | None) -> dict[str, np.ndarray]:
        """out [B, T, N, V] and lse; `products` of q and k, or None to compute them."""
        v = self.operands[2]
        x, _ = self._logits(products)
        sinks = np.full(N, -np.inf, x.dtype) if self.case.sinks is None else self.case.sinks
        highest = np.maximum(x.max(-1), sinks[:, None].astype(x.dtype))
        shift = np.where(highest == -np.inf, 0, highest)
        weights = np.exp(x - shift[..., None])
        total = weights.sum(-1) + np.exp(sinks[:, None].astype(x.dtype) - shift)
        with np.errstate(divide="ignore"):
            lse = shift + np.log(total)
        p = weights / np.where(total == 0, 1, total)[..., None]
        return {"out": self._round(self._round(p) @ v).swapaxes(1, 2), "lse": lse}

    def backward(
        self, products: np.ndarray | None, out: np.ndarray, lse: np.ndarray
    ) -> dict[str, np.ndarray]:
        """dq, dk and dv, from out and lse."""
        q, k, v, dout, dlse = self.operands
        scale = q.dtype.type(q.shape[-1] ** -0.5)
        x, dcap = self._logits(products)
        p = np.exp(x - np.where(lse == -np.inf, 0, lse)[..., None])
        dpsum = (out.swapaxes(1, 2) * dout).sum(-1) - dlse
        ds = self._round(p * (dout @ v.swapaxes(2, 3) - dpsum[..., None]) * dcap)
        gradients = {
            "dq": scale * (ds @ k),
            "dk": _sum_groups(scale * (ds.swapaxes(2, 3) @ q)),
            "dv": _sum_groups(self._round(p).swapaxes(2, 3) @ dout),
        }
        return {name: self._round(x).swapaxes(1, 2) for name, x in gradients.items()}

    def _logits(self, products: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Capped logits, -inf where a query doesn't see a key, and the cap's derivative."""
        q, k, *_ = self.operands
        x = (q @ k.swapaxes(2, 3) if products is None else products) * q.dtype.type(
            q.shape[-1] ** -0.5
        )
        dcap = np.ones_like(x)
        if self.case.softcap is not None:
            capped = np.tanh(x / self.case.softcap)
            x, dcap = self.case.softcap * capped, 1 - capped**2
        return np.where(self.case.seen, x, -np.inf).astype(x.dtype), dcap

    def _round(self, x: np.ndarray) -> np.ndarray:
        return x if self.rounded is None else x.astype(self.rounded).astype(x.dtype)


def _sum_groups(x: np.ndarray) -> np.ndarray:
    """[B, N, S, D] to [B, K, S, D]."""
    return x.reshape(B, K, N // K, *x.shape[2:]).sum(2)


def _judge(
    name: str, result: Any, expected: np.ndarray, baseline: np.ndarray
) -> Iterator[tuple[str, tuple[float, float]]]:
    """(norm, (error, allowed)) in both norms."""
    unit = float(cast(Any, jnp.finfo(result.dtype).eps)) * _ULPS.get(name, 1)
    wide = np.asarray(result, np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(wide[~finite], expected[~finite]):
        yield "infinities", (np.inf, 1.0)
    wide, expected, baseline = wide[finite], expected[finite], baseline[finite].astype(np.float64)
    # Rounding to nearest errs by 0.29 units in the last place in the root mean square, and a lucky
    # baseline isn't held against a result.
    for norm, measure, share in (("max", _largest, 1.0), ("rms", _root_mean_square, 0.3)):
        allowed = 2 * measure(baseline - expected) + share * unit * measure(expected)
        yield norm, (measure(wide - expected), allowed)


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max(initial=0))


def _root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt((x**2).mean()))
