# SPDX-License-Identifier: Apache-2.0
"""The table: every kernel this project builds, and what each one takes and returns.

This module is the only home of these facts. The build (`kernels/build.py`) compiles `VARIANTS`, the
generated C++ registry checks and launches what `signature` says, the JAX lowering derives result
and workspace shapes from `signature`, the tests enumerate `VARIANTS`, and the README's support
table is printed from it. It imports nothing but the standard library, so the build can read it
without JAX.

Dimensions are named by one letter everywhere:

    B  batch            T  query length       S  key/value length
    N  query heads      K  key/value heads    (N % K == 0)
    D  head dim of q/k  V  head dim of v/out
    R  T rounded up to `ROW_MULTIPLE`         E  D rounded up to `HEAD_DIM_MULTIPLE`
    M  blocks of `BLOCK` queries, the last one not full, and J, of keys
    W  4, the width of a range                Z  B, or 0 for an operand that isn't given
    U  1

R, E, M and J lay out what isn't the user's. They don't depend on an architecture's tiles, because
the architecture is chosen at run time, in C++, after XLA has allocated every buffer.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

ROW_MULTIPLE = 128
HEAD_DIM_MULTIPLE = 32
BLOCK = 64
RANGE = 4

# Shapes and band bounds are int32 in a kernel and their sums must be too; strides are int64.
MAX_DIMENSION = 2**30 - 1

# Version of the FFI targets: bump it when a signature changes, so that an exported program never
# meets a handler that reads its operands differently.
TARGET_VERSION = 3


class Kernel(enum.StrEnum):
    """One launch. A training step is forward, backward_preprocess, backward,
    backward_postprocess."""

    forward = enum.auto()
    backward_preprocess = enum.auto()
    backward = enum.auto()
    backward_postprocess = enum.auto()


class Feature(enum.StrEnum):
    """What a row of forward or backward computes beside scale and lse."""

    interval = enum.auto()
    """Which keys a query sees: those of an interval of its own, not those of a band."""
    softcap = enum.auto()
    """Scores are softcap * tanh(softmax_scale * q k^T / softcap)."""
    deterministic = enum.auto()
    """dq is summed in one order, whatever the timing. Everything else always is."""


# Softcap and determinism come with intervals alone: a band is cheap to write as intervals, twice
# the rows aren't cheap to build.
_INTERVALS: tuple[tuple[Feature, ...], ...] = (
    (Feature.interval,),
    (Feature.interval, Feature.softcap),
)
FEATURE_SETS: Mapping[Kernel, tuple[tuple[Feature, ...], ...]] = {
    Kernel.forward: ((), *_INTERVALS),
    Kernel.backward_preprocess: ((),),
    Kernel.backward: (
        (),
        *_INTERVALS,
        *((*features, Feature.deterministic) for features in _INTERVALS),
    ),
    Kernel.backward_postprocess: ((),),
}
"""Those that the rows of a kernel have."""


class Arch(enum.StrEnum):
    """CUDA target. The trailing 'a' (arch-specific) code runs on exactly one compute capability."""

    sm90a = enum.auto()
    sm100a = enum.auto()

    @property
    def compute_capability(self) -> tuple[int, int]:
        """(major, minor) of the only devices that can run this target's binaries."""
        return {Arch.sm90a: (9, 0), Arch.sm100a: (10, 0)}[self]

    @property
    def cuda_target(self) -> str:
        """The name compilers use, e.g. `sm_90a`."""
        return self.value.replace("sm", "sm_")


class DType(enum.StrEnum):
    """Element types of kernel buffers. The 16-bit ones are the user's."""

    bf16 = enum.auto()
    f16 = enum.auto()
    f32 = enum.auto()
    i32 = enum.auto()

    @property
    def numpy_name(self) -> str:
        """The name NumPy (with ml_dtypes) and JAX give it."""
        return {
            DType.bf16: "bfloat16",
            DType.f16: "float16",
            DType.f32: "float32",
            DType.i32: "int32",
        }[self]


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One tensor of a kernel: row-major, dimensions named by letter.

    `dtype` None means the variant's own 16-bit type. A result that is `zeroed` is set to zero by
    the launcher before the kernel starts.
    """

    name: str
    dims: str
    dtype: DType | None = None
    zeroed: bool = False


@dataclasses.dataclass(frozen=True)
class Scalar:
    """One run-time scalar. `kind`: "f32" or "i32" is an FFI attribute of this name; "sms" is an
    int32 that C++ supplies at launch, the number of multiprocessors of the device."""

    name: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Signature:
    """Ordered operands, results and scalars of a kernel. The C ABI: stream, scalars, buffers.

    A name that is both an operand and a result is one buffer, updated in place.
    """

    operands: tuple[Buffer, ...]
    results: tuple[Buffer, ...]
    scalars: tuple[Scalar, ...] = ()

    @property
    def aliases(self) -> dict[int, int]:
        """Operand index to result index of the buffers updated in place."""
        results = {buffer.name: i for i, buffer in enumerate(self.results)}
        return {i: results[b.name] for i, b in enumerate(self.operands) if b.name in results}

    @property
    def attributes(self) -> tuple[Scalar, ...]:
        """The scalars that a caller passes."""
        return tuple(scalar for scalar in self.scalars if scalar.kind != "sms")

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Every distinct buffer: operands, then results that aren't operands too."""
        names = {buffer.name for buffer in self.operands}
        return (*self.operands, *(b for b in self.results if b.name not in names))


_Q = Buffer("q", "BTND")
_K = Buffer("k", "BSKD")
_V = Buffer("v", "BSKV")
_OUT = Buffer("out", "BTNV")
_DOUT = Buffer("dout", "BTNV")
_LSE = Buffer("lse", "BNT", DType.f32)
_LSE_LOG2 = Buffer("lse_log2", "BNR", DType.f32)
_DPSUM = Buffer("dpsum", "BNR", DType.f32)
_DQ_ACCUM = Buffer("dq_accum", "BNRE", DType.f32)
QKV = (_Q, _K, _V)
# A logit of each head without a value; [0, N] if there are none.
_SINKS = Buffer("sinks", "ZN", DType.f32)
# Query i of batch b sees keys j with kv_start[b, i] <= j < kv_end[b, i]; none in padding rows. A
# row with kv_start = -1 has NaN for its out and lse.
_INTERVAL = (Buffer("kv_start", "BR", DType.i32), Buffer("kv_end", "BR", DType.i32))
# Of a block of queries: smallest kv_start, largest kv_end; largest kv_start, smallest kv_end. The
# first two, and the last two, may also be of a wider, and a narrower, interval, and
# broken rows count in neither.
_KEY_RANGE = Buffer("key_range", "BMW", DType.i32)
# Of a block of keys: queries [first, end) hold all that see one of them, and [full_first, full_end)
# only such as see each of them. Multiples of `BLOCK`.
_QUERY_RANGE = Buffer("query_range", "BJW", DType.i32)
# How many tiles a persistent kernel's CTAs have taken from its queue.
_TILES_TAKEN = Buffer("tiles_taken", "U", DType.i32, zeroed=True)
# Of a tile of keys: before which tile of queries it, and all tiles of later keys, have added their
# dq. Tiles are the row's, and fewer than blocks.
_PROGRESS = Buffer("progress", "BNJ", DType.i32, zeroed=True)
# > 0 and finite; the Python layer folds a zero or negative scale into q.
_SCALE = Scalar("softmax_scale", "f32")
# > 0 and finite; 1, and not read, where the row hasn't the feature.
_SOFTCAP = Scalar("softcap", "f32")
# Query i sees keys j with i + band_lower <= j <= i + band_upper, both clamped to [-T, S]. With
# `Feature.interval` the intervals are within the band, which isn't read.
_BAND = (Scalar("band_lower", "i32"), Scalar("band_upper", "i32"))
# A persistent kernel launches one CTA per multiprocessor.
_NUM_SMS = Scalar("num_sms", "sms")


def signature(kernel: Kernel, features: tuple[Feature, ...] = ()) -> Signature:
    """What the rows of `kernel` with these features take and return."""
    if kernel is Kernel.forward:
        # out = softmax(scores, sinks) v; lse is the natural logarithm of the row sums, -inf for a
        # row that sees neither a key nor a sink. Its out is 0.
        has_interval = Feature.interval in features
        interval = (*_INTERVAL, _KEY_RANGE) if has_interval else ()
        queue = (_TILES_TAKEN,) if has_interval else ()
        return Signature(
            (*QKV, _SINKS, *interval), (_OUT, _LSE, *queue), (_SCALE, _SOFTCAP, *_BAND, _NUM_SMS)
        )
    if kernel is Kernel.backward:
        # dk and dv complete; dq_accum += dS k, still without softmax_scale, and with columns in the
        # order that the row's `Split` says.
        has_interval = Feature.interval in features
        interval = (*_INTERVAL, _QUERY_RANGE) if has_interval else ()
        queue = (_TILES_TAKEN,) if has_interval else ()
        progress = (_PROGRESS,) if Feature.deterministic in features else ()
        return Signature(
            (*QKV, _DOUT, _LSE_LOG2, _DPSUM, _DQ_ACCUM, *interval),
            (Buffer("dk", "BSKD"), Buffer("dv", "BSKV"), _DQ_ACCUM, *queue, *progress),
            (_SCALE, _SOFTCAP, *_BAND, _NUM_SMS),
        )
    assert not features, f"{kernel} is the same with every feature"
    if kernel is Kernel.backward_preprocess:
        # dpsum = rowsum(out * dout) - dlse, 0 in padding rows; lse_log2 = lse * log2(e), +inf in
        # padding rows and for rows that see no key, so that their probabilities are 0; and a
        # dq_accum of zeros.
        return Signature(
            (_OUT, _DOUT, _LSE, Buffer("dlse", "BNT", DType.f32)), (_DPSUM, _LSE_LOG2, _DQ_ACCUM)
        )
    # dq = softmax_scale * dq_accum, without the padding.
    return Signature((_DQ_ACCUM,), (Buffer("dq", "BTND"),), (_SCALE,))


class Split(enum.StrEnum):
    """What the consumer warpgroups of a kernel divide among themselves."""

    rows = enum.auto()
    """The rows of the result that they hold: queries of a forward, keys of a backward."""
    products = enum.auto()
    """A backward's products, where dk and dv of half the keys don't fit one's registers.

    Such a backward leaves dq_accum's columns as an MMA's accumulator has them: of 16, position
    4 t + 2 h + c (t < 4; h, c < 2) holds column 8 h + 2 t + c. Its postprocess, whose row says
    `products` too, puts them in order.
    """
    passes = enum.auto()
    """Nothing: a backward that computes dv, then dk, of all keys, for which tensor memory has not
    room beside one another."""


class Epilogue(enum.StrEnum):
    """How a forward's warpgroup brings its rows of out to global memory."""

    own = enum.auto()
    """Through shared memory of its own: stored by TMA while the next tile is computed."""
    over_q = enum.auto()
    """Through q's, where a warpgroup overwrites rows that it alone has read; the next q waits."""
    registers = enum.auto()
    """From registers, four lanes of a row exchanging, so that each stores 16 bytes."""


class Softmax(enum.StrEnum):
    """How a forward's source has the two rows of a thread in a key tile's softmax: both maxima,
    then the exponentials, and when it adds these.

    ptxas places the rescaling of out by it: in the shadow of the exponentials, or behind them.
    Which is faster depends on the head dim, by up to 5 % (docs/performance-log.md, "Rescaling").
    """

    maxima_first = enum.auto()
    """Sums start when the factors of what was summed before are known."""
    sums_last = enum.auto()
    """Sums start with the exponentials."""
    finite = enum.auto()
    """The same, and a row that has seen no key has a finite maximum, not -inf, which a select would
    have to keep out of the exponents."""


@dataclasses.dataclass(frozen=True)
class Exp2:
    """Which exponentials of a row a forward computes by a polynomial on the FMA pipes: of every
    `period` pairs of columns the last `pairs`, but none in the row's last quarter, which the next
    product waits for. The others are the special function unit's."""

    degree: int = 0
    pairs: int = 0
    period: int = 1

    def is_polynomial(self, pair: int, row_pairs: int) -> bool:
        """Whether a pair of a row of so many is."""
        in_time = pair < row_pairs // 4 * 3
        return in_time and pair % self.period >= self.period - self.pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tuning of one variant: nothing here changes a result by more than rounding."""

    tile_m: int
    """Query rows per tile."""
    tile_n: int = 0
    """Key/value rows per tile."""
    stages: int = 0
    """Depth of the shared-memory ring of the operand that the main loop streams."""
    mma_warpgroups: int = 0
    """Consumer warpgroups of Hopper; one more loads."""
    q_stages: int = 0
    """Forward: with two, the next tile's q is there when this one is done."""
    epilogue: Epilogue = Epilogue.own
    """Forward."""
    softmax: Softmax = Softmax.sums_last
    """Forward of Hopper."""
    exp2: Exp2 = Exp2()
    """Forward of Blackwell."""
    ctas: int = 1
    """Forward of Blackwell: with two, a pair of CTAs shares the MMAs of a tile, each loading half
    of k and v."""
    k_stages: int = 0
    """Backward: with two, the next key tile's k is loaded before this one is done."""
    v_stages: int = 0
    """Backward: with two, the next key tile's v is loaded before this one's last dp."""
    v_columns: int = 0
    """Backward of Hopper whose warpgroups divide keys: how many columns of v they keep in registers
    for a key tile, as dp's operand."""
    dout_stages: int = 0
    """Backward of Blackwell; `stages` are q's."""
    dq_stages: int = 0
    """Backward of Blackwell: how many pieces of 32 columns of dq are on their way."""
    split: Split = Split.rows
    """What the consumer warpgroups divide; chooses the class that compiles the row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One compiled kernel: what it computes (kernel, dtype, head dims), for which chip, and its
    tiles."""

    kernel: Kernel
    arch: Arch
    dtype: DType
    head_dim: int
    head_dim_v: int
    features: tuple[Feature, ...] = ()
    tiles: Tiles

    @property
    def key(self) -> str:
        """The architecture-free name that a lowered program carries, e.g. `forward_bf16_d128` or
        `backward_f16_d192_128_interval_softcap`."""
        return kernel_key(self.kernel, self.dtype, (self.head_dim, self.head_dim_v), self.features)

    @property
    def name(self) -> str:
        """Object file, C prefix, registry entry and test id, e.g. `fa4_forward_sm90a_bf16_d128`."""
        return f"fa4_{self.key.replace(self.kernel, f'{self.kernel}_{self.arch}', 1)}"

    @property
    def signature(self) -> Signature:
        """What this kernel takes and returns."""
        return signature(self.kernel, self.features)

    @property
    def static_dims(self) -> dict[str, int]:
        """Dimensions fixed at compile time, by letter."""
        return {
            "D": self.head_dim,
            "V": self.head_dim_v,
            "E": round_up(self.head_dim, HEAD_DIM_MULTIPLE),
            "W": RANGE,
            "U": 1,
        }


def kernel_key(
    kernel: Kernel, dtype: DType, head_dims: tuple[int, int], features: tuple[Feature, ...] = ()
) -> str:
    """The architecture-free name of a kernel; see `Variant.key`."""
    dims = f"d{head_dims[0]}" if head_dims[0] == head_dims[1] else "d{}_{}".format(*head_dims)
    return "_".join((kernel, dtype, dims, *features))


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is >= value."""
    return -(-value // multiple) * multiple


_NO_OTHERS: Mapping[int | tuple[int, int], Tiles] = MappingProxyType({})


def grid(
    kernel: Kernel,
    arch: Arch,
    tiles: Mapping[int | tuple[int, int], Tiles],
    dtypes: Iterable[DType] = (DType.bf16, DType.f16),
    without_features: Mapping[int | tuple[int, int], Tiles] = _NO_OTHERS,
) -> Iterator[Variant]:
    """Rows for every set of features, dtype and head dim of `tiles`: of q and v alike, or a pair
    (q, v). `without_features` are tiles of head dims where rows without features have others."""
    for features, dtype, head_dims in itertools.product(FEATURE_SETS[kernel], dtypes, tiles):
        row_tiles = tiles if features else {**tiles, **without_features}
        pair = (head_dims, head_dims) if isinstance(head_dims, int) else head_dims
        yield Variant(
            kernel=kernel,
            arch=arch,
            dtype=dtype,
            head_dim=pair[0],
            head_dim_v=pair[1],
            features=features,
            tiles=row_tiles[head_dims],
        )


def _by_products(tile_n: int, k_stages: int, v_stages: int) -> Tiles:
    """A backward whose warpgroups divide the products."""
    return Tiles(
        tile_m=64,
        tile_n=tile_n,
        stages=2,
        mma_warpgroups=2,
        k_stages=k_stages,
        v_stages=v_stages,
        split=Split.products,
    )


def _by_keys(tile_m: int, v_columns: int) -> Tiles:
    """A backward whose warpgroups divide the keys."""
    return Tiles(
        tile_m=tile_m,
        tile_n=128,
        stages=2,
        mma_warpgroups=2,
        k_stages=2,
        v_stages=1,
        v_columns=v_columns,
    )


def _rows(tile_m: int, tile_n: int, q_stages: int, epilogue: Epilogue, softmax: Softmax) -> Tiles:
    """A forward."""
    mma_warpgroups = tile_m // 64
    return Tiles(
        tile_m=tile_m,
        tile_n=tile_n,
        stages=2,
        mma_warpgroups=mma_warpgroups,
        q_stages=q_stages,
        epilogue=epilogue,
        softmax=softmax,
    )


_FORWARD_SM90: Mapping[int | tuple[int, int], Tiles] = {
    64: _rows(192, 128, 2, Epilogue.own, Softmax.finite),
    96: _rows(128, 128, 2, Epilogue.registers, Softmax.finite),
    128: _rows(128, 128, 2, Epilogue.own, Softmax.finite),
    (192, 128): _rows(128, 128, 1, Epilogue.registers, Softmax.finite),
    192: _rows(128, 96, 1, Epilogue.registers, Softmax.sums_last),
    256: _rows(128, 80, 1, Epilogue.registers, Softmax.sums_last),
}

# 1.3 % faster; with a softcap it spills 124 bytes.
_FORWARD_SM90_BAND: Mapping[int | tuple[int, int], Tiles] = {
    64: _rows(192, 128, 2, Epilogue.own, Softmax.maxima_first),
}

_BACKWARD_SM90: Mapping[int | tuple[int, int], Tiles] = {
    64: _by_keys(128, v_columns=0),
    128: _by_keys(64, v_columns=32),
    96: _by_products(128, k_stages=2, v_stages=2),
    (192, 128): _by_products(64, k_stages=2, v_stages=1),
    192: _by_products(64, k_stages=2, v_stages=2),
    256: _by_products(64, k_stages=1, v_stages=1),
}

# 2 % faster than 32 columns; with intervals it spills 16 bytes.
_BACKWARD_SM90_BAND: Mapping[int | tuple[int, int], Tiles] = {
    128: _by_keys(64, v_columns=48),
}


def _in_tensor_memory(stages: int, kv_stages: int, dout_stages: int, dq_stages: int = 2) -> Tiles:
    """A backward of Blackwell."""
    return Tiles(
        tile_m=128,
        tile_n=128,
        stages=stages,
        k_stages=kv_stages,
        v_stages=kv_stages,
        dout_stages=dout_stages,
        dq_stages=dq_stages,
    )


_BACKWARD_SM100: Mapping[int | tuple[int, int], Tiles] = {
    64: _in_tensor_memory(stages=2, kv_stages=2, dout_stages=2),
    96: _in_tensor_memory(stages=2, kv_stages=1, dout_stages=2, dq_stages=3),
    128: _in_tensor_memory(stages=2, kv_stages=1, dout_stages=1),
    (192, 128): _in_tensor_memory(stages=1, kv_stages=1, dout_stages=1),
    192: Tiles(tile_m=64, tile_n=128, split=Split.passes),
    256: Tiles(tile_m=64, tile_n=128, split=Split.passes),
}

_FORWARD_SM100: Mapping[int | tuple[int, int], Tiles] = {
    64: Tiles(tile_m=256, tile_n=128, stages=8, exp2=Exp2(4, 6, 16)),
    96: Tiles(tile_m=256, tile_n=128, stages=5, exp2=Exp2(4, 4, 16)),
    128: Tiles(tile_m=256, tile_n=128, stages=3, exp2=Exp2(4, 4, 16)),
    (192, 128): Tiles(
        tile_m=256, tile_n=128, stages=2, epilogue=Epilogue.over_q, exp2=Exp2(4, 4, 16)
    ),
    192: Tiles(tile_m=128, tile_n=128, stages=3, epilogue=Epilogue.over_q),
    256: Tiles(tile_m=128, tile_n=128, stages=2, epilogue=Epilogue.over_q),
}

# The interval rows' tiles come from a queue, which is a CTA's own.
_FORWARD_SM100_PAIRS: Mapping[int | tuple[int, int], Tiles] = {
    192: Tiles(tile_m=256, tile_n=128, stages=7, epilogue=Epilogue.over_q, ctas=2),
    256: Tiles(tile_m=256, tile_n=128, stages=5, epilogue=Epilogue.over_q, ctas=2),
}

# Blackwell's in float16, the same but for conversions, would make the tests 5 minutes longer.
_BACKWARD = (
    (Arch.sm90a, _BACKWARD_SM90, _BACKWARD_SM90_BAND, (DType.bf16, DType.f16)),
    (Arch.sm100a, _BACKWARD_SM100, _NO_OTHERS, (DType.bf16,)),
)


def _backward(
    arch: Arch,
    tiles: Mapping[int | tuple[int, int], Tiles],
    without_features: Mapping[int | tuple[int, int], Tiles],
    dtypes: Iterable[DType],
) -> Iterator[Variant]:
    """The rows of the three launches of a backward."""
    before = {dims: Tiles(tile_m=128) for dims in tiles}
    after = {dims: Tiles(tile_m=128, split=main.split) for dims, main in tiles.items()}
    yield from grid(Kernel.backward_preprocess, arch, before, dtypes)
    yield from grid(Kernel.backward, arch, tiles, dtypes, without_features)
    yield from grid(Kernel.backward_postprocess, arch, after, dtypes)


VARIANTS: tuple[Variant, ...] = (
    *grid(Kernel.forward, Arch.sm90a, _FORWARD_SM90, without_features=_FORWARD_SM90_BAND),
    *grid(Kernel.forward, Arch.sm100a, _FORWARD_SM100, without_features=_FORWARD_SM100_PAIRS),
    *(row for backward in _BACKWARD for row in _backward(*backward)),
)


def target_name(kernel: Kernel) -> str:
    """The XLA FFI target that launches `kernel`: one name each, so that profiles are readable."""
    return f"fa4_jax_{kernel}_v{TARGET_VERSION}"


def feature_set(kernel: Kernel, needed: Iterable[Feature]) -> tuple[Feature, ...]:
    """The smallest of the kernel's `FEATURE_SETS` that has every feature of `needed` which makes a
    difference to it."""
    sets = FEATURE_SETS[kernel]
    different = set(needed).intersection(itertools.chain(*sets))
    return min((s for s in sets if set(s) >= different), key=len)


def served_arches() -> tuple[Arch, ...]:
    """Architectures with every kernel that another one has. Only these are run on: a program is
    lowered for all of them, and its gradient may be asked for later."""
    keys = {v.key for v in VARIANTS}
    return tuple(arch for arch in Arch if {v.key for v in VARIANTS if v.arch is arch} == keys)


def built_head_dims(kernel: Kernel, dtype: DType) -> tuple[tuple[int, int], ...]:
    """Sorted (head_dim, head_dim_v) pairs that some architecture's row of `kernel` and `dtype`
    has."""
    return tuple(
        sorted(
            {
                (v.head_dim, v.head_dim_v)
                for v in VARIANTS
                if v.kernel == kernel and v.dtype == dtype
            }
        )
    )


def support_table() -> str:
    """The README's table, in Markdown: head dims that run forward, and with a gradient, by chip."""

    def head_dims(arch: Arch, dtype: DType, kernels: Iterable[Kernel]) -> str:
        rows: list[set[tuple[int, int]]] = [
            {
                (v.head_dim, v.head_dim_v)
                for v in VARIANTS
                if (v.kernel, v.arch, v.dtype) == (kernel, arch, dtype)
            }
            for kernel in kernels
        ]
        pairs = sorted(pair for pair in rows[0] if all(pair in other for other in rows))
        return ", ".join(str(qk) if qk == v else f"{qk}/{v}" for qk, v in pairs) or "none"

    lines = [
        "| CUDA target | compute capability | inputs | head dims, forward | head dims, gradient |",
        "|---|---|---|---|---|",
    ]
    served = served_arches()
    for arch, dtype in sorted({(v.arch, v.dtype) for v in VARIANTS if v.arch in served}):
        capability = "{}.{}".format(*arch.compute_capability)
        forward = head_dims(arch, dtype, [Kernel.forward])
        gradient = head_dims(arch, dtype, Kernel)
        cells = (arch.cuda_target, capability, dtype.numpy_name, forward, gradient)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
