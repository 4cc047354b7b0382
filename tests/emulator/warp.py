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
class Communication(Event):
    """A strong access to global memory, `load`, `store` or `atomic`: other clusters may go on."""

    following: int
    kind: str


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
    """A bulk store: `read` takes the data from shared memory and returns what writes it. To the
    checker the two halves are the operations `reading` and `writing`."""

    read: Callable[[], Callable[[], None]]
    number: int
    """Of the launch's bulk stores, in the order of their issue."""
    reading: tuple[int, int] | None = None
    writing: tuple[int, int] | None = None


@dataclasses.dataclass(slots=True, eq=False)
class PendingWrite:
    """The second half of a bulk store."""

    number: int
    run: Callable[[], None]
    operation: tuple[int, int] | None


@dataclasses.dataclass(slots=True, eq=False)
class PendingMma:
    """A wgmma that has not executed: `run` reads operands and registers."""

    run: Callable[[], None]
    operation: tuple[int, int] | None


@dataclasses.dataclass(slots=True, eq=False)
class Look:
    """A strong read of global memory: what there was, and the warp's registers before it."""

    number: int
    addresses: Array
    size: int
    words: bytes
    registers: list[Array]


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
        self.unwritten: list[PendingWrite] = []
        self.open_copies: list[Callable[[], None]] = []
        self.copy_groups: collections.deque[list[Callable[[], None]]] = collections.deque()
        # Registers as they were at the last wgmma.fence, and as the last wgmma left them.
        self.fenced_registers: list[Array] = []
        self.mma_results: dict[int, Array] = {}
        # The last strong read at each PTX line, by the lanes that executed it.
        self.looks: dict[tuple[int, bytes], Look] = {}
        self.look_count = 0

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

    def can_go_on(self) -> bool:
        """Whether something that it waits for has happened."""
        return any(group.wait is not None and group.wait.ready() for group in self.groups)

    def waits(self) -> list[str]:
        """What it waits for, group by group, for reports."""
        blocks = self.cluster.launch.program.blocks
        texts = [
            f"{group.wait.describe()} at PTX line {group.wait.line}"
            for group in self.groups
            if group.wait is not None
        ]
        # The other lanes wait for those that wait.
        return texts or [f"runnable at PTX line {blocks[g.block].line}" for g in self.groups]
