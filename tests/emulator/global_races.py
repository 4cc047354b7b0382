# SPDX-License-Identifier: Apache-2.0
"""Happens-before check of global memory, between everything that a launch runs.

`races` gives each cluster its vector clocks. Here is what joins them: the accesses to each 4-byte
cell of global memory, by whichever cluster, and the clocks that releases left at their addresses
for the acquires that read them (PTX ISA, Memory Consistency Model: Release and Acquire Patterns).

Two accesses conflict if one of them writes, unless both are strong: of scope `.gpu` or `.sys`,
atomics and reductions included, also those of bulk operations, which are `.relaxed.gpu` each
(PTX ISA, cp.reduce.async.bulk). Conflicting accesses must be ordered. Reductions commute but for
the rounding of floats: a kernel that promises the same bits in every run has ordered additions.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from .alu import Array
from .errors import RaceError
from .memory import CELL, Buffer

Knowledge = dict[int, Array]
"""By cluster, how far each of its agents is known. Never changed in place."""
Places = list[tuple[Buffer, slice | Array]]


class Kind(enum.StrEnum):
    """How memory is accessed."""

    read = enum.auto()
    write = enum.auto()
    strong_read = "strong read"
    strong_write = "strong write"
    reduction = enum.auto()
    addition = enum.auto()
    """A reduction of floats, of which the order matters."""


_WEAK = (Kind.read, Kind.write)
_READS = (Kind.read, Kind.strong_read)


class Access(NamedTuple):
    """What an agent of a cluster did, at which PTX line."""

    cluster: int
    agent: int
    epoch: int
    kind: Kind
    line: int


class GlobalHistory:
    """The accesses and releases of a launch.

    A cell has the number of its history, the accesses that later ones must be ordered after. Cells
    that are used alike share one, so that an access costs little more than looking it up.
    """

    def __init__(self, ordered_additions: bool) -> None:
        self.ordered_additions = ordered_additions
        self.names: dict[int, list[str]] = {}
        """The agents' names by cluster."""
        self.published: dict[int, Knowledge] = {}
        """By address / 4."""
        self._cells: dict[int, Array] = {}
        self._histories: list[tuple[Access, ...]] = [()]
        self._following: dict[tuple[int, Access], int] = {}

    def record(self, access: Access, places: Places, knows: Callable[[Access], bool]) -> None:
        """An access by whom `knows` tells what it is ordered after, or RaceError."""
        for buffer, cells in places:
            if access.kind is Kind.write and self.published:
                self._forget_releases(buffer, cells)
            histories = self._cells.get(buffer.start)
            if histories is None:
                histories = np.zeros(buffer.size // CELL + 1, np.int32)
                self._cells[buffer.start] = histories
            found = histories[cells]
            first = int(found[0])
            if (found == first).all():
                histories[cells] = self._extended(first, access, knows, (buffer, cells, found))
                continue
            old, places_of_old = np.unique(found, return_inverse=True)
            new = [self._extended(int(x), access, knows, (buffer, cells, found)) for x in old]
            histories[cells] = np.array(new, np.int32)[places_of_old]

    def _extended(
        self,
        history: int,
        access: Access,
        knows: Callable[[Access], bool],
        where: tuple[Buffer, slice | Array, Array],
    ) -> int:
        """The history that follows a history. What any later access that conflicts with an earlier
        one would conflict with here, too, is forgotten."""
        following = self._following.get((history, access))
        if following is not None:
            return following
        kept = []
        for earlier in self._histories[history]:
            known = knows(earlier)
            if not known and self._conflict(earlier.kind, access.kind):
                buffer, cells, found = where
                position = int(np.argmax(found == history))
                cell = cells.start + position if isinstance(cells, slice) else cells[position]
                raise RaceError(self._report(access, earlier, f"{buffer.name} at byte {4 * cell}"))
            same = earlier[:2] == access[:2] and earlier.kind == access.kind
            covered = earlier.kind == access.kind or access.kind is Kind.write
            if not same and not (known and covered):
                kept.append(earlier)
        self._histories.append((*kept, access))
        self._following[history, access] = len(self._histories) - 1
        return len(self._histories) - 1

    def _conflict(self, one: Kind, other: Kind) -> bool:
        if one is Kind.addition and other is Kind.addition:
            return self.ordered_additions
        if one in _READS and other in _READS:
            return False
        return one in _WEAK or other in _WEAK

    def _report(self, access: Access, earlier: Access, place: str) -> str:
        name, earlier_name = (self.names[x.cluster][x.agent] for x in (access, earlier))
        return (
            f"global memory race on {place}: {access.kind} by {name} (PTX line {access.line}) is "
            f"not ordered after the {earlier.kind} by {earlier_name} (PTX line {earlier.line})"
        )

    # Releases -------------------------------------------------------------------------------------

    def publish(self, words: Iterable[int], knowledge: Knowledge | None, is_atomic: bool) -> None:
        """A write at these addresses / 4, with what its releasing thread knows, if it releases.

        An atomic operation continues what it read: who reads its result is synchronised with the
        releases before it, too (PTX ISA, Observation Order).
        """
        for word in words:
            before = self.published.get(word) if is_atomic else None
            if knowledge is not None:
                self.published[word] = merged(before or {}, knowledge)
            elif before is None:
                self.published.pop(word, None)

    def _forget_releases(self, buffer: Buffer, cells: slice | Array) -> None:
        """A weak write releases nothing, and ends what others released there."""
        touched = np.zeros(buffer.size // CELL + 1, bool)
        touched[cells] = True
        for word in list(self.published):
            cell = word - buffer.start // CELL
            if 0 <= cell < len(touched) and touched[cell]:
                del self.published[word]

    def observe(self, words: Iterable[int]) -> list[Knowledge]:
        """What was released there."""
        found = {id(k): k for word in words if (k := self.published.get(word)) is not None}
        return list(found.values())


def merged(one: Knowledge, other: Knowledge) -> Knowledge:
    """What both know."""
    result = dict(one)
    for cluster, clock in other.items():
        known = result.get(cluster)
        if known is None:
            result[cluster] = clock
        elif known is not clock:
            result[cluster] = np.maximum(known, clock)
    return result
