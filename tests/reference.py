# SPDX-License-Identifier: Apache-2.0
"""Attention as the definition says it, what XLA makes of it in 16 bits, inputs, and the error rule.

Nothing here imports the package: a test that compares our code with our code proves nothing.
`forward` and `backward` take NumPy or `jax.numpy` as `xp`, so that the same lines are the oracle on
a CPU (NumPy, float64) and on a GPU (jax.numpy under `enable_x64`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FAMILIES = (
    "normal",
    "outlier_channels",
    "peaked_rows",
    "constant_rows",
    "rising_row_maximum",
    "slowly_rising_maximum",
    "heavy_tailed",
    "denormals",
)


def visible(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    causal_alignment: str = "top_left",
    window_size: tuple[int | None, int | None] = (None, None),
    **arrays: Any,
) -> np.ndarray:
    """bool [T, S]: may query i see key j. Written from the definition, one condition at a time.

    With arrays (`kv_start`, `kv_end`, segment ids, lengths) it is [B, 1, 1, T, S].
    """
    given = {name: np.asarray(x) for name, x in arrays.items() if x is not None}
    i = np.arange(seqlen_q)[:, None]
    j = np.arange(seqlen_k)[None, :]
    batched = {name: x[:, None, None] if x.ndim == 1 else x for name, x in given.items()}
    len_q = np.clip(batched.pop("query_seq_lengths", seqlen_q), 0, seqlen_q)
    len_k = np.clip(batched.pop("key_value_seq_lengths", seqlen_k), 0, seqlen_k)
    seen = (i < len_q) & (j < len_k)
    # The key that query i is aligned with.
    aligned = i + (len_k - len_q) if causal_alignment == "bottom_right" else i
    if causal:
        seen = seen & ~(j > aligned)
    left, right = window_size
    if left is not None:
        seen = seen & ~(j < aligned - left)
    if right is not None:
        seen = seen & ~(j > aligned + right)
    if "kv_start" in batched:
        seen = seen & ~(j < batched.pop("kv_start")[:, :, None])
    if "kv_end" in batched:
        seen = seen & (j < batched.pop("kv_end")[:, :, None])
    if "q_segment_ids" in batched:
        q_ids, kv_ids = batched.pop("q_segment_ids"), batched.pop("kv_segment_ids")
        seen = seen & (q_ids[:, :, None] == kv_ids[:, None, :])
    assert not batched, f"unknown arrays {list(batched)}"
    return seen[:, None, None] if given else seen


def visible_packed(
    cu_seqlens_q: Any, cu_seqlens_k: Any, seqlen_q: int, seqlen_k: int, **band: Any
) -> np.ndarray:
    """bool [T, S] of packed sequences: each one's `visible`, where it lies."""
    seen = np.zeros((seqlen_q, seqlen_k), bool)
    for m in range(len(cu_seqlens_q) - 1):
        rows = slice(cu_seqlens_q[m], cu_seqlens_q[m + 1])
        columns = slice(cu_seqlens_k[m], cu_seqlens_k[m + 1])
        seen[rows, columns] = visible(*seen[rows, columns].shape, **band)
    return seen


def _probabilities(
    xp: Any, q: Any, k: Any, seen: Any, scale: float, bias: Any, softcap: float | None, sinks: Any
):
    """(p, lse, dcap, sinks' p) with grouped heads: p [B, K, G, T, S], lse [B, K, G, T]."""
    x = xp.einsum("btkgd,bskd->bkgts", q, k) * scale
    if bias is not None:
        x = x + bias
    dcap = xp.ones_like(x)
    if softcap is not None:
        capped = xp.tanh(x / softcap)
        x, dcap = softcap * capped, 1 - capped**2
    if sinks is not None:
        # What a sink is: one more key, whose value is 0.
        sink = sinks.reshape(*sinks.shape[:-1], *x.shape[1:3], 1, 1)
        sink = xp.broadcast_to(sink, (*x.shape[:-1], 1))
        seen = xp.concatenate([xp.broadcast_to(seen, x.shape), sink > -xp.inf], -1)
        x = xp.concatenate([x, sink], -1)
    any_seen = seen.any(-1)
    highest = xp.where(any_seen, xp.where(seen, x, -xp.inf).max(-1), 0)
    weights = xp.where(seen, xp.exp(xp.where(seen, x - highest[..., None], 0)), 0)
    total = weights.sum(-1)
    lse = xp.where(any_seen, highest + xp.log(xp.where(any_seen, total, 1)), -xp.inf)
    p = weights / xp.where(any_seen, total, 1)[..., None]
    return (p, lse, dcap, None) if sinks is None else (p[..., :-1], lse, dcap, p[..., -1])


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Attention and its analytic gradients in the dtype of its operands: give it float64.

    `seen` is bool and broadcasts to [B, K, G, T, S]; so does `bias`. Heads are grouped by reshaping
    q, so that query head n uses key/value head n // (N // K).
    """

    seen: Any
    scale: float
    bias: Any = None
    softcap: float | None = None
    sinks: Any = None
    """[N], or [B, N]"""
    xp: Any = np

    def forward(self, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        """out [B, T, N, V] and lse [B, N, T]."""
        p, lse, *_ = self._p(q, k)
        out = self.xp.einsum("bkgts,bskv->btkgv", p, v)
        return _ungroup(out), lse.reshape(lse.shape[0], -1, lse.shape[-1])

    def backward(self, q: Any, k: Any, v: Any, dout: Any, dlse: Any) -> tuple[Any, Any, Any, Any]:
        """dq, dk, dv and the derivative of the biased logits [B, K, G, T, S].

        d lse / d logits is p, and a row's out depends on its logits through p alone.
        """
        xp = self.xp
        p, _, dcap, _ = self._p(q, k)
        qg, dout = _group(q, k), _group(dout, k)
        dlse = dlse.reshape(*p.shape[:-1])
        dp = xp.einsum("btkgv,bskv->bkgts", dout, v)
        ds = p * (dp - (p * dp).sum(-1, keepdims=True) + dlse[..., None]) * dcap
        dq = _ungroup(xp.einsum("bkgts,bskd->btkgd", ds, k)) * self.scale
        dk = xp.einsum("bkgts,btkgd->bskd", ds, qg) * self.scale
        dv = xp.einsum("bkgts,btkgv->bskv", p, dout)
        return dq, dk, dv, ds

    def dsinks(self, q: Any, k: Any, v: Any, dout: Any, dlse: Any) -> Any:
        """[N]: the derivative of the logit of the key with value 0, which every row shares."""
        p, _, _, sink_p = self._p(q, k)
        dp = self.xp.einsum("btkgv,bskv->bkgts", _group(dout, k), v)
        ds = sink_p * (0 - (p * dp).sum(-1) + dlse.reshape(sink_p.shape))
        return ds.sum((0, 3)).reshape(-1)

    def _p(self, q: Any, k: Any) -> tuple:
        return _probabilities(
            self.xp, _group(q, k), k, self.seen, self.scale, self.bias, self.softcap, self.sinks
        )


def _group(x: Any, k: Any) -> Any:
    batch, seqlen, heads, dim = x.shape
    return x.reshape(batch, seqlen, k.shape[2], heads // k.shape[2], dim)


def _ungroup(x: Any) -> Any:
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def xla_attention(
    q: Any,
    k: Any,
    v: Any,
    seen: Any,
    scale: float,
    sinks: Any = None,
    softcap: float | None = None,
    bias: Any = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """The same computation by XLA in the operands' dtype: materialised logits, fp32 softmax.

    What `jax.nn.dot_product_attention` does, and lse: products of 16-bit operands accumulated in
    fp32, probabilities rounded to 16 bits before they meet v. Differentiable; gives the errors to
    beat.
    """
    x = _einsum32("btkgd,bskd->bkgts", _group(q, k), k) * scale + bias
    if softcap is not None:
        x = softcap * jnp.tanh(x / softcap)
    any_seen = seen.any(-1)
    highest = jnp.where(any_seen, jnp.where(seen, x, -jnp.inf).max(-1), 0)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(*sinks.shape[:-1], *x.shape[1:3], 1)
        highest, any_seen = jnp.maximum(highest, sinks), any_seen | (sinks > -jnp.inf)
    highest = jax.lax.stop_gradient(highest)
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, x - highest[..., None], 0)), 0)
    total = weights.sum(-1)
    if sinks is not None:
        total += jnp.exp(sinks - highest)
    total = jnp.where(any_seen, total, 1)
    lse = jnp.where(any_seen, highest + jnp.log(total), -jnp.inf)
    p = (weights / total[..., None]).astype(v.dtype)
    out = _einsum32("bkgts,bskv->btkgv", p, v)
    return _ungroup(out).astype(q.dtype), lse.reshape(lse.shape[0], -1, lse.shape[-1])


# Bits that Hopper's tensor cores keep below the largest term's exponent.
TENSOR_CORE_BITS = 25


def tensor_core_sum(a: np.ndarray, b: np.ndarray, addend: np.ndarray) -> np.ndarray:
    """addend [...] + the sum of a [..., 16] * b [..., 16] as one tensor-core step rounds it.

    Tensor cores align all terms to the largest exponent, cut off, toward zero, what lies further
    below it than they keep, and cut off the sum to float32 (Fasi, Higham, Mikaitis and Pranesh,
    "Numerical behavior of NVIDIA tensor cores", 2021, sections 2 and 3). A product's exponent is
    the sum of its operands'. `test_emulator_hardware` holds this against sums measured on an H200.
    """
    exponents_a, exponents_b = _exponents(a), _exponents(b)
    largest = _exponents(addend)
    for i in range(a.shape[-1]):  # arrays of a term each stay in a cache
        largest = np.maximum(largest, exponents_a[..., i] + exponents_b[..., i] - 1)
    unit = np.ldexp(1.0, np.maximum(largest - 1, -500) - TENSOR_CORE_BITS)
    per_unit = 1 / unit  # a power of two
    units = np.trunc(addend * per_unit)
    for i in range(a.shape[-1]):
        units += np.trunc(a[..., i] * b[..., i] * per_unit)
    return _toward_zero(units * unit)


def _exponents(x: np.ndarray) -> np.ndarray:
    """Binary exponents, of a zero one below all products'."""
    return np.where(x == 0, -2000, np.frexp(x)[1])


def tensor_core_lse(
    q: Any, k: Any, seen: Any, scale: float, sinks: Any = None, softcap: float | None = None
) -> np.ndarray:
    """lse [B, N, T] in float64 of logits as tensor cores sum them.

    The baseline where kernels run on tensor cores, or on what computes like them, and XLA doesn't:
    cutting off errs in one direction, so the errors add up where a CPU's cancel. It shares nothing
    with the emulator.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    lse = np.empty((q.shape[0], q.shape[2], q.shape[1]))
    seen = np.broadcast_to(seen, (len(q), 1, 1, q.shape[1], k.shape[1]))[:, 0, 0]
    sinks = np.broadcast_to(-np.inf if sinks is None else sinks, lse.shape[:2])
    for batch, head in np.ndindex(*lse.shape[:2]):
        queries = q[batch, :, None, head]
        keys = k[batch, None, :, head * k.shape[2] // q.shape[2]]
        x = np.zeros((q.shape[1], k.shape[1]))
        for start in range(0, k.shape[-1], 16):
            step = np.s_[..., start : start + 16]
            x = tensor_core_sum(queries[step], keys[step], x)
        x = x * scale if softcap is None else softcap * np.tanh(x * scale / softcap)
        x = np.where(seen[batch], x, -np.inf)
        lse[batch, head] = np.logaddexp.reduce(x, -1, initial=sinks[batch, head])
    return lse


def _toward_zero(x: np.ndarray) -> np.ndarray:
    """The float32 numbers next to x on the side of zero, as float64."""
    nearest = x.astype(np.float32)
    below = np.where(np.abs(nearest) > np.abs(x), np.nextafter(nearest, np.float32(0)), nearest)
    return below.astype(np.float64)


def xla_gradients(
    operands, residuals, cotangents, seen, scale: float, softcap: float | None = None, bias=0.0
) -> tuple[jax.Array, ...]:
    """dq, dk, dv by XLA from what a flash backward is given: (q, k, v), (out, lse), (dout, dlse).

    Materialised probabilities, products of 16-bit operands, fp32 in between. Give it the residuals
    of the implementation under test, which are judged on their own: where a row's dp - dpsum
    cancels, the 16-bit out decides the error, in cuDNN and FlashAttention alike. Differentiating
    `xla_attention` keeps the probabilities instead, and errs up to 14 times less (dq, outlier
    channels, bf16), for T x S memory.
    """
    (q, k, v), (dout, _) = operands, cotangents
    p, ds = xla_logit_gradients(operands, residuals, cotangents, seen, scale, softcap, bias)
    ds, p = ds.astype(q.dtype), p.astype(v.dtype)
    dq = _ungroup(_einsum32("bkgts,bskd->btkgd", ds, k)) * scale
    dk = _einsum32("bkgts,btkgd->bskd", ds, _group(q, k)) * scale
    dv = _einsum32("bkgts,btkgv->bskv", p, _group(dout, k))
    return tuple(x.astype(q.dtype) for x in (dq, dk, dv))


def xla_logit_gradients(
    operands, residuals, cotangents, seen, scale: float, softcap: float | None = None, bias=0.0
) -> tuple[jax.Array, jax.Array]:
    """What `xla_gradients` makes its products of: probabilities, and the derivative of the biased
    logits, [B, K, G, T, S] in fp32."""
    (q, k, v), (out, lse), (dout, dlse) = operands, residuals, cotangents
    stats = (q.shape[0], k.shape[2], -1, q.shape[1])
    dpsum = jnp.einsum("btnv,btnv->bnt", out.astype(jnp.float32), dout.astype(jnp.float32)) - dlse
    x, dcap = _einsum32("btkgd,bskd->bkgts", _group(q, k), k) * scale + bias, 1.0
    if softcap is not None:
        tanh = jnp.tanh(x / softcap)
        x, dcap = softcap * tanh, 1 - tanh**2
    shift = jnp.where(lse == -jnp.inf, 0, lse).reshape(stats)[..., None]
    p = jnp.where(seen, jnp.exp(jnp.where(seen, x - shift, 0)), 0)
    dp = _einsum32("btkgv,bskv->bkgts", _group(dout, k), v)
    return p, p * (dp - dpsum.reshape(stats)[..., None]) * dcap


def arrays(rng: np.random.Generator, *shapes: tuple, dtype: Any = jnp.float32) -> list[jax.Array]:
    """Normal ones."""
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def as64(*xs: Any) -> list[np.ndarray]:
    """Each of them in float64."""
    return [np.asarray(x, np.float64) for x in xs]


def assert_close(result: Any, expected: Any, message: str = "", tolerance: float = 2e-6) -> None:
    """Both finite or the same infinity, and within `tolerance` of the largest expected
    magnitude."""
    result, expected = as64(result, expected)
    assert result.shape == expected.shape, message
    assert np.array_equal(np.isfinite(result), np.isfinite(expected)), message
    finite = np.isfinite(expected)
    assert np.array_equal(result[~finite], expected[~finite]), message
    scale = max(1.0, np.abs(expected[finite]).max(initial=0))
    np.testing.assert_allclose(
        result[finite], expected[finite], 0, tolerance * scale, err_msg=message
    )


def _einsum32(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def inputs(
    family: str, rng: np.random.Generator, shapes: tuple[tuple, tuple, tuple], dtype: Any
) -> tuple[jax.Array, ...]:
    """q [B, T, N, D], k [B, S, K, D], v [B, S, K, V] of a family, in `dtype`."""
    q_shape, k_shape, v_shape = shapes
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    head_dim = q_shape[-1]
    group = q_shape[2] // k_shape[2]
    # One direction for a key/value head and its query heads: q and k along it have the logits we
    # want.
    axis = rng.standard_normal((1, 1, k_shape[2], head_dim))
    axis /= np.linalg.norm(axis, axis=-1, keepdims=True)
    q_axis = np.repeat(axis, group, 2)
    position = np.arange(k_shape[1])[None, :, None, None] / max(1, k_shape[1] - 1)
    match family:
        case "normal":
            pass
        case "outlier_channels":
            channels = rng.choice(head_dim, 2, replace=False)
            q[..., channels[0]] *= 30
            k[..., channels[0]] *= 30
            v[..., channels[1] % v_shape[-1]] *= 30
        case "peaked_rows":
            # Each query repeats one key, so that its row is nearly one-hot.
            source = rng.integers(k_shape[1], size=q_shape[1])
            q = 4 * np.repeat(k[:, source], group, 2) + 0.1 * q
        case "constant_rows":
            k = np.broadcast_to(k[:, :1], k_shape).copy()
        case "rising_row_maximum":
            # Logits rise by about 40 over the row: every block raises the maximum and rescales.
            q = 0.1 * q + q_axis * np.sqrt(head_dim)
            k = 0.1 * k + axis * 40 * position
        case "slowly_rising_maximum":
            # By 1 in all: an implementation that rescales lazily keeps a stale maximum throughout.
            q = 0.1 * q + q_axis * np.sqrt(head_dim)
            k = 0.1 * k + axis * position
        case "heavy_tailed":
            # Like activations: a low-rank part common to q and k, a bias, and heavy tails.
            basis = rng.standard_normal((4, head_dim))
            q = rng.standard_t(3, (*q_shape[:3], 4)) @ basis / 2 + 0.3 * q + 0.5
            k = rng.standard_t(3, (*k_shape[:3], 4)) @ basis / 2 + 0.3 * k + 0.5
            v = rng.standard_t(3, v_shape) + 0.5
        case "denormals":
            tiny = float(jnp.finfo(dtype).tiny) / 50
            q, k, v = q * tiny, k * tiny, v * tiny
        case _:
            raise ValueError(f"family: got {family!r}, expected one of {FAMILIES}")
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The error of one result under the rule, against what the rule allows."""

    name: str
    error: float
    baseline: float
    allowed: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason and self.error <= self.allowed

    def __str__(self) -> str:
        if self.reason:
            return f"{self.name}: {self.reason}"
        limits = f"XLA's {self.baseline:.3g}, allowed {self.allowed:.3g}"
        return f"{self.name}: error {self.error:.3g}, {limits}"


def floor(magnitude: float, dtype: Any, ulps: float) -> float:
    """What rounding alone may cost at `magnitude`: a lucky baseline isn't held against a result.

    float32 below its smallest normal number, and with it bfloat16, may be flushed to zero.
    """
    info = jnp.finfo(dtype)
    unit = max(float(info.eps) * magnitude, float(info.smallest_subnormal))
    return ulps * unit + float(jnp.finfo(jnp.float32).tiny)


def judge(
    name: str, result: Any, expected: Any, baseline: Any, magnitude: float = 0.0
) -> list[Verdict]:
    """The rule: against `expected`, a result errs at most twice as much as `baseline`, and `floor`.

    In the largest element and in the root mean square. `expected` is float64; `result` gives the
    dtype. NaN or infinity on one side only fails. `magnitude`: see `verdicts`.
    """
    if result.shape != expected.shape:
        return [Verdict(name, np.inf, 0, 0, f"shape {result.shape}, expected {expected.shape}")]
    wide = (np.asarray(x, np.float64) for x in (result, expected, baseline))
    return verdicts(name, result.dtype, measure(*wide), magnitude)


def measure(result: Any, expected: Any, baseline: Any, xp: Any = np) -> Any:
    """What the rule looks at, as seven float64 numbers, so that big arrays can stay on a GPU.

    How many elements are NaN, or an infinity, on one side only; then the largest and the root mean
    square of: the error, the baseline's error, the expected value.
    """
    finite = xp.isfinite(expected)
    same = (expected == result) | (xp.isnan(expected) & xp.isnan(result))
    wrong = xp.sum(xp.where(finite, ~xp.isfinite(result), ~same))
    expected, result, baseline = (xp.where(finite, x, 0) for x in (expected, result, baseline))
    norms = [wrong]
    for x in (result - expected, baseline - expected, expected):
        norms += [xp.abs(x).max(initial=0), xp.sqrt(xp.sum(x**2) / max(1, x.size))]
    return xp.stack([xp.asarray(x, xp.float64) for x in norms])


# An exp2-based lse is rounded twice more than an exp-based one (times log2(e), times ln(2)), and
# the GPU's exp2 is good to 2 units in the last place.
LSE_ULPS = 4


def verdicts(name: str, dtype: Any, measures: Any, magnitude: float = 0.0) -> list[Verdict]:
    """The rule, applied to what `measure` returned for a result of `dtype`.

    `magnitude` is that of what an lse is made of, where that may be larger than the lse: a softcap,
    because a tanh from an exponential and a reciprocal is rounded as 1 is.
    """
    wrong, *norms = (float(x) for x in measures)
    if wrong:
        return [Verdict(name, np.inf, 0, 0, f"{wrong:.0f} elements NaN or infinite, one side only")]
    ulps = LSE_ULPS if name.split()[0] == "lse" else 1
    results = []
    # Rounding to nearest errs by 0.29 units in the last place in the root mean square.
    for norm, share, (error, theirs, expected) in zip(
        ("max", "rms"), (1, 0.3), (norms[::2], norms[1::2]), strict=True
    ):
        allowed = 2 * theirs + floor(max(expected, magnitude), dtype, share * ulps)
        results.append(Verdict(f"{name} {norm}", error, theirs, allowed))
    return results


def failures(verdicts: list[Verdict]) -> str:
    """One line for each verdict that isn't ok; empty if all are."""
    return "\n".join(str(verdict) for verdict in verdicts if not verdict.ok)
