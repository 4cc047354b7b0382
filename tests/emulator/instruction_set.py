# SPDX-License-Identifier: Apache-2.0
"""The table of instructions: which opcodes exist, which modifiers each takes, what translates it.

A handler declares its opcodes with the notation of the PTX ISA's syntax boxes:

    @instruction("cvt{rounding=.rn|.rz}{.ftz}.f16.f32", unit=Unit.convert)

`{...}` is optional, `(...)` is required, alternatives are separated by `|`, and `name=` makes the
choice readable by the handler. Everything else is literal. An opcode that no pattern matches in
full is an `UnsupportedInstruction`: a modifier can't be ignored by accident.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import UnsupportedInstruction

if TYPE_CHECKING:
    from .codegen import Emitter
    from .ptx import Instruction


class Unit(enum.StrEnum):
    """What executes an instruction; the resource report counts by these."""

    integer = enum.auto()
    fma = enum.auto()
    mufu = enum.auto()
    convert = enum.auto()
    move = enum.auto()
    shared = enum.auto()
    shuffle = enum.auto()
    memory = enum.auto()
    tensor = enum.auto()
    bulk = enum.auto()
    barrier = enum.auto()
    control = enum.auto()


Handler = Callable[["Emitter", "Instruction", dict[str, str]], None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One pattern of the table."""

    pattern: str
    regex: re.Pattern[str]
    handler: Handler
    unit: Unit
    convergent: bool
    starts_block: bool
    ends_block: bool


_ENTRIES: list[Entry] = []
_GROUP = re.compile(r"[{(](?:(\w+)=)?([^{}()]*)[})]|([^{}()]+)")


def pattern_regex(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern in the notation above."""
    text, position = "", 0
    for match in _GROUP.finditer(pattern):
        if match.start() != position:
            raise ValueError(f"malformed instruction pattern: {pattern}")
        position = match.end()
        if match.group(3) is not None:
            text += re.escape(match.group(3))
            continue
        name, alternatives = match.group(1), match.group(2).split("|")
        opening = f"(?P<{name}>" if name else "(?:"
        optional = "?" if match.group(0)[0] == "{" else ""
        text += opening + "|".join(re.escape(a) for a in alternatives) + ")" + optional
    if position != len(pattern):
        raise ValueError(f"malformed instruction pattern: {pattern}")
    return re.compile(text)


def instruction(
    *patterns: str,
    unit: Unit,
    convergent: bool = False,
    starts_block: bool = False,
    ends_block: bool = False,
) -> Callable[[Handler], Handler]:
    """Register the decorated function as the translator of `patterns`.

    `convergent`: the lanes of a warp must execute it together (`.sync`, `.aligned`), so a diverged
    warp first runs everything else. `ends_block`: the warp may have to wait here, or other clusters
    go on. `starts_block`: the warp may have to wait before it, and comes back to it alone.
    """

    def register(handler: Handler) -> Handler:
        for pattern in patterns:
            regex = pattern_regex(pattern)
            blocks = (convergent, starts_block, ends_block)
            _ENTRIES.append(Entry(pattern, regex, handler, unit, *blocks))
        return handler

    return register


@functools.cache
def lookup(opcode: str) -> tuple[Entry, dict[str, str]]:
    """The entry of an opcode, and its named modifiers without the dot ("" where absent)."""
    found = [(entry, m) for entry in _ENTRIES if (m := entry.regex.fullmatch(opcode))]
    if not found:
        base = opcode.partition(".")[0]
        known = [
            entry.pattern for entry in _ENTRIES if re.match(rf"{base}(?![a-z0-9])", entry.pattern)
        ]
        forms = "; known forms: " + ", ".join(known) if known else ""
        raise UnsupportedInstruction(f"the emulator has no instruction {opcode}{forms}")
    if len(found) > 1:
        patterns = ", ".join(entry.pattern for entry, _ in found)
        raise AssertionError(f"{opcode} matches more than one pattern: {patterns}")
    entry, match = found[0]
    return entry, {name: (value or "").lstrip(".") for name, value in match.groupdict().items()}


RUNTIME: dict[str, Callable[..., object]] = {}


def runtime(function: Callable[..., object]) -> Callable[..., object]:
    """Make the decorated function callable, by its name, from translated blocks."""
    if RUNTIME.setdefault(function.__name__, function) is not function:
        raise ValueError(f"two run-time functions are called {function.__name__}")
    return function


def patterns() -> tuple[str, ...]:
    """Every declared pattern; the tests check that each is exercised."""
    return tuple(entry.pattern for entry in _ENTRIES)
