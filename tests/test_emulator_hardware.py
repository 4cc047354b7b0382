# SPDX-License-Identifier: Apache-2.0
"""The emulator's arithmetic against numbers measured on an H200 (`emulator/h200.npz`).

`a`, `b`, `addend` and `sums` are float16 operands of single tensor-core instructions and what they
gave; `ex2` and `lg2` are what the MUFU unit gave for `ex2_x` and `lg2_x`.
"""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import reference
from emulator import mufu, tensor_core
from emulator.agreement import bits, steps_apart

MEASURED = np.load(pathlib.Path(__file__).parent / "emulator" / "h200.npz")


def test_tensor_core_sums_are_bit_exact() -> None:
    a, b = (MEASURED[name].view(np.float16).astype(np.float32) for name in "ab")
    for operands in zip(a, b, MEASURED["addend"], MEASURED["sums"], strict=True):
        *inputs, expected = operands
        np.testing.assert_array_equal(tensor_core.multiply_add(*inputs, "f16"), expected)


def test_the_baseline_of_the_kernel_tests_sums_alike() -> None:
    a, b = (MEASURED[name].view(np.float16).astype(np.float64) for name in "ab")
    operands = np.broadcast_arrays(a[:, :, None], b[:, None])
    sums = reference.tensor_core_sum(*operands, MEASURED["addend"].astype(np.float64))
    np.testing.assert_array_equal(sums, MEASURED["sums"])


def test_rounding_to_nearest_would_not_be() -> None:
    a, b = (MEASURED[name].view(np.float16).astype(np.float64) for name in "ab")
    nearest = np.einsum("nik,njk->nij", a, b) + MEASURED["addend"]
    assert np.mean(nearest.astype(np.float32) == MEASURED["sums"]) < 0.7


@pytest.mark.parametrize("kind, one_ulp", [("f16", 2.0**-10), ("bf16", 2.0**-7)])
def test_tensor_core_by_hand(kind: str, one_ulp: float) -> None:
    """One product of 1 and fifteen that lie below its 25 kept bits, or just within them."""
    a, b = np.zeros((1, 16), np.float32), np.zeros((1, 16), np.float32)
    zero = np.zeros((1, 1), np.float32)
    a[0, 0] = b[0, 0] = 1
    a[0, 1:], b[0, 1:] = 2.0**-13, 2.0**-13  # 2^-26 each: cut off
    assert tensor_core.multiply_add(a, b, zero, kind) == 1
    b[0, 1:] = 2.0**-12  # 2^-25 each: kept, and 15 of them are 2^-22 + 7 / 2^25, cut to 24 bits
    assert tensor_core.multiply_add(a, b, zero, kind) == 1 + 3 * 2.0**-23
    a[0, 1:] = b[0, 1:] = 0
    a[0, 0] = 1 + one_ulp
    assert tensor_core.multiply_add(a, b, zero - 1, kind) == np.float32(one_ulp)
    a[0, 0] = np.inf
    assert tensor_core.multiply_add(a, b, zero, kind) == np.inf


def test_exp2_differs_in_the_last_bit_at_most() -> None:
    apart = steps_apart(bits(mufu.exp2(MEASURED["ex2_x"])), bits(MEASURED["ex2"]))
    assert apart.max() <= 1
    assert np.mean(apart == 0) > 0.97


def test_exp2_ends() -> None:
    x = np.array([0, -np.inf, np.inf, np.nan, 1, -1, 127, 128, -126], np.float32)
    expected = np.array([1, 0, np.inf, np.nan, 2, 0.5, 2.0**127, np.inf, 2.0**-126], np.float32)
    np.testing.assert_allclose(mufu.exp2(x), expected, rtol=2e-7)


def test_log2_is_as_far_off_as_the_hardware() -> None:
    ours, theirs = mufu.log2(MEASURED["lg2_x"]), MEASURED["lg2"]
    assert np.abs(ours - theirs).max() < 2e-7
    assert abs(np.mean(ours - theirs)) < 1e-8
    ends = mufu.log2(np.array([0, 1, 8, np.inf, -1], np.float32))
    np.testing.assert_array_equal(ends, np.array([-np.inf, 0, 3, np.inf, np.nan], np.float32))
