# SPDX-License-Identifier: Apache-2.0
"""Head dims that no kernel has: zero-padded to the next row's, on the way to the kernels only.

The launches are played by the definition, in float32, from what a kernel would be given: padded
operands in, padded results out.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import Oracle, arrays, as64, assert_close, visible

from fa4_jax import _dispatch, _primitives, _variants, flash_attention, is_supported
from fa4_jax._dispatch import BACKWARD_KERNELS
from fa4_jax._primitives import _Problem
from fa4_jax._spec import AttentionSpec
from fa4_jax._variants import Kernel, signature, target_name

LOG2_E = math.log2(math.e)
B, T, S, N, K = 2, 9, 12, 4, 2


def play(problem: _Problem, kernel: Kernel, spec: AttentionSpec, *operands: jax.Array) -> list:
    """`_Problem.launch`, with the operands' shapes checked against the signature."""
    sizes = problem.sizes
    assert (sizes["D"], sizes["V"]) in _variants.built_head_dims(kernel, _variants.DType.bf16)
    buffers = signature(kernel)
    for buffer, x in zip(buffers.operands, operands, strict=True):
        expected = tuple({**sizes, "Z": 0}[letter] for letter in buffer.dims)
        assert x.shape == expected, (kernel, buffer.name)
    shapes = [tuple(sizes[letter] for letter in b.dims) for b in buffers.results]
    results = _PLAYERS[kernel](spec, shapes, *(x.astype(jnp.float32) for x in operands))
    assert [x.shape for x in results] == shapes
    dtypes = [problem.aval(buffer).dtype for buffer in buffers.results]
    return [x.astype(dtype) for x, dtype in zip(results, dtypes, strict=True)]


def _logits(spec: AttentionSpec, q: jax.Array, k: jax.Array) -> jax.Array:
    """[B, N, T, S], of the causal calls below."""
    k = jnp.repeat(k, N // K, 2)
    x = jnp.einsum("btnd,bsnd->bnts", q, k) * spec.softmax_scale
    return jnp.where(visible(T, S, causal=True), x, -jnp.inf)


def _forward(spec, shapes, q, k, v, no_sinks):
    x = _logits(spec, q, k)
    out = jnp.einsum("bnts,bsnv->btnv", jax.nn.softmax(x), jnp.repeat(v, N // K, 2))
    return out, jax.nn.logsumexp(x, -1)


def _backward_preprocess(spec, shapes, out, dout, lse, dlse):
    rows = [(0, 0), (0, 0), (0, shapes[0][-1] - T)]
    dpsum = jnp.einsum("btnv,btnv->bnt", out, dout) - dlse
    padded = jnp.pad(lse * LOG2_E, rows, constant_values=jnp.inf)
    return jnp.pad(dpsum, rows), padded, jnp.zeros(shapes[2])


def _backward(spec, shapes, *operands):
    q, k, v, dout, lse_log2, dpsum, dq_accum = operands
    p = jnp.exp2(_logits(spec, q, k) * LOG2_E - lse_log2[:, :, :T, None])
    dp = jnp.einsum("btnv,bsnv->bnts", dout, jnp.repeat(v, N // K, 2))
    ds = p * (dp - dpsum[:, :, :T, None])
    dq = jnp.einsum("bnts,bsnd->bntd", ds, jnp.repeat(k, N // K, 2))
    dk = jnp.einsum("bnts,btnd->bsnd", ds, q) * spec.softmax_scale
    dv = jnp.einsum("bnts,btnv->bsnv", p, dout)
    dk, dv = (x.reshape(B, S, K, N // K, -1).sum(3) for x in (dk, dv))
    return dk, dv, dq_accum.at[:, :, :T, : q.shape[-1]].add(dq)


def _backward_postprocess(spec, shapes, dq_accum):
    dq = dq_accum[:, :, :T, : shapes[0][-1]] * spec.softmax_scale
    return (dq.swapaxes(1, 2),)


_PLAYERS = {
    Kernel.forward: _forward,
    Kernel.backward_preprocess: _backward_preprocess,
    Kernel.backward: _backward,
    Kernel.backward_postprocess: _backward_postprocess,
}


def use_rows(monkeypatch: pytest.MonkeyPatch, rows: Callable[[Kernel], tuple]) -> None:
    """A table with these head dims for each kernel."""
    monkeypatch.setattr(_variants, "built_head_dims", lambda kernel, dtype: rows(kernel))


@pytest.mark.parametrize(
    ("head_dims", "row"),
    [
        ((1, 1), (64, 64)),
        ((32, 32), (64, 64)),
        ((63, 7), (64, 64)),
        ((64, 64), (64, 64)),
        ((65, 65), (128, 128)),
        ((80, 80), (128, 128)),
        ((128, 64), (128, 128)),
        ((40, 96), (128, 128)),
        ((127, 128), (128, 128)),
    ],
    ids=str,
)
def test_padding_changes_no_value(monkeypatch, head_dims: tuple, row: tuple) -> None:
    launched = []

    def launch(
        problem: _Problem,
        kernel: Kernel,
        spec: AttentionSpec,
        *operands: jax.Array,
        features: tuple = (),
    ) -> list:
        assert not features
        launched.append((kernel, problem.sizes["D"], problem.sizes["V"]))
        return play(problem, kernel, spec, *operands)

    monkeypatch.setattr(_Problem, "launch", launch)
    use_rows(monkeypatch, lambda kernel: ((64, 64), (128, 128)))
    rng = np.random.default_rng(sum(head_dims))
    (head_dim, head_dim_v), scale = head_dims, 1 / math.sqrt(head_dims[0])
    q, k, v, dout = arrays(
        rng,
        (B, T, N, head_dim),
        (B, S, K, head_dim),
        (B, S, K, head_dim_v),
        (B, T, N, head_dim_v),
        dtype=jnp.bfloat16,
    )
    (dlse,) = arrays(rng, (B, N, T))
    spec = AttentionSpec(softmax_scale=scale, window_right=0)
    out, lse = _primitives._forward_kernels(q, k, v, spec=spec, extras=())
    residuals = (q, k, v, out, lse, dout, dlse)
    gradients = _primitives._backward_kernels(*residuals, spec=spec, extras=())
    assert launched == [(kernel, *row) for kernel in (Kernel.forward, *BACKWARD_KERNELS)]
    oracle = Oracle(visible(T, S, causal=True), scale)
    expected = (*oracle.forward(*as64(q, k, v)), *oracle.backward(*as64(q, k, v, dout, dlse))[:3])
    for x, y in zip((out, lse, *gradients), expected, strict=True):
        assert_close(x, y, tolerance=1e-2)


def lowered(head_dims: tuple[int, int]) -> str:
    """StableHLO of a value and its gradients for CUDA."""
    head_dim, head_dim_v = head_dims
    shapes = [(B, T, N, head_dim), (B, S, K, head_dim), (B, S, K, head_dim_v)]
    primals = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    call = functools.partial(flash_attention, causal=True, implementation="fa4")
    both = jax.value_and_grad(lambda *x: call(*x).astype(jnp.float32).sum(), (0, 1, 2))
    return jax.jit(both).trace(*primals).lower(lowering_platforms=("cuda",)).as_text()


def test_the_lowered_program_names_the_row_and_keeps_the_scale(
    without_library, monkeypatch
) -> None:
    use_rows(monkeypatch, lambda kernel: ((64, 64), (128, 128)))
    text = lowered((25, 100))
    for kernel in (Kernel.forward, *BACKWARD_KERNELS):
        (line,) = (x for x in text.splitlines() if f"custom_call @{target_name(kernel)}(" in x)
        assert f'kernel = "{kernel}_bf16_d128"' in line
        if kernel is not Kernel.backward_preprocess:
            assert "softmax_scale = 2.000000e-01" in line
    results = re.search(r"public @main\(.*?\) -> \((.*)\) \{", text).group(1)
    assert re.findall(r"tensor<[0-9x]+xbf16>", results) == [
        "tensor<2x9x4x25xbf16>",
        "tensor<2x12x2x25xbf16>",
        "tensor<2x12x2x100xbf16>",
    ]
    plain = lowered((128, 128))
    assert "stablehlo.pad" not in plain
    # The sinks that aren't given are made of no elements of q.
    slices = re.findall(r"stablehlo.slice .*-> tensor<(\d+)", plain)
    assert set(slices) == {"0"}


def test_the_row_is_the_cheapest_that_is_large_enough(monkeypatch) -> None:
    rows = {
        Kernel.forward: ((64, 64), (128, 128), (192, 128), (192, 192), (256, 256)),
        Kernel.backward: ((64, 64), (192, 128), (256, 256)),
    }
    use_rows(monkeypatch, lambda kernel: rows.get(kernel, rows[Kernel.forward]))
    bf16 = np.dtype(jnp.bfloat16)
    forward = functools.partial(_dispatch.padded_head_dims, (Kernel.forward,), bf16)
    backward = functools.partial(_dispatch.padded_head_dims, BACKWARD_KERNELS, bf16)
    for head_dims, expected, expected_backward in [
        ((8, 8), (64, 64), (64, 64)),
        ((64, 65), (128, 128), (192, 128)),
        ((129, 20), (192, 128), (192, 128)),
        ((20, 129), (192, 192), (256, 256)),
        ((193, 1), (256, 256), (256, 256)),
        ((256, 256), (256, 256), (256, 256)),
    ]:
        assert forward(head_dims) == expected
        assert backward(head_dims) == expected_backward
    (reason,) = _dispatch.missing_kernels(BACKWARD_KERNELS, bf16, (257, 64))
    assert reason == (
        "head_dim 257/64 has no bf16 backward_preprocess kernel (built: 64, 128, 192/128, 192, 256)"
    )
    rows[Kernel.backward] = ((64, 64),)
    (reason,) = _dispatch.missing_kernels(BACKWARD_KERNELS, bf16, (96, 96))
    assert reason == "head_dim 96 has no bf16 backward kernel (built: 64)"


@pytest.mark.parametrize("head_dim", range(1, 257, 15))
def test_every_head_dim_up_to_the_largest_row_is_supported(head_dim: int) -> None:
    """But for what this process lacks."""
    shapes = [(B, T, N, head_dim), (B, S, K, head_dim), (B, S, K, head_dim)]
    support = is_supported(*(jax.ShapeDtypeStruct(x, jnp.float16) for x in shapes))
    refused = any("head_dim" in reason for reason in support.reasons)
    largest = max(_variants.built_head_dims(Kernel.forward, _variants.DType.f16))[0]
    assert refused == (head_dim > largest)
