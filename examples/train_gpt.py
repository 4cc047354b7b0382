# SPDX-License-Identifier: Apache-2.0
"""Train a small byte-level GPT on the source code of Python's own standard library.

    python examples/train_gpt.py                          # a CPU, or a GPU if there is one
    python examples/train_gpt.py --preset gpu --attention fa4 --out runs/fa4
    python examples/train_gpt.py --preset gpu --attention xla --out runs/xla
    python examples/train_gpt.py --compare runs/fa4/log.json runs/xla/log.json --out runs

Every run writes `log.json` (configuration, every step's loss in full precision, validation losses,
tokens per second), `loss.png` and `sample.txt` to `--out`. The seed alone fixes the initial weights
and the order of the data, so two runs that differ only in `--attention` see the same batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import sys
import sysconfig
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import fa4_jax

VOCABULARY = 256  # Tokens are bytes.
ATTENTIONS = ("fa4", "reference", "cudnn", "xla")
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. Every field is also a command-line option."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    seqlen: int
    batch: int
    steps: int
    learning_rate: float
    dtype: str  # of the computation; parameters and optimizer state are float32
    seed: int = 0

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if name not in ("dtype", "seed") and value <= 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype}; choose float32, bfloat16 or float16")

    @property
    def hidden(self) -> int:
        """Width of the MLP."""
        return 8 * self.width // 3 // 64 * 64


PRESETS = {
    # 0.8 M parameters: minutes on two CPU cores.
    "cpu": Config(4, 128, 2, 1, 64, 256, 16, 300, 3e-3, "float32"),
    # 131 M parameters, four query heads on each key/value head. With --attention xla the step needs
    # about 50 GB, because XLA keeps every T x S score matrix for the backward pass. At 2e-4 runs
    # that differ by rounding stay within 0.3 % of each other; at 6e-4 they part by 1.9 %.
    "gpu": Config(12, 1024, 8, 2, 128, 2048, 8, 200, 2e-4, "bfloat16"),
}


def standard_library() -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) bytes: every 20th file of Python's standard library is held out.

    Tests are left out because some systems don't install them, and `_sysconfigdata` because it
    records the paths of the machine that built Python.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = sorted(
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if excluded.isdisjoint(path.relative_to(root).parts)
        and not path.name.startswith(("_sysconfigdata", "sitecustomize", "usercustomize"))
    )
    texts = [path.read_bytes() + b"\n" for _, path in files]
    validation = texts[::20]
    del texts[::20]
    return tuple(np.frombuffer(b"".join(part), np.uint8) for part in (texts, validation))


def random_batch(text: np.ndarray, config: Config, step: int) -> np.ndarray:
    """[batch, seqlen + 1] windows at random places that depend on seed and step alone."""
    random = np.random.default_rng([config.seed, step])
    starts = random.integers(0, len(text) - config.seqlen, config.batch)
    return text[starts[:, None] + np.arange(config.seqlen + 1)]


def validation_batches(text: np.ndarray, config: Config, count: int = 4) -> list[np.ndarray]:
    """The same evenly spaced windows of the held-out text at every call."""
    starts = np.linspace(0, len(text) - config.seqlen - 1, count * config.batch).astype(np.int64)
    return np.split(text[starts[:, None] + np.arange(config.seqlen + 1)], count)


class Batch(NamedTuple):
    """What a step sees. Only attention looks at more than one position, so any order will do."""

    tokens: Any  # [batch, seqlen]
    targets: Any  # [batch, seqlen]: the byte after each token
    positions: Any  # [seqlen]


def in_order(windows: np.ndarray) -> Batch:
    """A batch in the order of positions, of windows [batch, seqlen + 1]."""
    positions = np.arange(windows.shape[1] - 1, dtype=np.int32)
    return Batch(windows[:, :-1], windows[:, 1:], positions)


def unigram_entropy(text: np.ndarray) -> float:
    """Loss, in nats per byte, of the best model that ignores the context."""
    frequencies = np.bincount(text, minlength=VOCABULARY) / len(text)
    frequencies = frequencies[frequencies > 0]
    return float(-(frequencies * np.log(frequencies)).sum())


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + 1e-6)
    return (x32 * scale).astype(x.dtype)


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding of x [B, T, N, H] at positions [T]."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = positions[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def normal(key: jax.Array, fan_in: int, *shape: int) -> jax.Array:
    """Initial weights with variance 1 / fan_in."""
    return jax.random.normal(key, shape) / math.sqrt(fan_in)


class Block(eqx.Module):
    """Grouped-query attention, then a gated MLP, each added to the residual stream."""

    attention_norm: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    out: jax.Array
    mlp_norm: jax.Array
    gate: jax.Array
    up: jax.Array
    down: jax.Array

    def __init__(self, config: Config, key: jax.Array):
        keys = jax.random.split(key, 7)
        width, heads, head_dim = config.width, config.heads, config.head_dim
        depth = 2 * config.layers  # Keeps the residual stream's variance independent of depth.
        self.attention_norm = jnp.ones(width)
        self.q = normal(keys[0], width, width, heads, head_dim)
        self.k = normal(keys[1], width, width, config.kv_heads, head_dim)
        self.v = normal(keys[2], width, width, config.kv_heads, head_dim)
        self.out = normal(keys[3], heads * head_dim * depth, heads, head_dim, width)
        self.mlp_norm = jnp.ones(width)
        self.gate = normal(keys[4], width, width, config.hidden)
        self.up = normal(keys[5], width, width, config.hidden)
        self.down = normal(keys[6], config.hidden * depth, config.hidden, width)

    def __call__(self, x: jax.Array, positions: jax.Array, attention: Attention) -> jax.Array:
        h = rms_norm(x, self.attention_norm).astype(self.q.dtype)
        q, k, v = (jnp.einsum("btc,cnh->btnh", h, weight) for weight in (self.q, self.k, self.v))
        q, k = rotate(q, positions), rotate(k, positions)
        x += jnp.einsum("btnh,nhc->btc", attention(q, k, v), self.out)
        h = rms_norm(x, self.mlp_norm).astype(self.gate.dtype)
        return x + (jax.nn.silu(h @ self.gate) * (h @ self.up)) @ self.down


class GPT(eqx.Module):
    """Bytes [B, T] at positions [T] to the logits [B, T, 256] of each next byte."""

    embedding: jax.Array
    blocks: list[Block]
    norm: jax.Array
    head: jax.Array

    def __init__(self, config: Config):
        first, last, *keys = jax.random.split(jax.random.key(config.seed), config.layers + 2)
        self.embedding = normal(first, 1, VOCABULARY, config.width)
        self.blocks = [Block(config, key) for key in keys]
        self.norm = jnp.ones(config.width)
        self.head = normal(last, config.width, config.width, VOCABULARY)

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, attention: Attention, dtype: str
    ) -> jax.Array:
        model = jax.tree.map(lambda weight: weight.astype(dtype), self)
        x = model.embedding[tokens].astype(jnp.float32)  # The residual stream stays in float32.
        for block in model.blocks:
            x = block(x, positions, attention)
        x = rms_norm(x, model.norm).astype(dtype)
        return jnp.einsum("btc,cv->btv", x, model.head, preferred_element_type=jnp.float32)


def choose_attention(name: str | None, config: Config) -> str:
    """`name`, if it runs here; for None, FA4 where it runs, else the reference."""
    on_gpu = jax.default_backend() == "gpu"
    if name is None:
        q, kv = (
            jax.ShapeDtypeStruct((config.batch, config.seqlen, n, config.head_dim), config.dtype)
            for n in (config.heads, config.kv_heads)
        )
        supported = on_gpu and fa4_jax.is_supported(q, kv, kv, causal=True).ok
        name = "fa4" if supported else "reference"
    if name in ("fa4", "cudnn") and not on_gpu:
        sys.exit(
            f"error: --attention {name} needs an NVIDIA GPU, but JAX's default device is a "
            f"{jax.default_backend()}. Use --attention reference (the same attention in plain "
            "JAX), or on a machine with a GPU install JAX for CUDA: pip install '.[cuda13]'."
        )
    return name


def causal_attention(name: str) -> Attention:
    """One of ATTENTIONS."""
    if name in ("fa4", "reference"):
        return functools.partial(fa4_jax.flash_attention, causal=True, implementation=name)
    jax_nn = jax.nn.dot_product_attention
    return functools.partial(jax_nn, is_causal=True, implementation=name)


@dataclasses.dataclass(frozen=True)
class Setup:
    """How and where a run computes; unless said otherwise, on one device."""

    name: str
    attention: Attention
    """Of a training step."""
    sample_attention: Attention
    """Of one sequence of any length, in the order of positions."""
    batch: Callable[[np.ndarray], Batch] = in_order
    """Of windows [batch, seqlen + 1]."""
    shardings: Callable[[Any], Any] = lambda shapes: None
    """Of a tree of parameters or of optimizer state."""


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with clipping, linear warm-up over a tenth of the run, cosine decay to a tenth."""
    peak, warmup, steps = config.learning_rate, max(1, config.steps // 10), max(2, config.steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, peak / 10)
    matrices = functools.partial(jax.tree.map, lambda weight: weight.ndim > 1)
    adamw = optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


class Training(NamedTuple):
    """The state at step 0, and compiled functions."""

    model: GPT
    state: optax.OptState
    step: Callable[[GPT, optax.OptState, Batch], tuple[GPT, optax.OptState, jax.Array]]
    loss: Callable[[GPT, Batch], jax.Array]


def prepare(config: Config, setup: Setup) -> Training:
    """What a training loop needs."""
    optimizer = make_optimizer(config)

    def loss_of(model: GPT, batch: Batch) -> jax.Array:
        tokens, targets = batch.tokens.astype(jnp.int32), batch.targets.astype(jnp.int32)
        logits = model(tokens, batch.positions, setup.attention, config.dtype)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def step(model: GPT, state: optax.OptState, batch: Batch):
        loss, gradients = jax.value_and_grad(loss_of)(model, batch)
        updates, state = optimizer.update(gradients, state, model)
        return optax.apply_updates(model, updates), state, loss

    model = jax.eval_shape(lambda: GPT(config))
    shardings = setup.shardings(model), setup.shardings(jax.eval_shape(optimizer.init, model))
    model = jax.jit(GPT, static_argnums=0, out_shardings=shardings[0])(config)
    state = jax.jit(optimizer.init, out_shardings=shardings[1])(model)
    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*shardings, None))
    return Training(model, state, step, jax.jit(loss_of))


def sample(model: GPT, prompt: bytes, length: int, config: Config, attention: Attention) -> str:
    """`prompt` continued to `length` bytes at temperature 0.8; every byte recomputes its prefix."""

    @jax.jit
    def generate(model: GPT, tokens: jax.Array, key: jax.Array) -> jax.Array:
        def extend(i: jax.Array, tokens: jax.Array) -> jax.Array:
            # Attention is causal: what stands after position i - 1 cannot change its logits.
            logits = model(tokens, jnp.arange(length), attention, config.dtype)[0, i - 1]
            token = jax.random.categorical(jax.random.fold_in(key, i), logits / 0.8)
            return tokens.at[0, i].set(token)

        return jax.lax.fori_loop(len(prompt), length, extend, tokens)

    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(prompt)] = list(prompt)
    generated = np.asarray(generate(model, tokens, jax.random.key(config.seed)))
    text = generated[0].astype(np.uint8).tobytes().decode("utf-8", "replace")
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def train(config: Config, setup: Setup, out: pathlib.Path) -> None:
    """Train, report while training, and write log.json, loss.png and sample.txt to `out`."""
    text, held_out = standard_library()
    validation = [setup.batch(windows) for windows in validation_batches(held_out, config)]
    model, state, train_step, loss_of = prepare(config, setup)
    log = {
        "attention": setup.name,
        "config": dataclasses.asdict(config),
        "data_sha256": hashlib.sha256(text).hexdigest(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "parameters": sum(weight.size for weight in jax.tree.leaves(model)),
        "unigram_entropy": unigram_entropy(held_out),
        "tokens_per_second": 0.0,
        "loss": [],
        "validation": [],
    }
    print(
        f"{log['parameters'] / 1e6:.1f} M parameters, attention: {setup.name}, on {log['device']}, "
        f"{len(text) / 1e6:.1f} MB of Python, unigram entropy {log['unigram_entropy']:.3f} nats"
    )

    # Losses are fetched a chunk of steps at a time, so that the device never waits for the host.
    chunk = max(1, min(10, config.steps // 4))
    chunks = [range(i, min(i + chunk, config.steps)) for i in range(0, config.steps, chunk)]
    seconds_per_step = []
    progress = tqdm(total=config.steps, unit="step", disable=None)
    for i, steps in enumerate(chunks):
        start, losses = time.perf_counter(), []
        for step in steps:
            batch = setup.batch(random_batch(text, config, step))
            model, state, loss = train_step(model, state, batch)
            losses.append(loss)
        log["loss"] += [float(loss) for loss in jax.device_get(losses)]
        if not np.isfinite(log["loss"]).all():
            sys.exit(f"error: loss is {log['loss'][-1]} by step {steps.stop}: diverged")
        seconds_per_step.append((time.perf_counter() - start) / len(steps))
        # The median leaves out the first chunk, which compiles.
        log["tokens_per_second"] = config.batch * config.seqlen / float(np.median(seconds_per_step))
        progress.update(len(steps))
        if (i + 1) % max(1, len(chunks) // 5) == 0 or steps is chunks[-1]:
            value = float(np.mean([loss_of(model, batch) for batch in validation]))
            log["validation"].append([steps.stop, value])
            tqdm.write(
                f"step {steps.stop}: loss {log['loss'][-1]:.4f}, validation {value:.4f}, "
                f"{log['tokens_per_second']:,.0f} tokens/s"
            )
    progress.close()

    length = min(256, config.seqlen)
    continuation = sample(model, b"def ", length, config, setup.sample_attention)
    print(f"--- sample ---\n{continuation}\n--------------")
    (out / "sample.txt").write_text(continuation, encoding="utf-8")
    (out / "log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    plot([log], out / "loss.png")
    print(f"wrote log.json, loss.png and sample.txt to {out}")


def plot(logs: list[dict], path: pathlib.Path) -> None:
    """Loss curves of one run or several."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for i, log in enumerate(logs):
        label = f"{log['attention']} ({log['tokens_per_second']:,.0f} tokens/s)"
        style = "-" if i == 0 else "--"  # Equal curves must not hide each other.
        steps = np.arange(1, len(log["loss"]) + 1)
        axes.plot(steps, log["loss"], style, color=f"C{i}", linewidth=1.2, label=label)
        axes.plot(*zip(*log["validation"], strict=True), "o", color=f"C{i}", markersize=4)
    axes.axhline(logs[0]["unigram_entropy"], color="grey", linestyle=":", label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss, nats per byte (dots: validation)")
    axes.set_title(f"{logs[0]['parameters'] / 1e6:.1f} M parameters on {logs[0]['device']}")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def compare(paths: list[pathlib.Path], out: pathlib.Path, after: int = 20) -> bool:
    """Plot runs together; True if all losses after step `after` are within 1 % of the first's."""
    first, *others = logs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for path, log in zip(paths[1:], others, strict=True):
        for field in ("config", "data_sha256"):
            if log[field] != first[field]:
                sys.exit(f"train_gpt: {paths[0]} and {path} differ in {field}: not comparable")
    expected = np.array(first["loss"])[after:]
    if not expected.size:
        sys.exit(f"train_gpt: --compare looks at steps after {after}, and these runs have none")
    plot(logs, out / "compare.png")
    agree = True
    for log in others:
        difference = np.abs(np.array(log["loss"])[after:] / expected - 1)
        worst = int(difference.argmax())
        within = bool((difference <= 0.01).all())  # False for NaN, too.
        agree &= within
        print(
            f"{log['attention']} and {first['attention']}: largest relative difference after step "
            f"{after} is {difference[worst]:.3%}, at step {after + worst + 1}: "
            f"{'within' if within else 'NOT within'} 1 %"
        )
    return agree


def make_parser(description: str | None, attentions: tuple[str, ...]) -> argparse.ArgumentParser:
    """A parser of what a run needs."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attention", choices=attentions, help="default: fa4 where it runs")
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu on a GPU, else cpu")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs"), metavar="DIR")
    for name, value in dataclasses.asdict(PRESETS["cpu"]).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value))
    return parser


def config_of(arguments: argparse.Namespace) -> Config:
    """Raises ValueError if there is no such run."""
    preset = arguments.preset or ("gpu" if jax.default_backend() == "gpu" else "cpu")
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Config)}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(PRESETS[preset], **given)


def main() -> None:
    """Parse the command line and train or compare."""
    parser = make_parser(__doc__, ATTENTIONS)
    parser.add_argument("--compare", nargs="+", type=pathlib.Path, metavar="LOG.JSON")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.compare:
        if len(arguments.compare) < 2:
            parser.error("--compare needs two logs or more")
        sys.exit(0 if compare(arguments.compare, arguments.out) else 1)

    try:
        config = config_of(arguments)
    except ValueError as error:
        parser.error(str(error))
    name = choose_attention(arguments.attention, config)
    attention = causal_attention(name)
    train(config, Setup(name, attention, attention), arguments.out)


if __name__ == "__main__":
    main()
