# SPDX-License-Identifier: Apache-2.0
"""Find the tiles of a row: build candidates without a GPU, time them interleaved on one.

    python -m kernels.tune build forward_sm90a_bf16_d128 --out build/tune/forward_d128 \
        --axis tile_n=96,112,128 --axis stages=1,2
    python -m kernels.tune time build/tune/forward_d128 \
        --shape B=4,T=4096,S=4096,N=16,K=16 --shape B=16,T=1024,S=1024,N=16,K=16,causal

An axis is a field of `Tiles`; candidates are the product of the axes around the row of the table,
which is always one of them. `build` refuses on paper what its class refuses, what has no room in
shared memory, and what ptxas spilled or serialised, each with its reason; the rest become one
library in the output folder. That folder is all that `time` needs beside the checkout, so it can be
carried to a machine with a GPU. `time` checks every candidate's results against the table's row
first, times rounds of back-to-back launches, all candidates in each round, and prints the log, best
first, and the row to put into the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fa4_jax import _variants
from fa4_jax._variants import Arch, Kernel, Tiles, Variant
from kernels import build as kernels_build

# What a CTA may have (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability").
SHARED_MEMORY = {Arch.sm90a: 227 * 1024, Arch.sm100a: 227 * 1024}
ROUNDS, ROUND_SECONDS = 7, 0.03
# Relative L2 distance to the results of the table's row above which a candidate is wrong: they
# differ by the order of sums, in 16 bits.
MAX_DIFFERENCE = 1e-2


# What makes a field of `Tiles` of its text, or of what JSON keeps of it.
_KINDS: Mapping[str, Callable[[Any], Any]] = {
    field.name: {
        "bool": lambda text: bool(int(text)),
        "Exp2": lambda kept: _variants.Exp2(**kept),
    }.get(str(field.type), getattr(_variants, str(field.type), int))
    for field in dataclasses.fields(Tiles)
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate(Variant):
    """A row with other tiles, under a key of its own."""

    label: str

    @property
    def key(self) -> str:
        return f"{super().key}_{self.label}"


def candidates(row: Variant, axes: Mapping[str, Sequence[Any]]) -> Iterator[Candidate]:
    """The product of `axes` around a row; the row's own tiles come first, as `table`."""
    fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    yield Candidate(**fields, label="table")
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        tiles = dataclasses.replace(row.tiles, **chosen)
        if tiles != row.tiles:
            label = "_".join(f"{name}{_text(value)}" for name, value in chosen.items())
            yield Candidate(**{**fields, "tiles": tiles}, label=label)


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def refusal(report: kernels_build.Report | kernels_build.Failure, arch: Arch) -> str:
    """Why a candidate isn't timed, or an empty string."""
    if isinstance(report, kernels_build.Failure):
        return report.message.splitlines()[-1]
    if report.shared_memory > SHARED_MEMORY[arch]:
        return f"{report.shared_memory} bytes of shared memory, of {SHARED_MEMORY[arch]}"
    if report.losses:
        return report.losses[0]
    if report.spill_bytes > 64:  # some bytes outside the main loop cost nothing
        return f"{report.spill_bytes} bytes of spills"
    return ""


def build(pattern: str, axes: Mapping[str, Sequence[Any]], out: pathlib.Path, jobs: int) -> int:
    """Compile a row's candidates and link those that aren't refused; the exit status."""
    (row,) = kernels_build.select([pattern], [])
    found = {candidate.name: candidate for candidate in candidates(row, axes)}
    objects = out / "kernels"
    objects.mkdir(parents=True, exist_ok=True)
    facts = []
    outcomes = kernels_build.compile_rows(list(found.values()), objects, jobs=jobs)
    for count, (report, _) in enumerate(outcomes, start=1):
        candidate = found[report.name]
        reason = refusal(report, row.arch)
        print(f"[{count}/{len(found)}] {candidate.label}: {reason or report}", flush=True)
        fact = {"label": candidate.label, "tiles": dataclasses.asdict(candidate.tiles)}
        if not isinstance(report, kernels_build.Failure):
            fact |= {"registers": report.registers, "shared_memory": report.shared_memory}
            fact |= {"spill_bytes": report.spill_bytes}
        facts.append(fact | {"refused": reason})
    kept = {fact["label"] for fact in facts if not fact["refused"]}
    if "table" not in kept:
        raise SystemExit("the table's own row is refused; there is nothing to compare with")
    chosen = [c for c in found.values() if c.label in kept]
    kernels_build.write_registry(chosen, objects)
    _link(objects, [objects / f"{c.name}.o" for c in chosen], out)
    (out / "candidates.json").write_text(json.dumps({"row": row.name, "candidates": facts}))
    return 0


def _link(objects: pathlib.Path, files: Sequence[pathlib.Path], out: pathlib.Path) -> None:
    """libfa4_jax.so and its manifest in `out`/lib, by the project's own CMake rules."""
    folder = out / "cmake"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    for command in (
        ["cmake", "-S", str(kernels_build.ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
        + [f"-DPython3_EXECUTABLE={sys.executable}", f"-DFA4_JAX_KERNEL_DIR={objects.resolve()}"]
        + [f"-DFA4_JAX_OBJECTS={';'.join(str(file.resolve()) for file in files)}"],
        ["cmake", "--build", str(folder)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"linking failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    library = out / "lib"
    library.mkdir(exist_ok=True)
    for name in ("libfa4_jax.so", "manifest.json"):
        (library / name).write_bytes((folder / name).read_bytes())


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a launch, and whether it is causal."""

    text: str

    @property
    def sizes(self) -> dict[str, int]:
        """By the letters of `_variants`."""
        parts = [part.partition("=") for part in self.text.split(",") if "=" in part]
        sizes = {letter: int(value) for letter, _, value in parts}
        rows = _variants.round_up(sizes["T"], _variants.ROW_MULTIPLE)
        blocks = {"M": -(-sizes["T"] // _variants.BLOCK), "J": -(-sizes["S"] // _variants.BLOCK)}
        return {**sizes, **blocks, "R": rows, "Z": 0}

    @property
    def causal(self) -> bool:
        return "causal" in self.text.split(",")

    def flops(self, variant: Variant) -> float:
        """Floating-point operations of a forward or a backward, as the papers count them."""
        sizes = self.sizes
        pairs = sizes["B"] * sizes["N"] * sizes["T"] * sizes["S"] / (2 if self.causal else 1)
        products = {Kernel.forward: (1, 1), Kernel.backward: (3, 2)}.get(variant.kernel, (0, 0))
        return 2 * pairs * (products[0] * variant.head_dim + products[1] * variant.head_dim_v)


class Launches:
    """Launches of one row, whatever its key, on random operands."""

    def __init__(self, variant: Variant, shape: Shape):
        import jax
        import jax.numpy as jnp
        import numpy as np

        signature = variant.signature
        sizes = {**shape.sizes, **variant.static_dims}
        keys = iter(jax.random.split(jax.random.key(0), len(signature.operands)))

        def dims(buffer: _variants.Buffer) -> tuple[int, ...]:
            return tuple(sizes[letter] for letter in buffer.dims)

        def dtype(buffer: _variants.Buffer) -> str:
            return (buffer.dtype or variant.dtype).numpy_name

        def random(buffer: _variants.Buffer) -> jax.Array:
            if buffer.dtype is _variants.DType.i32:
                raise SystemExit(f"{variant.name} takes intervals; tune the row without them")
            if buffer.name == "lse_log2":  # as a forward leaves it: probabilities of 1 / S
                return jnp.full(dims(buffer), math.log2(sizes["S"]), dtype(buffer))
            # Made where it is needed: a billion elements take NumPy ten seconds.
            return jax.random.normal(next(keys), dims(buffer), dtype(buffer))

        values = {
            "softmax_scale": np.float32(1 / math.sqrt(variant.head_dim)),
            "softcap": np.float32(1),
            "band_lower": np.int32(-sizes.get("T", 0)),
            "band_upper": np.int32(0 if shape.causal else sizes.get("S", 0)),
        }
        self.operands = [random(buffer) for buffer in signature.operands]
        self.aliases = signature.aliases
        call = jax.ffi.ffi_call(
            _variants.target_name(variant.kernel),
            [jax.ShapeDtypeStruct(dims(b), dtype(b)) for b in signature.results],
            input_output_aliases=self.aliases,
        )
        attributes = {scalar.name: values[scalar.name] for scalar in signature.attributes}
        self.step = jax.jit(
            functools.partial(call, kernel=variant.key, **attributes),
            donate_argnums=tuple(self.aliases),
        )

    def __call__(self) -> Sequence[Any]:
        """Enqueue one launch. A buffer updated in place goes on to the next."""
        results = self.step(*self.operands)
        for operand, result in self.aliases.items():
            self.operands[operand] = results[result]
        return results

    def seconds(self, calls: int) -> float:
        """Time per launch of `calls` launches, back to back."""
        import jax

        start = time.perf_counter()
        results: Sequence[Any] = ()
        for _ in range(calls):
            results = self()
        jax.block_until_ready(results)
        return (time.perf_counter() - start) / calls


def _results(launch: Callable[[], Sequence[Any]]) -> list[Any]:
    import jax.numpy as jnp

    return [jnp.array(x, jnp.float32) for x in launch()]  # copies: the next launch may reuse them


def _difference(got: Sequence[Any], expected: Sequence[Any]) -> float:
    import jax.numpy as jnp

    pairs = zip(got, expected, strict=True)
    # Of zeros, as a preprocess leaves them, the same zeros are at no distance.
    distances = [
        float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) if jnp.any(a != b) else 0.0
        for a, b in pairs
    ]
    return math.nan if any(map(math.isnan, distances)) else max(distances)


def measure(folder: pathlib.Path, shapes: Sequence[Shape]) -> int:
    """Time the candidates in `folder` and print the log; the exit status."""
    import fa4_jax

    # The library of the candidates, in place of the package's own.
    fa4_jax.__path__.insert(0, str(folder.resolve()))
    fa4_jax.register()
    facts = json.loads((folder / "candidates.json").read_text())
    (row,) = kernels_build.select([facts["row"]], [])
    fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    running, refused = {}, []
    for fact in facts["candidates"]:
        tiles = Tiles(**{name: _KINDS[name](value) for name, value in fact["tiles"].items()})
        if fact["refused"]:
            refused.append(f"{fact['label']}: {fact['refused']}")
        else:
            candidate = Candidate(**{**fields, "tiles": tiles}, label=fact["label"])
            running[fact["label"]] = candidate, fact
    times: dict[str, list[float]] = {label: [] for label in running}
    spread = 0.0
    for shape in shapes:
        launches = {label: Launches(candidate, shape) for label, (candidate, _) in running.items()}
        expected = _results(launches["table"])
        for label, launch in launches.items():
            difference = _difference(_results(launch), expected) if label != "table" else 0.0
            if not difference <= MAX_DIFFERENCE:
                raise SystemExit(f"{label} is wrong: off by {difference:.2g} from the table's row")
        calls = max(3, math.ceil(ROUND_SECONDS / launches["table"].seconds(3)))
        rounds = {label: [] for label in launches}
        for i in range(ROUNDS):
            print(f"\r{shape.text}: round {i + 1} of {ROUNDS}", end="", file=sys.stderr, flush=True)
            for label, launch in launches.items():
                rounds[label].append(launch.seconds(calls))
        print(file=sys.stderr)
        for label, samples in rounds.items():
            times[label].append(statistics.median(samples))
            low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
            spread = max(spread, (high - low) / times[label][-1])
    _print_log(row, shapes, running, times)
    print(f"\nspread of a median at most {spread:.1%}")
    print("refused:", *(refused or ["nothing"]), sep="\n  ")
    return 0


def _print_log(
    row: Variant,
    shapes: Sequence[Shape],
    running: Mapping[str, tuple[Candidate, Mapping[str, Any]]],
    times: Mapping[str, Sequence[float]],
) -> None:
    """The table of all candidates, best first, and the winner's tiles."""

    def speed(label: str) -> float:
        ratios = (a / b for a, b in zip(times["table"], times[label], strict=True))
        return math.prod(ratios) ** (1 / len(shapes))

    order = sorted(times, key=speed, reverse=True)
    print(f"{row.name}: TFLOP/s by shape; speed is the geometric mean over the table's row\n")
    for i, shape in enumerate(shapes):
        print(f"  ({i + 1}) {shape.text}")
    columns = ("registers", "shared memory", *(f"({i + 1})" for i in range(len(shapes))), "speed")
    print(f"\n| candidate | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for label in order:
        _, fact = running[label]
        cells = (
            f"{shape.flops(row) / seconds / 1e12:.1f}"
            for shape, seconds in zip(shapes, times[label], strict=True)
        )
        print(
            f"| {label} | {fact['registers']} | {fact['shared_memory']} | {' | '.join(cells)} "
            f"| {speed(label):.3f} |"
        )
    best, _ = running[order[0]]
    changed = {
        field.name: getattr(best.tiles, field.name)
        for field in dataclasses.fields(Tiles)
        if getattr(best.tiles, field.name) != field.default
    }
    arguments = ", ".join(f"{name}={value}" for name, value in changed.items())
    print(f"\nbest: {order[0]}\n    Tiles({arguments})")


def _axis(text: str) -> tuple[str, list[Any]]:
    """`tile_n=96,128` as a field of `Tiles` and its values."""
    name, _, values = text.partition("=")
    if name not in _KINDS or not values:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected FIELD=VALUE,... of {', '.join(_KINDS)}"
        )
    try:
        return name, [_KINDS[name](value) for value in values.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build", help="compile candidates; needs no GPU")
    command.add_argument("row", help="one row of the table, or a pattern that names one")
    command.add_argument("--axis", action="append", type=_axis, default=[], help="repeatable")
    command.add_argument("--out", type=pathlib.Path, required=True)
    command.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    command = commands.add_parser("time", help="time what was built; needs a GPU")
    command.add_argument("folder", type=pathlib.Path)
    command.add_argument("--shape", action="append", type=Shape, required=True, help="repeatable")
    options = parser.parse_args(arguments)
    if options.command == "build":
        return build(options.row, dict(options.axis), options.out, options.jobs)
    return measure(options.folder, options.shape)


if __name__ == "__main__":
    sys.exit(main())
