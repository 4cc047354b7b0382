# SPDX-License-Identifier: Apache-2.0
"""XLA captures our calls into a CUDA graph and replays it without entering the handler.

Each case is a process of its own, so that the captured program is also the first thing that the
process runs. The HLO text doesn't show whether a call was captured; the handler's counter does.
"""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from fa4_jax import _ffi, flash_attention

def layers(x):
    for _ in range(6):
        x = (x + flash_attention(x, x, x, causal=True, implementation="fa4")) / 2
    return x

def forward(x):
    return layers(x)

def scan(x):
    return jax.lax.scan(lambda carry, _: (layers(carry), None), x, length=3)[0]

def gradient(x):
    # 128 keys are one key tile, so that dq, too, has one order of summation.
    two = lambda x: flash_attention(x, flash_attention(x, x, x, implementation="fa4"), x,
                                    causal=True, implementation="fa4")
    return jax.grad(lambda x: jnp.sum(jnp.sin(two(x).astype(jnp.float32))))(x)

cases = {"forward": (forward, 640), "scan": (scan, 640), "gradient": (gradient, 128)}
case, length = cases[sys.argv[1]]
x = jax.random.normal(jax.random.key(0), (2, length, 4, 64), jnp.bfloat16)
step = jax.jit(case)
first = np.asarray(step(x)).view(np.uint16)
assert np.isfinite(np.asarray(step(x), np.float32)).all()
entered_once = _ffi.handler_entries()
for _ in range(8):
    jax.block_until_ready(step(x))
warm = _ffi.handler_entries()
for i in range(300):
    again = np.asarray(step(x)).view(np.uint16)
    assert (again == first).all(), f"call {i} differs from the first"
print("entries:", entered_once, warm, _ffi.handler_entries(), "loads:", _ffi.module_loads(0))
assert entered_once >= 6, entered_once
# Where the allocator puts a buffer elsewhere, XLA captures once more; 300 calls without a graph
# would be 150 times as many entries as those of the first two.
assert _ffi.handler_entries() <= warm + 3 * entered_once, (warm, _ffi.handler_entries())
"""


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["forward", "gradient", "scan"])
def test_replay_does_not_enter_the_handler(case: str) -> None:
    # This process may hold most of the GPU's memory.
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM, case],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    print(child.stdout)
    assert child.returncode == 0, child.stdout + child.stderr
