# SPDX-License-Identifier: Apache-2.0
"""`examples/train_swap.py`: models learn the same with their library's attention and with ours."""

import csv
import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
STEPS = 12


@pytest.fixture(scope="module")
def train_swap():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        spec = importlib.util.spec_from_file_location("train_swap", EXAMPLES / "train_swap.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "train_swap", module)  # Dataclasses look it up.
        spec.loader.exec_module(module)
        yield module


def run(train_swap, monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["train_swap.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        train_swap.main()
    return stopped.value.code


def test_curves_agree_and_are_written(train_swap, monkeypatch, tmp_path) -> None:
    assert run(train_swap, monkeypatch, "--steps", STEPS, "--out", tmp_path) == 0
    summary = json.loads((tmp_path / "swap.json").read_text())
    for library in ("flax", "equinox"):
        with (tmp_path / f"{library}.csv").open() as file:
            rows = list(csv.DictReader(file))
        own, fa4 = (np.array([float(row[name]) for row in rows]) for name in ("own", "fa4"))
        assert len(own) == STEPS
        # It learns: a step further back than the start would be no sign of it.
        assert own[-3:].mean() < own[0] - 0.3
        # Not the same computation twice, and the same curve.
        assert (own != fa4).any()
        np.testing.assert_allclose(fa4, own, rtol=1e-4)
        assert summary[library]["largest_difference"] == np.max(np.abs(fa4 - own) / own)
    assert (tmp_path / "swap.png").stat().st_size > 10_000


def test_curves_that_differ_fail(train_swap, monkeypatch, tmp_path) -> None:
    curves = iter(([3.0, 2.0], [3.0, 2.03]))
    monkeypatch.setattr(train_swap, "train", lambda *_: train_swap.Run(next(curves), 1.0))
    assert run(train_swap, monkeypatch, "--library", "flax", "--steps", 2, "--out", tmp_path) == 1
    difference = json.loads((tmp_path / "swap.json").read_text())["flax"]["largest_difference"]
    assert difference == pytest.approx(0.015)


def test_one_step_has_no_time(train_swap, monkeypatch, tmp_path, capsys) -> None:
    assert run(train_swap, monkeypatch, "--steps", 1, "--out", tmp_path) == 2
    assert "--steps is 1" in capsys.readouterr().err
