# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501  (an instruction, or a row of a table, is one line)
"""The emulator's instructions against values worked out from the PTX ISA, one small kernel each."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from emulator import instruction_set
from emulator.errors import Misaligned, UnsupportedInstruction
from emulator.harness import run_body

U32, U64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
LANE = np.arange(32, dtype=np.uint32)


def bits(value: float) -> int:
    """The bits of a float32."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def doubled(low: float, high: float) -> int:
    """Two float32s in 64 bits."""
    return bits(low) | bits(high) << 32


def results(body: str, count: int = 32) -> np.ndarray:
    """What a body stores: one 64-bit word a thread."""
    return run_body(body, (), np.zeros(count, np.uint64), block=count)


def evaluate(instruction: str, kind: str = "b32") -> int:
    """The result of `instruction`, which writes %r0, %d0, %h0 or %p0 by kind."""
    store = {
        "b32": "cvt.u64.u32 %d9, %r0; st.global.b64 [%out], %d9;",
        "b64": "st.global.b64 [%out], %d0;",
        "b16": "cvt.u32.u16 %r9, %h0; cvt.u64.u32 %d9, %r9; st.global.b64 [%out], %d9;",
        "pred": "selp.b64 %d9, 1, 0, %p0; st.global.b64 [%out], %d9;",
    }[kind]
    values = results(f"{instruction} {store}")
    assert (values == values[0]).all()
    return int(values[0])


def constant(register: str, value: int) -> str:
    size = {"r": 32, "d": 64, "h": 16}[register[1]]
    return f"mov.b{size} {register}, {value};"


FLOATS = [
    ("add.f32", (1.5, 2.25), 3.75),
    ("add.rn.f32", (1.0, 2.0**-25), 1.0),
    ("add.rm.f32", (1.0, -(2.0**-60)), 1.0 - 2.0**-24),
    ("add.rp.f32", (1.0, 2.0**-60), 1.0 + 2.0**-23),
    ("add.rz.f32", (-1.0, 2.0**-60), -(1.0 - 2.0**-24)),
    ("add.rm.f32", (3.25, 2.0**23 + 2.0**22), 12582915.0),
    ("add.ftz.f32", (1e-39, 0.0), 0.0),
    ("add.f32", (1e-39, 0.0), float(np.float32(1e-39))),
    ("add.sat.f32", (0.75, 0.75), 1.0),
    ("add.sat.f32", (-0.75, 0.5), 0.0),
    ("add.f32", (math.inf, -math.inf), math.nan),
    ("sub.f32", (1.5, 2.25), -0.75),
    ("sub.rn.f32", (2.0**24, 1.0), 2.0**24 - 1),
    ("sub.rz.f32", (1.0, 2.0**-60), 1.0 - 2.0**-24),
    ("mul.f32", (3.0, -0.5), -1.5),
    ("mul.rz.f32", (1.0 + 2.0**-23, 1.0 + 2.0**-23), 1.0 + 2.0**-22),
    ("mul.rp.f32", (1.0 + 2.0**-23, 1.0 + 2.0**-23), 1.0 + 3 * 2.0**-23),
    ("mul.ftz.f32", (2.0**-100, 2.0**-100), 0.0),
    ("fma.rn.f32", (2.0, 3.0, 4.0), 10.0),
    # One rounding: the product alone would round to 1 + 2^-22 and the difference would be 0.
    ("fma.rn.f32", (1.0 + 2.0**-23, 1.0 + 2.0**-23, -(1.0 + 2.0**-22)), 2.0**-46),
    # float64 would round twice here: a tie of the first rounding that the tail 2^-70 breaks
    # upwards.
    ("fma.rn.f32", (1.0 + 2.0**-12, 2.0**-12, 2.0**-60), 2.0**-12 + 2.0**-24 + 0.0),
    ("fma.rn.f32", (2.0**-12, 2.0**-12, 1.0), 1.0),
    ("fma.rn.f32", (2.0**-12 + 2.0**-35, 2.0**-12, 1.0), 1.0 + 2.0**-23),
    ("fma.rn.ftz.f32", (2.0**-100, 2.0**-40, 0.0), 0.0),
    ("max.f32", (1.0, math.nan), 1.0),
    ("max.NaN.f32", (1.0, math.nan), math.nan),
    ("max.f32", (-0.0, 0.0), 0.0),
    ("max.f32", (1.0, 5.0, 3.0), 5.0),
    ("min.f32", (math.nan, -2.0), -2.0),
    ("min.f32", (0.0, -0.0), -0.0),
    ("min.NaN.f32", (math.nan, -2.0), math.nan),
    ("max.ftz.f32", (-1e-39, -1.0), -0.0),
    ("neg.f32", (2.5,), -2.5),
    ("neg.f32", (0.0,), -0.0),
    ("abs.f32", (-2.5,), 2.5),
    ("copysign.f32", (-1.0, 3.0), -3.0),
    ("ex2.approx.ftz.f32", (3.0,), 8.0),
    ("ex2.approx.ftz.f32", (-math.inf,), 0.0),
    ("ex2.approx.ftz.f32", (-140.0,), 0.0),
    ("ex2.approx.f32", (-140.0,), 2.0**-140),
    ("ex2.approx.ftz.f32", (128.0,), math.inf),
    ("lg2.approx.ftz.f32", (8.0,), 3.0),
    ("lg2.approx.ftz.f32", (0.0,), -math.inf),
    ("lg2.approx.ftz.f32", (1e-39,), -math.inf),
    ("lg2.approx.f32", (-1.0,), math.nan),
    ("rcp.approx.ftz.f32", (4.0,), 0.25),
    ("rcp.approx.ftz.f32", (0.0,), math.inf),
    ("rcp.approx.ftz.f32", (2.0**127,), 0.0),
    ("rcp.rn.f32", (3.0,), float(np.float32(1) / np.float32(3))),
    ("rsqrt.approx.ftz.f32", (16.0,), 0.25),
    ("sqrt.approx.ftz.f32", (16.0,), 4.0),
    ("sqrt.rn.f32", (2.0,), float(np.sqrt(np.float32(2)))),
    ("tanh.approx.f32", (0.0,), 0.0),
    ("div.rn.f32", (1.0, 3.0), float(np.float32(1) / np.float32(3))),
    ("div.full.f32", (6.0, 3.0), 2.0),
]


@pytest.mark.parametrize("opcode, operands, expected", FLOATS, ids=str)
def test_float(opcode: str, operands: tuple, expected: float) -> None:
    setup = "".join(constant(f"%r{i + 1}", bits(x)) for i, x in enumerate(operands))
    sources = ", ".join(f"%r{i + 1}" for i in range(len(operands)))
    got = evaluate(f"{setup} {opcode} %r0, {sources};")
    if math.isnan(expected):
        assert (got & 0x7FFFFFFF) > 0x7F800000
    else:
        assert got == bits(expected), (struct.unpack("<f", struct.pack("<I", got)), expected)


INTEGERS = [
    ("add.s32", (U32, 2), 1),
    ("sub.s32", (1, 2), U32),
    ("mul.lo.s32", (0x10001, 0x10001), 0x20001),
    ("mul.hi.u32", (U32, U32), U32 - 1),
    ("mul.hi.s32", (U32, 5), U32),
    ("mad.lo.s32", (3, 4, 5), 17),
    ("mad.hi.u32", (U32, 2, 10), 11),
    ("div.s32", (U32 - 6, 2), -3 & U32),
    ("div.u32", (7, 2), 3),
    ("div.s32", (7, 0), U32),
    ("rem.s32", (U32 - 6, 2), -1 & U32),
    ("rem.u32", (7, 4), 3),
    ("max.s32", (U32, 1), 1),
    ("max.u32", (U32, 1), U32),
    ("min.s32", (U32, 1), U32),
    ("min.u32", (U32, 1), 1),
    ("min.relu.s32", (-5 & U32, 3), 0),
    ("min.relu.s32", (5, 3), 3),
    ("max.relu.s32", (-5 & U32, -3 & U32), 0),
    ("max.relu.s32", (-5 & U32, 7), 7),
    ("neg.s32", (5,), -5 & U32),
    ("abs.s32", (-5 & U32,), 5),
    ("and.b32", (0b1100, 0b1010), 0b1000),
    ("or.b32", (0b1100, 0b1010), 0b1110),
    ("xor.b32", (0b1100, 0b1010), 0b0110),
    ("not.b32", (0,), U32),
    ("shl.b32", (1, 31), 1 << 31),
    ("shl.b32", (1, 32), 0),
    ("shr.u32", (1 << 31, 31), 1),
    ("shr.u32", (1 << 31, 40), 0),
    ("shr.s32", (1 << 31, 31), U32),
    ("shr.s32", (1 << 31, 40), U32),
    ("shf.l.wrap.b32", (0x80000000, 1, 1), 3),
    ("shf.r.wrap.b32", (0x80000000, 1, 1), 0xC0000000),
    ("shf.l.clamp.b32", (5, 7, 32), 5),
    ("shf.r.clamp.b32", (5, 7, 40), 7),
    ("popc.b32", (0xF0F0,), 8),
    ("clz.b32", (1,), 31),
    ("clz.b32", (0,), 32),
    ("brev.b32", (1,), 1 << 31),
    ("prmt.b32", (0x33221100, 0x77665544, 0x7531), 0x77553311),
    ("prmt.b32", (0x00000080, 0, 0x8888), U32),
    ("bfe.u32", (0xABCD1234, 8, 8), 0x12),
    ("bfe.s32", (0x0000F000, 12, 4), U32),
    ("bfe.s32", (0x80000000, 28, 8), U32 - 7),
    ("bfe.u32", (5, 0, 0), 0),
    ("bfi.b32", (0xF, 0, 4, 4), 0xF0),
]


@pytest.mark.parametrize("opcode, operands, expected", INTEGERS, ids=str)
def test_integer(opcode: str, operands: tuple, expected: int) -> None:
    setup = "".join(constant(f"%r{i + 1}", x) for i, x in enumerate(operands))
    sources = ", ".join(f"%r{i + 1}" for i in range(len(operands)))
    assert evaluate(f"{setup} {opcode} %r0, {sources};") == expected


@pytest.mark.parametrize("opcode, operands, expected", INTEGERS[:24], ids=str)
def test_integer_with_a_constant(opcode: str, operands: tuple, expected: int) -> None:
    """The last source as an immediate."""
    setup = "".join(constant(f"%r{i + 1}", x) for i, x in enumerate(operands[:-1]))
    sources = ", ".join([*(f"%r{i + 1}" for i in range(len(operands) - 1)), str(operands[-1])])
    assert evaluate(f"{setup} {opcode} %r0, {sources};") == expected


def test_lop3_tables() -> None:
    """Every table on operands whose bits are the eight combinations."""
    setup = constant("%r1", 0xF0) + constant("%r2", 0xCC) + constant("%r3", 0xAA)
    for table in (0x00, 0x80, 0xFE, 0x96, 0xE8, 0xCA, 0xFF, 0x3C):
        got = evaluate(f"{setup} lop3.b32 %r0, %r1, %r2, %r3, {table};")
        assert got & 0xFF == table


WIDE = [
    ("add.s64", (U64, 2), 1),
    ("sub.s64", (1, 2), U64),
    ("mul.lo.s64", (1 << 32, 3), 3 << 32),
    ("mad.lo.s64", (1 << 32, 3, 7), (3 << 32) + 7),
    ("shl.b64", (1, 63), 1 << 63),
    ("shr.u64", (1 << 63, 63), 1),
    ("shr.s64", (1 << 63, 63), U64),
    ("or.b64", (1 << 40, 1), (1 << 40) + 1),
    ("and.b64", (U64, 1 << 50), 1 << 50),
    ("xor.b64", (U64, 1), U64 - 1),
    ("div.s64", (-7 & U64, 2), -3 & U64),
    ("rem.s64", (-7 & U64, 2), -1 & U64),
    ("min.s64", (U64, 3), U64),
    ("max.u64", (U64, 3), U64),
    ("neg.s64", (1,), U64),
]


@pytest.mark.parametrize("opcode, operands, expected", WIDE, ids=str)
def test_wide_integer(opcode: str, operands: tuple, expected: int) -> None:
    shift = opcode.startswith("sh")
    setup = constant("%d1", operands[0])
    names = ["%d1"]
    for index, value in enumerate(operands[1:], 2):
        setup += constant("%r2" if shift else f"%d{index}", value)
        names.append("%r2" if shift else f"%d{index}")
    assert evaluate(f"{setup} {opcode} %d0, {', '.join(names)};", "b64") == expected


MIXED = [
    ("mul.wide.s32 %d0, %r1, %r2;", "b64", {"%r1": U32, "%r2": 3}, -3 & U64),
    ("mul.wide.u32 %d0, %r1, %r2;", "b64", {"%r1": U32, "%r2": 3}, 3 * U32),
    ("mad.wide.u32 %d0, %r1, %r2, %d1;", "b64", {"%r1": 2, "%r2": 3, "%d1": 1 << 40}, (1 << 40) + 6),
    ("mul.wide.s16 %r0, %h1, %h2;", "b32", {"%h1": 0xFFFF, "%h2": 5}, -5 & U32),
    ("mul.wide.u16 %r0, %h1, %h2;", "b32", {"%h1": 0xFFFF, "%h2": 5}, 5 * 0xFFFF),
    ("add.s16 %h0, %h1, %h2;", "b16", {"%h1": 0xFFFF, "%h2": 3}, 2),
    ("shr.s16 %h0, %h1, 4;", "b16", {"%h1": 0x8000}, 0xF800),
    ("shr.u16 %h0, %h1, 4;", "b16", {"%h1": 0x8000}, 0x0800),
    ("neg.s16 %h0, %h1;", "b16", {"%h1": 1}, 0xFFFF),
    ("cvt.s64.s32 %d0, %r1;", "b64", {"%r1": 1 << 31}, -(1 << 31) & U64),
    ("cvt.u64.u32 %d0, %r1;", "b64", {"%r1": 1 << 31}, 1 << 31),
    ("cvt.u32.u64 %r0, %d1;", "b32", {"%d1": (5 << 32) + 7}, 7),
    ("cvt.s32.s8 %r0, %r1;", "b32", {"%r1": 0x1280}, -128 & U32),
    ("cvt.u32.u8 %r0, %r1;", "b32", {"%r1": 0x1280}, 0x80),
    ("cvt.s32.s16 %r0, %h1;", "b32", {"%h1": 0x8000}, -32768 & U32),
    ("cvt.u32.u16 %r0, %h1;", "b32", {"%h1": 0x8000}, 0x8000),
    ("cvt.u16.u32 %h0, %r1;", "b16", {"%r1": 0x12345}, 0x2345),
    ("cvt.s16.s8 %h0, %h1;", "b16", {"%h1": 0x12F0}, 0xFFF0),
    ("cvt.s8.s32 %r0, %r1;", "b32", {"%r1": 0x1FF}, U32),
    ("cvt.rn.f32.s32 %r0, %r1;", "b32", {"%r1": U32}, bits(-1.0)),
    ("cvt.rn.f32.u32 %r0, %r1;", "b32", {"%r1": U32}, bits(2.0**32)),
    ("cvt.rzi.s32.f32 %r0, %r1;", "b32", {"%r1": bits(-2.75)}, -2 & U32),
    ("cvt.rni.s32.f32 %r0, %r1;", "b32", {"%r1": bits(2.5)}, 2),
    ("cvt.rmi.s32.f32 %r0, %r1;", "b32", {"%r1": bits(-2.25)}, -3 & U32),
    ("cvt.rpi.s32.f32 %r0, %r1;", "b32", {"%r1": bits(-2.75)}, -2 & U32),
    ("cvt.rzi.u32.f32 %r0, %r1;", "b32", {"%r1": bits(-5.0)}, 0),
    ("cvt.rzi.s32.f32 %r0, %r1;", "b32", {"%r1": bits(1e20)}, 0x7FFFFFFF),
    ("cvt.rzi.s32.f32 %r0, %r1;", "b32", {"%r1": bits(math.nan)}, 0),
    # bf16: to nearest even, ties, overflow to infinity, NaN canonical. The first source is the
    # upper.
    ("cvt.rn.bf16x2.f32 %r0, %r1, %r2;", "b32", {"%r1": bits(1.0), "%r2": bits(-2.0)}, 0x3F80C000),
    ("cvt.rn.bf16x2.f32 %r0, %r1, %r2;", "b32", {"%r1": 0x3F808000, "%r2": 0x3F818000}, 0x3F803F82),
    ("cvt.rn.bf16x2.f32 %r0, %r1, %r2;", "b32", {"%r1": 0x7F7FFFFF, "%r2": 0x7FC12345}, 0x7F807FFF),
    ("cvt.rz.bf16x2.f32 %r0, %r1, %r2;", "b32", {"%r1": 0x3F80FFFF, "%r2": 0xBF80FFFF}, 0x3F80BF80),
    ("cvt.rn.bf16.f32 %h0, %r1;", "b16", {"%r1": 0x3F808001}, 0x3F81),
    ("cvt.rn.f16x2.f32 %r0, %r1, %r2;", "b32", {"%r1": bits(1.0), "%r2": bits(65520.0)}, 0x3C007C00),
    ("cvt.rn.f16x2.f32 %r0, %r1, %r2;", "b32", {"%r1": bits(2.0**-24), "%r2": bits(2.0**-26)}, 0x00010000),
    ("cvt.rn.f16.f32 %h0, %r1;", "b16", {"%r1": bits(math.nan)}, 0x7FFF),
    ("cvt.rz.f16.f32 %h0, %r1;", "b16", {"%r1": bits(1.0 + 2.0**-10 - 2.0**-20)}, 0x3C00),
    ("cvt.f32.bf16 %r0, %h1;", "b32", {"%h1": 0xC000}, bits(-2.0)),
    ("cvt.f32.f16 %r0, %h1;", "b32", {"%h1": 0x0001}, bits(2.0**-24)),
    ("fma.rn.f32.bf16 %r0, %h1, %h2, %r1;", "b32", {"%h1": 0x4000, "%h2": 0x4040, "%r1": bits(1.0)}, bits(7.0)),
    ("fma.rn.f32.f16 %r0, %h1, %h2, %r1;", "b32", {"%h1": 0x4000, "%h2": 0x4200, "%r1": bits(1.0)}, bits(7.0)),
    ("mov.b32 %r0, {%h1, %h2};", "b32", {"%h1": 0x1111, "%h2": 0x2222}, 0x22221111),
    ("mov.b32 {%h1, %h0}, %r1;", "b16", {"%r1": 0x22221111}, 0x2222),
    ("mov.b64 %d0, {%r1, %r2};", "b64", {"%r1": 1, "%r2": 2}, (2 << 32) + 1),
    ("mov.b64 {_, %r0}, %d1;", "b32", {"%d1": (2 << 32) + 1}, 2),
    ("mov.b64 %d0, {%h1, %h2, %h1, %h2};", "b64", {"%h1": 1, "%h2": 2}, 0x0002000100020001),
    ("mov.f32 %r0, 0f3F800000;", "b32", {}, bits(1.0)),
    ("selp.b32 %r0, 3, 4, %p0;", "b32", {"%p0": 1}, 3),
    ("selp.f32 %r0, 0f3F800000, %r1, %p0;", "b32", {"%p0": 0, "%r1": bits(5.0)}, bits(5.0)),
    ("mapa.shared::cluster.u32 %r0, %r1, %r2;", "b32", {"%r1": 0x440, "%r2": 1}, 0x1000440),
    ("add.rn.f32x2 %d0, %d1, %d2;", "b64", {"%d1": doubled(1, 2), "%d2": doubled(10, 20)}, doubled(11, 22)),
    ("sub.rn.f32x2 %d0, %d1, %d2;", "b64", {"%d1": doubled(1, 2), "%d2": doubled(10, 20)}, doubled(-9, -18)),
    ("mul.rn.f32x2 %d0, %d1, %d2;", "b64", {"%d1": doubled(1, 2), "%d2": doubled(10, 20)}, doubled(10, 40)),
    (
        "fma.rn.f32x2 %d0, %d1, %d1, %d2;", "b64",
        {"%d1": doubled(3, 4), "%d2": doubled(1, -1)}, doubled(10, 15),
    ),
    (
        "add.rm.f32x2 %d0, %d1, %d2;", "b64",
        {"%d1": doubled(3.75, -3.75), "%d2": doubled(12582912, 12582912)}, doubled(12582915, 12582908),
    ),
]  # fmt: skip


@pytest.mark.parametrize("instruction, kind, registers, expected", MIXED, ids=str)
def test_conversion_or_move(instruction: str, kind: str, registers: dict, expected: int) -> None:
    setup = ""
    for name, value in registers.items():
        if name[1] == "p":
            setup += f"setp.eq.b32 {name}, {value}, 1;".replace(f" {value},", " %r99,")
            setup = f"mov.b32 %r99, {value};" + setup
        else:
            setup += constant(name, value)
    assert evaluate(setup + instruction, kind) == expected


COMPARISONS = [
    ("setp.lt.s32", U32, 0, True),
    ("setp.lt.u32", U32, 0, False),
    ("setp.ge.s32", 0, 0, True),
    ("setp.gt.s32", 0, 0, False),
    ("setp.le.u32", 1, U32, True),
    ("setp.hi.u32", U32, 1, True),
    ("setp.ls.u32", U32, 1, False),
    ("setp.eq.b32", 3, 3, True),
    ("setp.ne.b32", 3, 3, False),
    ("setp.eq.f32", bits(0.0), bits(-0.0), True),
    ("setp.lt.f32", bits(math.nan), bits(1.0), False),
    ("setp.ltu.f32", bits(math.nan), bits(1.0), True),
    ("setp.geu.f32", bits(2.0), bits(1.0), True),
    ("setp.ne.f32", bits(math.nan), bits(1.0), False),
    ("setp.neu.f32", bits(math.nan), bits(1.0), True),
    ("setp.equ.f32", bits(math.nan), bits(1.0), True),
    ("setp.num.f32", bits(math.nan), bits(1.0), False),
    ("setp.nan.f32", bits(math.nan), bits(1.0), True),
    ("setp.gt.ftz.f32", bits(1e-39), bits(0.0), False),
    ("setp.gt.f32", bits(1e-39), bits(0.0), True),
]


@pytest.mark.parametrize("opcode, a, b, expected", COMPARISONS, ids=str)
def test_comparison(opcode: str, a: int, b: int, expected: bool) -> None:
    setup = constant("%r1", a) + constant("%r2", b)
    assert evaluate(f"{setup} {opcode} %p0, %r1, %r2;", "pred") == expected
    # The second predicate of a pair is the complement.
    assert evaluate(f"{setup} {opcode} %p1|%p0, %r1, %r2;", "pred") != expected


@pytest.mark.parametrize("combine, expected", [("and", False), ("or", True), ("xor", True)])
def test_comparison_combined_with_a_predicate(combine: str, expected: bool) -> None:
    setup = constant("%r1", 1) + "setp.eq.b32 %p1, %r1, 2;"
    assert evaluate(f"{setup} setp.eq.{combine}.b32 %p0, %r1, 1, %p1;", "pred") == expected


def store_lane(register: str = "%r0") -> str:
    return f"cvt.u64.u32 %d9, {register}; st.global.b64 [%out], %d9;"


SHUFFLES = [
    ("bfly", 1, 31, LANE ^ 1),
    ("bfly", 16, 31, LANE ^ 16),
    ("idx", 5, 31, np.full(32, 5)),
    ("idx", 1, 0x1C1F, LANE // 4 * 4 + 1),
    ("down", 2, 31, np.where(LANE + 2 < 32, LANE + 2, LANE)),
    ("up", 3, 0, np.where(LANE >= 3, LANE - 3, LANE)),
    ("down", 1, 0x1C1F, np.where(LANE % 4 < 3, LANE + 1, LANE)),
]


@pytest.mark.parametrize("mode, offset, clamp, expected", SHUFFLES, ids=lambda x: str(x)[:12])
def test_shuffle(mode: str, offset: int, clamp: int, expected: np.ndarray) -> None:
    body = f"shfl.sync.{mode}.b32 %r0, %tid, {offset}, {clamp}, -1; {store_lane()}"
    assert (results(body) == expected).all()
    dynamic = (
        f"mov.b32 %r5, {offset}; shfl.sync.{mode}.b32 %r0, %tid, %r5, {clamp}, -1; {store_lane()}"
    )
    assert (results(dynamic) == expected).all()


def test_shuffle_says_what_is_in_range() -> None:
    body = "shfl.sync.down.b32 %r1|%p0, %tid, 4, 31, -1; selp.b32 %r0, 1, 0, %p0;" + store_lane()
    assert (results(body) == (LANE < 28)).all()


@pytest.mark.parametrize(
    "instruction, expected",
    [
        ("vote.sync.ballot.b32 %r0, %p0, -1;", 0x1F),
        ("vote.sync.any.pred %p1, %p0, -1; selp.b32 %r0, 1, 0, %p1;", 1),
        ("vote.sync.all.pred %p1, %p0, -1; selp.b32 %r0, 1, 0, %p1;", 0),
        ("vote.sync.uni.pred %p1, %p0, -1; selp.b32 %r0, 1, 0, %p1;", 0),
        ("redux.sync.add.u32 %r0, %tid, -1;", 496),
        ("redux.sync.max.s32 %r0, %tid, -1;", 31),
        ("redux.sync.or.b32 %r0, %tid, -1;", 31),
        ("activemask.b32 %r0;", U32),
    ],
)
def test_warp_wide(instruction: str, expected: int) -> None:
    body = f"setp.lt.u32 %p0, %tid, 5; {instruction} {store_lane()}"
    assert (results(body) == expected).all()


def test_elect_gives_one_lane() -> None:
    body = "elect.sync %r1|%p0, -1; selp.b32 %r0, 1, 0, %p0;" + store_lane()
    assert results(body).sum() == 1


def test_special_registers() -> None:
    body = "mov.u32 %r0, %laneid; mov.u32 %r1, %ntid.x; mad.lo.s32 %r0, %r1, 100, %r0;"
    assert (results(body + store_lane(), 64) == 6400 + np.arange(64) % 32).all()


# Control flow -------------------------------------------------------------------------------------


def test_diverged_branches_join() -> None:
    body = f"""
    setp.lt.u32 %p0, %tid, 7;
    @%p0 bra FEW;
    mov.b32 %r0, 100;
    bra.uni JOIN;
FEW:
    mov.b32 %r0, 200;
JOIN:
    shfl.sync.idx.b32 %r1, %r0, 3, 31, -1;
    add.s32 %r0, %r0, %r1;
    {store_lane()}"""
    assert (results(body) == np.where(LANE < 7, 400, 300)).all()


def test_loop_with_a_different_count_per_lane() -> None:
    body = f"""
    mov.b32 %r0, 0; mov.b32 %r1, 0;
LOOP:
    add.s32 %r0, %r0, %r1;
    add.s32 %r1, %r1, 1;
    setp.le.u32 %p0, %r1, %tid;
    @%p0 bra LOOP;
    {store_lane()}"""
    assert (results(body) == LANE * (LANE + 1) // 2).all()


def test_guards_leave_other_lanes_alone() -> None:
    body = f"""
    mov.b32 %r0, 1;
    setp.ge.u32 %p0, %tid, 16;
    @%p0 mov.b32 %r0, 2;
    @!%p0 add.s32 %r0, %r0, 10;
    {store_lane()}"""
    assert (results(body) == np.where(LANE < 16, 11, 2)).all()


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, width", [("b16", 2), ("b32", 4), ("b64", 8)])
def test_global_and_shared_round_trip(kind: str, width: int) -> None:
    register = {"b16": "%h1", "b32": "%r1", "b64": "%d1"}[kind]
    other = {"b16": "%h2", "b32": "%r2", "b64": "%d2"}[kind]
    data = np.arange(1, 33, dtype={2: np.uint16, 4: np.uint32, 8: np.uint64}[width])
    body = f"""
    mul.wide.u32 %d3, %tid, {width}; add.s64 %d4, %in0, %d3;
    mad.lo.s32 %r5, %tid, {width}, %smem;
    ld.global.{kind} {register}, [%d4];
    st.shared.{kind} [%r5], {register};
    ld.shared.{kind} {other}, [%r5];
    st.global.{kind} [%out], {other};"""
    got = run_body(body, (data,), np.zeros(32, np.uint64))
    assert (got == data).all()


def test_vectors_are_consecutive() -> None:
    data = np.arange(128, dtype=np.uint32)
    body = """
    mul.wide.u32 %d3, %tid, 16; add.s64 %d4, %in0, %d3;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d4];
    mad.lo.s32 %r5, %tid, 16, %smem;
    st.shared.v2.b32 [%r5], {%r4, %r3}; st.shared.v2.b32 [%r5+8], {%r2, %r1};
    ld.shared.v2.b64 {%d5, %d6}, [%r5];
    mov.b64 {%r6, %r7}, %d5;
    mad.lo.s32 %r0, %r6, 1000, %r7; cvt.u64.u32 %d9, %r0; st.global.b64 [%out], %d9;"""
    got = run_body(body, (data,), np.zeros(32, np.uint64))
    assert (got == (4 * LANE + 3) * 1000 + 4 * LANE + 2).all()


@pytest.mark.parametrize("kind, expected", [("s8", -2 & U32), ("u8", 0xFE), ("s16", -2 & U32)])
def test_narrow_loads_extend(kind: str, expected: int) -> None:
    data = np.array([0xFFFE], np.uint16)
    got = run_body(
        f"ld.global.{kind} %r0, [%in0]; {store_lane()}", (data,), np.zeros(32, np.uint64)
    )
    assert (got == expected).all()


@pytest.mark.parametrize(
    "operation, kind, start, value, expected",
    [("add", "u32", 5, 1, 37), ("max", "s32", 5, 9, 9), ("min", "u32", 5, 3, 3)],
)
def test_atomics(operation: str, kind: str, start: int, value: int, expected: int) -> None:
    counter = np.array([start], np.uint32)
    body = f"mov.b32 %r1, {value}; atom.global.{operation}.{kind} %r0, [%in0], %r1;"
    run_body(body, (counter,), np.zeros(32, np.uint64))
    assert counter[0] == expected


def test_float_reduction_in_memory() -> None:
    total = np.array([1.0], np.float32)
    body = "mov.b32 %r1, 0f3F000000; red.global.add.f32 [%in0], %r1;"
    run_body(body, (total,), np.zeros(32, np.uint64))
    assert total[0] == 17.0


@pytest.mark.parametrize("width", [2, 4])
def test_vector_reduction_in_memory(width: int) -> None:
    """red.add.vN.f32: half of the lanes share an address with another, one is inactive."""
    total = np.full(16 * width, 2.0, np.float32)
    vector = ", ".join(f"%r{i + 1}" for i in range(width))
    body = (
        "".join(f"mov.b32 %r{i + 1}, {bits(i + 0.5)};" for i in range(width))
        + f"""
    and.b32 %r9, %tid, 15; mul.wide.u32 %d1, %r9, {4 * width}; add.s64 %d1, %in0, %d1;
    setp.ne.u32 %p1, %tid, 3;
    @%p1 red.relaxed.gpu.global.add.v{width}.f32 [%d1 + 0], {{ {vector} }};"""
    )
    run_body(body, (total,), np.zeros(32, np.uint64))
    expected = 2 + 2 * np.tile(np.arange(width) + 0.5, (16, 1))
    expected[3] -= np.arange(width) + 0.5
    np.testing.assert_array_equal(total.reshape(16, width), expected)


def test_vector_reduction_flushes_subnormals() -> None:
    total = np.array([1e-39, 0.0], np.float32)
    body = f"mov.b32 %r1, 0; mov.b32 %r2, {bits(1e-39)}; setp.eq.u32 %p1, %tid, 0;"
    body += "@%p1 red.global.add.v2.f32 [%in0], {%r1, %r2};"
    run_body(body, (total,), np.zeros(32, np.uint64))
    assert (total == 0).all()


@pytest.mark.parametrize("width", [2, 4])
def test_vector_reduction_is_aligned(width: int) -> None:
    total = np.zeros(32 * width + 1, np.float32)
    vector = ", ".join(["%r1"] * width)
    body = f"mov.b32 %r1, 0; red.global.add.v{width}.f32 [%in0 + 4], {{ {vector} }};"
    with pytest.raises(Misaligned):
        run_body(body, (total,), np.zeros(32, np.uint64))


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_and_ldmatrix(trans: str) -> None:
    """stmatrix x4: lane l of matrix i holds elements (l // 4, 2 (l % 4)) and the next."""
    pieces = " ".join(
        f"mad.lo.s32 %r{i + 1}, %tid, 2, {256 * i}; add.s32 %r{i + 1}, %r{i + 1}, 0;"
        f"add.s32 %r9, %r{i + 1}, 1; shl.b32 %r9, %r9, 16; or.b32 %r{i + 1}, %r{i + 1}, %r9;"
        for i in range(4)
    )
    body = f"""
    {pieces}
    mad.lo.s32 %r20, %tid, 16, %smem;
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r20], {{%r1, %r2, %r3, %r4}};
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r5, %r6, %r7, %r8}}, [%r20];
    sub.s32 %r5, %r5, %r1; sub.s32 %r6, %r6, %r2; sub.s32 %r7, %r7, %r3; sub.s32 %r8, %r8, %r4;
    or.b32 %r5, %r5, %r6; or.b32 %r7, %r7, %r8; or.b32 %r5, %r5, %r7;
    mad.lo.s32 %r21, %tid, 2, %smem;
    ld.shared.b16 %h1, [%r21+128]; cvt.u32.u16 %r6, %h1;
    shl.b32 %r6, %r6, 8; or.b32 %r0, %r5, %r6; {store_lane()}"""
    got = results(body)
    assert (got & 0xFF == 0).all()  # the round trip
    # Matrix 1's first four rows, element by element.
    row, column = np.arange(32) // 8, np.arange(32) % 8
    expected = 256 + (8 * column + row if trans else 8 * row + column)
    assert (got >> 8 == expected).all()


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.b32 %r0, %r1;",
        "add.sat.s32 %r0, %r1, %r2;",
        "min.xorsign.abs.f32 %r0, %r1, %r2;",
        "cvt.rn.satfinite.bf16x2.f32 %r0, %r1, %r2;",
        "mul.rn.ftz.sat.oob.f32 %r0, %r1, %r2;",
        "max.relu.u32 %r0, %r1, %r2;",
        "wgmma.mma_async.sp.sync.aligned.m64n64k32.f32.bf16.bf16 {%r0}, %d0, %d1, 0, %p0, 1, 1, 0, 0;",
        "tcgen05.mma.cta_group::1.kind::f8f6f4 [%r0], %d0, %d1, %r2, %p0;",
        "fence.proxy.async.shared::elsewhere;",
        "cp.async.bulk.tensor.2d.shared::cta.global.im2col.mbarrier::complete_tx::bytes [%r0], [%d0, {%r1, %r2}], [%r3];",
    ],
)  # fmt: skip
def test_unknown_instructions_and_modifiers_are_named(instruction: str) -> None:
    opcode = instruction.split()[0].rstrip(";")
    with pytest.raises(UnsupportedInstruction, match=opcode.replace(".", r"\.")):
        results(instruction)


def test_every_missing_instruction_is_listed_at_once() -> None:
    with pytest.raises(UnsupportedInstruction, match=r"(?s)first\.b32.*second\.b32"):
        results("first.b32 %r0, %r1; second.b32 %r0, %r1;")


def test_the_table_is_unambiguous() -> None:
    """No pattern is declared twice, and each is well formed."""
    patterns = instruction_set.patterns()
    assert len(set(patterns)) == len(patterns)
    for pattern in patterns:
        instruction_set.pattern_regex(pattern)
