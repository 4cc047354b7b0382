# SPDX-License-Identifier: Apache-2.0
"""`examples/train_gpt.py`: it learns, records what it did, and compares runs."""

import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "train_gpt.py"
TINY = "--preset cpu --layers 1 --width 64 --seqlen 64 --batch 8 --steps 24 --learning-rate 1e-2"


@pytest.fixture(scope="module")
def train_gpt():
    spec = importlib.util.spec_from_file_location("train_gpt", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


def run(train_gpt, monkeypatch, command):
    """Exit status of one command line."""
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *command.split()])
    try:
        train_gpt.main()
    except SystemExit as error:
        return error.code
    return 0


@pytest.fixture(scope="module")
def trained(train_gpt, tmp_path_factory):
    """Output folders of two runs that differ in their attention alone."""
    folders = {}
    for attention in ("reference", "xla"):
        folders[attention] = tmp_path_factory.mktemp(attention)
        command = f"{TINY} --attention {attention} --out {folders[attention]}"
        with pytest.MonkeyPatch.context() as monkeypatch:
            assert run(train_gpt, monkeypatch, command) == 0
    return folders


def read(folder):
    return json.loads((folder / "log.json").read_text())


def test_it_learns_and_writes_what_it_promises(trained):
    folder = trained["reference"]
    log = read(folder)
    losses = log["loss"]
    assert len(losses) == 24
    # Nothing learnt yet: no better than 256 equally likely bytes.
    assert np.log(256) - 0.2 < losses[0] < np.log(256) + 1.5
    assert np.mean(losses[-4:]) < 3.6
    assert log["validation"][-1][0] == 24
    assert log["validation"][-1][1] < 3.6
    assert all(float(np.float32(loss)) == loss for loss in losses), "not in full precision"
    assert log["tokens_per_second"] > 0
    assert log["config"]["steps"] == 24
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "sample.txt").read_text().startswith("def ")
    assert str(folder) not in (folder / "log.json").read_text()


def test_attentions_see_the_same_weights_and_data(trained):
    reference, xla = (read(trained[name]) for name in ("reference", "xla"))
    assert reference["config"] == xla["config"]
    np.testing.assert_allclose(reference["loss"], xla["loss"], rtol=1e-3)
    assert reference["loss"] != xla["loss"], "the same code ran twice"


@pytest.mark.parametrize(
    ("factor", "status"), [(1.0, 0), (1.009, 0), (1.011, 1), (0.98, 1), (float("nan"), 1)]
)
def test_compare(train_gpt, trained, monkeypatch, tmp_path, capsys, factor, status):
    changed = read(trained["reference"])
    changed["loss"][21] *= factor  # Step 22.
    changed["loss"][3] *= 2  # Step 4 doesn't count.
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(changed))
    first = trained["reference"] / "log.json"
    command = f"--compare {first} {path} --out {tmp_path}"
    assert run(train_gpt, monkeypatch, command) == status
    output = capsys.readouterr().out
    assert ("NOT within 1 %" in output) == bool(status)
    if factor != 1.0:
        assert "at step 22" in output
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_compare_refuses_what_is_not_comparable(train_gpt, trained, monkeypatch, tmp_path):
    other = read(trained["reference"])
    other["config"]["seed"] += 1
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    first = trained["reference"] / "log.json"
    message = run(train_gpt, monkeypatch, f"--compare {first} {path} --out {tmp_path}")
    assert "differ in config" in message
    assert run(train_gpt, monkeypatch, f"--compare {first} --out {tmp_path}") == 2


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about machines without a GPU")
@pytest.mark.parametrize("attention", ["fa4", "cudnn"])
def test_gpu_attention_on_a_cpu_says_what_to_do(train_gpt, monkeypatch, tmp_path, attention):
    message = run(train_gpt, monkeypatch, f"{TINY} --attention {attention} --out {tmp_path}")
    assert "needs an NVIDIA GPU" in message
    assert "--attention reference" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", ["--steps 0", "--heads 3 --kv-heads 2", "--dtype int8"])
def test_bad_options_are_refused(train_gpt, monkeypatch, tmp_path, options):
    assert run(train_gpt, monkeypatch, f"--out {tmp_path} {options}") == 2


def test_batches_depend_on_seed_and_step_alone(train_gpt):
    text = np.arange(100_000, dtype=np.uint32)
    config = train_gpt.PRESETS["cpu"]
    windows = train_gpt.random_batch(text, config, 7)
    assert windows.shape == (config.batch, config.seqlen + 1)
    assert (np.diff(windows.astype(np.int64), axis=1) == 1).all()
    np.testing.assert_array_equal(windows, train_gpt.random_batch(text, config, 7))
    assert not np.array_equal(windows, train_gpt.random_batch(text, config, 8))


def test_validation_text_is_not_trained_on(train_gpt):
    training, held_out = (part.tobytes() for part in train_gpt.standard_library())
    assert len(training) > 5_000_000
    assert 0.02 < len(held_out) / len(training) < 0.15
    window = held_out[len(held_out) // 2 :][:2000]
    assert window not in training


def test_gpu_preset_is_a_real_model(train_gpt):
    config = train_gpt.PRESETS["gpu"]
    model = jax.eval_shape(lambda: train_gpt.GPT(config))
    assert sum(weight.size for weight in jax.tree.leaves(model)) >= 100e6
    assert config.seqlen >= 2048
    assert config.dtype == "bfloat16"
    assert config.head_dim in (64, 128)
    assert config.heads > config.kv_heads
