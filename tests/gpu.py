# SPDX-License-Identifier: Apache-2.0
"""What the tests on a GPU share: rows, shapes, poison, and the folding that lets few compiled
oracles judge many shapes.

Before a case the allocator's free memory is filled with NaN, in blocks of every size: results and
workspaces are then allocated from it, so an element that a kernel doesn't write, or a workspace
that it reads before writing, shows. Handing NaN-filled buffers to the calls themselves isn't
possible: results have no operands to alias.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from reference import Verdict

from fa4_jax import _dispatch
from fa4_jax._variants import VARIANTS, Arch, Kernel, Variant, served_arches


def arch_here() -> Arch:
    """The first GPU's if calls use its kernels. Else the first that they use, for the names of
    tests that are skipped."""
    served = served_arches()
    try:
        here = jax.devices("cuda")[0].compute_capability
    except RuntimeError:
        return served[0]
    return next((x for x in served if "{}.{}".format(*x.compute_capability) == here), served[0])


def skip_reason() -> str:
    """Why the tests of the kernels can't run here, or an empty string."""
    try:
        jax.devices("cuda")
    except RuntimeError:
        return "needs a CUDA device"
    return "; ".join(_dispatch.device_reasons())


def forward_rows(arch: Arch) -> list[Variant]:
    """Forward rows without features."""
    rows = (v for v in VARIANTS if v.kernel is Kernel.forward and v.arch is arch)
    return [v for v in rows if not v.features]


ROWS = forward_rows(arch_here())

# (batch, query heads, key/value heads): four (batch, key/value head) pairs each, of at most GROUP
# query heads.
HEADS = {"mha": (1, 4, 4), "gqa4": (2, 8, 2), "mqa": (4, 4, 1)}
GROUP = 4

NAMES = ("out", "lse", "dq", "dk", "dv")
# Autotuning would take longer than the work, and isn't what is tested.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": "0"}


def key_suffix(row: Variant) -> str:
    """What the keys of a forward and its backward share."""
    return row.key.removeprefix(str(row.kernel))


def poison() -> None:
    """Fill the allocator's free blocks of every size with NaN, 1.4 GiB in all, and free them
    again."""
    held = [
        jnp.full(2**power // 4, jnp.nan, jnp.float32)
        for power in range(28, 7, -1)
        for _ in range(2 if power > 26 else 4)
    ]
    jax.block_until_ready(held)


def record(worst: dict[str, tuple[float, str]], case: str, judged: list[Verdict]) -> None:
    """Keep the largest error over what is allowed, for the fixture `worst`."""
    for verdict in judged:
        ratio = verdict.error / verdict.allowed if verdict.allowed else math.inf
        worst[verdict.name] = max(worst.get(verdict.name, (-1.0, "")), (ratio, case))


def case_shapes(row: Variant, lengths: tuple[int, int], heads: str) -> tuple[tuple, tuple, tuple]:
    """Of q, k and v."""
    (seqlen_q, seqlen_k), (batch, num_q, num_kv) = lengths, HEADS[heads]
    return (
        (batch, seqlen_q, num_q, row.head_dim),
        (batch, seqlen_k, num_kv, row.head_dim),
        (batch, seqlen_k, num_kv, row.head_dim_v),
    )


def cotangents(rng: np.random.Generator, shapes: tuple, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """dout and dlse."""
    (batch, seqlen_q, num_q, _), _, (_, _, _, dim) = shapes
    dout = jnp.asarray(rng.standard_normal((batch, seqlen_q, num_q, dim)), dtype)
    return dout, jnp.asarray(rng.standard_normal((batch, num_q, seqlen_q)), jnp.float32)


def waves(x: jax.Array) -> jax.Array:
    """Weights that differ for every element, so that no sum hides a swap."""
    return jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)


def fold_keys(x: jax.Array, columns: int) -> jax.Array:
    """[B, S, K, D] -> [B K, columns, 1, D], rows beyond S zero."""
    batch, seqlen, heads, dim = x.shape
    x = x.transpose(0, 2, 1, 3).reshape(batch * heads, seqlen, 1, dim)
    return jnp.pad(x, ((0, 0), (0, columns - seqlen), (0, 0), (0, 0)))


def fold_queries(x: jax.Array, rows: int, num_kv: int, fill: float = 0.0) -> jax.Array:
    """[B, T, N, D] -> [B K, rows, 4, D]: heads by group, what pads is `fill`."""
    batch, seqlen, heads, dim = x.shape
    group = heads // num_kv
    x = x.reshape(batch, seqlen, num_kv, group, dim).transpose(0, 2, 1, 3, 4)
    x = x.reshape(batch * num_kv, seqlen, group, dim)
    widths = ((0, 0), (0, rows - seqlen), (0, GROUP - group), (0, 0))
    return jnp.pad(x, widths, constant_values=fill)


def fold_stats(x: jax.Array, rows: int, num_kv: int, fill: float = 0.0) -> jax.Array:
    """[B, N, T] -> [B K, 4, rows]."""
    x = fold_queries(x.transpose(0, 2, 1)[..., None], rows, num_kv, fill)
    return x[..., 0].transpose(0, 2, 1)
