# SPDX-License-Identifier: Apache-2.0
"""Swap the attention of a Flax and of an Equinox transformer, and compare the training runs.

    python examples/train_swap.py --out runs/swap                  # a CPU, or a GPU if there is one
    python examples/train_swap.py --library flax --steps 20

Every library trains the same model twice, from the same weights and on the same batches: with its
own attention under a dense causal mask, as its users write it, and with fa4_jax's in its place.
Writes `flax.csv`, `equinox.csv` (both losses of every step), `swap.json` (milliseconds per step,
the largest relative difference) and `swap.png` to `--out`; exits with 1 if a pair of curves differs
by more than 1 % anywhere.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm
from train_gpt import VOCABULARY, Config, make_optimizer, random_batch, standard_library

import fa4_jax.compat.equinox
import fa4_jax.compat.flax

PRESETS = {
    "cpu": Config(2, 64, 2, 2, 32, 64, 4, 30, 1e-3, "float32"),
    # 79 M parameters. The libraries' own attention keeps every T x S matrix for the backward pass.
    "gpu": Config(6, 1024, 8, 8, 128, 4096, 4, 100, 2e-4, "bfloat16"),
}
LARGEST_DIFFERENCE = 0.01
Logits = Callable[[Any, jax.Array], jax.Array]
"""(parameters, tokens [B, T]) -> [B, T, 256]."""


class FlaxBlock(nnx.Module):
    """Attention, then an MLP, each added to what comes in."""

    def __init__(self, config: Config, swap: dict[str, Any], rngs: nnx.Rngs):
        width, dtype = config.width, config.dtype
        self.norms = nnx.List(nnx.LayerNorm(width, dtype=dtype, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(
            config.heads, width, dtype=dtype, decode=False, rngs=rngs, **swap
        )
        self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        x += self.attention(self.norms[0](x), mask=mask)
        return x + self.down(jax.nn.gelu(self.up(self.norms[1](x))))


class FlaxModel(nnx.Module):
    """Bytes [B, T] to the logits of each next one."""

    def __init__(self, config: Config, swap: dict[str, Any]):
        rngs = nnx.Rngs(config.seed)
        embed = functools.partial(nnx.Embed, dtype=config.dtype, rngs=rngs)
        self.bytes = embed(VOCABULARY, config.width)
        self.positions = embed(config.seqlen, config.width)
        self.blocks = nnx.List(FlaxBlock(config, swap, rngs) for _ in range(config.layers))
        self.head = nnx.Linear(config.width, VOCABULARY, dtype=config.dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array | None) -> jax.Array:
        x = self.bytes(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def flax_model(config: Config, fa4: bool, implementation: str) -> tuple[Any, Logits]:
    """Parameters and `Logits` of the Flax model."""
    attention_fn = fa4_jax.compat.flax.AttentionFn(causal=True, implementation=implementation)
    model = FlaxModel(config, {"attention_fn": attention_fn} if fa4 else {})
    definition, state = nnx.split(model)

    def logits(parameters: Any, tokens: jax.Array) -> jax.Array:
        mask = None if fa4 else nnx.make_causal_mask(tokens)
        nnx.replace_by_pure_dict(state, parameters)
        return nnx.merge(definition, state)(tokens, mask)

    return nnx.to_pure_dict(state), logits


class EquinoxBlock(eqx.Module):
    """As `FlaxBlock`, of one sequence."""

    norms: list[eqx.nn.LayerNorm]
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, config: Config, attention: type, key: jax.Array):
        keys, width = jax.random.split(key, 3), config.width
        self.norms = [eqx.nn.LayerNorm(width) for _ in range(2)]
        self.attention = attention(config.heads, width, key=keys[0])
        self.up = eqx.nn.Linear(width, 4 * width, key=keys[1])
        self.down = eqx.nn.Linear(4 * width, width, key=keys[2])

    def __call__(self, x: jax.Array, causal: dict[str, Any]) -> jax.Array:
        h = jax.vmap(self.norms[0])(x)
        x += self.attention(h, h, h, **causal)
        h = jax.vmap(self.up)(jax.vmap(self.norms[1])(x))
        return x + jax.vmap(self.down)(jax.nn.gelu(h))


class EquinoxModel(eqx.Module):
    """As `FlaxModel`, of one sequence."""

    bytes: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    blocks: list[EquinoxBlock]
    head: eqx.nn.Linear

    def __init__(self, config: Config, attention: type):
        keys = jax.random.split(jax.random.key(config.seed), config.layers + 3)
        # The scale of Flax's embeddings; Equinox's own is 1.
        self.bytes, self.positions = (
            eqx.nn.Embedding(weight=jax.random.normal(key, (size, config.width)) / 32)
            for key, size in ((keys[0], VOCABULARY), (keys[1], config.seqlen))
        )
        self.blocks = [EquinoxBlock(config, attention, key) for key in keys[3:]]
        self.head = eqx.nn.Linear(config.width, VOCABULARY, key=keys[2])

    def __call__(self, tokens: jax.Array, causal: dict[str, Any]) -> jax.Array:
        x = jax.vmap(self.bytes)(tokens) + jax.vmap(self.positions)(jnp.arange(tokens.size))
        for block in self.blocks:
            x = block(x, causal)
        return jax.vmap(self.head)(x)


def equinox_model(config: Config, fa4: bool, implementation: str) -> tuple[Any, Logits]:
    """Parameters and `Logits` of the Equinox model."""
    attention = fa4_jax.compat.equinox.MultiheadAttention if fa4 else eqx.nn.MultiheadAttention
    parameters, static = eqx.partition(EquinoxModel(config, attention), eqx.is_array)

    def logits(parameters: Any, tokens: jax.Array) -> jax.Array:
        if fa4:
            causal = {"causal": True, "implementation": implementation}
        else:
            causal = {"mask": jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))}
        cast = jax.tree.map(lambda weight: weight.astype(config.dtype), parameters)
        model = eqx.combine(cast, static)
        return jax.vmap(lambda sequence: model(sequence, causal))(tokens)

    return parameters, logits


LIBRARIES = {"flax": flax_model, "equinox": equinox_model}


@dataclasses.dataclass(frozen=True)
class Run:
    """Losses of every step, in nats per byte, and the median time of one."""

    losses: list[float]
    milliseconds: float


def train(model: tuple[Any, Logits], config: Config, text: np.ndarray, title: str) -> Run:
    """One run of `config.steps` steps."""
    parameters, logits = model
    optimizer = make_optimizer(config)
    state = optimizer.init(parameters)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters: Any, state: Any, windows: jax.Array):
        def loss_of(parameters: Any) -> jax.Array:
            predicted = logits(parameters, windows[:, :-1]).astype(jnp.float32)
            targets = windows[:, 1:]
            return optax.softmax_cross_entropy_with_integer_labels(predicted, targets).mean()

        loss, gradients = jax.value_and_grad(loss_of)(parameters)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    losses, seconds, chunk = [], [], max(1, config.steps // 10)
    for first in tqdm(range(0, config.steps, chunk), desc=title, unit="chunk", disable=None):
        start, pending = time.perf_counter(), []
        for i in range(first, min(first + chunk, config.steps)):
            windows = random_batch(text, config, i).astype(np.int32)
            parameters, state, loss = step(parameters, state, windows)
            pending.append(loss)
        losses += [float(loss) for loss in jax.device_get(pending)]
        seconds.append((time.perf_counter() - start) / len(pending))
    # Without the first chunk, which compiles.
    return Run(losses, 1000 * float(np.median(seconds[1:])))


def largest_difference(own: Run, fa4: Run) -> float:
    """Of two curves, relative to the first."""
    expected = np.array(own.losses)
    return float(np.max(np.abs(np.array(fa4.losses) - expected) / expected))


def plot(results: dict[str, tuple[Run, Run]], config: Config, path: pathlib.Path) -> None:
    """A panel with both curves for each library."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = {"figsize": (5.5 * len(results), 4.2), "layout": "constrained"}
    figure, panels = pyplot.subplots(1, len(results), squeeze=False, sharey=True, **size)
    for axes, (library, runs) in zip(panels[0], results.items(), strict=True):
        for run, name, style in zip(
            runs, (f"{library}'s own", "fa4_jax"), ("-", "--"), strict=True
        ):
            label = f"{name} attention: {run.milliseconds:.0f} ms a step"
            axes.plot(range(1, len(run.losses) + 1), run.losses, style, label=label)
        axes.set(xlabel="step", title=f"{library}, {config.seqlen} tokens, {config.dtype}")
        axes.legend()
    panels[0][0].set_ylabel("training loss, nats per byte")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Parse the command line, train, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", choices=LIBRARIES, help="default: both")
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu on a GPU, else cpu")
    parser.add_argument("--steps", type=int, help="at least 2")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs"), metavar="DIR")
    arguments = parser.parse_args()
    on_gpu = jax.default_backend() == "gpu"
    config = PRESETS[arguments.preset or ("gpu" if on_gpu else "cpu")]
    if arguments.steps is not None:
        if arguments.steps < 2:
            parser.error(f"--steps is {arguments.steps}; the first one compiles, so give 2 or more")
        config = dataclasses.replace(config, steps=arguments.steps)
    arguments.out.mkdir(parents=True, exist_ok=True)

    text, _ = standard_library()
    implementation = "fa4" if on_gpu else "reference"
    results, summary = {}, {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    summary["config"] = dataclasses.asdict(config)
    for library in [arguments.library] if arguments.library else LIBRARIES:
        build = LIBRARIES[library]
        own, fa4 = (
            train(build(config, fa4, implementation), config, text, f"{library}, {name}")
            for fa4, name in ((False, "its own attention"), (True, f"fa4_jax ({implementation})"))
        )
        results[library] = own, fa4
        difference = largest_difference(own, fa4)
        summary[library] = {
            "own_ms": own.milliseconds,
            "fa4_ms": fa4.milliseconds,
            "largest_difference": difference,
        }
        print(
            f"{library}: {own.milliseconds:.1f} ms a step with its own attention, "
            f"{fa4.milliseconds:.1f} with fa4_jax, {own.milliseconds / fa4.milliseconds:.2f} times "
            f"as fast; losses {own.losses[0]:.3f} to {own.losses[-1]:.3f}, largest relative "
            f"difference {difference:.3%}"
        )
        with (arguments.out / f"{library}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "own", "fa4"))
            writer.writerows(zip(range(1, config.steps + 1), own.losses, fa4.losses, strict=True))
    (arguments.out / "swap.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(results, config, arguments.out / "swap.png")
    agree = all(largest_difference(*pair) <= LARGEST_DIFFERENCE for pair in results.values())
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
