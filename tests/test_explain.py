# SPDX-License-Identifier: Apache-2.0
"""`is_supported` and `explain`: what a call would do, on GPUs that this process only pretends to
have, held against the program that the call lowers to."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from programs import cuda_text

import fa4_jax
from fa4_jax import (
    FallbackWarning,
    LibraryError,
    _dispatch,
    _ffi,
    _variants,
    dot_product_attention,
    explain,
    flash_attention,
    flash_attention_varlen,
    is_supported,
)
from fa4_jax._variants import Arch
from fa4_jax.compat import maxtext, splash, tpu
from fa4_jax.compat.flax import AttentionFn

GRADIENT = (
    "gradient: backward_preprocess_bf16_d64, backward_bf16_d64, backward_postprocess_bf16_d64"
)
ON_CPU = "the program is for platform cpu, and the kernels are CUDA's"


def operands(dtype=jnp.bfloat16, head_dim: int = 64, seqlen_k: int = 24) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = (2, 16, 4, head_dim), (2, seqlen_k, 2, head_dim), (2, seqlen_k, 2, head_dim)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.fixture
def pretend(monkeypatch) -> Callable[..., None]:
    """`pretend("9.0", "10.0")`: GPUs of these compute capabilities, and the library."""

    class Device:
        def __init__(self, compute_capability: str):
            self.compute_capability = compute_capability

    def have(*capabilities: str) -> None:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda backend: list(map(Device, capabilities)))
        monkeypatch.setattr(_ffi, "register", lambda: None)

    return have


@pytest.fixture
def on_h200(pretend) -> None:
    pretend("9.0")


# --- is_supported.
# -----------------


@pytest.mark.usefixtures("on_h200")
def test_is_supported_on_a_gpu() -> None:
    q, k, v = operands()
    shapes = shapes_of([q, k, v])
    assert is_supported(q, k, v) == (True, ())
    assert is_supported(*shapes, causal=True, window_size=(3, None), return_lse=True).ok
    ids = [jax.ShapeDtypeStruct((2, length), jnp.int32) for length in (16, 24)]
    everything = {
        "softcap": 3.0,
        "sinks": jnp.zeros(4),
        "q_segment_ids": ids[0],
        "kv_segment_ids": ids[1],
        "kv_end": ids[0],
        "key_value_seq_lengths": jax.ShapeDtypeStruct((2,), jnp.int32),
    }
    assert is_supported(*shapes, deterministic=True, **everything).ok
    x = jax.ShapeDtypeStruct((2, 16, 4, 264), jnp.float32)
    (reason,) = is_supported(x, x, x, implementation="reference").reasons
    assert "dtype float32 has no kernel" in reason
    assert is_supported(*operands(head_dim=40)).ok
    assert "head_dim 264" in is_supported(*operands(head_dim=264)).reasons[0]
    assert is_supported(*(x[0] for x in (q, k, v))).ok


def test_is_supported_on_a_cpu_says_so() -> None:
    assert is_supported(*operands()) == (False, (ON_CPU,))


def test_a_malformed_call_is_an_error() -> None:
    q, k, v = operands()
    for ask in (is_supported, explain):
        with pytest.raises(ValueError, match="k: got head_dim 32"):
            ask(q, k[..., :32], v)
        with pytest.raises(TypeError, match="unexpected keyword"):
            ask(q, k, v, causality=True)


# --- explain: which kernels.
# ---------------------------


@pytest.mark.usefixtures("on_h200")
def test_explain_on_a_gpu() -> None:
    q, k, v = operands()
    assert explain(q, k, v) == f"fa4 on sm_90a: forward_bf16_d64; {GRADIENT}"
    assert explain(*shapes_of([q, k, v])) == explain(q, k, v)
    assert explain(q, k, v, sinks=q[0, 0, :, 0]) == explain(q, k, v)
    assert explain(q, k, v, implementation="reference") == ('reference: implementation="reference"')
    q, k, v = operands(jnp.float32)
    refused = "dtype float32 has no kernel (built: bfloat16, float16)"
    assert explain(q, k, v) == f"reference: {refused}"
    refusal = explain(q, k, v, implementation="fa4")
    assert refusal.startswith("raises NotImplementedError: ") and refused in refusal
    assert explain(*operands(head_dim=40)) == (
        "fa4 on sm_90a: forward_bf16_d64 (head_dim 40 zero-padded to 64); "
        f"{GRADIENT} (head_dim 40 zero-padded to 64)"
    )
    assert explain(*(x[:0] for x in operands())) == "nothing is launched: B, T or S is 0"


def packed(q, k, v, **options):
    return flash_attention_varlen(q[0], k[0, :16], v[0, :16], jnp.array([0, 5, 16]), **options)


def splash_call(q, k, v, sizes=(16, 24)):
    mask = splash.MultiHeadMask([splash.LocalMask(sizes, (3, 0), 0)] * 4)
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
    return jax.vmap(kernel)(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))


def tpu_call(q, k, v):
    ids = tpu.SegmentIds(jnp.zeros((2, 16), int), jnp.zeros((2, 24), int))
    return tpu.flash_attention(
        *(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), segment_ids=ids, causal=True
    )


def maxtext_call(q, k, v):
    return maxtext.attention(q, k, v, attn_logits_soft_cap=5.0)[0]


def sharded(q, k, v, strategy="ring"):
    mesh = jax.make_mesh((2,), ("sp",), axis_types=(jax.sharding.AxisType.Auto,))
    call = functools.partial(
        fa4_jax.context_parallel_attention, axis_name="sp", causal=True, strategy=strategy
    )
    specs = P(None, "sp")
    return jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=specs)(q, k, v)


CALLS = {
    "plain": flash_attention,
    "softcap": functools.partial(flash_attention, softcap=3.0),
    "bounds": lambda q, k, v: flash_attention(q, k, v, kv_end=jnp.ones((2, 16), int)),
    "deterministic": functools.partial(flash_attention, deterministic=True),
    "jax.nn": functools.partial(dot_product_attention, is_causal=True),
    "jax.nn lengths": lambda q, k, v: dot_product_attention(
        q, k, v, key_value_seq_lengths=jnp.array([3, 9])
    ),
    "varlen": packed,
    "varlen causal": functools.partial(packed, causal=True, softcap=2.0),
    "ring": sharded,
    "all-gather": functools.partial(sharded, strategy="all_gather"),
    "flax": AttentionFn(window_size=(None, None)),
    "splash": splash_call,
    "tpu": tpu_call,
    "maxtext": maxtext_call,
}


@pytest.mark.usefixtures("on_h200")
@pytest.mark.parametrize("name", CALLS)
def test_explain_names_the_kernels_that_the_program_launches(name: str) -> None:
    """Forward and backward, of every public call, in what it lowers to."""
    q, k, v = operands()

    def gradient(q, k, v):
        return jax.grad(lambda *x: CALLS[name](*x).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    program = cuda_text(gradient, q, k, v)
    launched = set(re.findall(r'kernel = "(\w+)"', program))
    told = explain(CALLS[name], *shapes_of((q, k, v)))
    assert told.startswith("fa4 on sm_90a: forward_")
    assert set(re.findall(r"\b(?:forward|backward)\w+", told)) == launched
    assert explain(gradient, q, k, v) == told


@pytest.mark.usefixtures("on_h200", "fresh_warnings")
def test_a_dense_mask_and_a_bias_run_on_the_reference() -> None:
    q, k, v = operands()
    bias, mask = jnp.zeros((16, 24)), jnp.ones((16, 24), bool)
    told = explain(dot_product_attention, q, k, v, bias, mask=mask)
    assert told == "reference: bias isn't in the kernels yet; mask isn't in the kernels yet"
    with pytest.warns(FallbackWarning, match=re.escape(told.removeprefix("reference: "))):
        dot_product_attention(q, k, v, bias, mask=mask)
    refusal = explain(dot_product_attention, q, k, v, bias, implementation="fa4")
    with pytest.raises(NotImplementedError) as error:
        dot_product_attention(q, k, v, bias, implementation="fa4")
    assert refusal == f"raises NotImplementedError: {str(error.value).removeprefix('fa4_jax: ')}"


@pytest.mark.usefixtures("on_h200")
def test_explain_of_a_model_tells_each_path_once() -> None:
    """Also of one that jit has traced already."""
    layer = nnx.MultiHeadAttention(
        4,
        256,
        dtype=jnp.bfloat16,
        attention_fn=AttentionFn(causal=True),
        decode=False,
        rngs=nnx.Rngs(0),
    )
    graph, state = nnx.split(layer)
    x = jnp.ones((2, 16, 256), jnp.bfloat16)

    @jax.jit
    def model(state, x):
        x = nnx.merge(graph, state)(nnx.merge(graph, state)(x))
        return flash_attention(*(x[..., None],) * 3, implementation="reference")

    expected = f'fa4 on sm_90a: forward_bf16_d64; {GRADIENT}\nreference: implementation="reference"'
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        model(state, x)
    assert explain(model, state, x) == expected
    assert explain(model, state, shapes_of(x)) == expected
    assert explain(jnp.sin, 1.0) == "no call of fa4_jax"


# --- explain: which GPU, platform and library.
# ---------------------------------------------


def test_explain_on_a_cpu() -> None:
    assert explain(*operands()) == f"reference: {ON_CPU}"
    assert "platform cpu, expected cuda" in explain(*operands(), implementation="fa4")


@pytest.mark.usefixtures("fresh_warnings")
def test_explain_does_not_warn_and_leaves_the_warning_to_the_call() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(*operands())
        explain(*operands(jnp.float32))
    for dtype in (jnp.bfloat16, jnp.float32):
        with pytest.warns(FallbackWarning):
            flash_attention(*operands(dtype))


@pytest.mark.parametrize("capability", ["8.0", "10.3", "11.0", "12.0", "12.1"])
def test_gpus_without_kernels_run_the_reference(pretend, capability: str) -> None:
    """Of a family for which there are kernels (B300's 10.3) too: a binary for sm_100a doesn't
    run there. Nor does a process lower anything else than the one whose GPU it is."""
    pretend("9.0", capability)
    reason = f"compute capability {capability} has no kernel (built: 9.0)"
    assert reason in explain(*operands()).removeprefix("reference: ")
    assert is_supported(*operands()) == (False, _dispatch.device_reasons())
    assert reason in explain(*operands(), implementation="fa4")


def test_an_architecture_counts_once_it_has_every_kernel(pretend, monkeypatch) -> None:
    pretend("10.0")
    monkeypatch.setattr(_variants, "served_arches", lambda: (Arch.sm90a,))
    (reason,) = _dispatch.device_reasons()
    assert reason == (
        "compute capability 10.0 has only some of the kernels, so none is used (complete: 9.0)"
    )
    assert explain(*operands()) == f"reference: {reason}"
    monkeypatch.setattr(_variants, "served_arches", lambda: tuple(Arch))
    assert explain(*operands()) == f"fa4 on sm_100a: forward_bf16_d64; {GRADIENT}"
    pretend("9.0", "9.0", "10.0")
    assert explain(*operands()).startswith("fa4 on sm_90a and sm_100a: ")


def test_a_missing_library(pretend, monkeypatch) -> None:
    pretend("9.0")

    def register() -> None:
        raise LibraryError("fa4_jax: kernel library: got none")

    monkeypatch.setattr(_ffi, "register", register)
    assert explain(*operands()) == "reference: fa4_jax: kernel library: got none"
    assert is_supported(*operands()).reasons == ("fa4_jax: kernel library: got none",)
    told = explain(*operands(), implementation="fa4")
    assert told == "raises LibraryError: kernel library: got none"


@pytest.mark.usefixtures("on_h200")
def test_a_gradient_without_kernels_is_told(monkeypatch) -> None:
    rows = tuple(v for v in _variants.VARIANTS if v.kernel is _variants.Kernel.forward)
    monkeypatch.setattr(_variants, "VARIANTS", rows)
    monkeypatch.setattr(_variants, "served_arches", lambda: (Arch.sm90a,))
    missing = "head_dim 64 has no bf16 backward_preprocess kernel (built: none)"
    told = "fa4 on sm_90a: forward_bf16_d64; gradient: "
    assert explain(*operands()) == f"{told}reference: {missing}"
    assert explain(*operands(), implementation="fa4") == f"{told}raises: {missing}"
