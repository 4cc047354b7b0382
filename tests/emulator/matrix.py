# SPDX-License-Identifier: Apache-2.0
"""Matrix descriptors and operands of wgmma and tcgen05.mma.

Sources: PTX ISA, Matrix Descriptor and Strides (wgmma); Shared Memory Descriptor and Instruction
Descriptor (tcgen05). Offsets of elements follow the canonical layouts given there.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from .alu import Array, f32, from_bf16, from_f16, u16, u32
from .errors import Misaligned, OutOfBounds, ProtocolError
from .memory import SharedMemory

# Layout to (bytes of a pattern's row, bits of the row number xored into the chunk number).
PATTERNS = {"none": (16, 0), "32": (32, 1), "64": (64, 3), "128": (128, 7)}
_WGMMA_LAYOUTS = {0: "none", 1: "128", 2: "64", 3: "32"}
_TCGEN05_LAYOUTS = {0: "none", 2: "128", 4: "64", 6: "32"}


@dataclasses.dataclass(frozen=True)
class SharedDescriptor:
    """A matrix in shared memory: where it starts and how its core matrices are laid out, in
    bytes."""

    start: int
    layout: str
    leading_offset: int
    stride_offset: int


def wgmma_descriptor(bits: int) -> SharedDescriptor:
    """Decode the 64-bit matrix descriptor of wgmma."""
    return _descriptor(bits, _WGMMA_LAYOUTS[bits >> 62 & 3])


def tcgen05_descriptor(bits: int) -> SharedDescriptor:
    """Decode the 64-bit shared memory descriptor of tcgen05.mma."""
    if bits >> 46 & 7 != 1:
        raise ProtocolError(f"tcgen05 descriptor {bits:#x}: bits 46-48 must be 0b001")
    if bits >> 52 & 1:
        raise NotImplementedError("tcgen05 descriptor with absolute leading dimension")
    layout = bits >> 61 & 7
    if layout not in _TCGEN05_LAYOUTS:
        raise NotImplementedError(f"tcgen05 descriptor with swizzling mode {layout}")
    return _descriptor(bits, _TCGEN05_LAYOUTS[layout])


def _descriptor(bits: int, layout: str) -> SharedDescriptor:
    start = (bits & 0x3FFF) << 4
    if bits >> 49 & 7:
        raise NotImplementedError("matrix descriptor with a base offset")
    row, mask = PATTERNS[layout]
    # With base offset 0 the pattern repeats from a multiple of 8 of its rows (of 128 bytes' worth).
    if mask and (start >> 7) & mask:
        raise Misaligned(
            f"matrix descriptor: start {start:#x} with base offset 0 is not in the first row of a "
            f"{row}-byte swizzle pattern, which repeats every {8 * row} bytes"
        )
    return SharedDescriptor(start, layout, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4)


@functools.lru_cache(4096)
def element_offsets(
    descriptor: SharedDescriptor, rows: int, depth: int, mn_major: bool, item: int = 2
) -> Array:
    """Byte offsets [rows, depth] in shared memory of an operand with `rows` of M or N and `depth`
    of K."""
    per_chunk = 16 // item
    row, mask = PATTERNS[descriptor.layout]
    leading, stride = descriptor.leading_offset, descriptor.stride_offset
    i, j = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if not mn_major:
        if descriptor.layout == "none":
            offsets = i % 8 * 16 + i // 8 * stride + j % per_chunk * item + j // per_chunk * leading
        else:
            offsets = i % 8 * row + i // 8 * stride + j * item
    elif descriptor.layout == "none":
        offsets = i % per_chunk * item + i // per_chunk * stride + j % 8 * 16 + j // 8 * leading
    else:
        width = row // item
        offsets = i % width * item + i // width * leading + j % 8 * row + j // 8 * stride
    offsets = np.broadcast_to(offsets, (rows, depth)) + descriptor.start
    return np.ascontiguousarray(offsets ^ ((offsets >> 7 & mask) << 4)) & 0x3FFFF


@functools.lru_cache(4096)
def operand_cells(
    descriptor: SharedDescriptor,
    rows: int,
    depth: int,
    mn_major: bool,
    first: int = 0,
    last: int | None = None,
) -> Array:
    """The 4-byte cells of rows [first, last) of an operand."""
    return np.unique(element_offsets(descriptor, rows, depth, mn_major)[first:last] >> 2)


def read_operand(
    shared: SharedMemory,
    descriptor: SharedDescriptor,
    rows: int,
    depth: int,
    mn_major: bool,
    kind: str,
) -> Array:
    """An operand [rows, depth] as float32."""
    offsets = element_offsets(descriptor, rows, depth, mn_major)
    lowest, highest = int(offsets.min()), int(offsets.max())
    if lowest < shared.DYNAMIC_BASE or highest + 2 > shared.end:
        raise OutOfBounds(
            f"matrix operand at {lowest:#x} to {highest + 2:#x} is outside shared memory, "
            f"[{shared.DYNAMIC_BASE:#x}, {shared.end:#x})"
        )
    return widen(shared.views[u16][offsets >> 1], kind)


def widen(bits: Array, kind: str) -> Array:
    """bf16 or f16 bits to float32."""
    return from_bf16(bits) if kind == "bf16" else from_f16(bits)


def product(a: Array, b: Array) -> Array:
    """a [M, K] times b [N, K] transposed, in float32. The tensor core's own summation order and
    rounding within one instruction are not documented, so the last bits may differ from
    hardware."""
    return a @ b.T


@dataclasses.dataclass(frozen=True)
class InstructionDescriptor:
    """tcgen05.mma kind::f16: types, majors and shape (PTX ISA, Instruction descriptor)."""

    a_kind: str
    b_kind: str
    a_mn_major: bool
    b_mn_major: bool
    negate: bool
    rows: int
    columns: int

    @classmethod
    def decode(cls, bits: int) -> InstructionDescriptor:
        """From the 32-bit descriptor."""
        if bits >> 4 & 3 != 1:
            raise NotImplementedError("tcgen05.mma with an accumulator that isn't float32")
        if bits & 0b111 or bits >> 3 & 1:
            raise NotImplementedError("tcgen05.mma with sparsity or saturation")
        kinds = {0: "f16", 1: "bf16"}
        a_kind, b_kind = bits >> 7 & 7, bits >> 10 & 7
        if a_kind not in kinds or b_kind not in kinds:
            raise ProtocolError(f"tcgen05.mma kind::f16 with types {a_kind}, {b_kind}")
        return cls(
            a_kind=kinds[a_kind],
            b_kind=kinds[b_kind],
            a_mn_major=bool(bits >> 15 & 1),
            b_mn_major=bool(bits >> 16 & 1),
            negate=bool((bits >> 13 & 1) ^ (bits >> 14 & 1)),
            rows=(bits >> 24 & 31) * 16,
            columns=(bits >> 17 & 63) * 8,
        )


def fragment_rows(values: list[Array], kind: str, depth: int) -> Array:
    """A of wgmma from registers: a warp's [16, depth] (PTX ISA, Register Fragments for wgmma)."""
    operand = np.empty((16, depth), f32)
    for index, value in enumerate(values):
        # Lane l has row l // 4 and columns 2 (l % 4), + 1; odd registers are 8 rows further down.
        quarter = widen(np.ascontiguousarray(value).view(u16), kind).reshape(8, 8)
        row, column = 8 * (index & 1), 8 * (index >> 1)
        operand[row : row + 8, column : column + 8] = quarter
    return operand


def accumulator_fragments(block: Array) -> Array:
    """A warp's [16, N] of D as registers [N / 2, 32 lanes] (PTX ISA, Register Fragments for
    wgmma)."""
    columns = block.shape[1]
    parts = block.reshape(2, 8, columns // 8, 4, 2)  # row half, row, column group, lane % 4, column
    return np.ascontiguousarray(parts.transpose(2, 0, 4, 1, 3)).reshape(columns // 2, 32)


def accumulator_block(fragments: Array) -> Array:
    """The inverse of `accumulator_fragments`."""
    columns = 2 * len(fragments)
    parts = fragments.reshape(columns // 8, 2, 2, 8, 4)  # column group, row half, column, row, lane
    return np.ascontiguousarray(parts.transpose(1, 3, 0, 4, 2)).reshape(16, columns)


def shared_words(words: Array) -> Array:
    """Words of tensor memory as 16-bit elements [lanes, 2 x columns]."""
    return np.ascontiguousarray(words.astype(u32, copy=False)).view(u16)
