# SPDX-License-Identifier: Apache-2.0
"""`fa4_jax.compat.maxtext` against float64 attention with the masks of MaxText's dot_product path,
and the recipe of its docstring in a class with MaxText's attributes."""

import enum
import functools
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compat import distance, tokens, with_gradients
from reference import Oracle, as64, assert_close

import fa4_jax.compat.maxtext
from fa4_jax.compat import maxtext

B, T, N, K, D = 2, 12, 4, 2, 8
IDS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [3] * 12], np.int32)
SINKS = jnp.linspace(-1.0, 1.0, N)
ROWS, KEYS = np.arange(T)[:, None], np.arange(T)


class AttentionType(enum.Enum):
    """MaxText's, as far as there is one here."""

    GLOBAL = "global"
    LOCAL_SLIDING = "local_sliding"
    CHUNK = "chunk"
    MLA = "mla"
    FULL = "full"
    COMPRESSED = "compressed"


# What MaxText's generate_attention_mask lets a query see, for a window of 4 or chunks of 5.
SEEN = {
    "GLOBAL": KEYS <= ROWS,
    "MLA": KEYS <= ROWS,
    "LOCAL_SLIDING": (KEYS > ROWS - 4) & (KEYS <= ROWS),
    "CHUNK": (KEYS // 5 == ROWS // 5) & (KEYS <= ROWS),
    "FULL": KEYS < T,
}


def operands(v_dim=D):
    shapes = (B, T, N, D), (B, T, K, D), (B, T, K, v_dim)
    return [tokens(*shape, seed=seed) for seed, shape in enumerate(shapes)]


class Op:
    """What the recipe uses of `AttentionOp`."""

    def __init__(self, kind, softcap=None, load_balanced=False):
        self.attention_kernel = "fa4"
        self.attention_type = AttentionType[kind]
        self.sliding_window_size, self.chunk_attn_window_size = 4, 5
        self.attn_logits_soft_cap = softcap
        self.config = type("Config", (), {"context_parallel_load_balance": load_balanced})

    def _context_parallel_size(self):
        return 2

    def apply_attention(self, query, key, value, decoder_segment_ids, sinks=None, **other):
        """MaxText's arguments and locals, and the branch that the docstring gives."""
        names = ("decoder_segment_ids_kv", "previous_chunk", "bidirectional_mask", "indexer_mask",
                 "compressed_mask")  # fmt: skip
        scope = dict.fromkeys(names) | {"use_ragged_attention": False, "record_max_logits": False}
        scope |= {"model_mode": "train"} | other
        scope |= {"query": query, "key": key, "value": value, "sinks": sinks}
        scope |= {"decoder_segment_ids": decoder_segment_ids, "self": self, "fa4_jax": fa4_jax}
        exec(recipe(), scope)
        return scope["branch"]()


@functools.cache
def recipe():
    """The docstring's lines as a function of no arguments."""
    (code,) = re.findall(r"\n\n(    elif .*?)\n\n", maxtext.__doc__, re.DOTALL)
    code = textwrap.dedent(code).replace("elif", "if", 1)
    return compile("def branch():\n" + textwrap.indent(code, "  "), "recipe", "exec")


@pytest.mark.parametrize(
    ("kind", "softcap", "sinks", "ids"),
    [
        ("LOCAL_SLIDING", 0.7, SINKS, IDS),
        ("CHUNK", None, None, None),
        ("FULL", None, SINKS, IDS),
    ],
)
def test_the_recipe_gives_the_numbers_of_the_definition(kind, softcap, sinks, ids):
    op = Op(kind, softcap)
    q, k, v = operands()

    def call(q, k, v):
        out, *rest = op.apply_attention(q, k, v, ids, sinks)
        assert rest == [None, None]
        return out

    out, gradients = with_gradients(call)(q, k, v)
    seen = SEEN[kind]
    if ids is not None:
        seen = (seen & (ids[:, :, None] == ids[:, None, :]))[:, None, None]
    oracle = Oracle(seen, 1.0, softcap=softcap, sinks=None if sinks is None else as64(sinks)[0])
    operands64 = as64(q, k, v)
    expected, lse = oracle.forward(*operands64)
    assert_close(out, expected)
    dout = np.cos(np.arange(out.size)).reshape(out.shape)
    for got, wanted in zip(gradients, oracle.backward(*operands64, dout, 0 * lse), strict=False):
        assert_close(got, wanted)


def test_every_argument_matters():
    q, k, v = operands()
    plain, *_ = maxtext.attention(q, k, v)
    changed = {
        "attention_type": "full",
        "decoder_segment_ids": IDS,
        "attn_logits_soft_cap": 0.5,
        "sinks": SINKS,
    }
    for name, value in changed.items():
        assert distance(maxtext.attention(q, k, v, **{name: value})[0], plain) > 1e-2, name
    assert distance(maxtext.attention(q, k, v, model_mode="prefill")[0], plain) == 0
    assert distance(maxtext.attention(q, k, v, attn_logits_soft_cap=0.0)[0], plain) == 0
    for kind, name in (
        ("local_sliding", "sliding_window_size"),
        ("chunk", "chunk_attn_window_size"),
    ):
        few, many = (
            maxtext.attention(q, k, v, attention_type=kind, **{name: size})[0] for size in (3, T)
        )
        assert distance(few, plain) > 1e-2
        assert_close(many, plain)
    # Other keys' ids; and a negative one, which hides its keys from whoever has it.
    hidden = jnp.asarray(IDS).at[1].set(-1)
    out = maxtext.attention(q, k, v, hidden, decoder_segment_ids_kv=hidden)[0]
    expected = maxtext.attention(q, k, v, IDS)[0]
    assert np.all(out[1] == 0) and distance(out[0], expected[0]) == 0
    assert maxtext.attention(*operands(v_dim=4), attention_type="mla")[0].shape == (B, T, N, 4)
    with pytest.raises(NotImplementedError, match="float32"):
        maxtext.attention(q, k, v, implementation="fa4")


@pytest.mark.parametrize(
    ("changes", "error", "argument"),
    [
        ({"previous_chunk": 1}, NotImplementedError, "previous_chunk"),
        ({"bidirectional_mask": 1}, NotImplementedError, "bidirectional_mask"),
        ({"indexer_mask": 1}, NotImplementedError, "indexer_mask"),
        ({"compressed_mask": 1}, NotImplementedError, "compressed_mask"),
        ({"use_ragged_attention": True}, NotImplementedError, "use_ragged_attention"),
        ({"record_max_logits": True}, NotImplementedError, "record_max_logits"),
        ({"load_balanced": True}, NotImplementedError, "load_balanced"),
        ({"model_mode": "autoregressive"}, NotImplementedError, "model_mode: got 'autoregressive'"),
        ({"attention_type": AttentionType.COMPRESSED}, NotImplementedError, "attention_type: got"),
        ({"attention_type": "local_sliding"}, ValueError, "sliding_window_size: got None"),
        ({"attention_type": "chunk"}, ValueError, "chunk_attn_window_size: got None"),
        ({"decoder_segment_ids_kv": IDS}, ValueError, "decoder_segment_ids_kv: got ids"),
        ({"query": [1.0]}, TypeError, "query: got list"),
        ({"key": jnp.ones((B, T, 3, D))}, ValueError, "value: got heads"),
    ],
)
def test_errors_name_the_argument(changes, error, argument):
    arguments = dict(zip(("query", "key", "value"), operands(), strict=True)) | changes
    with pytest.raises(error, match=f"fa4_jax: {argument}"):
        maxtext.attention(**arguments)


def test_the_recipe_passes_on_what_is_refused():
    with pytest.raises(NotImplementedError, match="load_balanced"):
        Op("GLOBAL", load_balanced=True).apply_attention(*operands(), IDS)
    with pytest.raises(NotImplementedError, match="bidirectional_mask"):
        Op("GLOBAL").apply_attention(*operands(), IDS, bidirectional_mask=jnp.ones((B, T)))
    assert jax.eval_shape(Op("GLOBAL").apply_attention, *operands(), IDS)[0].shape == (B, T, N, D)
