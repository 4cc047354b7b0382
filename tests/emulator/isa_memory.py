# SPDX-License-Identifier: Apache-2.0
"""Loads, stores and stmatrix / ldmatrix (PTX ISA: Data Movement Instructions). What orders them
between CTAs is in `isa_strong`."""

from __future__ import annotations

import numpy as np

from .alu import LANE, LANES, Array, u16, u32, u64
from .codegen import BITS, DTYPES, PARAMETER_BASE, Emitter, items
from .errors import OutOfBounds
from .global_races import Kind
from .instruction_set import Unit, instruction, runtime
from .memory import CELL, SharedMemory, cells_of
from .ptx import Instruction, Memory, Register, Sink, Symbol
from .warp import Warp

Modifiers = dict[str, str]

_STORAGE = {
    "u32": "u32",
    "i32": "u32",
    "f32": "u32",
    "u16": "u16",
    "i16": "u16",
    "u64": "u64",
    "i64": "u64",
}
_STORAGE |= {"f64": "u64", "u8": "u8", "i8": "u8"}
TYPES = "(type=.b8|.u8|.s8|.b16|.u16|.s16|.b32|.u32|.s32|.f32|.b64|.u64|.s64|.f64)"
_ORDER = "{.weak|.volatile|.relaxed.cta|.relaxed.cluster|.relaxed.gpu|.relaxed.sys"
_NARROW = "{.weak|.relaxed.cta|.relaxed.cluster"
CACHE = "{.ca|.cg|.cs|.lu|.cv}{.nc}{.L1::no_allocate|.L1::evict_first|.L1::evict_last}"
CACHE += "{.L2::64B|.L2::128B|.L2::256B}"
_ACQUIRE = _ORDER + "|.acquire.cta|.acquire.cluster|.acquire.gpu|.acquire.sys}"
_RELEASE = _ORDER + "|.release.cta|.release.cluster|.release.gpu|.release.sys}"
_SHARED = "(space=.shared|.shared::cta|.shared::cluster)"


@instruction(f"ld{{.weak}}.param{{::entry}}{{.v2|.v4}}{TYPES}", unit=Unit.memory)
def load_parameter(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """ld.param: from the launch's parameter block, at a constant offset."""
    destination, place = op.operands
    assert isinstance(place, Memory) and isinstance(place.base, Symbol)
    dtype = DTYPES[m["type"]]
    size = BITS[dtype] // 8
    parameter = e.parameters[place.base.name]
    targets = items(destination)
    if not 0 <= place.offset <= parameter.size - size * len(targets):
        raise OutOfBounds(f"PTX line {op.line}: ld.param beyond the parameter: {op.text}")
    for index, target in enumerate(targets):
        if isinstance(target, Sink):
            continue
        home = e.home(target)
        width = {"f32": "u32"}.get(home, home)
        signed = f"np.{'int' if dtype[0] == 'i' else 'uint'}{8 * size}"
        offset = parameter.offset + place.offset + index * size
        e.define(target, width, f"parameter(warp, {offset}, {size}, {signed}, {width})")


@runtime
def parameter(warp: Warp, offset: int, size: int, kind: type, dtype: type) -> Array:
    """A parameter in every lane, extended to its register by its type."""
    launch = warp.cluster.launch
    key = (offset, size, kind, dtype)
    value = launch.parameter_cache.get(key)
    if value is None:
        element = np.frombuffer(launch.parameters[offset : offset + size], kind)
        value = launch.parameter_cache[key] = np.repeat(element.astype(dtype), LANES)
    return value


@instruction(
    f"ld{_NARROW}|.acquire.cta|.acquire.cluster}}(space=.global){CACHE}{{count=.v2|.v4|.v8}}{TYPES}",
    f"ld{_ACQUIRE}{_SHARED}{{count=.v2|.v4}}{TYPES}",
    f"ld{_NARROW}|.acquire.cta|.acquire.cluster}}{{count=.v2|.v4}}{TYPES}",
    unit=Unit.memory,
)
def load(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """ld: global, shared, or generic. Orders within a cluster and cache hints change nothing in
    this memory model."""
    emit_load(e, op, m, _access("load", m.get("space", "")))


def storage(m: Modifiers) -> str:
    """The NumPy type of an instruction's `.type` in memory."""
    return _STORAGE[DTYPES[m["type"]]]


def emit_load(e: Emitter, op: Instruction, m: Modifiers, function: str, *more: str) -> None:
    """A load by a run-time function, with more arguments than the usual ones."""
    destination, place = op.operands[:2]
    dtype = storage(m)
    targets = items(destination)
    name = e.temporary()
    arguments = (e.address(place), str(len(targets)), dtype, e.active, str(e.line), *more)
    e.emit(f"{name} = {function}(warp, {', '.join(arguments)})")
    for index, target in enumerate(targets):
        if isinstance(target, Sink):
            continue
        value, home = f"{name}[{index}]", e.home(target)
        if BITS[home] > BITS[dtype]:  # a narrow load extends to its register
            signed = "i" if m["type"][0] == "s" else "u"
            view = f".view({signed}{BITS[dtype]})" if signed == "i" else ""
            e.define(
                target,
                f"u{BITS[home]}",
                f"{value}{view}.astype({signed}{BITS[home]}).view(u{BITS[home]})",
            )
        else:
            e.define(target, dtype, value)


@instruction(
    f"st{_NARROW}|.release.cta|.release.cluster}}(space=.global){CACHE}{{count=.v2|.v4|.v8}}{TYPES}",
    f"st{_RELEASE}{_SHARED}{{count=.v2|.v4}}{TYPES}",
    f"st{_NARROW}|.release.cta|.release.cluster}}{{count=.v2|.v4}}{TYPES}",
    unit=Unit.memory,
)
def store(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """st; see `load`."""
    emit_store(e, op, m, _access("store", m.get("space", "")))


def emit_store(e: Emitter, op: Instruction, m: Modifiers, function: str, *more: str) -> None:
    """A store by a run-time function, with more arguments than the usual ones."""
    place, source = op.operands[:2]
    dtype = storage(m)
    values = []
    for item in items(source):
        home = e.home(item) if isinstance(item, Register) else dtype
        if BITS[home] > BITS[dtype]:
            values.append(f"{e.lanes(item, f'u{BITS[home]}')}.astype({dtype})")
        else:
            values.append(e.lanes(item, dtype))
    arguments = (e.address(place), f"({', '.join(values)},)", dtype, e.active, str(e.line), *more)
    e.emit(f"{function}(warp, {', '.join(arguments)})")


def _access(verb: str, space: str) -> str:
    if space == "global":
        return f"{verb}_global"
    return f"{verb}_shared" if space else f"{verb}_generic"


@runtime
def load_global(
    warp: Warp,
    address: Array,
    count: int,
    dtype: type,
    active: Array | None,
    line: int,
    kind: Kind = Kind.read,
) -> list[Array]:
    """Loads of the active lanes; the others get the value of an active one."""
    addresses = np.broadcast_to(address, LANES)
    if active is not None:
        if not active.any():
            return [np.zeros(LANES, dtype)] * count
        addresses = np.where(active, addresses, addresses[int(np.argmax(active))])
    if int(addresses[0]) >= PARAMETER_BASE:
        raise NotImplementedError("a load from a kernel parameter's generic address")
    size = count * np.dtype(dtype).itemsize
    lanes = LANES if active is None else int(active.sum())
    warp.counts["global bytes read"] += size * lanes
    memory = warp.cluster.launch.memory
    values = memory.load(addresses, count, dtype)
    if warp.cluster.checker is not None:
        warp.cluster.checker.access_global(warp, kind, memory.cells(addresses, size), line)
    return values


def of_active_lanes(
    address: Array, values: tuple[Array, ...], active: Array | None
) -> tuple[Array, tuple[Array, ...]]:
    """Addresses and values of the lanes that execute."""
    addresses = np.broadcast_to(address, LANES)
    if active is None:
        return addresses, values
    return addresses[active], tuple(value[active] for value in values)


@runtime
def store_global(
    warp: Warp,
    address: Array,
    values: tuple[Array, ...],
    dtype: type,
    active: Array | None,
    line: int,
    kind: Kind = Kind.write,
) -> None:
    """Stores of the active lanes."""
    addresses, values = of_active_lanes(address, values, active)
    if not len(addresses):
        return
    size = len(values) * np.dtype(dtype).itemsize
    warp.counts["global bytes written"] += size * len(addresses)
    memory = warp.cluster.launch.memory
    memory.store(addresses, values, dtype)
    if warp.cluster.checker is not None:
        warp.cluster.checker.access_global(warp, kind, memory.cells(addresses, size), line)


def own_offsets(warp: Warp, address: Array, active: Array | None, size: int) -> Array:
    """Offsets of accesses to the warp's own CTA's shared memory, checked; inactive lanes repeat
    one."""
    addresses = np.broadcast_to(address, LANES)
    if active is not None:
        addresses = np.where(active, addresses, addresses[int(np.argmax(active))])
    if (addresses >> u32(SharedMemory.RANK_SHIFT) != warp.cta.rank).any():
        raise NotImplementedError("ld or st of another CTA's shared memory")
    offsets = addresses & u32(SharedMemory.OFFSET_MASK)
    warp.cta.shared.check(offsets, size)
    return offsets


@runtime
def load_shared(
    warp: Warp, address: Array, count: int, dtype: type, active: Array | None, line: int
) -> list[Array]:
    """Loads from the CTA's own shared memory."""
    if active is not None and not active.any():
        return [np.zeros(LANES, dtype)] * count
    item = np.dtype(dtype).itemsize
    offsets = own_offsets(warp, address, active, item * count)
    warp.counts["shared bytes read"] += (
        item * count * (LANES if active is None else int(active.sum()))
    )
    checker = warp.cluster.checker
    if checker is not None:
        used = offsets if active is None else offsets[active]
        shadow = checker.shared[warp.cta.rank]
        checker.warp_reads(warp, shadow, cells_of(used, item * count), line)
    index = offsets // u32(item)
    view = warp.cta.shared.views[dtype]
    return [view[index + u32(element)] for element in range(count)]


@runtime
def store_shared(
    warp: Warp,
    address: Array,
    values: tuple[Array, ...],
    dtype: type,
    active: Array | None,
    line: int,
) -> None:
    """Stores to the CTA's own shared memory."""
    if active is not None and not active.any():
        return
    item = np.dtype(dtype).itemsize
    offsets = own_offsets(warp, address, active, item * len(values))
    if active is not None:
        offsets, values = offsets[active], tuple(value[active] for value in values)
    warp.counts["shared bytes written"] += item * len(values) * len(offsets)
    checker = warp.cluster.checker
    if checker is not None:
        cells = cells_of(offsets, item * len(values))
        checker.warp_writes(warp, checker.shared[warp.cta.rank], cells, line)
    index = offsets // u32(item)
    shared = warp.cta.shared
    shared.version += 1
    for element, value in enumerate(values):
        shared.views[dtype][index + u32(element)] = value


@runtime
def load_generic(
    warp: Warp, address: Array, count: int, dtype: type, active: Array | None, line: int
) -> list[Array]:
    """A generic load: shared addresses are below 4 GiB, those of the process above."""
    function = load_shared if is_shared(address, active) else load_global
    narrow = address.astype(u32) if function is load_shared else address
    return function(warp, narrow, count, dtype, active, line)  # type: ignore[return-value]


@runtime
def store_generic(
    warp: Warp,
    address: Array,
    values: tuple[Array, ...],
    dtype: type,
    active: Array | None,
    line: int,
) -> None:
    """A generic store; see `load_generic`."""
    function = store_shared if is_shared(address, active) else store_global
    narrow = address.astype(u32) if function is store_shared else address
    function(warp, narrow, values, dtype, active, line)


def is_shared(address: Array, active: Array | None) -> bool:
    """Whether a generic address is one of shared memory."""
    addresses = np.broadcast_to(address, LANES)
    used = (addresses if active is None else addresses[active]) < u64(1 << 32)
    if used.any() != used.all():
        raise NotImplementedError("a generic access to shared memory in some lanes only")
    return bool(used.all())


# stmatrix, ldmatrix -------------------------------------------------------------------------------


@instruction(
    "stmatrix.sync.aligned.m8n8(count=.x1|.x2|.x4){trans=.trans}{.shared|.shared::cta}.b16",
    unit=Unit.shared,
    convergent=True,
)
def store_matrix(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """stmatrix: 8x8 matrices of 16-bit elements from fragments."""
    place, source = op.operands
    values = ", ".join(e.lanes(x, "u32") for x in items(source))
    assert len(items(source)) == int(m["count"][1:]) and e.mask is None
    e.emit(f"store_matrices(warp, {e.address(place)}, ({values},), {bool(m['trans'])}, {e.line})")


@instruction(
    "ldmatrix.sync.aligned.m8n8(count=.x1|.x2|.x4){trans=.trans}{.shared|.shared::cta}.b16",
    unit=Unit.shared,
    convergent=True,
)
def load_matrix(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """ldmatrix: the inverse of stmatrix."""
    destination, place = op.operands
    targets = items(destination)
    assert len(targets) == int(m["count"][1:]) and e.mask is None
    name = e.temporary()
    arguments = f"{e.address(place)}, {len(targets)}, {bool(m['trans'])}, {e.line}"
    e.emit(f"{name} = load_matrices(warp, {arguments})")
    for index, target in enumerate(targets):
        e.define(target, "u32", f"{name}[{index}]")


def _rows(warp: Warp, address: Array, count: int) -> Array:
    """Offsets [matrix, row]: lanes 8 i to 8 i + 7 give the rows of matrix i."""
    offsets = own_offsets(warp, address, None if count == 4 else LANE < 8 * count, 16)
    return offsets[: 8 * count].reshape(count, 8)


@runtime
def store_matrices(
    warp: Warp, address: Array, values: tuple[Array, ...], transposed: bool, line: int
) -> None:
    """Lane l holds row l // 4, columns 2 (l % 4) and the next; transposed: column and rows."""
    rows = _rows(warp, address, len(values))
    shared = warp.cta.shared
    shared.version += 1
    warp.counts["shared bytes written"] += 128 * len(values)
    checker = warp.cluster.checker
    if checker is not None:
        cells = cells_of(rows.ravel(), 4 * CELL)
        checker.warp_writes(warp, checker.shared[warp.cta.rank], cells, line)
    for row, value in zip(rows, values, strict=True):
        matrix = np.ascontiguousarray(value).view(u16).reshape(8, 8)
        elements = (row[:, None] >> u32(1)) + np.arange(8, dtype=u32)
        shared.views[u16][elements] = matrix.T if transposed else matrix


@runtime
def load_matrices(
    warp: Warp, address: Array, count: int, transposed: bool, line: int
) -> list[Array]:
    """See `store_matrices`."""
    rows = _rows(warp, address, count)
    warp.counts["shared bytes read"] += 128 * count
    checker = warp.cluster.checker
    if checker is not None:
        cells = cells_of(rows.ravel(), 4 * CELL)
        checker.warp_reads(warp, checker.shared[warp.cta.rank], cells, line)
    result = []
    for row in rows:
        matrix = warp.cta.shared.views[u16][(row[:, None] >> u32(1)) + np.arange(8, dtype=u32)]
        matrix = np.ascontiguousarray(matrix.T if transposed else matrix)
        result.append(matrix.view(u32).reshape(LANES))
    return result


@runtime
def map_to_rank(address: Array, rank: Array) -> Array:
    """mapa: the offset stays, the CTA changes."""
    dtype = address.dtype.type
    return (address & dtype(SharedMemory.OFFSET_MASK)) | (
        rank.astype(dtype) << dtype(SharedMemory.RANK_SHIFT)
    )
