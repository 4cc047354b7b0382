# SPDX-License-Identifier: Apache-2.0
"""Which role a warp has: read from the table in the docstring of its kernel's file.

warps      role      ...
0          load
1-3        idle
4 ...      consume
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable

from fa4_jax._variants import Variant
from kernels import build

from .artifacts import ROOT

_ROW = re.compile(r"^\s+(\d+)(?:-(\d+)|( \.\.\.))?\s+([a-z]\w*)(?:\s|$)")


def of(variant: Variant) -> Callable[[int], str]:
    """Warp number to role; `all` where the file has no table."""
    module = build.entry_point(variant).partition(":")[0]
    table = _table(module)

    def role(warp: int) -> str:
        for first, last, name in table:
            if first <= warp <= last:
                return name
        return "all"

    return role


@functools.cache
def _table(module: str) -> tuple[tuple[int, int, str], ...]:
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
    rows, inside = [], False
    for line in text.splitlines():
        if re.match(r"\s+warps\s+role", line):
            inside = True
        elif inside and (match := _ROW.match(line)):
            first = int(match.group(1))
            last = int(match.group(2) or (1 << 30 if match.group(3) else first))
            rows.append((first, last, match.group(4)))
        elif inside and not line.strip():
            break
    return tuple(rows)
