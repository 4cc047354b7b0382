# SPDX-License-Identifier: Apache-2.0
"""Orders in which warps and asynchronous operations run."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .scheduler import Cluster
    from .warp import PendingWrite, Warp

KINDS = ("eager", "late", "random", "pct")
# Blocks that a warp runs before another may, in the seeded kinds; and the chance that a priority
# changes. Low enough that short critical sections are cut, high enough to keep the cost small.
_LONGEST_TURN = 60
_PRIORITY_CHANGE = 0.03
_ASYNCHRONOUS_TURN = 0.3
# Turns of warps after which another cluster may go on, and how many take part without need.
_LONGEST_STAY = 60
_FEW_CLUSTERS = 4


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a launch is ordered.

    * `eager`: an asynchronous operation completes when it is issued; a warp runs until it waits, a
      cluster until it finishes or polls, or has taken work from a counter.
    * `late`: copies and MMAs complete only when no warp can run otherwise, wgmma and bulk stores
      only when they are waited for, bulk stores that nobody waits for at the end of the launch.
      The cluster that started last runs; one that polls a flag as soon as it is set, the one that
      set it not before all others.
    * `random:seed`: everything in a random order.
    * `pct:seed`: random priorities, changed now and then; an operation with a low priority is
    starved
      (Burckhardt et al., A randomized scheduler with probabilistic guarantees, ASPLOS 2010).
    """

    kind: str = "eager"
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """`eager`, `late`, `random:7` or `pct:7`."""
        kind, _, seed = text.partition(":")
        if kind not in KINDS or (seed != "") != (kind in ("random", "pct")):
            raise ValueError(
                f"schedule: got {text!r}, expected eager, late, random:SEED or pct:SEED"
            )
        return cls(kind, int(seed or 0))

    def __str__(self) -> str:
        return f"{self.kind}:{self.seed}" if self.kind in ("random", "pct") else self.kind


class Chooser:
    """The decisions of one cluster's run under a schedule."""

    def __init__(self, schedule: Schedule, cluster_number: int) -> None:
        self.kind = schedule.kind
        self.eager = schedule.kind == "eager"
        self.random = random.Random(schedule.seed * 1_000_003 + cluster_number)

    def gives_way(self, communication: str) -> bool:
        """Whether other clusters may go on after a strong access.

        Eagerly that is after an atomic operation: CTAs that take their work from a counter share
        it, as on hardware. Late it is after every change, for those that wait for it.
        """
        if self.kind in ("eager", "late"):
            return communication == "atomic" or (communication == "store" and not self.eager)
        return self.random.random() < 0.5

    def disordered(self, writes: list[PendingWrite]) -> list[PendingWrite]:
        """Writes of bulk stores, which nothing orders among themselves."""
        if self.kind == "late":
            return sorted(writes, key=lambda write: write.number, reverse=True)
        return writes if self.eager else self.random.sample(writes, len(writes))

    def completes_now(self) -> bool:
        """Whether a wgmma completes when it is issued."""
        return self.eager or (self.kind != "late" and self.random.random() < 0.5)

    def priority(self) -> float:
        """A random priority."""
        return self.random.random()

    def turn(self) -> int:
        """How many blocks a warp runs before it yields."""
        if self.kind in ("eager", "late"):
            return 1 << 60
        return self.random.randrange(1, _LONGEST_TURN)

    def next_warp(self, cluster: Cluster) -> Warp | None:
        """The warp to run; None runs an asynchronous operation instead, if there is one."""
        queue = cluster.run_queue
        if self.kind == "random":
            if cluster.has_pending() and self.random.random() < _ASYNCHRONOUS_TURN:
                return None
            index = self.random.randrange(len(queue))
            queue[0], queue[index] = queue[index], queue[0]
            return queue.popleft()
        if self.kind == "pct":
            if self.random.random() < _PRIORITY_CHANGE:
                self.random.choice(cluster.warps).priority = self.priority()
            if self.random.random() < _PRIORITY_CHANGE:
                self.random.choice(cluster.ctas).tensor_priority = self.priority()
            best = max(queue, key=lambda warp: warp.priority)
            if cluster.highest_pending() > best.priority:
                return None
            queue.remove(best)
            return best
        return queue.popleft()


class GridChooser:
    """Which of the resident clusters goes on, and for how long, under a schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.kind = schedule.kind
        self.random = random.Random(schedule.seed * 1_000_003 - 1)
        self.priorities: dict[int, float] = {}

    @functools.cached_property
    def ahead(self) -> int:
        """How many clusters take part, though fewer could go on."""
        if self.kind in ("eager", "late"):
            return 1 if self.kind == "eager" else _FEW_CLUSTERS
        return self.random.randrange(2, _FEW_CLUSTERS + 1)

    def stay(self) -> int:
        """After how many turns another cluster may go on."""
        if self.kind in ("eager", "late"):
            return 1 << 60
        return self.random.randrange(1, _LONGEST_STAY)

    def next_cluster(self, able: list[Cluster]) -> Cluster:
        """One of those that can go on, given in the order in which they ran last."""
        if self.kind == "random":
            return self.random.choice(able)
        if self.kind == "pct":
            if self.random.random() < _PRIORITY_CHANGE:
                self.priorities[self.random.choice(able).number] = self.random.random()
            for cluster in able:
                self.priorities.setdefault(cluster.number, self.random.random())
            return max(able, key=lambda cluster: self.priorities[cluster.number])
        if self.kind == "late":
            return max(reversed(able), key=lambda c: (c.was_woken, not c.gives_way))
        return able[0]
