# SPDX-License-Identifier: Apache-2.0
"""Global, shared and tensor memory: bytes, bounds, poison.

Global memory is the process's own: kernels get the real pointers of the operands, and every access
is checked against the buffers that were registered for the launch. Shared and tensor memory start
as all-ones bytes, NaN in every float type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .alu import LANES, Array, f32, flush, i64, u8, u16, u32, u64
from .errors import Misaligned, OutOfBounds

_LOWEST = 4096  # an array can't start at address 0
_SPAN = (1 << 47) - 2 * _LOWEST  # user space of x86-64 and of 48-bit AArch64


class _AddressSpace:
    """Makes `np.asarray` give a view of the process's memory: nothing is copied or touched."""

    def __init__(
        self, address: int, shape: Sequence[int], dtype: Any, strides: Sequence[int] | None = None
    ) -> None:
        self.__array_interface__ = {
            "shape": tuple(shape),
            "typestr": np.dtype(dtype).str,
            "data": (address, False),
            "strides": None if strides is None else tuple(strides),
            "version": 3,
        }


_PROCESS = {
    dtype: np.asarray(_AddressSpace(_LOWEST, (_SPAN // np.dtype(dtype).itemsize,), dtype))
    for dtype in (u8, u16, u32, u64)
}
CELL = 4  # bytes per cell of the happens-before shadows


@dataclasses.dataclass
class Buffer:
    """A registered range of global memory."""

    name: str
    start: int
    size: int


class GlobalMemory:
    """The registered buffers. An access anywhere else is an error that names the nearest one."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._starts = np.zeros(0, u64)
        self._ends = np.zeros(0, u64)
        self.version = 0
        """Changes with every write: who polls need not look again before."""

    def register(self, address: int, size: int, name: str) -> None:
        """Allow accesses to [address, address + size)."""
        self.buffers = sorted([*self.buffers, Buffer(name, address, size)], key=lambda b: b.start)
        self._index()

    def unregister(self, address: int) -> None:
        """Forget the buffer that starts at `address`."""
        self.buffers = [buffer for buffer in self.buffers if buffer.start != address]
        self._index()

    def _index(self) -> None:
        self._starts = np.array([buffer.start for buffer in self.buffers], u64)
        self._ends = np.array([buffer.start + buffer.size for buffer in self.buffers], u64)

    def check(self, addresses: Array, size: int) -> None:
        """Every access of `size` bytes lies in one buffer, or OutOfBounds."""
        if len(self.buffers):
            index = np.searchsorted(self._starts, addresses, "right") - 1
            outside = (index < 0) | (addresses + u64(size) > self._ends[np.maximum(index, 0)])
        else:
            outside = np.ones(addresses.shape, bool)
        if outside.any():
            lane = int(np.argmax(outside))
            raise OutOfBounds(self._describe(int(addresses[lane]), size, lane))

    def _describe(self, address: int, size: int, lane: int) -> str:
        text = f"global memory access out of bounds: {size} bytes at {address:#x} (access {lane})"
        if not self.buffers:
            return f"{text}; no buffer is registered"
        nearest = min(
            self.buffers,
            key=lambda b: max(b.start - address, address + size - b.start - b.size),
        )
        offset = address - nearest.start
        return f"{text}; nearest is {nearest.name}, {nearest.size} bytes, at byte {offset} of it"

    def load(self, addresses: Array, count: int, dtype: type) -> list[Array]:
        """`count` consecutive elements at each address, by element."""
        index = self._element_index(addresses, count, dtype)
        return [_PROCESS[dtype][index + u64(item)] for item in range(count)]

    def store(self, addresses: Array, values: Sequence[Array], dtype: type) -> None:
        """The inverse of `load`; of lanes that hit the same address, the last one wins."""
        index = self._element_index(addresses, len(values), dtype)
        self.version += 1
        for item, value in enumerate(values):
            _PROCESS[dtype][index + u64(item)] = value

    def add(self, addresses: Array, values: Sequence[Array]) -> None:
        """Add float32 elements to memory, lane after lane where several hit one address."""
        index = self._element_index(addresses, len(values), f32)
        self.version += 1
        for item, value in enumerate(values):
            where, added = index + u64(item), flush(value)
            if len(np.unique(where)) == len(where):
                old = _PROCESS[u32][where].view(f32)
                _PROCESS[u32][where] = flush(flush(old) + added).view(u32)
                continue
            for place, number in zip(where, added, strict=True):
                old = _PROCESS[u32][place : place + u64(1)].view(f32)
                old[...] = flush(flush(old) + number)

    def _element_index(self, addresses: Array, count: int, dtype: type) -> Array:
        size = np.dtype(dtype).itemsize
        if (addresses % u64(size * count)).any():
            raise Misaligned(
                f"global access of {size * count} bytes at {addresses[0]:#x} is misaligned"
            )
        self.check(addresses, size * count)
        return (addresses - u64(_LOWEST)) // u64(size)

    def bytes(self, address: int, size: int, *, writes: bool = False) -> Array:
        """A view of a contiguous range, to be read or written at once."""
        self.check(np.array([address], u64), size)
        self.version += writes
        return _PROCESS[u8][address - _LOWEST : address - _LOWEST + size]

    def words(self, addresses: Array, size: int) -> bytes:
        """What there is at each address."""
        self.check(addresses, size)
        places = (addresses - u64(_LOWEST)).astype(i64)
        return _PROCESS[u8][places[:, None] + np.arange(size)].tobytes()

    def region(
        self,
        address: int,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: type,
        *,
        writes: bool = False,
    ) -> Array:
        """A strided view (slowest dimension first, strides in bytes), to be read or written at
        once."""
        self._check_region(address, shape, strides, np.dtype(dtype).itemsize)
        self.version += writes
        return np.asarray(_AddressSpace(address, shape, dtype, strides))

    def _check_region(
        self, address: int, shape: Sequence[int], strides: Sequence[int], item: int
    ) -> None:
        extent = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        self.check(np.array([address, address + extent], u64), item)

    # What an access touches -----------------------------------------------------------------------

    def buffer_at(self, address: int) -> tuple[Buffer, int]:
        """(buffer, byte) of an address that lies in one."""
        buffer = self.buffers[int(np.searchsorted(self._starts, u64(address), "right")) - 1]
        return buffer, address - buffer.start

    def cells(self, addresses: Array, size: int) -> list[tuple[Buffer, slice | Array]]:
        """By buffer, the 4-byte cells of accesses of `size` bytes each; some may repeat."""
        if len(addresses) == 1:
            buffer, offset = self.buffer_at(int(addresses[0]))
            return [(buffer, cell_slice(offset, size))]
        index = np.searchsorted(self._starts, addresses, "right") - 1
        found: list[tuple[Buffer, slice | Array]] = []
        for number in [index[0]] if (index == index[0]).all() else np.unique(index):
            buffer = self.buffers[int(number)]
            first = ((addresses[index == number] - u64(buffer.start)) // u64(CELL)).astype(i64)
            if size > CELL:
                first = (first[:, None] + np.arange(-(-size // CELL))).ravel()
            found.append((buffer, first))
        return found

    def region_cells(
        self, address: int, shape: Sequence[int], strides: Sequence[int], dtype: type
    ) -> list[tuple[Buffer, slice | Array]]:
        """The cells of a `region`."""
        self._check_region(address, shape, strides, np.dtype(dtype).itemsize)
        rows = np.array([address], u64)
        for count, stride in zip(shape[:-1], strides, strict=False):
            rows = (rows[:, None] + np.arange(count, dtype=u64) * u64(stride)).ravel()
        return self.cells(rows, shape[-1] * np.dtype(dtype).itemsize)


class SharedMemory:
    """One CTA's shared memory. Offsets count from the start of its window.

    The first 1 KiB is the system's (PTX ISA, `reserved_smem_offset_begin`), so dynamic shared
    memory starts there. `version` changes with every write: operands read for one MMA serve the
    next.
    """

    DYNAMIC_BASE = 1024
    RANK_SHIFT = 24  # of a shared::cluster address: the CTA's rank in the cluster
    OFFSET_MASK = (1 << RANK_SHIFT) - 1

    def __init__(self, dynamic_bytes: int) -> None:
        self.end = self.DYNAMIC_BASE + dynamic_bytes
        self.bytes = np.full((self.end + 15) // 16 * 16, 0xFF, u8)
        self.views = {dtype: self.bytes.view(dtype) for dtype in (u8, u16, u32, u64)}
        self.version = 0

    def check(self, offsets: Array, size: int) -> None:
        """Accesses of `size` bytes are inside and aligned."""
        if (offsets + u32(size) > self.end).any() or (offsets < self.DYNAMIC_BASE).any():
            outside = (offsets + u32(size) > self.end) | (offsets < self.DYNAMIC_BASE)
            offset = int(offsets[int(np.argmax(outside))])
            raise OutOfBounds(
                f"shared memory access out of bounds: {size} bytes at {offset:#x}, which has "
                f"[{self.DYNAMIC_BASE:#x}, {self.end:#x})"
            )
        alignment = min(size, 16)
        if (offsets & u32(alignment - 1)).any():
            raise Misaligned(f"shared access of {size} bytes at {int(offsets[0]):#x} is misaligned")

    def span(self, offset: int, size: int) -> Array:
        """A view of a contiguous range."""
        if offset < self.DYNAMIC_BASE or offset + size > self.end:
            raise OutOfBounds(
                f"shared memory access out of bounds: {size} bytes at {offset:#x}, which has "
                f"[{self.DYNAMIC_BASE:#x}, {self.end:#x})"
            )
        return self.bytes[offset : offset + size]


def cells_of(offsets: Array, size: int) -> Array:
    """The 4-byte cells that accesses of `size` bytes at these offsets touch."""
    first = np.unique(offsets >> u32(2)).astype(i64)
    if size <= CELL:
        return first
    return np.unique((first[:, None] + np.arange(size // CELL)).ravel())


def cell_slice(offset: int, size: int) -> slice:
    """The cells of a contiguous range."""
    return slice(offset // CELL, (offset + size + CELL - 1) // CELL)


class TensorMemory:
    """One CTA's tensor memory: 128 lanes of 512 columns of 32 bits (PTX ISA, Tensor Memory)."""

    LANES, COLUMNS = 128, 512

    def __init__(self) -> None:
        self.words = np.full((self.LANES, self.COLUMNS), 0xFFFFFFFF, u32)
        self.allocated: dict[int, int] = {}
        self.may_allocate = True

    def allocate(self, columns: int) -> int:
        """The first column of a new range."""
        if columns < 32 or columns > self.COLUMNS or columns & (columns - 1):
            raise OutOfBounds(
                f"tcgen05.alloc of {columns} columns: expected a power of two, 32 to 512"
            )
        column = 0
        for start in sorted(self.allocated):
            if start - column >= columns:
                break
            column = start + self.allocated[start]
        if column + columns > self.COLUMNS:
            raise OutOfBounds(f"tcgen05.alloc of {columns} columns: {self.allocated} are taken")
        self.allocated[column] = columns
        return column

    def check(self, column: int, columns: int) -> None:
        """The columns are allocated."""
        for start, size in self.allocated.items():
            if start <= column and column + columns <= start + size:
                return
        raise OutOfBounds(
            f"tensor memory access to columns [{column}, {column + columns}): allocated are "
            f"{sorted((s, s + n) for s, n in self.allocated.items())}"
        )

    @property
    def floats(self) -> Array:
        """The words as float32."""
        return self.words.view(f32)


def active_lanes(active: Array | None) -> Iterator[int]:
    """The numbers of the active lanes."""
    return iter(range(LANES)) if active is None else iter(np.flatnonzero(active).tolist())
