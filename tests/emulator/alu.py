# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of one warp: functions that translated blocks call, on arrays of 32 lanes.

Numbers are right to the last bit where the PTX ISA defines them so (rounding modes, fma,
conversions); ex2, lg2 and rcp are an H200's own (`mufu`), the other `.approx` functions NumPy's,
within the ISA's error bounds.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from . import mufu

u8, i8, u16, i16 = np.uint8, np.int8, np.uint16, np.int16
u32, i32, u64, i64 = np.uint32, np.int32, np.uint64, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64
Array = np.ndarray

LANES = 32
LANE = np.arange(LANES, dtype=u32)
ALL_LANES = np.ones(LANES, bool)
SMALLEST_NORMAL = f32(np.finfo(f32).tiny)


def pack(parts: tuple[Array, ...], part: type, whole: type) -> Array:
    """`mov.b64 d, {a, b}`: the first part is the least significant (PTX ISA, mov)."""
    joined = np.empty((LANES, len(parts)), part)
    for index, value in enumerate(parts):
        joined[:, index] = value
    return joined.view(whole).reshape(LANES)


def flush(x: Array) -> Array:
    """`.ftz`: subnormal numbers become zero of the same sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, x * f32(0), x)


def saturate(x: Array) -> Array:
    """`.sat`: clamp to [0, 1]; NaN becomes +0."""
    return np.where(x > 0, np.minimum(x, f32(1)), f32(0))


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """(rounded sum, its exact error) in float64 (Knuth's TwoSum)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _round_f64(total: Array, error: Array, rounding: str) -> Array:
    """total + error, known exactly, to float32."""
    nearest = total.astype(f32)
    wide = nearest.astype(f64)
    above = (wide > total) | ((wide == total) & (error < 0))
    below = (wide < total) | ((wide == total) & (error > 0))
    if rounding == "rz":
        above, below = above & (nearest > 0), below & (nearest < 0)
    down = np.nextafter(nearest, f32(-np.inf))
    up = np.nextafter(nearest, f32(np.inf))
    if rounding in ("rm", "rz"):
        nearest = np.where(above, down, nearest)
    if rounding in ("rp", "rz"):
        nearest = np.where(below, up, nearest)
    return nearest


def add_directed(a: Array, b: Array, rounding: str) -> Array:
    """`add.{rz,rm,rp}.f32`: the exact sum, rounded toward zero, down or up."""
    return _round_f64(*_two_sum(np.asarray(a, f64), np.asarray(b, f64)), rounding)


def mul_directed(a: Array, b: Array, rounding: str) -> Array:
    """`mul.{rz,rm,rp}.f32`; a product of float32s is exact in float64."""
    product = np.multiply(a, b, dtype=f64)
    return _round_f64(product, np.zeros_like(product), rounding)


def fma(a: Array, b: Array, c: Array) -> Array:
    """`fma.rn.f32`: one rounding. float64 would round twice, so ties are decided by the exact
    error."""
    product = np.multiply(a, b, dtype=f64)
    total = product + c
    bits = total.view(u64)
    # A second rounding can only go wrong from the middle between two float32s, or among subnormals.
    unsure = ((bits & u64(0x1FFFFFFF)) == u64(0x10000000)) | (np.abs(total) < 2.0**-125)
    if not unsure.any():
        return total.astype(f32)
    total, error = _two_sum(product, np.broadcast_to(np.asarray(c, f64), product.shape))
    # Round to odd in float64 first; then rounding to float32 is right (Boldo and Melquiond, 2008).
    even = (total.view(u64) & u64(1)) == 0
    inexact = (error != 0) & np.isfinite(error) & even & np.isfinite(total)
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact, np.nextafter(total, toward), total).astype(f32)


def fma_directed(a: Array, b: Array, c: Array, rounding: str) -> Array:
    """`fma.{rz,rm,rp}.f32`."""
    product = np.multiply(a, b, dtype=f64)
    return _round_f64(*_two_sum(product, np.asarray(c, f64) + np.zeros_like(product)), rounding)


def ex2(x: Array, ftz: bool) -> Array:
    """`ex2.approx`; without its flush, the square of the half's where a subnormal may result."""
    if ftz:
        return mufu.exp2(x)
    return np.where(x < -126, mufu.exp2(x / f32(2)) ** 2, mufu.exp2(x))


def lg2(x: Array, ftz: bool) -> Array:
    """`lg2.approx`; without its flush, subnormal numbers are scaled."""
    if ftz:
        return mufu.log2(x)
    small = np.abs(x) < SMALLEST_NORMAL
    scaled = mufu.log2(np.where(small, x * f32(2**24), x))
    return np.where(small, scaled - f32(24), scaled)


def rcp(x: Array, ftz: bool) -> Array:
    """`rcp.approx`; without its flush correctly rounded."""
    return mufu.rcp(x) if ftz else rcp_rn(x, False)


def rcp_rn(x: Array, ftz: bool) -> Array:
    """`rcp.rn`."""
    return flush(f32(1) / flush(x)) if ftz else f32(1) / x


def rsqrt(x: Array, ftz: bool) -> Array:
    """`rsqrt.approx`, from float64."""
    root = (1 / np.sqrt(np.asarray(flush(x) if ftz else x, f64))).astype(f32)
    return flush(root) if ftz else root


def sqrt(x: Array, ftz: bool) -> Array:
    """`sqrt.rn` and `sqrt.approx`."""
    return np.sqrt(flush(x)) if ftz else np.sqrt(x)


def maximum(a: Array, b: Array, nan: bool) -> Array:
    """`max.f32`: the number where one side is NaN, but with `.NaN` NaN; +0 > -0."""
    result = np.maximum(a, b) if nan else np.fmax(a, b)
    zeros = (a == 0) & (b == 0)
    if zeros.any():
        result = np.where(zeros, a + b, result)  # -0 only of two -0
    return result


def minimum(a: Array, b: Array, nan: bool) -> Array:
    """`min.f32`; see `maximum`."""
    return -maximum(-a, -b, nan)


def divide(a: Array, b: Array) -> Array:
    """`div` of integers, toward zero; by zero all bits are set (unspecified)."""
    divisor = np.asarray(b)
    safe = np.where(divisor == 0, divisor.dtype.type(1), divisor)
    if a.dtype.kind == "i":
        quotient = np.trunc(a / safe).astype(a.dtype) if a.itemsize < 8 else _truncated(a, safe)
    else:
        quotient = a // safe
    return np.where(divisor == 0, np.full(LANES, -1, i64).astype(a.dtype), quotient)


def _truncated(a: Array, b: Array) -> Array:
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient)


def remainder(a: Array, b: Array) -> Array:
    """`rem`: has the sign of the dividend."""
    return a - divide(a, b) * b


def shift_left(x: Array, count: Array, bits: int) -> Array:
    """`shl`: counts of the width and more give 0."""
    shifted = x << np.minimum(count, u32(bits - 1)).astype(x.dtype)
    return np.where(count < bits, shifted, x.dtype.type(0))


def shift_right(x: Array, count: Array, bits: int) -> Array:
    """`shr`: counts of the width and more give 0, or the sign for a signed type."""
    shifted = x >> np.minimum(count, u32(bits - 1)).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(count < bits, shifted, x.dtype.type(0))


def funnel_shift(low: Array, high: Array, count: Array, left: bool, wrap: bool) -> Array:
    """`shf`: the 64 bits {high, low} shifted; the high word for left, the low one for right
    ."""
    both = (np.asarray(high).astype(u64) << u64(32)) | np.asarray(low).astype(u64)
    count = np.asarray(count)
    count = (count & u32(31) if wrap else np.minimum(count, u32(32))).astype(u64)
    return (both << count >> u64(32) if left else both >> count).astype(u32)


def mul_high(a: Array, b: Array) -> Array:
    """`mul.hi` of 32-bit integers."""
    wide = i64 if np.asarray(a).dtype.kind == "i" else u64
    return (np.multiply(a, b, dtype=wide) >> wide(32)).astype(np.asarray(a).dtype)


def population(x: Array) -> Array:
    """`popc.b32`."""
    return np.bitwise_count(x).astype(u32)


def leading_zeros(x: Array) -> Array:
    """`clz.b32`: 32 for 0."""
    _, exponent = np.frexp(x.astype(f64))
    return (32 - exponent).astype(u32)


def reverse_bits(x: Array) -> Array:
    """`brev.b32`."""
    bits = np.unpackbits(np.ascontiguousarray(x).view(u8).reshape(-1, 4), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(u32).reshape(LANES)


def lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    """`lop3.b32`: bit i of the table is the result for (a, b, c) = the bits of i (PTX ISA,
    lop3)."""
    result = np.zeros(LANES, u32)
    for index in range(8):
        if table >> index & 1:
            term = a if index & 4 else ~a
            term = term & (b if index & 2 else ~b)
            result |= term & (c if index & 1 else ~c)
    return result


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """`prmt.b32` in its default mode: bytes of {b, a}; bit 3 of a nibble replicates the sign
    ."""
    both = (np.asarray(b).astype(u64) << u64(32)) | np.asarray(a).astype(u64)
    result = np.zeros(LANES, u32)
    for byte in range(4):
        nibble = (np.asarray(selector).astype(u64) >> u64(4 * byte)) & u64(15)
        value = (both >> ((nibble & u64(7)) << u64(3))) & u64(0xFF)
        value = np.where(nibble & u64(8), np.where(value & u64(0x80), u64(0xFF), u64(0)), value)
        result |= (value << u64(8 * byte)).astype(u32)
    return result


def extract_bits(x: Array, start: Array, length: Array) -> Array:
    """`bfe` of 32 bits: zero- or sign-extended by the type of x."""
    start, length = np.asarray(start) & u32(0xFF), np.asarray(length) & u32(0xFF)
    signed = x.dtype.kind == "i"
    source = np.asarray(x).view(u32) if signed else x
    last = np.minimum(start + length - u32(1), u32(31))
    sign = (source >> last) & u32(1) if signed else np.zeros(LANES, u32)
    field = shift_right(source, np.broadcast_to(start, LANES), 32)
    mask = shift_left(np.ones(LANES, u32), np.broadcast_to(length, LANES), 32) - u32(1)
    mask = np.where(length >= 32, u32(0xFFFFFFFF), mask)
    in_range = np.maximum(i64(32) - start, 0)
    short = shift_left(np.ones(LANES, u32), in_range.astype(u32), 32) - u32(1)
    short = np.where(in_range >= 32, u32(0xFFFFFFFF), short)
    result = np.where(sign != 0, (field & mask & short) | ~(mask & short), field & mask)
    return np.where(length == 0, u32(0), result).astype(u32).view(x.dtype)


def insert_bits(a: Array, b: Array, start: Array, length: Array) -> Array:
    """`bfi.b32`: the low `length` bits of a, put into b at `start`."""
    start, length = (np.broadcast_to(np.asarray(x) & u32(0xFF), LANES) for x in (start, length))
    mask = np.where(
        length >= 32, u32(0xFFFFFFFF), shift_left(np.ones(LANES, u32), length, 32) - u32(1)
    )
    mask = shift_left(mask, start, 32)
    return (shift_left(np.broadcast_to(a, LANES), start, 32) & mask) | (b & ~mask)


# Conversions --------------------------------------------------------------------------------------


def bf16_bits(x: Array, rounding: str = "rn") -> Array:
    """float32 to bfloat16 bits, as uint32; NaN becomes 0x7fff (PTX ISA, cvt)."""
    x = np.asarray(x, f32)
    if rounding == "rn":
        rounded = x.astype(ml_dtypes.bfloat16).view(u16).astype(u32)
    else:
        rounded = x.view(u32) >> u32(16)
    is_nan = np.isnan(x)
    return np.where(is_nan, u32(0x7FFF), rounded) if is_nan.any() else rounded


def f16_bits(x: Array, rounding: str = "rn") -> Array:
    """float32 to float16 bits, as uint32; NaN becomes 0x7fff."""
    x = np.asarray(x, f32)
    half = x.astype(f16)
    if rounding == "rz":
        too_far = np.abs(half.astype(f64)) > np.abs(x.astype(f64))
        half = np.where(too_far, np.nextafter(half, f16(0)), half)
    return np.where(np.isnan(x), u32(0x7FFF), half.view(u16).astype(u32))


def from_bf16(bits: Array) -> Array:
    """bfloat16 bits to float32."""
    return (bits.astype(u32) << u32(16)).view(f32)


def from_f16(bits: Array) -> Array:
    """float16 bits to float32."""
    return bits.view(f16).astype(f32)


def to_integer(x: Array, rounding: str, dtype: type) -> Array:
    """`cvt.{rni,rzi,rmi,rpi}`: saturates; NaN becomes 0."""
    function = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
    whole = np.nan_to_num(function(np.asarray(x, f64)), nan=0.0, posinf=np.inf, neginf=-np.inf)
    limits = np.iinfo(dtype)
    inside = np.clip(
        whole, float(limits.min), float(limits.max) if limits.bits < 64 else 2.0**63 - 1024
    )
    return inside.astype(dtype)


# Lanes --------------------------------------------------------------------------------------------


def uniform(x: Array, active: Array | None) -> int:
    """The value that all active lanes agree on."""
    if np.ndim(x) == 0:
        return int(x)
    values = x if active is None else x[active]
    if (values != values[0]).any():
        raise ValueError(f"lanes disagree on a warp-uniform operand: {values.tolist()}")
    return int(values[0])


def shuffle_sources(mode: str, offset: int, clamp: int) -> tuple[Array, Array]:
    """(source lane, whether it is in range) of each lane of `shfl.sync`."""
    lane = np.arange(LANES)
    segment, bound = clamp >> 8 & 31, clamp & 31
    lowest = lane & segment
    highest = lowest | (bound & ~segment)
    offset &= 31
    if mode == "up":
        source = lane - offset
        inside = source >= highest
    elif mode == "down":
        source = lane + offset
        inside = source <= highest
    elif mode == "bfly":
        source = lane ^ offset
        inside = source <= highest
    else:
        source = lowest | (offset & ~segment)
        inside = source <= highest
    return np.where(inside, source, lane), inside


def shuffle(value: Array, mode: str, offset: Array, clamp: Array) -> tuple[Array, Array]:
    """`shfl.sync` with operands that are not constants: (values, in range)."""
    offset, clamp = (np.broadcast_to(x, LANES).astype(i64) for x in (offset, clamp))
    if (offset == offset[0]).all() and (clamp == clamp[0]).all():
        source, inside = shuffle_sources(mode, int(offset[0]), int(clamp[0]))
    else:
        both = [shuffle_sources(mode, int(o), int(c)) for o, c in zip(offset, clamp, strict=True)]
        source = np.array([both[lane][0][lane] for lane in range(LANES)])
        inside = np.array([both[lane][1][lane] for lane in range(LANES)])
    return value[source], inside


def ballot(predicate: Array, active: Array | None) -> Array:
    """`vote.sync.ballot.b32`: bit i is lane i's predicate; 0 for lanes that don't take part."""
    taking_part = predicate if active is None else predicate & active
    return np.full(LANES, np.packbits(taking_part, bitorder="little").view(u32)[0], u32)


def vote(mode: str, predicate: Array, active: Array | None) -> Array:
    """`vote.sync.{all,any,uni}.pred`."""
    taking_part = predicate if active is None else predicate[active]
    everyone, someone = bool(taking_part.all()), bool(taking_part.any())
    result = {"all": everyone, "any": someone, "uni": everyone or not someone}[mode]
    return np.full(LANES, result)


def reduce_lanes(operation: str, value: Array, active: Array | None) -> Array:
    """`redux.sync` over the active lanes."""
    taking_part = value if active is None else value[active]
    function = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
        "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[operation]  # fmt: skip
    return np.full(LANES, function.reduce(taking_part, dtype=value.dtype), value.dtype)
