# SPDX-License-Identifier: Apache-2.0
"""How a mesh splits an attention call: by batch and by heads, never by length or head dim.

Batch entries and key/value heads are independent, so a device that has some of them needs nothing
of another. Query heads may be split finer than key/value heads: a device then takes the key/value
heads that its query heads use, and gradients of those are summed over the devices that share them.
Operands that are sharded over a length or a head dim are gathered first, with a `ShardingWarning`.

Two routes lead there, chosen by the types of the mesh's axes:

* Auto axes: shardings aren't known before XLA's partitioner runs. A primitive made by `define`
  stands for the call until then; its lowering is `custom_partitioning` with a Shardy rule, and on
  one device or inside `shard_map` it is the local primitive, with nothing in between. The rule
  gives factors of length and head dim as "needing replication", but that only keeps them from
  being propagated: it is `_partition` that says what a device gets.
* Explicit axes: types carry shardings, so `over_explicit_axes` is a `shard_map`, which keeps them,
  exports for several devices, and is cached between processes. `custom_partitioning` does none of
  these (its configuration is the address of a Python object).

Both run `_local` on a device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fa4_jax._reference import caller_level

Axes = tuple[str, ...]

BATCH, HEADS, KV_HEADS = "B", "N", "K"
_WHOLE = {"T": "query length", "S": "key length", "D": "head_dim", "V": "v's head_dim"}
"""What a device needs whole."""


class ShardingWarning(UserWarning):
    """Attention runs on operands that have to be gathered first: their sharding doesn't split its
    work."""


_warned: set[str] = set()


@dataclasses.dataclass(frozen=True)
class Layout:
    """The dimensions of a call's operands and results, by the letters of `_variants`.

    The first operand is q. Each has one batch dimension, or as many as `vmap` made of it.
    """

    operands: tuple[str, ...]
    results: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Split:
    """Mesh axes that split a call."""

    batch: tuple[Axes, ...]
    """One entry for each batch dimension."""
    kv_heads: Axes
    """Split key/value heads, and query heads likewise."""
    group: Axes
    """Split the query heads of a device's key/value heads further."""

    def spec(self, dims: str, length: Sequence[str] = ()) -> P:
        """Of an operand or a result, on a device's way in or out. With `length`, of one whose query
        length is split afterwards."""
        heads = self.kv_heads + self.group
        axes = {HEADS: heads, KV_HEADS: self.kv_heads, "T": tuple(length)}
        batch = self.batch if BATCH in dims else ()
        rest = (axes.get(letter, ()) for letter in dims.removeprefix(BATCH))
        return P(*(x or None for x in (*batch, *rest)))

    @property
    def axes(self) -> set[str]:
        return set().union(*self.batch, self.kv_heads, self.group)


_Sharded = Sequence[tuple[str, Sequence[Axes | None]]]
"""Arrays' dimensions and the mesh axes of each. None: not whole axes, as far as is known."""


def _split(
    arrays: _Sharded, sizes: Mapping[str, int], mesh_shape: Mapping[str, int], has_groups: bool
) -> _Split:
    """What the shardings of `arrays`, of which the first counts most, leave to split.

    An axis that doesn't divide what it splits is left out, with all that follow it. `sizes` are
    those of q's dimensions by position and of the heads by letter. Without `has_groups`, heads that
    would have to be summed are left out, too.
    """
    used: set[str] = set()

    def take(size: int, axes: Axes) -> Axes:
        axes = _dividing(size, [x for x in axes if x not in used], mesh_shape)
        used.update(axes)
        return axes

    num_batch = len(arrays[0][1]) - len(arrays[0][0]) + 1
    batch = [
        take(sizes[f"{BATCH}{i}"], _first(axes[i] for dims, axes in arrays if BATCH in dims))
        for i in range(num_batch)
    ]
    heads = _first(
        axes[dims.index(letter) - len(dims)]
        for letter in (HEADS, KV_HEADS)
        for dims, axes in arrays
        if letter in dims
    )
    heads = take(sizes[HEADS], heads)
    kv_heads = _dividing(sizes[KV_HEADS], heads, mesh_shape)
    group = heads[len(kv_heads) :] if has_groups else ()
    return _Split(tuple(batch), kv_heads, group)


def _first(candidates: Iterable[Axes | None]) -> Axes:
    return next((axes for axes in candidates if axes), ())


def _dividing(size: int, axes: Sequence[str], mesh_shape: Mapping[str, int]) -> Axes:
    """The first of `axes`, as many as together divide `size`."""
    count = 1
    for i, axis in enumerate(axes):
        count *= mesh_shape[axis]
        if size % count:
            return tuple(axes[:i])
    return tuple(axes)


def _sizes(layout: Layout, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """By letter, and of batch dimensions by letter and position."""
    num_batch = len(shapes[0]) - len(layout.operands[0]) + 1
    sizes = {f"{BATCH}{i}": shapes[0][i] for i in range(num_batch)}
    for dims, shape in zip(layout.operands, shapes, strict=True):
        rest = dims.removeprefix(BATCH)
        sizes |= dict(zip(rest, shape[-len(rest) :], strict=True))
    return sizes


def _local(
    function: Callable, layout: Layout, split: _Split, ratio: int, *operands: Array
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


def define(
    name: str,
    local: Primitive,
    abstract: Callable[..., Sequence[ShapedArray]],
    layout: Callable[[tuple[str, ...]], Layout],
    checks: Mapping[str | None, Callable],
) -> Primitive:
    """A primitive `name` that is `local`, partitioned over Auto axes.

    Its operands may have any number of batch dimensions, so that each can be sharded; `local` gets
    one, whose abstract evaluation is `abstract`. Its parameters are `local`'s: `spec`, and
    `extras`, of which `layout` is a function. `checks` are called with the lowering context and
    `spec` when a platform (None: any other) is lowered for: what runs inside the partitioner can't
    raise well.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    prim_requires_devices_during_lowering.add(primitive)

    def abstract_evaluation(*avals: ShapedArray, **parameters: Any) -> list[ShapedArray]:
        lead = avals[0].shape[:-3]
        folded = (whole_like(x, (math.prod(lead), *x.shape[len(lead) :])) for x in avals)
        results = abstract(*folded, **parameters)
        return [whole_like(x, (*lead, *x.shape[1:])) for x in results]

    def fold(spec: Any, extras: tuple, *operands: Array) -> tuple[Array, ...]:
        """`local`, with the batch dimensions as one."""
        lead = operands[0].shape[:-3]
        folded = (x.reshape(math.prod(lead), *x.shape[len(lead) :]) for x in operands)
        results = local.bind(*folded, spec=spec, extras=extras)
        return tuple(x.reshape(*lead, *x.shape[1:]) for x in results)

    partitioned = custom_partitioning(fold, static_argnums=(0, 1))
    partitioned.def_partition(
        functools.partial(_partition, layout, fold),
        decode_shardings=False,
        sharding_rule=functools.partial(_shardy_rule, layout),
    )

    def rule(check: Callable, ctx: mlir.LoweringRuleContext, *operands, spec: Any, extras: tuple):
        check(ctx, spec)
        # An exported program can't hold the partitioner's callbacks. XLA replicates what it has
        # no rule for.
        exporting = ctx.module_context.lowering_parameters.for_export
        chosen = fold if exporting else partitioned
        lower = mlir.lower_fun(functools.partial(chosen, spec, extras), multiple_results=True)
        return lower(ctx, *operands)

    primitive.def_abstract_eval(abstract_evaluation)
    # Outside jit, a call is a jitted one: compiled once for each shape and spec.
    primitive.def_impl(jax.jit(primitive.bind, static_argnames=("spec", "extras")))
    for platform, check in checks.items():
        mlir.register_lowering(primitive, functools.partial(rule, check), platform=platform)
    batching.primitive_batchers[primitive] = functools.partial(_add_batch_dimension, primitive)
    return primitive


def check_varying(name: str, *avals: ShapedArray) -> None:
    """ValueError unless operands vary over the same manual axes."""
    if len({aval.manual_axis_type.varying for aval in avals}) > 1:
        raise ValueError(f"fa4_jax: operands of {name} vary over different mesh axes: {avals}")


def whole_like(
    aval: ShapedArray, shape: Sequence[int], dtype: np.dtype | None = None
) -> ShapedArray:
    """The type of an array that no Explicit axis splits, and that varies over the same manual axes
    as `aval`."""
    return aval.update(
        shape=tuple(shape),
        dtype=dtype or aval.dtype,
        weak_type=False,
        sharding=NamedSharding(aval.sharding.mesh, P(*[None] * len(shape))),
    )


def bind(partitioned: Primitive, local: Primitive, *operands: Array, **parameters: Any):
    """`partitioned`, made by `define`; `local` where every mesh axis is manual, so that programs
    without devices (on an `AbstractMesh`) lower."""
    mesh = jax.typeof(operands[0]).sharding.mesh
    is_manual = mesh.axis_types and all(x == AxisType.Manual for x in mesh.axis_types)
    return (local if is_manual else partitioned).bind(*operands, **parameters)


def _add_batch_dimension(primitive: Primitive, operands, axes, **parameters):
    """vmap: the mapped axis leads."""
    mapped = ((x, axis) for x, axis in zip(operands, axes, strict=True) if axis is not None)
    size = next(x.shape[axis] for x, axis in mapped)

    def lead(x: Array, axis: int | None) -> Array:
        return jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)

    results = primitive.bind(*map(lead, operands, axes), **parameters)
    return results, [0] * len(results)


def _shardy_rule(
    layout: Callable, spec: Any, extras: tuple, mesh: Mesh, operands, results
) -> tuple[str, dict]:
    """Which dimensions of operands and results are one factor: batch, key/value heads `k`, and the
    query heads `g` of each."""
    del spec, mesh
    dims = layout(extras)
    sizes = _sizes(dims, [x.shape for x in operands])
    num_batch = len(operands[0].shape) - 3
    batch = " ".join(f"b{i}" for i in range(num_batch))
    kv_heads, ratio = sizes[KV_HEADS], sizes[HEADS] // sizes[KV_HEADS]
    options: dict[str, Any] = {}
    heads = {(True, False): "k", (False, True): "g", (False, False): "k"}.get(
        (kv_heads > 1, ratio > 1), "(k g)"
    )
    if heads == "(k g)":
        options["g"] = ratio
    letters = {HEADS: heads, KV_HEADS: "k"}

    def text(arrays: Sequence[str]) -> str:
        names = (" ".join(letters.get(x, x.lower()) for x in dims[1:]) for dims in arrays)
        return ", ".join(f"{batch} {x}" for x in names)

    # In the order of their first appearance, which Shardy's verifier asks for.
    whole = dict.fromkeys(x.lower() for array in dims.operands for x in array if x in _WHOLE)
    options["need_replication_factors"] = tuple(whole)
    return f"{text(dims.operands)} -> {text(dims.results)}", options


def _partition(
    layout: Callable, fold: Callable, spec: Any, extras: tuple, mesh: Mesh, operands, results
):
    """custom_partitioning's callback: the program of one device and what it has of each array.

    Propagation may have split anything by parts of mesh axes, and in a partly manual mesh only the
    rest of it is here. So axes are prime factors of the number of devices, in their order.
    """
    dims = layout(extras)
    tiles = [_tiles(x.sharding, len(x.shape)) for x in (*operands, *results)]
    num_devices = max(len(x) for x in tiles)
    is_whole = mesh.size == num_devices
    factors = _prime_factors(mesh.axis_sizes if is_whole else (num_devices,))
    names = tuple(f"axis{i}" for i in range(len(factors)))
    devices = mesh.devices.flat if is_whole else operands[0].sharding.device_set
    mesh = Mesh(np.array(list(devices)[:num_devices]).reshape(factors), names)
    arrays = [
        (x, _decode(positions, mesh))
        for x, positions in zip((*dims.operands, *dims.results), tiles, strict=True)
    ]
    sizes = _sizes(dims, [x.shape for x in operands])
    # A collective here would have to number devices of the whole mesh.
    split = _split(arrays, sizes, mesh.shape, has_groups=is_whole)
    _warn_of_gathers(arrays[: len(operands)], split)

    def shardings(arrays: Sequence[str]) -> tuple[NamedSharding, ...]:
        return tuple(NamedSharding(mesh, split.spec(x)) for x in arrays)

    function = functools.partial(
        _local,
        functools.partial(fold, spec, extras),
        dims,
        split,
        sizes[HEADS] // sizes[KV_HEADS],
    )
    return mesh, function, shardings(dims.results), shardings(dims.operands)


def _tiles(sharding: Any, ndim: int) -> np.ndarray:
    """[devices, ndim]: which part of each dimension a device has, as XLA numbers both."""
    hlo = sharding._to_xla_hlo_sharding(ndim)
    if not hlo.is_tiled():
        return np.zeros((1, ndim), np.int64)
    sizes = hlo.tile_assignment_dimensions()
    where = np.empty((math.prod(sizes), len(sizes)), np.int64)
    where[np.array(hlo.tile_assignment_devices())] = list(np.ndindex(*sizes))
    return where[:, :ndim]


def _decode(tiles: np.ndarray, mesh: Mesh) -> list[Axes | None]:
    """The axes of `mesh` that split each dimension; None where whole axes don't."""
    tiles = np.broadcast_to(tiles, (mesh.size, tiles.shape[1]))
    tiles = tiles.reshape(*mesh.devices.shape, tiles.shape[1])
    return [_decode_dimension(tiles[..., i], mesh) for i in range(tiles.shape[-1])]


def _decode_dimension(tile: np.ndarray, mesh: Mesh) -> Axes | None:
    reach = [int(np.moveaxis(tile, i, -1)[..., -1].flat[0]) for i in range(tile.ndim)]
    order = sorted((i for i in range(tile.ndim) if reach[i]), key=lambda i: -reach[i])
    moved = np.moveaxis(tile, order, range(len(order)))
    count = math.prod(moved.shape[: len(order)])
    expected = np.arange(count).reshape(*moved.shape[: len(order)], *[1] * (tile.ndim - len(order)))
    if not np.array_equal(moved, np.broadcast_to(expected, moved.shape)):
        return None
    return tuple(mesh.axis_names[i] for i in order)


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


def over_explicit_axes(
    function: Callable, layout: Layout, static: tuple, *operands: Array
) -> Sequence[Array]:
    """`function(*static, *operands)`, by each device for what the Explicit axes give it.

    Without such axes, the function as it is.
    """
    if _explicit_mesh(operands) is None:
        return function(*static, *operands)
    return _over_explicit_axes(function, layout, static, *operands)


def _explicit_mesh(operands: Sequence[Array]) -> Any:
    """The mesh that operands' types name, if it has Explicit axes."""
    meshes = (jax.typeof(x).sharding.mesh for x in operands)
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _over_explicit_axes(
    function: Callable, layout: Layout, static: tuple, *operands: Array
) -> tuple[Array, ...]:
    mesh = _explicit_mesh(operands)
    specs = [jax.typeof(x).sharding.spec for x in operands]
    arrays = [(dims, list(map(_axes, x))) for dims, x in zip(layout.operands, specs, strict=True)]
    sizes = _sizes(layout, [x.shape for x in operands])
    split = _split(arrays, sizes, mesh.shape, has_groups=True)
    _warn_of_gathers(arrays, split)

    def put(x: Array, spec: P) -> Array:
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))

    def result_spec(dims: str) -> P:
        if dims in layout.operands:  # A gradient has the type of what it is of.
            return specs[layout.operands.index(dims)]
        return split.spec(dims, length=[x for x in arrays[0][1][1] if x not in split.axes])

    local = functools.partial(
        _local,
        functools.partial(function, *static),
        layout,
        split,
        sizes[HEADS] // sizes[KV_HEADS],
    )
    in_specs = tuple(map(split.spec, layout.operands))
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=tuple(map(split.spec, layout.results)),
        axis_names=_axes_of_type(mesh, AxisType.Explicit),
    )
    results = mapped(*map(put, operands, in_specs))
    return tuple(put(x, result_spec(y)) for x, y in zip(results, layout.results, strict=True))


def _axes_of_type(mesh: Any, kind: AxisType) -> set[str]:
    return {name for name, x in zip(mesh.axis_names, mesh.axis_types, strict=True) if x == kind}


def _axes(entry: Any) -> Axes:
    """Of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _warn_of_gathers(arrays: _Sharded, split: _Split) -> None:
    """Once for each way in which operands don't fit the split."""
    names = [
        *(_WHOLE[x] for x in _WHOLE if any(_is_sharded(x, array) for array in arrays)),
        *_left_out(arrays[0], split),
    ]
    text = (
        f"fa4_jax: attention's operands are sharded over {', '.join(names)}, which doesn't split "
        "its work: they are gathered, and devices repeat each other's work. Shard batch or heads; "
        "for a sequence that one device can't hold, call fa4_jax.context_parallel_attention."
    )
    if names and text not in _warned:
        _warned.add(text)
        warnings.warn(text, ShardingWarning, stacklevel=caller_level())


def _is_sharded(letter: str, array: tuple[str, Sequence[Axes | None]]) -> bool:
    dims, axes = array
    return letter in dims and axes[dims.index(letter) - len(dims)] != ()


def _left_out(q: tuple[str, Sequence[Axes | None]], split: _Split) -> list[str]:
    """Which of q's batch and heads had axes that don't split them evenly."""
    dims, axes = q
    kept = {BATCH: split.batch, HEADS: [split.kv_heads + split.group]}
    had = {BATCH: axes[: len(split.batch)], HEADS: [axes[dims.index(HEADS) - len(dims)]]}
    names = {BATCH: "batch, unevenly", HEADS: "query heads, unevenly"}
    return [
        names[x]
        for x in names
        if any(a != b and a != () for a, b in zip(had[x], kept[x], strict=True))
    ]
