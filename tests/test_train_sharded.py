# SPDX-License-Identifier: Apache-2.0
"""`examples/train_sharded.py`: on every mesh of 8 devices it trains the model that one device
trains."""

import dataclasses
import importlib
import json
import math
import pathlib
import sys

import jax
import numpy as np
import pytest

from fa4_jax._variants import Kernel, target_name

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
TINY = {
    "layers": 1,
    "width": 64,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 8,
    "seqlen": 32,
    "batch": 8,
    "steps": 6,
    "learning_rate": 1e-2,
    "dtype": "float32",
}
# What one of 8 devices has, of tokens [8, 32], q [64, 8, 8], k [64, 2, 8] and down [128, 64].
MESHES = {
    "data=8": ((1, 32), (64, 8, 8), (64, 2, 8), (128, 64)),
    "tensor=8": ((8, 32), (64, 1, 8), (64, 2, 8), (16, 64)),  # Four share a key/value head.
    "context=8": ((8, 4), (64, 8, 8), (64, 2, 8), (128, 64)),
    "data=2,tensor=2,context=2": ((4, 16), (64, 4, 8), (64, 1, 8), (64, 64)),
}


@pytest.fixture(scope="module", autouse=True)
def unoptimised():
    """What the CPU's code generator optimises takes longer than these programs run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def train_sharded():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(EXAMPLES)
        return importlib.import_module("train_sharded")


@pytest.fixture(scope="module")
def text(train_sharded):
    return train_sharded.train_gpt.standard_library()[0]


@pytest.fixture(scope="module")
def config(train_sharded):
    return train_sharded.Config(**TINY)


def trained(train_gpt, text, config, setup):
    """Losses of all steps; then model, optimizer state and the last batch."""
    model, state, step, _ = train_gpt.prepare(config, setup)
    losses = []
    for i in range(config.steps):
        batch = setup.batch(train_gpt.random_batch(text, config, i))
        model, state, loss = step(model, state, batch)
        losses.append(loss)
    return np.array(losses), model, state, batch


@pytest.fixture(scope="module")
def one_device(train_sharded, text, config):
    train_gpt = train_sharded.train_gpt
    attention = train_gpt.causal_attention("reference")
    setup = train_gpt.Setup("reference", attention, attention)
    return trained(train_gpt, text, config, setup)


def shard_shape(x):
    assert len(x.sharding.device_set) == 8
    return x.sharding.shard_shape(x.shape)


# Float32 sums in another order. Losses differ by up to 5e-7 here; by 3e-3 if a device is wrong
# about the positions that it has.
LOSS_RTOL = 2e-6
# Adam divides a gradient by its own size, so an error of 2^-24 of a typical gradient is 2^-11 of a
# step where a gradient is 2^-13 of that, as one of a matrix's 2^13 will be. Parameters differ by up
# to 2e-6; by 5e-2 if a device is wrong about its positions.
PARAMETER_ATOL = TINY["learning_rate"] / 1000


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_trains_the_same_model(train_sharded, text, config, one_device, mesh):
    sizes = train_sharded.parse_mesh(mesh)
    train_sharded.check(config, sizes)
    setup = train_sharded.setup_on(train_sharded.make_mesh(sizes), "reference")
    losses, model, state, batch = trained(train_sharded.train_gpt, text, config, setup)
    expected, expected_model, *_ = one_device
    assert expected[-1] < expected[0] - 1, "nothing was learnt"
    np.testing.assert_allclose(losses, expected, rtol=LOSS_RTOL)
    for (path, x), y in zip(
        jax.tree.leaves_with_path(model), jax.tree.leaves(expected_model), strict=True
    ):
        np.testing.assert_allclose(
            x, y, rtol=0, atol=PARAMETER_ATOL, err_msg=jax.tree_util.keystr(path)
        )
    # Every device has its part, and no more.
    tokens, *weights = MESHES[mesh]
    assert shard_shape(batch.tokens) == shard_shape(batch.targets) == tokens
    block = model.blocks[0]
    assert [shard_shape(x) for x in (block.q, block.k, block.down)] == weights
    sizes = sum(math.prod(shard_shape(x)) for x in jax.tree.leaves(model))
    moments = sum(math.prod(shard_shape(x)) for x in jax.tree.leaves(state) if x.ndim)
    assert moments == 2 * sizes


def run(train_sharded, monkeypatch, command):
    """Exit status of one command line."""
    monkeypatch.setattr(sys, "argv", ["train_sharded.py", *command.split()])
    try:
        train_sharded.main()
    except SystemExit as error:
        return error.code
    return 0


def options(**changes):
    given = (TINY | changes).items()
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given)


def test_the_command_line(train_sharded, one_device, monkeypatch, tmp_path):
    command = f"{options()} --mesh context=2,tensor=2 --attention reference --out {tmp_path}"
    assert run(train_sharded, monkeypatch, command) == 0
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["config"] == TINY | {"seed": 0}
    assert log["attention"] == "reference, data=1, context=2, tensor=2"
    np.testing.assert_allclose(log["loss"], one_device[0], rtol=LOSS_RTOL)
    assert log["validation"][-1][0] == TINY["steps"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "sample.txt").read_text().startswith("def ")


def test_on_gpus_it_runs_the_kernels(train_sharded, text, config, without_library):
    train_gpt, config = train_sharded.train_gpt, dataclasses.replace(config, dtype="bfloat16")
    mesh = train_sharded.make_mesh(train_sharded.parse_mesh("data=2,tensor=2,context=2"))
    setup = train_sharded.setup_on(mesh, "fa4")
    model, state, step, _ = train_gpt.prepare(config, setup)
    batch = setup.batch(train_gpt.random_batch(text, config, 0))
    program = step.trace(model, state, batch).lower(lowering_platforms=("cuda",)).as_text()
    for kernel in Kernel:
        assert f"@{target_name(kernel)}(" in program


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ("data=3", {}, "batch 8 is not a multiple of 3, as data=3 needs"),
        ("context=2", {"seqlen": 34}, "seqlen 34 is not a multiple of 4, as context=2 needs"),
        ("data=8", {"seqlen": 33}, "seqlen 33 is not a multiple of 2, as context=1 needs"),
        ("tensor=8", {"heads": 4}, "heads 4 is not a multiple of 8, as tensor=8 needs"),
        ("tensor=3", {"heads": 6}, "the MLP's width 128 is not a multiple of 3"),
        ("tensor=2", {"heads": 6, "kv_heads": 3}, "kv-heads 3 is neither a multiple nor"),
        ("data=3,context=2", {"seqlen": 34}, "batch 8 is not a multiple of 3"),
        ("data=3,context=2", {"seqlen": 34}, "seqlen 34 is not a multiple of 4"),
        ("data=4,tensor=4", {}, "the mesh has 16 devices, but JAX sees 8"),
        ("model=2", {}, "expected each of data, context, tensor at most once"),
        ("data=2,data=2", {}, "expected each of data, context, tensor at most once"),
        ("data=0", {}, "expected each of data, context, tensor at most once"),
        ("data", {}, "expected each of data, context, tensor at most once"),
        ("data=2", {"steps": 0}, "steps is 0; it must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(
    train_sharded, monkeypatch, tmp_path, capsys, mesh, changes, message
):
    command = f"{options(**changes)} --mesh {mesh} --out {tmp_path / 'out'}"
    assert run(train_sharded, monkeypatch, command) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
