# SPDX-License-Identifier: Apache-2.0
"""Instructions that the DSL has no name for."""

import math

from cutlass import BFloat16, Float32, Int32, Numeric, cute
from cutlass._mlir.dialects import llvm


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


def not_ahead(x: Int32) -> Int32:
    """x, of which the compiler knows nothing until here: what is computed from it in a loop isn't
    computed before the loop, and needs no registers there."""
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x]
    )


def thread_again() -> Int32:
    """The thread's index in its CTA, read here: one read before a loop, and needed after it, takes
    a register all along."""
    return Int32(
        llvm.inline_asm(Int32.mlir_type, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)
    )


def select_inside(x: Float32, i: Int32, start: Int32, end: Int32) -> Float32:
    """x if start <= i < end, else -inf, by three instructions: LLVM selects twice."""
    return cute.arch.inline_ptx(
        "{ .reg .pred inside; setp.ge.s32 inside, {$r1}, {$r2}; "
        "setp.lt.and.s32 inside, {$r1}, {$r3}, inside; "
        "selp.f32 {$w0}, {$r0}, 0fFF800000, inside; }",
        write_only_types=[Float32],
        read_only_args=[x, i, start, end],
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


# A tanh's argument times this is the exponent of 2 that it is made of: y = TANH_EXPONENT x.
TANH_EXPONENT = 2 * math.log2(math.e)


def tanh(y: Float32) -> Float32:
    """tanh(x) = 1 - 2 / (1 + exp2(y)), within 4e-7; -1 and 1 at the infinities.

    The chip's own approximation is three instructions shorter, and 5e-4 off: visible in an lse.
    """
    exp = cute.math.exp2(y, fastmath=True)
    return fma(Float32(-2.0), cute.arch.rcp_approx(exp + 1.0), Float32(1.0))


def copysign(magnitude: Float32, sign: Float32) -> Float32:
    """The one's magnitude with the other's sign."""
    return cute.arch.inline_ptx(
        "copysign.f32 {$w0}, {$r1}, {$r0};",
        write_only_types=[Float32],
        read_only_args=[magnitude, sign],
    )


def gap(y: Float32) -> Float32:
    """What |tanh(x)| lacks to 1, 2 / (1 + exp2(|y|)), with the sign of -x.

    From it come a tanh and its slope that are good to a few units in the last place. 1 - tanh^2
    from a tanh in fp32 is 6 % off at |x| = 8, and 0 from 10 on.
    """
    exp = cute.math.exp2(cute.arch.fmax(y, -y), fastmath=True)
    return copysign(cute.arch.rcp_approx(fma(exp, Float32(0.5), Float32(0.5))), -y)


def tanh_of_gap(u: Float32) -> Float32:
    """tanh(x) of u = `gap`(x); -inf of -inf."""
    return u + copysign(Float32(1.0), -u)


def slope_of_gap(u: Float32) -> Float32:
    """1 - tanh(x)^2 of u = `gap`(x); 0 of -inf."""
    u = cute.arch.fmin(cute.arch.fmax(u, -u), Float32(2.0))
    return u * (2.0 - u)


def max3(a: Float32, b: Float32, c: Float32) -> Float32:
    """The largest number of three, by one instruction of sm_100; NaN only of three NaN."""
    return cute.arch.inline_ptx(
        "max.f32 {$w0}, {$r0}, {$r1}, {$r2};",
        write_only_types=[Float32],
        read_only_args=[a, b, c],
    )


# c1, c2, ... of 1 + c1 f + c2 f^2 + ..., which is nearest to 2^f on [0, 1] in the largest relative
# error (Remez' algorithm): 2.1e-3, 8.6e-5, 2.9e-6 and 8.2e-8 for degrees 2 to 5.
EXP2_COEFFICIENTS = {
    2: (0.66596094, 0.3299324),
    3: (0.69511679, 0.22764499, 0.07706704),
    4: (0.69304484, 0.2412802, 0.05224247, 0.01342668),
    5: (0.69315131, 0.24016445, 0.05579991, 0.00901703, 0.00186713),
}


def exp2_by_polynomial(x: tuple[Float32, Float32], degree: int) -> tuple[Float32, Float32]:
    """exp2 of two numbers below 128 on the FMA pipes of sm_100 (FlashAttention-4, section 3.1):
    exactly 0 of -inf, and what underflows may be any tiny number.

    x is split at its floor (Cody and Waite): the sum with 3 * 2^22, rounded down, has it in its
    last bits, from where a shift brings it into the polynomial's exponent.
    """
    low = Float32(-127.0)
    x = tuple(cute.arch.fmax(part, low, nan=True) for part in x)
    magic = (Float32(3 * 2.0**22),) * 2
    shifted = cute.arch.add_packed_f32x2(x, magic, rnd="rm")
    whole = cute.arch.sub_packed_f32x2(shifted, magic)
    fraction = cute.arch.sub_packed_f32x2(x, whole)
    *lower, highest = (Float32(c) for c in EXP2_COEFFICIENTS[degree])
    power = (highest, highest)
    for coefficient in (*reversed(lower), Float32(1.0)):
        power = cute.arch.fma_packed_f32x2(power, fraction, (coefficient, coefficient))
    return tuple(
        _add_to_exponent(value, exponent) for value, exponent in zip(power, shifted, strict=True)
    )


def _add_to_exponent(value: Float32, exponent: Float32) -> Float32:
    return cute.arch.inline_ptx(
        "{ .reg .b32 e, v; mov.b32 e, {$r1}; mov.b32 v, {$r0}; shl.b32 e, e, 23; "
        "add.s32 v, v, e; mov.b32 {$w0}, v; }",
        write_only_types=[Float32],
        read_only_args=[value, exponent],
    )
