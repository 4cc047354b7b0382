# SPDX-License-Identifier: Apache-2.0
"""What a kernel costs, by resource, before anybody has run it.

    python -m tests.emulator.report fa4_forward_sm90a_bf16_d128 --shape B=1,T=4096,S=4096,N=1,K=1
    python -m tests.emulator.report fa4_backward_sm90a_bf16_d128 --shape B=4,T=2048,S=2048,N=16,K=16
    \\
        --causal --chip B200

Heads and batches do the same work, so one group of query heads is emulated and multiplied.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from fa4_jax._variants import BLOCK, HEAD_DIM_MULTIPLE, ROW_MULTIPLE, Variant, round_up
from kernels.signatures import buffer_dtype

from . import chips, counts
from .chips import Chip
from .device import LaunchRecord, device
from .instruction_set import Unit
from .intervals import Intervals

UNITS = (Unit.mufu, Unit.fma, Unit.integer, Unit.convert, Unit.move, Unit.shared, Unit.shuffle)
BYTES = ("operand bytes", "shared bytes read", "shared bytes written", "TMA bytes loaded")
BYTES = (
    *BYTES,
    "TMA bytes stored",
    "bulk bytes loaded",
    "global bytes read",
    "global bytes written",
    "global bytes reduced",
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a call, by the letters of `_variants`, and whether it is causal."""

    sizes: Mapping[str, int]
    causal: bool

    @classmethod
    def parse(cls, text: str, causal: bool) -> Shape:
        """`B=1,T=4096,S=4096,N=1,K=1`."""
        sizes = {key: int(value) for key, _, value in (x.partition("=") for x in text.split(","))}
        missing = set("BTSNK") - set(sizes)
        if missing:
            raise SystemExit(f"--shape: {', '.join(sorted(missing))} missing")
        return cls(sizes, causal)

    @property
    def copies(self) -> int:
        """How often the emulated part occurs."""
        return self.sizes["B"] * self.sizes["K"]

    def extents(self, variant: Variant, part: bool) -> dict[str, int]:
        """All sizes by letter; of one batch entry and one group of heads if `part`."""
        sizes = dict(self.sizes)
        if part:
            sizes |= {"B": 1, "N": sizes["N"] // sizes["K"], "K": 1}
        sizes["R"] = round_up(sizes["T"], ROW_MULTIPLE)
        sizes["E"] = round_up(variant.head_dim, HEAD_DIM_MULTIPLE)
        sizes |= {"M": -(-sizes["T"] // BLOCK), "J": -(-sizes["S"] // BLOCK), "Z": 0}
        return {**sizes, **variant.static_dims}


def emulate(variant: Variant, shape: Shape) -> LaunchRecord:
    """One launch of the part, on numbers that are cheap to make."""
    sizes = shape.extents(variant, part=True)
    rng = np.random.default_rng(0)
    intervals = interval_operands(sizes, shape.causal)
    operands = [
        intervals[buffer.name]
        if buffer.name in intervals
        else jnp.asarray(
            rng.standard_normal([sizes[letter] for letter in buffer.dims], np.float32),
            buffer_dtype(variant, buffer).numpy_name,
        )
        for buffer in variant.signature.operands
    ]
    upper = 0 if shape.causal else sizes["S"]
    scalars = {"softmax_scale": 0.05, "softcap": 1.0, "band_lower": -sizes["T"]}
    scalars["band_upper"] = upper
    where = device()
    # As many multiprocessors as tiles: one tile a CTA, so that a CTA is the least unit of work.
    where.run(variant, operands, scalars, free={"T": sizes["T"]}, num_sms=1 << 20)
    return where.launches[-1]


def interval_operands(sizes: Mapping[str, int], causal: bool) -> dict[str, np.ndarray]:
    """Of rows that have them, by name: the same mask."""
    seen = np.ones((sizes["T"], sizes["S"]), bool)
    seen = np.tril(seen) if causal else seen
    return vars(Intervals.of(np.broadcast_to(seen, (sizes["B"], *seen.shape))))


def memory_bytes(variant: Variant, shape: Shape) -> int:
    """Every operand and result once."""
    sizes = shape.extents(variant, part=False)
    width = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4}
    return sum(
        width[buffer_dtype(variant, buffer)] * math.prod(sizes[letter] for letter in buffer.dims)
        for buffer in variant.signature.buffers
    )


def describe(variant: Variant, shape: Shape, record: LaunchRecord, chip: Chip) -> str:
    """The report."""
    everything = counts.total(record.counts)
    lines = [
        f"{variant.name} {dict(shape.sizes)}{' causal' if shape.causal else ''} on {chip.name}",
        f"{shape.copies} x {len(record.ctas)} CTAs of {math.prod(record.configuration.block)} "
        f"threads, {record.configuration.shared_bytes} bytes of shared memory",
        "",
        "Executed by one part (one batch entry, one group of heads), by role:",
        "",
    ]
    header = ["role", "tensor GFLOP", *(f"{unit} k" for unit in UNITS), "waits", "setmaxnreg"]
    lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for role, found in record.counts.items():
        cells = [role, f"{found['tensor FLOPs'] / 1e9:.3f}"]
        cells += [f"{found[unit] / 1e3:.1f}" for unit in UNITS]
        cells += [str(found["waits"]), str(found["setmaxnreg"] or "")]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Bytes: " + ", ".join(f"{key.replace(' bytes', '')} {everything[key]:,}" for key in BYTES),
    ]
    lines += [
        "",
        "| resource | cycles of one SM per part | share of the longest |",
        "|---|---|---|",
    ]
    found = counts.resources(everything, chip)
    for resource in found:
        share = resource.cycles / found[0].cycles
        lines.append(f"| {resource.name} | {resource.cycles:,.0f} | {share:.0%} |")
    bound = counts.bound(record.ctas, shape.copies, memory_bytes(variant, shape), chip)
    lines += [
        "",
        f"Bound by {bound.resource}: at least {bound.seconds * 1e6:.2f} us at {chip.clock_ghz} "
        f"GHz, {bound.boost_seconds * 1e6:.2f} us at {chip.boost_ghz} GHz",
        f"({record.seconds:.1f} s emulated)",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tests.emulator.report")
    parser.add_argument("kernel", help="a row of the table")
    parser.add_argument("--shape", default="B=1,T=1024,S=1024,N=1,K=1")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--chip", choices=[c.name for c in chips.CHIPS.values()])
    options = parser.parse_args(arguments)
    rows = device().rows
    if options.kernel not in rows:
        raise SystemExit(
            f"no row is called {options.kernel}; the table has\n  " + "\n  ".join(rows)
        )
    variant = rows[options.kernel].variant
    by_name = {chip.name: chip for chip in chips.CHIPS.values()}
    chip = by_name[options.chip] if options.chip else chips.CHIPS[variant.arch]
    shape = Shape.parse(options.shape, options.causal)
    print(describe(variant, shape, emulate(variant, shape), chip))
    return 0


if __name__ == "__main__":
    sys.exit(main())
