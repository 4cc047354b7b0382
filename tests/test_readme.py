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
    assert distance(names["out"], expected) < 2e-2
    assert distance(names["jax_nn_out"], expected) < 2e-2
    assert names["flax_out"].shape == names["equinox_out"].shape == (2, 128, 64)
    check_ports(names)
    assert names["dq"].shape == names["q"].shape
    assert names["dk"].shape == names["dv"].shape == names["k"].shape
    for gradient in ("dq", "dk", "dv"):
        assert float(jnp.abs(names[gradient].astype(jnp.float32)).max()) > 0


def distance(x, y):
    return float(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max())


def check_ports(names):
    """What the ports of other libraries give is what `flash_attention` does."""
    q, k, v = (names[name][:, :256] for name in "qkv")
    ids = {"q_segment_ids": names["ids"], "kv_segment_ids": names["ids"]}
    window = {"window_size": (127, 0)}
    packed = jnp.repeat(jnp.arange(3), jnp.array([100, 100, 56]), total_repeat_length=256)[None]
    packed = {"q_segment_ids": packed, "kv_segment_ids": packed}
    for result, expected in (
        (names["tpu_out"].swapaxes(1, 2), flash_attention(q, k, v, causal=True, **ids)),
        (names["splash_out"].swapaxes(1, 2), flash_attention(q, k, v, **window)),
        (names["maxtext_out"], flash_attention(q, k, v, softcap=50.0, **window, **ids)),
        (names["packed_out"][None], flash_attention(q[:1], k[:1], v[:1], causal=True, **packed)),
    ):
        assert result.shape == expected.shape
        assert distance(result, expected) < 4e-2  # q scaled before is rounded once more


def test_support_table_is_generated():
    assert between("support-table") == _variants.support_table().strip()


def test_commands_are_single_lines():
    for name in ("train-command", "test-command"):
        fence, command, end = between(name).splitlines()
        assert (fence, end) == ("```sh", "```")
        assert "pip install" in command
