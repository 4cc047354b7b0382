# SPDX-License-Identifier: Apache-2.0
"""Arithmetic that the DSL has no name for."""

import math

from cutlass import BFloat16, Float32, Int32, Numeric, cute


def fma(a: Float32, b: Float32, c: Float32) -> Float32:
    """a * b + c, rounded once.

    ptxas fuses a product and a sum or difference anyway; saying so in the PTX lets whoever executes
    the PTX, as the tests' emulator does, get the same bits.
    """
    return cute.arch.inline_ptx(
        "fma.rn.f32 {$w0}, {$r0}, {$r1}, {$r2};",
        write_only_types=[Float32],
        read_only_args=[a, b, c],
    )


def round_pair(low: Float32, high: Float32, dtype: type[Numeric]) -> Int32:
    """Two numbers rounded to a 16-bit `dtype`, packed; `low` has the lower half.

    An opaque instruction, because LLVM takes a bfloat16 conversion for cheaper than a register and
    repeats it where the result is used: the fp32 numbers stay alive then, twice the registers.
    """
    name = "bf16x2" if dtype is BFloat16 else "f16x2"
    return cute.arch.inline_ptx(
        f"cvt.rn.{name}.f32 {{$w0}}, {{$r1}}, {{$r0}};",
        write_only_types=[Int32],
        read_only_args=[low, high],
    )


def tanh(x: Float32) -> Float32:
    """1 - 2 / (1 + exp(2 x)), within 4e-7 of the hyperbolic tangent; -1 and 1 at the infinities.

    The chip's own approximation is three instructions shorter, and 5e-4 off: visible in an lse.
    """
    exp = cute.math.exp2(x * (2 * math.log2(math.e)), fastmath=True)
    return fma(Float32(-2.0), cute.arch.rcp_approx(exp + 1.0), Float32(1.0))
