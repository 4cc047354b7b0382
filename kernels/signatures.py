# SPDX-License-Identifier: Apache-2.0
"""What a `Signature` means to the two compilers: fake tensors for CuTe DSL, a table for C++.

Importing this module needs neither cutlass nor JAX; `fake_arguments` imports cutlass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from fa4_jax._variants import BLOCK, MAX_DIMENSION, ROW_MULTIPLE, Buffer, DType, Scalar, Variant

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
    """Arguments for `cute.compile` in the order of the C ABI: stream, scalars, buffers.

    A kernel whose operands depend on the row's features takes its buffers as varargs, and the DSL
    finds only a tensor's type without an annotation: they come last.

    Static dimensions and strides are ints; every other one is a run-time value of its tensor, with
    the divisibility that the layout guarantees, so that 16-byte copies and TMA are legal.
    """
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

    element = {
        DType.bf16: cutlass.BFloat16,
        DType.f16: cutlass.Float16,
        DType.f32: cutlass.Float32,
        DType.i32: cutlass.Int32,
    }
    scalar = {"f32": cutlass.Float32(1.0), "i32": cutlass.Int32(1), "sms": cutlass.Int32(1)}

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
    return (make_fake_stream(), *(scalar[s.kind] for s in variant.signature.scalars), *buffers)


_C_TYPES = {"f32": "float", "i32": "int32_t", "sms": "int32_t"}
_FFI_DTYPES = {DType.bf16: "BF16", DType.f16: "F16", DType.f32: "F32", DType.i32: "S32"}

# What a scalar may be, in the terms of ffi/registry.h: every f32 is finite and > 0; an i32 lies
# between minus one size and another.
_I32_BOUNDS = {"band_lower": "TS", "band_upper": "TS"}


def expected_parameters(variant: Variant) -> list[tuple[str, int, int]]:
    """(C type, run-time sizes, run-time strides) of each parameter of the exported wrapper."""
    parameters = [("cudaStream_t", 0, 0)]
    parameters += [(_C_TYPES[scalar.kind], 0, 0) for scalar in variant.signature.scalars]
    for buffer in variant.signature.buffers:
        axes = range(len(buffer.dims))
        sizes = sum(letter not in variant.static_dims for letter in buffer.dims)
        strides = sum(static_stride(variant, buffer, axis) is None for axis in axes)
        parameters.append(("tensor", sizes, strides))
    return parameters


def header_parameters(header: str, name: str) -> list[tuple[str, int, int]]:
    """The same, as the header that the DSL exported under the prefix `name` declares it."""
    structs = {
        struct: (int(sizes or 0), int(strides or 0))
        for sizes, strides, struct in re.findall(
            r"typedef struct \{\s*void \*data;\s*(?:int32_t dynamic_shapes\[(\d+)\];\s*)?"
            r"(?:int64_t dynamic_strides\[(\d+)\];\s*)?\} (\w+);",
            header,
        )
    }
    wrapper = re.search(rf"cute_dsl_{name}_wrapper\(\w+ \*module, (.*?)\) \{{", header)
    if wrapper is None:
        raise ValueError(f"the header of {name} declares no wrapper")
    types = [parameter.replace("*", " ").split()[0] for parameter in wrapper.group(1).split(",")]
    return [("tensor", *structs[t]) if t in structs else (t, 0, 0) for t in types]


def check_header(variant: Variant, header: str) -> None:
    """Raise ValueError unless the exported C ABI is the one that ffi/launch.cc fills in."""
    got, expected = header_parameters(header, variant.name), expected_parameters(variant)
    if got != expected:
        raise ValueError(
            f"the exported signature of {variant.name} doesn't match its Signature: got {got}, "
            f"expected {expected}; does __call__ take the stream, the scalars and the buffers?"
        )
    launch = f"_mlir_{variant.name}__mlir_ciface_launch"
    if launch not in header:
        raise ValueError(f"the header of {variant.name} doesn't declare {launch}")


def registry_source(variants: Iterable[Variant]) -> str:
    """The C++ file that defines `fa4_jax::Registry()` for these rows."""
    rows = sorted(variants, key=lambda v: (v.key, v.arch.compute_capability))
    declarations = "\n".join(
        f"void _mlir_{v.name}__mlir_ciface_launch(void** args, int32_t num_args);\n"
        f"void _mlir_{v.name}_cuda_init(void** args);\n"
        f"void _mlir_{v.name}_cuda_load_to_device(void** args);"
        for v in rows
    )
    names = "\n".join(f'    "{v.name}\\n"' for v in rows)
    return f"""\
// SPDX-License-Identifier: Apache-2.0
// Generated by kernels/build.py from fa4_jax/_variants.py.
#include <cstdint>

#include "registry.h"

extern "C" {{
{declarations}
}}

namespace fa4_jax {{
namespace {{

using ffi::DataType;

{"".join(_row_arrays(v) for v in rows)}
constexpr Kernel kKernels[] = {{
{"".join(_row_entry(v) for v in rows)}}};

}}  // namespace

List<Kernel> Registry() {{ return kKernels; }}

const int64_t kMaxDimension = {MAX_DIMENSION};

const char* KernelNames() {{
  return
{names};
}}

}}  // namespace fa4_jax
"""


def _row_arrays(variant: Variant) -> str:
    """The arrays that the row's entry points to."""
    signature = variant.signature
    position = {buffer.name: i for i, buffer in enumerate(signature.buffers)}
    arrays = {
        ("Buffer", "Buffers"): [_buffer(variant, buffer) for buffer in signature.buffers],
        ("int", "Results"): [str(position[result.name]) for result in signature.results],
        ("DimRule", "Rules"): _rules(variant),
        ("Scalar", "Scalars"): [_scalar(scalar) for scalar in signature.scalars],
    }
    text = "".join(
        f"constexpr {kind} {array}_{variant.name}[] = {{\n"
        + "".join(f"    {item},\n" for item in items)
        + "};\n"
        for (kind, array), items in arrays.items()
        if items
    )
    return f"{text}Module module_{variant.name};\n\n"


def _buffer(variant: Variant, buffer: Buffer) -> str:
    dims = ", ".join(f"{{'{d}', {variant.static_dims.get(d, 0)}}}" for d in buffer.dims)
    dtype = _FFI_DTYPES[buffer_dtype(variant, buffer)]
    zeroed = ", true" if buffer.zeroed else ""
    return f'{{"{buffer.name}", DataType::{dtype}, {len(buffer.dims)}, {{{dims}}}{zeroed}}}'


def _rules(variant: Variant) -> list[str]:
    letters = set("".join(buffer.dims for buffer in variant.signature.buffers))
    rules = []
    if letters >= {"N", "K"}:
        rules.append("{DimRule::kMultipleOf, 'N', 'K'}")
    if letters >= {"R", "T"}:
        rules.append(f"{{DimRule::kRoundedUp, 'R', 'T', {ROW_MULTIPLE}}}")
    for blocks, length in (("M", "T"), ("J", "S")):
        if letters >= {blocks, length}:
            rules.append(f"{{DimRule::kBlocks, '{blocks}', '{length}', {BLOCK}}}")
    if letters >= {"Z", "B"}:
        rules.append("{DimRule::kSameOrZero, 'Z', 'B'}")
    return rules


def _scalar(scalar: Scalar) -> str:
    if scalar.kind == "f32":
        return f'{{Scalar::kPositiveF32, "{scalar.name}"}}'
    if scalar.kind == "sms":
        return f'{{Scalar::kNumSms, "{scalar.name}"}}'
    lower, upper = _I32_BOUNDS[scalar.name]
    return f"{{Scalar::kBoundedI32, \"{scalar.name}\", '{lower}', '{upper}'}}"


def _row_entry(variant: Variant) -> str:
    name, (major, minor) = variant.name, variant.arch.compute_capability
    rules = f"Rules_{name}" if _rules(variant) else "{}"
    scalars = f"Scalars_{name}" if variant.signature.scalars else "{}"
    return f"""\
    {{"{variant.key}", "{name}", {major}, {minor},
     Buffers_{name}, {len(variant.signature.operands)}, Results_{name}, {rules}, {scalars},
     _mlir_{name}__mlir_ciface_launch, _mlir_{name}_cuda_init, _mlir_{name}_cuda_load_to_device,
     &module_{name}}},
"""
