# SPDX-License-Identifier: Apache-2.0
"""Tensor maps: what TMA does with the 128 bytes that a host wrapper builds.

CuTe DSL's host code writes the descriptor itself, without `cuTensorMapEncodeTiled`, and its bits
are not documented. The layout below was worked out by encoding known tensors (ranks 1 to 5, 16-bit
and 32-bit types, no, 64-byte and 128-byte swizzle), and holds for what this project's kernels use;
fields that were never seen set are required to be zero. Only the first 64 bytes carry meaning.

    byte 0   base address                         byte 32  size - 1 of dimensions 0 to 4, 4 bytes
    each byte 8   flags: 4-6 rank - 1, 7-10 type,      byte 52  3 bits each: element stride - 1
             11-12 interleave, 13-14 swizzle      byte 55  box - 1 of dimensions 0 to 4, a byte each
    byte 12  strides / 16 of dimensions 1 to 4, low 32 bits; byte 28: their high 4 bits
"""

from __future__ import annotations

import dataclasses
import math
import struct

import numpy as np

from .alu import Array, u8, u16, u32, u64
from .errors import Misaligned, ProtocolError

MAP_BYTES = 128
_ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2}
FLOAT32, BFLOAT16, FLOAT16 = 7, 10, 6
# Swizzle mode to the bits of the row number that are xored into the 16-byte chunk number.
SWIZZLE_MASK = {0: 0, 1: 1, 2: 3, 3: 7}
# Mode to the bytes of a row of the box that it allows.
_SWIZZLE_BYTES = {1: 32, 2: 64, 3: 128}


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A tiled tensor map; dimension 0 is the contiguous one, strides are in bytes."""

    base: int
    data_type: int
    swizzle: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes per element."""
        return _ELEMENT_BYTES[self.data_type]

    @property
    def box_bytes(self) -> int:
        """Bytes of a box in shared memory: what completes on the mbarrier, in bounds or not."""
        return math.prod(self.box) * self.item_bytes

    @property
    def dtype(self) -> type:
        """An integer type of the element's width."""
        return {1: u8, 2: u16, 4: u32, 8: u64}[self.item_bytes]


def decode(raw: bytes) -> TensorMap:
    """The map in its 128 bytes."""
    base, flags = struct.unpack_from("<QI", raw, 0)
    rank = (flags >> 4 & 7) + 1
    data_type = flags >> 7 & 15
    if flags >> 11 & 3:
        raise NotImplementedError("an interleaved tensor map")
    if rank > 5 or data_type not in _ELEMENT_BYTES:
        raise ProtocolError(f"not a tensor map: rank {rank}, type {data_type}")
    low = struct.unpack_from("<4I", raw, 12)
    (high,) = struct.unpack_from("<I", raw, 28)
    sizes = struct.unpack_from("<5I", raw, 32)
    element_strides = int.from_bytes(raw[52:54], "little")
    if element_strides & 0x7FFF:
        raise NotImplementedError("a tensor map with element strides")
    strides = [(low[i] | (high >> 4 * i & 15) << 32) * 16 for i in range(4)]
    return TensorMap(
        base=base,
        data_type=data_type,
        swizzle=flags >> 13 & 3,
        sizes=tuple(size + 1 for size in sizes[:rank]),
        strides=(_ELEMENT_BYTES[data_type], *strides[: rank - 1]),
        box=tuple(raw[55 + i] + 1 for i in range(rank)),
    )


def encode(tensor_map: TensorMap) -> bytes:
    """The inverse of `decode`, for tests."""
    rank = len(tensor_map.sizes)
    flags = (rank - 1) << 4 | tensor_map.data_type << 7 | tensor_map.swizzle << 13
    raw = bytearray(MAP_BYTES)
    struct.pack_into("<QI", raw, 0, tensor_map.base, flags)
    high = 0
    for index, stride in enumerate(tensor_map.strides[1:]):
        struct.pack_into("<I", raw, 12 + 4 * index, stride // 16 & 0xFFFFFFFF)
        high |= (stride // 16 >> 32) << 4 * index
    struct.pack_into("<I", raw, 28, high)
    for index in range(rank):
        struct.pack_into("<I", raw, 32 + 4 * index, tensor_map.sizes[index] - 1)
        raw[55 + index] = tensor_map.box[index] - 1
    return bytes(raw)


@dataclasses.dataclass(frozen=True)
class Region:
    """The part of a box that lies inside the tensor; dimensions slowest first."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    inside: tuple[slice, ...]
    """Where the part is in the box."""

    @property
    def empty(self) -> bool:
        """Whether the whole box is outside."""
        return 0 in self.shape


def region(tensor_map: TensorMap, coordinates: tuple[int, ...]) -> Region:
    """Clip the box at `coordinates` (dimension 0 first; negative ones are allowed)."""
    rank = len(tensor_map.sizes)
    if len(coordinates) != rank:
        raise ProtocolError(f"{len(coordinates)} coordinates for a tensor map of rank {rank}")
    low = [max(0, coordinate) for coordinate in coordinates]
    high = [
        max(start, min(size, coordinate + box))
        for start, size, coordinate, box in zip(
            low, tensor_map.sizes, coordinates, tensor_map.box, strict=True
        )
    ]
    backwards = range(rank - 1, -1, -1)
    return Region(
        address=tensor_map.base + sum(x * s for x, s in zip(low, tensor_map.strides, strict=True)),
        shape=tuple(high[d] - low[d] for d in backwards),
        strides=tuple(tensor_map.strides[d] for d in backwards),
        inside=tuple(slice(low[d] - coordinates[d], high[d] - coordinates[d]) for d in backwards),
    )


def swizzled_chunks(first: int, count: int, mode: int) -> Array:
    """Where the 16-byte chunks of a box that starts at chunk `first` are (PTX ISA, Swizzling
    Modes): the row of 128 bytes, modulo 8, 4 or 2, is xored into the chunk's number."""
    chunks = np.arange(first, first + count)
    return chunks ^ ((chunks >> 3) & SWIZZLE_MASK[mode])


def check_shared_address(tensor_map: TensorMap, offset: int) -> None:
    """TMA's shared-memory address is a multiple of 128 bytes (16 without swizzle: see PTX ISA,
    cp.async.bulk.tensor), and a row of a swizzled box fits its pattern."""
    if offset % 128:
        raise Misaligned(f"TMA: shared memory address {offset:#x} is not a multiple of 128")
    if tensor_map.swizzle:
        row, allowed = tensor_map.box[0] * tensor_map.item_bytes, _SWIZZLE_BYTES[tensor_map.swizzle]
        if row > allowed:
            raise ProtocolError(f"TMA: a row of {row} bytes with a {allowed}-byte swizzle")
