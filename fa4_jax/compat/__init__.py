# SPDX-License-Identifier: Apache-2.0
"""The interfaces of other libraries, served by `fa4_jax`: one module for each library.

Each takes what its library's function takes, in that library's layout, scale and alignment of
masks, and honours every argument or raises; the few that only tune another machine's kernel are
ignored with one `IgnoredArgumentWarning`. `flax`, `tpu`, `splash` and `maxtext` import nothing but
JAX; `equinox` imports Equinox.
"""

from __future__ import annotations

from fa4_jax.compat._common import IgnoredArgumentWarning as IgnoredArgumentWarning
