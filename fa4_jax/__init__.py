# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-4 for JAX: `fa4_jax.flash_attention(q, k, v, causal=True)`.

Names load on first use, so that the build can read `fa4_jax._variants` where JAX isn't installed,
and so that importing the package needs neither a GPU nor the kernel library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fa4_jax._api import dot_product_attention as dot_product_attention
    from fa4_jax._api import export_disabled_checks as export_disabled_checks
    from fa4_jax._api import flash_attention as flash_attention
    from fa4_jax._api import flash_attention_varlen as flash_attention_varlen
    from fa4_jax._context_parallel import context_parallel_attention as context_parallel_attention
    from fa4_jax._context_parallel import (
        inverse_reorder_causal_load_balancing as inverse_reorder_causal_load_balancing,
    )
    from fa4_jax._context_parallel import (
        reorder_causal_load_balancing as reorder_causal_load_balancing,
    )
    from fa4_jax._explain import Support as Support
    from fa4_jax._explain import explain as explain
    from fa4_jax._explain import is_supported as is_supported
    from fa4_jax._ffi import LibraryError as LibraryError
    from fa4_jax._ffi import register as register
    from fa4_jax._reference import FallbackWarning as FallbackWarning
    from fa4_jax._sharding import ShardingWarning as ShardingWarning

_HOMES = {
    "Support": "_explain",
    "dot_product_attention": "_api",
    "explain": "_explain",
    "export_disabled_checks": "_api",
    "flash_attention": "_api",
    "flash_attention_varlen": "_api",
    "is_supported": "_explain",
    "context_parallel_attention": "_context_parallel",
    "inverse_reorder_causal_load_balancing": "_context_parallel",
    "reorder_causal_load_balancing": "_context_parallel",
    "LibraryError": "_ffi",
    "register": "_ffi",
    "FallbackWarning": "_reference",
    "ShardingWarning": "_sharding",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
