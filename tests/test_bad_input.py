# SPDX-License-Identifier: Apache-2.0
"""Every bad input gets its exception, with argument, got and expected, before anything runs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fa4_jax import (
    dot_product_attention,
    flash_attention,
    flash_attention_varlen,
    is_supported,
)
from fa4_jax._variants import MAX_DIMENSION


class ForeignTensor:
    """Has a shape and a dtype, as another framework's tensor does, and isn't an array of ours."""

    shape = (1, 8, 2, 64)
    dtype = "float16"


def ones(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.ones(shape, dtype)


IDS = np.zeros((2, 16), np.int32)
GOOD = {"q": ones(2, 8, 4, 64), "k": ones(2, 16, 2, 64), "v": ones(2, 16, 2, 64)}


def call(function: Callable = flash_attention, **changes: Any) -> Callable[[], Any]:
    """A call with good operands but for `changes`."""
    arguments = {**GOOD, **changes}
    return functools.partial(function, *(arguments.pop(name) for name in "qkv"), **arguments)


def jax_nn(**changes: Any) -> Callable[[], Any]:
    return call(dot_product_attention, **changes)


def fa4(**changes: Any) -> Callable[[], Any]:
    return call(**{"implementation": "fa4", **changes})


def reference(**changes: Any) -> Callable[[], Any]:
    return call(**{"implementation": "reference", **changes})


def packed(**changes: Any) -> Callable[[], Any]:
    """A good call of packed sequences but for `changes`."""
    arguments = {name: GOOD["k"][0] for name in "qkv"} | {"cu_seqlens_q": np.array([0, 5, 16])}
    arguments |= changes
    return functools.partial(
        flash_attention_varlen,
        *(arguments.pop(name) for name in (*"qkv", "cu_seqlens_q")),
        **arguments,
    )


def traced(name: str, value: float) -> Callable[[], Any]:
    return lambda: jax.jit(lambda x: call(**{name: x})())(value)


def all_of(dtype: Any) -> dict[str, jax.Array]:
    return {name: x.astype(dtype) for name, x in GOOD.items()}


# The head dims with a forward kernel, as messages list them.
BUILT = "64, 96, 128, 192/128, 192, 256"


def head_dims(qk: int, v: int | None = None) -> dict[str, jax.Array]:
    return {
        "q": ones(2, 8, 4, qk),
        "k": ones(2, 16, 2, qk),
        "v": ones(2, 16, 2, qk if v is None else v),
    }


def abstract(q: tuple, k: tuple, v: tuple) -> Callable[[], Any]:
    shapes = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (q, k, v))
    return functools.partial(is_supported, *shapes)


class Bad(NamedTuple):
    id: str
    run: Callable[[], Any]
    error: type[Exception]
    pattern: str


WRONG_OBJECTS = [
    Bad("q None", call(q=None), TypeError, r"q: got NoneType, expected a jax\.Array"),
    Bad("k list", call(k=[[1.0]]), TypeError, r"k: got list, expected a jax\.Array"),
    Bad("v str", call(v="v"), TypeError, r"v: got str, expected a jax\.Array"),
    Bad("q float", call(q=1.0), TypeError, r"q: got float, expected a jax\.Array"),
    Bad("q foreign", call(q=ForeignTensor()), TypeError, r"q: got .*ForeignTensor, expected"),
    Bad("q shape only", call(q=jax.ShapeDtypeStruct((2, 8, 4, 64), jnp.bfloat16)), TypeError,
        r"q: got .*ShapeDtypeStruct, expected a jax\.Array"),
    Bad("k object array", call(k=np.array([None])), TypeError,
        r"k: got numpy\.ndarray of object, expected"),
    Bad("v string array", call(v=np.array(["a"])), TypeError,
        r"v: got numpy\.ndarray of <U1, expected"),
    Bad("query None, jax.nn's name", jax_nn(q=None), TypeError, r"query: got NoneType, expected"),
    Bad("value list, jax.nn's name", jax_nn(v=[]), TypeError, r"value: got list, expected"),
    Bad("missing operand", lambda: flash_attention(GOOD["q"], GOOD["k"]), TypeError,
        r"missing.*'v'"),
    Bad("unknown keyword", call(dropout=0.1), TypeError, r"dropout"),
    Bad("unknown keyword of is_supported", call(is_supported, dropout=0.1), TypeError, r"dropout"),
]  # fmt: skip

WRONG_DTYPES = [
    Bad("int32", call(**all_of(jnp.int32)), TypeError, r"q: got dtype int32, expected a floating"),
    Bad("bool", call(**all_of(jnp.bool_)), TypeError, r"q: got dtype bool, expected a floating"),
    Bad("complex", call(**all_of(jnp.complex64)), TypeError, r"q: got dtype complex64, expected"),
    Bad("v int", call(v=GOOD["v"].astype(jnp.int8)), TypeError, r"v: got dtype int8, expected"),
    Bad("fp8", call(**all_of(jnp.float8_e4m3fn)), NotImplementedError,
        r"q: got dtype float8_e4m3fn, expected bfloat16, float16.*cast to bfloat16"),
    Bad("fp8 on the reference", reference(**all_of(jnp.float8_e5m2)), NotImplementedError,
        r"q: got dtype float8_e5m2, expected bfloat16"),
    Bad("mixed q k", call(k=GOOD["k"].astype(jnp.float16)), ValueError,
        r"k: got dtype float16, expected q's dtype bfloat16"),
    Bad("mixed q v", call(v=GOOD["v"].astype(jnp.float32)), ValueError,
        r"v: got dtype float32, expected q's dtype bfloat16"),
    Bad("mixed, jax.nn's names", jax_nn(v=GOOD["v"].astype(jnp.float32)), ValueError,
        r"value: got dtype float32, expected query's dtype"),
    Bad("float32 on fa4", fa4(**all_of(jnp.float32)), NotImplementedError,
        r"dtype float32 has no kernel \(built: bfloat16, float16\).*implementation=None"),
]  # fmt: skip

WRONG_SHAPES = [
    Bad("rank 0", call(q=ones()), ValueError,
        r"q: got rank 0, shape \(\), expected rank 4 .* rank 3"),
    Bad("rank 1", call(q=ones(64)), ValueError, r"q: got rank 1, shape \(64,\), expected rank 4"),
    Bad("rank 2", call(k=ones(16, 64)), ValueError, r"k: got rank 2, shape \(16, 64\), expected"),
    Bad("rank 5", call(v=ones(1, 2, 16, 2, 64)), ValueError, r"v: got rank 5, .*expected rank 4"),
    Bad("rank 6", call(q=ones(1, 1, 2, 8, 4, 64)), ValueError, r"q: got rank 6, .*expected rank 4"),
    Bad("rank 3 and 4", call(k=ones(16, 2, 64)), ValueError,
        r"k: got rank 3, shape \(16, 2, 64\), expected q's rank 4 \(shape \(2, 8, 4, 64\)\)"),
    Bad("batch q k", call(k=ones(3, 16, 2, 64)), ValueError,
        r"k: got batch size 3 in shape \(3, 16, 2, 64\), expected batch size 2 as in q, shape"),
    Bad("batch q v", call(v=ones(1, 16, 2, 64)), ValueError,
        r"v: got batch size 1 .*expected batch"),
    Bad("head_dim q k", call(k=ones(2, 16, 2, 128)), ValueError,
        r"k: got head_dim 128 .*expected head_dim 64 as in q"),
    Bad("length k v", call(v=ones(2, 15, 2, 64)), ValueError,
        r"v: got length 15 in shape \(2, 15, 2, 64\), expected length 16 as in k"),
    Bad("heads k v", call(v=ones(2, 16, 4, 64)), ValueError,
        r"v: got heads 4 .*expected heads 2 as in k"),
    Bad("heads not a multiple", call(k=ones(2, 16, 3, 64), v=ones(2, 16, 3, 64)), ValueError,
        r"q: got 4 heads in shape \(2, 8, 4, 64\), expected a multiple of k's 3 heads"),
    Bad("more kv heads", call(k=ones(2, 16, 8, 64), v=ones(2, 16, 8, 64)), ValueError,
        r"q: got 4 heads .*expected a multiple of k's 8 heads"),
    Bad("no q heads", call(q=ones(2, 8, 0, 64)), ValueError,
        r"q: got heads 0 .*expected heads >= 1"),
    Bad("no kv heads", call(k=ones(2, 16, 0, 64), v=ones(2, 16, 0, 64)), ValueError,
        r"k: got heads 0 in shape \(2, 16, 0, 64\), expected heads >= 1"),
    Bad("head_dim 0", call(**head_dims(0)), ValueError,
        r"q: got head_dim 0 .*expected head_dim >= 1"),
    Bad("head_dim_v 0", call(**head_dims(64, 0)), ValueError, r"v: got head_dim 0 .*expected"),
    Bad("length beyond int32", abstract((1, 2**31, 1, 64), *2 * [(1, 8, 1, 64)]), ValueError,
        rf"q: got shape \(1, 2147483648, 1, 64\), expected dimensions <= {MAX_DIMENSION}"),
    Bad("batch beyond int32", abstract(*3 * [(2**40, 8, 1, 64)]), ValueError,
        r"q: got shape \(1099511627776, 8, 1, 64\), expected dimensions"),
    Bad("heads, jax.nn's names", jax_nn(k=ones(2, 16, 3, 64), v=ones(2, 16, 3, 64)), ValueError,
        r"query: got 4 heads .*a multiple of key's 3 heads"),
    *(
        Bad(f"head_dim {d} on fa4", fa4(**head_dims(d)), NotImplementedError,
            rf"head_dim {d} has no bf16 forward kernel \(built: {BUILT}\).*implementation=None")
        for d in (257, 264, 512)
    ),
    Bad("head_dim 264/64 on fa4", fa4(**head_dims(264, 64)), NotImplementedError,
        r"head_dim 264/64 has no bf16 forward kernel \(built: 64, .*\)"),
    Bad("head_dim 64/264 on fa4", fa4(**head_dims(64, 264)), NotImplementedError,
        r"head_dim 64/264 has no bf16 forward kernel"),
]  # fmt: skip

WRONG_OPTIONS = [
    Bad("scale nan", call(softmax_scale=float("nan")), ValueError,
        r"softmax_scale: got nan, expected a number that is finite"),
    Bad("scale inf", call(softmax_scale=np.inf), ValueError, r"softmax_scale: got inf, expected"),
    Bad("scale -inf", call(softmax_scale=-np.inf), ValueError,
        r"softmax_scale: got -inf, expected"),
    Bad("scale beyond float32", call(softmax_scale=1e39), ValueError,
        r"softmax_scale: got 1e\+39, expected a number that is finite in float32"),
    Bad("scale int beyond float", call(softmax_scale=10**400), ValueError,
        r"softmax_scale: got inf"),
    Bad("scale traced", traced("softmax_scale", 0.5), NotImplementedError,
        r"softmax_scale: got a traced value, expected a static Python value; .*fold it into q"),
    Bad("scale str", call(softmax_scale="0.5"), TypeError,
        r"softmax_scale: got '0.5' \(str\), expec"),
    Bad("scale bool", call(softmax_scale=True), TypeError,
        r"softmax_scale: got True \(bool\), expec"),
    Bad("scale complex", call(softmax_scale=1j), TypeError, r"softmax_scale: got 1j \(complex\)"),
    Bad("scale array", call(softmax_scale=np.ones(2)), TypeError,
        r"softmax_scale: got .*expected a Py"),
    Bad("scale jax.Array", call(softmax_scale=jnp.float32(0.5)), TypeError,
        r"softmax_scale: got .*expected a Python or NumPy number; convert with float"),
    Bad("scale, jax.nn's name", jax_nn(scale=float("nan")), ValueError,
        r" scale: got nan, expected"),
    Bad("causal None", call(causal=None), TypeError, r"causal: got None .*expected True or False"),
    Bad("causal 1", call(causal=1), TypeError, r"causal: got 1 \(int\), expected True or False"),
    Bad("causal str", call(causal="yes"), TypeError, r"causal: got 'yes' \(str\), expected True"),
    Bad("causal traced", traced("causal", 1.0), NotImplementedError, r"causal: got a traced value"),
    Bad("is_causal 0, jax.nn's name", jax_nn(is_causal=0), TypeError, r"is_causal: got 0 \(int\)"),
    Bad("alignment", call(causal_alignment="right"), ValueError,
        r"causal_alignment: got 'right', expected one of 'top_left', 'bottom_right'"),
    Bad("alignment None", call(causal_alignment=None), ValueError, r"causal_alignment: got None"),
    Bad("window -1", call(window_size=(-1, 0)), ValueError,
        r"window_size\[0\]: got -1, expected an int >= 0 or None; write None for FlashAtt"),
    Bad("window right -2", call(window_size=(3, -2)), ValueError,
        r"window_size\[1\]: got -2, expec"),
    Bad("window float", call(window_size=(2.0, 0)), TypeError,
        r"window_size\[0\]: got 2.0 \(float\), expected an int or None"),
    Bad("window bool", call(window_size=(True, 0)), TypeError,
        r"window_size\[0\]: got True \(bool\)"),
    Bad("window str", call(window_size="44"), TypeError,
        r"window_size: got '44' \(str\), expected a"),
    Bad("window int", call(window_size=4), TypeError,
        r"window_size: got 4 \(int\), expected a pair"),
    Bad("window None", call(window_size=None), TypeError,
        r"window_size: got None .*expected a pair"),
    Bad("window one", call(window_size=(1,)), ValueError,
        r"window_size: got 1 entries, expected a pai"),
    Bad("window three", call(window_size=(1, 2, 3)), ValueError, r"window_size: got 3 entries"),
    Bad("window traced", lambda: jax.jit(lambda w: call(window_size=(w, 0))())(3),
        NotImplementedError, r"window_size\[0\]: got a traced value, expected a static"),
    Bad("local window float", jax_nn(local_window_size=1.5), TypeError,
        r"local_window_size\[0\]: got 1.5 \(float\)"),
    Bad("local window -1", jax_nn(local_window_size=(4, -1)), ValueError,
        r"local_window_size\[1\]: got -1, expected an int >= 0"),
    Bad("softcap 0", call(softcap=0.0), ValueError,
        r"softcap: got 0.0, expected a number > 0; write None for no softcap"),
    Bad("softcap negative", call(softcap=-3), ValueError,
        r"softcap: got -3.0, expected a number > 0"),
    Bad("softcap nan", call(softcap=np.nan), ValueError,
        r"softcap: got nan, expected a number that"),
    Bad("softcap traced", traced("softcap", 3.0), NotImplementedError,
        r"softcap: got a traced value"),
    Bad("softcap str", call(softcap="x"), TypeError, r"softcap: got 'x' \(str\), expected"),
    Bad("return_lse None", call(return_lse=None), TypeError, r"return_lse: got None"),
    Bad("return_residual 1", jax_nn(return_residual=1), TypeError,
        r"return_residual: got 1 \(int\)"),
    Bad("deterministic None", call(deterministic=None), TypeError, r"deterministic: got None"),
    Bad("implementation cudnn", call(implementation="cudnn"), ValueError,
        r"implementation: got 'cudnn', expected one of None, 'fa4', 'reference'"),
    Bad("implementation xla", jax_nn(implementation="xla"), ValueError,
        r"implementation: got 'xla'"),
    Bad("implementation True", call(implementation=True), ValueError, r"implementation: got True"),
    Bad("two reasons on fa4",
        jax_nn(implementation="fa4", bias=ones(1, 1, 8, 16), **head_dims(264)), NotImplementedError,
        r"head_dim 264 has no bf16 forward kernel.*; bias isn't in the kernels yet"),
]  # fmt: skip

WRONG_ARRAYS = [
    Bad("q lengths float", call(query_seq_lengths=np.ones(2)), TypeError,
        r"query_seq_lengths: got dtype float32, expected an integer dtype"),
    Bad("kv lengths bool", call(key_value_seq_lengths=np.ones(2, bool)), TypeError,
        r"key_value_seq_lengths: got dtype bool, expected an integer dtype"),
    Bad("q lengths list", call(query_seq_lengths=[3, 4]), TypeError,
        r"query_seq_lengths: got list, expected a jax\.Array"),
    Bad("q lengths shape", call(query_seq_lengths=np.ones(3, int)), ValueError,
        r"query_seq_lengths: got shape \(3,\), expected shape \(2,\)"),
    Bad("kv lengths rank", call(key_value_seq_lengths=np.ones((2, 1), int)), ValueError,
        r"key_value_seq_lengths: got shape \(2, 1\), expected shape \(2,\)"),
    Bad("kv_start shape", call(kv_start=np.ones(8, int)), ValueError,
        r"kv_start: got shape \(8,\), expected shape \(2, 8\)"),
    Bad("kv_end dtype", call(kv_end=np.ones((2, 8))), TypeError,
        r"kv_end: got dtype float32, expecte"),
    Bad("kv_start traced float", traced("kv_start", 1.0), TypeError,
        r"kv_start: got dtype float32, expected an integer dtype"),
    Bad("sinks shape", call(sinks=jnp.zeros(2)), ValueError,
        r"sinks: got shape \(2,\), expected shape \(4,\), one for each query head"),
    Bad("sinks rank 2", call(sinks=jnp.zeros((2, 4))), ValueError, r"sinks: got shape \(2, 4\)"),
    Bad("sinks int", call(sinks=jnp.zeros(4, int)), TypeError,
        r"sinks: got dtype int32, expected a floating dtype"),
    Bad("sinks fp8", call(sinks=jnp.zeros(4, jnp.float8_e4m3fn)), NotImplementedError,
        r"sinks: got dtype float8_e4m3fn, expected bfloat16"),
    Bad("sinks float", call(sinks=0.0), TypeError, r"sinks: got float, expected a jax\.Array"),
    Bad("segment ids float", call(q_segment_ids=jnp.ones((2, 8)), kv_segment_ids=IDS),
        TypeError, r"q_segment_ids: got dtype float32, expected an integer dtype"),
    Bad("segment ids shape", call(q_segment_ids=IDS, kv_segment_ids=IDS), ValueError,
        r"q_segment_ids: got shape \(2, 16\), expected shape \(2, 8\)"),
    Bad("segment ids of kv only", call(kv_segment_ids=IDS), ValueError,
        r"q_segment_ids: got None, expected ids, as kv_segment_ids has them; pass both or neither"),
    Bad("segment ids of q only", jax_nn(q_segment_ids=IDS[:, :8]), ValueError,
        r"kv_segment_ids: got None, expected ids, as q_segment_ids has them"),
    Bad("segment ids of two dtypes",
        call(q_segment_ids=IDS[:, :8], kv_segment_ids=IDS.astype(np.int8)), ValueError,
        r"kv_segment_ids: got dtype int8, expected q_segment_ids' dtype int32"),
    Bad("segment ids beyond int32",
        call(q_segment_ids=IDS[:, :8], kv_segment_ids=IDS.astype(np.int64) + 2**40), ValueError,
        r"kv_segment_ids: got int64 ids that int32 can't hold, expected int32 ids"),
    Bad("segment ids list", call(q_segment_ids=[[1]], kv_segment_ids=IDS), TypeError,
        r"q_segment_ids: got list, expected a jax\.Array"),
    Bad("bias on fa4", jax_nn(bias=ones(2, 4, 8, 16), implementation="fa4"), NotImplementedError,
        r"bias isn't in the kernels yet"),
    Bad("mask on fa4", jax_nn(mask=np.ones((1, 1, 8, 16), bool), implementation="fa4"),
        NotImplementedError, r"mask isn't in the kernels yet"),
    Bad("bias shape", jax_nn(bias=ones(2, 4, 8, 15)), ValueError,
        r"bias: got shape \(2, 4, 8, 15\), expected \(2, 4, 8, 16\) or 1 in place of a size"),
    Bad("bias rank 5", jax_nn(bias=ones(1, 2, 4, 8, 16)), ValueError, r"bias: got shape \(1, 2, 4"),
    Bad("bias bool", jax_nn(bias=np.ones((2, 4, 8, 16), bool)), TypeError,
        r"bias: got dtype bool, expected a floating dtype"),
    Bad("mask shape", jax_nn(mask=np.ones((3, 1, 8, 16), bool)), ValueError,
        r"mask: got shape \(3, 1, 8, 16\), expected \(2, 4, 8, 16\)"),
    Bad("mask float", jax_nn(mask=ones(2, 1, 8, 16)), TypeError,
        r"mask: got dtype bfloat16, expected bool"),
    Bad("mask of flash_attention", call(mask=np.ones((2, 1, 8, 16), bool)), TypeError, r"mask"),
]  # fmt: skip

WRONG_PACKING = [
    Bad("packed rank 4", packed(q=GOOD["q"]), ValueError,
        r"q: got rank 4, shape \(2, 8, 4, 64\), expected rank 3 \[total length, heads, head_dim\]"),
    Bad("packed lengths", packed(q=GOOD["q"][0]), ValueError,
        r"cu_seqlens_k: got None, .*; cu_seqlens_q's sequences have 8 rows and k has 16"),
    Bad("cu_seqlens None", packed(cu_seqlens_q=None), TypeError, r"cu_seqlens_q: got NoneType"),
    Bad("cu_seqlens list", packed(cu_seqlens_q=[0, 8]), TypeError,
        r"cu_seqlens_q: got list, expected a jax\.Array"),
    Bad("cu_seqlens rank 0", packed(cu_seqlens_q=np.array(3)), ValueError,
        r"cu_seqlens_q: got shape \(\), expected shape \(M \+ 1,\) for M sequences"),
    Bad("cu_seqlens empty", packed(cu_seqlens_q=np.zeros(0, int)), ValueError,
        r"cu_seqlens_q: got shape \(0,\), expected shape \(M \+ 1,\)"),
    Bad("cu_seqlens float", packed(cu_seqlens_q=np.zeros(3)), TypeError,
        r"cu_seqlens_q: got dtype float32, expected an integer dtype"),
    Bad("cu_seqlens_k shape", packed(cu_seqlens_k=np.zeros(4, int)), ValueError,
        r"cu_seqlens_k: got shape \(4,\), expected shape \(3,\)"),
    Bad("cu_seqlens_k dtype", packed(cu_seqlens_k=np.zeros(3, bool)), TypeError,
        r"cu_seqlens_k: got dtype bool, expected an integer dtype"),
    Bad("packed heads", packed(q=ones(16, 3, 64)), ValueError, r"q: got 3 heads .*a multiple of k"),
    Bad("packed window", packed(window_size=(-1, 0)), ValueError, r"window_size\[0\]: got -1"),
]  # fmt: skip

TABLE = WRONG_OBJECTS + WRONG_DTYPES + WRONG_SHAPES + WRONG_OPTIONS + WRONG_ARRAYS + WRONG_PACKING


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.id)
def test_bad_input(bad: Bad) -> None:
    with pytest.raises(bad.error) as caught:
        bad.run()
    assert type(caught.value) is bad.error
    assert re.search(bad.pattern, str(caught.value)), str(caught.value)


def test_the_table_is_large_and_distinct() -> None:
    assert len(TABLE) >= 60
    assert len({bad.id for bad in TABLE}) == len(TABLE)


def test_our_messages_name_us_and_what_is_expected() -> None:
    """TypeErrors about a call's signature are Python's own; every other message has our form."""
    for bad in TABLE:
        try:
            bad.run()
        except Exception as error:
            if "keyword argument" not in str(error) and "missing" not in str(error):
                assert str(error).startswith("fa4_jax: "), (bad.id, error)


def test_bad_input_raises_at_trace_time_under_every_transformation() -> None:
    def loss(q, k, v):
        return flash_attention(q, k, v, window_size=(-1, 0)).astype(jnp.float32).sum()

    def mapped(function):
        return lambda *operands: jax.vmap(function)(*(x[None] for x in operands))

    for transform in (jax.jit, jax.grad, jax.checkpoint, mapped):
        with pytest.raises(ValueError, match=r"window_size\[0\]: got -1"):
            jax.eval_shape(transform(loss), *GOOD.values())
