# SPDX-License-Identifier: Apache-2.0
"""CTAs and clusters: what they hold, in which order their warps and asynchronous operations run."""

from __future__ import annotations

import collections
import dataclasses
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .alu import ALL_LANES, Array
from .barriers import ClusterBarrier, MBarrier, NamedBarrier, RegisterPool
from .errors import Deadlock, EmulatorError, Livelock, ProtocolError, RaceError
from .memory import SharedMemory, TensorMemory
from .races import HappensBefore
from .schedule import Chooser
from .warp import Communication, Event, Exit, Group, Split, Wait, Warp

if TYPE_CHECKING:
    from .launch import Launch

# More blocks than any kernel here runs per warp at the emulator's sizes, by a factor of ten.
MAX_BLOCKS = 30_000


@dataclasses.dataclass(slots=True, eq=False)
class AsyncOperation:
    """A copy or an MMA that was issued and has not happened."""

    run: Callable[[], None]
    warp: Warp
    line: int
    priority: float


class Cta:
    """One thread block."""

    def __init__(self, cluster: Cluster, rank: int, coordinates: tuple[int, int, int]) -> None:
        self.cluster, self.rank, self.coordinates = cluster, rank, coordinates
        configuration = cluster.launch.configuration
        width, height, depth = configuration.block
        self.thread_count = width * height * depth
        self.shared = SharedMemory(configuration.shared_bytes)
        self.tensor = TensorMemory()
        self.tensor_priority = 0.0
        self.mbarriers: dict[int, MBarrier] = {}
        self.named_barriers: dict[int, NamedBarrier] = {}
        self.registers = RegisterPool(cluster.launch.registers_per_thread)
        self.operands: dict[object, Array] = {}
        self.operands_version = -1

    def special(self, name: str, warp: int) -> int:
        """A special register that is the same in all lanes of a warp."""
        base, _, axis = name.partition(".")
        configuration = self.cluster.launch.configuration
        grid, cluster = configuration.grid, configuration.cluster
        vectors = {
            "ctaid": self.coordinates,
            "nctaid": grid,
            "ntid": configuration.block,
            "clusterid": tuple(c // n for c, n in zip(self.coordinates, cluster, strict=True)),
            "nclusterid": tuple(g // n for g, n in zip(grid, cluster, strict=True)),
            "cluster_ctaid": tuple(c % n for c, n in zip(self.coordinates, cluster, strict=True)),
            "cluster_nctaid": cluster,
        }
        if base in vectors:
            return vectors[base]["xyz".index(axis)]
        scalars = {
            "warpid": warp,
            "cluster_ctarank": self.rank,
            "cluster_nctarank": len(self.cluster.ctas),
            "dynamic_smem_size": configuration.shared_bytes,
        }
        if name not in scalars:
            raise NotImplementedError(f"special register %{name}")
        return scalars[name]

    def named_barrier(self, number: int) -> NamedBarrier:
        """A barrier resource."""
        return self.named_barriers.setdefault(number, NamedBarrier(number, self))

    def operand(self, key: object, read: Callable[[], Array]) -> Array:
        """An MMA operand, read again only if shared memory has changed."""
        if self.operands_version != self.shared.version:
            self.operands.clear()
            self.operands_version = self.shared.version
        value = self.operands.get(key)
        if value is None:
            value = self.operands[key] = read()
        return value


class Cluster:
    """The CTAs that run together. A CTA without cluster is a cluster of one."""

    def __init__(self, launch: Launch, first: tuple[int, int, int], number: int) -> None:
        self.launch, self.number = launch, number
        self.chooser = Chooser(launch.options.schedule, number)
        self.ctas: list[Cta] = []
        size = launch.configuration.cluster
        for z in range(size[2]):
            for y in range(size[1]):
                for x in range(size[0]):
                    place = (first[0] + x, first[1] + y, first[2] + z)
                    self.ctas.append(Cta(self, len(self.ctas), place))
        self.warps_of: list[list[Warp]] = [
            [Warp(cta, number) for number in range((cta.thread_count + 31) // 32)]
            for cta in self.ctas
        ]
        self.warps = [warp for warps in self.warps_of for warp in warps]
        self.run_queue: collections.deque[Warp] = collections.deque()
        self.copies: list[AsyncOperation] = []
        self.tensor_pipes: list[collections.deque[AsyncOperation]] = [
            collections.deque() for _ in self.ctas
        ]
        self.barrier = ClusterBarrier(self)
        self.pair_meetings: dict[object, list[tuple[Warp, object]]] = {}
        self.meeting_waiters: list[Warp] = []
        # Warps that wait for a change of global memory, as far as `memory.version` is known.
        self.pollers: list[Warp] = []
        self.polled_version = -1
        self.was_woken = self.gives_way = self.finished = False
        self.checker: HappensBefore | None = HappensBefore(self) if launch.options.check else None
        for cta in self.ctas:
            cta.tensor_priority = self.chooser.priority()
        for warp in self.warps:
            warp.priority = self.chooser.priority()
            self.enqueue(warp)

    def cta_at(self, address: int) -> tuple[Cta, int]:
        """(CTA, offset) of a shared::cluster address."""
        rank = address >> SharedMemory.RANK_SHIFT
        if rank >= len(self.ctas):
            raise ProtocolError(f"shared address {address:#x} names CTA {rank} of {len(self.ctas)}")
        return self.ctas[rank], address & SharedMemory.OFFSET_MASK

    def pair(self, cta: Cta) -> tuple[Cta, Cta]:
        """The two CTAs of `cta_group::2`: ranks that differ in the last bit."""
        if len(self.ctas) < 2:
            raise ProtocolError("cta_group::2 needs a cluster of at least two CTAs")
        return self.ctas[cta.rank & ~1], self.ctas[cta.rank | 1]

    # Asynchronous operations ----------------------------------------------------------------------

    def start_copy(self, warp: Warp, line: int, run: Callable[[], None]) -> None:
        """A copy whose completion an mbarrier tells."""
        if self.chooser.eager:
            run()
        else:
            self.copies.append(AsyncOperation(run, warp, line, self.chooser.priority()))

    def start_tensor(self, warp: Warp, line: int, run: Callable[[], None]) -> None:
        """A tcgen05 operation: those of one CTA execute in order."""
        if self.chooser.eager:
            run()
        else:
            operation = AsyncOperation(run, warp, line, 0)
            self.tensor_pipes[warp.cta.rank].append(operation)

    def has_pending(self) -> bool:
        """Whether an asynchronous operation could complete."""
        return bool(self.copies) or any(self.tensor_pipes)

    def highest_pending(self) -> float:
        """The highest priority of pending operations."""
        pipes = zip(self.ctas, self.tensor_pipes, strict=True)
        priorities = [cta.tensor_priority for cta, pipe in pipes if pipe]
        return max([*priorities, *(copy.priority for copy in self.copies)], default=-1.0)

    def complete_one(self) -> None:
        """Let one pending operation happen: the oldest, a random or the most important one."""
        sources: list[tuple[float, Callable[[], AsyncOperation]]] = [
            (copy.priority, lambda index=index: self.copies.pop(index))
            for index, copy in enumerate(self.copies)
        ]
        for cta, pipe in zip(self.ctas, self.tensor_pipes, strict=True):
            if pipe:
                sources.append((cta.tensor_priority, pipe.popleft))
        if self.chooser.kind == "random":
            take = self.chooser.random.choice(sources)[1]
        elif self.chooser.kind == "pct":
            take = max(sources, key=lambda source: source[0])[1]
        else:
            take = sources[0][1]
        operation = take()
        try:
            operation.run()
        except Exception as error:
            raise self.explain(error, operation.warp, operation.line) from error

    # Running --------------------------------------------------------------------------------------

    def wake(self, waiters: list[Warp]) -> None:
        """Let the warps look again at what they wait for."""
        for warp in waiters:
            self.enqueue(warp)
        waiters.clear()

    def enqueue(self, warp: Warp) -> None:
        """The warp may run."""
        if not warp.queued and not warp.exited:
            warp.queued = True
            self.run_queue.append(warp)

    def can_go_on(self) -> bool:
        """Whether it doesn't only wait for other clusters."""
        self._wake_pollers()
        return bool(self.run_queue) or self.has_pending() or not self.pollers

    def advance(self, turns: int) -> None:
        """Let warps and asynchronous operations take turns, until all warps have exited, what is
        left waits for other clusters, or it is time for these."""
        self.was_woken = self.gives_way = False
        while turns and not self.gives_way:
            turns -= 1
            self._wake_pollers()
            if not self.run_queue and not self.has_pending():
                if all(warp.exited for warp in self.warps):
                    self._finish()
                    self.finished = True
                elif not self.pollers:
                    raise Deadlock(self._deadlock())
                return
            warp = self.chooser.next_warp(self) if self.run_queue else None
            if warp is None:
                self.complete_one()
                continue
            warp.queued = False
            self._step(warp, self.chooser.turn())

    def _wake_pollers(self) -> None:
        """Let the warps whose words have changed look again."""
        version = self.launch.memory.version
        if not self.pollers or version == self.polled_version:
            return
        self.polled_version = version
        for warp in [warp for warp in self.pollers if warp.can_go_on()]:
            self.pollers.remove(warp)
            self.enqueue(warp)
            self.was_woken = True

    def _finish(self) -> None:
        """What must hold when every warp has exited."""
        problems = self._left_behind()
        if problems:
            raise ProtocolError(f"{self.launch.program.name}: " + "; ".join(problems))
        for warp in self.warps:
            self.launch.leave(self.chooser, warp.unwritten)
        if self.checker is not None and self.checker.reports:
            reports = list(self.checker.reports.values())
            shown = "\n  ".join(reports[:20])
            raise RaceError(f"{self.launch.program.name}: {len(reports)} reports:\n  {shown}")

    def _left_behind(self) -> list[str]:
        """Operations, memory and arrivals that nobody waited for or gave back."""
        problems = []
        for cta in self.ctas:
            problems += [text for b in cta.mbarriers.values() if (text := b.at_exit())]
            if cta.tensor.allocated:
                problems.append(
                    f"CTA {cta.coordinates} exits with tensor memory {cta.tensor.allocated}"
                )
            for number, barrier in cta.named_barriers.items():
                if barrier.arrived:
                    problems.append(
                        f"CTA {cta.coordinates} exits with arrivals at named barrier {number}: "
                        f"{barrier.state}"
                    )
        for warp in self.warps:
            stores = sum(map(len, warp.store_groups)) + len(warp.open_stores)
            if stores:
                problems.append(
                    f"{warp.name} exits with {stores} bulk stores that it didn't wait for"
                )
            if warp.open_mmas or warp.mma_groups:
                problems.append(f"{warp.name} exits with a wgmma that it didn't wait for")
        return problems

    def _step(self, warp: Warp, turn: int) -> None:
        """Run a warp until it waits, exits, or its turn is over."""
        while not warp.exited:
            group = self._pick(warp)
            if group is None:
                return
            if group.lanes.all():
                group.lanes = ALL_LANES
            while True:
                turn -= 1
                if turn < 0:
                    self.enqueue(warp)
                    return
                result = self._run_block(warp, group)
                if result.__class__ is int:
                    group.block = result
                    if len(warp.groups) > 1:
                        break
                elif not self._handle(warp, group, result):
                    if self.gives_way:
                        self.enqueue(warp)
                        return
                    break

    def _run_block(self, warp: Warp, group: Group) -> Any:
        """Run a group's block; its result is the next block's number or an event."""
        program, number = self.launch.program, group.block
        warp.blocks_run += 1
        warp.visits[number] += 1
        if warp.blocks_run > MAX_BLOCKS:
            line = program.blocks[number].line
            raise Livelock(
                f"{program.name}: {warp.name} ran {MAX_BLOCKS} blocks, now at PTX line {line}"
            )
        try:
            if group.lanes is ALL_LANES:
                return program.full[number](warp, warp.registers)
            return program.masked[number](warp, warp.registers, group.lanes)
        except Exception as error:
            raise self.explain(error, warp, program.line_of(error)) from error

    def _pick(self, warp: Warp) -> Group | None:
        """The group of lanes to run; None parks the warp.

        Groups at the same block merge. Otherwise the one that is furthest behind runs, unless it is
        about to execute something that the warp must execute together.
        """
        groups = warp.groups
        for group in groups:
            if group.wait is not None and group.wait.ready():
                wait, group.wait = group.wait, None
                wait.finish()
                group.block = wait.following
        if len(groups) > 1:
            self._merge(groups)
        runnable = [group for group in groups if group.wait is None]
        if len(groups) > 1:
            blocks = self.launch.program.blocks
            diverged = [group for group in runnable if not blocks[group.block].convergent]
            waiting = [group for group in groups if group.wait is not None]
            if not diverged and not waiting:
                lines = ", ".join(
                    f"{blocks[g.block].line} ({int(g.lanes.sum())} lanes)" for g in runnable
                )
                raise ProtocolError(
                    f"{self.launch.program.name}: {warp.name}: lanes reach different .sync "
                    f"instructions: PTX lines {lines}"
                )
            runnable = diverged
        if not runnable:
            for group in groups:
                if group.wait is not None:
                    group.wait.waiters.append(warp)
            return None
        return min(runnable, key=lambda group: group.block)

    @staticmethod
    def _merge(groups: list[Group]) -> None:
        by_block: dict[int, Group] = {}
        for group in list(groups):
            if group.wait is not None:
                continue
            other = by_block.setdefault(group.block, group)
            if other is not group:
                other.lanes = other.lanes | group.lanes
                groups.remove(group)

    def _handle(self, warp: Warp, group: Group, event: Event) -> bool:
        """Act on an event; True if the same group can go on."""
        if isinstance(event, Split):
            taken = event.taken & group.lanes
            others = group.lanes & ~event.taken
            if not others.any():
                group.block = event.target
            elif not taken.any():
                group.block = event.following
            else:
                group.block, group.lanes = event.target, taken
                warp.groups.append(Group(event.following, others))
            return len(warp.groups) == 1
        if isinstance(event, Communication):
            group.block = event.following
            self.gives_way = self.chooser.gives_way(event.kind)
            return len(warp.groups) == 1 and not self.gives_way
        if isinstance(event, Wait):
            warp.counts["waits"] += 1
            if event.ready():
                event.finish()
                group.block = event.following
                return len(warp.groups) == 1
            warp.counts["blocking waits"] += 1
            group.wait = event
            return False
        assert isinstance(event, Exit)
        warp.groups.remove(group)
        if not warp.groups:
            warp.exited = True
            self.barrier.complete_if_done()
        return False

    def explain(self, error: Exception, warp: Warp, line: int) -> Exception:
        """The error with the place: kernel, CTA, warp, role, PTX line and text."""
        program = self.launch.program
        place = f"{program.name}: {warp.name}: PTX line {line}: {program.text_of(line)}"
        kind = type(error) if isinstance(error, EmulatorError) else EmulatorError
        text = (
            str(error)
            if isinstance(error, EmulatorError)
            else traceback.format_exception_only(error)[0]
        )
        return kind(f"{place}: {text.strip()}")

    def _deadlock(self) -> str:
        lines = [
            f"{self.launch.program.name}: deadlock in CTA {self.ctas[0].coordinates}: "
            "nothing can run"
        ]
        lines += self.waiting()
        exited = [str(warp.number) for warp in self.warps if warp.exited]
        if exited:
            lines.append(f"  exited: warps {', '.join(exited)}")
        return "\n".join(lines)

    def waiting(self) -> list[str]:
        """What each warp waits for, a line each."""
        return [
            f"  {warp.name}: waits for {'; and '.join(warp.waits())}"
            for warp in self.warps
            if not warp.exited
        ]


def registers_of(home: str) -> Array:
    """A register nobody has written: all ones, NaN as a float."""
    if home == "pred":
        return np.zeros(32, bool)
    if home == "f32":
        return np.full(32, 0xFFFFFFFF, np.uint32).view(np.float32)
    dtype = {"u16": np.uint16, "u32": np.uint32, "u64": np.uint64}[home]
    return np.full(32, np.iinfo(dtype).max, dtype)
