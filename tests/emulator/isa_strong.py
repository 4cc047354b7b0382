# SPDX-License-Identifier: Apache-2.0
"""How CTAs communicate through global memory: strong loads and stores, atom and red (PTX ISA:
Memory Consistency Model; Parallel Synchronization and Communication Instructions).

Strong is what has the scope `.gpu` or `.sys`, `.volatile`, which is `.relaxed.sys`, and atom and
red without any scope. A narrower one is as good as none here.
"""

from __future__ import annotations

import numpy as np

from .alu import LANES, Array, u64
from .codegen import BITS, DTYPES, Emitter, items
from .global_races import Kind
from .instruction_set import Unit, instruction, runtime
from .isa_memory import (
    CACHE,
    TYPES,
    emit_load,
    emit_store,
    is_shared,
    load_generic,
    load_global,
    of_active_lanes,
    storage,
    store_generic,
    store_global,
)
from .memory import CELL, active_lanes
from .ptx import Instruction
from .warp import Look, Wait, Warp

Modifiers = dict[str, str]

# Loads and stores ---------------------------------------------------------------------------------

_RELAXED = "(order=.volatile|.relaxed.gpu|.relaxed.sys"
_LOAD, _STORE = _RELAXED + "|.acquire.gpu|.acquire.sys)", _RELAXED + "|.release.gpu|.release.sys)"
_REST = f"{CACHE}{{count=.v2|.v4|.v8}}{TYPES}"


@instruction(
    f"ld{_LOAD}{{.global}}{_REST}", f"ld.global{_LOAD}{_REST}",
    unit=Unit.memory, starts_block=True, ends_block=True,
)  # fmt: skip
def strong_load(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """ld.volatile, ld.relaxed and ld.acquire."""
    count = len(items(op.operands[0]))
    _emit_look(e, op, 1, count * BITS[storage(m)] // 8)
    emit_load(e, op, m, "load_strong", str(m["order"].startswith("acquire")))
    e.end(f"Communication({e.following}, 'load')")


@instruction(
    f"st{_STORE}{{.global}}{_REST}", f"st.global{_STORE}{_REST}",
    unit=Unit.memory, ends_block=True,
)  # fmt: skip
def strong_store(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """st.volatile, st.relaxed and st.release."""
    emit_store(e, op, m, "store_strong", str(m["order"].startswith("release")))
    e.end(f"Communication({e.following}, 'store')")


@runtime
def load_strong(
    warp: Warp,
    address: Array,
    count: int,
    dtype: type,
    active: Array | None,
    line: int,
    acquire: bool,
) -> list[Array]:
    """A strong load: reads what was published, too."""
    if _is_local(address, active):
        return load_generic(warp, address, count, dtype, active, line)  # type: ignore[return-value]
    checker = warp.cluster.checker
    if checker is not None:
        checker.observe(warp, _words(address, active), acquire)
    return load_global(warp, address, count, dtype, active, line, Kind.strong_read)  # type: ignore[return-value]


@runtime
def store_strong(
    warp: Warp,
    address: Array,
    values: tuple[Array, ...],
    dtype: type,
    active: Array | None,
    line: int,
    release: bool,
) -> None:
    """A strong store: publishes, too."""
    if _is_local(address, active):
        if active is None or active.any():
            store_generic(warp, address, values, dtype, active, line)
        return
    store_global(warp, address, values, dtype, active, line, Kind.strong_write)
    checker = warp.cluster.checker
    if checker is not None:
        checker.publish(warp, _words(address, active), release, is_atomic=False)


def _is_local(address: Array, active: Array | None) -> bool:
    """No lane is active, or a generic address is one of shared memory."""
    return (active is not None and not active.any()) or is_shared(address, active)


def _words(address: Array, active: Array | None) -> set[int]:
    addresses, _ = of_active_lanes(address, (), active)
    return set((addresses // u64(CELL)).tolist())


# Polling ------------------------------------------------------------------------------------------


def _emit_look(e: Emitter, op: Instruction, position: int, size: int) -> None:
    """At the head of the block: a warp that would only poll waits for a change and comes back."""
    name, address = e.temporary(), e.address(op.operands[position])
    e.emit(f"{name} = look(warp, {address}, {size}, {e.active}, {e.block.number}, {e.line})")
    e.emit(f"if {name} is not None: return {name}")


@runtime
def look(
    warp: Warp, address: Array, size: int, active: Array | None, block: int, line: int
) -> Wait | None:
    """The wait of a warp that polls; None if it has to look at memory, perhaps again.

    A warp that comes back to a strong read with the registers that it had there before, while
    nothing that it has read this way since then has changed, would come back for ever. So it waits
    until one of these words changes. A bounded number of attempts isn't polling: its counter is a
    register. Not foreseen is a loop that waits for shared memory at the same time.
    """
    if _is_local(address, active):
        return None
    memory = warp.cluster.launch.memory
    addresses, _ = of_active_lanes(address, (), active)
    place = line, b"" if active is None else active.tobytes()
    last = warp.looks.get(place)
    places = np.unique(addresses)
    words = memory.words(places, size)
    warp.look_count += 1
    seen = Look(warp.look_count, places, size, words, list(warp.registers))
    if last is not None and _same(last, seen):
        around = [other for other in warp.looks.values() if other.number >= last.number]

        def changed() -> bool:
            return any(memory.words(x.addresses, x.size) != x.words for x in around)

        if not changed():
            return Wait(
                ready=changed,
                finish=lambda: None,
                describe=lambda: " and ".join(_describe(warp, x) for x in around),
                waiters=warp.cluster.pollers,
                following=block,
                line=line,
            )
    warp.looks[place] = seen
    return None


def _same(one: Look, other: Look) -> bool:
    """Same words, same values, same registers."""
    if one.words != other.words or not np.array_equal(one.addresses, other.addresses):
        return False
    pairs = zip(one.registers, other.registers, strict=True)
    return all(a is b or a.tobytes() == b.tobytes() for a, b in pairs)


def _describe(warp: Warp, seen: Look) -> str:
    """What a warp polls, and what it sees there."""
    width = min(seen.size, 8)
    values = np.frombuffer(seen.words, f"i{width}").reshape(len(seen.addresses), -1)
    places = []
    for address, value in zip(seen.addresses[:4].tolist(), values.tolist(), strict=False):
        buffer, offset = warp.cluster.launch.memory.buffer_at(address)
        shown = ", ".join(map(str, value))
        places.append(f"{buffer.name} at byte {offset} ({address:#x}), where it sees {shown},")
    more = len(seen.addresses) - len(places)
    return "a change of " + "; ".join(places) + (f" and {more} more places" if more else "")


# Atomics ------------------------------------------------------------------------------------------

_SCOPE = "{scope=.cta|.cluster|.gpu|.sys}"
_ATOM = "(order=.relaxed|.acquire|.release|.acq_rel)"
_RED = "(order=.relaxed|.release)"
_NUMBERS = "(type=.b32|.u32|.s32|.b64|.u64|.s64|.f32)"
_OPERATION = f"(operation=.add|.min|.max|.and|.or|.xor){_NUMBERS}"
_EXCHANGE = f"(operation=.add|.min|.max|.and|.or|.xor|.exch|.cas){_NUMBERS}"


def _optional(order: str) -> str:
    return "{" + order[1:-1] + "}"


@instruction(
    f"atom{_optional(_ATOM)}{_SCOPE}.global{_EXCHANGE}", f"atom.global{_ATOM}{_SCOPE}{_EXCHANGE}",
    unit=Unit.memory, starts_block=True, ends_block=True,
)  # fmt: skip
def atomic(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """atom on global memory, lane after lane. NVVM writes the order behind the space."""
    dtype = DTYPES[m["type"]]
    _emit_look(e, op, 1, BITS[dtype] // 8)
    e.define(op.operands[0], dtype, _atomic(e, op, m, 1))
    e.end(f"Communication({e.following}, 'atomic')")


@instruction(
    f"red{_optional(_RED)}{_SCOPE}.global{_OPERATION}", f"red.global{_RED}{_SCOPE}{_OPERATION}",
    unit=Unit.memory, ends_block=True,
)  # fmt: skip
def reduction(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """red: atom without a result."""
    e.emit(_atomic(e, op, m, 0))
    e.end(f"Communication({e.following}, 'store')")


def _atomic(e: Emitter, op: Instruction, m: Modifiers, position: int) -> str:
    place, *sources = op.operands[position:]
    assert len(sources) == 1 + (m["operation"] == "cas")
    values = ", ".join(e.lanes(source, DTYPES[m["type"]]) for source in sources)
    modifiers = ", ".join(repr(m[name]) for name in ("operation", "order", "scope"))
    arguments = f"{e.address(place)}, ({values},), {modifiers}, {e.active}, {e.line}"
    return f"atomic_global(warp, {arguments})"


_FUNCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "exch": lambda old, new: new, "cas": lambda old, compared, new: new if old == compared else old,
}  # fmt: skip


@runtime
def atomic_global(
    warp: Warp,
    address: Array,
    values: tuple[Array, ...],
    operation: str,
    order: str,
    scope: str,
    active: Array | None,
    line: int,
) -> Array:
    """The old value of each lane."""
    addresses, dtype = np.broadcast_to(address, LANES), values[0].dtype
    old = np.zeros(LANES, dtype)
    memory, checker = warp.cluster.launch.memory, warp.cluster.checker
    for lane in active_lanes(active):
        view = memory.bytes(int(addresses[lane]), dtype.itemsize, writes=True).view(dtype)
        old[lane] = view[0]
        view[0] = _FUNCTIONS[operation](view[0], *(value[lane] for value in values))
    if checker is not None and (active is None or active.any()):
        places = memory.cells(addresses if active is None else addresses[active], dtype.itemsize)
        if scope in ("cta", "cluster"):
            checker.access_global(warp, Kind.write, places, line)
            return old
        kind = Kind.addition if dtype.kind == "f" else Kind.reduction
        checker.access_global(warp, kind, places, line)
        words = _words(address, active)
        checker.observe(warp, words, acquire=order.startswith("acq"))
        checker.publish(warp, words, release=order in ("release", "acq_rel"), is_atomic=True)
    return old


@instruction(
    "red{.relaxed}{.gpu|.sys}.global.add(count=.v2|.v4).f32",
    unit=Unit.memory,
)
def vector_reduction(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """red.add of 2 or 4 consecutive float32s (PTX ISA 8.1, red, `.vec_32_bit`): each element is
    added atomically, the vector is not; its address is a multiple of its size."""
    place, source = op.operands
    values = ", ".join(e.lanes(x, "f32") for x in items(source))
    assert len(items(source)) == int(m["count"][1:])
    e.emit(f"reduce_global(warp, {e.address(place)}, ({values},), {e.active}, {e.line})")


@runtime
def reduce_global(
    warp: Warp, address: Array, values: tuple[Array, ...], active: Array | None, line: int
) -> None:
    """Adds of the active lanes; subnormal inputs and sums are flushed (PTX ISA, red)."""
    addresses, values = of_active_lanes(address, values, active)
    if not len(addresses):
        return
    size = 4 * len(values)
    warp.counts["global bytes reduced"] += size * len(addresses)
    memory = warp.cluster.launch.memory
    memory.add(addresses, values)
    if warp.cluster.checker is not None:
        places = memory.cells(addresses, size)
        warp.cluster.checker.access_global(warp, Kind.addition, places, line)
