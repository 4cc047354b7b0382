# SPDX-License-Identifier: Apache-2.0
"""Happens-before check of one cluster, by vector clocks.

Agents are whatever accesses memory on its own: warps, the TMA engine of each mbarrier, a warp's
wgmma and bulk stores, a CTA's tensor pipe, a warp's tcgen05.ld and tcgen05.st. Each agent has a
clock; a warp knows how far it is ordered after each of the others. An arrival merges the warp's
knowledge into the barrier's, the completion of a phase publishes it, a wait takes it over. An
asynchronous operation is ordered after its issue and before what its completion mechanism
(mbarrier, commit group, commit) tells. Two conflicting accesses that nothing orders are a race even
if the emulated schedule happened to run them well.

Beside races: reads of memory that nothing wrote, writes over mbarrier objects, asynchronous reads
of what was written through the generic proxy without `fence.proxy.async` (PTX ISA, Async proxy),
and mbarriers used by an asynchronous operation without `fence.mbarrier_init`.

What a warp has acquired from other clusters, through global memory, is an agent, too: the warp's
acquisitions, numbered. So it spreads within the cluster like everything else that a warp knows.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from .errors import Poison, RaceError
from .global_races import Access, Kind, Knowledge, Places, merged

if TYPE_CHECKING:
    from .alu import Array
    from .barriers import MBarrier
    from .scheduler import Cluster, Cta
    from .warp import Warp

MAX_AGENTS = 384
Cells = slice | np.ndarray


class Shadow:
    """What happened last to each 4-byte cell of a memory."""

    def __init__(self, name: str, cells: int) -> None:
        self.name = name
        self.writer = np.full(cells, -1, np.int16)
        self.write_epoch = np.zeros(cells, np.int32)
        self.write_line = np.zeros(cells, np.int32)
        self.generic_writer = np.full(cells, -1, np.int16)
        self.is_mbarrier = np.zeros(cells, bool)
        self.readers: list[int] = []
        self.read_epoch: list[Array] = []
        self.read_line: list[Array] = []

    def reader(self, agent: int) -> int:
        """The index of an agent's read clocks."""
        if agent not in self.readers:
            self.readers.append(agent)
            self.read_epoch.append(np.zeros(len(self.writer), np.int32))
            self.read_line.append(np.zeros(len(self.writer), np.int32))
        return self.readers.index(agent)


class HappensBefore:
    """The checker of one cluster. Reports are collected, one per pair of PTX lines."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.numbers: dict[Hashable, int] = {}
        self.names: list[str] = []
        self.reports: dict[Hashable, str] = {}
        self.epochs = np.zeros(MAX_AGENTS, np.int32)
        self.clocks: dict[Warp, Array] = {}
        self.pending: dict[object, Array] = {}
        self.published: dict[object, Array] = {}
        self.proxy_fences: dict[int, list[int]] = {}
        assert cluster.launch.history is not None
        self.history = cluster.launch.history
        self.history.names[cluster.number] = self.names
        self.acquired: dict[int, list[Knowledge]] = {}
        self.fenced: dict[Warp, Knowledge] = {}
        self.unfenced: dict[Warp, list[Knowledge]] = {}
        for warp in cluster.warps:
            self.clocks[warp] = np.zeros(MAX_AGENTS, np.int32)
            self.clocks[warp][self.agent(warp, warp.name)] = 1
        self.shared = [Shadow("shared memory", cta.shared.end // 4 + 4) for cta in cluster.ctas]
        self.tensor = [Shadow("tensor memory", 4 * 512) for _ in cluster.ctas]

    # Agents and order -----------------------------------------------------------------------------

    def agent(self, key: Hashable, name: str = "") -> int:
        """The number of an agent, named on its first use."""
        number = self.numbers.get(key)
        if number is None:
            number = self.numbers[key] = len(self.names)
            self.names.append(name or str(key))
            if number >= MAX_AGENTS:
                raise RuntimeError("MAX_AGENTS is too small for this kernel")
        return number

    def start(self, key: Hashable, name: str) -> tuple[int, int]:
        """(agent, epoch) of a new operation of an asynchronous agent."""
        agent = self.agent(key, name)
        self.epochs[agent] += 1
        return agent, int(self.epochs[agent])

    def join(self, warp: Warp, agent: int, epoch: int) -> None:
        """The warp has waited for an agent's operations up to `epoch`."""
        self.clocks[warp][agent] = max(self.clocks[warp][agent], epoch)

    def arrive(self, warp: Warp, barrier: object) -> None:
        """What the warp knows becomes part of the barrier's current phase."""
        np.maximum(self._pending(barrier), self.clocks[warp], out=self._pending(barrier))
        self.clocks[warp][self.numbers[warp]] += 1

    def arrive_operation(self, warp: Warp, barrier: object, agent: int, epoch: int) -> None:
        """An asynchronous operation that the warp issued will arrive at the barrier."""
        pending = self._pending(barrier)
        np.maximum(pending, self.clocks[warp], out=pending)
        pending[agent] = max(pending[agent], epoch)

    def _pending(self, barrier: object) -> Array:
        return self.pending.setdefault(barrier, np.zeros(MAX_AGENTS, np.int32))

    def complete(self, barrier: object) -> None:
        """A phase completed: waiters learn everything that arrived."""
        pending = self.pending.pop(barrier, None)
        if pending is not None:
            done = self.published.get(barrier)
            self.published[barrier] = pending if done is None else np.maximum(done, pending)

    def acquire(self, warp: Warp, barrier: object) -> None:
        """A wait of the warp succeeded."""
        done = self.published.get(barrier)
        if done is not None:
            np.maximum(self.clocks[warp], done, out=self.clocks[warp])

    def fence_proxy(self, warp: Warp) -> None:
        """`fence.proxy.async`: the warp's generic writes so far are visible to the async proxy."""
        agent = self.numbers[warp]
        self.proxy_fences.setdefault(agent, []).append(int(self.clocks[warp][agent]))
        self.clocks[warp][agent] += 1

    # Order between clusters -----------------------------------------------------------------------

    def publish(self, warp: Warp, words: Iterable[int], release: bool, is_atomic: bool) -> None:
        """A strong write. It is a release by itself, or by an earlier fence of the warp."""
        knowledge = self._knowledge(warp) if release else self.fenced.get(warp)
        self.history.publish(words, knowledge, is_atomic)
        if release:
            self.clocks[warp][self.numbers[warp]] += 1

    def observe(self, warp: Warp, words: Iterable[int], acquire: bool) -> None:
        """A strong read. It is an acquire by itself, or by a later fence of the warp."""
        found = self.history.observe(words)
        if acquire:
            self._acquire(warp, found)
        elif found:
            self.unfenced.setdefault(warp, []).extend(found)

    def fence(self, warp: Warp) -> None:
        """`fence.acq_rel.gpu`: makes releases of later strong writes, acquires of earlier strong
        reads."""
        self._acquire(warp, self.unfenced.pop(warp, []))
        self.fenced[warp] = self._knowledge(warp)
        self.clocks[warp][self.numbers[warp]] += 1

    def _acquire(self, warp: Warp, found: list[Knowledge]) -> None:
        clock = self.clocks[warp]
        for knowledge in found:
            own = knowledge.get(self.cluster.number)
            if own is not None:
                np.maximum(clock, own, out=clock)
            agent, epoch = self.start(("acquired", warp), f"acquisitions of {warp.name}")
            history = self.acquired.setdefault(agent, [{}])
            history.append(merged(history[-1], knowledge))
            clock[agent] = epoch

    def _knowledge(self, warp: Warp) -> Knowledge:
        clock = self.clocks[warp]
        known: Knowledge = {}
        for agent, history in self.acquired.items():
            known = merged(known, history[clock[agent]])
        return {**known, self.cluster.number: clock.copy()}

    def _knows(self, warp: Warp, access: Access) -> bool:
        clock = self.clocks[warp]
        if access.cluster == self.cluster.number:
            return bool(clock[access.agent] >= access.epoch)
        for agent, history in self.acquired.items():
            known = history[clock[agent]].get(access.cluster)
            if known is not None and known[access.agent] >= access.epoch:
                return True
        return False

    # Accesses -------------------------------------------------------------------------------------

    def access_global(
        self,
        warp: Warp,
        kind: Kind,
        places: Places,
        line: int,
        operation: tuple[int, int] | None = None,
    ) -> None:
        """An access to global memory, by the warp or by an asynchronous operation (agent, epoch)
        that it issues."""
        if operation is None:
            agent = self.numbers[warp]
            operation = agent, int(self.clocks[warp][agent])
        access = Access(self.cluster.number, *operation, kind, line)
        self.history.record(access, places, functools.partial(self._knows, warp))

    def warp_reads(self, warp: Warp, shadow: Shadow, cells: Cells, line: int) -> None:
        """A synchronous read by a warp."""
        agent = self.numbers[warp]
        self.read(shadow, cells, self.clocks[warp], (agent, int(self.clocks[warp][agent])), line)

    def warp_writes(
        self, warp: Warp, shadow: Shadow, cells: Cells, line: int, generic: bool = True
    ) -> None:
        """A synchronous write by a warp."""
        agent = self.numbers[warp]
        epoch = int(self.clocks[warp][agent])
        self.write(shadow, cells, self.clocks[warp], (agent, epoch), line)
        shadow.generic_writer[cells] = agent if generic else -1

    def read(
        self,
        shadow: Shadow,
        cells: Cells,
        clock: Array,
        operation: tuple[int, int],
        line: int,
        asynchronous: bool = False,
    ) -> None:
        """A read by `operation` (agent, epoch), which is ordered after `clock`."""
        agent, epoch = operation
        writers, epochs = shadow.writer[cells], shadow.write_epoch[cells]
        unwritten = writers < 0
        if unwritten.any():
            where = self._place(shadow, cells, unwritten)
            raise Poison(f"{self.names[agent]} reads {where}, which nothing wrote")
        unordered = clock[writers] < epochs
        if unordered.any():
            first = int(np.argmax(unordered))
            self._report("read", "write", shadow, (cells, first), (agent, line), (
                int(writers[first]), int(shadow.write_line[cells][first])
            ))  # fmt: skip
        if asynchronous:
            self._check_proxy(shadow, cells, clock, (agent, line))
        index = shadow.reader(agent)
        shadow.read_epoch[index][cells] = epoch
        shadow.read_line[index][cells] = line

    def _check_proxy(
        self, shadow: Shadow, cells: Cells, clock: Array, reader: tuple[int, int]
    ) -> None:
        """Generic writes need a later fence.proxy.async by the writer, ordered before this read."""
        generic = shadow.generic_writer[cells]
        if (generic < 0).all():
            return
        for writer in np.unique(generic[generic >= 0]):
            fences = self.proxy_fences.get(int(writer), [])
            known = bisect.bisect_right(fences, int(clock[writer])) - 1
            last = fences[known] if known >= 0 else -1
            unfenced = (generic == writer) & (shadow.write_epoch[cells] > last)
            if unfenced.any():
                first = int(np.argmax(unfenced))
                self._report(
                    "asynchronous read", "write without fence.proxy.async", shadow, (cells, first),
                    reader, (int(writer), int(shadow.write_line[cells][first])),
                )  # fmt: skip

    def write(
        self, shadow: Shadow, cells: Cells, clock: Array, operation: tuple[int, int], line: int
    ) -> None:
        """A write by `operation` (agent, epoch), which is ordered after `clock`."""
        agent, epoch = operation
        if shadow.is_mbarrier[cells].any():
            where = self._place(shadow, cells, shadow.is_mbarrier[cells])
            raise RaceError(f"{self.names[agent]} writes {where}, which holds an mbarrier")
        writers = shadow.writer[cells]
        unordered = (writers >= 0) & (clock[writers] < shadow.write_epoch[cells])
        if unordered.any():
            first = int(np.argmax(unordered))
            self._report("write", "write", shadow, (cells, first), (agent, line), (
                int(writers[first]), int(shadow.write_line[cells][first])
            ))  # fmt: skip
        for index, reader in enumerate(shadow.readers):
            if reader == agent:
                continue
            unordered = shadow.read_epoch[index][cells] > clock[reader]
            if unordered.any():
                first = int(np.argmax(unordered))
                self._report("write", "read", shadow, (cells, first), (agent, line), (
                    reader, int(shadow.read_line[index][cells][first])
                ))  # fmt: skip
        shadow.writer[cells] = agent
        shadow.write_epoch[cells] = epoch
        shadow.write_line[cells] = line
        shadow.generic_writer[cells] = -1

    # mbarrier objects -----------------------------------------------------------------------------

    def initialise_mbarrier(self, warp: Warp, cta: Cta, offset: int, line: int) -> None:
        """`mbarrier.init` writes the object's 8 bytes; nothing else may from now on."""
        shadow = self.shared[cta.rank]
        cells = slice(offset // 4, offset // 4 + 2)
        shadow.is_mbarrier[cells] = False
        self.warp_writes(warp, shadow, cells, line, generic=False)
        shadow.is_mbarrier[cells] = True

    def use_mbarrier(self, warp: Warp, barrier: MBarrier, line: int, asynchronous: bool) -> None:
        """The initialisation is ordered before a use; before an asynchronous one it is fenced,
        too."""
        shadow = self.shared[barrier.cta.rank]
        cell = barrier.offset // 4
        writer, epoch = int(shadow.writer[cell]), int(shadow.write_epoch[cell])
        agent = self.numbers[warp]
        if writer != agent and self.clocks[warp][writer] < epoch:
            cells = (slice(cell, cell + 2), 0)
            self._report("use of an mbarrier", "mbarrier.init", shadow, cells, (agent, line), (
                writer, int(shadow.write_line[cell])
            ))  # fmt: skip
        if asynchronous and not barrier.fenced:
            self.add(
                ("mbarrier_init", barrier.offset),
                f"{barrier} is used by an asynchronous operation (PTX line {line}), but "
                f"{self.names[writer]} initialised it (PTX line {int(shadow.write_line[cell])}) "
                "without fence.mbarrier_init",
            )

    def invalidate_mbarrier(self, cta: Cta, offset: int) -> None:
        """`mbarrier.inval`: the memory may be used for anything again."""
        self.shared[cta.rank].is_mbarrier[offset // 4 : offset // 4 + 2] = False

    # Reports --------------------------------------------------------------------------------------

    def add(self, key: Hashable, text: str) -> None:
        """A report; the same key is reported once."""
        self.reports.setdefault(key, text)

    def _place(self, shadow: Shadow, cells: Cells, selected: Array) -> str:
        return self._cell_name(shadow, cells, int(np.argmax(selected)))

    def _cell_name(self, shadow: Shadow, cells: Cells, position: int) -> str:
        cell = cells.start + position if isinstance(cells, slice) else int(cells[position])
        if shadow.name == "tensor memory":
            quarter, column = divmod(cell, 512)
            return f"tensor memory lanes {32 * quarter}-{32 * quarter + 31} column {column}"
        return f"shared memory at {4 * cell:#x}"

    def _report(
        self,
        kind: str,
        other_kind: str,
        shadow: Shadow,
        where: tuple[Cells, int],
        now: tuple[int, int],
        before: tuple[int, int],
    ) -> None:
        (agent, line), (other, other_line) = now, before
        # One report for all the CTAs in which it happens.
        names = (self.names[agent].rpartition(" of ")[0], self.names[other].rpartition(" of ")[0])
        now_name, before_name = self.names[agent], self.names[other]
        self.add(
            (kind, other_kind, names, line, other_line),
            f"race on {self._cell_name(shadow, *where)}: {kind} by {now_name} (PTX line {line}) is "
            f"not ordered after the {other_kind} by {before_name} (PTX line {other_line})",
        )
