# SPDX-License-Identifier: Apache-2.0
"""Every compiled row of the table, emulated: values against float64, in every schedule.

A case runs eagerly with the happens-before check, which also looks for reads of unwritten memory
and for races between CTAs, and its results are judged by the error rule of `reference`. Then
another schedule must give the same bits: one of four in turn, so that over its cases every row runs
in all of them (all four of every case take twice the time). Unwritten outputs and shared memory are
NaN throughout.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from emulator.artifacts import artifacts
from emulator.intervals import Intervals
from emulator.subjects import accumulator_places
from reference import (
    Oracle,
    failures,
    inputs,
    judge,
    tensor_core_lse,
    visible,
    visible_packed,
    xla_attention,
    xla_gradients,
)

from fa4_jax import _primitives, _variants
from fa4_jax._spec import AttentionSpec
from fa4_jax._variants import VARIANTS, Arch, DType, Feature, Kernel, Split, Variant, round_up

SOFTCAP = (Feature.interval, Feature.softcap)
SCHEDULES = ("late", "random:1", "random:2", "pct:3")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and a mask."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    heads: tuple[int, int]
    mask: dict = dataclasses.field(default_factory=dict)
    family: str = "normal"
    num_sms: int = 2
    head_sinks: tuple[float, ...] | None = None
    """Of batch entry 0; the other entries have them in another order."""
    broken: tuple[tuple[int, int], ...] = ()
    """(batch, row) pairs."""

    @property
    def band(self) -> tuple[int, int]:
        """The kernel's band_lower and band_upper, from the definition of the mask."""
        bottom_right = self.mask.get("causal_alignment") == "bottom_right"
        offset = self.seqlen_k - self.seqlen_q if bottom_right else 0
        left, right = self.mask.get("window_size", (None, None))
        if self.mask.get("causal"):
            right = 0 if right is None else min(right, 0)
        lower = -self.seqlen_q if left is None else offset - left
        upper = self.seqlen_k if right is None else offset + right
        clamp = functools.partial(np.clip, a_min=-self.seqlen_q, a_max=self.seqlen_k)
        return int(clamp(lower)), int(clamp(upper))

    @property
    def seen(self) -> np.ndarray:
        """Which keys each query sees, by the oracle's own reading of the mask."""
        return visible(self.seqlen_q, self.seqlen_k, **self.mask)

    @property
    def sinks(self) -> np.ndarray | None:
        """[B, N]"""
        if self.head_sinks is None:
            return None
        return np.array([np.roll(self.head_sinks, b) for b in range(self.batch)], np.float32)

    @property
    def is_broken(self) -> np.ndarray:
        """bool [B, T]"""
        broken = np.zeros((self.batch, self.seqlen_q), bool)
        for place in self.broken:
            broken[place] = True
        return broken


@dataclasses.dataclass(frozen=True)
class IntervalCase(Case):
    """A case of the rows with intervals. `mask` is what stays a band."""

    softcap: float = 1.0
    """In the rows that have one."""
    packing: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """cu_seqlens of queries and keys."""
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Of queries and keys, for each batch entry."""
    bands: tuple[dict, ...] = ()
    """A mask for each batch entry."""

    @property
    def seen(self) -> np.ndarray:
        sizes = self.seqlen_q, self.seqlen_k
        if self.packing:
            return visible_packed(*self.packing, *sizes, **BOTTOM_RIGHT)[None, None, None]
        if self.lengths:
            names = ("query_seq_lengths", "key_value_seq_lengths")
            arrays = dict(zip(names, map(np.array, self.lengths), strict=True))
            return visible(*sizes, **BOTTOM_RIGHT, **arrays)
        if self.bands:
            shape = (1, 1, 1, *sizes)
            return np.concatenate(
                [np.broadcast_to(visible(*sizes, **band), shape) for band in self.bands]
            )
        start, end = self.bounds()
        return visible(*sizes, kv_start=start, kv_end=end)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """A block of rows that see almost everything, one of rows that see nothing, and others in
        no order."""
        rng = np.random.default_rng(self.seqlen_q)
        start = rng.integers(0, self.seqlen_k, (self.batch, self.seqlen_q))
        end = start + rng.integers(-20, self.seqlen_k, start.shape)
        start[:, :64], end[:, :64] = start[:, :64] % 5, self.seqlen_k - end[:, :64] % 5
        end[:, 128:192] = 0
        return start, end

    @property
    def intervals(self) -> Intervals:
        shape = (self.batch, self.seqlen_q, self.seqlen_k)
        return Intervals.of(self.seen.reshape(shape), self.broken)


BOTTOM_RIGHT = {"causal": True, "causal_alignment": "bottom_right"}
# Lengths that are no multiple of any tile; two query or key tiles at least, where a band has an
# edge.
CASES = {
    "full": Case(1, 130, 257, (2, 1), family="rising_row_maximum"),
    "causal_top_left": Case(1, 201, 201, (2, 1), {"causal": True}),
    "causal_bottom_right": Case(
        2, 77, 200, (2, 2), BOTTOM_RIGHT, family="heavy_tailed", head_sinks=(2.5, -np.inf)
    ),
    "rows_without_keys": Case(1, 200, 75, (1, 1), BOTTOM_RIGHT),
    "window": Case(1, 195, 333, (3, 1), {"window_size": (40, 10)}),
    "one_query": Case(1, 1, 3, (2, 2)),
}
# A CTA of a persistent kernel computes many tiles, long, short and without keys: two heads in
# pairs, the others in a snake, some of these in pairs, too (`kernels.common.scheduler`).
PERSISTENT_CASES = {
    "many_tiles": Case(1, 600, 300, (4, 2), BOTTOM_RIGHT),
    "many_tiles_3_sms": Case(
        3, 300, 140, (3, 1), BOTTOM_RIGHT, num_sms=3, head_sinks=(-np.inf, 1.5, 30.0)
    ),
    # Before, between and after tiles that visit something, such as don't.
    "keys_without_queries": Case(2, 128, 400, (2, 2), {"window_size": (40, 10)}, num_sms=3),
}
# Few, because there are 48 rows with intervals, so each combines much.
INTERVAL_CASES = {
    # One sequence without queries, one without keys, padding; no tile that every row sees all of.
    "packed": IntervalCase(
        *(1, 260, 260, (2, 1), {"window_size": (None, 10)}),
        softcap=50.0,
        head_sinks=(0.5, -np.inf),
        packing=((0, 50, 50, 205, 230, 260), (0, 50, 60, 215, 215, 245)),
    ),
    # Whole tiles that need no mask; queries beyond a length; logits up to 20 times the cap.
    "lengths": IntervalCase(
        *(2, 150, 400, (1, 1)),
        family="heavy_tailed",
        softcap=2.0,
        lengths=((150, 97), (390, 200)),
    ),
    "any_bounds": IntervalCase(
        *(1, 200, 300, (1, 1)),
        family="rising_row_maximum",
        softcap=15.0,
        head_sinks=(30.0,),
    ),
    "full_and_causal_top_left_with_a_broken_row": IntervalCase(
        *(2, 70, 90, (1, 1)), softcap=3.0, bands=({}, {"causal": True}), broken=((1, 65),)
    ),
}


def cases_of_kind(variant: Variant) -> dict[str, Case]:
    """Those of a row's kernel and features."""
    if Feature.interval in variant.features:
        return INTERVAL_CASES
    if variant.kernel in (Kernel.forward, Kernel.backward):
        return CASES | PERSISTENT_CASES
    return CASES


def cases_of(variant: Variant) -> dict[str, Case]:
    """A row's: all of its kind, or some, of which the rows of a kind have all. Rows of float16 are
    those of bfloat16 but for the conversions; Blackwell's pre- and postprocess are Hopper's; one
    kernel is all rows of its backward but those of the widest head dims, and takes 2 to 12 seconds
    a case."""
    cases = cases_of_kind(variant)
    number = len(cases)
    if variant.arch is Arch.sm100a and variant.kernel is not Kernel.forward:
        number = 1 if variant.features else 4
    elif variant.dtype is DType.f16 and len(cases) > 2 * len(SCHEDULES):
        number = len(SCHEDULES)
    place, choices = VARIANTS.index(variant), len(cases) - number + 1
    first = (place + place // choices) % choices
    return dict(list(cases.items())[first : first + number])


def rows(kernel: Kernel, has_intervals: bool = False) -> pytest.MarkDecorator:
    """Parametrise over the rows of a kernel, with their cases."""
    found = [
        pytest.param(v, case, id=f"{v.name.removeprefix('fa4_')}-{name}")
        for v in VARIANTS
        if v.kernel == kernel and (Feature.interval in v.features) == has_intervals
        for name, case in cases_of(v).items()
    ]
    return pytest.mark.parametrize("variant, case", found)


def operands(variant: Variant, case: Case) -> tuple:
    """q, k, v, dout in the row's dtype, dlse; the same for every row of a dtype and head dims."""
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
    heads, kv_heads = case.heads
    dtype = jnp.dtype(variant.dtype.numpy_name)
    q_shape = (case.batch, case.seqlen_q, heads, variant.head_dim)
    k_shape = (case.batch, case.seqlen_k, kv_heads, variant.head_dim)
    v_shape = (*k_shape[:3], variant.head_dim_v)
    q, k, v = inputs(case.family, rng, (q_shape, k_shape, v_shape), dtype)
    dout = jnp.asarray(rng.standard_normal((*q_shape[:3], variant.head_dim_v)), dtype)
    dlse = rng.standard_normal((case.batch, heads, case.seqlen_q)).astype(np.float32)
    return q, k, v, dout, dlse


def as64(*arrays) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in arrays]


def scalars(variant: Variant, case: Case) -> dict[str, float]:
    lower, upper = case.band
    scale = float(np.float32(1 / math.sqrt(variant.head_dim)))
    # 1 is what rows without a softcap are given.
    softcap = softcap_of(variant, case) or 1.0
    band = {"band_lower": lower, "band_upper": upper}
    return {"softmax_scale": scale, "softcap": softcap, **band}


def softcap_of(variant: Variant, case: Case) -> float | None:
    has_softcap = Feature.softcap in variant.features and isinstance(case, IntervalCase)
    return case.softcap if has_softcap else None


def schedule_of(variant: Variant, case: Case) -> str:
    """Each of a row's cases has the next one; over the rows, each case has all."""
    table = INTERVAL_CASES if isinstance(case, IntervalCase) else CASES | PERSISTENT_CASES
    places = VARIANTS.index(variant) + list(table.values()).index(case)
    return SCHEDULES[places % len(SCHEDULES)]


def assert_same_in_other_schedule(
    row, results, variant: Variant, case: Case, *arguments, sums: tuple[int, ...] = (), **keywords
) -> None:
    """The results of another schedule are those of the eager one; `sums` up to the order of
    additions."""
    schedule = schedule_of(variant, case)
    others = row(*arguments, schedule=schedule, **keywords)[: len(results)]
    for index, (result, other) in enumerate(zip(results, others, strict=True)):
        if index in sums:
            tolerance = 4e-7 * max(np.nanmax(np.abs(result)), 1e-30) * 16
            np.testing.assert_allclose(other, result, 0, tolerance, err_msg=schedule)
        else:
            assert result.tobytes() == other.tobytes(), f"result {index} differs in {schedule}"


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name.removeprefix("fa4_"))
def test_every_row_runs_in_every_schedule(variant: Variant) -> None:
    """Or, where it has few cases, those of its kernel and features do, and in every case."""
    alike = [variant]
    if len(cases_of(variant)) < len(SCHEDULES):
        alike = [
            v
            for v in VARIANTS
            if (v.kernel, v.arch, v.features) == (variant.kernel, variant.arch, variant.features)
        ]
    runs = [(name, schedule_of(v, case)) for v in alike for name, case in cases_of(v).items()]
    assert {schedule for _, schedule in runs} == set(SCHEDULES)
    if len(alike) > 1:
        assert {name for name, _ in runs} == set(cases_of_kind(variant))


@rows(Kernel.forward)
def test_forward(emulated, variant: Variant, case: Case) -> None:
    check_forward(emulated, variant, case)


@rows(Kernel.forward, has_intervals=True)
def test_forward_of_intervals(emulated, variant: Variant, case: IntervalCase) -> None:
    check_forward(emulated, variant, case)


def check_forward(emulated, variant: Variant, case: Case) -> None:
    q, k, v, _, _ = operands(variant, case)
    # As many pairs as others have CTAs.
    num_sms = case.num_sms * variant.tiles.ctas
    row = functools.partial(emulated(variant.name), num_sms=num_sms)
    values = scalars(variant, case)
    arguments = (q, k, v, no_sinks(case) if case.sinks is None else case.sinks)
    arguments += interval_operands(variant, case)
    results = row(arguments, values, check=True)[:2]
    masked = (case.seen, values["softmax_scale"], case.sinks, softcap_of(variant, case))
    baseline = xla_attention(q, k, v, *masked)[0], tensor_core_lse(q, k, *masked)
    verdicts = []
    expected = forward_of(variant, case, q, k, v)
    for name, *triple in zip(("out", "lse"), results, expected, baseline, strict=True):
        magnitude = softcap_of(variant, case) or 0 if name == "lse" else 0
        verdicts += judge(name, *triple, magnitude)
    assert not failures(verdicts), failures(verdicts)
    assert_same_in_other_schedule(row, results, variant, case, arguments, values)


@pytest.mark.parametrize("head_dim", [64, 128, 256])  # one for each `Softmax`
def test_a_maximum_that_stays(emulated, head_dim: int) -> None:
    """lse of many tiles whose maximum is there from the first on, and whose other keys count little
    each.

    Where the factor of what was summed isn't exactly 1, the sum grows or shrinks with every tile.
    Half a unit in the last place of 1, which p of these keys doesn't reach, is lost where terms are
    added to that sum one by one: a quarter of them, 6e-5.
    """
    (variant,) = (v for v in VARIANTS if v.name == f"fa4_forward_sm90a_bf16_d{head_dim}")
    seqlen_k, highest = 8192, np.float32(140)

    def remainder(scale: float) -> float:
        """Of the highest score's product with the scale in float32, in units of its last place."""
        scale_log2 = np.float32(scale) * np.float32(math.log2(math.e))
        product = np.float32(highest * scale_log2)
        return abs(float(highest) * float(scale_log2) - float(product)) / np.spacing(product)

    scale = max(np.linspace(0.125, 0.126, 100), key=remainder)
    assert remainder(scale) > 0.45
    q = np.zeros((1, 1, 1, head_dim), jnp.bfloat16)
    k, v = (np.zeros((1, seqlen_k, 1, head_dim), jnp.bfloat16) for _ in range(2))
    q[..., 0] = 1
    k[:, [0, -1], :, 0] = highest  # whichever end comes first
    case = Case(1, 1, seqlen_k, (1, 1))
    values = {**scalars(variant, case), "softmax_scale": np.float32(scale)}
    arguments = (q, k, v, no_sinks(case))
    _, lse = emulated(variant.name)(arguments, values, num_sms=1)[:2]
    expected = highest * scale + math.log(2 + (seqlen_k - 2) * math.exp(-highest * scale))
    assert 2**-26 < math.exp(-highest * scale) < 2**-25
    np.testing.assert_allclose(lse, expected, rtol=0, atol=3e-6)


def oracle_of(variant: Variant, case: Case) -> Oracle:
    scale = scalars(variant, case)["softmax_scale"]
    return Oracle(case.seen, scale, softcap=softcap_of(variant, case), sinks=case.sinks)


def forward_of(variant: Variant, case: Case, q, k, v) -> tuple[np.ndarray, np.ndarray]:
    """out and lse in float64, NaN in broken rows."""
    out, lse = oracle_of(variant, case).forward(*as64(q, k, v))
    out[case.is_broken] = np.nan
    lse.swapaxes(1, 2)[case.is_broken] = np.nan
    return out, lse


def no_sinks(case: Case) -> np.ndarray:
    return np.zeros((0, case.heads[0]), np.float32)


def interval_operands(variant: Variant, case: Case) -> tuple[np.ndarray, ...]:
    """None for a row without intervals."""
    return case.intervals.operands(variant) if isinstance(case, IntervalCase) else ()


def padded(x: np.ndarray, fill: float) -> np.ndarray:
    """[B, N, T] to [B, N, R]."""
    missing = round_up(x.shape[-1], _variants.ROW_MULTIPLE) - x.shape[-1]
    return np.pad(x, ((0, 0), (0, 0), (0, missing)), constant_values=fill)


def residuals(variant: Variant, case: Case, q, k, v):
    """out and lse as a forward pass leaves them, rounded from float64."""
    out, lse = forward_of(variant, case, q, k, v)
    return jnp.asarray(out, q.dtype), lse.astype(np.float32)


@rows(Kernel.backward_preprocess)
def test_backward_preprocess(emulated, variant: Variant, case: Case) -> None:
    q, k, v, dout, dlse = operands(variant, case)
    out, lse = residuals(variant, case, q, k, v)
    row = emulated(variant.name)
    results = row((out, dout, lse, dlse), {}, check=True)
    dpsum, lse_log2, dq_accum = results
    products = np.einsum("btnv,btnv->bnt", *as64(out, dout))
    magnitude = np.einsum("btnv,btnv->bnt", *np.abs(as64(out, dout))) + np.abs(dlse)
    error = np.abs(dpsum - padded(products - dlse, 0))
    assert (error <= 2e-6 * padded(magnitude, 0)).all()
    expected = padded(np.where(lse == -np.inf, np.inf, lse * np.float64(np.log2(np.e))), np.inf)
    finite = np.isfinite(expected)
    assert (finite == np.isfinite(lse_log2)).all()
    assert (lse_log2[~finite] == np.inf).all()
    np.testing.assert_allclose(lse_log2[finite], expected[finite], 3e-7, 1e-7)
    assert (dq_accum == 0).all()
    assert_same_in_other_schedule(row, results, variant, case, (out, dout, lse, dlse), {})


@rows(Kernel.backward)
def test_backward(emulated, variant: Variant, case: Case) -> None:
    check_backward(emulated, variant, case)


@rows(Kernel.backward, has_intervals=True)
def test_backward_of_intervals(emulated, variant: Variant, case: IntervalCase) -> None:
    check_backward(emulated, variant, case)


def check_backward(emulated, variant: Variant, case: Case) -> None:
    q, k, v, dout, dlse = operands(variant, case)
    values = scalars(variant, case)
    scale = values["softmax_scale"]
    out, lse = residuals(variant, case, q, k, v)
    arguments = (q, k, v, dout, *workspaces(variant, case, out, lse, dout, dlse))
    arguments += interval_operands(variant, case)
    row = functools.partial(emulated(variant.name), num_sms=case.num_sms)
    results = row(arguments, values, check=True)[:3]
    dk, dv, dq_accum = results
    dq = dq_accum[:, :, : case.seqlen_q, accumulator_places(variant)].transpose(0, 2, 1, 3)
    dq = dq * np.float32(scale)
    assert (dq_accum[:, :, case.seqlen_q :] == 0).all()
    expected = oracle_of(variant, case).backward(*as64(q, k, v, dout, dlse))[:3]
    expected[0][case.is_broken] = np.nan
    for x in expected[1:]:
        x[case.is_broken.any(1)] = np.nan
    masked = case.seen, scale, softcap_of(variant, case)
    baseline = xla_gradients((q, k, v), (out, lse), (dout, dlse), *masked)
    verdicts = []
    got = (dq.astype(q.dtype), dk, dv)
    for name, *triple in zip(("dq", "dk", "dv"), got, expected, baseline, strict=True):
        verdicts += judge(name, *triple)
    assert not failures(verdicts), failures(verdicts)
    sums = () if Feature.deterministic in variant.features else (2,)
    assert_same_in_other_schedule(row, results, variant, case, arguments, values, sums=sums)


@pytest.mark.parametrize(
    "variant",
    [v for v in VARIANTS if v.key.startswith("backward_bf16_") and v.features == SOFTCAP],
    ids=lambda v: v.name.removeprefix("fa4_"),
)
def test_gradients_where_the_cap_saturates(emulated, variant: Variant) -> None:
    """Logits of 7 to 9 caps, where 1 - tanh^2 is 3e-6 to 6e-8. The rule of the other tests doesn't
    show it: its baseline has 1 - tanh^2 from a rounded tanh."""
    case = IntervalCase(1, 64, 64, (1, 1), softcap=3.0, bands=({},))
    *_, v, dout, dlse = operands(variant, case)
    signs = np.where(np.arange(64) % 3, 1.0, -1.0)[:, None]
    values = scalars(variant, case)
    size = np.sqrt(case.softcap / values["softmax_scale"] / variant.head_dim)
    ones = np.ones((1, 64, 1, variant.head_dim)) * size
    q = jnp.asarray(ones * np.linspace(7, 9, 64)[:, None, None], v.dtype)
    k = jnp.asarray(ones * signs[:, None], v.dtype)
    out, lse = residuals(variant, case, q, k, v)
    arguments = (q, k, v, dout, *workspaces(variant, case, out, lse, dout, dlse))
    arguments += interval_operands(variant, case)
    dk, _, dq_accum = emulated(variant.name)(arguments, values)[:3]
    dq = dq_accum[:, :, :64, accumulator_places(variant)].transpose(0, 2, 1, 3)
    expected = oracle_of(variant, case).backward(*as64(q, k, v, dout, dlse))[:2]
    for got, exact in ((dq * np.float32(values["softmax_scale"]), expected[0]), (dk, expected[1])):
        error = np.linalg.norm(np.float64(got) - exact)
        # dS is rounded to 2^-9 of itself, and dq is a sum of both signs. 1 - tanh^2 of a rounded
        # tanh: 0.03 and more.
        assert error <= 0.01 * np.linalg.norm(exact)


def workspaces(variant: Variant, case: Case, out, lse, dout, dlse) -> tuple[np.ndarray, ...]:
    """lse_log2, dpsum and dq_accum, as backward_preprocess leaves them."""
    lse_log2 = padded(np.where(lse == -np.inf, np.inf, lse * np.log2(np.e)), np.inf)
    dpsum = np.einsum("btnv,btnv->bnt", *as64(out, dout)) - dlse
    shape = (case.batch, case.heads[0], round_up(case.seqlen_q, 128), variant.static_dims["E"])
    return (
        lse_log2.astype(np.float32),
        padded(dpsum, 0).astype(np.float32),
        np.zeros(shape, np.float32),
    )


# What no caller of ours passes: negative, beyond every size, and where a sum or a multiple wraps.
WILD = np.array([-(2**31), 1 - 2**31, -(2**20), -65, -1, 0, 1, 64, 2**20, 2**31 - 64, 2**31 - 1])


def place_of_bounds(variant: Variant) -> int | Split:
    """What of a row decides how it takes bounds: of Blackwell's backwards, which kernel it is."""
    is_backward = variant.kernel is Kernel.backward and variant.arch is Arch.sm100a
    return variant.tiles.split if is_backward else variant.head_dim


# One row for each head dim of q and set of features without a softcap, or each kernel of them.
UNBOUNDED = {
    (v.kernel, v.arch, v.features, place_of_bounds(v)): v
    for v in reversed(VARIANTS)
    if Feature.interval in v.features and Feature.softcap not in v.features
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("variant", UNBOUNDED.values(), ids=lambda v: v.name.removeprefix("fa4_"))
def test_bounds_of_any_value_touch_nothing_else(emulated, variant: Variant, seed: int) -> None:
    """No access out of bounds and no deadlock, which the emulator raises; results mean nothing."""
    case = IntervalCase(2, 130, 200, (2, 1))
    rng = np.random.default_rng([variant.head_dim, seed])
    q, k, v, dout, dlse = operands(variant, case)
    wild = [
        np.where(rng.random(x.shape) < (0.05, 0.7)[seed], rng.choice(WILD, x.shape), x)
        for x in case.intervals.operands(variant)
    ]
    arguments = (q, k, v, no_sinks(case))
    if variant.kernel is Kernel.backward:
        out, lse = residuals(variant, case, q, k, v)
        arguments = (q, k, v, dout, *workspaces(variant, case, out, lse, dout, dlse))
    arguments += tuple(x.astype(np.int32) for x in wild)
    emulated(variant.name)(arguments, scalars(variant, case), check=True)


@rows(Kernel.backward_postprocess)
def test_backward_postprocess(emulated, variant: Variant, case: Case) -> None:
    rng = np.random.default_rng(7)
    rows_, width = round_up(case.seqlen_q, 128), variant.static_dims["E"]
    dq_accum = rng.standard_normal((case.batch, case.heads[0], rows_, width)).astype(np.float32)
    dq_accum[:, :, case.seqlen_q :] = np.nan
    row = emulated(variant.name)
    values = {"softmax_scale": 0.3}
    (dq,) = row((dq_accum,), values, check=True, free={"T": case.seqlen_q})
    kept = dq_accum[:, :, : case.seqlen_q, accumulator_places(variant)].transpose(0, 2, 1, 3)
    assert (np.asarray(kept * np.float32(0.3)).astype(dq.dtype) == dq).all()
    others = (dq_accum,), values
    assert_same_in_other_schedule(row, [dq], variant, case, *others, free={"T": case.seqlen_q})


THROUGH_THE_PRIMITIVES = {
    "bfloat16, band": ("bfloat16", 128, Case(1, 150, 190, (2, 1), {"causal": True})),
    "float16, band": ("float16", 64, Case(1, 150, 190, (2, 1), {"causal": True})),
    # Two batch entries; the band isn't in the intervals that the primitives are given.
    "bfloat16, all features": (
        "bfloat16",
        128,
        IntervalCase(2, 130, 170, (2, 1), {"causal": True}, head_sinks=(0.5, -np.inf), softcap=3.0),
    ),
}


@pytest.mark.parametrize("name", THROUGH_THE_PRIMITIVES)
def test_gradients_through_the_primitives(monkeypatch, name: str) -> None:
    """What JAX lowers for CUDA, forward and the three backward launches, with the emulator behind
    it."""
    from emulator.device import TARGET, device

    monkeypatch.setattr(_variants, "target_name", lambda kernel: TARGET)
    dtype, head_dim, case = THROUGH_THE_PRIMITIVES[name]
    has_features = isinstance(case, IntervalCase)
    variant = next(
        v
        for v in VARIANTS
        if (v.kernel, v.dtype.numpy_name, v.head_dim) == (Kernel.forward, dtype, head_dim)
        and (Feature.softcap in v.features) == has_features
    )
    device().select(variant)
    q, k, v, dout, dlse = operands(variant, case)
    softcap, seen, extras = softcap_of(variant, case), case.seen, {}
    if has_features:
        start, end = case.bounds()
        seen = seen & visible(case.seqlen_q, case.seqlen_k, **case.mask)
        extras = {"kv_start": jnp.asarray(start), "kv_end": jnp.asarray(np.maximum(start, end))}
        extras["sinks"] = jnp.asarray(case.sinks)
    spec = AttentionSpec(softmax_scale=1 / math.sqrt(head_dim), window_right=0, softcap=softcap)
    parameters = {"spec": spec, "extras": tuple(extras)}
    given = extras.values()
    out, lse = _primitives._forward_kernels(q, k, v, *given, **parameters)
    residuals = q, k, v, out, lse, dout, dlse
    gradients = _primitives._backward_kernels(*residuals, *given, **parameters)
    oracle = Oracle(seen, spec.softmax_scale, softcap=softcap, sinks=case.sinks)
    expected = oracle.backward(*as64(q, k, v, dout, dlse))[:3]
    masked = seen, spec.softmax_scale, softcap
    baseline = xla_gradients((q, k, v), (out, lse), (dout, dlse), *masked)
    verdicts = []
    for result, *triple in zip(("dq", "dk", "dv"), gradients, expected, baseline, strict=True):
        verdicts += judge(result, *triple)
    assert not failures(verdicts), failures(verdicts)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name.removeprefix("fa4_"))
def test_the_compiler_kept_products_asynchronous_and_registers_in_place(variant: Variant) -> None:
    """Results don't show it, and the emulator runs PTX: only ptxas knows."""
    report = artifacts([variant])[variant.name].report
    assert not [loss for loss in report["losses"] if "serialized" in loss]
    assert report["spill_bytes"] == 0, report["spills"]
