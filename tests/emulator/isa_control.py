# SPDX-License-Identifier: Apache-2.0
"""Control flow, register budget, fences between kernels, prefetches (PTX ISA: Control Flow,
setmaxnreg)."""

from __future__ import annotations

from .alu import Array
from .codegen import Emitter
from .errors import ProtocolError
from .instruction_set import Unit, instruction, runtime
from .ptx import Immediate, Instruction, Symbol
from .warp import Wait, Warp


@instruction("bra{.uni}", unit=Unit.control, ends_block=True)
def branch(e: Emitter, op: Instruction, m: dict[str, str]) -> None:
    """bra: a guarded branch may split the warp."""
    (label,) = op.operands
    assert isinstance(label, Symbol)
    target = e.labels[label.name]
    if op.guard is None:
        e.end(str(target))
        return
    predicate = e.value(op.guard.register, "pred")
    taken = f"~{predicate}" if op.guard.negated else predicate
    if e.mask is None:
        every, some = (
            ("not {}.any()", "{}.all()") if op.guard.negated else ("{}.all()", "not {}.any()")
        )
        e.emit(f"if {every.format(predicate)}: return {target}")
        e.emit(f"if {some.format(predicate)}: return {e.following}")
    e.end(f"Split({taken}, {target}, {e.following})")


@instruction("ret{.uni}", "exit", unit=Unit.control, ends_block=True)
def leave(e: Emitter, op: Instruction, m: dict[str, str]) -> None:
    """ret and exit, unguarded: NVVM branches around them."""
    assert op.guard is None
    e.end("Exit()")


@instruction("trap", unit=Unit.control)
def trap(e: Emitter, op: Instruction, m: dict[str, str]) -> None:
    """trap: the kernel gave up."""
    e.emit(f"trapped({e.active})")


@runtime
def trapped(active: Array | None) -> None:
    """Raise, if any lane got here."""
    if active is None or active.any():
        raise ProtocolError("the kernel executed a trap")


@instruction("nanosleep.u32", "griddepcontrol(.wait|.launch_dependents)", unit=Unit.control)
def no_effect(e: Emitter, op: Instruction, m: dict[str, str]) -> None:
    """Timing, and overlap with other launches: here, launches run one after another."""


@instruction("prefetch(.tensormap|.global.L2|.global.L1|.param.tensormap)", unit=Unit.memory)
def prefetch(e: Emitter, op: Instruction, m: dict[str, str]) -> None:
    """prefetch: performance only."""


@instruction("setmaxnreg(action=.inc|.dec).sync.aligned.u32", unit=Unit.control, convergent=True,
             ends_block=True)  # fmt: skip
def set_registers(e: Emitter, op: Instruction, m: dict[str, str]) -> None:
    """setmaxnreg: `dec` gives registers to the CTA's pool, `inc` waits until the pool has
    enough."""
    (count,) = op.operands
    assert isinstance(count, Immediate)
    e.end(f"change_registers(warp, {m['action']!r}, {count.value}, {e.following}, {e.line})")


@runtime
def change_registers(warp: Warp, action: str, count: int, following: int, line: int) -> Wait:
    """The wait of setmaxnreg; its limits are the ISA's: 24 to 256, a multiple of 8."""
    if not 24 <= count <= 256 or count % 8:
        raise ProtocolError(f"setmaxnreg: got {count}, expected a multiple of 8 from 24 to 256")
    pool, before = warp.cta.registers, warp.register_count
    wrong = count < before if action == "inc" else count > before
    if wrong:
        raise ProtocolError(
            f"setmaxnreg.{action} {count}: the warp has {before} registers per thread"
        )
    warp.counts["setmaxnreg"] = count
    needed = 32 * (count - before)
    if action == "dec":
        pool.free -= needed
        warp.register_count = count
        warp.cluster.wake(pool.waiters)

    def take() -> None:
        if action == "inc":
            pool.free -= needed
            warp.register_count = count

    return Wait(
        ready=lambda: action == "dec" or pool.free >= needed,
        finish=take,
        describe=lambda: f"setmaxnreg.inc to {count}: {needed} more registers, {pool.state}",
        waiters=pool.waiters,
        following=following,
        line=line,
    )


@runtime
def partial_warp(active: Array) -> None:
    """An `.aligned` instruction needs all lanes of the warp."""
    raise ProtocolError(f"an .aligned instruction is executed by {int(active.sum())} of 32 lanes")
