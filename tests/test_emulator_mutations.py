# SPDX-License-Identifier: Apache-2.0
"""Planted defects: one of every kind in the forward kernels is noticed.

The whole study, `python -m tests.emulator.mutation ROW`, is in docs/emulator/mutations.md.
"""

from __future__ import annotations

import functools

import pytest
from emulator.device import device
from emulator.mutation import Mutator, Subject, examine, executed_lines, mutated
from emulator.subjects import make_subject

from fa4_jax._variants import VARIANTS, Arch, Kernel

HOPPER, BLACKWELL = (
    next(v for v in VARIANTS if (v.kernel, v.arch, v.head_dim) == (Kernel.forward, arch, 64)).name
    for arch in (Arch.sm90a, Arch.sm100a)
)

# Kind, what, and which of the executed instructions of that kind; what must come of it.
DEFECTS = [
    ("arrival", "dropped", 0, "Deadlock"),
    ("arrival", "twice", 0, "BarrierError|RaceError|Deadlock"),
    ("init", "one arrival more", 0, "Deadlock"),
    ("init", "dropped", 0, "BarrierError"),
    ("transaction count", "+16 bytes", 0, "Deadlock"),
    ("transaction count", "-16 bytes", 0, "Deadlock|ProtocolError|BarrierError"),
    ("phase", "constant", -1, "Deadlock|RaceError|wrong values"),
    ("stage", "signals the next barrier", 0, "Deadlock|ProtocolError|BarrierError|RaceError"),
    ("copy", "dropped", 0, "Deadlock"),
    ("copy", "coordinate 0 off by one", 0, "wrong values"),
    ("fence", "dropped", 0, "RaceError"),
    ("group wait", "dropped", 0, "RaceError"),
    ("commit", "dropped", 0, "RaceError|ProtocolError"),
    ("named barrier", "sync dropped", 0, "RaceError|BarrierError|Deadlock|Poison"),
    ("registers", "8 more", -1, "Deadlock|ProtocolError"),
    ("mma", "dropped", 0, "wrong values"),
    ("mma", "immediate 0 flipped", 0, "wrong values"),
    ("descriptor", "start of operand 1", 0, "wrong values|RaceError|Poison"),
    ("descriptor", "layout of operand 2", 0, "wrong values|RaceError|Poison|Misaligned"),
    ("store", "stmatrix dropped", 0, "wrong values|Poison"),
    ("store", "16 bytes further", 0, "RaceError|OutOfBounds|wrong values"),
    ("arithmetic", "ex2 dropped", -1, "wrong values"),
    ("arithmetic", "halves swapped", 0, "wrong values"),
    ("lanes", "shuffle dropped", -1, "wrong values"),
]


# Those that tcgen05 and tensor memory add, and such as Hopper's kernel has in other instructions.
BLACKWELL_DEFECTS = [
    ("tensor memory", "alloc dropped", 0, "Poison"),
    ("arrival", "dropped", 0, "Deadlock"),
    ("arrival", "commit dropped", 0, "Deadlock"),
    ("fence", "dropped", 0, "RaceError"),
    ("mma", "dropped", 0, "wrong values|Poison"),
    ("descriptor", "layout of operand 1", 0, "wrong values|RaceError|Poison|Misaligned"),
    ("store", "dropped", 0, "wrong values|Poison"),
    ("store", "16 bytes further", 0, "wrong values|Poison|RaceError|OutOfBounds"),
    ("arithmetic", "ex2 dropped", 0, "wrong values"),
    ("mask", "never selects", 0, "wrong values"),
    ("registers", "8 more", 0, "Deadlock|ProtocolError"),
]


@functools.cache
def prepared(row: str) -> tuple[Subject, str, list]:
    """(subject, cubin digest, defects in what the row executes); the row itself is right."""
    where, subject = device(), make_subject(row)
    artifact = where.rows[row]
    digest = artifact.report["cubin_sha256"]
    program = where.program(artifact)
    assert not subject.judge(subject.run("eager", True))
    lines = executed_lines(where, subject, digest)
    return subject, digest, [m for m in Mutator(program.kernel).mutants() if m.line in lines]


@pytest.mark.parametrize(
    "row, kind, what, index, expected",
    [*((HOPPER, *x) for x in DEFECTS), *((BLACKWELL, *x) for x in BLACKWELL_DEFECTS)],
    ids=lambda x: str(x).replace(" ", "-").removeprefix("fa4_"),
)
def test_a_planted_defect_is_noticed(
    row: str, kind: str, what: str, index: int, expected: str
) -> None:
    subject, digest, mutants = prepared(row)
    mutant = [m for m in mutants if (m.kind, m.what) == (kind, what)][index]
    verdict = examine(device(), subject, digest, mutant)
    assert verdict.by in expected.split("|"), (
        f"{verdict.by or 'missed'}: {mutant} {verdict.message}"
    )


@pytest.mark.parametrize("row", [HOPPER, BLACKWELL])
def test_enough_defects_can_be_planted(row: str) -> None:
    _, digest, mutants = prepared(row)
    assert len(mutants) >= 1000
    # A mutant differs from the kernel in what it says, not in being broken by itself.
    assert mutated(device().programs[digest], mutants[0]).blocks
