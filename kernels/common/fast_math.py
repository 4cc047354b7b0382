# SPDX-License-Identifier: Apache-2.0
"""Arithmetic that the DSL has no name for."""

from cutlass import Float32, cute


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
