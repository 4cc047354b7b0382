# SPDX-License-Identifier: Apache-2.0
"""Rows with inputs and a verdict on their results: what the mutation study and the report run.

The oracle is `tests/reference.py`; the sizes are small, but have several query and key tiles, both
edges of a band, a partial tile at each end, and grouped heads.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from fa4_jax._variants import ROW_MULTIPLE, Feature, Kernel, Split, Variant, round_up

from .device import device
from .intervals import Intervals
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


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes and a window."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: int
    kv_heads: int
    window: tuple[int, int]
    head_sinks: tuple[float, ...] | None = None

    @property
    def sinks(self) -> np.ndarray | None:
        """[B, N]"""
        if self.head_sinks is None:
            return None
        return np.array([self.head_sinks] * self.batch, np.float32)

    @property
    def intervals(self) -> Intervals:
        """Of rows that have them: the same window."""
        shape = (self.batch, self.seqlen_q, self.seqlen_k)
        return Intervals.of(np.broadcast_to(self.seen, shape))

    @property
    def seen(self) -> np.ndarray:
        """Which keys each query sees."""
        return visible(self.seqlen_q, self.seqlen_k, window_size=self.window)

    @property
    def rows(self) -> int:
        """Query rows of the workspaces."""
        return round_up(self.seqlen_q, ROW_MULTIPLE)

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """For np.pad of [B, N, T]."""
        return ((0, 0), (0, 0), (0, self.rows - self.seqlen_q))


# The first has four key tiles, a right edge through two of them, and some queries that see the last
# 16 keys of the last tile. The second has a band that is narrower than a tile, and a whole query
# tile without keys. T is chosen so that the first row beyond it is in either half of a warp's rows.
PROBLEMS = (
    Problem(2, 200, 509, 2, 1, (60, 372), (1.5, -np.inf)),
    Problem(1, 290, 100, 1, 1, (10, 5)),
)

# Bands that begin and end in every place of a tile, and bands beside the diagonal.
MORE_PROBLEMS = (
    Problem(1, 300, 700, 4, 2, (7, 3)),
    Problem(1, 257, 257, 1, 1, (257, 0)),
    Problem(1, 391, 77, 1, 1, (391, -314)),
    Problem(1, 200, 333, 1, 1, (-50, 60)),
    Problem(1, 130, 640, 1, 1, (100, 500)),
)


def make_subject(name: str) -> Subject:
    """The row called `name`, on `PROBLEMS`, and then on `MORE_PROBLEMS`."""
    return dataclasses.replace(_subject(name, PROBLEMS), again=_subject(name, MORE_PROBLEMS))


def _subject(name: str, problems: Sequence[Problem]) -> Subject:
    variant = device().rows[name].variant
    maker = {
        Kernel.forward: _forward,
        Kernel.backward_preprocess: _backward_preprocess,
        Kernel.backward: _backward,
        Kernel.backward_postprocess: _backward_postprocess,
    }[variant.kernel]
    parts = [maker(variant, problem) for problem in problems]
    width = len(variant.signature.results)

    def run(schedule: str, check: bool) -> Sequence[np.ndarray]:
        return [result for part in parts for result in part.run(schedule, check)]

    def verdict(results: Sequence[np.ndarray]) -> str:
        verdicts = (
            part.judge(results[i * width : (i + 1) * width]) for i, part in enumerate(parts)
        )
        return "\n".join(filter(None, verdicts))

    exact = tuple(i * width + j for i, part in enumerate(parts) for j in part.exact)
    return Subject(name, run, verdict, exact)


def _tensors(variant: Variant, problem: Problem) -> tuple:
    rng = np.random.default_rng(20)
    dtype = jnp.dtype(variant.dtype.numpy_name)
    q_shape = (problem.batch, problem.seqlen_q, problem.heads, variant.head_dim)
    k_shape = (problem.batch, problem.seqlen_k, problem.kv_heads, variant.head_dim)
    v_shape, dout_shape = ((*shape[:3], variant.head_dim_v) for shape in (k_shape, q_shape))
    shapes = (q_shape, k_shape, v_shape, dout_shape)
    q, k, v, dout = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    dlse_shape = (problem.batch, problem.heads, problem.seqlen_q)
    return q, k, v, dout, rng.standard_normal(dlse_shape).astype(np.float32)


def _scale(variant: Variant) -> float:
    return float(np.float32(1 / math.sqrt(variant.head_dim)))


def _softcap(variant: Variant) -> float | None:
    return 2.0 if Feature.softcap in variant.features else None


def _oracle(variant: Variant, problem: Problem) -> Oracle:
    return Oracle(problem.seen, _scale(variant), softcap=_softcap(variant), sinks=problem.sinks)


def _scalars(variant: Variant, problem: Problem) -> dict[str, float]:
    left, right = problem.window
    limits = (-problem.seqlen_q, problem.seqlen_k)
    return {
        "softmax_scale": _scale(variant),
        "softcap": _softcap(variant) or 1.0,
        "band_lower": max(-left, limits[0]),
        "band_upper": min(right, limits[1]),
    }


def _as64(*arrays: object) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in arrays]


def _judged(names: Sequence[str], results: Sequence, expected: Sequence, baseline: Sequence) -> str:
    verdicts = []
    for name, *triple in zip(names, results, expected, baseline, strict=True):
        verdicts += judge(name, *triple)
    return failures(verdicts)


def _forward(variant: Variant, problem: Problem) -> Subject:
    q, k, v, _, _ = _tensors(variant, problem)
    scalars, sinks = _scalars(variant, problem), problem.sinks
    expected = _oracle(variant, problem).forward(*_as64(q, k, v))
    baseline = xla_attention(q, k, v, problem.seen, _scale(variant), sinks, _softcap(variant))
    no_sinks = np.zeros((0, problem.heads), np.float32)
    operands = (q, k, v, no_sinks if sinks is None else sinks)
    operands += problem.intervals.operands(variant)

    def run(schedule: str, check: bool) -> Sequence[np.ndarray]:
        return device().run(variant, operands, scalars, schedule=schedule, check=check)

    return Subject(
        variant.name, run, lambda got: _judged(("out", "lse"), got, expected, baseline), (0, 1)
    )


def _residuals(variant: Variant, problem: Problem) -> tuple:
    q, k, v, dout, dlse = _tensors(variant, problem)
    out, lse = _oracle(variant, problem).forward(*_as64(q, k, v))
    return jnp.asarray(out, q.dtype), dout, lse.astype(np.float32), dlse


def _workspaces(variant: Variant, problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    out, dout, lse, dlse = _residuals(variant, problem)
    dpsum = np.einsum("btnv,btnv->bnt", *_as64(out, dout)) - dlse
    lse_log2 = np.where(lse == -np.inf, np.inf, lse * np.log2(np.e))
    shape = (problem.batch, problem.heads, problem.rows, variant.static_dims["E"])
    return (
        np.pad(dpsum, problem.padding).astype(np.float32),
        np.pad(lse_log2, problem.padding, constant_values=np.inf).astype(np.float32),
        np.zeros(shape, np.float32),
    )


def _backward_preprocess(variant: Variant, problem: Problem) -> Subject:
    operands = _residuals(variant, problem)
    expected = _workspaces(variant, problem)

    def run(schedule: str, check: bool) -> Sequence[np.ndarray]:
        return device().run(variant, operands, {}, schedule=schedule, check=check)

    def verdict(got: Sequence[np.ndarray]) -> str:
        for name, x, y in zip(("dpsum", "lse_log2", "dq_accum"), got, expected, strict=True):
            if not np.allclose(x, y, 1e-5, 1e-5):
                return f"{name} is wrong"
        return ""

    return Subject(variant.name, run, verdict, (0, 1, 2))


def accumulator_places(variant: Variant) -> np.ndarray:
    """Where each column of dq lies in dq_accum."""
    column = np.arange(variant.head_dim)
    if variant.tiles.split is not Split.products:
        return column
    group, of_16 = column // 16, column % 16
    half, pair, odd = of_16 // 8, of_16 % 8 // 2, of_16 % 2
    return 16 * group + 4 * pair + 2 * half + odd


def _backward(variant: Variant, problem: Problem) -> Subject:
    q, k, v, dout, dlse = _tensors(variant, problem)
    out, _, lse, _ = _residuals(variant, problem)
    dpsum, lse_log2, dq_accum = _workspaces(variant, problem)
    scalars, scale = _scalars(variant, problem), _scale(variant)
    expected = _oracle(variant, problem).backward(*_as64(q, k, v, dout, dlse))[:3]
    masked = problem.seen, scale, _softcap(variant)
    baseline = xla_gradients((q, k, v), (out, lse), (dout, dlse), *masked)
    operands = (q, k, v, dout, lse_log2, dpsum, dq_accum)
    operands += problem.intervals.operands(variant)

    def run(schedule: str, check: bool) -> Sequence[np.ndarray]:
        return device().run(variant, operands, scalars, schedule=schedule, check=check)

    def verdict(got: Sequence[np.ndarray]) -> str:
        dk, dv, accum = got
        seqlen = problem.seqlen_q
        if (accum[:, :, seqlen:] != 0).any():
            return "dq_accum's padding rows are not 0"
        dq = accum[:, :, :seqlen, accumulator_places(variant)].transpose(0, 2, 1, 3)
        dq = dq * np.float32(scale)
        return _judged(("dq", "dk", "dv"), (dq.astype(q.dtype), dk, dv), expected, baseline)

    return Subject(variant.name, run, verdict, (0, 1))


def _backward_postprocess(variant: Variant, problem: Problem) -> Subject:
    rng = np.random.default_rng(21)
    shape = (problem.batch, problem.heads, problem.rows, variant.static_dims["E"])
    dq_accum = rng.standard_normal(shape).astype(np.float32)
    kept = dq_accum[:, :, : problem.seqlen_q, accumulator_places(variant)].transpose(0, 2, 1, 3)
    expected = (kept * np.float32(0.3)).astype(jnp.dtype(variant.dtype.numpy_name))

    def run(schedule: str, check: bool) -> Sequence[np.ndarray]:
        scalars, free = {"softmax_scale": 0.3}, {"T": problem.seqlen_q}
        return device().run(
            variant, (dq_accum,), scalars, schedule=schedule, check=check, free=free
        )

    def verdict(got: Sequence[np.ndarray]) -> str:
        return "" if got[0].tobytes() == expected.tobytes() else "dq is wrong"

    return Subject(variant.name, run, verdict, (0,))
