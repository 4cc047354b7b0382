# SPDX-License-Identifier: Apache-2.0
"""From what a launch executed to cycles per resource, and the bound that they give."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from .chips import Chip
from .instruction_set import Unit

LANES = 32
# Bytes that pass through shared memory: operands of MMAs, loads and stores, copies in and out.
SHARED_TRAFFIC = (
    "operand bytes",
    "shared bytes read",
    "shared bytes written",
    "TMA bytes loaded",
    "TMA bytes stored",
    "bulk bytes loaded",
    "bulk bytes stored",
    "DSMEM bytes",
)
_SHUFFLE_BYTES = 128  # a shuffle takes shared memory's data path for a clock


@dataclasses.dataclass(frozen=True)
class Resource:
    """Cycles of one SM that a resource needs for some work."""

    name: str
    cycles: float


def total(counts: Mapping[str, collections.Counter[str]]) -> collections.Counter[str]:
    """Over all roles."""
    result: collections.Counter[str] = collections.Counter()
    for role in counts.values():
        result.update(role)
    return result


def resources(counts: Mapping[str, int], chip: Chip) -> list[Resource]:
    """Cycles that one SM needs for this work, by resource, longest first.

    Each is a lower bound by itself: latencies, dependencies and conflicts come on top.
    """
    shared = sum(counts.get(key, 0) for key in SHARED_TRAFFIC)
    shared += _SHUFFLE_BYTES * counts.get(Unit.shuffle, 0)
    instructions = sum(counts.get(unit, 0) for unit in Unit)
    found = [
        Resource("tensor cores", counts.get("tensor FLOPs", 0) / chip.tensor_flops),
        Resource("MUFU", LANES * counts.get(Unit.mufu, 0) / chip.mufu),
        Resource("FMA pipe", LANES * counts.get("FMA slots", 0) / chip.fma),
        Resource("integer pipe", LANES * counts.get(Unit.integer, 0) / chip.integer),
        Resource("conversions", LANES * counts.get(Unit.convert, 0) / chip.convert),
        Resource("shared memory", shared / chip.shared_bytes),
        Resource("instruction issue", instructions / chip.issue),
    ]
    return sorted(found, key=lambda resource: -resource.cycles)


@dataclasses.dataclass(frozen=True)
class Bound:
    """The least time that a launch can take on a chip."""

    resource: str
    seconds: float
    """At the clock under load."""
    boost_seconds: float
    """At the highest clock."""


def bound(ctas: Sequence[Mapping[str, int]], copies: int, memory_bytes: float, chip: Chip) -> Bound:
    """The bound for CTAs with these counts, all of them `copies` times over.

    The work is spread as evenly as it can be, and no SM can do with less than the longest CTA;
    global memory must move every operand and result once.
    """
    sums: collections.Counter[str] = collections.Counter()
    for counts in ctas:
        sums.update(counts)
    everything = resources({key: copies * n for key, n in sums.items()}, chip)[0]
    longest = max((resources(counts, chip)[0] for counts in ctas), key=lambda r: r.cycles)
    spread = everything.cycles / chip.sms
    name, cycles = everything.name, spread
    if longest.cycles > spread:
        name, cycles = f"{longest.name} of the longest CTA", longest.cycles
    seconds, boost = cycles / (chip.clock_ghz * 1e9), cycles / (chip.boost_ghz * 1e9)
    memory = memory_bytes / chip.memory_bytes_per_second
    if memory > seconds:
        return Bound("global memory", memory, memory)
    return Bound(name, seconds, boost)
