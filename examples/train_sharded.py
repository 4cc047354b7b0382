# SPDX-License-Identifier: Apache-2.0
"""Train the GPT of train_gpt.py on a mesh: data, tensor and context parallel, in any mix.

    python examples/train_sharded.py --mesh data=2,tensor=2,context=2       # 8 devices
    python examples/train_sharded.py --mesh context=4 --seqlen 32768 --batch 1

The devices are GPUs if there are any, else as many fake ones of the CPU. Along an axis they share

    data       the sequences of a batch
    tensor     heads of attention, and columns of the MLP
    context    the positions of every sequence, in order "zigzag": attention is
               `fa4_jax.context_parallel_attention`

Weights, batches and results are those of train_gpt.py with the same options, so losses differ by
rounding alone:

    python examples/train_gpt.py --compare runs/one/log.json runs/sharded/log.json
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import train_gpt
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from train_gpt import Attention, Batch, Config, Setup

import fa4_jax

AXES = ("data", "context", "tensor")  # Neighbours along the last talk most.
ORDER = "zigzag"  # With a causal mask, all devices of a sequence then have the same work.
# The dimension of a parameter that "tensor" splits. The others are on every device.
TENSOR_DIMENSION = {"q": 1, "k": 1, "v": 1, "out": 0, "gate": 1, "up": 1, "down": 0}


def parse_mesh(text: str) -> dict[str, int]:
    """ "data=2,tensor=4" to the size of every axis; those left out have 1 device."""
    sizes = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not (size.isdecimal() and int(size)):
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected each of {', '.join(AXES)} at most once, with its number of "
                "devices, as in data=2,tensor=2,context=2"
            )
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}


def check(config: Config, sizes: dict[str, int]) -> None:
    """ValueError with all that the mesh doesn't divide."""
    data, context, tensor = (sizes[name] for name in AXES)
    reasons = [
        f"{name} {value} is not a multiple of {multiple}, as {axis}={sizes[axis]} needs"
        for name, value, multiple, axis in (
            ("batch", config.batch, data, "data"),
            ("seqlen", config.seqlen, 2 * context, "context"),
            ("heads", config.heads, tensor, "tensor"),
            ("the MLP's width", config.hidden, tensor, "tensor"),
        )
        if value % multiple
    ]
    if config.kv_heads % tensor and tensor % config.kv_heads:
        reasons.append(
            f"kv-heads {config.kv_heads} is neither a multiple nor a divisor of tensor={tensor}"
        )
    if reasons:
        raise ValueError("the mesh doesn't fit: " + "; ".join(reasons))


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """Of JAX's first devices. ValueError if there are too few."""
    needed = math.prod(sizes.values())
    # No effect on GPUs, nor in a process that has used the CPU already.
    is_default = jax.config.jax_num_cpu_devices == -1
    if is_default and "xla_force_host_platform_device_count" not in os.getenv("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", needed)
    devices = jax.devices()
    if len(devices) < needed:
        raise ValueError(
            f"the mesh has {needed} devices, but JAX sees {len(devices)} of {devices[0].platform}; "
            "make it smaller, or use fake devices: JAX_PLATFORMS=cpu"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, types, devices=devices[:needed])


def sharded_attention(mesh: Mesh, implementation: str) -> Attention:
    """Causal attention of q, k and v on all axes of `mesh`, in ORDER."""
    spec, tensor = P("data", "context", "tensor"), mesh.shape["tensor"]
    local = functools.partial(
        fa4_jax.context_parallel_attention,
        axis_name="context",
        order=ORDER,
        causal=True,
        implementation=implementation,
    )
    manual = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        # Devices that share a key/value head have one copy each.
        copies = max(1, tensor // k.shape[2])
        return manual(q, *(jnp.repeat(x, copies, axis=2) for x in (k, v)))

    return attention


def setup_on(mesh: Mesh, implementation: str) -> Setup:
    """Training on `mesh`."""
    batch_shardings = Batch(
        *(NamedSharding(mesh, spec) for spec in (P("data", "context"),) * 2 + (P("context"),))
    )

    def batch_of(windows: np.ndarray) -> Batch:
        reorder = functools.partial(
            fa4_jax.reorder_causal_load_balancing, order=ORDER, cp_size=mesh.shape["context"]
        )
        batch = jax.tree.map(lambda x: reorder(x, seq_dim=-1), train_gpt.in_order(windows))
        return jax.device_put(batch, batch_shardings)

    def sharding_of(path: tuple, shape: jax.ShapeDtypeStruct) -> NamedSharding:
        dimension = TENSOR_DIMENSION.get(getattr(path[-1], "name", ""))
        # Key/value heads that devices share are on all of them, too.
        if dimension is None or shape.shape[dimension] % mesh.shape["tensor"]:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, P(*(None,) * dimension, "tensor"))

    def shardings(shapes: Any) -> Any:
        return jax.tree_util.tree_map_with_path(sharding_of, shapes)

    return Setup(
        name=f"{implementation}, " + ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items()),
        attention=sharded_attention(mesh, implementation),
        # XLA splits it as it finds the weights: one sequence is too short for the mesh.
        sample_attention=train_gpt.causal_attention(implementation),
        batch=batch_of,
        shardings=shardings,
    )


def main() -> None:
    """Parse the command line and train."""
    parser = train_gpt.make_parser(__doc__, ("fa4", "reference"))
    parser.add_argument(
        "--mesh",
        type=parse_mesh,
        required=True,
        metavar="data=D,tensor=T,context=C",
        help="devices along each axis; 1 for those left out",
    )
    arguments = parser.parse_args()
    try:
        mesh = make_mesh(arguments.mesh)
        config = train_gpt.config_of(arguments)
        check(config, arguments.mesh)
    except ValueError as error:
        parser.error(str(error))
    implementation = train_gpt.choose_attention(arguments.attention, config)
    arguments.out.mkdir(parents=True, exist_ok=True)
    train_gpt.train(config, setup_on(mesh, implementation), arguments.out)


if __name__ == "__main__":
    main()
