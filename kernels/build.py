# SPDX-License-Identifier: Apache-2.0
"""Compile the rows of `fa4_jax._variants.VARIANTS` to objects, headers and the C++ registry.

    python -m kernels.build --out build/kernels                       # every row, incrementally
    python -m kernels.build --only forward_sm90a_bf16_d128 --report   # one row; what ptxas said
    python -m kernels.build --digest                                  # sha256 of each row's PTX

No GPU and no CUDA toolkit are needed. Each row leaves `<name>.o`, `<name>.h` and `<name>.json` in
the output folder; a row whose `.json` has the current key is not compiled again. `--keep` adds
`<name>.ptx` and `<name>.cubin`; the cubin is in the object byte for byte, so its sha256 (in the
`.json`) is what binds a PTX text to an object. Names bind nothing: two kernels may share one.
FA4_JAX_BUILT_KERNELS may name the output folder of another build: what has the same key there is
taken, not compiled.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import concurrent.futures.process
import dataclasses
import fnmatch
import functools
import hashlib
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence

from fa4_jax._variants import VARIANTS, Arch, Kernel, Split, Variant
from kernels import signatures

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Which class compiles which kernel for which architecture and division of work.
KERNELS = {
    (Kernel.forward, Arch.sm90a, Split.rows): "kernels.forward_sm90:ForwardSm90",
    (Kernel.forward, Arch.sm100a, Split.rows): "kernels.forward_sm100:ForwardSm100",
    (Kernel.backward, Arch.sm90a, Split.rows): "kernels.backward_sm90:BackwardSm90",
    (Kernel.backward, Arch.sm90a, Split.products): "kernels.backward_wide_sm90:BackwardWideSm90",
    (Kernel.backward, Arch.sm100a, Split.rows): "kernels.backward_sm100:BackwardSm100",
    (Kernel.backward, Arch.sm100a, Split.passes): ("kernels.backward_wide_sm100:BackwardWideSm100"),
    **{
        (Kernel.backward_preprocess, arch, Split.rows): (
            "kernels.backward_preprocess:BackwardPreprocess"
        )
        for arch in Arch
    },
    **{
        (Kernel.backward_postprocess, arch, split): (
            "kernels.backward_postprocess:BackwardPostprocess"
        )
        for arch in Arch
        for split in Split
    },
}

# The DSL's default host target is the build machine's own CPU: with AVX-512 there, the library dies
# of SIGILL elsewhere.
HOST_TARGET = "--host-target 'llvm -mtriple=x86_64-unknown-linux-gnu -mcpu=x86-64'"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What compiling one row gave; stored as `<name>.json`."""

    name: str
    key: str
    seconds: float
    registers: int
    spill_bytes: int
    shared_memory: int
    cubin_sha256: str
    ptx_sha256: str
    spills: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    """What ptxas calls potential performance losses. One of them makes every WGMMA wait for the one
    before, for want of registers, and leaves neither a spill nor another sign."""

    def __str__(self) -> str:
        return (
            f"{self.name} {self.seconds:.1f} s, {self.registers} registers, "
            f"{self.spill_bytes or 'no'} {'bytes of ' if self.spill_bytes else ''}spills"
            f"{''.join(f', {loss}' for loss in self.losses)}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a row did not compile."""

    name: str
    message: str


@functools.cache
def source_files(module: str) -> frozenset[pathlib.Path]:
    """The files of this repository that importing `module` executes."""
    pending, seen = [module], set()
    while pending:
        name = pending.pop()
        path = ROOT.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                pending += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                pending += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return frozenset(seen)


def row_key(variant: Variant, options: str = HOST_TARGET) -> str:
    """Hash of everything a row's object depends on: row, sources, DSL version, options."""
    digest = hashlib.sha256()
    environment = sorted(item for item in os.environ.items() if item[0].startswith("CUTE_DSL_"))
    version = importlib.metadata.version("nvidia-cutlass-dsl")
    facts = (variant, variant.signature, version, options, environment)
    digest.update(repr(facts).encode())
    module = entry_point(variant).partition(":")[0]
    for path in sorted(source_files(module) | source_files("kernels.build")):
        digest.update(f"\n{path.relative_to(ROOT)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def entry_point(variant: Variant) -> str:
    """`module:Class` of the row's kernel."""
    try:
        return KERNELS[variant.kernel, variant.arch, variant.tiles.split]
    except KeyError:
        raise KeyError(
            f"no class is registered for {variant.kernel} on {variant.arch} with warpgroups that "
            f"divide {variant.tiles.split}"
        ) from None


def compile_row(variant: Variant, key: str, out: pathlib.Path, keep: bool) -> Report | Failure:
    """Compile one row into `out`. Runs in a worker process, prepared by `_start_worker`."""
    try:
        return _compile_row(variant, key, out, keep)
    except (
        Exception
    ) as error:  # whatever the kernel or the compiler raised becomes the row's report
        text = "".join(traceback.format_exception(error))
        return Failure(name=variant.name, message=text.strip())


def _start_worker(scratch: pathlib.Path) -> None:
    """Choose where the DSL leaves its dumps: it reads its variables once, when first used."""
    own = scratch / str(os.getpid())
    own.mkdir()
    os.environ["CUTE_DSL_DUMP_DIR"] = str(own)


def _compile_row(variant: Variant, key: str, out: pathlib.Path, keep: bool) -> Report:
    scratch = pathlib.Path(os.environ["CUTE_DSL_DUMP_DIR"])
    # For helpers that ask which architecture they write for; `--gpu-arch` decides the output.
    os.environ["CUTE_DSL_ARCH"] = variant.arch.cuda_target
    from cutlass import cute

    module, _, class_name = entry_point(variant).partition(":")
    kernel_class = getattr(importlib.import_module(module), class_name)
    # Symbols named for the row: a profile says which kernel ran, and a digest doesn't depend on
    # file names and argument types.
    for function, name in ((kernel_class.kernel, variant.name), (kernel_class.__call__, "launch")):
        function.set_name_prefix(name, remove_cutlass_symbol=True, keep_mangled_name=False)

    remarks = scratch / f"{variant.name}.yaml"
    options = (
        f"{HOST_TARGET} --gpu-arch {variant.arch.cuda_target} --keep-ptx --keep-cubin "
        f"--remark-filter .* --remark-output {remarks}"
    )
    start = time.perf_counter()
    compiled = cute.compile(
        kernel_class(variant), *signatures.fake_arguments(variant), options=options
    )
    seconds = time.perf_counter() - start
    ptx, cubin = compiled.__ptx__.encode(), compiled.__cubin__

    # The .json goes first and comes back last: it claims that the rest is there and current.
    (out / f"{variant.name}.json").unlink(missing_ok=True)
    compiled.export_to_c(file_path=str(out), file_name=variant.name, function_prefix=variant.name)
    signatures.check_header(variant, (out / f"{variant.name}.h").read_text())
    if cubin not in (out / f"{variant.name}.o").read_bytes():
        raise RuntimeError("the exported object doesn't hold the cubin that was compiled")
    for suffix, content in (("ptx", ptx), ("cubin", cubin)):
        kept = out / f"{variant.name}.{suffix}"
        kept.write_bytes(content) if keep else kept.unlink(missing_ok=True)
    report = Report(
        name=variant.name,
        key=key,
        seconds=round(seconds, 2),
        cubin_sha256=hashlib.sha256(cubin).hexdigest(),
        ptx_sha256=hashlib.sha256(ptx).hexdigest(),
        **_ptxas_facts(remarks.read_text()),
    )
    (out / f"{variant.name}.json").write_text(json.dumps(dataclasses.asdict(report), indent=1))
    return report


def _ptxas_facts(remarks: str) -> dict[str, object]:
    """Registers, spills and shared memory from the compiler's remarks."""

    def largest(pattern: str) -> int:
        return max((int(m) for m in re.findall(pattern, remarks)), default=0)

    spills = re.findall(
        r"Name:\s+RemarkPerfRegisterSpill\nDebugLoc:\s+\{ File: .*?([\w.]+\.py)'?\"?, Line: (\d+)",
        remarks,
    )
    losses = re.findall(
        r"Potential Performance Loss: (.*?)(?: (?:for|in) (?:the )?function.*)?$", remarks, re.M
    )
    return {
        "registers": largest(r"Used (\d+) registers"),
        "spill_bytes": largest(r"(\d+) bytes spill stores") + largest(r"(\d+) bytes spill loads"),
        "shared_memory": largest(r"Shared memory allocated: (\d+) bytes"),
        "spills": tuple(dict.fromkeys(f"{file}:{line}" for file, line in spills)),
        "losses": tuple(dict.fromkeys(losses)),
    }


def current_report(variant: Variant, key: str, out: pathlib.Path, keep: bool) -> Report | None:
    """The stored report of a row whose files in `out` are those of `key`."""
    suffixes = ("o", "h", *(("ptx", "cubin") if keep else ()))
    try:
        report = Report(**json.loads((out / f"{variant.name}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None
    present = all((out / f"{variant.name}.{suffix}").is_file() for suffix in suffixes)
    return report if present and report.key == key else None


def adopt(variant: Variant, key: str, built: pathlib.Path, out: pathlib.Path, keep: bool) -> bool:
    """Take the row's files from another build's output if they are those of `key`."""
    if not current_report(variant, key, built, keep):
        return False
    for suffix in ("o", "h", *(("ptx", "cubin") if keep else ()), "json"):  # which claims the rest
        shutil.copy(built / f"{variant.name}.{suffix}", out)
    return True


def compile_rows(
    variants: Sequence[Variant], out: pathlib.Path, *, jobs: int, keep: bool = False
) -> Iterator[tuple[Report | Failure, bool]]:
    """Bring `variants` up to date in `out`; yields (report, whether it was compiled just now)."""
    stale = {}
    built = os.environ.get("FA4_JAX_BUILT_KERNELS")
    for variant in variants:
        key = row_key(variant)
        report = current_report(variant, key, out, keep)
        if built and not report and adopt(variant, key, pathlib.Path(built), out, keep):
            report = current_report(variant, key, out, keep)
        if report:
            yield report, False
        else:
            stale[variant] = key
    if not stale:
        return
    with (
        tempfile.TemporaryDirectory(prefix="fa4-build-") as scratch,
        concurrent.futures.ProcessPoolExecutor(
            min(jobs, len(stale)),
            # A fork would inherit whatever this process has imported.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(pathlib.Path(scratch),),
        ) as pool,
    ):
        rows = {pool.submit(compile_row, v, key, out, keep): v for v, key in stale.items()}
        for future in concurrent.futures.as_completed(rows):
            try:
                yield future.result(), True
            except concurrent.futures.process.BrokenProcessPool as error:
                message = f"{error} (this row or one compiled at the same time)"
                yield Failure(name=rows[future].name, message=message), True


def write_registry(variants: Sequence[Variant], out: pathlib.Path) -> None:
    """The C++ registry and `kernels.json` of exactly these rows; untouched if nothing changed."""
    facts = {
        "dsl_version": importlib.metadata.version("nvidia-cutlass-dsl"),
        "arches": sorted({v.arch.value for v in variants}),
        "kernels": sorted(v.name for v in variants),
    }
    for name, text in (
        ("registry.generated.cc", signatures.registry_source(variants)),
        ("kernels.json", json.dumps(facts, indent=1) + "\n"),
    ):
        path = out / name
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def select(patterns: Iterable[str], arches: Iterable[str]) -> tuple[Variant, ...]:
    """The rows whose name matches one of `patterns` (shell style, `fa4_` optional) and `arches`."""
    wanted = [p if p.startswith("fa4_") else f"fa4_{p}" for p in patterns] or ["*"]
    arches = set(arches) or set(Arch)
    for pattern in wanted:
        if not fnmatch.filter([v.name for v in VARIANTS], pattern):
            names = "\n  ".join(v.name for v in VARIANTS)
            raise SystemExit(f"no row is called {pattern}; the table has\n  {names}")
    return tuple(
        v
        for v in VARIANTS
        if v.arch in arches and any(fnmatch.fnmatch(v.name, pattern) for pattern in wanted)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="kernels.build", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/kernels"))
    parser.add_argument(
        "--arch", action="append", choices=list(Arch), default=[], help="repeatable"
    )
    parser.add_argument(
        "--only", action="append", default=[], help="row or shell pattern; repeatable"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--keep", action="store_true", help="keep PTX and cubin beside the object")
    parser.add_argument(
        "--report", action="store_true", help="shared memory, spills, losses, hashes"
    )
    parser.add_argument("--digest", action="store_true", help="print the sha256 of each row's PTX")
    parser.add_argument("--list", action="store_true", help="print the rows' names and stop")
    options = parser.parse_args(arguments)

    variants = select(options.only, options.arch)
    if options.list:
        print("\n".join(variant.name for variant in variants))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    reports: dict[str, Report] = {}
    failures: list[Failure] = []
    outcomes = compile_rows(variants, options.out, jobs=max(options.jobs, 1), keep=options.keep)
    for count, (outcome, fresh) in enumerate(outcomes, start=1):
        place = f"[{count}/{len(variants)}]"
        if isinstance(outcome, Failure):
            failures.append(outcome)
            print(f"{place} {outcome.name} FAILED", file=sys.stderr, flush=True)
        else:
            reports[outcome.name] = outcome
            print(
                f"{place} {outcome}{'' if fresh else ' (up to date)'}", file=sys.stderr, flush=True
            )
    if not failures:
        write_registry(variants, options.out)
    for failure in failures:
        print(f"\n{failure.name} did not compile:\n{failure.message}", file=sys.stderr)
    for variant in variants:
        report = reports.get(variant.name)
        if report and options.report:
            print(
                f"{report.name}: {report.registers} registers, {report.spill_bytes} bytes spilled"
                f"{' at ' + ', '.join(report.spills) if report.spills else ''}, "
                f"{report.shared_memory} bytes of shared memory, cubin {report.cubin_sha256}"
                f"{''.join(f'; {loss}' for loss in report.losses)}"
            )
        if report and options.digest:
            print(f"{report.ptx_sha256}  {report.name}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
