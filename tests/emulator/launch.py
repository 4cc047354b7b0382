# SPDX-License-Identifier: Apache-2.0
"""A translated kernel (`Program`) and one launch of it (`Launch`)."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from . import (
    alu,
    instruction_set,
    isa_arithmetic,
    isa_barriers,
    isa_bulk,
    isa_control,
    isa_memory,
    isa_strong,
    isa_tcgen05,
    isa_wgmma,
)
from .codegen import Emitter
from .global_races import GlobalHistory
from .memory import GlobalMemory
from .ptx import Instruction, Kernel
from .residents import Residents
from .schedule import Chooser, Schedule
from .scheduler import Cluster, registers_of
from .warp import Communication, Exit, PendingWrite, Split, Warp

# Importing the modules registers their instructions.
INSTRUCTION_MODULES = (
    isa_arithmetic, isa_barriers, isa_bulk, isa_control, isa_memory, isa_strong, isa_tcgen05,
    isa_wgmma,
)  # fmt: skip

# What the hardware allows per thread, and how it splits a CTA's register file without other advice.
REGISTER_FILE = 65536
MAX_REGISTERS = 255


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What a launch passes beside the parameters."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)
    shared_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Options:
    """How a launch is emulated."""

    schedule: Schedule = Schedule()
    check: bool = False
    """For races."""
    resident_ctas: int = 132
    """How many are on the device at a time: one for each multiprocessor of an H200."""
    ordered_additions: bool = False
    """Whether the kernel promises to add floats to an address in one order: what isn't ordered is a
    race."""


class Program:
    """One kernel as Python functions."""

    def __init__(self, kernel: Kernel, name: str | None = None) -> None:
        emitter = Emitter(kernel)
        source, self._lines = emitter.source()
        self.kernel, self.name, self.source = kernel, name or kernel.name, source
        self.blocks = emitter.blocks
        instructions = [item for item in kernel.body if isinstance(item, Instruction)]
        self.has_atomics = any(item.opcode.startswith("atom.") for item in instructions)
        self.homes = [emitter.homes[register] for register in kernel.registers]
        self.poison = [registers_of(home) for home in self.homes]
        self._file = f"<ptx {self.name}>"
        namespace = _namespace()
        exec(compile(source, self._file, "exec"), namespace)
        self.full: list[Callable[..., Any]] = [namespace[f"full_{b.number}"] for b in self.blocks]
        self.masked: list[Callable[..., Any]] = [
            namespace[f"masked_{b.number}"] for b in self.blocks
        ]
        self._texts = {item.line: item.text for item in instructions}

    def line_of(self, error: BaseException) -> int:
        """The PTX line whose translation raised."""
        trace, line = error.__traceback__, 0
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == self._file:
                line = self._lines[trace.tb_lineno - 1]
            trace = trace.tb_next
        return line

    def text_of(self, line: int) -> str:
        """The instruction at a PTX line."""
        return self._texts.get(line, "")[:120]


def _namespace() -> dict[str, Any]:
    names: dict[str, Any] = {name: value for name, value in vars(alu).items() if name[0] != "_"}
    names |= instruction_set.RUNTIME
    names |= {
        "np": np,
        "Split": Split,
        "Exit": Exit,
        "Communication": Communication,
        "ZERO_PRED": np.zeros(32, bool),
        "ZERO_U16": np.zeros(32, np.uint16),
        "ZERO_U32": np.zeros(32, np.uint32),
        "ZERO_F32": np.zeros(32, np.float32),
        "ZERO_U64": np.zeros(32, np.uint64),
    }
    return names


class Launch:
    """One execution of a program over a grid."""

    def __init__(
        self,
        program: Program,
        configuration: Configuration,
        parameters: bytes,
        memory: GlobalMemory,
        options: Options = Options(),  # noqa: B008  (it is frozen)
        *,
        registers_per_thread: int | None = None,
        roles: Callable[[int], str] | None = None,
    ) -> None:
        self.program, self.configuration = program, configuration
        self.parameters, self.memory, self.options = parameters, memory, options
        self.resident_clusters = max(1, options.resident_ctas // math.prod(configuration.cluster))
        self.history = GlobalHistory(options.ordered_additions) if options.check else None
        threads = int(np.prod(configuration.block))
        default = min(MAX_REGISTERS, REGISTER_FILE // max(threads, 32) // 8 * 8)
        self.registers_per_thread = registers_per_thread or default
        self.role_of = roles or (lambda warp: "warp")
        self.tensor_maps: dict[int, Any] = {}
        self.parameter_cache: dict[Any, Any] = {}
        self.counts: dict[str, collections.Counter[str]] = {}
        self._ctas: dict[int, list[collections.Counter[str]]] = {}
        self._unwritten: list[PendingWrite] = []
        self.bulk_stores = 0

    def run(self) -> None:
        """Run every cluster of the grid."""
        with np.errstate(all="ignore"):
            for cluster in Residents(self).run():
                self._count(cluster)
            for write in sorted(self._unwritten, key=lambda write: write.number, reverse=True):
                write.run()

    def leave(self, chooser: Chooser, writes: list[PendingWrite]) -> None:
        """What a CTA that exits hasn't waited for happens by the end of the launch."""
        if writes and chooser.gives_way("store"):
            self._unwritten += writes
            return
        for write in chooser.disordered(writes):
            write.run()

    @property
    def ctas(self) -> list[collections.Counter[str]]:
        """What each CTA executed, in the order of the grid."""
        return [cta for number in sorted(self._ctas) for cta in self._ctas[number]]

    def _count(self, cluster: Cluster) -> None:
        ctas = self._ctas[cluster.number] = []
        for warps in cluster.warps_of:
            cta: collections.Counter[str] = collections.Counter()
            for warp in warps:
                executed = self._executed(warp)
                cta.update(executed)
                self.counts.setdefault(warp.role, collections.Counter()).update(executed)
                # A level, not a count.
                self.counts[warp.role]["setmaxnreg"] = executed["setmaxnreg"]
            ctas.append(cta)

    def _executed(self, warp: Warp) -> collections.Counter[str]:
        """Warp instructions by unit, and what the warp counted itself. An instruction whose guard
        is false counts as well: it is issued."""
        counts = collections.Counter(warp.counts)
        for visits, block in zip(warp.visits, self.program.blocks, strict=True):
            if visits:
                for unit, number in block.units.items():
                    counts[unit] += visits * number
                counts["FMA slots"] += visits * block.fma_slots
        return counts
