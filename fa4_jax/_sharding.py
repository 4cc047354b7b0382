# SPDX-License-Identifier: Apache-2.0
"""How a mesh splits an attention call: by batch and by heads, never by length or head dim.

Batch entries and key/value heads are independent, so a device that has some of them needs nothing
of another. Query heads may be split finer than key/value heads: a device then takes the key/value
heads that its query heads use, and their gradients are summed over the devices that share them.
Operands that are sharded over a length or a head dim are gathered first, with a `ShardingWarning`.

`Op` stands for a call until its shardings are known, and `_local` is what each device then does.
Two routes lead there, by the types of the mesh's axes:

* Auto: XLA's partitioner decides. `custom_partitioning` with a Shardy rule has it ask `_partition`
  what a device gets. The rule gives factors of length and head dim as needing replication, which
  keeps them from being propagated but doesn't gather them: `_partition` does. On one device and
  inside `shard_map` nothing of this is in the program.
* Explicit: types carry shardings, so it is a `shard_map`. `custom_partitioning` would lose them,
  can't be exported, and misses the persistent compilation cache: the address of a Python object is
  part of the program.

A mesh with both goes the second way, and then the first.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# What `custom_partitioning` needs of a primitive that lowers to it. There is no public name.
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fa4_jax._reference import caller_level
from fa4_jax._untyped import apply_primitive, bind, jax_, lax, lower_fun
from fa4_jax._varying import match_varying

Axes = tuple[str, ...]
Names = tuple[str, ...]
"""Of the `Extras` among a call's operands."""
Check = Callable[[mlir.LoweringRuleContext, Any], Any]

BATCH, HEADS, KV_HEADS, QUERY_LENGTH = "B", "N", "K", "T"
_WHOLE = {
    QUERY_LENGTH: "query length",
    "S": "key length",
    "D": "head_dim",
    "V": "v's head_dim",
}
"""What a device needs whole."""


class ShardingWarning(UserWarning):
    """Operands have to be gathered first: their sharding doesn't split attention's work."""


_warned: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Layout:
    """The dimensions of a call's operands and results, by the letters of `_variants`.

    Each begins with the batch, which is as many dimensions as `vmap` has made of it; the first
    operand is q.
    """

    operands: tuple[str, ...]
    results: tuple[str, ...]

    def sizes(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """Of all dimensions but the batch, by letter; `shapes` are the operands'."""
        sizes: dict[str, int] = {}
        for dims, shape in zip(self.operands, shapes, strict=True):
            sizes |= dict(zip(dims[:0:-1], reversed(shape), strict=False))
        return sizes


class Op:
    """A primitive on any mesh."""

    def __init__(
        self,
        local: Primitive,
        abstract: Callable[..., Sequence[ShapedArray]],
        layout: Callable[[tuple[str, ...]], Layout],
        checks: Mapping[str | None, Check],
    ):
        """`local` is the primitive; it runs on one device, with one batch dimension. Its parameters
        are `spec` and `extras`, and `layout` is a function of the latter. `abstract` is its
        abstract evaluation. `checks` are called with the lowering context and `spec` when a
        platform (None: any other) is lowered for: what XLA's partitioner has lowered can't raise
        well.
        """
        self.local, self.abstract, self.layout, self.checks = local, abstract, layout, checks
        self._partitioned = custom_partitioning(self.fold, static_argnums=(0, 1))
        self._partitioned.def_partition(
            functools.partial(_partition, self),
            decode_shardings=False,
            sharding_rule=functools.partial(_shardy_rule, self),
        )
        # Where the partitioner may have to split it, so that its lowering asks for devices; and
        # where types say how it is split.
        self.auto, self.explicit = self._define("auto"), self._define("explicit")
        prim_requires_devices_during_lowering.add(self.auto)

    def bind(self, *operands: Array, spec: Any, extras: Names) -> Sequence[Array]:
        """The call. Programs without devices (on an `AbstractMesh`) lower where no axis is Auto."""
        kinds = _mesh([jax.typeof(x) for x in operands]).axis_types
        if kinds and all(kind == AxisType.Manual for kind in kinds):
            return self.fold(spec, extras, *operands)
        is_auto = not kinds or AxisType.Auto in kinds
        primitive = self.auto if is_auto else self.explicit
        return bind(primitive, *operands, spec=spec, extras=extras)

    def _define(self, suffix: str) -> Primitive:
        primitive = Primitive(f"{self.local.name}_{suffix}")
        primitive.multiple_results = True
        primitive.def_abstract_eval(self._result_types)
        # Outside jit, a call is a jitted one: compiled once for each shape and spec.
        primitive.def_impl(functools.partial(apply_primitive, primitive))
        for platform, check in self.checks.items():
            rule = functools.partial(self._lower, check)
            mlir.register_lowering(primitive, rule, platform=platform)
        batching.primitive_batchers[primitive] = functools.partial(_lead_with_mapped, primitive)
        return primitive

    def _result_types(self, *avals: ShapedArray, spec: Any, extras: Names) -> list[ShapedArray]:
        lead = avals[0].shape[:-3]
        folded = (typed_like(x, (math.prod(lead), *x.shape[len(lead) :])) for x in avals)
        results = self.abstract(*folded, spec=spec, extras=extras)
        placement = _Explicit.of(self.layout(extras), avals)
        if placement is None:
            return [typed_like(x, (*lead, *x.shape[1:])) for x in results]
        placement.split.warn_of_gathers(placement.operands)
        return [
            typed_like(x, (*lead, *x.shape[1:]), NamedSharding(placement.mesh, spec))
            for x, spec in zip(results, placement.results, strict=True)
        ]

    def _lower(
        self,
        check: Check,
        ctx: mlir.LoweringRuleContext,
        *operands: Any,
        spec: Any,
        extras: Names,
    ) -> Any:
        check(ctx, spec)
        module = ctx.module_context
        if AxisType.Explicit in _mesh(ctx.avals_in).axis_types:
            chosen: Any = self._over_explicit_axes
        elif module.lowering_parameters.for_export or not _has_devices(module.axis_context):
            chosen = self.fold
            _warn_of_unpartitioned(module.axis_context)
        else:
            chosen = self._partitioned
        lower = lower_fun(functools.partial(chosen, spec, extras), multiple_results=True)
        return lower(ctx, *operands)

    def fold(self, spec: Any, extras: Names, *operands: Array) -> tuple[Array, ...]:
        """`local`, with the batch dimensions as one."""
        lead = operands[0].shape[:-3]
        folded = (x.reshape(math.prod(lead), *x.shape[len(lead) :]) for x in operands)
        results = bind(self.local, *folded, spec=spec, extras=extras)
        return tuple(x.reshape(*lead, *x.shape[1:]) for x in results)

    def _over_explicit_axes(self, spec: Any, extras: Names, *operands: Array) -> tuple[Array, ...]:
        layout = self.layout(extras)
        placement = _Explicit.of(layout, [jax.typeof(x) for x in operands])
        assert placement
        mesh, split = placement.mesh, placement.split

        def put(x: Array, spec: P) -> Array:
            return jax_.sharding.reshard(x, NamedSharding(mesh, spec))

        in_specs = tuple(map(split.spec, layout.operands))

        def function(*operands: Array) -> Sequence[Array]:
            return self.bind(*match_varying(operands), spec=spec, extras=extras)

        mapped = jax.shard_map(
            functools.partial(_local, function, layout, split, placement.ratio),
            mesh=mesh,
            in_specs=in_specs,
            out_specs=tuple(map(split.spec, layout.results)),
            axis_names=_names(mesh, AxisType.Explicit),
        )
        results = mapped(*map(put, operands, in_specs))
        return tuple(map(put, results, placement.results))


def typed_like(
    aval: ShapedArray,
    shape: Sequence[int],
    sharding: NamedSharding | None = None,
    dtype: np.dtype | None = None,
) -> ShapedArray:
    """The type of an array that varies over the same manual mesh axes as `aval`; without
    `sharding`, no Explicit axis splits it."""
    return aval.update(
        shape=tuple(shape),
        dtype=dtype or aval.dtype,
        weak_type=False,
        sharding=sharding or NamedSharding(aval.sharding.mesh, P(*[None] * len(shape))),
    )


def check_varying(name: str, *avals: ShapedArray) -> None:
    """ValueError unless operands vary over the same manual axes."""
    if len({aval.manual_axis_type.varying for aval in avals}) > 1:
        raise ValueError(f"fa4_jax: operands of {name} vary over different mesh axes: {avals}")


def _lead_with_mapped(
    primitive: Primitive, operands: Sequence[Array], axes: Sequence[int | None], **parameters: Any
) -> tuple[Sequence[Array], list[int]]:
    """vmap: the mapped axis is one more batch dimension, the first."""
    mapped = ((x, axis) for x, axis in zip(operands, axes, strict=True) if axis is not None)
    like, like_axis = next(mapped)
    size, sharding = like.shape[like_axis], jax.typeof(like).sharding
    is_explicit = AxisType.Explicit in sharding.mesh.axis_types

    def lead(x: Array, axis: int | None) -> Array:
        if axis is not None:
            return jnp.moveaxis(x, axis, 0)
        spec = P(sharding.spec[like_axis], *jax.typeof(x).sharding.spec)
        to = NamedSharding(sharding.mesh, spec) if is_explicit else None
        return lax.broadcast(x, (size,), out_sharding=to)

    results = bind(primitive, *map(lead, operands, axes), **parameters)
    return results, [0] * len(results)


# --- What a mesh splits, and what a device does.
# -----------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Sharded:
    """The mesh axes that split each dimension of an array; None where they aren't whole axes.

    `dims` has one letter for the batch, which may be several dimensions.
    """

    dims: str
    axes: tuple[Axes | None, ...]

    @property
    def batch(self) -> tuple[Axes | None, ...]:
        return self.axes[: len(self.axes) - len(self.dims) + 1]

    def of(self, letter: str) -> Axes | None:
        """Of any dimension but the batch; () where there is none."""
        return self.axes[self.dims.index(letter) - len(self.dims)] if letter in self.dims else ()


@dataclasses.dataclass(frozen=True)
class _Split:
    """The mesh axes that split a call."""

    batch: tuple[Axes, ...]
    kv_heads: Axes
    """Split key/value heads, and query heads likewise."""
    group: Axes
    """Split the query heads of a device's key/value heads further."""

    @classmethod
    def of(
        cls,
        arrays: Sequence[_Sharded],
        batch: Sequence[int],
        heads: tuple[int, int],
        mesh_shape: Mapping[str, int],
    ) -> _Split:
        """What the shardings of `arrays` split of a call with these sizes of batch dimensions and
        numbers of query and key/value heads.

        The first array that says something about a dimension decides. An axis that doesn't divide
        what is left of a dimension isn't used for it, nor are those after it.
        """
        used: set[str] = set()

        def take(size: int, candidates: Iterable[Axes | None]) -> Axes:
            wanted = next((x for x in candidates if x), ())
            axes = _dividing(size, [x for x in wanted if x not in used], mesh_shape)
            used.update(axes)
            return axes

        batch_axes = [take(size, (x.batch[i] for x in arrays)) for i, size in enumerate(batch)]
        split_heads = take(heads[0], (x.of(y) for y in (HEADS, KV_HEADS) for x in arrays))
        kv_heads = _dividing(heads[1], split_heads, mesh_shape)
        return cls(tuple(batch_axes), kv_heads, split_heads[len(kv_heads) :])

    @property
    def heads(self) -> Axes:
        return self.kv_heads + self.group

    def spec(self, dims: str, query_length: Axes = ()) -> P:
        """Of an operand or a result."""
        axes = {HEADS: self.heads, KV_HEADS: self.kv_heads, QUERY_LENGTH: query_length}
        return P(*(x or None for x in (*self.batch, *(axes.get(x, ()) for x in dims[1:]))))

    def warn_of_gathers(self, operands: Sequence[_Sharded]) -> None:
        """Once for each way in which operands don't fit the split."""
        q = operands[0]
        unfit = [_WHOLE[x] for x in _WHOLE if any(y.of(x) != () for y in operands)]
        if any(x not in ((), y) for x, y in zip(q.batch, self.batch, strict=True)):
            unfit.append("batch (not evenly)")
        if q.of(HEADS) not in ((), self.heads):
            unfit.append("query heads (not evenly, or too finely)")
        text = (
            f"operands of attention are sharded over {', '.join(unfit)}, which doesn't "
            "split its work: they are gathered, and devices repeat each other's work. Shard batch "
            "or heads; for a sequence that is too long for one device, call "
            "fa4_jax.context_parallel_attention"
        )
        if unfit:
            _warn(text)


def _warn(text: str) -> None:
    """Once for each text."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(f"fa4_jax: {text}", ShardingWarning, stacklevel=caller_level())


def _dividing(size: int, axes: Sequence[str], mesh_shape: Mapping[str, int]) -> Axes:
    """The first of `axes`, as many as together divide `size`."""
    count = 1
    for i, axis in enumerate(axes):
        count *= mesh_shape[axis]
        if size % count:
            return tuple(axes[:i])
    return tuple(axes)


def _local(
    function: Callable[..., Sequence[Array]],
    layout: Layout,
    split: _Split,
    ratio: int,
    *operands: Array,
) -> tuple[Array, ...]:
    """`function` of what a device has; there are `ratio` query heads to each key/value head.

    Operands are sharded as `split` says, and so are the results.
    """
    if not split.group:
        return tuple(function(*operands))
    is_kv = [KV_HEADS in dims for dims in layout.operands]
    num_kv_heads = operands[is_kv.index(True)].shape[-2]
    index = _kv_heads_of_device(split.group, operands[0].shape[-2], ratio)

    def total(dx: Array) -> Array:
        """Gradients of key/value heads, from all devices that use some of them."""
        shape = (*dx.shape[:-2], num_kv_heads, dx.shape[-1])
        wide = dx.astype(jnp.promote_types(dx.dtype, jnp.float32))
        own = jnp.zeros_like(wide, shape=shape).at[..., index, :].add(wide)
        return lax.psum(own, split.group).astype(dx.dtype)

    taken = [jnp.take(x, index, -2) if kv else x for x, kv in zip(operands, is_kv, strict=True)]
    return tuple(
        total(x) if KV_HEADS in dims else x
        for x, dims in zip(function(*taken), layout.results, strict=True)
    )


def _kv_heads_of_device(group: Axes, num_heads: int, ratio: int) -> Array:
    """Which key/value heads this device's `num_heads` query heads use, of those that `group`
    shares: one for all, or one for each."""
    first = lax.axis_index(group) * num_heads
    count = 1 if ratio % num_heads == 0 else num_heads
    return (first + jnp.arange(count)) // ratio


# --- Explicit axes.
# ------------------


@dataclasses.dataclass(frozen=True)
class _Explicit:
    """How the types of operands split a call."""

    mesh: Any
    layout: Layout
    operands: tuple[_Sharded, ...]
    split: _Split
    ratio: int
    """Query heads to each key/value head."""

    @classmethod
    def of(cls, layout: Layout, avals: Sequence[ShapedArray]) -> _Explicit | None:
        """None without Explicit axes."""
        mesh = _mesh(avals)
        if AxisType.Explicit not in mesh.axis_types:
            return None
        operands = tuple(
            _Sharded(dims, tuple(map(_axes, x.sharding.spec)))
            for dims, x in zip(layout.operands, avals, strict=True)
        )
        sizes = layout.sizes([x.shape for x in avals])
        heads = sizes[HEADS], sizes[KV_HEADS]
        split = _Split.of(operands, avals[0].shape[:-3], heads, mesh.shape)
        return cls(mesh, layout, operands, split, heads[0] // heads[1])

    @property
    def results(self) -> list[P]:
        """A gradient is sharded as what it is of. Any other result's query length is split as q's,
        though the work isn't, so that it fits what else has q's type."""
        used = {*self.split.heads}.union(*self.split.batch)
        query_length = self.operands[0].of(QUERY_LENGTH) or ()
        query_length = () if used & {*query_length} else query_length
        own = {x.dims: P(*(axes or None for axes in x.axes)) for x in self.operands}
        return [own.get(x) or self.split.spec(x, query_length) for x in self.layout.results]


def match_sharding(x: Array, like: Array) -> Array:
    """`x`, sharded over Explicit axes as `like`, of which it is the gradient."""
    sharding = jax.typeof(like).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    return jax.sharding.reshard(x, sharding)


def _mesh(avals: Sequence[Any]) -> Any:
    """The mesh that types name: a constant may name none."""
    meshes = [x.sharding.mesh for x in avals]
    return next((mesh for mesh in meshes if mesh.axis_types), meshes[0])


def _names(mesh: Any, kind: AxisType) -> set[str]:
    return {name for name, x in zip(mesh.axis_names, mesh.axis_types, strict=True) if x == kind}


def _axes(entry: Any) -> Axes:
    """Of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return cast(Axes, entry) if isinstance(entry, tuple) else (entry,)


# --- Auto axes.
# --------------


def _has_devices(axis_context: Any) -> bool:
    """Whether the partitioner's callbacks can know them: they can't in a `shard_map` over some axes
    of an `AbstractMesh`."""
    return not isinstance(getattr(axis_context, "mesh", None), AbstractMesh)


def _warn_of_unpartitioned(axis_context: Any) -> None:
    mesh = getattr(axis_context, "mesh", None)
    if (axis_context.num_devices if mesh is None else mesh.size) > 1:
        _warn(
            "a call over Auto axes can't be split in a program that is exported, or that has no "
            "devices: every device computes all of it. Use Explicit axes, jax.set_mesh, or "
            "jax.shard_map"
        )


def _shardy_rule(
    op: Op, spec: Any, extras: Names, mesh: Mesh, operands: Sequence[Any], results: Sequence[Any]
) -> tuple[str, dict[str, Any]]:
    """Which dimensions are one factor: each of the batch, key/value heads `k`, and the query heads
    `n` of each of these."""
    del spec, mesh, results
    layout = op.layout(extras)
    sizes = layout.sizes([x.shape for x in operands])
    kv_heads, ratio = sizes[KV_HEADS], sizes[HEADS] // sizes[KV_HEADS]
    heads = "k" if ratio == 1 else "n" if kv_heads == 1 else "(k n)"
    batch = [f"b{i}" for i in range(len(operands[0].shape) - 3)]

    def text(arrays: Sequence[str]) -> str:
        factors = ((heads if x == HEADS else x.lower() for x in dims[1:]) for dims in arrays)
        return ", ".join(" ".join((*batch, *x)) for x in factors)

    # In the order of their first appearance, as Shardy's verifier wants it.
    whole = dict.fromkeys(x.lower() for dims in layout.operands for x in dims if x in _WHOLE)
    options: dict[str, Any] = {"need_replication_factors": tuple(whole)}
    if heads == "(k n)":
        options["n"] = ratio
    return f"{text(layout.operands)} -> {text(layout.results)}", options


def _partition(
    op: Op, spec: Any, extras: Names, mesh: Mesh, operands: Sequence[Any], results: Sequence[Any]
) -> tuple[Mesh, Callable[..., tuple[Array, ...]], Any, Any]:
    """`custom_partitioning`'s callback: a device's program, and what it has of each array.

    Propagation may split by parts of mesh axes. So here an axis is a prime factor of a mesh axis,
    or of the number of devices where the mesh isn't known: in a mesh with manual axes, XLA asks
    for the others alone.
    """
    layout = op.layout(extras)
    arrays = (*operands, *results)
    tiles = [_tiles(x.sharding, len(x.shape)) for x in arrays]
    num_devices = max(map(len, tiles))
    is_whole = mesh.size == num_devices
    mesh = _factored(mesh, operands[0].sharding, num_devices)
    sharded = [
        _Sharded(dims, _decode(x, mesh))
        for dims, x in zip((*layout.operands, *layout.results), tiles, strict=True)
    ]
    sizes = layout.sizes([x.shape for x in operands])
    heads = sizes[HEADS], sizes[KV_HEADS]
    split = _Split.of(sharded, operands[0].shape[:-3], heads, mesh.shape)
    if not is_whole:
        # Adding up a group's gradients would number devices of the whole mesh.
        split = dataclasses.replace(split, group=())
    split.warn_of_gathers(sharded[: len(operands)])

    def shardings(arrays: Sequence[str]) -> tuple[NamedSharding, ...]:
        return tuple(NamedSharding(mesh, split.spec(x)) for x in arrays)

    def function(*operands: Array) -> tuple[Array, ...]:
        # The caller's mesh, in whose context compilation may run, has nothing to say here.
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            fold = functools.partial(op.fold, spec, extras)
            return _local(fold, layout, split, heads[0] // heads[1], *operands)

    return mesh, function, shardings(layout.results), shardings(layout.operands)


def _factored(mesh: Mesh, sharding: Any, num_devices: int) -> Mesh:
    """`mesh` with an axis for each prime factor of its own; without a mesh, of `num_devices`."""
    is_whole = mesh.size == num_devices
    factors = _prime_factors(mesh.axis_sizes if is_whole else (num_devices,)) or [1]
    devices = mesh.devices.flat if is_whole else sorted(sharding.device_set, key=lambda x: x.id)
    devices = np.array(list(devices)[:num_devices]).reshape(factors)
    return Mesh(devices, tuple(f"axis{i}" for i in range(len(factors))))


def _prime_factors(sizes: Sequence[int]) -> list[int]:
    """Those of the first, then those of the next."""
    factors: list[int] = []
    for size in sizes:
        factor = 2
        while size > 1:
            if size % factor:
                factor += 1
            else:
                factors.append(factor)
                size //= factor
    return factors


def _tiles(sharding: Any, ndim: int) -> np.ndarray:
    """[devices, ndim]: which part of each dimension a device has, as XLA numbers both."""
    hlo = sharding._to_xla_hlo_sharding(ndim)
    if not hlo.is_tiled():
        return np.zeros((1, ndim), np.int64)
    sizes = hlo.tile_assignment_dimensions()
    tiles = np.empty((math.prod(sizes), len(sizes)), np.int64)
    tiles[np.array(hlo.tile_assignment_devices())] = list(np.ndindex(*sizes))
    return tiles[:, :ndim]


def _decode(tiles: np.ndarray, mesh: Mesh) -> tuple[Axes | None, ...]:
    """The axes of `mesh` that split each dimension."""
    tiles = np.broadcast_to(tiles, (mesh.size, tiles.shape[1]))
    return tuple(_decode_dimension(x.reshape(mesh.devices.shape), mesh) for x in tiles.T)


def _decode_dimension(tile: np.ndarray, mesh: Mesh) -> Axes | None:
    """The axes along which `tile`, a device's part, counts up; None if it does something else."""
    reach = [np.moveaxis(tile, i, -1)[..., -1].flat[0] for i in range(tile.ndim)]
    order = sorted((i for i in range(tile.ndim) if reach[i]), key=lambda i: -reach[i])
    sizes = [tile.shape[i] for i in order]
    counted = np.arange(math.prod(sizes)).reshape(*sizes, *[1] * (tile.ndim - len(sizes)))
    moved = np.moveaxis(tile, order, range(len(order)))
    if not np.array_equal(moved, np.broadcast_to(counted, moved.shape)):
        return None
    return tuple(mesh.axis_names[i] for i in order)
