# SPDX-License-Identifier: Apache-2.0
"""Long inputs on a GPU: more than 2^31 elements an operand, a million keys, more than 65,535 heads.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 pytest -m gpu tests/test_gpu_long.py

Whole results are computed and windows of them judged, against float64, by the rule of all tests:
windows at both ends, and where an offset passes 2^31 elements or bytes. In a window of consecutive
rows a query is valid whose keys all lie in it, and a key whose queries are all valid. Tests that
have too little memory, as where several processes share a GPU, are skipped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu import COMPILER_OPTIONS, NAMES, record
from reference import Oracle, failures, measure, verdicts, xla_attention, xla_gradients

from fa4_jax import flash_attention, flash_attention_varlen

# Rows of a window.
WINDOW = 1024
# Keys before its own that a query sees, where it doesn't see all.
LEFT = 255
DTYPE = "bfloat16"


@functools.partial(jax.jit, static_argnums=(1, 2))
def random(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Uniform with variance 1: a hash of an element's number, for fewer than 2^32 of them.

    `jax.random` would hold 24 bytes of counters and bits an element.
    """
    x = jax.lax.iota(jnp.uint32, math.prod(shape)) ^ (jnp.uint32(seed + 1) * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    unit = (x ^ (x >> 16)).astype(jnp.float32) / 2.0**31 - 1
    return (unit * math.sqrt(3)).astype(dtype).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Long:
    """A self-attention of B x T x N x D, K key/value heads."""

    batch: int
    seqlen: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def elements(self) -> int:
        """Of q."""
        return self.batch * self.seqlen * self.heads * self.head_dim

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of q, k, v and dout."""
        heads = self.heads, self.kv_heads, self.kv_heads, self.heads
        return tuple((self.batch, self.seqlen, n, self.head_dim) for n in heads)

    def operands(self) -> tuple[jax.Array, ...]:
        """q, k, v, dout and dlse."""
        dlse = random(5, (self.batch, self.heads, self.seqlen), "float32")
        return (*(random(i, shape, DTYPE) for i, shape in enumerate(self.shapes())), dlse)

    def windows(self, size: int) -> list[int]:
        """First rows: the ends, and where a row's offset in bytes or elements passes 2^31 or
        2^32."""
        row = self.heads * self.head_dim
        at = [2**bits // row // item - size // 2 for bits in (31, 32) for item in (1, 2, 4)]
        last = self.seqlen - size
        return sorted({0, last, *(start for start in at if 0 < start < last)})


def needs(gibibytes: float) -> None:
    """Skip where this process may not have them; else leave NaN in what it will be given."""
    stats = jax.devices("cuda")[0].memory_stats() or {}
    if stats.get("bytes_limit", 0) < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes:.0f} GiB of memory")
    held = [jnp.full(2**28, jnp.nan, jnp.float32) for _ in range(int(0.6 * gibibytes))]
    jax.block_until_ready(held)


def forward_backward(attend: Callable) -> Callable:
    """(q, k, v, dout, dlse) to out, lse, dq, dk, dv."""

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def run(q, k, v, dout, dlse):
        results, vjp = jax.vjp(attend, q, k, v)
        return (*results, *vjp((dout, dlse)))

    return run


@functools.partial(jax.jit, static_argnames="size")
def cut(operands, results, start, size: int):
    """The rows of a window, of all batch entries."""
    return [
        # lse and dlse are [B, N, T].
        [jax.lax.dynamic_slice_in_dim(x, start, size, 2 if x.ndim == 3 else 1) for x in arrays]
        for arrays in (operands, results)
    ]


@functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
def judge_window(operands, ours, seen, valid_q, valid_k):
    """`measure` of out, lse, dq, dk, dv: [5, 7]. seen [T, S], valid_q [T] and valid_k [S] are
    bool; what isn't valid counts as 0."""
    q, k, v, dout, dlse = operands
    scale = 1 / math.sqrt(q.shape[-1])
    wide = [x.astype(jnp.float64) for x in operands]
    oracle = Oracle(seen, scale, xp=jnp)
    expected = (*oracle.forward(*wide[:3]), *oracle.backward(*wide)[:3])
    baseline = (
        *xla_attention(q, k, v, seen, scale),
        *xla_gradients((q, k, v), ours[:2], (dout, dlse), seen, scale),
    )
    queries, keys = valid_q[:, None, None], valid_k[:, None, None]
    valid = (queries, valid_q, queries, keys, keys)
    return jnp.stack(
        [
            measure(*(jnp.where(of, x.astype(jnp.float64), 0) for x in case), xp=jnp)
            for of, *case in zip(valid, ours, expected, baseline, strict=True)
        ]
    )


def judged(operands, ours, seen: np.ndarray, valid: tuple[np.ndarray, np.ndarray]) -> list:
    """The rule's verdicts on a window."""
    with jax.enable_x64(True):
        measures = np.asarray(judge_window(tuple(operands), tuple(ours), seen, *valid))
    named = zip(NAMES, ours, measures, strict=True)
    return [verdict for name, x, m in named for verdict in verdicts(name, x.dtype, m)]


def of_band(start: int, size: int, length: int) -> tuple[np.ndarray, tuple]:
    """What a window's queries see, each its own and `LEFT` keys before, and what is valid."""
    row = np.arange(size)
    seen = (row[:, None] >= row) & (row[:, None] <= row + LEFT)
    valid_q = (row >= LEFT) | (start == 0)
    valid_k = valid_q & ((row < size - LEFT) | (start + size == length))
    return seen, (valid_q, valid_k)


def of_sequences(start: int, size: int, cu_seqlens: np.ndarray) -> tuple[np.ndarray, tuple]:
    """What a window's queries see, their sequence's keys up to their own, and what is valid."""
    row = np.arange(start, start + size)
    sequence = np.searchsorted(cu_seqlens, row, "right") - 1
    seen = (sequence[:, None] == sequence) & (row[:, None] >= row)
    inside = (cu_seqlens[sequence] >= start) & (cu_seqlens[sequence + 1] <= start + size)
    return seen, (inside, inside)


def check_windows(
    problem: Long, attend: Callable, window: Callable, size: int = WINDOW
) -> Iterator[tuple[int, list]]:
    """First row and verdicts of every window."""
    operands = problem.operands()
    results = forward_backward(attend)(*operands)
    for start in problem.windows(size):
        of_window, ours = cut(operands, results, start, size)
        yield start, judged(of_window, ours, *window(start, size))


def check(worst: dict, label: str, windows: Iterator[tuple[int, list]]) -> None:
    """Every window, and a line for each verdict that isn't ok."""
    wrong = []
    for start, found in windows:
        record(worst, f"{label} from {start}", found)
        if text := failures(found):
            wrong.append(f"from row {start}:\n{text}")
    assert not wrong, "\n".join(wrong)


def band(implementation: str) -> Callable:
    """Causal attention to `LEFT` keys before a query's own."""
    options = {"causal": True, "window_size": (LEFT, None), "return_lse": True}
    return functools.partial(flash_attention, **options, implementation=implementation)


def packed(implementation: str, cu_seqlens: np.ndarray) -> Callable:
    """Causal attention in sequences, with a batch axis of 1."""
    options = {"causal": True, "return_lse": True, "implementation": implementation}

    def attend(q, k, v):
        out, lse = flash_attention_varlen(q[0], k[0], v[0], jnp.asarray(cu_seqlens), **options)
        return out[None], lse[None]

    return attend


def sequences(total: int, longest: int) -> np.ndarray:
    """cu_seqlens of random lengths up to `longest`, some of them 0."""
    rng = np.random.default_rng(total)
    ends = np.cumsum(rng.integers(0, longest + 1, 3 * total // longest))
    return np.r_[0, ends[ends < total], total].astype(np.int32)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("problem", "gibibytes"),
    [
        # 2^31 elements in one head, so that a row's offset in a head passes it, too.
        (Long(1, 2**25 + 2**21 + 3, 1, 1, 64), 60),
        (Long(1, 2**20 + 2**17 + 5, 16, 16, 128), 75),
    ],
    ids=["one_head", "heads"],
)
def test_more_than_two_to_the_31_elements(problem: Long, gibibytes: int, worst: dict) -> None:
    needs(gibibytes)
    assert problem.elements > 2**31
    window = functools.partial(of_band, length=problem.seqlen)
    check(worst, f"{problem}", check_windows(problem, band("fa4"), window))


@pytest.mark.gpu
def test_more_than_65535_heads_and_two_to_the_31_elements(worst: dict) -> None:
    """Whole batch entries, at both ends and where offsets pass 2^31 elements and bytes."""
    needs(75)
    problem = Long(8256, 256, 8, 8, 128)
    assert problem.batch * problem.heads > 65_535 and problem.elements > 2**31
    attend = functools.partial(flash_attention, return_lse=True, implementation="fa4")
    operands = problem.operands()
    results = forward_backward(attend)(*operands)
    everything = np.ones((256, 256), bool), (np.ones(256, bool), np.ones(256, bool))
    for entries in ([0, 1, 4095, 4096], [8190, 8191, 8192, 8255]):
        places = jnp.asarray(entries)
        some, ours = ([x[places] for x in arrays] for arrays in (operands, results))
        found = judged(some, ours, *everything)
        record(worst, f"{problem} {entries}", found)
        assert not failures(found), f"{entries}:\n{failures(found)}"


@pytest.mark.gpu
def test_a_million_keys_packed(worst: dict) -> None:
    needs(20)
    problem = Long(1, 2**20, 2, 1, 64)
    cu_seqlens = sequences(problem.seqlen, WINDOW // 2)
    windows = functools.partial(of_sequences, cu_seqlens=cu_seqlens)
    check(worst, "packed", check_windows(problem, packed("fa4", cu_seqlens), windows))


@pytest.mark.gpu
@pytest.mark.parametrize("interval", [False, True], ids=["band", "interval"])
def test_every_query_sees_up_to_a_million_keys(interval: bool, worst: dict) -> None:
    """out and lse of sampled rows, over all keys; the mask as a band and as `kv_end`."""
    needs(20)
    problem = Long(1, 2**20, 2, 1, 64)
    q, k, v, *_ = problem.operands()
    ends = {"kv_end": jnp.arange(1, problem.seqlen + 1)[None]} if interval else {"causal": True}
    options = {**ends, "return_lse": True, "implementation": "fa4"}
    out, lse = jax.jit(functools.partial(flash_attention, **options))(q, k, v)
    drawn = np.random.default_rng(0).integers(0, problem.seqlen, 15)
    rows = np.r_[0, 191, 192, 2**19 - 1, 2**19, problem.seqlen - np.array([193, 192, 1]), drawn]
    seen = np.arange(problem.seqlen) <= rows[:, None]

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def measures(q, k, v, out, lse, seen):
        scale = 1 / math.sqrt(problem.head_dim)
        wide = [x.astype(jnp.float64) for x in (q, k, v)]
        expected = Oracle(seen, scale, xp=jnp).forward(*wide)
        cases = zip((out, lse), expected, xla_attention(q, k, v, seen, scale), strict=True)
        return [measure(*(x.astype(jnp.float64) for x in case), xp=jnp) for case in cases]

    with jax.enable_x64(True):
        found_out, found_lse = measures(q[:, rows], k, v, out[:, rows], lse[..., rows], seen)
    found = [
        *verdicts("out", out.dtype, np.asarray(found_out)),
        *verdicts("lse", lse.dtype, np.asarray(found_lse)),
    ]
    record(worst, f"{problem}", found)
    assert not failures(found), failures(found)


@pytest.mark.parametrize("kind", ["band", "packed"])
def test_the_windows_themselves(kind: str) -> None:
    """On any machine, small: the reference passes, and a wrong row at the end doesn't."""
    problem, size = Long(1, 1500, 2, 1, 32), 640
    cu_seqlens = sequences(problem.seqlen, 200)
    attend, window = {
        "band": (band("reference"), functools.partial(of_band, length=problem.seqlen)),
        "packed": (
            packed("reference", cu_seqlens),
            functools.partial(of_sequences, cu_seqlens=cu_seqlens),
        ),
    }[kind]

    def broken(q, k, v):
        out, lse = attend(q, k, v)
        return out.at[:, -1].multiply(1.5), lse

    found = [text for _, v in check_windows(problem, attend, window, size) if (text := failures(v))]
    # The reference keeps fp32 where the baseline rounds, so nothing of it may fail.
    assert not found, found
    wrong = [bool(failures(v)) for _, v in check_windows(problem, broken, window, size)]
    assert wrong == [False, True]


def test_random_numbers() -> None:
    x, y = (np.asarray(random(seed, (3, 1 << 16), "float32"), np.float64) for seed in (0, 1))
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    others = (y, np.roll(x, 1, 1), np.roll(x, 1, 0))
    assert all(abs((x * other).mean()) < 0.01 for other in others)


def test_windows_are_where_offsets_wrap() -> None:
    problem = Long(1, 2**25 + 2**21 + 3, 1, 1, 64)
    starts = problem.windows(WINDOW)
    assert starts[0] == 0 and starts[-1] == problem.seqlen - WINDOW
    assert 2**25 - WINDOW // 2 in starts  # 2^31 elements
    assert 2**24 - WINDOW // 2 in starts  # 2^31 bytes of bfloat16, 2^32 of float32
