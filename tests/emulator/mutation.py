# SPDX-License-Identifier: Apache-2.0
"""Planted defects: does the emulator notice when a kernel is wrong?

    python -m tests.emulator.mutation fa4_forward_sm90a_bf16_d128 [--limit 3] [--kinds wait,fence]

Takes a compiled row's PTX, changes one instruction at a time, and runs the result like the tests
run a row: eagerly with the happens-before check, then late and in two seeded schedules, until
something is reported. Only instructions that the unchanged kernel executes are changed. What
survives is either equivalent (it says why in docs/emulator/mutations.md) or a hole.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from . import errors
from .device import Device, device
from .launch import Program
from .ptx import Immediate, Instruction, Kernel, Label, Memory, Operand, Pair, Register, Vector

Body = list["Instruction | Label"]
SCHEDULES = (("eager", True), ("late", False), ("pct:1", False), ("random:2", False))


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One defect: `apply` returns the changed body."""

    kind: str
    what: str
    line: int
    text: str
    apply: Callable[[Body], Body]

    def __str__(self) -> str:
        return f"{self.kind}: {self.what} at PTX line {self.line}: {self.text[:90]}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a mutant was found: `by` is empty if nothing noticed."""

    mutant: Mutant
    by: str
    schedule: str = ""
    message: str = ""


def _replaced(index: int, **changes: object) -> Callable[[Body], Body]:
    def apply(body: Body) -> Body:
        changed = list(body)
        changed[index] = dataclasses.replace(changed[index], **changes)  # type: ignore[type-var]
        return changed

    return apply


def _dropped(index: int) -> Callable[[Body], Body]:
    return lambda body: [*body[:index], *body[index + 1 :]]


def _inserted(index: int, *items: Instruction) -> Callable[[Body], Body]:
    return lambda body: [*body[:index], *items, *body[index:]]


def _instead(index: int, *items: Instruction) -> Callable[[Body], Body]:
    return lambda body: [*body[:index], *items, *body[index + 1 :]]


def _operand(item: Instruction, position: int, value: Operand) -> tuple[Operand, ...]:
    return (*item.operands[:position], value, *item.operands[position + 1 :])


def _shifted(item: Instruction, position: int, offset: int) -> tuple[Operand, ...]:
    """The operands with a memory operand moved by some bytes."""
    place = item.operands[position]
    assert isinstance(place, Memory)
    return _operand(item, position, dataclasses.replace(place, offset=place.offset + offset))


def _ordered(item: Instruction) -> str:
    """How an access to global memory is ordered, beyond `.relaxed`."""
    if not item.opcode.startswith(("ld.", "st.", "atom.", "red.")) or ".global" not in item.opcode:
        return ""
    return next((x for x in (".acquire", ".release", ".acq_rel") if x in item.opcode), "")


class Mutator:
    """The defects that one kernel allows."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.body = kernel.body
        self.releases = any(_ordered(x) for x in self.body if isinstance(x, Instruction))
        self.definitions: dict[str, tuple[int, Instruction]] = {}
        for index, item in enumerate(self.body):
            if isinstance(item, Instruction) and item.operands:
                first = item.operands[0]
                if isinstance(first, Register):
                    self.definitions[first.name] = (index, item)

    def mutants(self) -> Iterator[Mutant]:
        """Every defect, in program order."""
        for index, item in enumerate(self.body):
            if isinstance(item, Instruction):
                for kind, what, apply in self._of(index, item):
                    yield Mutant(kind, what, item.line, item.text, apply)

    def _of(self, index: int, item: Instruction) -> Iterator[tuple[str, str, Callable]]:
        yield from self._strong(index, item)
        yield from self._synchronisation(index, item)
        yield from self._barriers(index, item)
        yield from self._copies(index, item)
        yield from self._matrix(index, item)
        yield from self._arithmetic(index, item)
        yield from self._results(index, item)

    def _strong(self, index: int, item: Instruction) -> Iterator[tuple[str, str, Callable]]:
        """Of what CTAs communicate by."""
        opcode = item.opcode
        order = _ordered(item)
        if order:
            relaxed = opcode.replace(order, ".relaxed")
            yield "order", f"{order[1:]} relaxed", _replaced(index, opcode=relaxed)
        elif opcode in ("fence.acq_rel.gpu", "membar.gl"):
            yield "order", "fence dropped", _dropped(index)
        elif opcode == "cp.async.bulk.wait_group" and self.releases:
            yield "group wait", "of the sources only", _replaced(index, opcode=f"{opcode}.read")

    def _synchronisation(
        self, index: int, item: Instruction
    ) -> Iterator[tuple[str, str, Callable]]:
        opcode = item.opcode
        if opcode.startswith("mbarrier.try_wait"):
            yield "wait", "dropped", _replaced(index, opcode="setp.eq.b32", operands=(
                item.operands[0], Immediate(0), Immediate(0)))  # fmt: skip
            parity = item.operands[2]
            if isinstance(parity, Immediate):
                flipped = _operand(item, 2, Immediate(parity.value ^ 1))
                yield "phase", "flipped", _replaced(index, operands=flipped)
            else:
                yield (
                    "phase",
                    "constant",
                    _replaced(index, operands=_operand(item, 2, Immediate(0))),
                )
            yield (
                "stage",
                "waits for the next barrier",
                _replaced(index, operands=_shifted(item, 1, 8)),
            )
        elif opcode.startswith("mbarrier.arrive.expect_tx"):
            yield from self._expect(index, item)
        elif opcode.startswith("mbarrier.arrive"):
            yield "arrival", "dropped", _dropped(index)
            yield "arrival", "twice", _inserted(index, item)
            place = next(i for i, x in enumerate(item.operands) if isinstance(x, Memory))
            yield (
                "stage",
                "arrives at the next barrier",
                _replaced(index, operands=_shifted(item, place, 8)),
            )
        elif opcode.startswith("mbarrier.init"):
            yield "init", "dropped", _dropped(index)
            count = self._constant(item.operands[1])
            if count is not None:
                wrong = _operand(item, 1, Immediate(count + 1))
                yield "init", "one arrival more", _replaced(index, operands=wrong)

    def _barriers(self, index: int, item: Instruction) -> Iterator[tuple[str, str, Callable]]:
        opcode = item.opcode
        if opcode.startswith(("bar.sync", "barrier.sync")):
            yield "named barrier", "sync dropped", _dropped(index)
            if len(item.operands) > 1 and isinstance(item.operands[0], Immediate):
                other = Immediate((item.operands[0].value + 1) % 16)
                yield (
                    "named barrier",
                    "wrong number",
                    _replaced(index, operands=_operand(item, 0, other)),
                )
        elif opcode.startswith(("bar.arrive", "barrier.arrive")):
            yield "named barrier", "arrive dropped", _dropped(index)
        elif opcode.startswith(("fence.", "wgmma.fence", "tcgen05.wait")):
            yield "fence", "dropped", _dropped(index)
        elif opcode.startswith("setmaxnreg"):
            (count,) = item.operands
            assert isinstance(count, Immediate)
            yield "registers", "8 more", _replaced(index, operands=(Immediate(count.value + 8),))
        elif opcode.startswith(("tcgen05.dealloc", "tcgen05.alloc")):
            yield "tensor memory", f"{opcode.split('.')[1]} dropped", _dropped(index)

    def _expect(self, index: int, item: Instruction) -> Iterator[tuple[str, str, Callable]]:
        last = len(item.operands) - 1
        count = self._constant(item.operands[last])
        if count is not None:
            for change in (-16, 16, -count // 2):
                wrong = _operand(item, last, Immediate(count + change))
                yield "transaction count", f"{change:+} bytes", _replaced(index, operands=wrong)
        plain = item.opcode.replace(".expect_tx", "")
        yield (
            "transaction count",
            "not announced",
            _replaced(index, opcode=plain, operands=item.operands[:last]),
        )

    def _copies(self, index: int, item: Instruction) -> Iterator[tuple[str, str, Callable]]:
        opcode = item.opcode
        if opcode.startswith(("cp.async.bulk.wait", "wgmma.wait")):
            yield "group wait", "dropped", _dropped(index)
            (count,) = item.operands
            assert isinstance(count, Immediate)
            more = (Immediate(count.value + 1),)
            yield "group wait", "one group less", _replaced(index, operands=more)
        elif opcode.endswith("commit_group") or "commit_group." in opcode:
            yield "commit", "dropped", _dropped(index)
        elif opcode.startswith(("cp.async.bulk", "cp.reduce.async.bulk")):
            yield "copy", "dropped", _dropped(index)
            for position, operand in enumerate(item.operands[:2]):
                if isinstance(operand, Memory) and operand.coordinates is not None:
                    yield from self._coordinates(index, item, position, operand)
            if "mbarrier" in opcode:
                yield (
                    "stage",
                    "signals the next barrier",
                    _replaced(index, operands=_shifted(item, 2 if "tensor" in opcode else 3, 8)),
                )
                yield (
                    "copy",
                    "lands 128 bytes further",
                    _replaced(index, operands=_shifted(item, 0, 128)),
                )
        elif opcode.startswith("tcgen05.commit"):
            yield "arrival", "commit dropped", _dropped(index)

    def _coordinates(
        self, index: int, item: Instruction, position: int, operand: Memory
    ) -> Iterator[tuple[str, str, Callable]]:
        assert operand.coordinates is not None
        for axis, coordinate in enumerate(operand.coordinates.items[:3]):
            fresh = Register(f"%mutant{index}_{axis}")
            add = Instruction(
                "add.s32", (fresh, coordinate, Immediate(1)), None, item.line, "mutation"
            )
            items = list(operand.coordinates.items)
            items[axis] = fresh
            wrong = dataclasses.replace(operand, coordinates=Vector(tuple(items)))
            use = dataclasses.replace(item, operands=_operand(item, position, wrong))
            yield "copy", f"coordinate {axis} off by one", _instead(index, add, use)

    def _matrix(self, index: int, item: Instruction) -> Iterator[tuple[str, str, Callable]]:
        opcode = item.opcode
        if opcode.startswith("wgmma.mma_async"):
            yield "mma", "dropped", _dropped(index)
            for position, operand in enumerate(item.operands[4:], 4):
                if isinstance(operand, Immediate):
                    value = -operand.value if position < 6 else 1 - operand.value
                    what = f"immediate {position - 4} flipped"
                    yield (
                        "mma",
                        what,
                        _replaced(index, operands=_operand(item, position, Immediate(value))),
                    )
            transposes = [x.value for x in item.operands[6:] if isinstance(x, Immediate)]
            if len(transposes) == 2:
                transposes[0] = 0  # 64 rows are one swizzle atom: no leading offset
            if ".m64n64k" in opcode:
                transposes[-1] = 0
            yield from self._descriptors(index, item, transposes)
            flag = self._flag(item.operands[3])
            if flag is not None:
                wrong = _operand(item, 3, Immediate(1 - flag))
                yield "mma", f"accumulate = {1 - flag}", _replaced(index, operands=wrong)
        elif opcode.startswith("tcgen05.mma"):
            yield "mma", "dropped", _dropped(index)
            yield from self._descriptors(index, item, ())
        elif opcode.startswith("stmatrix"):
            yield "store", "stmatrix dropped", _dropped(index)
            other = opcode.replace(".trans", "") if ".trans" in opcode else opcode.replace(
                ".shared", ".trans.shared")  # fmt: skip
            yield "store", "stmatrix transposed", _replaced(index, opcode=other)

    def _descriptors(
        self, index: int, item: Instruction, transposes: Sequence[int]
    ) -> Iterator[tuple[str, str, Callable]]:
        """Flip a bit of a matrix descriptor just before its use; `transposes` are those of the
        descriptors, in order. A swizzled K-major operand has no leading offset."""
        flips = {
            "layout": 1 << 62,
            "stride offset": 1 << 35,
            "start": 1 << 1,
            "leading offset": 1 << 18,
        }
        positions = [
            position
            for position in (1, 2)
            if isinstance(operand := item.operands[position], Register)
            and self.kernel.registers[operand.name] == "b64"
        ]
        majors = [*transposes[len(transposes) - len(positions) :], 0, 0]
        for position, transposed in zip(positions, majors, strict=False):
            for field, bit in flips.items():
                if field == "leading offset" and not transposed:
                    continue
                fresh = Register(f"%mutant{index}_{position}")
                operands = (fresh, item.operands[position], Immediate(bit))
                flip = Instruction("xor.b64", operands, None, item.line, "mutation")
                use = dataclasses.replace(item, operands=_operand(item, position, fresh))
                what = f"{field} of operand {position}"
                yield "descriptor", what, _instead(index, flip, use)

    def _flag(self, operand: Operand) -> int | None:
        """The constant that a predicate is `setp.ne` of."""
        if not isinstance(operand, Register) or operand.name not in self.definitions:
            return None
        _, definition = self.definitions[operand.name]
        if definition.opcode != "setp.ne.b32":
            return None
        return self._constant(definition.operands[1])

    def _arithmetic(self, index: int, item: Instruction) -> Iterator[tuple[str, str, Callable]]:
        opcode, base = item.opcode, item.opcode.partition(".")[0]
        move = {"opcode": "mov.b32", "operands": item.operands[:2]}
        if opcode.startswith("setp.") and opcode.endswith(".s32"):
            swap = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}
            compare = opcode.split(".")[1]
            if compare in swap:
                other = opcode.replace(f".{compare}.", f".{swap[compare]}.")
                yield "bound", f"{compare} to {swap[compare]}", _replaced(index, opcode=other)
        elif base in ("ex2", "lg2", "rcp"):
            yield "arithmetic", f"{base} dropped", _replaced(index, **move)
        elif opcode in ("mul.f32", "sub.f32", "fma.rn.f32", "add.f32"):
            # Not max: any row maximum is right. Not x + 0.
            if all(isinstance(x, Register) for x in item.operands):
                yield "arithmetic", f"{base} dropped", _replaced(index, **move)
        elif opcode == "selp.f32":
            first, second = item.operands[1:3]
            swapped = (item.operands[0], second, first, item.operands[3])
            yield "mask", "select swapped", _replaced(index, operands=swapped)
            yield "mask", "never selects", _replaced(index, opcode="mov.b32", operands=(
                item.operands[0], first))  # fmt: skip

    def _results(self, index: int, item: Instruction) -> Iterator[tuple[str, str, Callable]]:
        opcode, base = item.opcode, item.opcode.partition(".")[0]
        move = {"opcode": "mov.b32", "operands": item.operands[:2]}
        if opcode in ("cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32"):
            target, high, low = item.operands
            yield "arithmetic", "halves swapped", _replaced(index, operands=(target, low, high))
        elif base == "st":
            yield "store", "dropped", _dropped(index)
            yield "store", "16 bytes further", _replaced(index, operands=_shifted(item, 0, 16))
        elif opcode.startswith("shfl.sync.bfly"):
            yield "lanes", "shuffle dropped", _replaced(index, **move)
        elif opcode == "elect.sync":
            pair = item.operands[0]
            if isinstance(pair, Pair):
                everyone = Instruction(
                    "setp.eq.b32", (pair.second, Immediate(0), Immediate(0)), None, item.line, "all"
                )
                yield "lanes", "every lane elected", _inserted(index + 1, everyone)
        elif base in ("div", "rem", "min", "max") and opcode.endswith(".s32"):
            yield "index", f"{base} dropped", _replaced(index, **move)

    def _constant(self, operand: Operand) -> int | None:
        """The value of an immediate, or of a register that only ever holds one."""
        if isinstance(operand, Immediate):
            return operand.value
        if isinstance(operand, Register) and operand.name in self.definitions:
            _, definition = self.definitions[operand.name]
            if definition.opcode == "mov.b32" and isinstance(definition.operands[1], Immediate):
                return definition.operands[1].value
        return None


def mutated(program: Program, mutant: Mutant) -> Program:
    """The program with the defect."""
    body = mutant.apply(program.kernel.body)
    registers = dict(program.kernel.registers)
    for item in body:
        if isinstance(item, Instruction) and item.operands:
            first = item.operands[0]
            if isinstance(first, Register) and first.name.startswith("%mutant"):
                registers[first.name] = "b64" if item.opcode.endswith(".b64") else "b32"
    return Program(
        dataclasses.replace(program.kernel, body=body, registers=registers), program.name
    )


@dataclasses.dataclass(frozen=True)
class Subject:
    """How to run a row, and what is wrong with its results (empty if nothing)."""

    name: str
    run: Callable[[str, bool], Sequence[np.ndarray]]
    judge: Callable[[Sequence[np.ndarray]], str]
    exact: tuple[int, ...]
    """Results that must have the same bits in every schedule."""
    again: Subject | None = None
    """More inputs for what these don't find, run once."""


def executed_lines(where: Device, subject: Subject, digest: str) -> set[int]:
    """PTX lines of the blocks that the unchanged row executes."""
    program = where.programs[digest]
    seen: set[int] = set()
    original = program.full, program.masked

    def noting(functions: list[Callable]) -> list[Callable]:
        def wrap(number: int, function: Callable) -> Callable:
            def run(*arguments: object) -> object:
                seen.add(number)
                return function(*arguments)

            return run

        return [wrap(number, function) for number, function in enumerate(functions)]

    program.full, program.masked = noting(program.full), noting(program.masked)
    try:
        subject.run("eager", False)
    finally:
        program.full, program.masked = original
    return {item.line for number in seen for item in program.blocks[number].instructions}


def examine(where: Device, subject: Subject, digest: str, mutant: Mutant) -> Verdict:
    """Run one mutant until something notices."""
    program, schedule = where.programs[digest], ""
    try:
        where.programs[digest] = mutated(program, mutant)
        first: Sequence[np.ndarray] | None = None
        for schedule, check in SCHEDULES:
            results = subject.run(schedule, check)
            wrong = subject.judge(results)
            if wrong:
                return Verdict(mutant, "wrong values", schedule, wrong.splitlines()[0])
            if first is None:
                first = results
            elif any(first[i].tobytes() != results[i].tobytes() for i in subject.exact):
                return Verdict(mutant, "schedules differ", schedule)
        schedule = "more masks"
        wrong = subject.again.judge(subject.again.run("eager", False)) if subject.again else ""
        return Verdict(mutant, "wrong values" if wrong else "", schedule, wrong)
    except errors.EmulatorError as error:
        message = str(error)
        return Verdict(mutant, type(error).__name__, schedule, message.splitlines()[-1])
    except Exception as error:  # a defect may break the emulator's own assumptions
        return Verdict(mutant, f"error ({type(error).__name__})", schedule, str(error)[:200])
    finally:
        where.programs[digest] = program


def choose(mutants: Iterable[Mutant], lines: set[int], limit: int) -> list[Mutant]:
    """At most `limit` defects of each kind and description, spread over the kernel."""
    groups: dict[tuple[str, str], list[Mutant]] = collections.defaultdict(list)
    for mutant in mutants:
        if mutant.line in lines:
            groups[mutant.kind, mutant.what].append(mutant)
    chosen = []
    for group in groups.values():
        sample = random.Random(f"{group[0].kind} {group[0].what}")
        chosen += sample.sample(group, min(limit or len(group), len(group)))
    return sorted(chosen, key=lambda m: m.line)


def subject_of(name: str) -> Subject:
    """The row with the inputs of the mutation study."""
    from .subjects import make_subject

    return make_subject(name)


def study(
    name: str, limit: int, kinds: Sequence[str] = (), lines: Sequence[int] = ()
) -> list[Verdict]:
    """All verdicts on a row, printed as they come."""
    where, subject = device(), subject_of(name)
    artifact = where.rows[name]
    digest = artifact.report["cubin_sha256"]
    program = where.program(artifact)
    wrong = subject.judge(subject.run("eager", True))
    assert not wrong, wrong
    chosen = choose(
        Mutator(program.kernel).mutants(), executed_lines(where, subject, digest), limit
    )
    verdicts = []
    for mutant in chosen:
        if (kinds and mutant.kind not in kinds) or (lines and mutant.line not in lines):
            continue
        start = time.perf_counter()
        verdict = examine(where, subject, digest, mutant)
        verdicts.append(verdict)
        seconds = time.perf_counter() - start
        found = f"{verdict.by} ({verdict.schedule})" if verdict.by else "MISSED"
        print(f"{seconds:5.1f} s  {found:32} {mutant}", flush=True)
    return verdicts


def summary(verdicts: Sequence[Verdict]) -> str:
    """A Markdown table: defects by kind, and what noticed them."""
    kinds: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for verdict in verdicts:
        kinds[verdict.mutant.kind][verdict.by or "missed"] += 1
    lines = ["| defect | planted | missed | noticed by |", "|---|---|---|---|"]
    for kind, counts in sorted(kinds.items()):
        missed = counts.pop("missed", 0)
        by = ", ".join(f"{how} {n}" for how, n in counts.most_common())
        lines.append(f"| {kind} | {sum(counts.values()) + missed} | {missed} | {by} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tests.emulator.mutation")
    parser.add_argument("row")
    parser.add_argument("--limit", type=int, default=3, help="defects per kind and description")
    parser.add_argument("--kinds", default="", help="comma-separated")
    parser.add_argument("--lines", default="", help="PTX lines, comma-separated")
    options = parser.parse_args(arguments)
    kinds = [kind for kind in options.kinds.split(",") if kind]
    lines = [int(line) for line in options.lines.split(",") if line]
    verdicts = study(options.row, options.limit, kinds, lines)
    print(summary(verdicts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
