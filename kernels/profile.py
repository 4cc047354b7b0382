# SPDX-License-Identifier: Apache-2.0
"""What bounds the kernels: one launch of each under Nsight Compute, as a Markdown table.

    python -m kernels.profile run --out DIR [--only 'forward_*_d128']    # needs a GPU and ncu
    python -m kernels.profile report DIR                                 # again, from DIR's files

Forwards and backwards at batch 4, S = 4096, heads x head dim near 2,048, full and causal; pre- and
postprocess at the same sizes. Operands are random, and the launches are `kernels.tune`'s. Clocks
are as the machine has them, so shares of a unit's peak are per cycle, and the clock is in the
table; caches aren't flushed. A kernel runs once for each group of counters, alone, so its time is
that of a single launch: `fa4_jax.bench` has those of many.

The exit status is 0 if every launch was profiled and none touched local memory.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import fnmatch
import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from fa4_jax._variants import VARIANTS, Arch, DType, Kernel, Variant
from kernels.tune import Launches, Shape

HEADS = {(64, 64): 32, (96, 96): 16, (256, 256): 8, (192, 192): 8}
DEFAULT_HEADS = 16

STALL = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
STALLS = (
    *("barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle"),
    *("long_scoreboard", "math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction"),
    *("not_selected", "selected", "short_scoreboard", "sleeping", "tex_throttle", "wait"),
)
PEAK = ".avg.pct_of_peak_sustained_elapsed"
LOCAL = tuple(f"l1tex__t_requests_pipe_lsu_mem_local_op_{op}.sum" for op in ("ld", "st"))

# Column: metric. Percent of what the unit could do in the kernel's time.
SHARES = {
    "tensor": f"sm__pipe_tensor_cycles_active{PEAK}",
    "issue": f"smsp__issue_active{PEAK}",
    "FMA": f"sm__inst_executed_pipe_fma{PEAK}",
    "MUFU": f"sm__inst_executed_pipe_xu{PEAK}",
    "smem reads": f"l1tex__data_bank_reads{PEAK}",
    "smem writes": f"l1tex__data_bank_writes{PEAK}",
    "L2": f"lts__throughput{PEAK}",
    "DRAM": f"dram__throughput{PEAK}",
}
TIME, CLOCK = "gpu__time_duration.sum", "sm__cycles_elapsed.avg.per_second"
REGISTERS = "launch__registers_per_thread"
METRICS = (*SHARES.values(), TIME, CLOCK, REGISTERS, *LOCAL, *(s.join(STALL) for s in STALLS))
# Where an ncu doesn't know one of these: more passes, and a column may be missing.
SECTIONS = ("SpeedOfLight", "WarpStateStats", "SchedulerStats", "LaunchStats")
SECTIONS += ("ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis")


@dataclasses.dataclass(frozen=True)
class Profiled:
    """A row and its shape."""

    row: Variant
    shape: Shape

    @property
    def mask(self) -> str:
        """Of rows for which it makes a difference."""
        if self.row.kernel not in (Kernel.forward, Kernel.backward):
            return ""
        return "causal" if self.shape.causal else "full"


def launches(patterns: Sequence[str]) -> Iterator[Profiled]:
    """bf16 rows without features that match a pattern, in the table's order; of Hopper, which is
    what METRICS knows the units of."""
    wanted = [p if p.startswith("fa4_") else f"fa4_{p}" for p in patterns] or ["*"]
    for row in VARIANTS:
        if row.arch is not Arch.sm90a or row.features or row.dtype is not DType.bf16:
            continue
        if not any(fnmatch.fnmatch(row.name, pattern) for pattern in wanted):
            continue
        heads = HEADS.get((row.head_dim, row.head_dim_v), DEFAULT_HEADS)
        text = f"B=4,T=4096,S=4096,N={heads},K={heads}"
        yield Profiled(row, Shape(text))
        if row.kernel in (Kernel.forward, Kernel.backward):
            yield Profiled(row, Shape(f"{text},causal"))


def launch_all(chosen: Sequence[Profiled]) -> None:
    """The process that ncu watches: each once, behind work that raises the clocks."""
    import jax
    import jax.numpy as jnp

    import fa4_jax

    fa4_jax.register()
    warm = jax.jit(lambda x: x * 1.0001 + 1)
    x = jnp.ones(2**28, jnp.float32)
    for profiled in chosen:
        launch = Launches(profiled.row, profiled.shape)
        for _ in range(40):
            x = warm(x)
        jax.block_until_ready(launch())
        print(profiled.row.name, profiled.mask, flush=True)


def collect(patterns: Sequence[str], folder: pathlib.Path, seconds: float) -> None:
    """Run ncu; its CSV and log go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = [(p.row.name, p.shape.text) for p in launches(patterns)]
    (folder / "launches.json").write_text(json.dumps(shapes, indent=1) + "\n")
    output = folder / "ncu.csv"
    common = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(output)]
    # Clocks belong to the machine, and what uses it beside us.
    common += ["--clock-control", "none", "--cache-control", "none"]
    common += ["--kernel-name", "regex:^fa4_", "--target-processes", "application-only"]
    child = [sys.executable, "-m", "kernels.profile", "launch", *patterns]
    for what in (
        ["--metrics", ",".join(METRICS)],
        [option for section in SECTIONS for option in ("--section", section)],
    ):
        output.unlink(missing_ok=True)
        with (folder / "launches.log").open("w") as log:
            try:
                command = [*common, *what, *child]
                subprocess.run(command, stdout=log, stderr=log, timeout=seconds, check=False)
            except subprocess.TimeoutExpired:
                print(f"stopped after {seconds:.0f} s", file=sys.stderr)
                return
        if output.is_file() and parse(output.read_text()):
            return


def parse(text: str) -> list[dict[str, str]]:
    """Kernels of ncu's raw page, one each, by column. Lines of other kinds are ncu's own words."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    # Under the header are the units, with nothing in the columns that have none.
    return [row for row in csv.DictReader(lines) if row.get("Kernel Name")]


def number(row: Mapping[str, str], metric: str) -> float:
    """NaN where ncu has none."""
    try:
        return float(row.get(metric, "").replace(",", ""))
    except ValueError:
        return math.nan


def stalls(row: Mapping[str, str], top: int = 5) -> str:
    """Where warps spend their time, in shares of it; `selected` is issuing."""
    found = {
        name.removeprefix(STALL[0]).removesuffix(STALL[1]): number(row, name)
        for name in row
        if name.startswith(STALL[0]) and name.endswith(STALL[1])
    }
    found = {name: value for name, value in found.items() if value > 0}
    total = sum(found.values())
    found.pop("selected", None)
    first = sorted(found, key=lambda name: -found[name])[:top]
    return ", ".join(f"{name.replace('_', ' ')} {found[name] / total:.0%}" for name in first)


def table(chosen: Sequence[Profiled], rows: Sequence[Mapping[str, str]]) -> tuple[str, bool]:
    """Markdown, and whether every launch is there without local memory."""
    columns = ["kernel", "d", "mask", "us", "TFLOP/s", "MHz", "registers", "local", *SHARES]
    lines = [" | ".join([*columns, "stalls"]), "|".join(["---"] * (len(columns) + 1))]
    good = len(rows) == len(chosen)

    def cell(row: Mapping[str, str], metric: str, scale: float = 1.0) -> str:
        value = number(row, metric)
        return "-" if math.isnan(value) else f"{value * scale:.0f}"

    for profiled, row in zip(chosen, rows, strict=False):
        if not row["Kernel Name"].startswith(profiled.row.name):
            raise SystemExit(f"ncu saw {row['Kernel Name']} where {profiled.row.name} was launched")
        dims = profiled.row.head_dim, profiled.row.head_dim_v
        flops = profiled.shape.flops(profiled.row)
        nanoseconds = number(row, TIME)
        local = sum(number(row, metric) for metric in LOCAL)
        good &= local == 0
        lines.append(
            " | ".join(
                [
                    profiled.row.kernel,
                    str(dims[0]) if dims[0] == dims[1] else f"{dims[0]}/{dims[1]}",
                    profiled.mask,
                    cell(row, TIME, 1e-3),
                    f"{flops / nanoseconds / 1e3:.0f}" if flops else "",
                    cell(row, CLOCK, 1e-6),
                    cell(row, REGISTERS),
                    "-" if math.isnan(local) else f"{local:.0f}",
                    *(cell(row, metric) for metric in SHARES.values()),
                    stalls(row),
                ]
            )
        )
    return "\n".join(f"| {line} |" for line in lines), good


def report(folder: pathlib.Path) -> int:
    """Print the table of what is in `folder`; the exit status."""
    by_name = {row.name: row for row in VARIANTS}
    facts = json.loads((folder / "launches.json").read_text())
    chosen = [Profiled(by_name[name], Shape(shape)) for name, shape in facts]
    output = folder / "ncu.csv"
    text = output.read_text() if output.is_file() else ""
    rows = parse(text)
    markdown, good = table(chosen, rows)
    print(markdown)
    if len(rows) < len(chosen):
        log = (folder / "launches.log").read_text().splitlines()
        words = [line for line in text.splitlines() if line.startswith("==")]
        print(f"\n{len(rows)} of {len(chosen)} launches profiled", *log[-3:], *words[-6:], sep="\n")
    return 0 if good else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="kernels.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="needs a GPU and ncu")
    command.add_argument("--out", type=pathlib.Path, required=True)
    command.add_argument("--only", action="append", default=[], help="row or pattern; repeatable")
    command.add_argument("--seconds", type=float, default=150.0, help="default %(default)s")
    commands.add_parser("report").add_argument("folder", type=pathlib.Path)
    commands.add_parser("launch").add_argument("patterns", nargs="*")
    options = parser.parse_args(arguments)
    actions: dict[str, Callable[[], int | None]] = {
        "launch": lambda: launch_all(list(launches(options.patterns))),
        "run": lambda: collect(options.only, options.out, options.seconds),
        "report": lambda: report(options.folder),
    }
    status = actions[options.command]() or 0
    return report(options.out) if options.command == "run" else status


if __name__ == "__main__":
    sys.exit(main())
