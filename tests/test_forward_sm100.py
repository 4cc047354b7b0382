# SPDX-License-Identifier: Apache-2.0
"""What Blackwell's forward has of its own, emulated: exponentials by a polynomial, and rescaling
where a maximum has grown enough. `pytest -rP` prints the figures."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from emulator.device import device
from reference import Oracle, failures, inputs, judge, tensor_core_lse, visible, xla_attention

from fa4_jax._variants import VARIANTS, Arch, Kernel, Variant

ROWS = [
    v
    for v in VARIANTS
    if (v.kernel, v.arch) == (Kernel.forward, Arch.sm100a)
    and not v.features
    and v.dtype.numpy_name == "bfloat16"
]
BAND = {"softcap": 1.0}
NO_SINKS = np.zeros((0, 1), np.float32)
LOG2_E = math.log2(math.e)
BF16_ROUNDING = 2.0**-9  # largest relative error


def exponentials(emulated, row: Variant, column: int, exponents: np.ndarray) -> np.ndarray:
    """exp2 of exponents <= 0, one a query, as the row computes them in a column: from lse, which is
    log(1 + exp2) where a query's scores are 0, the exponent, and far below all else."""
    (number,) = exponents.shape
    q = np.zeros((1, number, 1, row.head_dim), jnp.bfloat16)
    k = np.zeros((1, row.tiles.tile_n, 1, row.head_dim), jnp.bfloat16)
    v = np.zeros((1, row.tiles.tile_n, 1, row.head_dim_v), jnp.bfloat16)
    q[0, :, 0, 0], q[0, :, 0, 1] = exponents, 1
    k[0, :, 0, 1] = -200
    k[0, -1, 0, 1] = 0
    k[0, column, 0, 0], k[0, column, 0, 1] = 1, 0
    # The scale makes scores of exponents.
    scalars = {**BAND, "softmax_scale": 1 / LOG2_E, "band_lower": -number}
    scalars["band_upper"] = row.tiles.tile_n
    _, lse = emulated(row.name)((q, k, v, NO_SINKS), scalars)[:2]
    return np.expm1(np.float64(lse[0, 0]))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.removeprefix("fa4_"))
def test_exponentials_by_a_polynomial(emulated, row: Variant) -> None:
    """Against exp2 in float64, and against how a probability is rounded to bfloat16."""
    pairs = row.tiles.tile_n // 2
    chosen = [pair for pair in range(pairs) if row.tiles.exp2.is_polynomial(pair, pairs)]
    exponents = -np.float64(jnp.asarray(np.linspace(0, 3, 256), jnp.bfloat16))
    errors = {}
    for how, column in (
        ("hardware", 2 * pairs - 2),
        *((("polynomial", 2 * chosen[-1] + 1),) if chosen else ()),
    ):
        got = exponentials(emulated, row, column, exponents)
        errors[how] = np.abs(got / np.exp2(exponents) - 1).max()
        print(
            f"{row.name}: {how}, column {column}: largest relative error {errors[how]:.1e}, "
            f"1/{BF16_ROUNDING / errors[how]:.0f} of bfloat16's rounding"
        )
    print(f"{len(chosen)} of {pairs} pairs of a row by a polynomial of degree 4")
    # lse goes through the hardware's log2, good to 2^-22 or so near 1; exp2 is an eighth at least.
    noise = 1e-6
    assert errors["hardware"] < noise
    if chosen:
        assert row.tiles.exp2.degree == 4
        assert noise < errors["polynomial"] < 2.9e-6 + noise


def test_what_underflows_is_zero(emulated) -> None:
    """Below 2^-127 the exponent's bits would wrap; masked scores are -inf."""
    row = ROWS[0]
    column = 2 * next(p for p in range(64) if row.tiles.exp2.is_polynomial(p, 64))
    exponents = -np.float64(jnp.asarray([100, 126, 127, 128, 300, 1e5, 1e30], jnp.bfloat16))
    assert (exponentials(emulated, row, column, exponents) <= 2.0**-100).all()


def run(emulated, row: Variant, family: str, reverse: bool) -> float:
    """The share of visits after a part's first whose rescaling a warp skipped."""
    seqlen_q, seqlen_k = 256, 1024
    shapes = tuple((1, n, 1, row.head_dim) for n in (seqlen_q, seqlen_k, seqlen_k))
    q, k, v = inputs(family, np.random.default_rng(5), shapes, jnp.bfloat16)
    if reverse:
        k = k[:, ::-1]  # key tiles are visited from the last to the first
    scale = float(np.float32(1 / math.sqrt(row.head_dim)))
    scalars = {**BAND, "softmax_scale": scale, "band_lower": -seqlen_q, "band_upper": seqlen_k}
    results = emulated(row.name)((q, k, v, NO_SINKS), scalars)[:2]
    seen = visible(seqlen_q, seqlen_k)
    expected = Oracle(seen, scale).forward(*(np.asarray(x, np.float64) for x in (q, k, v)))
    baseline = xla_attention(q, k, v, seen, scale)[0], tensor_core_lse(q, k, seen, scale)
    for name, *triple in zip(("out", "lse"), results, expected, baseline, strict=True):
        assert not failures(judge(name, *triple)), failures(judge(name, *triple))
    correction = device().launches[-1].counts["correction"]
    warps, visits = seqlen_q // 32, seqlen_k // row.tiles.tile_n
    rescaled = correction["tensor columns read"] // row.head_dim_v - warps  # each also reads out
    assert rescaled == correction["tensor columns written"] // row.head_dim_v
    skipped = 1 - rescaled / (warps * (visits - 1))
    print(f"{row.name}, {family}, reverse={reverse}: {skipped:.0%} of the rescalings skipped")
    return skipped


@pytest.mark.parametrize("row", [v for v in ROWS if v.head_dim in (128, 256)], ids=lambda v: v.name)
def test_out_is_rescaled_where_a_maximum_grew_enough(emulated, row: Variant) -> None:
    """And results are right, whether a maximum is stale, kept or raised each time."""
    assert run(emulated, row, "normal", False) >= 0.9
    assert run(emulated, row, "slowly_rising_maximum", True) == 1
    assert run(emulated, row, "rising_row_maximum", False) == 1
    # By 40 / 8 a visit, 2^7.2: every second time.
    assert run(emulated, row, "rising_row_maximum", True) == 1 - 3 / 7
