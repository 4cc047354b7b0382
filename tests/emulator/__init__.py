# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels on a CPU: an emulator of the PTX that this project ships.

    emulated("fa4_forward_sm90a_bf16_d128")((q, k, v), scalars)    # a pytest fixture
    python -m tests.emulator.report fa4_forward_sm90a_bf16_d128    # what it costs, by resource
    python -m tests.emulator.mutation fa4_forward_sm90a_bf16_d128  # planted defects

Reading guide
-------------
`device` links the project's library with a fake CUDA runtime; a launch arrives with a cubin, which
names the PTX (`artifacts`). `ptx` parses it. `codegen` turns each basic block into a Python
function on arrays of 32 lanes, instruction by instruction through `instruction_set`, the table that
the `isa_*` modules fill: each holds the translation of its instructions and, marked `@runtime`,
what translated blocks call. `launch` runs a grid; `residents` lets its clusters take turns, and
`scheduler` a cluster's warps and asynchronous operations, in the order that `schedule` chooses.
`memory`, `barriers`, `tensor_map` and `matrix` are the hardware's parts.
`races` is the happens-before check, `global_races` what joins it between clusters. `counts`,
`chips` and `report` turn counts into cycles; `mutation` and `subjects` plant defects.

PTX ISA sections are cited by their titles: their numbers change between versions.

What it is not
--------------
* It executes PTX, not machine code: what ptxas does (spills, contraction of mul and add, wgmma
  serialisation, encodings it refuses) isn't seen. There is no time: no bank conflicts, no
  occupancy.
* Numbers: wgmma's sums and the approximate exponentials, logarithms and reciprocals are an H200's,
  as far as measured (`tensor_core`, `mufu`). So nearly all 16-bit results equal the hardware's
  (docs/emulator/README.md). tcgen05's sums and the other approximate functions are NumPy's.
* Memory is sequentially consistent: a missing fence, release or acquire never changes a value. The
  happens-before check knows those of scope `.gpu` and `.sys` on global memory. Not looked at:
  narrower ones (`.relaxed` where `.release` or `.acquire` is needed at an mbarrier, a strong access
  of scope `.cta`, which counts as weak), `tcgen05.fence`, races between the lanes of a warp, the
  order of additions within one `red`.
* Global memory has no proxies: that data written by `st` and read by a bulk copy needs
  `fence.proxy.async` isn't checked there. A bulk store is complete after `wait_group` without
  `.read`, and not before.
* The happens-before check sees one schedule's operations, at 4 bytes of shared and global memory
  and at 32 lanes by one column of tensor memory. A 2-byte write makes its 4-byte cell written.
* Clusters start in the order of the grid, at most `Options.resident_ctas` CTAs at a time, and once
  started are never starved for ever. A loop of strong reads is a wait (`isa_strong.look`); one of
  weak loads ends as `Livelock`, one that looks at shared memory at the same time may end as a false
  `Deadlock`.
* Launches run one after another: `griddepcontrol` changes nothing.
* Refused, by name: whatever no `isa_*` module declares, among it `mma.sync`, im2col and gather TMA,
  fp8 and block-scaled tcgen05 kinds, `.ws`, tcgen05.cp, tcgen05.ld shapes but 32x32b, M = 64.
"""
