# SPDX-License-Identifier: Apache-2.0
"""A translated kernel (`Program`) and one launch of it (`Launch`)."""

from __future__ import annotations

import collections
import dataclasses
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
    isa_tcgen05,
    isa_wgmma,
)
from .codegen import Emitter
from .memory import GlobalMemory
from .ptx import Instruction, Kernel
from .schedule import Schedule
from .scheduler import Cluster, registers_of
from .warp import Exit, Split, Warp

# Importing the modules registers their instructions.
INSTRUCTION_MODULES = (
    isa_arithmetic, isa_barriers, isa_bulk, isa_control, isa_memory, isa_tcgen05, isa_wgmma,
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


class Program:
    """One kernel as Python functions."""

    def __init__(self, kernel: Kernel, name: str | None = None) -> None:
        emitter = Emitter(kernel)
        source, self._lines = emitter.source()
        self.kernel, self.name, self.source = kernel, name or kernel.name, source
        self.blocks = emitter.blocks
        self.homes = [emitter.homes[register] for register in kernel.registers]
        self.poison = [registers_of(home) for home in self.homes]
        self._file = f"<ptx {self.name}>"
        namespace = _namespace()
        exec(compile(source, self._file, "exec"), namespace)
        self.full: list[Callable[..., Any]] = [namespace[f"full_{b.number}"] for b in self.blocks]
        self.masked: list[Callable[..., Any]] = [
            namespace[f"masked_{b.number}"] for b in self.blocks
        ]
        self._texts = {i.line: i.text for i in kernel.body if isinstance(i, Instruction)}

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
        *,
        schedule: Schedule | None = None,
        check: bool = False,
        registers_per_thread: int | None = None,
        roles: Callable[[int], str] | None = None,
    ) -> None:
        self.program, self.configuration = program, configuration
        self.parameters, self.memory = parameters, memory
        self.schedule, self.check = schedule or Schedule(), check
        threads = int(np.prod(configuration.block))
        default = min(MAX_REGISTERS, REGISTER_FILE // max(threads, 32) // 8 * 8)
        self.registers_per_thread = registers_per_thread or default
        self.role_of = roles or (lambda warp: "warp")
        self.tensor_maps: dict[int, Any] = {}
        self.parameter_cache: dict[Any, Any] = {}
        self.counts: dict[str, collections.Counter[str]] = {}
        self.ctas: list[collections.Counter[str]] = []
        self.clusters = 0

    def run(self) -> None:
        """Run every cluster of the grid, one after another."""
        grid, cluster = self.configuration.grid, self.configuration.cluster
        if self.check:
            self.memory.forget_accesses()
        with np.errstate(all="ignore"):
            for z in range(0, grid[2], cluster[2]):
                for y in range(0, grid[1], cluster[1]):
                    for x in range(0, grid[0], cluster[0]):
                        self._run_cluster((x, y, z))

    def _run_cluster(self, first: tuple[int, int, int]) -> None:
        self.memory.accessor = self.clusters + 1 if self.check else None
        try:
            cluster = Cluster(self, first, self.clusters)
            cluster.run()
        finally:
            self.memory.accessor = None
        self.clusters += 1
        for warps in cluster.warps_of:
            cta: collections.Counter[str] = collections.Counter()
            for warp in warps:
                executed = self._executed(warp)
                cta.update(executed)
                self.counts.setdefault(warp.role, collections.Counter()).update(executed)
                # A level, not a count.
                self.counts[warp.role]["setmaxnreg"] = executed["setmaxnreg"]
            self.ctas.append(cta)

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
