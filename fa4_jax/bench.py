# SPDX-License-Identifier: Apache-2.0
"""Benchmark attention: TFLOP/s of FA4, cuDNN, XLA and tokamax on this machine.

    python -m fa4_jax.bench
    python -m fa4_jax.bench --cases 'd128-s4096*' --impl fa4,cudnn --csv out.csv --plot out.png

Passes. Each (implementation, pass) is one compiled XLA program:

    fwd         out = attention(q, k, v)
    fwd_bwd     out and (dq, dk, dv) for a given dout
    bwd         no program: fwd_bwd - fwd, round by round
    bwd_direct  (dq, dk, dv) from the residuals of a forward that ran before

Method. A round enqueues a program n times without waiting, and waits once at the end; n makes a
round last --round-ms. JAX dispatches asynchronously, so the host's work for the next call hides
behind the device's work for this one, as long as a call takes longer than the host needs to enqueue
it. That cost is measured with a trivial program; results within twice of it are marked ~, because
they say more about the host than about the kernel. The rounds of all implementations are
interleaved, so that drifting clocks hit all alike. Inputs are random (zeros draw less power and run
faster), with as many sets in turn as it takes to exceed the L2 cache. Reported are the median of
the rounds and the distance between their quartiles.

A GPU at its power limit lowers its clock, by what ran in the last second. So that no implementation
inherits another's, the GPU rests for --rest-ms before each round, which then begins with
--settle-ms that don't count: a burst. The other extreme, what an implementation sustains for long,
is --rest-ms 0 --settle-ms 100.

Masks: `full`, `causal`, `window`, causal and of `WINDOW` keys, and `packed`, causal within each of
`PACKED` sequences of other lengths that share the tokens. The last two aren't among the defaults;
what they cost over their share of the work is the ratio of TFLOP/s to the causal case of as many
tokens.

FLOPs, as the FlashAttention papers count them: forward 4 B N T S H, backward 2.5 times that, half
when causal, and of a window or of packed sequences the same of what they keep. Where v has a head
dim V of its own: forward 2 (H + V), backward 6 H + 4 V, times B N T S.

--preset has the shapes, windows and softcaps of real models instead: llama3-8b, gemma2-9b, ...

Peers are imported where they are named: tokamax, and flash-attn-4, the official FlashAttention-4,
which runs under PyTorch in this process, on the same arrays.

Nothing is timed unchecked: results must be finite and agree with the first implementation's.

    python -m fa4_jax.bench --host

What a call costs the host, beside a trivial FFI call through the same dispatch: JAX's own
threefry2x32, which on a GPU is one FFI call with four operands and two results. Both are jitted;
the forward is called without jax.jit, too (eager). A round enqueues calls on tiny arrays and waits
when the clock has stopped, so that nothing but enqueueing is timed; a first call, of a shape not
seen before, is traced, lowered, compiled, and waited for.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import fnmatch
import functools
import importlib
import itertools
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import jax
import jax.extend.random
import jax.numpy as jnp
from jax import Array

from fa4_jax import _plots, doctor
from fa4_jax._presets import PRESETS
from fa4_jax._untyped import jax_, jit, tree

IMPLEMENTATIONS = ("fa4", "cudnn", "xla", "reference", "tokamax", "flash-attn-4")
# What --pass can name, and the programs it takes.
PASSES = {
    "fwd": {"fwd"},
    "bwd": {"fwd", "fwd_bwd"},
    "bwd_direct": {"bwd_direct"},
    "fwd_bwd": {"fwd_bwd"},
}
DTYPES = {"bfloat16": "", "float16": "-f16", "float32": "-f32"}
# More than the L2 cache of a GPU (H200: 50 MB, B200: 126 MB).
CACHE_BYTES = 256 * 2**20
MAX_INPUT_SETS = 8
MAX_CALLS_PER_ROUND = 2000
# Relative L2 distance of two implementations' results above which one of them must be wrong. For
# XLA and the reference, in bfloat16 at S = 2048, it is 2.5e-3 for out and 3.3e-3 for gradients.
MAX_DIFFERENCE = 3e-2

# What --host allows a forward beyond a trivial call: microseconds a call, seconds for a first one.
HOST_LIMITS = (10.0, 0.1)
# Fewer than a stream holds before it makes the host wait.
HOST_CALLS = 200

MASKS = ("full", "causal", "window", "packed")
# Keys that a query sees, its own among them.
WINDOW = 4096
# Lengths of packed sequences, for 16,384 tokens; the last one takes what is left of more or fewer.
PACKED = (7000, 33, 3000, 512, 2500, 129, 1700, 1000, 510)

Arrays = tuple[jax.Array, ...]
Attention = Callable[..., jax.Array]
"""Of q, k, v and, for packed sequences, cu_seqlens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One self-attention problem."""

    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int
    mask: str
    dtype: str = "bfloat16"
    value_dim: int | None = None
    """v's head dim; None is head_dim."""
    window: int | None = None
    """Keys that a query of mask "window" sees; None is `WINDOW`."""
    softcap: float | None = None
    model: str = ""
    """The preset that it is of."""

    @property
    def name(self) -> str:
        """For example `d128-s4096-b4-h16-causal`; `h16k4` has 4 key/value heads, `d192v128` a head
        dim of 128 for v."""
        dims = f"d{self.head_dim}" + (f"v{self.value_dim}" if self.value_dim else "")
        heads = f"h{self.heads}" + (f"k{self.kv_heads}" if self.kv_heads != self.heads else "")
        mask = self.mask + (f"{self.window}" if self.window else "")
        cap = f"-cap{self.softcap:g}" if self.softcap else ""
        shape = f"{dims}-s{self.seqlen}-b{self.batch}-{heads}-{mask}{cap}{DTYPES[self.dtype]}"
        return f"{self.model}-{shape}" if self.model else shape

    @property
    def dims(self) -> tuple[int, int]:
        """Head dims of q and v."""
        return self.head_dim, self.value_dim or self.head_dim

    @property
    def keys(self) -> int:
        """That a query of mask "window" sees."""
        return self.window or WINDOW

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of packed sequences."""
        tokens = self.batch * self.seqlen
        *first, _ = (length * tokens // sum(PACKED) for length in PACKED)
        return (*first, tokens - sum(first))

    @property
    def pairs(self) -> float:
        """Of queries and keys, in all batch entries, half of them under a diagonal."""
        if self.mask == "packed":
            return sum(length**2 for length in self.lengths) / 2
        hidden = max(0, self.seqlen - self.keys) if self.mask == "window" else 0
        seen = self.seqlen**2 - hidden**2
        return self.batch * seen / (1 if self.mask == "full" else 2)

    def flops(self, timed: str) -> float:
        """Floating-point operations of one call of a pass."""
        dim, value_dim = self.dims
        products = {"fwd": (1, 1), "bwd": (3, 2), "bwd_direct": (3, 2), "fwd_bwd": (4, 3)}[timed]
        return 2.0 * self.heads * self.pairs * (products[0] * dim + products[1] * value_dim)

    def bytes(self, timed: str) -> float:
        """Of operands and results of one call of a pass, each once."""
        dim, value_dim = self.dims
        queries, keys = self.heads * (dim + value_dim), self.kv_heads * (dim + value_dim)
        forward = (queries + keys) * jnp.dtype(self.dtype).itemsize + 4 * self.heads
        backward = forward + (queries + keys) * jnp.dtype(self.dtype).itemsize
        tokens = self.batch * self.seqlen
        return tokens * {"fwd": forward, "fwd_bwd": forward + backward}.get(timed, backward)

    def inputs(self, seed: int) -> Arrays:
        """Random normal (q, k, v, dout); of packed sequences without a batch axis, and
        cu_seqlens."""
        dim, value_dim = self.dims
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        dims = (dim, dim, value_dim, value_dim)
        keys = jax.random.split(jax.random.key(seed), len(heads))
        packed = self.mask == "packed"
        rows = (self.batch * self.seqlen,) if packed else (self.batch, self.seqlen)
        arrays = tuple(
            jax.random.normal(key, (*rows, n, dim), self.dtype)
            for key, n, dim in zip(keys, heads, dims, strict=True)
        )
        if not packed:
            return arrays
        return *arrays, jnp.array([0, *itertools.accumulate(self.lengths)], jnp.int32)


@dataclasses.dataclass
class Measurement:
    """One line of the table."""

    case: Case
    implementation: str
    timed: str
    reason: str = ""
    """Why there is no time; empty if there is one."""
    difference: float = math.nan
    """Largest relative L2 distance of a result to the first implementation's."""
    calls_per_round: int = 0
    samples: list[float] = dataclasses.field(default_factory=list[float])
    """Milliseconds per call, one for each round."""

    @property
    def milliseconds(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Distance between the quartiles of the rounds, in milliseconds."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low

    @property
    def tflops(self) -> float:
        """10^12 floating-point operations per second, at the median time."""
        return self.case.flops(self.timed) / self.milliseconds / 1e9

    def row(self, dispatch_ms: float) -> dict[str, Any]:
        """What CSV and JSON keep: None where there is no time."""
        timed = not self.reason
        return {
            "name": self.case.name,
            **dataclasses.asdict(self.case),
            "pass": self.timed,
            "implementation": self.implementation,
            "milliseconds": self.milliseconds if timed else None,
            "spread_milliseconds": self.spread if timed else None,
            "tflops": self.tflops if timed else None,
            "flops": self.case.flops(self.timed),
            "bytes": self.case.bytes(self.timed),
            "difference": None if math.isnan(self.difference) else self.difference,
            "host_bound": self.milliseconds < 2 * dispatch_ms if timed else None,
            "rounds": len(self.samples),
            "calls_per_round": self.calls_per_round,
            "reason": self.reason,
        }


class Program:
    """A compiled function and the argument sets it is timed on."""

    def __init__(self, function: Callable[..., Any], argument_sets: Sequence[tuple[Any, ...]]):
        self.function: Callable[..., Any] = jax_.jit(function)
        self.argument_sets: Sequence[tuple[Any, ...]] = argument_sets
        # The CPU backend may run several enqueued calls at once, which isn't what we time.
        self.wait_for_each = jax.default_backend() == "cpu"

    def __call__(self) -> Any:
        """Results for the first argument set."""
        return jax_.block_until_ready(self.function(*self.argument_sets[0]))

    def milliseconds(self, calls: int) -> float:
        """Time per call of `calls` calls enqueued back to back."""
        arguments = itertools.islice(itertools.cycle(self.argument_sets), calls)
        result = None
        start = time.perf_counter()
        for argument_set in arguments:
            result = self.function(*argument_set)
            if self.wait_for_each:
                jax_.block_until_ready(result)
        jax_.block_until_ready(result)
        return (time.perf_counter() - start) * 1e3 / calls


class TorchProgram(Program):
    """A pass of flash-attn-4, by PyTorch's autograd."""

    def __init__(self, timed: str, case: Case, input_sets: list[Arrays]):
        if case.mask == "packed":
            raise NotImplementedError("packed sequences aren't timed with flash-attn-4")
        torch: Any = importlib.import_module("torch")
        flash_attn: Any = importlib.import_module("flash_attn.cute")
        limits: dict[str, Any] = (
            {"window_size": (case.keys - 1, 0)} if case.mask == "window" else {}
        )
        if case.softcap:
            limits["softcap"] = case.softcap

        def attend(q: Any, k: Any, v: Any) -> Any:
            out: Any = flash_attn.flash_attn_func(q, k, v, causal=case.mask != "full", **limits)
            return cast(Any, out)[0] if isinstance(out, tuple) else out

        def forward(q: Any, k: Any, v: Any, dout: Any) -> Any:
            del dout
            return attend(q, k, v)

        def gradients(out: Any, qkv: tuple[Any, ...], dout: Any) -> Any:
            return torch.autograd.grad(out, qkv, dout, retain_graph=timed == "bwd_direct")

        def forward_backward(q: Any, k: Any, v: Any, dout: Any) -> tuple[Any, Any]:
            out = attend(q, k, v)
            return out, gradients(out, (q, k, v), dout)

        functions: dict[str, Callable[..., Any]] = {
            "fwd": forward,
            "fwd_bwd": forward_backward,
            "bwd_direct": gradients,
        }
        self.function = functions[timed]
        self.synchronize = torch.cuda.synchronize
        jax_.block_until_ready(input_sets)
        argument_sets: list[tuple[Any, ...]] = []
        for arrays in input_sets:
            q, k, v, dout = (torch.from_dlpack(x) for x in arrays)
            qkv = tuple(x.requires_grad_(timed != "fwd") for x in (q, k, v))
            direct = timed == "bwd_direct"
            argument_sets.append((attend(*qkv), qkv, dout) if direct else (*qkv, dout))
        self.argument_sets = argument_sets

    def __call__(self) -> Any:
        """Results for the first argument set, as JAX's arrays."""
        results = self.function(*self.argument_sets[0])
        self.synchronize()

        def as_jax(x: Any) -> jax.Array:
            return jnp.from_dlpack(x.detach())

        return tree.map(as_jax, results)

    def milliseconds(self, calls: int) -> float:
        start = time.perf_counter()
        for argument_set in itertools.islice(itertools.cycle(self.argument_sets), calls):
            self.function(*argument_set)
        self.synchronize()
        return (time.perf_counter() - start) * 1e3 / calls


def attention(implementation: str, case: Case) -> Attention:
    """The `Attention` of an implementation."""
    causal, packed = case.mask != "full", case.mask == "packed"
    window = (case.keys - 1, 0) if case.mask == "window" else None
    limits: dict[str, Any] = {}
    if implementation in ("fa4", "reference"):
        from fa4_jax import flash_attention, flash_attention_varlen

        attend: Any = flash_attention_varlen if packed else flash_attention
        limits |= {"window_size": window} if window else {}
        limits |= {"softcap": case.softcap} if case.softcap else {}
        return functools.partial(attend, causal=causal, implementation=implementation, **limits)
    if packed:
        raise NotImplementedError(f"{implementation} has no packed sequences")
    limits |= {"local_window_size": window} if window else {}
    if implementation == "tokamax":  # its own choice of tiles; on Hopper, Pallas for Mosaic GPU
        attend = importlib.import_module("tokamax").dot_product_attention
        implementation = "mosaic"
        limits |= {"logits_soft_cap": case.softcap} if case.softcap else {}
    elif case.softcap:
        raise NotImplementedError(f"{implementation} has no softcap")
    else:
        attend = jax.nn.dot_product_attention
    return functools.partial(attend, is_causal=causal, implementation=implementation, **limits)


def build(timed: str, implementation: str, case: Case, input_sets: list[Arrays]) -> Program:
    """The program of one pass (not of `bwd`, which is a difference)."""
    if implementation == "flash-attn-4":
        return TorchProgram(timed, case, input_sets)
    attend = attention(implementation, case)

    def forward(q: Array, k: Array, v: Array, dout: Array, *limits: Array) -> Array:
        del dout
        return attend(q, k, v, *limits)

    def linearize(q: Array, k: Array, v: Array, *limits: Array) -> tuple[Array, Any]:
        def of_limits(q: Array, k: Array, v: Array) -> Array:
            return attend(q, k, v, *limits)

        return jax_.vjp(of_limits, q, k, v)

    def residuals(q: Array, k: Array, v: Array, *limits: Array) -> Any:
        return linearize(q, k, v, *limits)[1]

    def forward_backward(
        q: Array, k: Array, v: Array, dout: Array, *limits: Array
    ) -> tuple[Array, Any]:
        out, vjp = linearize(q, k, v, *limits)
        return out, vjp(dout)

    def backward(vjp: Any, dout: Array) -> Any:
        return vjp(dout)

    if timed == "fwd":
        return Program(forward, input_sets)
    if timed == "fwd_bwd":
        return Program(forward_backward, input_sets)
    # A vjp function is a pytree of residuals, so one program can return it and another take it.
    jitted = jit()(residuals)
    argument_sets = [(jitted(q, k, v, *limits), dout) for q, k, v, dout, *limits in input_sets]
    return Program(backward, argument_sets)


def relative_difference(results: Any, expected: Any) -> float:
    """Largest relative L2 distance between the arrays of two results; NaN if one has a NaN."""

    norm = jax_.numpy.linalg.norm

    def distance(a: jax.Array, b: jax.Array) -> float:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return float(norm((a - b).ravel()) / norm(b.ravel()))

    distances = tree.leaves(tree.map(distance, results, expected))
    return math.nan if any(map(math.isnan, distances)) else max(distances)


def subtract(both: Measurement, fwd: Measurement, bwd: Measurement) -> None:
    """Fill bwd with both - fwd, round by round: a clock that drifts hits the two alike."""
    bwd.difference = both.difference
    bwd.calls_per_round = both.calls_per_round
    bwd.samples = [b - a for a, b in zip(fwd.samples, both.samples, strict=False)]
    bwd.reason = fwd.reason or both.reason
    if not bwd.reason and bwd.milliseconds <= 0:
        bwd.reason = "too noisy: fwd_bwd wasn't slower than fwd"


class Harness:
    """Options of a run, and its clock."""

    def __init__(self, options: argparse.Namespace, bar: Any = None):
        self.options = options
        self.bar = bar
        self.deadline = time.monotonic() + options.max_seconds

        # JAX hands an argument that is returned as it is back without running anything.
        def add(q: Array, k: Array, v: Array, dout: Array) -> Array:
            del k, v, dout
            return q + 1

        tiny = Program(add, [(jnp.zeros(1),) * 4])
        tiny()
        self.dispatch_ms = min(tiny.milliseconds(500) for _ in range(3))

    def say(self, text: str) -> None:
        """What is being done, beside the bar or on a line of its own."""
        if self.bar is None:
            progress(text)
        else:
            self.bar.set_postfix_str(text)

    @property
    def out_of_time(self) -> bool:
        """Whether --max-seconds are spent."""
        return time.monotonic() > self.deadline

    def measure(self, case: Case) -> list[Measurement]:
        """Compile, check and time one case; in the order of the table."""
        measurements = {
            (implementation, timed): Measurement(case, implementation, timed)
            for timed in PASSES
            for implementation in self.options.impl
        }
        needed = set[str]().union(*(PASSES[timed] for timed in self.options.passes))
        running = self.prepare([m for m in measurements.values() if m.timed in needed])
        self.time(case, running)
        if "bwd" in self.options.passes:
            for i in self.options.impl:
                fwd, bwd, both = (measurements[i, timed] for timed in ("fwd", "bwd", "fwd_bwd"))
                subtract(both, fwd, bwd)
        return [m for m in measurements.values() if m.timed in self.options.passes]

    def prepare(self, measurements: list[Measurement]) -> list[tuple[Measurement, Program]]:
        """Compile, check and warm up; those that can't be timed get their reason."""
        case = measurements[0].case
        set_bytes = sum(
            x.size * x.dtype.itemsize for x in jax_.eval_shape(functools.partial(case.inputs, 0))
        )
        sets = min(MAX_INPUT_SETS, math.ceil(CACHE_BYTES / set_bytes))
        expected: dict[str, Any] = {}
        running: list[tuple[Measurement, Program]] = []
        input_sets: list[Arrays] = []
        for measurement in measurements:
            implementation, timed = measurement.implementation, measurement.timed
            measurement.reason = self.skip_reason(case, implementation)
            if measurement.reason:
                continue
            self.say(f"{case.name}: preparing {implementation} {timed}")
            try:
                input_sets = input_sets or [case.inputs(seed) for seed in range(sets)]
                program = build(timed, implementation, case, input_sets)
                results = program()
                if timed == "fwd_bwd":
                    results = results[1]
                kind = "out" if timed == "fwd" else "gradients"
                measurement.difference = relative_difference(results, expected.get(kind, results))
                if not measurement.difference <= MAX_DIFFERENCE:
                    measurement.reason = f"wrong result: off by {measurement.difference:.2g}"
                    continue
                expected.setdefault(kind, results)
                del results
                program.milliseconds(2)
                calls = math.ceil(self.options.round_ms / program.milliseconds(3))
                measurement.calls_per_round = min(calls, MAX_CALLS_PER_ROUND)
                running.append((measurement, program))
            except Exception as error:
                measurement.reason = one_line(error)
        return running

    def time(self, case: Case, running: list[tuple[Measurement, Program]]) -> None:
        """Interleaved rounds. Stops early, after two, when the time is spent."""
        for i in range(self.options.rounds):
            if i >= 2 and self.out_of_time:
                return
            self.say(f"{case.name}: round {i + 1} of {self.options.rounds}")
            for measurement, program in running:
                if measurement.reason:
                    continue
                calls = measurement.calls_per_round
                settling = math.ceil(calls * self.options.settle_ms / self.options.round_ms)
                try:
                    time.sleep(self.options.rest_ms / 1e3)
                    if settling:
                        program.milliseconds(settling)
                    measurement.samples.append(program.milliseconds(calls))
                except Exception as error:
                    measurement.reason = one_line(error)

    def skip_reason(self, case: Case, implementation: str) -> str:
        """Why not even to try, or an empty string."""
        if self.out_of_time:
            return f"skipped: --max-seconds {self.options.max_seconds:g} are spent"
        gib = 4 * case.batch * case.heads * case.seqlen**2 / 2**30
        if implementation == "xla" and gib > self.options.xla_max_gib:
            limit = f"--xla-max-gib {self.options.xla_max_gib:g}"
            return f"skipped: its T x S logits take {gib:.0f} GiB ({limit})"
        return ""


def host_cost(attend: Attention, rounds: int) -> dict[str, dict[str, float]]:
    """Host microseconds of a call, and seconds of a shape's first, of a trivial FFI op and of a
    forward, jitted and eager: medians of interleaved rounds."""

    def queries(size: int) -> Arrays:
        return tuple(jnp.ones((1, size, 1, 128), jnp.bfloat16) for _ in range(3))

    def words(size: int) -> Arrays:
        return tuple(jnp.ones(size, jnp.uint32) for _ in range(4))

    programs: dict[str, tuple[Any, Callable[[int], Arrays]]] = {
        "trivial": (jax.jit(jax.extend.random.threefry2x32_p.bind), words),
        "forward": (jax.jit(attend), queries),
        "eager": (attend, queries),
    }
    calls: dict[str, list[float]] = {name: [] for name in programs}
    firsts: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(-1, rounds):
        for name, (function, make) in programs.items():
            arguments = jax_.block_until_ready(make(64 + i))
            start = time.perf_counter()
            jax_.block_until_ready(function(*arguments))
            first = time.perf_counter() - start
            results = [function(*arguments) for _ in range(HOST_CALLS)]
            jax_.block_until_ready(results)
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                function(*arguments)
            microseconds = (time.perf_counter() - start) * 1e6 / HOST_CALLS
            jax_.block_until_ready(function(*arguments))
            if i >= 0:  # the round before warms up: it loads a library and a kernel
                firsts[name].append(first)
                calls[name].append(microseconds)
    return {
        name: {
            "microseconds": statistics.median(calls[name]),
            "first_seconds": statistics.median(firsts[name]),
        }
        for name in programs
    }


def host_report(costs: dict[str, dict[str, float]]) -> tuple[str, bool]:
    """What `host_cost` found, as text, and whether it is within `HOST_LIMITS`."""
    trivial, forward = costs["trivial"], costs["forward"]
    more = [forward[key] - trivial[key] for key in ("microseconds", "first_seconds")]
    lines = [
        f"{name}: {cost['microseconds']:.1f} us a call, {cost['first_seconds']:.3f} s the first "
        "call of a shape"
        for name, cost in costs.items()
    ]
    lines.append(
        f"a forward costs {more[0]:.1f} us more (limit {HOST_LIMITS[0]:g}), "
        f"its first call {more[1]:.3f} s more (limit {HOST_LIMITS[1]:g})"
    )
    return "\n".join(lines), all(a <= b for a, b in zip(more, HOST_LIMITS, strict=True))


def one_line(error: Exception) -> str:
    """An exception as a short reason."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}"
    return text if len(text) <= 120 else f"{text[:117]}..."


def progress(text: str) -> None:
    """One line on stderr; on a terminal it replaces the last one."""
    start, end = ("\r\x1b[2K", "") if sys.stderr.isatty() else ("", "\n")
    print(start + text, end=end, file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Aligned text; `vs cudnn` is the ratio of TFLOP/s where cuDNN ran the same case and pass."""
    cudnn = {
        (row["name"], row["pass"]): row["tflops"]
        for row in rows
        if row["implementation"] == "cudnn" and row["tflops"]
    }
    lines = [["case", "pass", "impl", "ms", "spread", "TFLOP/s", "vs cudnn" if cudnn else ""]]
    for row in rows:
        line = [row["name"], row["pass"], row["implementation"]]
        if row["reason"]:
            lines.append([*line, row["reason"]])
            continue
        group = (row["name"], row["pass"])
        lines.append(
            [
                *line,
                f"{'~' if row['host_bound'] else ''}{row['milliseconds']:.4f}",
                f"{row['spread_milliseconds'] / row['milliseconds']:.1%}",
                f"{row['tflops']:.1f}" if row["tflops"] >= 10 else f"{row['tflops']:.4f}",
                f"{row['tflops'] / cudnn[group]:.2f}" if group in cudnn else "",
            ]
        )
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(line[i]) for line in (lines if i < 3 else full)) for i in range(7)]
    text: list[str] = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line[:3], widths, strict=False)]
        if line in full:
            cells += [cell.rjust(width) for cell, width in zip(line[3:], widths[3:], strict=True)]
        else:
            cells.append(line[3])
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def progress_bar(total: int) -> Any:
    """tqdm's bar of cases, on a terminal where it is installed; else None."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, unit="case")


def commit() -> str | None:
    """The commit of the checkout this file belongs to, marked if files differ from it."""
    file = pathlib.Path(__file__)
    # An installed copy may lie in somebody else's repository, which doesn't track it.
    tracked = ["ls-files", "--error-unmatch", file.name]
    describe = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        for command in (tracked, describe):
            git = ["git", "-C", str(file.parent), *command]
            result = subprocess.run(git, capture_output=True, text=True, check=True)
        return result.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def comma_list(
    kind: Callable[[str], Any], choices: Iterable[str] = ()
) -> Callable[[str], list[Any]]:
    """An argparse type: `a,b` of `kind`, each one of `choices` if there are any."""
    choices = tuple(choices)

    def parse(text: str) -> list[Any]:
        values = [kind(part.strip()) for part in text.split(",") if part.strip()]
        wrong = [value for value in values if choices and value not in choices]
        if wrong or not values:
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(choices)}")
        return list(dict.fromkeys(values))

    return parse


def positive(text: str) -> int:
    """An argparse type: an int > 0."""
    if int(text) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m fa4_jax.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    gpu = jax.default_backend() == "gpu"
    implementations = list(IMPLEMENTATIONS[:3] if gpu else ("xla", "reference"))
    add("--impl", type=comma_list(str, IMPLEMENTATIONS), default=implementations)
    add("--pass", dest="passes", type=comma_list(str, PASSES), default=list(PASSES))
    add("--head-dim", type=comma_list(positive), default=[64, 128, 256])
    add("--seqlen", type=comma_list(positive), default=[1024, 4096, 16384])
    add("--mask", type=comma_list(str, MASKS), default=["full", "causal"])
    add("--dtype", type=comma_list(str, DTYPES), default=["bfloat16"])
    add("--heads", type=positive, help="default: 2048 / head_dim")
    add("--kv-heads", type=positive, help="default: as many as --heads")
    add("--batch", type=positive, help="default: --tokens / seqlen")
    add("--tokens", type=positive, default=16384, help="batch * seqlen; default %(default)s")
    add("--cases", type=comma_list(str), help="patterns of case names, such as 'd128-*-causal'")
    add("--preset", type=comma_list(str, PRESETS), default=[], help=f"of {', '.join(PRESETS)}")
    add("--list", action="store_true", help="print the names of the cases and exit")
    add("--host", action="store_true", help="only what a call of the first --impl costs the host")
    add("--rounds", type=positive, default=9, help="default %(default)s")
    add("--round-ms", type=float, default=50.0, help="at least; default %(default)s")
    add("--rest-ms", type=float, default=200.0, help="before each; default %(default)s")
    add("--settle-ms", type=float, default=5.0, help="at least, not timed; default %(default)s")
    add("--max-seconds", type=float, default=math.inf, help="start nothing new after this long")
    add("--xla-max-gib", type=float, default=12.0, help="skip xla above this; default %(default)s")
    add("--csv", type=pathlib.Path, metavar="FILE")
    add("--json", type=pathlib.Path, metavar="FILE")
    add("--plot", type=pathlib.Path, metavar="FILE.png", help="bars of TFLOP/s")
    add("--roofline", type=pathlib.Path, metavar="FILE.png", help="TFLOP/s over FLOP per byte")
    return result


def cases(options: argparse.Namespace) -> list[Case]:
    """Those of --preset, or the product of the other options, filtered by --cases."""

    def chosen(case: Case) -> bool:
        return not options.cases or any(fnmatch.fnmatch(case.name, p) for p in options.cases)

    presets = [Case(**sizes, model=model) for model in options.preset for sizes in PRESETS[model]]
    if presets:
        return list(filter(chosen, presets))
    found: list[Case] = []
    for head_dim, seqlen, mask, dtype in itertools.product(
        options.head_dim, options.seqlen, options.mask, options.dtype
    ):
        heads = options.heads or max(1, 2048 // head_dim)
        case = Case(
            batch=options.batch or max(1, options.tokens // seqlen),
            seqlen=seqlen,
            heads=heads,
            kv_heads=options.kv_heads or heads,
            head_dim=head_dim,
            mask=mask,
            dtype=dtype,
        )
        found.append(case)
    return list(filter(chosen, found))


def save(
    options: argparse.Namespace,
    environment: dict[str, Any],
    dispatch_ms: float,
    rows: list[dict[str, Any]],
) -> None:
    """What has been measured so far, to --csv and --json: a run that is cut short loses nothing."""
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if options.json:
        method = {
            "round_ms": options.round_ms,
            "rest_ms": options.rest_ms,
            "settle_ms": options.settle_ms,
            "rounds": options.rounds,
            "dispatch_ms": dispatch_ms,
            "max_difference": MAX_DIFFERENCE,
        }
        report = {"environment": environment, "method": method, "results": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: something was timed and nothing was wrong; 1: otherwise."""
    options = parser().parse_args(arguments)
    chosen = cases(options)
    if options.list or not chosen:
        print("\n".join(case.name for case in chosen) or "bench: no case has such a name (--list)")
        return 0 if chosen else 1
    environment = {**doctor.versions(), **doctor.devices(), "commit": commit()}
    if options.host:
        case = Case(batch=1, seqlen=64, heads=1, kv_heads=1, head_dim=128, mask="causal")
        costs = host_cost(attention(options.impl[0], case), options.rounds)
        text, good = host_report(costs)
        print(", ".join(f"{key} {value}" for key, value in environment.items()), text, sep="\n")
        if options.json:
            report = {"environment": environment, "host": costs}
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        return 0 if good else 1
    bar = progress_bar(len(chosen))
    harness = Harness(options, bar)
    rows: list[dict[str, Any]] = []
    for case in chosen:
        rows += [m.row(harness.dispatch_ms) for m in harness.measure(case)]
        save(options, environment, harness.dispatch_ms, rows)
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()
    progress("")
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    print(f"a trivial program takes {harness.dispatch_ms * 1e3:.0f} us to enqueue\n")
    print(table(rows))
    title = f"{environment['device']}, jax {environment['jax']}"
    for path, draw in ((options.plot, _plots.bars), (options.roofline, _plots.roofline)):
        if path:
            draw(rows, title, path)
    wrong = any(row["reason"].startswith("wrong result") for row in rows)
    return 0 if not wrong and any(row["tflops"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
