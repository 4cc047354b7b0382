# SPDX-License-Identifier: Apache-2.0
"""A transformer of two layers with splash attention, local and causal, on a mesh of 8 devices.

Batch, heads and queries are split; segments pack two documents into each sequence. Without eight
accelerators it runs on fake devices of the CPU, where the kernels are interpreted.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fa4_jax.compat import splash as splash_attention

VOCABULARY, WIDTH, HEADS, HEAD_DIM, T, BATCH = 16, 64, 2, 128, 256, 2
QUERIES = P("data", "heads", "sequence")
KEYS = P("data", "heads")


def make_mesh() -> jax.sharding.Mesh:
    """Two devices along each axis."""
    devices = jax.devices() if len(jax.devices()) >= 8 else jax.devices("cpu")
    names = ("data", "heads", "sequence")
    return jax.make_mesh((2, 2, 2), names, axis_types=(AxisType.Auto,) * 3, devices=devices[:8])


def make_attention(mesh: jax.sharding.Mesh, mask):
    """A function of q, k, v [B, heads, T, head_dim] and segment ids, for one mask of all heads."""
    kernel = splash_attention.make_splash_mha(
        mask=splash_attention.MultiHeadMask([mask] * HEADS),
        head_shards=mesh.shape["heads"],
        q_seq_shards=mesh.shape["sequence"],
        interpret=mesh.devices.flat[0].platform == "cpu",
    )
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, P("heads", "sequence")))
    ids_spec = splash_attention.SegmentIds(P("data", "sequence"), P("data"))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(kernel_spec, QUERIES, KEYS, KEYS, ids_spec),
        out_specs=QUERIES,
        check_vma=False,
    )
    def attend(kernel, q, k, v, segment_ids):
        return jax.vmap(kernel)(q * HEAD_DIM**-0.5, k, v, segment_ids)

    return functools.partial(attend, kernel)


def init(key: jax.Array) -> dict:
    """Random parameters."""
    shapes = {
        "embed": (VOCABULARY, WIDTH),
        "qkv": (2, 3, WIDTH, HEADS, HEAD_DIM),
        "out": (2, HEADS, HEAD_DIM, WIDTH),
        "readout": (WIDTH, VOCABULARY),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape) * 0.1
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def loss(params: dict, tokens: jax.Array, ids: jax.Array, layers: list) -> jax.Array:
    """Cross entropy of the token before each, which attention has to find."""
    segment_ids = splash_attention.SegmentIds(ids, ids)
    x = params["embed"][tokens]
    for attend, qkv, out in zip(layers, params["qkv"], params["out"], strict=True):
        q, k, v = jnp.einsum("btc,xchd->xbhtd", x, qkv)
        x += jnp.einsum("bhtd,hdc->btc", attend(q, k, v, segment_ids), out)
    logits = jax.nn.log_softmax(x @ params["readout"])
    targets = jnp.roll(tokens, 1, axis=1)
    return -jnp.take_along_axis(logits, targets[..., None], -1).mean()


def train(steps: int) -> list[float]:
    """The losses of some steps of gradient descent."""
    mesh = make_mesh()
    masks = (
        splash_attention.LocalMask((T, T), window_size=(63, 0), offset=0),
        splash_attention.CausalMask((T, T)),
    )
    layers = [make_attention(mesh, mask) for mask in masks]
    params = init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (BATCH, T), 0, VOCABULARY)
    ids = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) // 100, (BATCH, T))

    @jax.jit
    def step(params):
        value, gradients = jax.value_and_grad(loss)(params, tokens, ids, layers)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients), value

    losses = []
    for _ in range(steps):
        params, value = step(params)
        losses.append(float(value))
    return losses


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print("\n".join(f"step {i}: loss {value:.4f}" for i, value in enumerate(train(4))))
