# SPDX-License-Identifier: Apache-2.0
"""PTX text to kernels: parameters, registers and instructions with resolved operands.

Covers what NVVM writes for CuTe DSL kernels and inline assembly in them: straight-line statements,
nested `{ }` scopes with their own registers and labels (PTX ISA 4.4, 5.2), vectors, `a|b` pairs of
destinations, memory operands with offsets and tensor coordinates. No function calls, no `.local`,
`.const` or static `.shared` data: each is an error.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator


class PtxError(Exception):
    """PTX text that this emulator does not understand; the message names the line."""


@dataclasses.dataclass(frozen=True)
class Register:
    """A register; names in an inner scope carry the scope's number, so they are unique."""

    name: str


@dataclasses.dataclass(frozen=True)
class Immediate:
    """An integer constant, possibly negative."""

    value: int


@dataclasses.dataclass(frozen=True)
class FloatBits:
    """A `0f` constant: the bits of a float32 (PTX ISA 4.5.2)."""

    bits: int


@dataclasses.dataclass(frozen=True)
class DoubleBits:
    """A `0d` constant: the bits of a float64 (PTX ISA 4.5.2)."""

    bits: int


@dataclasses.dataclass(frozen=True)
class Special:
    """A read-only special register such as `tid.x` (PTX ISA 10), without its percent sign."""

    name: str


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A label, parameter or variable."""

    name: str


@dataclasses.dataclass(frozen=True)
class Vector:
    """`{a, b, ...}`."""

    items: tuple[Operand, ...]


@dataclasses.dataclass(frozen=True)
class Memory:
    """`[base + offset]`, or `[base, {coordinates}]` of a tensor."""

    base: Operand
    offset: int = 0
    coordinates: Vector | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """`first|second`: two destinations."""

    first: Operand
    second: Operand


@dataclasses.dataclass(frozen=True)
class Negated:
    """`!p`."""

    operand: Operand


@dataclasses.dataclass(frozen=True)
class Sink:
    """`_`: a result nobody wants."""


Operand = (
    Register
    | Immediate
    | FloatBits
    | DoubleBits
    | Special
    | Symbol
    | Vector
    | Memory
    | Pair
    | Negated
    | Sink
)


@dataclasses.dataclass(frozen=True)
class Guard:
    """`@p` or `@!p`."""

    register: Register
    negated: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One statement: `opcode` includes every modifier, as written."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: Guard | None
    line: int
    text: str


@dataclasses.dataclass(frozen=True)
class Label:
    """A branch target, unique in the kernel."""

    name: str


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A kernel parameter's place in the parameter block (PTX ISA 5.1.6.1)."""

    name: str
    offset: int
    size: int


@dataclasses.dataclass
class Kernel:
    """One `.entry`."""

    name: str
    target: str
    parameters: tuple[Parameter, ...]
    parameter_bytes: int
    registers: dict[str, str]
    """Register name to its declared type, without the dot."""
    body: list[Instruction | Label]
    dynamic_shared: frozenset[str]
    """Names of `.extern .shared` arrays: all of them start at the base of dynamic shared memory."""


TYPE_BYTES = {
    "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4,
    "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "pred": 1,
}  # fmt: skip

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", re.DOTALL)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s*(?:\.\w+)?\s*(?:\.align\s+\d+)?\s*)?"
    r"([\w$]+)(?:\[(\d+)\])?"
)
_EXTERN_SHARED = re.compile(r"\.extern\s+\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+([\w$]+)\[\s*\]")
_OTHER_DATA = re.compile(
    r"^\s*(?:\.visible\s+|\.weak\s+)?\.(shared|const|global|local|func)\b.*$", re.M
)
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_DECLARATION = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_RANGE = re.compile(r"([%\w$]+)<(\d+)>")
_GUARD = re.compile(r"@(!?)([%\w$]+)\s+")
_STATEMENT = re.compile(r"([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_OFFSET = re.compile(r"^(.*?)\s*\+\s*(-?\w+)$", re.DOTALL)
_FLOAT = re.compile(r"^0[fF]([0-9a-fA-F]{8})$")
_DOUBLE = re.compile(r"^0[dD]([0-9a-fA-F]{16})$")
_INTEGER = re.compile(r"^-?(?:0[xX][0-9a-fA-F]+|\d+)[uU]?$")


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX module, by name."""
    text = _without_comments(text)
    target = re.search(r"\.target\s+(\w+)", text)
    if target is None:
        raise PtxError("no .target directive")
    other = _OTHER_DATA.search(text)
    if other is not None:
        line = text.count("\n", 0, other.start()) + 1
        raise PtxError(f"line {line}: unsupported module-scope data: {other.group(0).strip()[:80]}")
    shared = frozenset(match.group(1) for match in _EXTERN_SHARED.finditer(text))
    kernels = {}
    for entry in _ENTRY.finditer(text):
        parameters, size = _parameters(entry.group(2))
        registers, body = _Body(text, entry.end()).parse()
        kernels[entry.group(1)] = Kernel(
            name=entry.group(1),
            target=target.group(1),
            parameters=parameters,
            parameter_bytes=size,
            registers=registers,
            body=body,
            dynamic_shared=shared,
        )
    return kernels


def _without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group(0).count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def _parameters(text: str) -> tuple[tuple[Parameter, ...], int]:
    parameters, offset = [], 0
    for match in _PARAMETER.finditer(text):
        alignment, kind, name, count = match.groups()
        size = TYPE_BYTES[kind] * int(count or 1)
        align = int(alignment or TYPE_BYTES[kind])
        offset = (offset + align - 1) // align * align
        parameters.append(Parameter(name, offset, size))
        offset += size
    return tuple(parameters), offset


@dataclasses.dataclass(frozen=True)
class _Statement:
    text: str
    scope: int
    line: int
    is_label: bool = False


class _Body:
    """The parser of one kernel's body; scope 0 is the body itself."""

    def __init__(self, text: str, start: int) -> None:
        self.text, self.start = text, start
        self.parents: dict[int, int | None] = {0: None}
        self.names: dict[tuple[int, str], str] = {}
        self.labels: set[str] = set()

    def parse(self) -> tuple[dict[str, str], list[Instruction | Label]]:
        """(register types, instructions and labels)."""
        statements = list(self._statements())
        registers: dict[str, str] = {}
        for statement in statements:
            if statement.is_label:
                self.labels.add(self._declare(statement.text, statement.scope))
            elif statement.text.startswith(".reg"):
                declaration = _DECLARATION.match(statement.text)
                assert declaration is not None
                for name in self._declared_names(declaration.group(2)):
                    registers[self._declare(name, statement.scope)] = declaration.group(1)
        body: list[Instruction | Label] = []
        for statement in statements:
            if statement.is_label:
                body.append(Label(self.names[statement.scope, statement.text]))
            elif not statement.text.startswith("."):
                body.append(self._instruction(statement))
            elif not statement.text.startswith((".reg", ".pragma", ".loc")):
                raise PtxError(f"line {statement.line}: unsupported: {statement.text[:80]}")
        return registers, body

    def _statements(self) -> Iterator[_Statement]:
        text, position, scope, scopes = self.text, self.start, 0, 0
        line = text.count("\n", 0, position) + 1
        while position < len(text):
            character = text[position]
            if character.isspace() or character == ";":
                line += character == "\n"
                position += 1
            elif character == "{":
                scopes += 1
                self.parents[scopes] = scope
                scope, position = scopes, position + 1
            elif character == "}":
                parent = self.parents[scope]
                if parent is None:
                    return
                scope, position = parent, position + 1
            elif label := _LABEL.match(text, position):
                yield _Statement(label.group(1), scope, line, is_label=True)
                line += text.count("\n", position, label.end())
                position = label.end()
            else:
                end = text.index(";", position)
                yield _Statement(text[position:end].strip(), scope, line)
                line += text.count("\n", position, end)
                position = end + 1

    @staticmethod
    def _declared_names(text: str) -> Iterator[str]:
        for item in text.split(","):
            name = item.strip()
            match = _RANGE.match(name)
            if match is None:
                yield name
            else:
                yield from (f"{match.group(1)}{i}" for i in range(int(match.group(2))))

    def _declare(self, name: str, scope: int) -> str:
        unique = name if scope == 0 else f"{name}@{scope}"
        self.names[scope, name] = unique
        return unique

    def _resolve(self, name: str, scope: int) -> str | None:
        current: int | None = scope
        while current is not None:
            if (current, name) in self.names:
                return self.names[current, name]
            current = self.parents[current]
        return None

    def _instruction(self, statement: _Statement) -> Instruction:
        def operand(text: str) -> Operand:
            parsed = parse_operand(text, lambda name: self._resolve(name, statement.scope))
            if isinstance(parsed, Register) and parsed.name in self.labels:
                return Symbol(parsed.name)
            return parsed

        text, guard = statement.text, None
        try:
            if match := _GUARD.match(text):
                register = operand(match.group(2))
                assert isinstance(register, Register)
                guard = Guard(register, bool(match.group(1)))
                text = text[match.end() :]
            match = _STATEMENT.match(text)
            assert match is not None
            rest = match.group(2).strip()
            operands = tuple(operand(part) for part in split_top_level(rest)) if rest else ()
        except (AssertionError, ValueError) as error:
            raise PtxError(f"line {statement.line}: can't parse: {statement.text[:120]}") from error
        shown = " ".join(statement.text.split())
        return Instruction(match.group(1), operands, guard, statement.line, shown)


def split_top_level(text: str) -> list[str]:
    """Split at the commas that no bracket encloses."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()]


def parse_operand(text: str, resolve: Callable[[str], str | None]) -> Operand:
    """One operand; `resolve` gives the unique name of a declared register, None of another name."""
    text = text.strip()
    if text.startswith("{"):
        return Vector(tuple(parse_operand(item, resolve) for item in split_top_level(text[1:-1])))
    if text.startswith("["):
        return _memory(text[1:-1].strip(), resolve)
    if text == "_":
        return Sink()
    if "|" in text:
        first, _, second = text.partition("|")
        return Pair(parse_operand(first, resolve), parse_operand(second, resolve))
    if text.startswith("!"):
        return Negated(parse_operand(text[1:], resolve))
    name = resolve(text)
    return _name_or_constant(text) if name is None else Register(name)


def _name_or_constant(text: str) -> Operand:
    if match := _FLOAT.match(text):
        return FloatBits(int(match.group(1), 16))
    if match := _DOUBLE.match(text):
        return DoubleBits(int(match.group(1), 16))
    if _INTEGER.match(text):
        return Immediate(int(text.rstrip("uU"), 0))
    if text.startswith("%"):
        return Special(text[1:])
    if not re.fullmatch(r"[\w$]+", text):
        raise ValueError(f"operand {text!r}")
    return Symbol(text)


def _memory(text: str, resolve: Callable[[str], str | None]) -> Memory:
    base, *rest = split_top_level(text)
    coordinates = parse_operand(rest[0], resolve) if rest else None
    if len(rest) > 1 or not (coordinates is None or isinstance(coordinates, Vector)):
        raise ValueError(f"memory operand {text!r}")
    match = _OFFSET.match(base)
    if match is None:
        return Memory(parse_operand(base, resolve), 0, coordinates)
    return Memory(parse_operand(match.group(1), resolve), int(match.group(2), 0), coordinates)
