# SPDX-License-Identifier: Apache-2.0
"""Asynchronous copies: cp.async, cp.async.bulk, TMA (PTX ISA: Asynchronous Copy Operations).

A bulk instruction runs on the uniform datapath: where all active lanes agree on its operands, the
warp issues one operation, as the machine code of such kernels does; otherwise one per lane.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import numpy as np

from . import tensor_map
from .alu import LANES, Array, f32, u8, u64
from .barriers import MBarrier
from .codegen import DTYPES, PARAMETER_BASE, Emitter
from .errors import Misaligned, ProtocolError
from .global_races import Kind, Places
from .instruction_set import Unit, instruction, runtime
from .isa_barriers import mbarrier_at
from .isa_memory import own_offsets
from .memory import active_lanes, cell_slice, cells_of
from .ptx import Immediate, Instruction, Memory, Vector
from .scheduler import Cta
from .tensor_map import Region, TensorMap
from .warp import PendingStore, PendingWrite, Warp

Modifiers = dict[str, str]
_HINT = "{.L2::cache_hint}"
_DIMENSIONS = "(rank=.1d|.2d|.3d|.4d|.5d)"
_MULTICAST = "{multicast=.multicast::cluster}"


def _coordinates(e: Emitter, operand: Memory, rank: str) -> str:
    assert isinstance(operand.coordinates, Vector)
    assert len(operand.coordinates.items) == int(rank[0])
    return "(" + "".join(f"{e.value(x, 'i32')}, " for x in operand.coordinates.items) + ")"


def _memory(op: Instruction, index: int) -> Memory:
    operand = op.operands[index]
    assert isinstance(operand, Memory)
    return operand


def _three(e: Emitter, op: Instruction) -> str:
    """Destination, source and size of a bulk copy."""
    destination, source, size = op.operands[:3]
    return f"{e.address(destination)}, {e.address(source)}, {e.value(size, 'u32')}"


# TMA ----------------------------------------------------------------------------------------------


@instruction(
    f"cp.async.bulk.tensor{_DIMENSIONS}.shared::cluster.global{{.tile}}"
    f".mbarrier::complete_tx::bytes{_MULTICAST}{{group=.cta_group::1|.cta_group::2}}{_HINT}",
    f"cp.async.bulk.tensor{_DIMENSIONS}.shared::cluster.global{{.tile}}"
    f".mbarrier::complete_tx::bytes{_MULTICAST}.L2::cache_hint(group=.cta_group::1|.cta_group::2)",
    f"cp.async.bulk.tensor{_DIMENSIONS}.shared::cta.global{{.tile}}.mbarrier::complete_tx::bytes{_HINT}",
    unit=Unit.bulk,
)
def load_tensor(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """cp.async.bulk.tensor, global to shared: outside the tensor is zero, the whole box counts."""
    destination, source, barrier = (_memory(op, i) for i in range(3))
    mask = e.value(op.operands[3], "u16") if m.get("multicast") else "None"
    arguments = ", ".join([
        e.address(destination), e.address(Memory(source.base, source.offset)),
        _coordinates(e, source, m["rank"]), e.address(barrier), mask, e.active, str(e.line),
    ])  # fmt: skip
    e.emit(f"issue_tensor_load(warp, {arguments})")


@instruction(
    f"cp.async.bulk.tensor{_DIMENSIONS}.global.shared::cta{{.tile}}.bulk_group{_HINT}",
    f"cp.reduce.async.bulk.tensor{_DIMENSIONS}.global.shared::cta(reduction=.add){{.tile}}.bulk_group{_HINT}",
    unit=Unit.bulk,
)
def store_tensor(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """cp.async.bulk.tensor and cp.reduce.async.bulk.tensor, shared to global: clipped to the
    tensor."""
    destination, source = _memory(op, 0), _memory(op, 1)
    arguments = ", ".join([
        e.address(Memory(destination.base, destination.offset)),
        _coordinates(e, destination, m["rank"]), e.address(source), str(bool(m.get("reduction"))),
        e.active, str(e.line),
    ])  # fmt: skip
    e.emit(f"issue_tensor_store(warp, {arguments})")


@instruction(
    f"cp.async.bulk.prefetch.tensor{_DIMENSIONS}.L2.global{{.tile}}{_HINT}", unit=Unit.memory
)
def prefetch_tensor(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """Performance only."""


# Bulk copies --------------------------------------------------------------------------------------


@instruction(
    f"cp.async.bulk(.shared::cluster|.shared::cta).global.mbarrier::complete_tx::bytes{_HINT}",
    unit=Unit.bulk,
)
def bulk_load(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """cp.async.bulk, global to shared."""
    arguments = _three(e, op)
    e.emit(f"issue_bulk_load(warp, {arguments}, {e.address(op.operands[3])}, {e.active}, {e.line})")


@instruction(
    "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes", unit=Unit.bulk
)
def bulk_between(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """cp.async.bulk from the CTA's shared memory to another's (DSMEM)."""
    arguments = _three(e, op)
    e.emit(
        f"issue_bulk_between(warp, {arguments}, {e.address(op.operands[3])}, {e.active}, {e.line})"
    )


@instruction(
    f"cp.async.bulk.global.shared::cta.bulk_group{_HINT}",
    f"cp.reduce.async.bulk.global.shared::cta.bulk_group{_HINT}(reduction=.add)(type=.f32|.u32|.s32)",
    unit=Unit.bulk,
)
def bulk_store(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """cp.async.bulk and cp.reduce.async.bulk, shared to global."""
    kind = DTYPES[m["type"]] if m.get("reduction") else "None"
    arguments = _three(e, op)
    e.emit(f"issue_bulk_store(warp, {arguments}, {kind}, {e.active}, {e.line})")


@instruction("cp.async.bulk.commit_group", unit=Unit.bulk)
def bulk_commit(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """cp.async.bulk.commit_group: groups belong to a thread; here, to the warp."""
    e.emit(f"commit_stores(warp, {e.active})")


@instruction("cp.async.bulk.wait_group{read=.read}", unit=Unit.bulk, ends_block=True)
def bulk_wait(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """cp.async.bulk.wait_group: `.read` waits until the sources have been read, only."""
    (count,) = op.operands
    assert isinstance(count, Immediate)
    e.emit(f"wait_stores(warp, {count.value}, {bool(m['read'])}, {e.active})")


# cp.async -----------------------------------------------------------------------------------------


@instruction(
    f"cp.async.cg{{.shared|.shared::cta}}.global{_HINT}{{.L2::64B|.L2::128B|.L2::256B}}",
    f"cp.async.ca{{.shared|.shared::cta}}.global{_HINT}{{.L2::64B|.L2::128B|.L2::256B}}",
    unit=Unit.memory,
)
def copy_async(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """cp.async of 4, 8 or 16 bytes per lane; what the source size leaves is zero."""
    destination, source, size, *rest = op.operands
    assert isinstance(size, Immediate) and size.value in (4, 8, 16)
    source_size = e.value(rest[0], "u32") if rest else f"u32({size.value})"
    arguments = f"{e.address(destination)}, {e.address(source)}, {size.value}, {source_size}"
    e.emit(f"issue_copy(warp, {arguments}, {e.active}, {e.line})")


@instruction("cp.async.commit_group", unit=Unit.memory)
def copy_commit(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """cp.async.commit_group."""
    e.emit("commit_copies(warp)")


@instruction("cp.async.wait_group", "cp.async.wait_all", unit=Unit.memory, ends_block=True)
def copy_wait(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """cp.async.wait_group and wait_all."""
    if op.operands:
        assert isinstance(op.operands[0], Immediate)
        e.emit(f"wait_copies(warp, {op.operands[0].value})")
    else:
        e.emit("commit_copies(warp); wait_copies(warp, 0)")


# Execution ----------------------------------------------------------------------------------------


def issuing_lanes(
    active: Array | None, *operands: Array, idempotent: bool = False
) -> Iterable[int]:
    """The lanes that issue an operation each.

    By the ISA every active lane does. CuTe DSL doesn't elect a lane for TMA stores: the machine
    code has one warp-uniform store, and more of them would only repeat it. So an `idempotent`
    operation on which all lanes agree is issued once; repeating any other is an error.
    """
    lanes = list(active_lanes(active))
    if len(lanes) > 1:
        first = lanes[0]
        if all(np.ndim(x) == 0 or (np.asarray(x)[lanes] == x[first]).all() for x in operands):
            if not idempotent:
                raise ProtocolError(f"{len(lanes)} lanes issue the same copy: elect one")
            return lanes[:1]
    return lanes


def at(value: Array, lane: int) -> int:
    """A lane's value of an operand that may be a scalar."""
    return int(value) if np.ndim(value) == 0 else int(value[lane])


def map_at(warp: Warp, address: int) -> TensorMap:
    """The tensor map at a generic address: a kernel parameter, or global memory."""
    launch = warp.cluster.launch
    found = launch.tensor_maps.get(address)
    if found is None:
        if address % 64:
            raise Misaligned(f"tensor map at {address:#x}: expected a multiple of 64")
        if address >= PARAMETER_BASE:
            offset = address - PARAMETER_BASE
            raw = launch.parameters[offset : offset + tensor_map.MAP_BYTES]
        else:
            raw = launch.memory.bytes(address, tensor_map.MAP_BYTES).tobytes()
        found = launch.tensor_maps[address] = tensor_map.decode(raw)
    return found


def _will_land(
    warp: Warp,
    destination: int,
    size: int,
    barrier: MBarrier,
    line: int,
    source: int | Callable[[], Places],
) -> None:
    """Tell the barrier and the checker about a copy that was issued, from a shared::cluster address
    or from places in global memory."""
    barrier.issue(size)
    checker = warp.cluster.checker
    if checker is None:
        return
    checker.use_mbarrier(warp, barrier, line, asynchronous=True)
    cta, offset = warp.cluster.cta_at(destination)
    agent, epoch = checker.start(("copy", barrier), f"copies of {barrier} of CTA {cta.coordinates}")
    clock = checker.clocks[warp]
    if callable(source):
        checker.access_global(warp, Kind.read, source(), line, (agent, epoch))
    else:
        source_cta, source_offset = warp.cluster.cta_at(source)
        cells = cell_slice(source_offset, size)
        shadow = checker.shared[source_cta.rank]
        checker.read(shadow, cells, clock, (agent, epoch), line, asynchronous=True)
    shadow = checker.shared[cta.rank]
    checker.write(shadow, cell_slice(offset, size), clock, (agent, epoch), line)
    checker.arrive_operation(warp, barrier, agent, epoch)


@runtime
def issue_tensor_load(
    warp: Warp,
    destination: Array,
    map_address: Array,
    coordinates: tuple[Array, ...],
    barrier: Array,
    mask: Array | None,
    active: Array | None,
    line: int,
) -> None:
    """A TMA load. Multicast writes the same offset, and signals the same mbarrier, in several
    CTAs."""
    for lane in issuing_lanes(active, destination, map_address, barrier, *coordinates):
        loaded = map_at(warp, at(map_address, lane))
        place = tuple(at(coordinate, lane) for coordinate in coordinates)
        target, signal = at(destination, lane), at(barrier, lane)
        part = tensor_map.region(loaded, place)
        places = functools.partial(_places, warp, part, loaded)
        for cta, offset, landing in _receivers(warp, target, signal, mask, lane):
            tensor_map.check_shared_address(loaded, offset)
            cta.shared.span(offset, loaded.box_bytes)
            warp.counts["TMA bytes loaded"] += loaded.box_bytes
            _will_land(warp, cta.rank << 24 | offset, loaded.box_bytes, landing, line, places)
            run = _tensor_load(warp, loaded, part, cta, offset, landing)
            warp.cluster.start_copy(warp, line, run)


def _receivers(
    warp: Warp, target: int, signal: int, mask: Array | None, lane: int
) -> list[tuple[Cta, int, MBarrier]]:
    cta, offset = warp.cluster.cta_at(target)
    if mask is None:
        return [(cta, offset, mbarrier_at(warp, signal))]
    bits, low = at(mask, lane), signal & 0xFFFFFF
    return [
        (warp.cluster.ctas[rank], offset, mbarrier_at(warp, rank << 24 | low))
        for rank in range(16)
        if bits >> rank & 1
    ]


def _places(warp: Warp, part: Region, of: TensorMap) -> Places:
    """What a TMA operation touches of global memory."""
    if part.empty:
        return []
    memory = warp.cluster.launch.memory
    return memory.region_cells(part.address, part.shape, part.strides, of.dtype)


def _tensor_load(
    warp: Warp, loaded: TensorMap, part: Region, cta: Cta, offset: int, barrier: MBarrier
) -> Callable[[], None]:
    def run() -> None:
        box = np.zeros(tuple(reversed(loaded.box)), loaded.dtype)
        if not part.empty:
            memory = warp.cluster.launch.memory
            box[part.inside] = memory.region(part.address, part.shape, part.strides, loaded.dtype)
        chunks = tensor_map.swizzled_chunks(offset >> 4, box.nbytes >> 4, loaded.swizzle)
        cta.shared.bytes.reshape(-1, 16)[chunks] = box.reshape(-1).view(u8).reshape(-1, 16)
        cta.shared.version += 1
        barrier.land(box.nbytes)

    return run


def _start_store(
    warp: Warp,
    source: int,
    size: int,
    read: Callable[[], Callable[[], None]],
    target: tuple[Kind, Callable[[], Places]],
    line: int,
) -> None:
    """A bulk store that `read` does, and what the checker has to know: which shared memory it
    reads, how it accesses which global memory. The two halves are agents of their own, because a
    wait for the first says nothing about the second."""
    launch = warp.cluster.launch
    launch.bulk_stores += 1
    pending = PendingStore(read, launch.bulk_stores)
    checker = warp.cluster.checker
    if checker is not None:
        cta, offset = warp.cluster.cta_at(source)
        shadow, cells = checker.shared[cta.rank], cell_slice(offset, size)
        pending.reading = checker.start(("store", warp), f"bulk stores of {warp.name}")
        checker.read(shadow, cells, checker.clocks[warp], pending.reading, line, asynchronous=True)
        kind, places = target
        pending.writing = checker.start(("write", warp), f"writes of bulk stores of {warp.name}")
        checker.access_global(warp, kind, places(), line, pending.writing)
    if warp.cluster.chooser.eager:
        read()()
        pending.read = lambda: lambda: None
    warp.open_stores.append(pending)


@runtime
def issue_tensor_store(
    warp: Warp,
    map_address: Array,
    coordinates: tuple[Array, ...],
    source: Array,
    reduce: bool,
    active: Array | None,
    line: int,
) -> None:
    """A TMA store or reduction."""
    once = not reduce
    for lane in issuing_lanes(active, map_address, source, *coordinates, idempotent=once):
        stored = map_at(warp, at(map_address, lane))
        place = tuple(at(coordinate, lane) for coordinate in coordinates)
        cta, offset = warp.cluster.cta_at(at(source, lane))
        if cta is not warp.cta:
            raise ProtocolError("TMA store from another CTA's shared memory")
        if reduce and stored.data_type != tensor_map.FLOAT32:
            raise NotImplementedError(f"TMA reduction of type {stored.data_type}")
        tensor_map.check_shared_address(stored, offset)
        cta.shared.span(offset, stored.box_bytes)
        warp.counts["TMA bytes stored"] += stored.box_bytes
        part = tensor_map.region(stored, place)
        read = _tensor_store(warp, stored, part, cta, offset, reduce)
        target = _kind(f32 if reduce else None), functools.partial(_places, warp, part, stored)
        _start_store(warp, at(source, lane), stored.box_bytes, read, target, line)


def _kind(reduction: type | None) -> Kind:
    if reduction is None:
        return Kind.write
    return Kind.addition if reduction is f32 else Kind.reduction


def _tensor_store(
    warp: Warp, stored: TensorMap, part: Region, cta: Cta, offset: int, reduce: bool
) -> Callable[[], Callable[[], None]]:
    def read() -> Callable[[], None]:
        chunks = tensor_map.swizzled_chunks(offset >> 4, stored.box_bytes >> 4, stored.swizzle)
        data = cta.shared.bytes.reshape(-1, 16)[chunks].reshape(-1).view(stored.dtype)
        box = data.reshape(tuple(reversed(stored.box)))

        def write() -> None:
            if part.empty:
                return
            target = warp.cluster.launch.memory.region(
                part.address, part.shape, part.strides, stored.dtype, writes=True
            )
            if reduce:
                target.view(f32)[...] += box[part.inside].view(f32)
            else:
                target[...] = box[part.inside]

        return write

    return read


def _bytes(warp: Warp, address: int, size: int) -> Places:
    memory = warp.cluster.launch.memory
    span = np.array([address], u64)
    memory.check(span, size)
    return memory.cells(span, size)


def _check_bulk(size: int, *addresses: int) -> None:
    if size % 16 or any(address % 16 for address in addresses):
        shown = ", ".join(f"{address:#x}" for address in addresses)
        raise Misaligned(f"bulk copy of {size} bytes at {shown}: expected multiples of 16")


@runtime
def issue_bulk_load(
    warp: Warp,
    destination: Array,
    source: Array,
    size: Array,
    barrier: Array,
    active: Array | None,
    line: int,
) -> None:
    """cp.async.bulk from global memory."""
    for lane in issuing_lanes(active, destination, source, size, barrier):
        count, address = at(size, lane), at(source, lane)
        cta, offset = warp.cluster.cta_at(at(destination, lane))
        landing = mbarrier_at(warp, at(barrier, lane))
        _check_bulk(count, address, offset)
        span = cta.shared.span(offset, count)
        warp.counts["bulk bytes loaded"] += count
        places = functools.partial(_bytes, warp, address, count)
        _will_land(warp, at(destination, lane), count, landing, line, places)

        def run(cta=cta, span=span, address=address, count=count, landing=landing) -> None:
            span[:] = warp.cluster.launch.memory.bytes(address, count)
            cta.shared.version += 1
            landing.land(count)

        warp.cluster.start_copy(warp, line, run)


@runtime
def issue_bulk_between(
    warp: Warp,
    destination: Array,
    source: Array,
    size: Array,
    barrier: Array,
    active: Array | None,
    line: int,
) -> None:
    """cp.async.bulk from shared memory to that of another CTA of the cluster."""
    for lane in issuing_lanes(active, destination, source, size, barrier):
        count = at(size, lane)
        cta, offset = warp.cluster.cta_at(at(destination, lane))
        source_cta, source_offset = warp.cluster.cta_at(at(source, lane))
        landing = mbarrier_at(warp, at(barrier, lane))
        if landing.cta is not cta:
            raise ProtocolError("cp.async.bulk: the mbarrier is not in the destination's CTA")
        _check_bulk(count, source_offset, offset)
        span, data = cta.shared.span(offset, count), source_cta.shared.span(source_offset, count)
        warp.counts["DSMEM bytes"] += count
        _will_land(warp, at(destination, lane), count, landing, line, source=at(source, lane))

        def run(cta=cta, span=span, data=data, count=count, landing=landing) -> None:
            span[:] = data
            cta.shared.version += 1
            landing.land(count)

        warp.cluster.start_copy(warp, line, run)


@runtime
def issue_bulk_store(
    warp: Warp,
    destination: Array,
    source: Array,
    size: Array,
    reduction: type | None,
    active: Array | None,
    line: int,
) -> None:
    """cp.async.bulk or cp.reduce.async.bulk to global memory."""
    once = reduction is None
    for lane in issuing_lanes(active, destination, source, size, idempotent=once):
        count, address = at(size, lane), at(destination, lane)
        cta, offset = warp.cluster.cta_at(at(source, lane))
        if cta is not warp.cta:
            raise ProtocolError("bulk store from another CTA's shared memory")
        _check_bulk(count, address, offset)
        span = cta.shared.span(offset, count)
        warp.counts["bulk bytes stored"] += count

        def read(span=span, address=address, count=count) -> Callable[[], None]:
            data = span.copy()

            def write() -> None:
                target = warp.cluster.launch.memory.bytes(address, count, writes=True)
                if reduction is None:
                    target[:] = data
                else:
                    target.view(reduction)[...] += data.view(reduction)

            return write

        target = _kind(reduction), functools.partial(_bytes, warp, address, count)
        _start_store(warp, at(source, lane), count, read, target, line)


@runtime
def commit_stores(warp: Warp, active: Array | None) -> None:
    """Close the current bulk group; an empty one counts as well."""
    if active is None or active.any():
        warp.store_groups.append(warp.open_stores)
        warp.open_stores = []


@runtime
def wait_stores(warp: Warp, pending: int, read_only: bool, active: Array | None) -> None:
    """Let all but the last `pending` bulk groups happen: reads, and without `.read` writes, too."""
    if active is not None and not active.any():
        return
    checker = warp.cluster.checker
    while len(warp.store_groups) > pending:
        for store in warp.store_groups.popleft():
            warp.unwritten.append(PendingWrite(store.number, store.read(), store.writing))
            if checker is not None and store.reading is not None:
                checker.join(warp, *store.reading)
    if not read_only:
        for write in warp.cluster.chooser.disordered(warp.unwritten):
            write.run()
            if checker is not None and write.operation is not None:
                checker.join(warp, *write.operation)
        warp.unwritten.clear()


@runtime
def issue_copy(
    warp: Warp,
    destination: Array,
    source: Array,
    size: int,
    source_size: Array,
    active: Array | None,
    line: int,
) -> None:
    """cp.async: lands, at the latest, when its group is waited for."""
    if active is not None and not active.any():
        return
    offsets = own_offsets(warp, destination, active, size)
    sources, sizes = np.broadcast_to(source, LANES), np.broadcast_to(source_size, LANES)
    checker, memory = warp.cluster.checker, warp.cluster.launch.memory
    if checker is not None:
        used = offsets if active is None else offsets[active]
        # Until the group is waited for the data is another agent's.
        agent, epoch = checker.start(("cp.async", warp), f"cp.async of {warp.name}")
        clock = checker.clocks[warp].copy()
        clock[agent] = epoch
        shadow = checker.shared[warp.cta.rank]
        checker.write(shadow, cells_of(used, size), clock, (agent, epoch), line)
        for lane in active_lanes(active):
            if count := min(int(sizes[lane]), size):
                places = _bytes(warp, int(sources[lane]), count)
                checker.access_global(warp, Kind.read, places, line, (agent, epoch))
        warp.open_copies.append(lambda: checker.join(warp, agent, epoch))

    def run() -> None:
        shared = warp.cta.shared
        for lane in active_lanes(active):
            span, count = shared.span(int(offsets[lane]), size), min(int(sizes[lane]), size)
            span[count:] = 0
            if count:
                span[:count] = memory.bytes(int(sources[lane]), count)
        shared.version += 1

    if warp.cluster.chooser.eager:
        run()
    else:
        warp.open_copies.append(run)


@runtime
def commit_copies(warp: Warp) -> None:
    """Close the current cp.async group."""
    warp.copy_groups.append(warp.open_copies)
    warp.open_copies = []


@runtime
def wait_copies(warp: Warp, pending: int) -> None:
    """Let all but the last `pending` groups land."""
    while len(warp.copy_groups) > pending:
        for run in warp.copy_groups.popleft():
            run()
