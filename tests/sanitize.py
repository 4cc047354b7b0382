# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's compute-sanitizer over every kernel: small calls and their gradients, in one process.

    python tests/sanitize.py run --out DIR [memcheck initcheck synccheck racecheck]
    python tests/sanitize.py report DIR [--cubins DIR]
    python tests/sanitize.py list

It needs fa4_jax, installed or in PYTHONPATH, and `run` a GPU. `run` starts the tools side by side,
each over a process that makes all calls of `cases`, and ends with what `report` prints again from
the logs; its exit status is 0 if every tool finished, found its planted defect, and found nothing
else in our kernels. `--cubins`, a folder of `kernels.build --keep`, adds the instructions at the
addresses of a finding; racecheck's allowed findings are told by them.

A call is the public one, with its gradient. Only our kernels run on the GPU: in this process the
primitives run eagerly on the CPU, and each launch is a program of its own, whose operands come from
the host and whose results go back. So each buffer is an allocation of its own, of its exact size
(XLA would pack workspaces into one); what a kernel reads is what the host wrote; XLA compiles no
kernel, which would take longer than everything else.

The last launch plants the defect that the tool is for (an element past the end of an array of
JAX's; memory that nothing wrote; a race in shared memory; a barrier that half a warp reaches), in a
kernel named as ours are, so that a tool that sees nothing isn't taken for one that finds nothing.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import itertools
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")
# Of our kernels' names, so that nothing of XLA's is looked at.
OURS = "fa4_"
PLANTED = "fa4_planted"

OPTIONS = {
    # XLA asks for things that not every driver has, and takes no for an answer.
    "memcheck": ["--report-api-errors", "no"],
    # The tool doesn't see what the TMA unit writes: a copy of out to the host would be a finding.
    "initcheck": ["--check-api-memory-access", "no"],
}
ENVIRONMENT = {
    # An allocation a buffer, of its size: "address" and "platform" give 2 MiB to each, in which
    # memcheck saw nothing of what is planted (jaxlib 0.11.2).
    "XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0",
    "JAX_PLATFORMS": "cuda,cpu",
    "PYTHONUNBUFFERED": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


# --- The calls.
# --------------


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: what a compiled kernel depends on, sizes, and arguments."""

    dtype: str
    head_dims: tuple[int, int]
    sizes: tuple[int, int, int, int, int]
    """B, T, S, N, K"""
    options: Mapping[str, Any]
    arrays: str = ""
    """Which of `ARRAYS`."""

    def __str__(self) -> str:
        options = "".join(f" {name}={value}" for name, value in self.options.items())
        sizes = "x".join(map(str, self.sizes))
        return f"{self.dtype} {self.head_dims} {sizes}{options} {self.arrays}".rstrip()


def _segments(rng: np.random.Generator, sizes: tuple) -> dict[str, np.ndarray]:
    """Of both sides alike, as far as they go."""
    batch, seqlen_q, seqlen_k = sizes[:3]
    ids = np.sort(rng.integers(0, 4, (batch, max(seqlen_q, seqlen_k))), 1).astype(np.int32)
    return {"q_segment_ids": ids[:, :seqlen_q], "kv_segment_ids": ids[:, :seqlen_k]}


def _lengths(rng: np.random.Generator, sizes: tuple) -> dict[str, np.ndarray]:
    """One of them 0."""
    batch, seqlen_q, seqlen_k = sizes[:3]
    return {
        "query_seq_lengths": rng.integers(1, seqlen_q + 1, batch),
        "key_value_seq_lengths": np.r_[0, rng.integers(1, seqlen_k + 1, batch - 1)],
    }


def _bounds(rng: np.random.Generator, sizes: tuple) -> dict[str, np.ndarray]:
    """Of any rows, some backwards."""
    batch, seqlen_q, seqlen_k = sizes[:3]
    start = rng.integers(0, seqlen_k, (batch, seqlen_q))
    return {"kv_start": start, "kv_end": start + rng.integers(-9, seqlen_k, start.shape)}


def _packed(rng: np.random.Generator, sizes: tuple) -> dict[str, np.ndarray]:
    """Sequences of all rows of all batch entries, some of them empty, and padding behind."""

    def cumulated(length: int) -> np.ndarray:
        inner = rng.integers(0, length, 6)
        return np.r_[0, np.sort(np.r_[inner, inner[0], length - 3])]

    totals = sizes[0] * sizes[1], sizes[0] * sizes[2]
    return dict(zip(("cu_seqlens_q", "cu_seqlens_k"), map(cumulated, totals), strict=True))


ARRAYS: dict[str, Callable[[np.random.Generator, tuple], dict[str, np.ndarray]]] = {
    "segments": _segments,
    "lengths": _lengths,
    "bounds": _bounds,
    "packed": _packed,
    "sinks": lambda rng, sizes: {"sinks": rng.standard_normal(sizes[3]).astype(np.float32)},
    "": lambda rng, sizes: {},
}

_CAUSAL = {"causal": True}
_BOTTOM_RIGHT = {"causal": True, "causal_alignment": "bottom_right"}
_BANDS = ({}, _CAUSAL, {"window_size": (70, 20)}, _BOTTOM_RIGHT)
# Odd, beyond one tile each, and few, so that JAX compiles little on the CPU.
_SIZES = ((2, 131, 197, 2, 1), (2, 197, 131, 2, 1))


def cases() -> list[Case]:
    """Every row of the table once, and what else makes kernels take another path."""
    from fa4_jax._variants import FEATURE_SETS, VARIANTS

    found = []
    bands, arrays = itertools.cycle(_BANDS), itertools.cycle(("segments", "lengths", "bounds"))
    arguments = {"softcap": 5.0, "deterministic": True}
    rows = (v for v in VARIANTS if len(FEATURE_SETS[v.kernel]) > 1)
    distinct = dict.fromkeys((v.dtype, (v.head_dim, v.head_dim_v), v.features) for v in rows)
    for i, (dtype, head_dims, features) in enumerate(distinct):
        asked = {name: value for name, value in arguments.items() if name in features}
        options = {**next(bands), **asked}
        given = next(arrays) if "interval" in features else ""
        found.append(Case(dtype.numpy_name, head_dims, _SIZES[i % 2], options, given))
    more = [
        # More tiles than an H200 has multiprocessors, so that a persistent kernel takes several.
        *(((d, d), (9, 65, 65, 16, 16), _CAUSAL, "") for d in (64, 128, 256)),
        ((128, 128), (9, 65, 65, 16, 16), {}, ""),
        ((64, 64), (9, 65, 65, 16, 8), _CAUSAL, "segments"),
        # Zero-padded to a row's.
        *((dims, _SIZES[0], _CAUSAL, "") for dims in ((80, 80), (40, 100), (33, 33))),
        *(((d, d), _SIZES[1], _CAUSAL, "packed") for d in (64, 192)),
        *(((d, d), _SIZES[0], _BOTTOM_RIGHT, "sinks") for d in (64, 256)),
        ((128, 128), (1, 1, 1, 1, 1), {}, ""),
        ((128, 128), (1, 1, 300, 4, 1), _BOTTOM_RIGHT, ""),
        ((64, 64), (1, 300, 1, 4, 4), {"window_size": (0, 0)}, ""),
    ]
    return found + [Case("bfloat16", *parts) for parts in more]


def make_call(case: Case) -> tuple[Callable, list[Any], list[Any]]:
    """A function of q, k and v to (out, lse), these, and cotangents."""
    import jax.numpy as jnp

    from fa4_jax import flash_attention, flash_attention_varlen

    rng = np.random.default_rng([*case.sizes, *case.head_dims])
    batch, seqlen_q, seqlen_k, num_q, num_kv = case.sizes
    head_dim, head_dim_v = case.head_dims
    shapes = (
        (batch, seqlen_q, num_q, head_dim),
        (batch, seqlen_k, num_kv, head_dim),
        (batch, seqlen_k, num_kv, head_dim_v),
        (batch, seqlen_q, num_q, head_dim_v),
    )
    *qkv, dout = (rng.standard_normal(shape) for shape in shapes)
    dlse = rng.standard_normal((batch, num_q, seqlen_q))
    given = ARRAYS[case.arrays](rng, case.sizes)
    attend: Callable = flash_attention
    if case.arrays == "packed":
        attend = flash_attention_varlen
        qkv, dout = [x.reshape(-1, *x.shape[2:]) for x in qkv], dout.reshape(-1, *dout.shape[2:])
        dlse = dlse.swapaxes(0, 1).reshape(num_q, -1)
    options = {**case.options, **given, "return_lse": True, "implementation": "fa4"}
    operands = [jnp.asarray(x, case.dtype) for x in qkv]
    cotangents = [jnp.asarray(dout, case.dtype), jnp.asarray(dlse, jnp.float32)]
    return functools.partial(attend, **options), operands, cotangents


# --- The process that a tool watches.
# ------------------------------------


def run_eagerly(launch: Callable) -> None:
    """From now on the primitives run op by op, and `launch(problem, kernel, spec, *operands,
    features)` is what launches a kernel."""
    from fa4_jax import _primitives

    for op, kernels in (
        (_primitives._FORWARD, _primitives._forward_kernels),
        (_primitives._BACKWARD, _primitives._backward_kernels),
    ):
        op.auto.def_impl(kernels)
    _primitives._Problem.launch = launch


def launch_here(device: Any) -> Callable:
    """Launches on `device`, from the host and back."""
    import jax
    import jax.numpy as jnp

    from fa4_jax import _primitives, _variants, register

    register()
    program = _primitives._Problem.launch

    def launch(problem, kernel, spec, *operands, features=()):
        step = functools.partial(program, problem, kernel, spec, features=features)
        donated = tuple(_variants.signature(kernel, features).aliases)
        on_device = [jax.device_put(np.asarray(x), device) for x in operands]
        results = jax.jit(step, donate_argnums=donated)(*on_device)
        return [jnp.asarray(np.asarray(x)) for x in results]

    return launch


def make_all_calls(launch: Callable, chosen: Sequence[Case]) -> int:
    """Prints a line a call; how many had a NaN."""
    import jax

    run_eagerly(launch)
    wrong = 0
    start = time.monotonic()
    for i, case in enumerate(chosen, start=1):
        call, operands, cotangents = make_call(case)
        results, vjp = jax.vjp(call, *operands)
        numbers = [np.asarray(x, np.float32) for x in (*results, *vjp(tuple(cotangents)))]
        has_nan = any(map(np.any, map(np.isnan, numbers)))
        wrong += has_nan
        seconds = time.monotonic() - start
        print(f"{i}/{len(chosen)} {seconds:.1f} s: {case}{' NaN' * has_nan}", flush=True)
    return wrong


DEFECTS = """
extern "C" __global__ void fa4_planted_memcheck(float* x, int size) {
  if (threadIdx.x == 0) x[0] = x[size];
}
extern "C" __global__ void fa4_planted_initcheck(float* x, int size) {
  if (threadIdx.x == 0) x[1] = x[0] + 1;
}
extern "C" __global__ void fa4_planted_racecheck(float* x, int size) {
  __shared__ volatile float shared[64];
  shared[threadIdx.x] = threadIdx.x;
  x[threadIdx.x] = shared[63 - threadIdx.x];
}
extern "C" __global__ void fa4_planted_synccheck(float* x, int size) {
  if (threadIdx.x < 16) __syncthreads();
  x[threadIdx.x] = 1;
}
"""


def plant(tool: str, device: Any) -> None:
    """The defect that `tool` is for. It may end the CUDA context."""
    import cupy  # pyright: ignore[reportMissingImports]
    import jax

    size = 250
    array = jax.device_put(np.zeros(size, np.float32), device)
    address = array.unsafe_buffer_pointer()
    if tool == "initcheck":
        address = cupy.cuda.runtime.malloc(4 * size)
    kernel = cupy.RawModule(code=DEFECTS).get_function(f"fa4_planted_{tool}")
    try:
        kernel((1,), (64,), (np.uint64(address), np.int32(size)))
        cupy.cuda.runtime.deviceSynchronize()
    except Exception as error:  # what a tool does to a process that it has caught
        print(f"planted: {type(error).__name__}", flush=True)


def child(tool: str) -> None:
    """All calls, then the planted defect."""
    import jax

    device = jax.devices("cuda")[0]
    jax.config.update("jax_default_device", jax.devices("cpu")[0])
    wrong = make_all_calls(launch_here(device), cases())
    print(f"calls done, {wrong} with NaN", flush=True)
    plant(tool, device)


# --- What a tool wrote.
# ----------------------


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a tool says of a kernel, wherever it says so more than once."""

    title: str
    kernel: str
    """A row's name; empty for what the host did."""
    places: tuple[str, ...]
    """Addresses in the kernel, `+0x1a0`."""


@dataclasses.dataclass(frozen=True)
class Allowed:
    """Findings that aren't defects, and the reason."""

    tool: str
    kernel: str
    instructions: str
    """A regular expression for the accesses' instructions, `first | second | ...`."""
    reason: str


ALLOWED = (
    Allowed(
        "racecheck",
        r"fa4_backward_sm90a_",
        r"^UBLKCP\S*( \| LDS\S*)+$",
        "one-dimensional bulk copies (lse_log2, dpsum, intervals) land before their mbarrier's "
        "phase ends, which the reader waits for. FlashAttention's AI/RACECHECK_TMA_HAZARD.md: "
        "racecheck doesn't connect a cp.async.bulk without a tensor map to its mbarrier",
    ),
)

_HEADING = re.compile(r"^========= (?! )(.*\S)")
_NOISE = re.compile(r"COMPUTE-SANITIZER|SUMMARY|Target application|No attachable process|Version")
_KERNEL = re.compile(rf"\b({OURS}\w+?)(?:_\d+)?(?:\(.*?\))?\s*[:+](0x[0-9a-f]+)")


def findings(log: str) -> collections.Counter[Finding]:
    """What a tool's log says, with how often."""
    entries: list[list[str]] = []
    for line in log.splitlines():
        heading = _HEADING.match(line)
        if heading and not _NOISE.search(line):
            entries.append([line])
        elif entries and line.startswith("=========  "):
            entries[-1].append(line)
    found: collections.Counter[Finding] = collections.Counter()
    for entry in entries:
        text = "\n".join(entry)
        kernels = _KERNEL.findall(text)
        heading = _HEADING.match(entry[0])
        assert heading
        # Without what differs from one report of a defect to the next.
        title = re.sub(r"0x[0-9a-f]+|\d+ hazards?", "...", heading[1])
        title = re.sub(r" at \S*fa4_.*", "", title)
        kernel = kernels[0][0] if kernels else ""
        places = tuple(dict.fromkeys(f"+{address}" for _, address in kernels))
        found[Finding(title, kernel, places)] += 1
    return found


@functools.cache
def instructions(cubin: pathlib.Path) -> dict[int, str]:
    """Of a cubin with one kernel, by address: opcodes with their modifiers."""
    from kernels import toolchain

    tool = toolchain.locate("nvidia-cuda-nvdisasm", "bin/nvdisasm")
    text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ )?([\w.]+)", text, re.M)
    return {int(address, 16): opcode for address, opcode in lines}


def explained(finding: Finding, cubins: pathlib.Path | None) -> str:
    """The instructions at a finding's addresses, `first | second | ...`."""
    cubin = cubins / f"{finding.kernel}.cubin" if cubins else None
    if cubin is None or not cubin.is_file():
        return ""
    found = instructions(cubin)
    return " | ".join(found.get(int(place[1:], 16), "?") for place in finding.places)


def report_tool(tool: str, folder: pathlib.Path, cubins: pathlib.Path | None) -> bool:
    """Print what `tool` found; whether it finished, found what was planted, and nothing else."""
    log, calls = (folder / f"{tool}.{suffix}" for suffix in ("log", "calls"))
    if not log.is_file() or not calls.is_file():
        print(f"{tool}: didn't run")
        return False
    made = calls.read_text(errors="replace")
    number = len(re.findall(r"^\d+/\d+ .*: ", made, re.M))
    finished = "calls done, 0 with NaN" in made
    seconds = re.findall(r"^\d+/\d+ ([\d.]+) s: ", made, re.M)
    found = findings(log.read_text(errors="replace"))
    planted = sum(n for finding, n in found.items() if finding.kernel.startswith(PLANTED))
    ours = defects = allowed = 0
    lines = []
    for finding, times in found.most_common():
        if finding.kernel.startswith(PLANTED):
            continue
        opcodes = explained(finding, cubins)
        excuse = next(
            (
                rule.reason
                for rule in ALLOWED
                if rule.tool == tool
                and re.match(rule.kernel, finding.kernel)
                and re.search(rule.instructions, opcodes)
            ),
            "",
        )
        ours += bool(finding.kernel)
        allowed += bool(excuse)
        defects += bool(finding.kernel) and not excuse
        where = f"{finding.kernel or 'the host'} {' '.join(finding.places)} {opcodes}".rstrip()
        lines.append(f"  {times} x {finding.title}: {where}{' (allowed)' * bool(excuse)}")
    state = "finished" if finished else "DIDN'T FINISH"
    caught = f"planted defect {'found' if planted else 'NOT FOUND'}"
    print(
        f"{tool}: {state}, {number} calls in {seconds[-1] if seconds else '?'} s, {caught}, "
        f"{defects} kinds of findings in our kernels, {allowed} allowed, "
        f"{len(lines) - ours} of the host's"
    )
    print("\n".join(lines[:40]), end="\n" if lines else "")
    if not finished:
        print("  " + "\n  ".join(made.splitlines()[-4:]))
    return finished and planted > 0 and not defects


def report(tools: Sequence[str], folder: pathlib.Path, cubins: pathlib.Path | None) -> bool:
    """Every tool's; whether all is well."""
    return all([report_tool(tool, folder, cubins) for tool in tools])


def run(tools: Sequence[str], folder: pathlib.Path, seconds: float) -> None:
    """All tools side by side, each stopped after `seconds`."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **ENVIRONMENT}
    running = {}
    for tool in tools:
        command = ["compute-sanitizer", "--tool", tool, "--kernel-regex", f"kns={OURS}"]
        command += ["--log-file", str(folder / f"{tool}.log"), "--print-limit", "100000"]
        command += ["--target-processes", "application-only"]
        command += OPTIONS.get(tool, [])
        command += [sys.executable, __file__, "child", tool]
        with (folder / f"{tool}.calls").open("w") as calls:
            running[tool] = subprocess.Popen(
                command, env=environment, stdout=calls, stderr=calls, start_new_session=True
            )
    deadline = time.monotonic() + seconds
    for tool, process in running.items():
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"{tool}: stopped after {seconds:.0f} s")
            os.killpg(process.pid, 9)
            process.wait()


def launched(chosen: Sequence[Case]) -> Iterator[str]:
    """The keys of the kernels that the calls launch, found without launching any."""
    import jax.numpy as jnp

    from fa4_jax import _dispatch, _variants

    keys: list[str] = []

    def launch(problem, kernel, spec, *operands, features=()):
        sizes, dtype = problem.sizes, problem.like.dtype
        head_dims = sizes["D"], sizes["V"]
        keys.append(_dispatch.kernel_name(kernel, dtype, head_dims, features))
        avals = map(problem.aval, _variants.signature(kernel, features).results)
        return [jnp.zeros(x.shape, x.dtype) for x in avals]

    make_all_calls(launch, chosen)
    yield from keys


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="needs a GPU")
    command.add_argument("tools", nargs="*", default=list(TOOLS), metavar="TOOL")
    command.add_argument("--out", type=pathlib.Path, required=True)
    command.add_argument("--seconds", type=float, default=150.0, help="default %(default)s")
    command.add_argument("--cubins", type=pathlib.Path)
    command = commands.add_parser("report", help="again, from the logs")
    command.add_argument("out", type=pathlib.Path)
    command.add_argument("--cubins", type=pathlib.Path)
    commands.add_parser("list", help="the calls")
    commands.add_parser("child").add_argument("tool", choices=TOOLS)
    options = parser.parse_args(arguments)
    if options.command == "child":
        child(options.tool)
        return 0
    if options.command == "list":
        print(*cases(), sep="\n")
        return 0
    if options.command == "report":
        tools = [tool for tool in TOOLS if (options.out / f"{tool}.calls").is_file()]
        return 0 if tools and report(tools, options.out, options.cubins) else 1
    if unknown := set(options.tools) - set(TOOLS):
        parser.error(f"no tool is called {', '.join(unknown)}")
    run(options.tools, options.out, options.seconds)
    return 0 if report(options.tools, options.out, options.cubins) else 1


if __name__ == "__main__":
    sys.exit(main())
