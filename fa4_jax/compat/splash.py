# SPDX-License-Identifier: Apache-2.0
"""`jax.experimental.pallas.ops.tpu.splash_attention` on a GPU: change the import.

    from fa4_jax.compat import splash as splash_attention

    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((T, S))] * N)
    kernel = splash_attention.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
    out = jax.vmap(kernel)(q, k, v)  # of a batch; q is to be scaled before

A mask here says for each query the interval of keys that it sees, in O(T) memory. Where all heads
have one band (causal, local, full), that is the kernels' static mask; else the intervals are arrays
and the kernel a pytree of them, so that it can be an argument of `jax.shard_map` as on a TPU:
`manual_sharding_spec`. Masks that differ between heads make each head an entry of the batch, and
grouped queries then copy their keys and values.

What differs: a query that sees no key gets 0 (its lse is -inf) rather than the average of the
values, and segments have to be contiguous (else NaN).
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from fa4_jax import _api
from fa4_jax._autodiff import CHECKPOINT_NAME
from fa4_jax._spec import message, static_flag, static_number
from fa4_jax._untyped import jax_
from fa4_jax.compat._common import note_ignored, refuse

DEFAULT_MASK_VALUE = -0.7 * float(np.finfo(np.float32).max)
"""Splash attention's logit of a key that a query may not see."""
# Above it, a hidden key might have a weight where splash attention gives it one.
_HIGHEST_MASK_VALUE = -1e30

Band = tuple[int | None, int | None]
Interval = tuple[np.ndarray, np.ndarray]


class SegmentIds(NamedTuple):
    """Which tokens may see each other: those with equal ids.

    Attributes:
      q: integers [T].
      kv: integers [S], of q's dtype.
    """

    q: ArrayLike
    kv: ArrayLike


class QKVLayout(enum.IntEnum):
    """How the TPU kernel stores an operand. Ours takes [length, head_dim] alone, as callers do."""

    HEAD_DIM_MINOR = enum.auto()
    SEQ_MINOR = enum.auto()


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tile sizes and layouts of the TPU kernel. Ours have their own: these change nothing."""

    block_q: int
    block_kv: int
    block_kv_compute: int | None = None
    block_q_dkv: int | None = None
    block_kv_dkv: int | None = None
    block_kv_dkv_compute: int | None = None
    block_q_dq: int | None = None
    block_kv_dq: int | None = None
    use_fused_bwd_kernel: bool = False
    q_layout: QKVLayout = QKVLayout.HEAD_DIM_MINOR
    k_layout: QKVLayout = QKVLayout.HEAD_DIM_MINOR
    v_layout: QKVLayout = QKVLayout.HEAD_DIM_MINOR

    @classmethod
    def get_default(cls) -> BlockSizes:
        """128 throughout."""
        return cls(128, 128, 128, 128, 128, 128, 128, 128)


class Mask:
    """Which keys a query may see, for one head [T, S] or, in a `MultiHeadMask`, for each.

    `&` and `|` combine masks of one shape; an index, as in `mask[:, :]`, gives bools.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, S), or (heads, T, S)."""
        raise NotImplementedError

    def interval(self) -> Interval:
        """int32 [T] each: query i sees keys start[i] <= j < end[i].

        Raises:
          NotImplementedError: some query's keys aren't contiguous; the message names the first.
        """
        raise NotImplementedError

    def band(self) -> Band | None:
        """(left, right) if query i sees keys i - left <= j <= i + right, None for unbounded, and
        both are >= 0; else None."""
        return None

    def __getitem__(self, index: Any) -> np.ndarray:
        start, end = self.interval()
        keys = np.arange(self.shape[-1])
        return ((keys >= start[:, None]) & (keys < end[:, None]))[index]

    def __and__(self, other: Mask) -> Mask:
        return LogicalAnd(self, other)

    def __or__(self, other: Mask) -> Mask:
        return LogicalOr(self, other)

    def __bool__(self) -> bool:
        raise TypeError(message("mask", "a bool of it", "& and |", "not `and` and `or`"))


def _rows(shape: tuple[int, int], lower: int | None, upper: int | None) -> Interval:
    """The interval of keys i + lower <= j <= i + upper, None for unbounded."""
    seqlen_q, seqlen_k = shape
    rows = np.arange(seqlen_q, dtype=np.int64)
    start: Any = rows * 0 if lower is None else np.clip(rows + lower, 0, seqlen_k)
    end: Any = rows * 0 + seqlen_k if upper is None else np.clip(rows + upper + 1, 0, seqlen_k)
    return start.astype(np.int32), np.maximum(start, end).astype(np.int32)


def _check_shape(shape: Any, shard_count: int = 1) -> None:
    if not (isinstance(shape, tuple) and len(cast(tuple[Any, ...], shape)) == 2):
        raise ValueError(message("shape", cast(object, shape), "(query length, key length)"))
    if shard_count < 1 or shape[0] % shard_count**2:
        expected = f"a number whose square divides the query length {shape[0]}"
        raise ValueError(message("shard_count", shard_count, expected))


@dataclasses.dataclass(frozen=True)
class FullMask(Mask):
    """Every query sees every key.

    Attributes:
      _shape: (T, S).
    """

    _shape: tuple[int, int]

    def __post_init__(self) -> None:
        _check_shape(self._shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def interval(self) -> Interval:
        return _rows(self._shape, None, None)

    def band(self) -> Band | None:
        return None, None


@dataclasses.dataclass(frozen=True, init=False)
class LocalMask(Mask):
    """Query i sees keys i + offset - left <= j <= i + offset + right.

    Attributes:
      window_size: (left, right), None for unbounded.
      offset: of the first query among the keys.
    """

    _shape: tuple[int, int]
    window_size: tuple[int | None, int | None]
    offset: int

    def __init__(
        self,
        shape: tuple[int, int],
        window_size: tuple[int | None, int | None],
        offset: int,
        shard_count: int = 1,
    ):
        """Splash attention's arguments.

        Args:
          shape: (T, S).
          window_size: see the attribute.
          offset: see the attribute.
          shard_count: its square has to divide T; else without effect.

        Raises:
          ValueError: a shape or shard count that doesn't fit.
        """
        _check_shape(shape, shard_count)
        object.__setattr__(self, "_shape", shape)
        object.__setattr__(self, "window_size", tuple(window_size))
        object.__setattr__(self, "offset", offset)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def _sides(self) -> Band:
        left, right = self.window_size
        return (
            None if left is None else left - self.offset,
            None if right is None else right + self.offset,
        )

    def interval(self) -> Interval:
        left, right = self._sides
        return _rows(self._shape, None if left is None else -left, right)

    def band(self) -> Band | None:
        return self._sides if all(side is None or side >= 0 for side in self._sides) else None


class CausalMask(LocalMask):
    """Query i sees keys j <= i + offset. `offset` S - T aligns the ends: bottom-right."""

    def __init__(self, shape: tuple[int, int], offset: int = 0, shard_count: int = 1):
        """As `LocalMask`, whose window is (None, 0)."""
        super().__init__(shape, (None, 0), offset, shard_count)


@dataclasses.dataclass(frozen=True, init=False)
class ChunkedCausalMask(Mask):
    """Query i sees keys j <= i of its own chunk, the one of keys i // chunk_size * chunk_size on.

    Attributes:
      chunk_size: queries and keys in a chunk.
    """

    _shape: tuple[int, int]
    chunk_size: int

    def __init__(self, shape: tuple[int, int], chunk_size: int, shard_count: int = 1):
        """As `LocalMask`; ValueError for a chunk_size < 1, too."""
        _check_shape(shape, shard_count)
        if chunk_size < 1:
            raise ValueError(message("chunk_size", chunk_size, "an int >= 1"))
        object.__setattr__(self, "_shape", shape)
        object.__setattr__(self, "chunk_size", chunk_size)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def interval(self) -> Interval:
        _, end = _rows(self._shape, None, 0)
        start = np.arange(len(end)) // self.chunk_size * self.chunk_size
        return np.minimum(start, end).astype(np.int32), end


@dataclasses.dataclass(frozen=True, eq=False)
class NumpyMask(Mask):
    """A dense mask whose rows are contiguous: it is turned into intervals.

    Attributes:
      array: bool [T, S].
    """

    array: np.ndarray

    def __post_init__(self) -> None:
        if not isinstance(self.array, np.ndarray) or self.array.dtype != np.bool_:
            got = getattr(self.array, "dtype", type(self.array).__name__)
            raise ValueError(message("array", got, "a NumPy array of bool"))
        _check_shape(self.array.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def interval(self) -> Interval:
        return _interval_of(self.array)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.array[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NumpyMask) and np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        return hash((self.array.shape, self.array.tobytes()))


def _interval_of(array: np.ndarray) -> Interval:
    """The interval of each row of bools [T, S]."""
    dense = cast(Any, array)
    count = dense.sum(-1)
    start = dense.argmax(-1) if dense.shape[-1] else count
    end = start + count
    keys = cast(Any, np.arange(array.shape[-1]))
    broken = (dense != ((keys >= start[:, None]) & (keys < end[:, None]))).any(-1)
    if broken.any():
        row = int(broken.argmax())
        refuse(
            "mask",
            f"keys {np.flatnonzero(array[row])[:8].tolist()}... in row {row}",
            "contiguous keys in every row: the kernels' masks are intervals",
            "use fa4_jax.dot_product_attention(mask=...), which runs the reference",
        )
    return start.astype(np.int32), end.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class _Pair(Mask):
    left: Mask
    right: Mask

    def __post_init__(self) -> None:
        for mask in (self.left, self.right):
            _check_is_mask("mask", mask)
        if self.left.shape != self.right.shape:
            raise ValueError(message("mask", f"shape {self.right.shape}", f"{self.left.shape}"))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.left.shape


class LogicalAnd(_Pair):
    """What both masks let a query see."""

    def interval(self) -> Interval:
        (a, b), (c, d) = self.left.interval(), self.right.interval()
        start, end = np.maximum(a, c), np.minimum(b, d)
        return start, np.maximum(start, end)

    def band(self) -> Band | None:
        left, right = self.left.band(), self.right.band()
        if left is None or right is None:
            return None

        def least(*sides: int | None) -> int | None:
            return min((side for side in sides if side is not None), default=None)

        return least(left[0], right[0]), least(left[1], right[1])


class LogicalOr(_Pair):
    """What either mask lets a query see."""

    def interval(self) -> Interval:
        return _interval_of(self[:, :])

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.left[index] | self.right[index]


@dataclasses.dataclass(frozen=True, init=False)
class MultiHeadMask(Mask):
    """One mask for each head.

    Attributes:
      masks: of one shape (T, S).
    """

    masks: tuple[Mask, ...]

    def __init__(self, masks: Sequence[Mask]):
        """Take `masks`; ValueError or TypeError unless they are masks of one shape."""
        if not masks:
            raise ValueError(message("masks", "none", "one mask for each head"))
        for i, mask in enumerate(masks):
            _check_is_mask(f"masks[{i}]", mask)
            if mask.shape != masks[0].shape:
                raise ValueError(
                    message(
                        f"masks[{i}]", f"shape {mask.shape}", f"{masks[0].shape} as of masks[0]"
                    )
                )
        object.__setattr__(self, "masks", tuple(masks))

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.masks), *self.masks[0].shape

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.stack([mask[:, :] for mask in self.masks])[index]


def _check_is_mask(name: str, mask: Any) -> None:
    if not isinstance(mask, Mask) or isinstance(mask, MultiHeadMask):
        kind = type(mask).__name__
        raise TypeError(message(name, kind, "a mask of fa4_jax.compat.splash for one head"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Static:
    """What a kernel is beside its intervals: part of the program."""

    shape: tuple[int, int, int]
    """(heads, T, S) of all devices together."""
    head_shards: int
    band: Band | None
    """The static mask of all heads, or None if there are intervals."""
    is_mqa: bool
    save_residuals: bool
    softcap: float | None
    implementation: str | None


@jax.tree_util.register_pytree_node_class
class SplashAttentionKernel:
    """What `make_splash_mha` and `make_splash_mqa` return: call it with one sequence.

    A pytree of the mask's intervals: two int32 arrays, [T], or [heads, T] where heads differ; none
    if the mask is a band.
    """

    def __init__(self, static: _Static, bounds: tuple[Any, ...] | None):
        self.static = static
        self.bounds = bounds

    def __call__(
        self,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        segment_ids: SegmentIds | None = None,
        sinks: ArrayLike | None = None,
    ) -> Any:
        """softmax(q k^T + mask) v: without a scale, which callers put into q.

        Args:
          q: [heads, T, D].
          k: [key/value heads, S, D]; of `make_splash_mqa` [S, D].
          v: [key/value heads, S, V]; of `make_splash_mqa` [S, V].
          segment_ids: a query sees keys with its own id, which have to be contiguous.
          sinks: floats [heads], as in `fa4_jax.flash_attention`.

        Returns:
          [heads, T, V] in q's dtype; with `save_residuals`, (that, (lse,)), where lse is float32
          [heads, T] and differentiable.

        Raises:
          ValueError: shapes that aren't the mask's; and as `fa4_jax.flash_attention`.
          TypeError, NotImplementedError, LibraryError: as `fa4_jax.flash_attention`.
        """
        operands = [_api.as_array(name, x) for name, x in (("q", q), ("k", k), ("v", v))]
        if self.static.is_mqa:
            operands[1:] = _add_head("k", operands[1]), _add_head("v", operands[2])
        self._check(*operands)
        ids = (None, None) if segment_ids is None else (segment_ids.q, segment_ids.kv)
        options: dict[str, Any] = {
            "softmax_scale": 1.0,
            "softcap": self.static.softcap,
            "q_segment_ids": ids[0],
            "kv_segment_ids": ids[1],
            "implementation": self.static.implementation,
        }
        if self.bounds is None:
            options["window_size"] = self.static.band
        elif self.bounds[0].ndim == 2:
            return self._results(*self._head_by_head(operands, sinks, options))
        else:
            options["kv_start"], options["kv_end"] = self.bounds
        swapped = (jnp.swapaxes(x, 0, 1) for x in operands)
        out, lse = _api.check(*swapped, sinks=sinks, **options).run()
        return self._results(jnp.swapaxes(out, 0, 1), lse)

    def _results(self, out: Array, lse: Array) -> Any:
        return (out, (lse,)) if self.static.save_residuals else out

    def _head_by_head(
        self, operands: list[Array], sinks: ArrayLike | None, options: dict[str, Any]
    ) -> tuple[Array, Array]:
        """Each head as a batch entry, because intervals are the same for all heads of one."""
        q, k, v = operands
        heads = q.shape[0]
        k, v = (jnp.repeat(x, heads // x.shape[0], 0) for x in (k, v))

        def one(
            qkv: list[Array], kv_start: Array, kv_end: Array, sinks: Array | None
        ) -> tuple[Array, Array]:
            limits = {"kv_start": kv_start, "kv_end": kv_end, "sinks": sinks}
            plan = _api.check(*(x[:, None] for x in qkv), **limits, **options)
            out, lse = plan.run()
            return out[:, 0], lse[0]

        of_heads = None if sinks is None else _api.as_array("sinks", sinks)
        if of_heads is not None:
            if of_heads.shape != (heads,):
                raise ValueError(message("sinks", f"shape {of_heads.shape}", f"shape ({heads},)"))
            of_heads = of_heads[:, None]
        assert self.bounds
        kv_start, kv_end = self.bounds
        return jax_.vmap(one)([q, k, v], kv_start, kv_end, of_heads)

    def _check(self, q: Array, k: Array, v: Array) -> None:
        """That the mask is about these shapes; the rest is `_api`'s."""
        heads, seqlen_q, seqlen_k = self.static.shape
        possible = {heads, heads // self.static.head_shards}
        if self.bounds is not None:
            *rows, seqlen_q = self.bounds[0].shape
            possible = set(rows) or possible
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.ndim != 3:
                raise ValueError(message(name, f"shape {x.shape}", "rank 3; jax.vmap for a batch"))
        if q.shape[0] not in possible or q.shape[1] != seqlen_q:
            expected = f"({' or '.join(map(str, sorted(possible)))}, {seqlen_q}, head_dim)"
            hint = "in a shard_map, pass the kernel in with kernel.manual_sharding_spec"
            raise ValueError(message("q", f"shape {q.shape}", f"the mask's {expected}", hint))
        if k.shape[1] != seqlen_k:
            raise ValueError(message("k", f"shape {k.shape}", f"the mask's {seqlen_k} keys"))
        if q.shape[0] % k.shape[0]:
            expected = f"a divisor of q's {q.shape[0]} heads"
            raise ValueError(message("k", f"{k.shape[0]} heads", expected))

    def manual_sharding_spec(self, sharding: NamedSharding) -> SplashAttentionKernel:
        """This kernel's `in_specs` in a `jax.shard_map` whose body takes it as an argument.

        Args:
          sharding: of (heads, T), for instance NamedSharding(mesh, P("heads", "sequence")).

        Raises:
          ValueError: it doesn't split them evenly; it splits T, and `q_seq_shards` was 1.
        """
        heads, sequence = (*sharding.spec, None, None)[:2]
        shape = self.static.shape[:2]
        local = sharding.shard_shape(shape)
        if self.bounds is None:
            if local[1] != shape[1]:
                expected = f"{shape[1] // local[1]}, the devices that share a sequence"
                raise ValueError(message("q_seq_shards", 1, expected, "give it to make_splash_mha"))
            return self
        spec = PartitionSpec(*((heads, sequence) if self.bounds[0].ndim == 2 else (sequence,)))
        return SplashAttentionKernel(self.static, (spec, spec))

    def tree_flatten(self) -> tuple[tuple[Any, ...], _Static]:
        """For JAX: the intervals, and everything else."""
        return (() if self.bounds is None else tuple(self.bounds)), self.static

    @classmethod
    def tree_unflatten(cls, static: _Static, bounds: tuple[Any, ...]) -> SplashAttentionKernel:
        """For JAX: the inverse of `tree_flatten`."""
        return cls(static, tuple(bounds) or None)


def _add_head(name: str, x: Array) -> Array:
    if x.ndim != 2:
        raise ValueError(message(name, f"shape {x.shape}", "[S, head_dim], one head for all"))
    return x[None]


class MakeOptions(TypedDict):
    """For type checkers: the keywords of `make_splash_mha`, whose meanings are there."""

    head_shards: int
    q_seq_shards: int
    block_sizes: NotRequired[Any]
    save_residuals: NotRequired[bool]
    mask_value: NotRequired[float]
    attn_logits_soft_cap: NotRequired[float | None]
    downcast_smem_data: NotRequired[bool]
    residual_checkpoint_name: NotRequired[str | None]
    interpret: NotRequired[bool]
    implementation: NotRequired[str | None]


def make_splash_mha(
    mask: MultiHeadMask | np.ndarray | Array, **options: Unpack[MakeOptions]
) -> SplashAttentionKernel:
    """A kernel for one mask, with the arguments of splash attention's function of this name.

    Args:
      mask: [heads, T, S]: a `MultiHeadMask`, or an array of bool whose rows are contiguous.
      **options:
        head_shards: devices that share the heads; each then has heads / head_shards.
        q_seq_shards: devices that share a sequence's queries.
        block_sizes: ignored, with an `IgnoredArgumentWarning`.
        save_residuals: calls return (out, (lse,)).
        mask_value: logit of a key that a query may not see: low enough that it has no weight.
        attn_logits_soft_cap: static number > 0: `flash_attention`'s softcap.
        downcast_smem_data: as block_sizes.
        residual_checkpoint_name: None or "context".
        interpret: the reference runs, as with implementation="reference".
        implementation: as in `fa4_jax.flash_attention`.

    Raises:
      NotImplementedError: a mask with a row whose keys aren't contiguous, a traced one, another
        mask_value or residual_checkpoint_name.
      TypeError, ValueError: a mask that isn't one; numbers of shards that don't divide it.
    """
    return _make_splash_attention(mask, is_mqa=False, **options)


def make_splash_mqa(
    mask: MultiHeadMask | np.ndarray | Array, **options: Unpack[MakeOptions]
) -> SplashAttentionKernel:
    """As `make_splash_mha`, of a kernel whose k and v [S, D] have one head for all."""
    return _make_splash_attention(mask, is_mqa=True, **options)


def make_splash_mha_single_device(mask: Any, **options: Any) -> SplashAttentionKernel:
    """`make_splash_mha` with head_shards and q_seq_shards 1."""
    return make_splash_mha(mask, head_shards=1, q_seq_shards=1, **options)


def make_splash_mqa_single_device(mask: Any, **options: Any) -> SplashAttentionKernel:
    """`make_splash_mqa` with head_shards and q_seq_shards 1."""
    return make_splash_mqa(mask, head_shards=1, q_seq_shards=1, **options)


def make_causal_mask(shape: tuple[int, int], offset: int = 0) -> np.ndarray:
    """bool [T, S]: `CausalMask(shape, offset)`, dense."""
    return CausalMask(shape, offset)[:, :]


def make_local_attention_mask(
    shape: tuple[int, int], window_size: tuple[int | None, int | None], *, offset: int = 0
) -> np.ndarray:
    """bool [T, S]: `LocalMask(shape, window_size, offset)`, dense."""
    return LocalMask(shape, window_size, offset)[:, :]


def _make_splash_attention(  # noqa: PLR0913 - JAX's arguments
    mask: Any,
    *,
    block_sizes: Any = None,
    is_mqa: bool,
    save_residuals: bool = False,
    mask_value: float = DEFAULT_MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
    downcast_smem_data: bool = True,
    head_shards: int,
    q_seq_shards: int,
    residual_checkpoint_name: str | None = None,
    interpret: bool = False,
    implementation: str | None = None,
) -> SplashAttentionKernel:
    mask = _multi_head(mask)
    heads, seqlen_q, seqlen_k = mask.shape
    for name, shards, whole in (
        ("head_shards", head_shards, heads),
        ("q_seq_shards", q_seq_shards, seqlen_q),
    ):
        if shards < 1 or whole % shards:
            raise ValueError(message(name, shards, f"a divisor of {whole}"))
    if math.isnan(mask_value) or mask_value > _HIGHEST_MASK_VALUE:
        expected = f"at most {_HIGHEST_MASK_VALUE:g}: hidden keys have no weight"
        refuse("mask_value", mask_value, expected, "leave it out")
    if residual_checkpoint_name not in (None, CHECKPOINT_NAME):
        expected = f'None or "{CHECKPOINT_NAME}", the name that residuals have'
        hint = f'save "{CHECKPOINT_NAME}" in your checkpoint policy'
        refuse("residual_checkpoint_name", repr(residual_checkpoint_name), expected, hint)
    for name, given in (
        ("block_sizes", block_sizes is not None),
        ("downcast_smem_data", not downcast_smem_data),
    ):
        if given:
            note_ignored(f"splash attention: {name}", "the kernels choose their own tiles")
    alike = len(set(mask.masks)) == 1
    band = mask.masks[0].band() if alike and q_seq_shards == 1 else None
    bounds = None
    if band is None and alike:
        bounds = mask.masks[0].interval()
    elif band is None:
        of_heads = [one.interval() for one in mask.masks]
        bounds = tuple(np.stack(x) for x in zip(*of_heads, strict=True))
    static = _Static(
        shape=(heads, seqlen_q, seqlen_k),
        head_shards=head_shards,
        band=band,
        is_mqa=is_mqa,
        save_residuals=static_flag(save_residuals, "save_residuals"),
        softcap=(
            None
            if attn_logits_soft_cap is None
            else static_number(attn_logits_soft_cap, "attn_logits_soft_cap")
        ),
        implementation=_api.REFERENCE if static_flag(interpret, "interpret") else implementation,
    )
    return SplashAttentionKernel(
        static, None if bounds is None else tuple(jnp.asarray(x) for x in bounds)
    )


def _multi_head(mask: Any) -> MultiHeadMask:
    """`mask` [heads, T, S], which may be an array whose values are known."""
    if isinstance(mask, Tracer):
        refuse(
            "mask",
            "a traced array",
            "a mask that is known when the program is traced",
            "use fa4_jax.flash_attention's kv_start and kv_end",
        )
    if isinstance(mask, (np.ndarray, jax.Array)):
        if mask.ndim != 3:
            raise ValueError(message("mask", f"shape {mask.shape}", "[heads, T, S]"))
        return MultiHeadMask([NumpyMask(np.asarray(head)) for head in mask])
    if not isinstance(mask, MultiHeadMask):
        hint = "MultiHeadMask([mask] * heads)"
        raise TypeError(message("mask", type(mask).__name__, "a MultiHeadMask", hint))
    return mask
