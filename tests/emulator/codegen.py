# SPDX-License-Identifier: Apache-2.0
"""PTX to Python: one function per basic block, on NumPy arrays of 32 lanes.

Interpreting one instruction at a time costs a dispatch per instruction; a block translated to
Python source costs one call. Each block becomes two functions, `full_N(warp, registers)` for 32
active lanes and `masked_N(warp, registers, mask)` for fewer, because most blocks run converged and
`numpy.where` is what masking costs. A function returns the next block's number, or an event
(`events`).

A register is an array in the register file, a list that the functions index by number: bool for
predicates, uint16, uint32 or float32, uint64. A 32-bit register that float instructions use more
often than others lives as float32, its *home*; other views are made where needed and kept until the
register is written again.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator

from . import instruction_set
from .errors import UnsupportedInstruction
from .instruction_set import Entry, Unit
from .ptx import (
    TYPE_BYTES,
    DoubleBits,
    FloatBits,
    Immediate,
    Instruction,
    Kernel,
    Label,
    Memory,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)

# Addresses of kernel parameters, above every address that a process can have.
PARAMETER_BASE = 0x7000000000000000

BITS = {
    "u8": 8,
    "i8": 8,
    "u16": 16,
    "i16": 16,
    "u32": 32,
    "i32": 32,
    "f32": 32,
    "u64": 64,
    "i64": 64,
    "f64": 64,
}
# The NumPy type, by its name in generated code, of each PTX type; `f32x2` is 64 floats, lane by
# lane.
DTYPES = {
    "b8": "u8", "u8": "u8", "s8": "i8", "b16": "u16", "u16": "u16", "s16": "i16", "f16": "u16",
    "bf16": "u16", "b32": "u32", "u32": "u32", "s32": "i32", "f32": "f32", "b64": "u64",
    "u64": "u64",
    "s64": "i64", "f64": "f64", "f32x2": "f32x2", "f16x2": "u32", "bf16x2": "u32", "pred": "pred",
}  # fmt: skip
_ZEROS = {
    "pred": "ZERO_PRED",
    "u16": "ZERO_U16",
    "u32": "ZERO_U32",
    "f32": "ZERO_F32",
    "u64": "ZERO_U64",
}
_HOMES = {1: "u16", 2: "u16", 4: "u32", 8: "u64"}


@dataclasses.dataclass
class Block:
    """A basic block: it runs to its end, but for events that a warp may have to wait for."""

    number: int
    instructions: list[Instruction] = dataclasses.field(default_factory=list)
    follows_label: bool = False
    convergent: bool = False
    units: collections.Counter[Unit] = dataclasses.field(default_factory=collections.Counter)
    fma_slots: int = 0
    """Instructions of the FMA pipe; one on two packed numbers is two."""

    @property
    def line(self) -> int:
        """The PTX line of the first instruction."""
        return self.instructions[0].line if self.instructions else 0

    @property
    def text(self) -> str:
        """The first instruction."""
        return self.instructions[0].text if self.instructions else "end of the kernel"


def build_blocks(kernel: Kernel) -> tuple[list[Block], dict[str, int]]:
    """(blocks, block number of each label)."""
    blocks, labels = [Block(0)], {}
    missing: dict[str, list[int]] = {}
    for item in kernel.body:
        block = blocks[-1]
        if isinstance(item, Label):
            if block.instructions:
                block = Block(len(blocks))
                blocks.append(block)
            block.follows_label = True
            labels[item.name] = block.number
            continue
        try:
            entry, _ = instruction_set.lookup(item.opcode)
        except UnsupportedInstruction as error:
            missing.setdefault(str(error), []).append(item.line)
            continue
        if entry.starts_block and block.instructions:
            block = Block(len(blocks))
            blocks.append(block)
        block.instructions.append(item)
        block.units[entry.unit] += 1
        if entry.unit is Unit.fma:
            block.fma_slots += 2 if item.opcode.endswith("f32x2") else 1
        block.convergent |= entry.convergent
        if entry.ends_block or is_spin(block, item):
            blocks.append(Block(len(blocks)))
    if missing:
        found = "\n  ".join(
            f"PTX line {', '.join(map(str, n[:5]))}: {m}" for m, n in missing.items()
        )
        raise UnsupportedInstruction(f"{kernel.name}:\n  {found}")
    return blocks, labels


def is_spin(block: Block, item: Instruction) -> bool:
    """Whether this is a wait at the head of its own loop, at which a warp may be parked.

    A `try_wait` elsewhere is a test: parking there could deadlock a kernel that only looks.
    """
    is_wait = item.opcode.startswith(("mbarrier.try_wait", "mbarrier.test_wait"))
    return is_wait and block.follows_label and block.instructions == [item]


class Emitter:
    """Translates the blocks of one kernel; instruction handlers call its methods."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.slots = {name: slot for slot, name in enumerate(kernel.registers)}
        self.homes = _register_homes(kernel)
        self.parameters = {parameter.name: parameter for parameter in kernel.parameters}
        self.blocks, self.labels = build_blocks(kernel)
        self.constants: dict[str, str] = {}
        self.block = self.blocks[0]
        self.mask: str | None = None
        self.line = 0
        self.terminated = False
        self._body: list[str] = []
        self._body_lines: list[int] = []
        self._cache: dict[tuple[str, str], str] = {}
        self._temporaries = 0

    def source(self) -> tuple[str, list[int]]:
        """(Python source, PTX line of each source line)."""
        text: list[str] = []
        lines: list[int] = []
        for block in self.blocks:
            for name, arguments, mask in (("full", "", None), ("masked", ", mask", "mask")):
                self._translate(block, mask)
                text.append(f"def {name}_{block.number}(warp, registers{arguments}):")
                lines.append(block.line)
                text += [f"    {statement}" for statement in self._body]
                lines += self._body_lines
        header = [f"{name} = {expression}" for expression, name in self.constants.items()]
        return "\n".join(header + text) + "\n", [0] * len(header) + lines

    def _translate(self, block: Block, mask: str | None) -> None:
        self.block, self._body, self._body_lines, self._cache = block, [], [], {}
        self.terminated = False
        for item in block.instructions:
            entry, modifiers = instruction_set.lookup(item.opcode)
            self.line, self.mask = item.line, mask
            if item.guard is not None and item.opcode not in ("bra", "bra.uni"):
                self.mask = self._guarded(item, mask)
            if mask is not None and ".aligned" in item.opcode:
                self.end(f"partial_warp({mask})")
                return
            try:
                self._handle(entry, item, modifiers)
            except UnsupportedInstruction as error:
                raise UnsupportedInstruction(
                    f"{self.kernel.name}: PTX line {item.line}: {item.text}: {error}"
                ) from error
            if self.terminated:
                return
        self.emit(f"return {block.number + 1}")

    def _handle(self, entry: Entry, item: Instruction, modifiers: dict[str, str]) -> None:
        try:
            entry.handler(self, item, modifiers)
        except (KeyError, IndexError, ValueError, AttributeError, AssertionError) as error:
            # A form of the instruction that its handler doesn't foresee.
            raise UnsupportedInstruction(f"{type(error).__name__} {error}") from error

    def _guarded(self, item: Instruction, mask: str | None) -> str:
        assert item.guard is not None
        predicate = self.value(item.guard.register, "pred")
        name = self.temporary()
        condition = f"~{predicate}" if item.guard.negated else predicate
        self.emit(f"{name} = {condition}" + (f" & {mask}" if mask else ""))
        return name

    # What handlers call ---------------------------------------------------------------------------

    def emit(self, statement: str) -> None:
        """Append a statement."""
        self._body.append(statement)
        self._body_lines.append(self.line)

    def end(self, expression: str) -> None:
        """End the block with an event."""
        self.emit(f"return {expression}")
        self.terminated = True

    def temporary(self) -> str:
        """A fresh name."""
        self._temporaries += 1
        return f"t{self._temporaries}"

    def constant(self, expression: str) -> str:
        """The name of a module-level constant."""
        return self.constants.setdefault(expression, f"C{len(self.constants)}")

    @property
    def active(self) -> str:
        """The mask of active lanes in generated code; None where all are."""
        return self.mask or "None"

    @property
    def following(self) -> int:
        """The number of the next block."""
        return self.block.number + 1

    def value(self, operand: Operand, dtype: str) -> str:
        """An operand as an expression: an array of 32 lanes, or a NumPy scalar if it is
        constant."""
        match operand:
            case Register(name):
                return self._register(name, dtype)
            case Immediate(value):
                return self.constant(_integer_constant(value, dtype))
            case FloatBits(bits):
                return self.constant(
                    f"np.uint32({bits}).view({'f32' if dtype[0] == 'f' else dtype})"
                )
            case DoubleBits(bits):
                return self.constant(f"np.uint64({bits}).view({dtype})")
            case Special(name):
                view = "" if dtype == "u32" else f".view({dtype})"
                return f"warp.special({name!r}){view}"
            case Symbol(name) if name in self.parameters:
                return self.constant(f"u64({PARAMETER_BASE + self.parameters[name].offset})")
            case Symbol(name) if name in self.kernel.dynamic_shared:
                return (
                    "warp.dynamic_shared"
                    if dtype == "u32"
                    else f"warp.dynamic_shared.astype({dtype})"
                )
        raise UnsupportedInstruction(f"operand {operand}")

    def lanes(self, operand: Operand, dtype: str) -> str:
        """An operand as an array of 32 lanes in any case."""
        expression = self.value(operand, dtype)
        if isinstance(operand, (Register, Special)):
            return expression
        return f"np.full(32, {expression}, {'bool' if dtype == 'pred' else dtype})"

    def scalar(self, operand: Operand, dtype: str) -> str:
        """An operand that is the same in all active lanes, as a Python int."""
        if isinstance(operand, Immediate):
            return str(operand.value)
        return f"uniform({self.value(operand, dtype)}, {self.active})"

    def _register(self, name: str, dtype: str) -> str:
        home = self.homes[name]
        slot = self.slots[name]
        if (name, dtype) in self._cache:
            return self._cache[name, dtype]
        if (name, home) not in self._cache:
            self.emit(f"r{slot} = registers[{slot}]")
            self._cache[name, home] = f"r{slot}"
        if dtype == home:
            return self._cache[name, home]
        bits = 64 if dtype == "f32x2" else BITS.get(dtype)
        if home == "pred" or dtype == "pred" or BITS[home] != bits:
            raise UnsupportedInstruction(f"register {name} of type {home} used as {dtype}")
        view = f"r{slot}_{dtype}"
        self.emit(
            f"{view} = {self._cache[name, home]}.view({'f32' if dtype == 'f32x2' else dtype})"
        )
        self._cache[name, dtype] = view
        return view

    def define(self, operand: Operand, dtype: str, expression: str) -> None:
        """Assign an array of 32 lanes of `dtype` to a destination, in the active lanes."""
        if isinstance(operand, Sink):
            self.emit(expression)
            return
        if not isinstance(operand, Register):
            raise UnsupportedInstruction(f"destination {operand}")
        name, slot, home = operand.name, self.slots[operand.name], self.homes[operand.name]
        if dtype == "f32x2":
            expression, dtype = f"({expression}).view(u64)", "u64"
        if (home == "pred") != (dtype == "pred") or BITS.get(home) != BITS.get(dtype):
            raise UnsupportedInstruction(f"register {name} of type {home} assigned {dtype}")
        self.forget(operand)
        if self.mask is not None:
            view = "" if dtype == home else f".view({home})"
            self.emit(
                f"r{slot} = registers[{slot}] = "
                f"np.where({self.mask}, ({expression}){view}, registers[{slot}])"
            )
        elif dtype == home:
            self.emit(f"r{slot} = registers[{slot}] = {expression}")
        else:
            self.emit(f"r{slot}_{dtype} = {expression}")
            self.emit(f"r{slot} = registers[{slot}] = r{slot}_{dtype}.view({home})")
            self._cache[name, dtype] = f"r{slot}_{dtype}"
        self._cache[name, home] = f"r{slot}"

    def forget(self, operand: Operand) -> None:
        """Drop cached views of a register that a run-time function writes."""
        assert isinstance(operand, Register)
        for key in [key for key in self._cache if key[0] == operand.name]:
            del self._cache[key]

    def home(self, operand: Operand) -> str:
        """The type in which a register lives."""
        assert isinstance(operand, Register)
        return self.homes[operand.name]

    def slot(self, operand: Operand) -> int:
        """A register's index in the register file."""
        assert isinstance(operand, Register)
        return self.slots[operand.name]

    def address(self, operand: Operand) -> str:
        """A memory operand's address: uint64 or uint32 by its base, array or scalar."""
        assert isinstance(operand, Memory)
        base = operand.base
        if isinstance(base, Register):
            dtype = "u64" if self.homes[base.name] == "u64" else "u32"
        else:
            dtype = "u64" if isinstance(base, Symbol) and base.name in self.parameters else "u32"
        expression = self.value(base, dtype)
        if operand.offset:
            modulus = 1 << BITS[dtype]
            expression = f"({expression} + {self.constant(f'{dtype}({operand.offset % modulus})')})"
        return expression


def items(operand: Operand) -> tuple[Operand, ...]:
    """The elements of a vector operand; a scalar is its own only element."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def zeros(dtype: str) -> str:
    """The name of the all-zero register of a type."""
    return _ZEROS[dtype]


def _integer_constant(value: int, dtype: str) -> str:
    if dtype == "pred":
        return str(bool(value))
    if dtype in ("f32", "f32x2"):
        return f"np.uint32({value % 2**32}).view(f32)"
    value %= 1 << BITS[dtype]
    if dtype[0] == "i" and value >= 1 << (BITS[dtype] - 1):
        value -= 1 << BITS[dtype]
    return f"{dtype}({value})"


def _registers(operand: Operand | None) -> Iterator[str]:
    """The names of the registers in an operand."""
    match operand:
        case Register(name):
            yield name
        case Vector(elements):
            yield from itertools.chain(*map(_registers, elements))
        case Pair(first, second):
            yield from (*_registers(first), *_registers(second))
        case Memory(base, _, coordinates):
            yield from (*_registers(base), *_registers(coordinates))


def _register_homes(kernel: Kernel) -> dict[str, str]:
    """The type that each register lives in; 32-bit ones by how they are used most."""
    votes: collections.Counter[str] = collections.Counter()
    for item in kernel.body:
        if isinstance(item, Instruction):
            is_float = item.opcode.endswith(".f32") or ".f32.bf16.bf16" in item.opcode
            is_float |= ".f32.f16.f16" in item.opcode
            for name in itertools.chain(*map(_registers, item.operands)):
                votes[name] += 1 if is_float else -1
    homes = {}
    for name, kind in kernel.registers.items():
        home = "pred" if kind == "pred" else _HOMES[TYPE_BYTES[kind]]
        homes[name] = "f32" if home == "u32" and votes[name] > 0 else home
    return homes
