# SPDX-License-Identifier: Apache-2.0
"""The README says what is true: its example runs and its table is the build's."""

import pathlib
import re
import warnings

import jax.numpy as jnp

from fa4_jax import FallbackWarning, _variants, flash_attention

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def between(name):
    """The text between the marker comments of this name."""
    (text,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    return text.strip()


def test_examples_run():
    """One after another: what the first defines, the second uses."""
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)  # On a CPU, as the README says.
        for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
            exec(code, names)
    assert names["mesh"].size > 1
    expected = flash_attention(*(names[name] for name in "qkv"), causal=True)
    assert float(jnp.abs(names["out"] - expected).astype(jnp.float32).max()) < 2e-2
    assert names["dq"].shape == names["q"].shape
    assert names["dk"].shape == names["dv"].shape == names["k"].shape
    for gradient in ("dq", "dk", "dv"):
        assert float(jnp.abs(names[gradient].astype(jnp.float32)).max()) > 0


def test_support_table_is_generated():
    assert between("support-table") == _variants.support_table().strip()


def test_commands_are_single_lines():
    for name in ("train-command", "test-command"):
        fence, command, end = between(name).splitlines()
        assert (fence, end) == ("```sh", "```")
        assert "pip install" in command
