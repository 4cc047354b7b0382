# SPDX-License-Identifier: Apache-2.0
"""What a streaming multiprocessor does per clock, by chip. Every number has its source.

* CUDA C++ Programming Guide, "Throughput of native arithmetic instructions", columns 9.0 and 10.0:
  float32 add/multiply/fma 128, integer add/compare/logic 64, shifts and conversions from and to 32
  bits 64, special functions 16 results a clock; four warp schedulers, each one instruction a clock.
* Shared memory: 32 banks of 4 bytes a clock (same guide, Shared Memory).
* H200: NVIDIA H200 data sheet, 989 dense bf16 TFLOPS and 4.8 TB/s; H100 whitepaper, 132 SMs and
  4096 dense bf16 FLOPs per SM and clock. The clock is 1.98 GHz at most, and between 1.755 GHz and
  that under tensor load, so a time is a range.
* B200: FlashAttention-4 (arXiv 2603.05451), 8192 bf16 FLOPs, 128 bytes of shared memory and 16
  exponentials per SM and clock; 148 SMs, 8 TB/s (NVIDIA DGX B200 data sheet); 1.85 GHz boost.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates per SM and clock, unless they say otherwise."""

    name: str
    sms: int
    clock_ghz: float
    """Under tensor load."""
    boost_ghz: float
    tensor_flops: int
    mufu: int
    fma: int
    integer: int
    convert: int
    shared_bytes: int
    issue: int
    """Warp instructions."""
    memory_bytes_per_second: float
    """Of the whole chip."""


H200 = Chip(
    name="H200",
    sms=132,
    clock_ghz=1.755,
    boost_ghz=1.98,
    tensor_flops=4096,
    mufu=16,
    fma=128,
    integer=64,
    convert=64,
    shared_bytes=128,
    issue=4,
    memory_bytes_per_second=4.8e12,
)
B200 = Chip(
    name="B200",
    sms=148,
    clock_ghz=1.85,
    boost_ghz=1.85,
    tensor_flops=8192,
    mufu=16,
    fma=128,
    integer=64,
    convert=64,
    shared_bytes=128,
    issue=4,
    memory_bytes_per_second=8e12,
)
CHIPS = {"sm90a": H200, "sm100a": B200}
