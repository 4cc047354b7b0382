# SPDX-License-Identifier: Apache-2.0
"""What a call would do in this process, without running it: `is_supported` and `explain`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, Unpack, overload

import jax
from jax import Array
from jax.typing import ArrayLike

from fa4_jax import _api, _dispatch
from fa4_jax._api import AllFlashOptions
from fa4_jax._ffi import LibraryError
from fa4_jax._untyped import jax_, tree

P = ParamSpec("P")
ArrayOrShape = ArrayLike | jax.ShapeDtypeStruct


class Support(NamedTuple):
    """Whether the FA4 kernels can serve a call here, and if not, every reason."""

    ok: bool
    reasons: tuple[str, ...] = ()


def is_supported(
    q: ArrayOrShape, k: ArrayOrShape, v: ArrayOrShape, **options: Unpack[AllFlashOptions]
) -> Support:
    """Whether `flash_attention(q, k, v, **options, implementation="fa4")` would run in this
    process.

    Args:
      q: as in `flash_attention`, as are k and v; `jax.ShapeDtypeStruct`s will do.
      k: as in `flash_attention`.
      v: as in `flash_attention`.
      **options: as in `flash_attention`. `implementation` is ignored.

    Returns:
      `Support(ok, reasons)`: the reasons name what the kernels lack for this call, then what this
      process lacks (a CUDA device, its architecture, the library).

    Raises:
      TypeError, ValueError: the call is malformed, so it is a mistake rather than unsupported.
    """
    reasons: tuple[str, ...] = ()

    def check(*args: Any, **kwargs: Any) -> None:
        nonlocal reasons
        reasons = _api.check(*args, **kwargs).reasons

    try:
        _trace(check, q, k, v, **options)
    except NotImplementedError as error:
        reasons = (str(error).removeprefix("fa4_jax: "),)
    platform = _dispatch.default_platform()
    reasons += _dispatch.program_reasons(platform, require_kernel=False)
    return Support(not reasons, reasons)


@overload
def explain(
    q: ArrayOrShape, k: ArrayOrShape, v: ArrayOrShape, /, **options: Unpack[AllFlashOptions]
) -> str: ...
@overload
def explain(function: Callable[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> str: ...
def explain(*args: Any, **kwargs: Any) -> str:
    """What a call of attention would run in this process, and why.

        explain(q, k, v, causal=True)                              # of flash_attention
        explain(fa4_jax.dot_product_attention, q, k, v, mask=mask)
        explain(train_step, parameters, batch)                     # of whatever calls attention

    The function is traced, as `jax.jit` would, and nothing runs. What is told is what its calls of
    this package themselves decide, whether they are functions of `fa4_jax`, of `fa4_jax.compat` or
    `context_parallel_attention` inside a `jax.shard_map`.

    Args:
      *args: the operands of `flash_attention`; or a function and its arguments.
        `jax.ShapeDtypeStruct`s will do for arrays.
      **kwargs: keywords of the same function. `implementation` counts.

    Returns:
      One line for each path that the calls take:
      "fa4 on sm_90a: forward_bf16_d128; gradient: ...", the GPUs' CUDA target and the kernels, by
      their names in `fa4_jax/_variants.py`;
      "reference: ...", with every reason;
      "raises ...", the error of `implementation="fa4"`;
      "nothing is launched: ..."; or that there is no such call.

    Raises:
      TypeError, ValueError: as the call, if it is malformed; and what the function itself raises.
    """
    function, operands = (args[0], args[1:]) if callable(args[0]) else (_api.flash_attention, args)
    with _dispatch.listen() as paths:
        try:
            _trace(function, *operands, **kwargs)
        except (NotImplementedError, LibraryError) as error:
            paths.append(_dispatch.raises_text(error))
    return "\n".join(paths) or "no call of fa4_jax"


def _trace(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Trace a call, in which `jax.ShapeDtypeStruct`s stand for arrays and all else is as given."""
    leaves, structure = tree.flatten((args, kwargs))
    is_shape = [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]

    def call(*arrays: Array) -> None:
        if not arrays:
            function(*args, **kwargs)
            return
        given = iter(arrays)
        filled = (next(given) if x else leaf for x, leaf in zip(is_shape, leaves, strict=True))
        all_args, all_kwargs = tree.unflatten(structure, list(filled))
        function(*all_args, **all_kwargs)

    shapes = (leaf for x, leaf in zip(is_shape, leaves, strict=True) if x)
    jax_.eval_shape(call, *shapes)
