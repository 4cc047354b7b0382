# SPDX-License-Identifier: Apache-2.0
"""What tests of JAX programs share: a comparison with float64, and a program's text for CUDA."""

from __future__ import annotations

import jax
import numpy as np

from fa4_jax._variants import Kernel, target_name


def assert_close(result, expected, message: str = "", tolerance: float = 1e-2) -> None:
    """Within `tolerance` of the largest magnitude: bf16 has 2^-8, and sums run in another order."""
    result, expected = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    assert result.shape == expected.shape, message
    assert np.array_equal(np.isfinite(result), np.isfinite(expected)), message
    finite = np.isfinite(expected)
    limit = tolerance * np.abs(expected[finite]).max(initial=1e-30)
    np.testing.assert_allclose(result[finite], expected[finite], 0, limit, err_msg=message)


def assert_tree_close(result, expected, message: str = "", tolerance: float = 1e-2) -> None:
    for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert_close(x, y, message, tolerance)


def cuda_text(function, *args) -> str:
    """StableHLO of `function` for CUDA; needs no GPU."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def count(text: str, kernel: Kernel) -> int:
    return text.count(f"custom_call @{target_name(kernel)}(")
