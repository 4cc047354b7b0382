# SPDX-License-Identifier: Apache-2.0
"""tcgen05 and tensor memory (PTX ISA: TensorCore 5th Generation Family Instructions).

`tcgen05.mma` and `tcgen05.commit` go through one in-order pipe per CTA. `tcgen05.fence` is accepted
and changes nothing: a missing one is not found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import matrix
from .alu import LANES, Array, f32, u32
from .codegen import Emitter, items
from .errors import ProtocolError, UnsupportedInstruction
from .instruction_set import Unit, instruction, runtime
from .isa_barriers import mbarrier_at
from .isa_bulk import at
from .memory import TensorMemory, active_lanes
from .ptx import Immediate, Instruction, Memory, Sink, Vector
from .warp import Wait, Warp

if TYPE_CHECKING:
    from .races import HappensBefore
    from .scheduler import Cluster, Cta

Modifiers = dict[str, str]
_GROUP = "(group=.cta_group::1|.cta_group::2)"
_COUNTS = ".x1|.x2|.x4|.x8|.x16|.x32|.x64|.x128"
COLUMNS = TensorMemory.COLUMNS


# Allocation ---------------------------------------------------------------------------------------


@instruction(f"tcgen05.alloc{_GROUP}.sync.aligned{{.shared::cta}}.b32", unit=Unit.tensor,
             convergent=True, ends_block=True)  # fmt: skip
def allocate(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """tcgen05.alloc: with cta_group::2, one warp of each CTA of the pair performs it together."""
    place, columns = e.address(op.operands[0]), e.scalar(op.operands[1], "u32")
    pair = m["group"].endswith("2")
    arguments = f"uniform({place}, None), {columns}, {pair}, {e.following}, {e.line}"
    e.end(f"allocate_tensor(warp, {arguments})")


@instruction(f"tcgen05.dealloc{_GROUP}.sync.aligned.b32", unit=Unit.tensor, convergent=True)
def deallocate(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """tcgen05.dealloc."""
    address, columns = (e.scalar(x, "u32") for x in op.operands)
    e.emit(f"deallocate_tensor(warp, {address}, {columns}, {e.line})")


@instruction(
    f"tcgen05.relinquish_alloc_permit{_GROUP}.sync.aligned", unit=Unit.tensor, convergent=True
)
def relinquish(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """tcgen05.relinquish_alloc_permit: the CTA may not allocate again."""
    e.emit("warp.cta.tensor.may_allocate = False")


@runtime
def allocate_tensor(
    warp: Warp, place: int, columns: int, pair: bool, following: int, line: int
) -> Wait:
    """Allocate, and write the address to shared memory; a pair meets first."""
    cluster, cta = warp.cluster, warp.cta
    meeting = cluster.pair_meetings.setdefault((cta.rank >> 1, line), [])
    if pair:
        cluster.pair(cta)
        meeting.append((warp, columns))
        if len(meeting) == 2:
            _meet(cluster, meeting)

    def finish() -> None:
        if not cta.tensor.may_allocate:
            raise ProtocolError("tcgen05.alloc after tcgen05.relinquish_alloc_permit")
        column = cta.tensor.allocate(columns)
        _, offset = cluster.cta_at(place)
        cta.shared.span(offset, 4).view(u32)[0] = column
        cta.shared.version += 1
        if cluster.checker is not None:
            if pair:
                cluster.checker.acquire(warp, ("tcgen05.alloc", id(meeting)))
            shadow = cluster.checker.shared[cta.rank]
            cells = slice(offset // 4, offset // 4 + 1)
            cluster.checker.warp_writes(warp, shadow, cells, line, generic=False)

    return Wait(
        ready=lambda: not pair or len(meeting) == 2,
        finish=finish,
        describe=lambda: "the other CTA's tcgen05.alloc.cta_group::2",
        waiters=cluster.meeting_waiters,
        following=following,
        line=line,
    )


def _meet(cluster: Cluster, meeting: list) -> None:
    """Both CTAs of a pair are here."""
    (first, first_columns), (second, second_columns) = meeting
    if first.cta is second.cta or first_columns != second_columns:
        raise ProtocolError("tcgen05.alloc.cta_group::2: the CTAs of the pair don't agree")
    if cluster.checker is not None:
        key = ("tcgen05.alloc", id(meeting))
        for member in (first, second):
            cluster.checker.arrive(member, key)
        cluster.checker.complete(key)
    cluster.wake(cluster.meeting_waiters)


@runtime
def deallocate_tensor(warp: Warp, address: int, columns: int, line: int) -> None:
    """Free exactly what was allocated; every use must be ordered before."""
    allocated = warp.cta.tensor.allocated
    column = address & 0xFFFF
    if allocated.get(column) != columns:
        raise ProtocolError(
            f"tcgen05.dealloc of {columns} columns at {column}: allocated are {allocated}"
        )
    checker = warp.cluster.checker
    if checker is not None:
        shadow = checker.tensor[warp.cta.rank]
        for quarter in range(4):
            cells = _cells(quarter, column, columns)
            checker.warp_writes(warp, shadow, cells, line, generic=False)
            shadow.writer[cells] = -1
    del allocated[column]


def _cells(quarter: int, column: int, columns: int) -> slice:
    """Cells of 32 lanes of tensor memory, as the happens-before check counts them."""
    return slice(quarter * COLUMNS + column, quarter * COLUMNS + column + columns)


# Loads and stores ---------------------------------------------------------------------------------


@instruction(
    f"tcgen05.ld.sync.aligned.32x32b(count={_COUNTS}).b32", unit=Unit.tensor, convergent=True
)
def load(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """tcgen05.ld: a lane gets consecutive columns of its lane of tensor memory.

    The registers are valid after tcgen05.wait::ld only, but NVVM itself moves and packs them before
    it, so a use that is too early is not looked for; what overwrites the columns too early is.
    """
    destination, place = op.operands
    targets = items(destination)
    assert len(targets) == int(m["count"][1:]) and e.mask is None
    name = e.temporary()
    e.emit(
        f"{name} = load_tensor_memory(warp, uniform({e.address(place)}, None), {len(targets)}, "
        f"{e.line})"
    )
    for index, target in enumerate(targets):
        if not isinstance(target, Sink):
            e.define(target, "u32", f"{name}[{index}]")


@instruction(
    f"tcgen05.st.sync.aligned.32x32b(count={_COUNTS}).b32", unit=Unit.tensor, convergent=True
)
def store(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """tcgen05.st."""
    place, source = op.operands
    values = items(source)
    assert len(values) == int(m["count"][1:]) and e.mask is None
    packed = ", ".join(e.lanes(x, "u32") for x in values)
    e.emit(f"store_tensor_memory(warp, uniform({e.address(place)}, None), ({packed},), {e.line})")


@instruction("tcgen05.wait(kind=::ld|::st).sync.aligned", unit=Unit.tensor, convergent=True,
             ends_block=True)  # fmt: skip
def wait(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """tcgen05.wait::ld and ::st."""
    e.emit(f"wait_tensor_memory(warp, {m['kind'][2:]!r})")


@instruction(
    "tcgen05.fence(::before_thread_sync|::after_thread_sync)", unit=Unit.tensor
)  # fmt: skip
def fence(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """tcgen05.fence: not modelled."""


def _place(warp: Warp, address: int, columns: int, what: str) -> tuple[int, int]:
    """(first lane, column) of a 32x32b access: a warp reaches its own quarter of the lanes."""
    lane, column = address >> 16, address & 0xFFFF
    quarter = warp.number % 4
    if lane != 32 * quarter:
        raise ProtocolError(
            f"{what} at lane {lane} by warp {warp.number}, which reaches lanes {32 * quarter} to "
            f"{32 * quarter + 31}"
        )
    warp.cta.tensor.check(column, columns)
    return lane, column


@runtime
def load_tensor_memory(warp: Warp, address: int, count: int, line: int) -> list[Array]:
    """The words of each register."""
    lane, column = _place(warp, address, count, "tcgen05.ld")
    warp.counts["tensor columns read"] += count
    checker = warp.cluster.checker
    if checker is not None:
        # Complete only after tcgen05.wait::ld: until then another agent reads.
        agent, epoch = checker.start(("tcgen05.ld", warp), f"tcgen05.ld of {warp.name}")
        clock = checker.clocks[warp]
        cells = _cells(lane // 32, column, count)
        checker.read(checker.tensor[warp.cta.rank], cells, clock, (agent, epoch), line)
    words = warp.cta.tensor.words[lane : lane + LANES, column : column + count]
    return list(np.ascontiguousarray(words.T))


@runtime
def store_tensor_memory(warp: Warp, address: int, values: tuple[Array, ...], line: int) -> None:
    """Asynchronous until tcgen05.wait::st, for the happens-before check."""
    lane, column = _place(warp, address, len(values), "tcgen05.st")
    warp.counts["tensor columns written"] += len(values)
    checker = warp.cluster.checker
    if checker is not None:
        agent, epoch = checker.start(("tcgen05.st", warp), f"tcgen05.st of {warp.name}")
        clock = checker.clocks[warp].copy()
        clock[agent] = epoch
        cells = _cells(lane // 32, column, len(values))
        checker.write(checker.tensor[warp.cta.rank], cells, clock, (agent, epoch), line)
    words = np.stack(values, 1)
    warp.cta.tensor.words[lane : lane + LANES, column : column + len(values)] = words


@runtime
def wait_tensor_memory(warp: Warp, kind: str) -> None:
    """The warp's loads have arrived, or its stores are done."""
    checker = warp.cluster.checker
    if checker is not None:
        agent = checker.agent((f"tcgen05.{kind}", warp), f"tcgen05.{kind} of {warp.name}")
        checker.join(warp, agent, int(checker.epochs[agent]))


# MMA ----------------------------------------------------------------------------------------------


@instruction(
    f"tcgen05.mma{_GROUP}.kind::f16"
    "{.collector::a::discard|.collector::a::fill|.collector::a::use|.collector::a::lastuse}",
    unit=Unit.tensor,
)
def multiply(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """tcgen05.mma kind::f16: collector hints change speed only. One thread issues it."""
    destination, a, b, descriptor, *rest = op.operands
    disabled = "()"
    if isinstance(rest[0], Vector):
        words = "".join(f"{e.value(x, 'u32')}, " for x in rest[0].items)
        disabled, rest = f"({words})", rest[1:]
    if len(rest) != 1:
        raise UnsupportedInstruction("tcgen05.mma with scale-input-d")
    enable = rest[0]
    if isinstance(enable, Immediate):
        accumulate = f"np.full(LANES, {bool(enable.value)})"
    else:
        accumulate = e.lanes(enable, "pred")
    in_tensor = isinstance(a, Memory)
    source = e.address(a) if in_tensor else e.value(a, "u64")
    operands = f"({e.address(destination)}, {source}, {e.value(b, 'u64')}, "
    operands += f"{e.value(descriptor, 'u32')})"
    form = f"({in_tensor}, {m['group'][-1]})"
    e.emit(f"issue_mma(warp, {operands}, {form}, {accumulate}, {disabled}, {e.active}, {e.line})")


@instruction(
    f"tcgen05.commit{_GROUP}.mbarrier::arrive::one.shared::cluster{{multicast=.multicast::cluster}}.b64",
    f"tcgen05.commit{_GROUP}.mbarrier::arrive::one{{multicast=.multicast::cluster}}.b64",
    unit=Unit.tensor,
)
def commit(e: Emitter, op: Instruction, m: Modifiers) -> None:
    """tcgen05.commit: an arrival, once the thread's MMAs so far have completed."""
    mask = e.value(op.operands[1], "u16") if m["multicast"] else "None"
    e.emit(f"issue_commit(warp, {e.address(op.operands[0])}, {mask}, {e.active}, {e.line})")


class _Mma:
    """One tcgen05.mma with everything decoded."""

    def __init__(
        self,
        cta: Cta,
        group: int,
        destination: int,
        source: int,
        in_tensor: bool,
        b: int,
        bits: int,
    ) -> None:
        self.cta, self.in_tensor = cta, in_tensor
        self.shape = matrix.InstructionDescriptor.decode(bits)
        self.ctas = (cta,) if group == 1 else cta.cluster.pair(cta)
        self.b = matrix.tcgen05_descriptor(b)
        self.a = None if in_tensor else matrix.tcgen05_descriptor(source)
        self.a_column = source & 0xFFFF
        self.column = destination & 0xFFFF
        # M = 128 over two CTAs: 64 rows each, lanes 64 to 127 hold columns N/2 and up.
        self.folded = group == 2 and self.shape.rows == 128
        if self.shape.rows != 128 * group and not self.folded:
            raise NotImplementedError(f"tcgen05.mma with M = {self.shape.rows}, cta_group::{group}")
        if self.folded and in_tensor:
            raise NotImplementedError(
                "tcgen05.mma with M = 128, cta_group::2 and A in tensor memory"
            )
        if destination >> 16 or (in_tensor and source >> 16):
            raise NotImplementedError("tcgen05.mma at a lane other than 0")
        self.rows = 64 if self.folded else 128
        self.b_rows = self.shape.columns // group
        self.columns = self.shape.columns // 2 if self.folded else self.shape.columns
        for member in self.ctas:
            member.tensor.check(self.column, self.columns)
            if in_tensor:
                member.tensor.check(self.a_column, 8)

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.shape.rows * self.shape.columns * 16

    def run(self, accumulate: bool, enabled: Array) -> None:
        """Multiply and accumulate in every CTA of the group."""
        shape = self.shape
        parts = [
            self._operand(c, self.b, self.b_rows, shape.b_mn_major, shape.b_kind) for c in self.ctas
        ]
        b = parts[0] if len(parts) == 1 else np.concatenate(parts)
        for member in self.ctas:
            if self.a is None:
                words = member.tensor.words[:, self.a_column : self.a_column + 8]
                a = matrix.widen(matrix.shared_words(words), shape.a_kind)
            else:
                a = self._operand(member, self.a, self.rows, shape.a_mn_major, shape.a_kind)
            result = matrix.product(a, b)
            if shape.negate:
                result = -result
            if self.folded:
                half = shape.columns // 2
                result = np.concatenate([result[:, :half], result[:, half:]])
            target = member.tensor.floats[:, self.column : self.column + self.columns]
            total = target + result if accumulate else result
            target[enabled] = total[enabled].astype(f32, copy=False)

    @staticmethod
    def _operand(
        cta: Cta, descriptor: matrix.SharedDescriptor, rows: int, mn_major: bool, kind: str
    ) -> Array:
        return cta.operand(
            (descriptor, rows, mn_major, kind),
            lambda: matrix.read_operand(cta.shared, descriptor, rows, 16, mn_major, kind),
        )

    def note(self, checker: HappensBefore, warp: Warp, accumulate: bool, line: int) -> None:
        """Tell the checker what it reads and writes; the pipe itself is in order."""
        name = f"tensor pipe of CTA {warp.cta.coordinates}"
        agent, epoch = checker.start(("tensor pipe", warp.cta.rank), name)
        clock = checker.clocks[warp].copy()
        clock[agent] = epoch
        operation = (agent, epoch)
        for member in self.ctas:
            shared, tensor = checker.shared[member.rank], checker.tensor[member.rank]
            cells = matrix.operand_cells(self.b, self.b_rows, 16, self.shape.b_mn_major)
            checker.read(shared, cells, clock, operation, line, asynchronous=True)
            if self.a is not None:
                cells = matrix.operand_cells(self.a, self.rows, 16, self.shape.a_mn_major)
                checker.read(shared, cells, clock, operation, line, asynchronous=True)
            for quarter in range(4):
                if self.a is None:
                    source = _cells(quarter, self.a_column, 8)
                    checker.read(tensor, source, clock, operation, line)
                target = _cells(quarter, self.column, self.columns)
                if accumulate:
                    checker.read(tensor, target, clock, operation, line)
                checker.write(tensor, target, clock, operation, line)


@runtime
def issue_mma(
    warp: Warp,
    operands: tuple[Array, Array, Array, Array],
    form: tuple[bool, int],
    accumulate: Array,
    disabled: tuple[Array, ...],
    active: Array | None,
    line: int,
) -> None:
    """Every active lane issues one; kernels elect a lane. The operands are D, A, B and the
    instruction descriptor; the form is whether A is in tensor memory, and the CTA group."""
    in_tensor, group = form
    for lane in active_lanes(active):
        destination, source, b, descriptor = (at(x, lane) for x in operands)
        mma = _Mma(warp.cta, group, destination, source, in_tensor, b, descriptor)
        adds = bool(accumulate[lane])
        enabled = np.ones(TensorMemory.LANES, bool)
        if disabled:
            words = np.array([at(word, lane) for word in disabled[:4]], u32)
            enabled = np.unpackbits(words.view(np.uint8), bitorder="little") == 0
        warp.counts["tensor FLOPs"] += mma.flops
        warp.counts["operand bytes"] += 32 * (mma.b_rows + (0 if in_tensor else mma.rows)) * group
        if warp.cluster.checker is not None:
            mma.note(warp.cluster.checker, warp, adds, line)
        warp.cluster.start_tensor(
            warp, line, lambda mma=mma, adds=adds, enabled=enabled: mma.run(adds, enabled)
        )


@runtime
def issue_commit(
    warp: Warp, address: Array, mask: Array | None, active: Array | None, line: int
) -> None:
    """An arrival at one mbarrier, or at the same offset in each CTA of the mask."""
    cluster = warp.cluster
    for lane in active_lanes(active):
        place = at(address, lane)
        if mask is None:
            barriers = [mbarrier_at(warp, place)]
        else:
            bits = at(mask, lane)
            ranks = [rank for rank in range(len(cluster.ctas)) if bits >> rank & 1]
            barriers = [mbarrier_at(warp, place & 0xFFFFFF | rank << 24) for rank in ranks]
        if cluster.checker is not None:
            name = f"tensor pipe of CTA {warp.cta.coordinates}"
            agent = cluster.checker.agent(("tensor pipe", warp.cta.rank), name)
            for barrier in barriers:
                cluster.checker.use_mbarrier(warp, barrier, line, asynchronous=True)
                epoch = int(cluster.checker.epochs[agent])
                cluster.checker.arrive_operation(warp, barrier, agent, epoch)
        cluster.start_tensor(warp, line, _arrivals(barriers))


def _arrivals(barriers: list) -> Callable[[], None]:
    def run() -> None:
        for barrier in barriers:
            barrier.arrive(1, 0)

    return run
