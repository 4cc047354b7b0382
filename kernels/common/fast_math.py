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
