# SPDX-License-Identifier: Apache-2.0
"""Barriers and fences (PTX ISA: Parallel Synchronization and Communication Instructions)."""

from __future__ import annotations

import numpy as np

from .alu import ALL_LANES, LANES, Array
from .barriers import MBarrier
from .codegen import Emitter
from .errors import BarrierError, ProtocolError
from .instruction_set import Unit, instruction, runtime
from .memory import active_lanes
from .ptx import Instruction, Memory, Register, Sink
from .warp import Wait, Warp

Modifiers = dict[str, str]


@runtime
def elected_lane(active: Array | None) -> int:
    """The lane that `elect.sync` chooses: the lowest active one (any would be right)."""
    return 0 if active is None else int(np.argmax(active))


# Named barriers -----------------------------------------------------------------------------------


@instruction(
    "bar(action=.sync|.arrive)", "barrier(action=.sync|.arrive){.aligned}",
    "bar.cta(action=.sync|.arrive)", "barrier.cta(action=.sync|.arrive){.aligned}",
    unit=Unit.barrier, convergent=True, ends_block=True,
)  # fmt: skip
def named_barrier(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """bar and barrier: whole warps arrive; without a count the barrier is for all threads."""
    number = e.scalar(op.operands[0], "u32")
    count = e.scalar(op.operands[1], "u32") if len(op.operands) > 1 else "None"
    if m["action"] == "arrive":
        assert len(op.operands) > 1
        e.emit(f"warp.cta.named_barrier({number}).arrive(warp, {count})")
    else:
        e.end(f"sync_named(warp, {number}, {count}, {e.following}, {e.line})")


@runtime
def sync_named(warp: Warp, number: int, count: int | None, following: int, line: int) -> Wait:
    """Arrive at a named barrier and wait for the others."""
    barrier = warp.cta.named_barrier(number)
    generation = barrier.arrive(warp, count)

    def finish() -> None:
        if warp.cluster.checker is not None:
            warp.cluster.checker.acquire(warp, barrier)

    return Wait(
        ready=lambda: barrier.generation != generation,
        finish=finish,
        describe=lambda: f"{barrier} ({barrier.state})",
        waiters=barrier.waiters,
        following=following,
        line=line,
    )


@instruction("bar.warp.sync", unit=Unit.barrier, convergent=True)
def warp_barrier(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """bar.warp.sync: the lanes of a warp run together here already."""


@instruction("activemask.b32", unit=Unit.integer)
def active_mask(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """activemask."""
    e.define(op.operands[0], "u32", f"ballot(ALL_LANES, {e.active})")


# The cluster barrier ------------------------------------------------------------------------------


@instruction(
    "barrier.cluster.arrive{.release|.relaxed}{.aligned}", unit=Unit.barrier, convergent=True
)
def cluster_arrive(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """barrier.cluster.arrive. `.relaxed` orders nothing by itself; the happens-before check treats
    it as
    `.release`, so a missing release is not found."""
    e.emit("warp.cluster.barrier.arrive(warp)")


@instruction("barrier.cluster.wait{.acquire}{.aligned}", unit=Unit.barrier, convergent=True,
             ends_block=True)  # fmt: skip
def cluster_wait(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """barrier.cluster.wait."""
    e.end(f"sync_cluster(warp, {e.following}, {e.line})")


@runtime
def sync_cluster(warp: Warp, following: int, line: int) -> Wait:
    """Wait for the phase that the warp arrived at."""
    barrier, generation = warp.cluster.barrier, warp.cluster_generation
    if generation < 0:
        raise BarrierError("barrier.cluster.wait without barrier.cluster.arrive")

    def finish() -> None:
        if warp.cluster.checker is not None:
            warp.cluster.checker.acquire(warp, barrier)

    return Wait(
        ready=lambda: barrier.generation != generation,
        finish=finish,
        describe=lambda: f"{barrier} ({barrier.state})",
        waiters=barrier.waiters,
        following=following,
        line=line,
    )


# mbarriers ----------------------------------------------------------------------------------------

_SPACE = "{.shared|.shared::cta}.b64"


@instruction(f"mbarrier.init{_SPACE}", unit=Unit.barrier)
def mbarrier_init(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """mbarrier.init."""
    address, count = e.address(op.operands[0]), e.value(op.operands[1], "u32")
    e.emit(f"init_mbarrier(warp, {address}, {count}, {e.active}, {e.line})")


@instruction(f"mbarrier.inval{_SPACE}", unit=Unit.barrier)
def mbarrier_invalidate(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """mbarrier.inval."""
    e.emit(f"invalidate_mbarrier(warp, {e.address(op.operands[0])}, {e.active})")


_ARRIVE = "{.release|.relaxed}{.cta|.cluster}{.shared|.shared::cta|.shared::cluster}.b64"


@instruction(
    f"mbarrier.arrive{_ARRIVE}", f"mbarrier.arrive(expect=.expect_tx){_ARRIVE}", unit=Unit.barrier
)
def mbarrier_arrive(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """mbarrier.arrive: the state that it returns is not modelled, so it must not be used."""
    place = next(i for i, x in enumerate(op.operands) if isinstance(x, Memory))
    address, rest = e.address(op.operands[place]), op.operands[place + 1 :]
    if place and isinstance(op.operands[0], Register):
        e.define(op.operands[0], "u64", e.constant("np.full(LANES, 0xFFFFFFFFFFFFFFFF, u64)"))
    elif place:
        assert isinstance(op.operands[0], Sink)
    if m.get("expect"):
        (size,) = rest
        e.emit(f"arrive_mbarrier(warp, {address}, 1, {e.value(size, 'u32')}, {e.active}, {e.line})")
    else:
        count = e.value(rest[0], "u32") if rest else "1"
        e.emit(f"arrive_mbarrier(warp, {address}, {count}, 0, {e.active}, {e.line})")


@instruction(
    "mbarrier.expect_tx{.relaxed}{.cta|.cluster}{.shared|.shared::cta|.shared::cluster}.b64",
    unit=Unit.barrier,
)
def mbarrier_expect(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """mbarrier.expect_tx: raises the tx-count without an arrival."""
    address, size = e.address(op.operands[0]), e.value(op.operands[1], "u32")
    e.emit(f"arrive_mbarrier(warp, {address}, 0, {size}, {e.active}, {e.line})")


@instruction(
    "mbarrier.try_wait.parity{.acquire|.relaxed}{.cta|.cluster}{.shared|.shared::cta}.b64",
    "mbarrier.test_wait.parity{.acquire|.relaxed}{.cta|.cluster}{.shared|.shared::cta}.b64",
    unit=Unit.barrier,
    ends_block=False,
)
def mbarrier_wait(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """mbarrier.try_wait.parity: at the head of its loop the warp parks, elsewhere it is a test. The
    suspend-time hint is ignored."""
    from .codegen import is_spin

    result, place, parity = op.operands[0], op.operands[1], op.operands[2]
    address, phase = e.address(place), e.value(parity, "u32")
    if is_spin(e.block, op) and op.guard is None:
        arguments = f"{address}, {phase}, {e.active}, {e.slot(result)}"
        e.end(f"wait_mbarrier(warp, {arguments}, {e.following}, {e.line})")
    else:
        e.define(result, "pred", f"test_mbarrier(warp, {address}, {phase}, {e.active}, {e.line})")


def mbarrier_at(warp: Warp, address: int) -> MBarrier:
    """The initialised mbarrier at a shared::cluster address."""
    cta, offset = warp.cluster.cta_at(address)
    barrier = cta.mbarriers.get(offset)
    if barrier is None:
        raise BarrierError(f"CTA {cta.rank}+{offset:#x} is not an initialised mbarrier")
    return barrier


@runtime
def init_mbarrier(
    warp: Warp, address: Array, count: Array, active: Array | None, line: int
) -> None:
    """Each active lane initialises one object."""
    addresses, counts = np.broadcast_to(address, LANES), np.broadcast_to(count, LANES)
    for lane in active_lanes(active):
        cta, offset = warp.cluster.cta_at(int(addresses[lane]))
        if cta is not warp.cta:
            raise BarrierError("mbarrier.init of another CTA's shared memory")
        cta.shared.span(offset, 8)
        if offset % 8 or not 1 <= int(counts[lane]) < 1 << 20:
            raise BarrierError(f"mbarrier.init at {offset:#x} with count {int(counts[lane])}")
        old = cta.mbarriers.get(offset)
        if old is not None and (old.completed_phases or old.pending != old.count or old.tx):
            raise BarrierError(f"{old} is initialised again while in use")
        cta.mbarriers[offset] = MBarrier(offset, int(counts[lane]), cta, warp)
        if warp.cluster.checker is not None:
            warp.cluster.checker.initialise_mbarrier(warp, cta, offset, line)


@runtime
def invalidate_mbarrier(warp: Warp, address: Array, active: Array | None) -> None:
    """The memory is ordinary again."""
    addresses = np.broadcast_to(address, LANES)
    for lane in active_lanes(active):
        barrier = mbarrier_at(warp, int(addresses[lane]))
        del barrier.cta.mbarriers[barrier.offset]
        if warp.cluster.checker is not None:
            warp.cluster.checker.invalidate_mbarrier(barrier.cta, barrier.offset)


@runtime
def arrive_mbarrier(
    warp: Warp, address: Array, count: Array, size: Array, active: Array | None, line: int
) -> None:
    """Each active lane expects `size` bytes and arrives `count` times; 0 is expect_tx alone."""
    addresses, counts, sizes = (np.broadcast_to(x, LANES) for x in (address, count, size))
    checker = warp.cluster.checker
    for lane in active_lanes(active):
        barrier = mbarrier_at(warp, int(addresses[lane]))
        if checker is not None:
            remote = barrier.cta is not warp.cta
            checker.use_mbarrier(warp, barrier, line, asynchronous=remote)
            if counts[lane]:
                checker.arrive(warp, barrier)
        if counts[lane]:
            barrier.arrive(int(counts[lane]), int(sizes[lane]))
        else:
            barrier.expect(int(sizes[lane]))


@runtime
def test_mbarrier(
    warp: Warp, address: Array, parity: Array, active: Array | None, line: int
) -> Array:
    """Whether each lane's phase has completed."""
    addresses, parities = np.broadcast_to(address, LANES), np.broadcast_to(parity, LANES)
    result = np.zeros(LANES, bool)
    for lane in active_lanes(active):
        barrier = mbarrier_at(warp, int(addresses[lane]))
        result[lane] = barrier.passed(int(parities[lane]) & 1)
        if warp.cluster.checker is not None:
            warp.cluster.checker.use_mbarrier(warp, barrier, line, asynchronous=False)
            if result[lane]:
                warp.cluster.checker.acquire(warp, barrier)
    return result


@runtime
def wait_mbarrier(
    warp: Warp,
    address: Array,
    parity: Array,
    active: Array | None,
    slot: int,
    following: int,
    line: int,
) -> Wait:
    """Wait for one phase; lanes that wait for different ones are not supported."""
    where, phase = _uniform(address, active), _uniform(parity, active) & 1
    barrier = mbarrier_at(warp, where)
    if barrier.cta is not warp.cta:
        raise ProtocolError("mbarrier.try_wait on another CTA's mbarrier")
    lanes = ALL_LANES if active is None else active
    checker = warp.cluster.checker
    if checker is not None:
        checker.use_mbarrier(warp, barrier, line, asynchronous=False)

    def finish() -> None:
        if checker is not None:
            checker.acquire(warp, barrier)
        old = warp.registers[slot]
        warp.registers[slot] = ALL_LANES if active is None else old | lanes

    return Wait(
        ready=lambda: barrier.passed(phase),
        finish=finish,
        describe=lambda: f"{barrier} to pass parity {phase} ({barrier.state})",
        waiters=barrier.waiters,
        following=following,
        line=line,
    )


def _uniform(value: Array, active: Array | None) -> int:
    if np.ndim(value) == 0:
        return int(value)
    values = value if active is None else value[active]
    if (values != values[0]).any():
        raise NotImplementedError("the lanes of a warp wait for different mbarriers or phases")
    return int(values[0])


# Fences -------------------------------------------------------------------------------------------


@instruction("fence.mbarrier_init.release.cluster", unit=Unit.barrier)
def fence_mbarrier_init(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """fence.mbarrier_init: makes the executing thread's mbarrier.init visible to the cluster and to
    the async proxy."""
    e.emit(f"fence_initialisations(warp, {e.active})")


@runtime
def fence_initialisations(warp: Warp, active: Array | None) -> None:
    """Mark the warp's mbarriers as fenced."""
    if active is None or active.any():
        for barrier in warp.cta.mbarriers.values():
            if barrier.initialiser is warp:
                barrier.fenced = True


@instruction("fence.proxy.async{space=.shared::cta|.shared::cluster|.global}", unit=Unit.barrier)
def fence_proxy_async(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """fence.proxy.async: orders generic accesses before async ones. The happens-before check covers
    shared memory."""
    if m["space"] != "global":
        e.emit(f"fence_proxy(warp, {e.active})")


@runtime
def fence_proxy(warp: Warp, active: Array | None) -> None:
    """The fence counts for the whole warp, if any lane executes it."""
    if warp.cluster.checker is not None and (active is None or active.any()):
        warp.cluster.checker.fence_proxy(warp)
    for barrier in warp.cta.mbarriers.values():
        if barrier.initialiser is warp:
            barrier.fenced = True


@instruction(
    "fence{.acq_rel|.sc}(.gpu|.sys)", "membar(.gl|.sys)", unit=Unit.barrier
)  # fmt: skip
def fence_between_clusters(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """fence and membar of a scope beyond the cluster: the emulator's memory is sequentially
    consistent, but the happens-before check knows them."""
    e.emit(f"fence_memory(warp, {e.active})")


@runtime
def fence_memory(warp: Warp, active: Array | None) -> None:
    """The fence counts for the whole warp, if any lane executes it."""
    if warp.cluster.checker is not None and (active is None or active.any()):
        warp.cluster.checker.fence(warp)


@instruction(
    "fence{.acq_rel|.sc}(.cta|.cluster)",
    "membar.cta",
    "fence.proxy.tensormap::generic(.acquire|.release)(.cta|.cluster|.gpu|.sys)",
    "fence.proxy.alias",
    unit=Unit.barrier,
)
def fence(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """Fences within a cluster: the emulator's memory is sequentially consistent, so they change
    nothing, and a missing one is not found."""
