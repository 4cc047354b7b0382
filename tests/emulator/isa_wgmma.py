# SPDX-License-Identifier: Apache-2.0
"""wgmma (PTX ISA: Asynchronous Warpgroup Level Matrix Instructions).

A warpgroup's wgmma is executed by its four warps, each for its own 16 of the 64 rows. Until a warp
waits for the group, registers are not read (late schedules), so that a register that the program
changes too early shows in the result.
"""

from __future__ import annotations

import re

import numpy as np

from . import matrix, tensor_core
from .alu import Array
from .codegen import Emitter
from .errors import ProtocolError
from .instruction_set import Unit, instruction, runtime
from .matrix import SharedDescriptor
from .ptx import Immediate, Instruction, Register, Vector
from .warp import PendingMma, Warp

Modifiers = dict[str, str]
_SHAPES = "|".join(f".m64n{n}k16" for n in range(8, 257, 8))


@instruction(
    f"wgmma.mma_async.sync.aligned(shape={_SHAPES}).f32(kind=.bf16.bf16|.f16.f16)",
    unit=Unit.tensor, convergent=True,
)  # fmt: skip
def multiply(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """wgmma.mma_async with a float32 accumulator; A from registers or shared memory."""
    destination, a, b, scale_d, *immediates = op.operands
    assert e.mask is None and isinstance(destination, Vector)
    match = re.fullmatch(r"m64n(\d+)k16", m["shape"])
    assert match is not None
    columns = int(match.group(1))
    slots = tuple(e.slot(x) for x in destination.items)
    assert len(slots) == columns // 2
    constants = [x.value for x in immediates if isinstance(x, Immediate)]
    assert len(constants) == len(immediates)
    if isinstance(a, Vector):
        assert len(a.items) == 4 and len(constants) == 3
        source = f"({', '.join(str(e.slot(x)) for x in a.items)})"
        negate_a, negate_b, transpose_b = constants
        transpose_a = 0
    else:
        assert len(constants) == 4
        source = f"uniform({e.value(a, 'u64')}, None)"
        negate_a, negate_b, transpose_a, transpose_b = constants
    assert {negate_a, negate_b} <= {-1, 1}
    accumulate = (
        f"uniform({e.lanes(scale_d, 'pred')}, None)" if isinstance(scale_d, Register) else "1"
    )
    if isinstance(scale_d, Immediate):
        accumulate = str(int(bool(scale_d.value)))
    kind = m["kind"].split(".")[0]
    options = f"(({transpose_a}, {transpose_b}), {negate_a * negate_b}, {kind!r})"
    e.emit(
        f"issue_wgmma(warp, {slots}, {source}, uniform({e.value(b, 'u64')}, None), {accumulate}, "
        f"{options}, {e.line})"
    )
    for item in destination.items:
        e.forget(item)


@instruction("wgmma.fence.sync.aligned", unit=Unit.tensor, convergent=True)
def fence(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """wgmma.fence: orders register accesses before the next wgmma."""
    e.emit("fence_wgmma(warp)")


@instruction("wgmma.commit_group.sync.aligned", unit=Unit.tensor, convergent=True)
def commit(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """wgmma.commit_group."""
    e.emit("commit_wgmma(warp)")


@instruction("wgmma.wait_group.sync.aligned", unit=Unit.tensor, convergent=True, ends_block=True)
def wait(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """wgmma.wait_group."""
    (pending,) = op.operands
    assert isinstance(pending, Immediate)
    e.emit(f"wait_wgmma(warp, {pending.value})")


@runtime
def issue_wgmma(
    warp: Warp,
    slots: tuple[int, ...],
    a: tuple[int, ...] | int,
    b: int,
    accumulate: int,
    options: tuple[tuple[int, int], int, str],
    line: int,
) -> None:
    """Issue one m64nNk16. `a` is four register slots or a descriptor; the options are the
    transposes of A and B, the sign of the product, and the type of both."""
    transposes, sign, kind = options
    columns = 2 * len(slots)
    b_matrix = matrix.wgmma_descriptor(b)
    a_matrix = None if isinstance(a, tuple) else matrix.wgmma_descriptor(a)
    warp.counts["tensor FLOPs"] += 2 * 16 * columns * 16
    # The warpgroup reads B once; a warp reads its own rows of A.
    warp.counts["operand bytes"] += columns * 16 * 2 // 4 + (16 * 16 * 2 if a_matrix else 0)
    operation = None
    if warp.cluster.checker is not None:
        _check_fence(warp, slots, a if isinstance(a, tuple) else (), bool(accumulate), line)
        operation = _check_operands(warp, a_matrix, b_matrix, columns, transposes, line)

    def rows_of_a() -> Array:
        if isinstance(a, tuple):
            values = [_words(warp.registers[slot]) for slot in a]
            return matrix.fragment_rows(values, kind, 16)
        assert a_matrix is not None
        found, shared = a_matrix, warp.cta.shared
        rows = warp.cta.operand(
            (found, 64, transposes[0], kind),
            lambda: matrix.read_operand(shared, found, 64, 16, bool(transposes[0]), kind),
        )
        return rows[16 * (warp.number % 4) : 16 * (warp.number % 4) + 16]

    def run() -> None:
        cta, shared = warp.cta, warp.cta.shared
        b_operand = cta.operand(
            (b_matrix, columns, transposes[1], kind),
            lambda: matrix.read_operand(shared, b_matrix, columns, 16, bool(transposes[1]), kind),
        )
        addend = np.zeros((16, columns), np.float32)
        if accumulate:
            registers = [warp.registers[slot].view(np.float32) for slot in slots]
            addend = matrix.accumulator_block(np.array(registers))
        sums = tensor_core.multiply_add(sign * rows_of_a(), b_operand, addend, kind)
        for value, slot in zip(matrix.accumulator_fragments(sums), slots, strict=True):
            old = warp.registers[slot]
            warp.registers[slot] = value if old.dtype == np.float32 else value.view(np.uint32)
            warp.mma_results[slot] = warp.registers[slot]

    pending = PendingMma(run, operation)
    warp.open_mmas.append(pending)
    if warp.cluster.chooser.completes_now():
        for group in (*warp.mma_groups, warp.open_mmas):
            for mma in group:
                mma.run()
                mma.run = _nothing


def _nothing() -> None:
    """What an MMA that has executed still has to do."""


def _words(register: Array) -> Array:
    return register if register.dtype == np.uint32 else register.view(np.uint32)


def _check_operands(
    warp: Warp,
    a: SharedDescriptor | None,
    b: SharedDescriptor,
    columns: int,
    transposes: tuple[int, int],
    line: int,
) -> tuple[int, int]:
    """Tell the checker what the operation reads. A warp reads all of B, and its own 16 rows of A:
    kernels rely on that when a warp writes its rows of A and only `bar.warp.sync`s."""
    checker = warp.cluster.checker
    assert checker is not None
    operation = checker.start(("wgmma", warp), f"wgmma of {warp.name}")
    shadow, clock = checker.shared[warp.cta.rank], checker.clocks[warp]
    cells = matrix.operand_cells(b, columns, 16, bool(transposes[1]))
    checker.read(shadow, cells, clock, operation, line, asynchronous=True)
    if a is not None:
        first = 16 * (warp.number % 4)
        cells = matrix.operand_cells(a, 64, 16, bool(transposes[0]), first, first + 16)
        checker.read(shadow, cells, clock, operation, line, asynchronous=True)
    return operation


def _check_fence(
    warp: Warp, slots: tuple[int, ...], a: tuple[int, ...], accumulate: bool, line: int
) -> None:
    """wgmma.fence is needed before the first wgmma and wherever registers (A, accumulators) were
    modified; not between wgmmas that accumulate in the same registers. Arrays are never written in
    place, so a register that was not modified is the same object."""
    checker = warp.cluster.checker
    assert checker is not None
    if not warp.fenced_registers:
        checker.add(
            ("wgmma.fence", warp.number, line),
            f"{warp.name}: wgmma (PTX line {line}) without wgmma.fence",
        )
        return
    for slot in (*a, *slots):
        register = warp.registers[slot]
        if register is warp.fenced_registers[slot] or register is warp.mma_results.get(slot):
            continue
        checker.add(
            ("wgmma.fence", warp.role, line),
            f"{warp.name}: wgmma (PTX line {line}) uses register {_register_name(warp, slot)}, "
            "which was modified after the last wgmma.fence",
        )
        return


def _register_name(warp: Warp, slot: int) -> str:
    return list(warp.cluster.launch.program.kernel.registers)[slot]


@runtime
def fence_wgmma(warp: Warp) -> None:
    """Remember what every register holds."""
    if warp.cluster.checker is not None:
        warp.fenced_registers = list(warp.registers)


@runtime
def commit_wgmma(warp: Warp) -> None:
    """Close the current group; an empty one counts as well."""
    warp.mma_groups.append(warp.open_mmas)
    warp.open_mmas = []


@runtime
def wait_wgmma(warp: Warp, pending: int) -> None:
    """Execute all but the last `pending` groups."""
    if not 0 <= pending <= 7:
        raise ProtocolError(f"wgmma.wait_group {pending}: expected 0 to 7")
    while len(warp.mma_groups) > pending:
        for mma in warp.mma_groups.popleft():
            mma.run()
            if warp.cluster.checker is not None and mma.operation is not None:
                warp.cluster.checker.join(warp, *mma.operation)
