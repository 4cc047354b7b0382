# SPDX-License-Identifier: Apache-2.0
"""One warp: its register file, its groups of lanes, what it waits for, its pending operations."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .alu import ALL_LANES, LANE, LANES, Array, u32
from .memory import SharedMemory

if TYPE_CHECKING:
    from .scheduler import Cta


class Event:
    """Why a block ended without naming the next one."""


@dataclasses.dataclass(slots=True, eq=False)
class Split(Event):
    """A branch that only some lanes take."""

    taken: Array
    target: int
    following: int


class Exit(Event):
    """`ret` or `exit`."""


@dataclasses.dataclass(slots=True, eq=False)
class Wait(Event):
    """Something the warp may have to wait for before `following`.

    `ready` may be asked again and again; `finish` runs once, when it is ready. `waiters` is the
    list that whoever changes the condition wakes.
    """

    ready: Callable[[], bool]
    finish: Callable[[], None]
    describe: Callable[[], str]
    waiters: list[Warp]
    following: int
    line: int


@dataclasses.dataclass(slots=True, eq=False)
class Group:
    """Lanes that run together: their next block, and what they wait for."""

    block: int
    lanes: Array
    wait: Wait | None = None


@dataclasses.dataclass(slots=True, eq=False)
class PendingStore:
    """A bulk store: `read` takes the data from shared memory and returns what writes it."""

    read: Callable[[], Callable[[], None]]
    operation: tuple[int, int] | None


@dataclasses.dataclass(slots=True, eq=False)
class PendingMma:
    """A wgmma that has not executed: `run` reads operands and registers."""

    run: Callable[[], None]
    operation: tuple[int, int] | None


class Warp:
    """32 lanes with a register file, as translated blocks see them."""

    def __init__(self, cta: Cta, number: int) -> None:
        self.cta, self.cluster, self.number = cta, cta.cluster, number
        program, launch = cta.cluster.launch.program, cta.cluster.launch
        self.registers: list[Array] = list(program.poison)
        self.role = launch.role_of(number)
        self.name = f"warp {number} ({self.role}) of CTA {cta.coordinates}"
        threads = number * LANES + np.arange(LANES)
        in_block = threads < cta.thread_count
        self.groups = [Group(0, ALL_LANES if in_block.all() else in_block)]
        self.exited = False
        self.queued = False
        self.blocks_run = 0
        self.visits = [0] * len(program.blocks)
        self.counts: collections.Counter[str] = collections.Counter()
        self.priority = 0.0
        self.cluster_generation = -1
        self.register_count = cta.registers.per_thread
        width, height, _ = launch.configuration.block
        self._specials: dict[str, Array] = {
            "tid.x": (threads % width).astype(u32),
            "tid.y": (threads // width % height).astype(u32),
            "tid.z": (threads // (width * height)).astype(u32),
            "laneid": LANE,
        }
        base = SharedMemory.DYNAMIC_BASE | cta.rank << SharedMemory.RANK_SHIFT
        self.dynamic_shared = np.full(LANES, base, u32)
        # wgmma and bulk operations since the last commit, and committed groups.
        self.open_mmas: list[PendingMma] = []
        self.mma_groups: collections.deque[list[PendingMma]] = collections.deque()
        self.open_stores: list[PendingStore] = []
        self.store_groups: collections.deque[list[PendingStore]] = collections.deque()
        self.unwritten: list[Callable[[], None]] = []
        self.open_copies: list[Callable[[], None]] = []
        self.copy_groups: collections.deque[list[Callable[[], None]]] = collections.deque()
        # Registers as they were at the last wgmma.fence, and as the last wgmma left them.
        self.fenced_registers: list[Array] = []
        self.mma_results: dict[int, Array] = {}

    def __hash__(self) -> int:
        return id(self)

    @property
    def parameters(self) -> bytes:
        """The launch's parameter block."""
        return self.cluster.launch.parameters

    def special(self, name: str) -> Array:
        """A special register (PTX ISA, Special Registers)."""
        value = self._specials.get(name)
        if value is None:
            value = self._specials[name] = np.full(LANES, self.cta.special(name, self.number), u32)
        return value

    def waits(self) -> list[str]:
        """What it waits for, group by group, for reports."""
        blocks = self.cluster.launch.program.blocks
        texts = []
        for group in self.groups:
            if group.wait is not None:
                texts.append(f"{group.wait.describe()} at PTX line {group.wait.line}")
            else:
                texts.append(f"runnable at PTX line {blocks[group.block].line}")
        return texts
