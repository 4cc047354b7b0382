# SPDX-License-Identifier: Apache-2.0
"""mbarriers, named barriers, the cluster barrier and the register pool: counts, phases, waiters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import BarrierError, ProtocolError

if TYPE_CHECKING:
    from .scheduler import Cluster, Cta
    from .warp import Warp


class MBarrier:
    """One mbarrier object (PTX ISA, mbarrier: phase, pending count, expected count, tx-count).

    A phase completes when no arrival is pending and the tx-count is zero. `in_flight` is what the
    hardware doesn't know: bytes of copies that were issued against this barrier and have not
    landed. A phase that completes while some are was given the wrong transaction count.
    """

    def __init__(self, offset: int, count: int, cta: Cta, initialiser: Warp | None) -> None:
        self.offset, self.count, self.cta = offset, count, cta
        self.pending, self.tx, self.phase, self.in_flight = count, 0, 0, 0
        self.completed_phases = 0
        self.waiters: list[Warp] = []
        self.initialiser = initialiser
        self.fenced = False

    def __str__(self) -> str:
        return f"mbarrier CTA {self.cta.rank}+{self.offset:#x}"

    @property
    def state(self) -> str:
        """Its counts, for messages."""
        return (
            f"phase {self.phase}, pending {self.pending}/{self.count} arrivals, "
            f"{self.tx} bytes expected"
        )

    def arrive(self, count: int, expected_bytes: int) -> None:
        """`arrive{.expect_tx}`: the expect-tx operation comes first."""
        self.tx += expected_bytes
        self.pending -= count
        if self.pending < 0:
            raise BarrierError(
                f"{self}: arrivals exceed the expected count: {self.count - self.pending} of "
                f"{self.count}"
            )
        self._complete_if_done()

    def expect(self, expected_bytes: int) -> None:
        """`expect_tx`."""
        self.tx += expected_bytes

    def issue(self, size: int) -> None:
        """A copy that will complete `size` bytes here was issued."""
        self.in_flight += size

    def land(self, size: int) -> None:
        """complete-tx of a copy."""
        self.in_flight -= size
        self.tx -= size
        self._complete_if_done()

    def _complete_if_done(self) -> None:
        if self.pending or self.tx:
            return
        if self.in_flight:
            raise BarrierError(
                f"{self}: wrong transaction count: a phase completed with {self.in_flight} bytes "
                "of its copies still in flight"
            )
        self.phase ^= 1
        self.pending = self.count
        self.completed_phases += 1
        checker = self.cta.cluster.checker
        if checker is not None:
            checker.complete(self)
        self.cta.cluster.wake(self.waiters)

    def passed(self, parity: int) -> bool:
        """Whether the phase of this parity has completed (`try_wait.parity`)."""
        return self.phase != parity

    def at_exit(self) -> str | None:
        """What is wrong with it when its CTA has exited."""
        if self.in_flight:
            return f"{self}: the CTA exited with {self.in_flight} bytes of copies in flight"
        if self.tx:
            return (
                f"{self}: wrong transaction count: {abs(self.tx)} bytes "
                f"{'never arrived' if self.tx > 0 else 'more than expected'} by the exit of the CTA"
            )
        return None


class NamedBarrier:
    """One of a CTA's 16 barrier resources (PTX ISA, barrier{.cta}): counts threads by warps."""

    def __init__(self, number: int, cta: Cta) -> None:
        self.number, self.cta = number, cta
        self.arrived = self.expected = 0
        self.generation = 0
        self.waiters: list[Warp] = []
        self.arrivals: list[str] = []

    def __str__(self) -> str:
        return f"named barrier {self.number} of CTA {self.cta.rank}"

    def arrive(self, warp: Warp, threads: int | None) -> int:
        """A warp arrives; returns the generation that it takes part in."""
        if not 0 <= self.number < 16:
            raise ProtocolError(f"{self}: barriers are numbered 0 to 15")
        threads = self.cta.thread_count if threads is None else threads
        if threads <= 0 or threads % 32:
            raise BarrierError(f"{self}: {threads} threads, expected a multiple of 32")
        if self.arrived and self.expected != threads:
            raise BarrierError(
                f"{self}: {threads} threads expected here, {self.expected} by {self.arrivals[0]}"
            )
        if self.arrived + 32 > threads:
            raise BarrierError(f"{self}: {self.arrived + 32} threads arrived, expected {threads}")
        generation = self.generation
        self.expected = threads
        self.arrived += 32
        self.arrivals.append(warp.name)
        checker = self.cta.cluster.checker
        if checker is not None:
            checker.arrive(warp, self)
        if self.arrived == threads:
            self.arrived, self.arrivals = 0, []
            self.generation += 1
            if checker is not None:
                checker.complete(self)
            self.cta.cluster.wake(self.waiters)
        return generation

    @property
    def state(self) -> str:
        """Who is there, for messages."""
        return f"{self.arrived} of {self.expected} threads arrived: {', '.join(self.arrivals)}"


class ClusterBarrier:
    """`barrier.cluster`: every warp of every CTA arrives once per phase (exited warps count)."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.generation = 0
        self.arrived: set[Warp] = set()
        self.waiters: list[Warp] = []

    def __str__(self) -> str:
        return "the cluster barrier"

    def arrive(self, warp: Warp) -> None:
        """A warp arrives, without waiting."""
        if warp in self.arrived:
            raise BarrierError("barrier.cluster.arrive twice without a wait between them")
        self.arrived.add(warp)
        if self.cluster.checker is not None:
            self.cluster.checker.arrive(warp, self)
        warp.cluster_generation = self.generation
        self.complete_if_done()

    def complete_if_done(self) -> None:
        """Called again when a warp exits."""
        if not self.arrived or any(
            w not in self.arrived and not w.exited for w in self.cluster.warps
        ):
            return
        self.generation += 1
        self.arrived.clear()
        if self.cluster.checker is not None:
            self.cluster.checker.complete(self)
        self.cluster.wake(self.waiters)

    @property
    def state(self) -> str:
        """Who is there, for messages."""
        return f"{len(self.arrived)} of {len(self.cluster.warps)} warps arrived"


class RegisterPool:
    """The registers that `setmaxnreg` gives and takes, per CTA (PTX ISA, setmaxnreg)."""

    def __init__(self, per_thread: int) -> None:
        self.per_thread = per_thread
        self.free = 0
        self.waiters: list[Warp] = []

    def __str__(self) -> str:
        return "registers"

    @property
    def state(self) -> str:
        """How many there are, for messages."""
        return f"{self.free} registers are free in the CTA's pool"
