# SPDX-License-Identifier: Apache-2.0
"""The table's element types as CuTe DSL types."""

import cutlass

from fa4_jax._variants import DType

_ELEMENT_TYPES = {
    DType.bf16: cutlass.BFloat16,
    DType.f16: cutlass.Float16,
    DType.f32: cutlass.Float32,
}


def element_type(dtype: DType) -> type[cutlass.Numeric]:
    """The CuTe DSL type of a table dtype."""
    return _ELEMENT_TYPES[dtype]
