# SPDX-License-Identifier: Apache-2.0
"""The emulator's arithmetic against numbers measured on an H200 (`emulator/h200.npz`).

`a`, `b`, `addend` and `sums` are float16 operands of single tensor-core instructions and what they
gave; `ex2` and `lg2` are what the MUFU unit gave for `ex2_x` and `lg2_x`, as for the bits below.
"""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import reference
from emulator import mufu, tensor_core
from emulator.agreement import bits

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


# Function, bits of its argument, bits of an H200's result; none is the exact one's nearest float32.
MUFU_BITS = [
    ("exp2", 0x3FD2C923, 0x40486745),  # 1.6467632: one below
    ("exp2", 0x3FE76C1B, 0x4060191E),  # 1.8079866: one above
    ("exp2", 0xBC0CD300, 0x3F7E7AB5),  # -0.008595228: two below
    ("exp2", 0xBF6FF734, 0x3F05ADF3),  # -0.9373658: one above
    ("exp2", 0xC0A0F470, 0x3CFAC278),  # -5.0298386: one below
    ("exp2", 0xC03BFE70, 0x3E05AD07),  # -2.9374046: one above
    ("rcp", 0x3FFF42AF, 0x3F005EEE),  # 1.9942225: one below
    ("rcp", 0x3F92E550, 0x3F5F11DB),  # 1.1476231: one below
    ("rcp", 0x3F864FA4, 0x3F73F88E),  # 1.0493054: one above
    ("rcp", 0x3FB540E4, 0x3F34C917),  # 1.4160428: one above
    ("log2", 0x3F808042, 0x3BB8ACE2),  # 1.0039141: 26 below
    ("log2", 0x3F803445, 0x3B16B31F),  # 1.0015951: 122 above
    ("log2", 0x3F7F4EC8, 0xBB8001F1),  # 0.99729586: 123 above
    ("log2", 0x3F000000, 0xBF7FFFFE),  # 0.5: two above
    ("log2", 0x411D54D7, 0x40530CE8),  # 9.833213: one below
    ("log2", 0x410D41ED, 0x4049198B),  # 8.828595: one above
]
FUNCTIONS = {"exp2": mufu.exp2, "rcp": mufu.rcp, "log2": mufu.log2}


@pytest.mark.parametrize("name, argument, result", MUFU_BITS)
def test_mufu_rounds_like_the_hardware(name: str, argument: int, result: int) -> None:
    x = np.array([argument], np.uint32).view(np.float32)
    assert hex(bits(FUNCTIONS[name](x))[0]) == hex(result)
    wide = x.astype(np.float64)
    exact = 1 / wide if name == "rcp" else getattr(np, name)(wide)
    assert bits(exact.astype(np.float32))[0] != result


@pytest.mark.parametrize("name, measured", [("exp2", "ex2"), ("log2", "lg2")])
def test_mufu_is_bit_exact(name: str, measured: str) -> None:
    result = FUNCTIONS[name](MEASURED[f"{measured}_x"])
    np.testing.assert_array_equal(bits(result), bits(MEASURED[measured]))


TINY = 2.0**-126
MUFU_ENDS = [
    ("exp2", 0.0, 1.0),
    ("exp2", -0.0, 1.0),
    ("exp2", -TINY / 2, 1.0),
    ("exp2", -1.0, 0.5),  # measured, as are -2 .. -7
    ("exp2", -7.0, 2.0**-7),
    ("exp2", 127.0, 2.0**127),
    ("exp2", 128.0, np.inf),
    ("exp2", np.inf, np.inf),
    ("exp2", -126.0, TINY),
    ("exp2", -126.5, 0.0),
    ("exp2", -np.inf, 0.0),
    ("exp2", np.nan, np.nan),
    ("rcp", 1.0, 1.0),
    ("rcp", -4.0, -0.25),
    ("rcp", 2.0**126, TINY),
    ("rcp", -(2.0**127), -0.0),
    ("rcp", TINY, 2.0**126),
    ("rcp", TINY / 2, np.inf),
    ("rcp", -0.0, -np.inf),
    ("rcp", -np.inf, -0.0),
    ("rcp", np.nan, np.nan),
    ("log2", 1.0, 0.0),
    ("log2", 8.0, 3.0),
    ("log2", TINY / 2, -np.inf),
    ("log2", -0.0, -np.inf),
    ("log2", np.inf, np.inf),
    ("log2", -1.0, np.nan),
    ("log2", -np.inf, np.nan),
    ("log2", np.nan, np.nan),
]


@pytest.mark.parametrize("name, argument, result", MUFU_ENDS)
def test_mufu_ends(name: str, argument: float, result: float) -> None:
    got = FUNCTIONS[name](np.array([argument, 1], np.float32))[:1]
    np.testing.assert_array_equal(got, np.float32(result))
    assert np.isnan(result) or np.signbit(got[0]) == np.signbit(result)
