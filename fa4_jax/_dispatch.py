# SPDX-License-Identifier: Apache-2.0
"""Which path a call takes: rows of the table, or the reference, and every reason why.

What decides is, in this order, the call's own dtype, head dims and arrays (when it is traced), the
platform that its program is for (when that is lowered), and this process's GPUs and library. All
of it is decided here, and `fa4_jax.explain` traces a call and listens.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Generator, Sequence

import jax
import numpy as np
from jax import Array

from fa4_jax import _ffi, _reference, _variants
from fa4_jax._spec import AttentionSpec
from fa4_jax._untyped import jax_
from fa4_jax._variants import Arch, DType, Feature, Kernel

FORWARD_KERNELS = (Kernel.forward,)
BACKWARD_KERNELS = (Kernel.backward_preprocess, Kernel.backward, Kernel.backward_postprocess)

CUDA = "cuda"

_IO_DTYPES = {dtype.numpy_name: dtype for dtype in (DType.bf16, DType.f16)}


# --- Rows of the table.
# ----------------------


def missing_kernels(
    kernels: Sequence[Kernel], dtype: np.dtype, head_dims: tuple[int, int]
) -> tuple[str, ...]:
    """Why the table can't serve `kernels` for this dtype and (head_dim, head_dim_v), with padding;
    empty if it can."""
    io_dtype = _IO_DTYPES.get(np.dtype(dtype).name)
    if io_dtype is None:
        return (f"dtype {np.dtype(dtype).name} has no kernel (built: {', '.join(_IO_DTYPES)})",)
    for i, kernel in enumerate(kernels):
        if _padded(kernels[: i + 1], io_dtype, head_dims) is None:
            built = _common_head_dims(kernels[: i + 1], io_dtype)
            choices = ", ".join(map(head_dims_text, built)) or "none"
            got = head_dims_text(head_dims)
            return (f"head_dim {got} has no {io_dtype} {kernel} kernel (built: {choices})",)
    return ()


def padded_head_dims(
    kernels: Sequence[Kernel], dtype: np.dtype, head_dims: tuple[int, int]
) -> tuple[int, int]:
    """(head_dim, head_dim_v) of the rows that serve a call's: its own, or the cheapest that are
    no smaller."""
    padded = _padded(kernels, _IO_DTYPES[np.dtype(dtype).name], head_dims)
    assert padded, f"missing_kernels refuses head_dims {head_dims}"
    return padded


def _padded(
    kernels: Sequence[Kernel], io_dtype: DType, head_dims: tuple[int, int]
) -> tuple[int, int] | None:
    fitting = (
        row
        for row in _common_head_dims(kernels, io_dtype)
        if row[0] >= head_dims[0] and row[1] >= head_dims[1]
    )
    # Work grows with the sum: q k^T has head_dim, p v has head_dim_v.
    return min(fitting, key=lambda row: (sum(row), row), default=None)


def _common_head_dims(kernels: Sequence[Kernel], io_dtype: DType) -> list[tuple[int, int]]:
    """Pairs that each of `kernels` has a row for."""
    rows = [_variants.built_head_dims(kernel, io_dtype) for kernel in kernels]
    return [pair for pair in rows[0] if all(pair in other for other in rows[1:])]


def head_dims_text(head_dims: tuple[int, int]) -> str:
    """`128`, or `192/128` if v's differs."""
    return str(head_dims[0]) if head_dims[0] == head_dims[1] else f"{head_dims[0]}/{head_dims[1]}"


def features(kernel: Kernel, spec: AttentionSpec, has_interval: bool) -> tuple[Feature, ...]:
    """Those of the kernel's row that serves a call."""
    asked = {
        Feature.interval: has_interval,
        Feature.softcap: spec.softcap is not None,
        Feature.deterministic: spec.deterministic,
    }
    needed = (feature for feature, is_needed in asked.items() if is_needed)
    return _variants.feature_set(kernel, needed)


def kernel_name(
    kernel: Kernel,
    dtype: np.dtype,
    head_dims: tuple[int, int],
    row_features: tuple[Feature, ...] = (),
) -> str:
    """The arch-free name that a lowered program carries, e.g. `forward_bf16_d128`, of the row with
    exactly these head dims and features."""
    return _variants.kernel_key(kernel, _IO_DTYPES[np.dtype(dtype).name], head_dims, row_features)


# --- Programs and processes.
# ---------------------------


def program_reasons(
    platforms: str, require_kernel: bool, exporting: bool = False
) -> tuple[str, ...]:
    """Why a program for these platforms runs the reference; empty if it runs the kernels.

    `exporting`: it runs elsewhere, so this process's GPUs say nothing about it.

    Raises:
      NotImplementedError, LibraryError: it can't run the kernels, and has to.
    """
    if platforms != CUDA:
        if require_kernel:
            raise NotImplementedError(
                f'fa4_jax: implementation="fa4": got a program for platform {platforms}, expected '
                'cuda; use implementation=None, which runs the reference there, or "reference"'
            )
        return (f"the program is for platform {platforms}, and the kernels are CUDA's",)
    if require_kernel:
        _ffi.register()
    reasons = () if exporting else device_reasons()
    if require_kernel and reasons:
        raise NotImplementedError(f'fa4_jax: implementation="fa4": {"; ".join(reasons)}')
    return reasons if require_kernel else reasons + library_reasons()


def default_platform() -> str:
    """The platform of programs that say nothing else."""
    backend = jax.default_backend()
    return CUDA if backend == "gpu" else backend


def device_reasons() -> tuple[str, ...]:
    """Why the GPUs that this process knows of can't run what is built; empty if they can, or if
    there is none."""
    served = {arch.compute_capability for arch in _variants.served_arches()}
    choices = ", ".join(map(_capability_text, sorted(served)))
    unserved = sorted(set(_capabilities()) - served)
    return tuple(f"compute capability {unserved_text(x, choices)}" for x in unserved)


def unserved_text(capability: tuple[int, int], choices: str) -> str:
    """What the table has for a GPU that isn't served."""
    text = _capability_text(capability)
    if any(arch.compute_capability == capability for arch in Arch):
        return f"{text} has only some of the kernels, so none is used (complete: {choices})"
    return f"{text} has no kernel (built: {choices})"


def device_targets() -> tuple[str, ...]:
    """CUDA targets of the GPUs that this process knows of, e.g. `sm_90a`, where there are rows."""
    found = set(_capabilities())
    return tuple(arch.cuda_target for arch in Arch if arch.compute_capability in found)


def _capabilities() -> list[tuple[int, int]]:
    """Of all processes' GPUs, so that all of them lower one program the same way."""
    try:
        devices = jax_.devices(CUDA)
    except RuntimeError:
        return []
    return [capability_of(device.compute_capability) for device in devices]


def capability_of(text: str) -> tuple[int, int]:
    """(major, minor) of, for instance, "9.0"."""
    major, minor = text.split(".")
    return int(major), int(minor)


def _capability_text(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def library_reasons() -> tuple[str, ...]:
    """Why the kernel library can't be used; empty once its targets are registered."""
    try:
        _ffi.register()
    except _ffi.LibraryError as error:
        return (str(error),)
    return ()


# --- What `explain` hears.
# -------------------------

_heard: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    "fa4_jax_heard", default=None
)


@functools.cache
def _trace_context():
    """A value that jit's caches look at: within it, nothing that was traced before counts."""
    return jax.make_user_context(None)


@contextlib.contextmanager
def listen() -> Generator[list[str], None, None]:
    """Collects the paths of calls that are traced within, and keeps them from warning."""
    paths: list[str] = []
    token = _heard.set(paths)
    try:
        with _trace_context()(object()):
            yield paths
    finally:
        _heard.reset(token)


def fall_back(reasons: tuple[str, ...]) -> None:
    """Say that the reference runs, and why: as a warning, once, or to `explain`."""
    if _heard.get() is None:
        _reference.warn_fallback(reasons)


def tell(path: str) -> None:
    """Tell `explain` of a call's path."""
    paths = _heard.get()
    if paths is not None and path not in paths:
        paths.append(path)


def tell_of_kernels(spec: AttentionSpec, q: Array, k: Array, v: Array, has_interval: bool) -> None:
    """`tell` of a call that the table serves."""
    if _heard.get() is not None:
        tell(_kernels_path(spec, q, k, v, has_interval))


def _kernels_path(spec: AttentionSpec, q: Array, k: Array, v: Array, has_interval: bool) -> str:
    try:
        reasons = program_reasons(default_platform(), spec.require_kernel)
    except (NotImplementedError, _ffi.LibraryError) as error:
        return raises_text(error)
    if reasons:
        return f"reference: {'; '.join(reasons)}"
    if _reference.is_empty(q, k):
        return "nothing is launched: B, T or S is 0"
    head_dims = q.shape[-1], v.shape[-1]
    forward, gradient = (
        _rows_text(kernels, spec, q.dtype, head_dims, has_interval)
        for kernels in (FORWARD_KERNELS, BACKWARD_KERNELS)
    )
    return f"fa4 on {' and '.join(device_targets())}: {forward}; gradient: {gradient}"


def _rows_text(
    kernels: tuple[Kernel, ...],
    spec: AttentionSpec,
    dtype: np.dtype,
    head_dims: tuple[int, int],
    has_interval: bool,
) -> str:
    """The rows' names and what is padded for them, or why there are none."""
    if missing := missing_kernels(kernels, dtype, head_dims):
        return f"{'raises' if spec.require_kernel else 'reference'}: {', '.join(missing)}"
    padded = padded_head_dims(kernels, dtype, head_dims)
    names = ", ".join(
        kernel_name(kernel, dtype, padded, features(kernel, spec, has_interval))
        for kernel in kernels
    )
    if padded == head_dims:
        return names
    got, row = map(head_dims_text, (head_dims, padded))
    return f"{names} (head_dim {got} zero-padded to {row})"


def raises_text(error: Exception) -> str:
    """How `explain` says that a call raises."""
    return f"raises {type(error).__name__}: {str(error).removeprefix('fa4_jax: ')}"
