# SPDX-License-Identifier: Apache-2.0
"""The clusters of a launch that are on the device at a time, and which of them goes on.

They start in the order of the grid, and one only if another has finished or there is room for it:
hardware promises no more. So a kernel whose CTAs wait for one another needs all of those to be
resident, or to start first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .errors import Deadlock
from .schedule import GridChooser
from .scheduler import Cluster

if TYPE_CHECKING:
    from .launch import Launch

# Of a deadlock's clusters, how many are described.
_SHOWN = 8


class Residents:
    """The clusters that have started and not finished, the one that ran last at the end."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.limit = launch.resident_clusters
        self.chooser = GridChooser(launch.options.schedule)
        # Where each CTA takes its work from a counter, none takes all of it.
        self.ahead = self.limit if launch.program.has_atomics else self.chooser.ahead
        self.clusters: list[Cluster] = []
        self.started = 0
        self._places = _places(launch)
        self._next_place = next(self._places, None)

    def run(self) -> Iterator[Cluster]:
        """Run everything; yields each cluster when it has finished."""
        while (cluster := self._next()) is not None:
            self.clusters.remove(cluster)
            cluster.advance(self.chooser.stay())
            if cluster.finished:
                yield cluster
            else:
                self.clusters.append(cluster)

    def _next(self) -> Cluster | None:
        while True:
            able = [cluster for cluster in self.clusters if cluster.can_go_on()]
            has_room = self._next_place is not None and len(self.clusters) < self.limit
            if has_room and len(able) < self.ahead:
                self._start()
            elif able:
                return self.chooser.next_cluster(able)
            elif self.clusters:
                raise Deadlock(self._deadlock())
            else:
                return None

    def _start(self) -> None:
        assert self._next_place is not None
        self.clusters.append(Cluster(self.launch, self._next_place, self.started))
        self.started += 1
        self._next_place = next(self._places, None)

    def _deadlock(self) -> str:
        program = self.launch.program
        lines = [f"{program.name}: deadlock between CTAs: all that run wait for others"]
        for cluster in sorted(self.clusters, key=lambda c: c.number)[:_SHOWN]:
            lines += cluster.waiting()
        if len(self.clusters) > _SHOWN:
            lines.append(f"  and {len(self.clusters) - _SHOWN} more clusters")
        if self._next_place is not None:
            lines.append(
                f"  CTA {self._next_place} and later ones haven't started: "
                f"{self.limit} clusters may be resident"
            )
        return "\n".join(lines)


def _places(launch: Launch) -> Iterator[tuple[int, int, int]]:
    """The first CTA of each cluster, in the order of the grid."""
    grid, cluster = launch.configuration.grid, launch.configuration.cluster
    for z in range(0, grid[2], cluster[2]):
        for y in range(0, grid[1], cluster[1]):
            for x in range(0, grid[0], cluster[0]):
                yield x, y, z
