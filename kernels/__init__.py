# SPDX-License-Identifier: Apache-2.0
"""CuTe DSL kernels: compiled ahead of time by `kernels.build`, never imported at run time.

Reading guide
-------------
A tensor's name says where it lives and what it is a view of:

    mQ       global memory, the whole tensor (the host entry's argument)
    gQ       global memory, one tile of it
    sQ       shared memory
    rQ       registers
    tQgQ     partition of gQ by the threads (or the TMA box) that copy Q
    tSrQ     Q in registers or as a descriptor, partitioned as an operand of the MMA that makes S
    tOrV     likewise for the MMA that makes O

`m_block` and `n_block` count tiles of `tile_m` query rows and `tile_n` key/value rows.

A kernel file reads from the top: the algorithm, a table of warps (role, registers), the graph of
pipelines, then one class. `__init__(variant)` derives everything; `__call__` is the flat host
entry, its arguments in the order of `Signature.buffers`, then the scalars, then the stream;
`kernel` is a table of contents that gives each warp its role; each role is a method.

Pipelines
---------
* An edge has one producer and one consumer role and is named for what it carries. Arrival counts
  are warps for TMA consumers and threads where every thread arrives.
* A pipeline state advances in the loop of the role that owns it, or is returned and rebound.
  Advanced inside a helper it stays frozen in the caller's loop, without a diagnostic.
* Writes to shared memory that TMA or an MMA reads next need a proxy fence before the arrival.
* A producer ends with its tail, so that no arrival lands after the block has exited.

Nothing here may ask which GPU the build machine has: what depends on the device is an argument.
"""
