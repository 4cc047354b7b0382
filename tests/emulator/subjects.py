# SPDX-License-Identifier: Apache-2.0
"""Rows with inputs and a verdict on their results: what the mutation study and the report run.

The oracle is `tests/reference.py`; the sizes are small, but have several query and key tiles, both
edges of a band, a partial tile at each end, and grouped heads.
"""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from fa4_jax._variants import Kernel, Variant, round_up

from .device import device
from .mutation import Subject

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from reference import (  # noqa: E402
    Oracle,
    failures,
    judge,
    visible,
    xla_attention,
    xla_gradients,
)

# The last chunk of 16 keys of the last tile is partly there, and seen by some queries.
BATCH, SEQLEN_Q, SEQLEN_K, HEADS, KV_HEADS = 1, 200, 509, 2, 1
WINDOW = (60, 330)


def make_subject(name: str) -> Subject:
    """The row called `name`."""
    variant = device().rows[name].variant
    makers: dict[Kernel, Callable[[Variant], Subject]] = {
        Kernel.forward: _forward,
        Kernel.backward_preprocess: _backward_preprocess,
        Kernel.backward: _backward,
        Kernel.backward_postprocess: _backward_postprocess,
    }
    return makers[variant.kernel](variant)


def _tensors(variant: Variant) -> tuple:
    rng = np.random.default_rng(20)
    dtype = jnp.dtype(variant.dtype.numpy_name)
    q_shape = (BATCH, SEQLEN_Q, HEADS, variant.head_dim)
    k_shape = (BATCH, SEQLEN_K, KV_HEADS, variant.head_dim)
    q, k, v, dout = (
        jnp.asarray(rng.standard_normal(s), dtype) for s in (q_shape, k_shape, k_shape, q_shape)
    )
    dlse = rng.standard_normal((BATCH, HEADS, SEQLEN_Q)).astype(np.float32)
    return q, k, v, dout, dlse


def _scale(variant: Variant) -> float:
    return float(np.float32(1 / math.sqrt(variant.head_dim)))


def _scalars(variant: Variant) -> dict[str, float]:
    left, right = WINDOW
    return {"softmax_scale": _scale(variant), "band_lower": -left, "band_upper": right}


def _as64(*arrays: object) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in arrays]


def _seen() -> np.ndarray:
    return visible(SEQLEN_Q, SEQLEN_K, window_size=WINDOW)


def _judged(names: Sequence[str], results: Sequence, expected: Sequence, baseline: Sequence) -> str:
    verdicts = []
    for name, *triple in zip(names, results, expected, baseline, strict=True):
        verdicts += judge(name, *triple)
    return failures(verdicts)


def _forward(variant: Variant) -> Subject:
    q, k, v, _, _ = _tensors(variant)
    scale = _scale(variant)
    expected = Oracle(_seen(), scale).forward(*_as64(q, k, v))
    baseline = xla_attention(q, k, v, _seen(), scale)

    def run(schedule: str, check: bool) -> Sequence[np.ndarray]:
        return device().run(variant, (q, k, v), _scalars(variant), schedule=schedule, check=check)

    return Subject(
        variant.name, run, lambda got: _judged(("out", "lse"), got, expected, baseline), (0, 1)
    )


def _residuals(variant: Variant) -> tuple:
    q, k, v, dout, dlse = _tensors(variant)
    out, lse = Oracle(_seen(), _scale(variant)).forward(*_as64(q, k, v))
    return jnp.asarray(out, q.dtype), lse.astype(np.float32), dout, dlse


def _padding() -> tuple[tuple[int, int], ...]:
    return ((0, 0), (0, 0), (0, round_up(SEQLEN_Q, 128) - SEQLEN_Q))


def _workspaces(variant: Variant) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    out, lse, dout, dlse = _residuals(variant)
    dpsum = np.einsum("btnv,btnv->bnt", *_as64(out, dout)) - dlse
    lse_log2 = np.pad(lse * np.log2(np.e), _padding(), constant_values=np.inf)
    shape = (BATCH, HEADS, round_up(SEQLEN_Q, 128), variant.static_dims["E"])
    return (
        np.pad(dpsum, _padding()).astype(np.float32),
        lse_log2.astype(np.float32),
        np.zeros(shape, np.float32),
    )


def _backward_preprocess(variant: Variant) -> Subject:
    operands = _residuals(variant)
    dpsum, lse_log2, dq_accum = _workspaces(variant)

    def run(schedule: str, check: bool) -> Sequence[np.ndarray]:
        return device().run(variant, operands, {}, schedule=schedule, check=check)

    def verdict(got: Sequence[np.ndarray]) -> str:
        names = ("dpsum", "lse_log2", "dq_accum")
        for name, x, y in zip(names, got, (dpsum, lse_log2, dq_accum), strict=True):
            if not np.allclose(x, y, 1e-5, 1e-5):
                return f"{name} is wrong"
        return ""

    return Subject(variant.name, run, verdict, (0, 1, 2))


def _backward(variant: Variant) -> Subject:
    q, k, v, dout, dlse = _tensors(variant)
    out, lse, _, _ = _residuals(variant)
    dpsum, lse_log2, dq_accum = _workspaces(variant)
    scale = _scale(variant)
    expected = Oracle(_seen(), scale).backward(*_as64(q, k, v, dout, dlse))[:3]
    baseline = xla_gradients((q, k, v), (out, lse), (dout, dlse), _seen(), scale)

    def run(schedule: str, check: bool) -> Sequence[np.ndarray]:
        operands = (q, k, v, dout, lse_log2, dpsum, dq_accum)
        return device().run(variant, operands, _scalars(variant), schedule=schedule, check=check)

    def verdict(got: Sequence[np.ndarray]) -> str:
        dk, dv, accum = got
        if (accum[:, :, SEQLEN_Q:] != 0).any():
            return "dq_accum's padding rows are not 0"
        dq = accum[:, :, :SEQLEN_Q, : variant.head_dim].transpose(0, 2, 1, 3) * np.float32(scale)
        return _judged(("dq", "dk", "dv"), (dq.astype(q.dtype), dk, dv), expected, baseline)

    return Subject(variant.name, run, verdict, (0, 1))


def _backward_postprocess(variant: Variant) -> Subject:
    rng = np.random.default_rng(21)
    shape = (BATCH, HEADS, round_up(SEQLEN_Q, 128), variant.static_dims["E"])
    dq_accum = rng.standard_normal(shape).astype(np.float32)
    kept = dq_accum[:, :, :SEQLEN_Q, : variant.head_dim].transpose(0, 2, 1, 3) * np.float32(0.3)
    expected = kept.astype(jnp.dtype(variant.dtype.numpy_name))

    def run(schedule: str, check: bool) -> Sequence[np.ndarray]:
        return device().run(
            variant,
            (dq_accum,),
            {"softmax_scale": 0.3},
            schedule=schedule,
            check=check,
            free={"T": SEQLEN_Q},
        )

    def verdict(got: Sequence[np.ndarray]) -> str:
        return "" if got[0].tobytes() == expected.tobytes() else "dq is wrong"

    return Subject(variant.name, run, verdict, (0,))
