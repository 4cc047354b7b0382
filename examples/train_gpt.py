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


def rotate(x: jax.Array) -> jax.Array:
    """Rotary position embedding of x [B, T, N, H]."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
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
        hidden = 8 * width // 3 // 64 * 64
        depth = 2 * config.layers  # Keeps the residual stream's variance independent of depth.
        self.attention_norm = jnp.ones(width)
        self.q = normal(keys[0], width, width, heads, head_dim)
        self.k = normal(keys[1], width, width, config.kv_heads, head_dim)
        self.v = normal(keys[2], width, width, config.kv_heads, head_dim)
        self.out = normal(keys[3], heads * head_dim * depth, heads, head_dim, width)
        self.mlp_norm = jnp.ones(width)
        self.gate = normal(keys[4], width, width, hidden)
        self.up = normal(keys[5], width, width, hidden)
        self.down = normal(keys[6], hidden * depth, hidden, width)

    def __call__(self, x: jax.Array, attention: Attention) -> jax.Array:
        h = rms_norm(x, self.attention_norm).astype(self.q.dtype)
        q, k, v = (jnp.einsum("btc,cnh->btnh", h, weight) for weight in (self.q, self.k, self.v))
        x += jnp.einsum("btnh,nhc->btc", attention(rotate(q), rotate(k), v), self.out)
        h = rms_norm(x, self.mlp_norm).astype(self.gate.dtype)
        return x + (jax.nn.silu(h @ self.gate) * (h @ self.up)) @ self.down


class GPT(eqx.Module):
    """Bytes [B, T] to the logits [B, T, 256] of each next byte."""

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

    def __call__(self, tokens: jax.Array, attention: Attention, dtype: str) -> jax.Array:
        model = jax.tree.map(lambda weight: weight.astype(dtype), self)
        x = model.embedding[tokens].astype(jnp.float32)  # The residual stream stays in float32.
        for block in model.blocks:
            x = block(x, attention)
        x = rms_norm(x, model.norm).astype(dtype)
        return jnp.einsum("btc,cv->btv", x, model.head, preferred_element_type=jnp.float32)


def choose_attention(name: str | None, config: Config) -> tuple[str, Attention]:
    """The attention called `name`; None means FA4 where it runs here, else the reference."""
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
            f"train_gpt: --attention {name} needs an NVIDIA GPU, but JAX's default device is a "
            f"{jax.default_backend()}. Use --attention reference (the same attention in plain "
            "JAX), or on a machine with a GPU install JAX for CUDA: pip install '.[cuda13]'."
        )
    if name in ("fa4", "reference"):
        return name, functools.partial(fa4_jax.flash_attention, causal=True, implementation=name)
    jax_nn = jax.nn.dot_product_attention
    return name, functools.partial(jax_nn, is_causal=True, implementation=name)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with clipping, linear warm-up over a tenth of the run, cosine decay to a tenth."""
    peak, warmup, steps = config.learning_rate, max(1, config.steps // 10), max(2, config.steps)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, peak / 10)
    matrices = functools.partial(jax.tree.map, lambda weight: weight.ndim > 1)
    adamw = optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def make_steps(config: Config, attention: Attention, optimizer: optax.GradientTransformation):
    """Compiled (train_step, loss) for windows [batch, seqlen + 1] of bytes."""

    def loss_of(model: GPT, windows: jax.Array) -> jax.Array:
        windows = windows.astype(jnp.int32)
        logits = model(windows[:, :-1], attention, config.dtype)
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(model: GPT, state: optax.OptState, windows: jax.Array):
        loss, gradients = jax.value_and_grad(loss_of)(model, windows)
        updates, state = optimizer.update(gradients, state, model)
        return optax.apply_updates(model, updates), state, loss

    return train_step, jax.jit(loss_of)


def sample(model: GPT, prompt: bytes, length: int, config: Config, attention: Attention) -> str:
    """`prompt` continued to `length` bytes at temperature 0.8; every byte recomputes its prefix."""

    @jax.jit
    def generate(model: GPT, tokens: jax.Array, key: jax.Array) -> jax.Array:
        def extend(i: jax.Array, tokens: jax.Array) -> jax.Array:
            # Attention is causal: what stands after position i - 1 cannot change its logits.
            logits = model(tokens, attention, config.dtype)[0, i - 1]
            token = jax.random.categorical(jax.random.fold_in(key, i), logits / 0.8)
            return tokens.at[0, i].set(token)

        return jax.lax.fori_loop(len(prompt), length, extend, tokens)

    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(prompt)] = list(prompt)
    generated = np.asarray(generate(model, tokens, jax.random.key(config.seed)))
    text = generated[0].astype(np.uint8).tobytes().decode("utf-8", "replace")
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def train(config: Config, attention_name: str | None, out: pathlib.Path) -> None:
    """Train, report while training, and write log.json, loss.png and sample.txt to `out`."""
    name, attention = choose_attention(attention_name, config)
    text, held_out = standard_library()
    validation = validation_batches(held_out, config)
    optimizer = make_optimizer(config)
    train_step, loss_of = make_steps(config, attention, optimizer)
    model = jax.jit(GPT, static_argnums=0)(config)
    state = jax.jit(optimizer.init)(model)
    log = {
        "attention": name,
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
        f"{log['parameters'] / 1e6:.1f} M parameters, {name} attention on {log['device']}, "
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
            model, state, loss = train_step(model, state, random_batch(text, config, step))
            losses.append(loss)
        log["loss"] += [float(loss) for loss in jax.device_get(losses)]
        if not np.isfinite(log["loss"]).all():
            sys.exit(f"train_gpt: loss is {log['loss'][-1]} by step {steps.stop}: diverged")
        seconds_per_step.append((time.perf_counter() - start) / len(steps))
        # The median leaves out the first chunk, which compiles.
        log["tokens_per_second"] = config.batch * config.seqlen / float(np.median(seconds_per_step))
        progress.update(len(steps))
        if (i + 1) % max(1, len(chunks) // 5) == 0 or steps is chunks[-1]:
            value = float(np.mean([loss_of(model, windows) for windows in validation]))
            log["validation"].append([steps.stop, value])
            tqdm.write(
                f"step {steps.stop}: loss {log['loss'][-1]:.4f}, validation {value:.4f}, "
                f"{log['tokens_per_second']:,.0f} tokens/s"
            )
    progress.close()

    continuation = sample(model, b"def ", min(256, config.seqlen), config, attention)
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


def main() -> None:
    """Parse the command line and train or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attention", choices=ATTENTIONS, help="default: fa4 where it runs")
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu on a GPU, else cpu")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs"), metavar="DIR")
    parser.add_argument("--compare", nargs="+", type=pathlib.Path, metavar="LOG.JSON")
    options = {name: type(value) for name, value in dataclasses.asdict(PRESETS["cpu"]).items()}
    for name, kind in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.compare:
        if len(arguments.compare) < 2:
            parser.error("--compare needs two logs or more")
        sys.exit(0 if compare(arguments.compare, arguments.out) else 1)

    preset = arguments.preset or ("gpu" if jax.default_backend() == "gpu" else "cpu")
    given = {name: value for name in options if (value := getattr(arguments, name)) is not None}
    try:
        config = dataclasses.replace(PRESETS[preset], **given)
    except ValueError as error:
        parser.error(str(error))
    train(config, arguments.attention, arguments.out)


if __name__ == "__main__":
    main()
