# SPDX-License-Identifier: Apache-2.0
"""Small hand-written kernels: the frame around a PTX body, for the emulator's own tests."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from . import ptx
from .launch import Configuration, Launch, Options, Program
from .memory import GlobalMemory


def program_of(body: str, inputs: int = 0) -> Program:
    """A kernel with this body. It finds the addresses of its inputs in %in0, %in1, ... and of its
    output in %out, advanced by 8 bytes per thread; %tid, %warp and %smem (the start of shared
    memory) are set, and %p, %h (16 bits), %r, %d (64 bits) and %f registers are free to use.
    """
    parameters = ", ".join(f".param .u64 p{i}" for i in range(inputs + 1))
    loads = " ".join(f"ld.param.b64 %in{i}, [p{i}];" for i in range(inputs))
    text = f"""
.version 9.0
.target sm_100a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry kernel({parameters})
{{
    .reg .pred %p<16>; .reg .b16 %h<16>; .reg .b32 %r<200>; .reg .b64 %d<64>; .reg .b32 %f<300>;
    .reg .b64 %in<4>; .reg .b64 %out; .reg .b32 %tid; .reg .b32 %warp; .reg .b32 %smem; .reg .b64
    %off; {loads}
    ld.param.b64 %out, [p{inputs}];
    mov.u32 %tid, %tid.x;
    shr.u32 %warp, %tid, 5;
    mov.b32 %smem, smem;
    mul.wide.u32 %off, %tid, 8;
    add.s64 %out, %out, %off;
    {body}
    ret;
}}
"""
    (kernel,) = ptx.parse(text).values()
    return Program(kernel)


def run_body(
    body: str,
    inputs: tuple[np.ndarray, ...],
    output: np.ndarray,
    *,
    block: int = 32,
    grid: int = 1,
    cluster: int = 1,
    shared: int = 4096,
    warps: Mapping[str, Any] = MappingProxyType({}),
    **options,
) -> np.ndarray:
    """Run a body over its inputs; `output` is returned. `warps`: further arguments of `Launch`;
    `options`: those of `launch.Options`."""
    program = program_of(body, len(inputs))
    memory = GlobalMemory()
    arrays = [*inputs, output]
    for index, array in enumerate(arrays):
        assert array.flags.c_contiguous
        memory.register(array.ctypes.data, array.nbytes, f"p{index}")
    raw = b"".join(struct.pack("<Q", array.ctypes.data) for array in arrays)
    configuration = Configuration((grid, 1, 1), (block, 1, 1), (cluster, 1, 1), shared)
    Launch(program, configuration, raw, memory, Options(**options), **warps).run()
    return output
