# SPDX-License-Identifier: Apache-2.0
"""`fa4_jax.compat.tpu` against the reference that JAX's TPU flash attention is tested with."""

import dataclasses
import inspect
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from compat import assert_same, distance, tokens
from jax.experimental.pallas.ops.tpu import flash_attention as upstream

from fa4_jax.compat import IgnoredArgumentWarning, _common, tpu

B, N, T, D = 2, 2, 12, 8
IDS = np.array([[1] * 5 + [2] * 7, [3] * 12])


def operands(seqlen_k=T, heads_k=N):
    shapes = (B, N, T, D), (B, heads_k, seqlen_k, D), (B, heads_k, seqlen_k, D)
    return [tokens(*shape, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("options", "seqlen_k"),
    [
        ({"causal": True}, 16),  # top-left
        ({"sm_scale": 0.3, "segments": True}, T),
        ({"sm_scale": 0.3, "causal": True, "segments": True, "bias": True}, T),
    ],
    ids=["causal", "segments", "bias"],
)
def test_it_gives_the_same_numbers(options, seqlen_k):
    options = dict(options)
    bias = [tokens(B, N, T, seqlen_k, seed=3)] if options.pop("bias", False) else []
    segments = options.pop("segments", False)

    def run(module, dtype):
        ids = module.SegmentIds(IDS, IDS) if segments else None
        # The reference, as the TPU kernel's tests call it; its own gradient lacks a scale.
        attend = getattr(module, "mha_reference_no_custom_vjp", tpu.flash_attention)
        return lambda q, k, v, ab=None: attend(q, k, v, ab, ids, **options)

    assert_same(run, tpu, upstream, (*operands(seqlen_k), *bias))


def test_signatures_are_upstream_s():
    ours, theirs = (
        inspect.signature(module.flash_attention).parameters for module in (tpu, upstream)
    )
    assert list(ours) == [*theirs, "implementation"]
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default)
    assert tpu.SegmentIds._fields == upstream.SegmentIds._fields
    default = [
        dataclasses.asdict(module.BlockSizes.get_default(1, 2, 3, 4, 5))
        for module in (tpu, upstream)
    ]
    assert default[0] == default[1]
    for sizes in ((128,) * 4, (128,) * 11):
        theirs, ours = upstream.BlockSizes(*sizes), tpu.BlockSizes(*sizes)
        assert ours.has_backward_blocks == theirs.has_backward_blocks


def test_every_argument_matters():
    q, k, v = operands()
    plain = tpu.flash_attention(q, k, v)
    for options in (
        {"ab": tokens(B, N, T, T)},
        {"segment_ids": tpu.SegmentIds(IDS, IDS)},
        {"segment_ids": upstream.SegmentIds(IDS, IDS)},
        {"causal": True},
        {"sm_scale": 0.5},
    ):
        assert distance(tpu.flash_attention(q, k, v, **options), plain) > 1e-2, options
    with pytest.raises(NotImplementedError, match="debug: got True"):
        tpu.flash_attention(q, k, v, debug=True)
    with pytest.raises(NotImplementedError, match="float32"):
        tpu.flash_attention(q, k, v, implementation="fa4")
    assert tpu.flash_attention(q, k[:, :1], v[:, :1]).shape == q.shape


def test_block_sizes_are_ignored_with_a_note(monkeypatch):
    monkeypatch.setattr(_common, "_noted", set())
    q, k, v = operands()
    sizes = tpu.BlockSizes.get_default(B, N, T, T, D)
    with pytest.warns(IgnoredArgumentWarning, match="block_sizes has no effect"):
        out = tpu.flash_attention(q, k, v, block_sizes=sizes)
    assert distance(out, tpu.flash_attention(q, k, v)) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", IgnoredArgumentWarning)  # once per process
        tpu.flash_attention(q, k, v, block_sizes=sizes)


@pytest.mark.parametrize(
    ("changes", "error", "argument"),
    [
        ({"q": jnp.ones((N, T, D))}, ValueError, "q: got shape"),
        ({"ab": jnp.ones((1, N, T, T))}, ValueError, "ab: got shape"),
        ({"k": jnp.ones((B, N, T, D + 1))}, ValueError, "k: got head_dim 9"),
        ({"k": [[1.0]]}, TypeError, "k: got list"),
        ({"sm_scale": "1"}, TypeError, "sm_scale: got"),
        ({"causal": 1}, TypeError, "causal: got"),
        ({"segment_ids": tpu.SegmentIds(IDS, IDS[:, 1:])}, ValueError, "kv_segment_ids: got"),
    ],
)
def test_errors_name_the_argument(changes, error, argument):
    arguments = dict(zip("qkv", operands(), strict=True)) | changes
    with pytest.raises(error, match=f"fa4_jax: {argument}"):
        tpu.flash_attention(**arguments)


def test_segments_that_are_not_contiguous_are_nan():
    q, k, v = operands()
    ids = jnp.asarray([[1, 2] * (T // 2)] * B)
    assert jnp.isnan(tpu.flash_attention(q, k, v, segment_ids=tpu.SegmentIds(ids, ids))).all()
