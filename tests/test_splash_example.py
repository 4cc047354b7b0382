# SPDX-License-Identifier: Apache-2.0
"""`examples/splash_attention`: a program for TPUs, and the same one ported by its import."""

import difflib
import importlib.util
import pathlib

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "examples" / "splash_attention"


def load(name):
    spec = importlib.util.spec_from_file_location(f"splash_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_diff_is_the_real_one():
    """And says that nothing but imports differs. `diff -u tpu.py gpu.py` makes it."""
    old, new = ((FOLDER / name).read_text().splitlines() for name in ("tpu.py", "gpu.py"))
    real = list(difflib.unified_diff(old, new, "tpu.py", "gpu.py", lineterm=""))
    kept = (FOLDER / "port.diff").read_text().splitlines()
    assert kept == real
    changed = [line for line in real[2:] if line[0] in "+-"]
    assert changed and all("import" in line or line == "+" for line in changed)


@pytest.fixture(scope="module")
def losses():
    return load("gpu").train(4)


def test_the_port_learns(losses):
    assert losses[-1] < losses[0]


def test_it_gives_the_losses_of_the_tpu_program(losses):
    """Whose kernels run interpreted here."""
    np.testing.assert_allclose(losses, load("tpu").train(4), rtol=1e-5)
