# SPDX-License-Identifier: Apache-2.0
"""What a `Signature` means to the two compilers: fake tensors for CuTe DSL, thunks for C++.

Importing this module needs neither cutlass nor JAX; `fake_arguments` imports cutlass.
"""

from __future__ import annotations

import math
from typing import Any

from fa4_jax._variants import ROW_MULTIPLE, Buffer, DType, Variant

# XLA aligns every buffer to at least this; the C++ checks repeat it.
BUFFER_ALIGNMENT = 16


def buffer_dtype(variant: Variant, buffer: Buffer) -> DType:
    """The element type of one of the variant's buffers."""
    return buffer.dtype or variant.dtype


def static_stride(variant: Variant, buffer: Buffer, axis: int) -> int | None:
    """The row-major stride of `axis` where only static dimensions follow it, else None."""
    extents = [variant.static_dims.get(letter) for letter in buffer.dims[axis + 1 :]]
    return None if None in extents else math.prod(e for e in extents if e is not None)


def stride_divisor(variant: Variant, buffer: Buffer, axis: int) -> int:
    """What divides the row-major stride of `axis` whatever the run-time sizes are."""
    extents = {"R": ROW_MULTIPLE, **variant.static_dims}
    return math.prod(extents.get(letter, 1) for letter in buffer.dims[axis + 1 :])


def fake_arguments(variant: Variant) -> tuple[Any, ...]:
    """Arguments for `cute.compile` in the order of the C ABI: buffers, scalars, stream.

    Static dimensions and strides are ints; every other one is a run-time value of its tensor, with
    the divisibility that the layout guarantees, so that 16-byte copies and TMA are legal.
    """
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

    element = {DType.bf16: cutlass.BFloat16, DType.f16: cutlass.Float16, DType.f32: cutlass.Float32}
    scalar = {"f32": cutlass.Float32(1.0), "i32": cutlass.Int32(1)}

    def fake(buffer: Buffer) -> Any:
        shape, stride = [], []
        for axis, letter in enumerate(buffer.dims):
            divisor = ROW_MULTIPLE if letter == "R" else 1
            shape.append(variant.static_dims.get(letter) or cute.sym_int(divisibility=divisor))
            stride.append(
                static_stride(variant, buffer, axis)
                or cute.sym_int64(divisibility=stride_divisor(variant, buffer, axis))
            )
        return make_fake_tensor(
            element[buffer_dtype(variant, buffer)],
            tuple(shape),
            tuple(stride),
            assumed_align=BUFFER_ALIGNMENT,
        )

    buffers = [fake(buffer) for buffer in variant.signature.buffers]
    return (*buffers, *(scalar[s.kind] for s in variant.signature.scalars), make_fake_stream())
