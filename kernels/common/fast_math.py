# SPDX-License-Identifier: Apache-2.0
"""Arithmetic that the DSL has no name for."""

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


# 2^f = 1 + f (c1 + f (c2 + ...)) on [-1/2, 1/2], the largest relative error made least (1e-7), c5
# first. The 1 is exact, so that a row's maximum gives 1.
_EXP2_COEFFICIENTS = (
    0.0013264728477224708,
    0.009671512991189957,
    0.05550733581185341,
    0.24022242426872253,
    0.6931470036506653,
)


def exp2_by_fma(x: Float32) -> Float32:
    """2^x for x <= 1 without the MUFU, as good as ex2.approx (relative error 1.5e-7).

    Adding 1.5 * 2^23 rounds x to an integer n in the lower bits, from which a shift makes 2^n
    (Cody & Waite 1980; in attention: FlashAttention-4). 11 instructions, none of them on the MUFU,
    which does 16 ex2 per SM and clock where the FMA pipe does 128 operations. Below -127 (a masked
    score is -inf) the result is 0; a NaN stays NaN, because 2^n is multiplied and not added to the
    exponent.
    """
    x = cute.arch.fmax(x, Float32(-127.0), nan=True)
    fraction, power = cute.arch.inline_ptx(
        "{ .reg .f32 shifted, whole; .reg .b32 bits; "
        "add.rn.f32 shifted, {$r0}, 0f4B400000; "
        "sub.rn.f32 whole, shifted, 0f4B400000; "
        "sub.rn.f32 {$w0}, {$r0}, whole; "
        "mov.b32 bits, shifted; "
        "shl.b32 bits, bits, 23; "
        "add.s32 bits, bits, 0x3F800000; "
        "mov.b32 {$w1}, bits; }",
        write_only_types=[Float32, Float32],
        read_only_args=[x],
    )
    polynomial = Float32(_EXP2_COEFFICIENTS[0])
    for coefficient in _EXP2_COEFFICIENTS[1:]:
        polynomial = fma(polynomial, fraction, Float32(coefficient))
    return fma(polynomial * power, fraction, power)


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
