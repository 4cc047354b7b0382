# SPDX-License-Identifier: Apache-2.0
"""`fa4_jax.compat.splash` against the reference that JAX's splash attention is tested with."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compat import assert_same, distance, tokens, with_gradients
from jax.experimental.pallas.ops.tpu import splash_attention as upstream
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as upstream_mask
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import assert_close, xla_attention

from fa4_jax.compat import IgnoredArgumentWarning, _common, splash

H, K, T, S, D = 4, 2, 12, 16, 8
ONE = {"head_shards": 1, "q_seq_shards": 1}
IDS = splash.SegmentIds(np.repeat([1, 2], [5, 7]), np.repeat([1, 2], [6, 10]))
SINKS = jnp.linspace(-1.0, 2.0, H)

# Each of both libraries' masks; every query sees a key, because what it gets else differs.
MASKS = {
    "causal": lambda m: m.CausalMask((T, S)),
    "bottom-right": lambda m: m.CausalMask((T, S), S - T),
    "before the first key": lambda m: m.CausalMask((T, S), -2) | m.LocalMask((T, S), (3, 3), 0),
    "local": lambda m: m.LocalMask((T, S), (2, 3), 0),
    "local, moved": lambda m: m.LocalMask((T, S), (2, None), 3),
    "full": lambda m: m.FullMask((T, S)),
    "both": lambda m: m.CausalMask((T, S), 1) & m.LocalMask((T, S), (4, None), 0),
    "dense": lambda m: m.NumpyMask(m.make_local_attention_mask((T, S), (1, 2), offset=2)),
}


def masks(module, *names):
    """One mask for each head, of these in turn."""
    return module.MultiHeadMask([MASKS[names[i % len(names)]](module) for i in range(H)])


def operands(kv_heads=K):
    kv_shape = (S, D) if kv_heads is None else (kv_heads, S, D)
    shapes = (H, T, D), kv_shape, kv_shape
    return [tokens(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def test_masks_are_upstream_s():
    for name, make in MASKS.items():
        ours, theirs = make(splash), make(upstream)
        assert ours.shape == theirs.shape
        assert np.array_equal(ours[:, :], theirs[:, :]), name
        assert ours == make(splash) and hash(ours) == hash(make(splash))
        start, end = ours.interval()
        keys = np.arange(S)
        assert np.array_equal((keys >= start[:, None]) & (keys < end[:, None]), theirs[:, :]), name
    ours, theirs = (m.ChunkedCausalMask((T, S), 5) for m in (splash, upstream_mask))
    assert np.array_equal(ours[:, :], theirs[:, :])
    ours, theirs = (masks(m, "local", "causal") for m in (splash, upstream))
    assert ours.shape == theirs.shape == (H, T, S)
    assert np.array_equal(ours[:, :, :], theirs[:, :, :])
    assert np.array_equal(splash.make_causal_mask((T, S), 2), upstream.make_causal_mask((T, S), 2))


def test_a_band_is_static_and_anything_else_an_interval():
    bands = {name for name, make in MASKS.items() if make(splash).band() is not None}
    assert bands == {"causal", "bottom-right", "local", "full", "both"}
    assert jax.tree.leaves(splash.make_splash_mha(masks(splash, "causal"), **ONE)) == []
    leaves = jax.tree.leaves(splash.make_splash_mha(masks(splash, "dense"), **ONE))
    assert [x.shape for x in leaves] == [(T,)] * 2
    leaves = jax.tree.leaves(splash.make_splash_mha(masks(splash, "causal", "full"), **ONE))
    assert [x.shape for x in leaves] == [(H, T)] * 2


@pytest.mark.parametrize(
    ("names", "kv_heads", "segments", "softcap"),
    [
        (["both"], K, False, None),
        (["bottom-right"], None, False, 0.7),  # one key/value head for all
        (["local, moved"], K, True, None),
        (["local, moved", "full"], K, False, None),
    ],
    ids=["band", "mqa", "interval and segments", "a mask per head"],
)
def test_it_gives_the_same_numbers(names, kv_heads, segments, softcap):
    """In a batch, with sinks and lse."""
    kind = "mqa" if kv_heads is None else "mha"
    ids = IDS if segments else None

    def run(module, dtype):
        if module is splash:
            kernel = splash_kernel()
            call = functools.partial(kernel, segment_ids=ids)
        else:
            make = getattr(upstream, f"make_masked_{kind}_reference")
            call = functools.partial(
                make(masks(upstream, *names)), segment_ids=ids, save_residuals=True,
                attn_logits_soft_cap=softcap,
            )  # fmt: skip

        def function(q, k, v, sinks):
            out, (lse,) = jax.vmap(lambda q, k, v: call(q, k, v, sinks=sinks))(q, k, v)
            return out if dtype == jnp.bfloat16 else jnp.concatenate([out, lse[..., None]], -1)

        return function

    def splash_kernel():
        make = getattr(splash, f"make_splash_{kind}")
        options = {"save_residuals": True, "attn_logits_soft_cap": softcap}
        return make(masks(splash, *names), **ONE, **options)

    def baseline(q, k, v, sinks):
        seen = np.stack([MASKS[names[i % len(names)]](splash)[:, :] for i in range(H)])
        if segments:
            seen = seen & (IDS.q[:, None] == IDS.kv)
        if kv_heads is None:
            k, v = k[:, None], v[:, None]
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        seen = seen.reshape(k.shape[2], -1, T, S)
        return jnp.swapaxes(xla_attention(q, k, v, seen, 1.0, sinks, softcap)[0], 1, 2)

    batch = [jnp.stack([x, jnp.flip(x, -1)]) for x in operands(kv_heads)]
    assert_same(run, splash, upstream, (*batch, SINKS), baseline)


def on_mesh(kernel, spec, heads_split=True):
    """`kernel` in a shard_map over heads and queries, as programs for TPUs call it."""
    mesh = jax.make_mesh((2, 4), ("heads", "sequence"), axis_types=(AxisType.Auto,) * 2)
    heads = "heads" if heads_split else None
    rows = P(heads, spec[1])

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(
            kernel.manual_sharding_spec(NamedSharding(mesh, spec)),
            rows,
            P(heads),
            P(heads),
            splash.SegmentIds(P(spec[1]), P()),
            P(heads),
        ),
        out_specs=rows,
    )
    def attend(kernel, q, k, v, segment_ids, sinks):
        return kernel(q, k, v, segment_ids, sinks)

    return lambda q, k, v, sinks: attend(kernel, q, k, v, IDS, sinks)


@pytest.mark.parametrize(
    ("names", "spec", "shards"),
    [
        (["bottom-right"], P("heads", None), (2, 1)),
        (["bottom-right"], P("heads", "sequence"), (2, 4)),
        (["dense", "full"], P("heads", "sequence"), (2, 4)),
    ],
    ids=["heads", "heads and queries", "a mask per head"],
)
def test_a_kernel_is_split_over_a_mesh(names, spec, shards):
    make = functools.partial(splash.make_splash_mha, masks(splash, *names))
    args = (*operands(), SINKS)
    kernel = make(head_shards=shards[0], q_seq_shards=shards[1])
    expected = with_gradients(lambda q, k, v, sinks: make(**ONE)(q, k, v, IDS, sinks))(*args)
    result = with_gradients(on_mesh(kernel, spec))(*args)
    for got, wanted in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert_close(got, wanted)


def test_a_mask_of_all_queries_is_not_used_for_some():
    kernel = splash.make_splash_mha(masks(splash, "causal"), **ONE)
    with pytest.raises(ValueError, match="q_seq_shards: got 1, expected 4"):
        on_mesh(kernel, P("heads", "sequence"))
    with pytest.raises(ValueError, match="q: got shape .*manual_sharding_spec"):
        kernel(operands()[0][:, :3], *operands()[1:])


def attend(mask=("both",), call=(), **options):
    return splash.make_splash_mha(masks(splash, *mask), **ONE | options)(*operands(), *call)


def test_every_argument_matters(monkeypatch):
    plain = attend()
    assert distance(attend(("causal",)), plain) > 1e-2
    assert distance(attend(call=(IDS,)), plain) > 1e-2
    assert distance(attend(call=(None, SINKS)), plain) > 1e-2
    assert distance(attend(attn_logits_soft_cap=0.5), plain) > 1e-2
    out, (lse,) = attend(save_residuals=True)
    assert distance(out, plain) == 0
    assert (lse.shape, lse.dtype) == ((H, T), jnp.float32)
    with pytest.raises(NotImplementedError, match="float32"):
        attend(implementation="fa4")
    # interpret: the reference, whatever the machine.
    q, k, v = (x.astype(jnp.bfloat16) for x in operands())
    for interpret in (False, True):
        kernel = splash.make_splash_mha(masks(splash, "both"), **ONE, interpret=interpret)
        jaxpr = str(jax.make_jaxpr(kernel)(q, k, v))
        assert ("fa4" in jaxpr) != interpret
    for name, sizes in {
        "block_sizes": splash.BlockSizes.get_default(),
        "downcast_smem_data": False,
    }.items():
        monkeypatch.setattr(_common, "_noted", set())
        with pytest.warns(IgnoredArgumentWarning, match=f"{name} has no effect"):
            assert distance(attend(**{name: sizes}), plain) == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error", IgnoredArgumentWarning)
            attend(**{name: sizes})
    for value in (splash.DEFAULT_MASK_VALUE, -np.inf):
        assert distance(attend(mask_value=value), plain) == 0
    assert distance(attend(residual_checkpoint_name="context"), plain) == 0
    for single, general in (
        (splash.make_splash_mha_single_device, splash.make_splash_mha),
        (splash.make_splash_mqa_single_device, splash.make_splash_mqa),
    ):
        mask = masks(splash, "both")
        assert single(mask).static == general(mask, **ONE).static


def upstream_mask_value():
    return splash.DEFAULT_MASK_VALUE


def test_a_query_that_sees_no_key_gets_zero():
    mask = splash.MultiHeadMask([splash.CausalMask((T, S), -2)] * H)
    out, (lse,) = splash.make_splash_mha(mask, **ONE, save_residuals=True)(*operands())
    assert np.all(out[:, :2] == 0) and np.all(lse[:, :2] == -np.inf)
    assert np.all(np.isfinite(lse[:, 2:]))


GAP = np.ones((T, S), bool)
GAP[3, 5] = False


@pytest.mark.parametrize(
    ("changes", "error", "argument"),
    [
        ({"mask": np.stack([GAP] * H)}, NotImplementedError, "mask: got .* in row 3"),
        ({"mask": GAP}, ValueError, "mask: got shape"),
        ({"mask": splash.FullMask((T, S))}, TypeError, "mask: got FullMask.*MultiHeadMask"),
        ({"mask_value": -1.0}, NotImplementedError, "mask_value: got -1.0"),
        ({"mask_value": np.nan}, NotImplementedError, "mask_value: got nan"),
        ({"residual_checkpoint_name": "mine"}, NotImplementedError, "residual_checkpoint_name"),
        ({"head_shards": 3}, ValueError, "head_shards: got 3"),
        ({"q_seq_shards": 5}, ValueError, "q_seq_shards: got 5"),
        ({"attn_logits_soft_cap": "1"}, TypeError, "attn_logits_soft_cap: got"),
        ({"save_residuals": 1}, TypeError, "save_residuals: got"),
        ({"interpret": 1}, TypeError, "interpret: got"),
    ],
)
def test_errors_of_making_name_the_argument(changes, error, argument):
    arguments = {"mask": masks(splash, "full"), **ONE} | changes
    with pytest.raises(error, match=f"fa4_jax: {argument}"):
        splash.make_splash_mha(arguments.pop("mask"), **arguments)


def test_a_traced_mask_is_refused():
    with pytest.raises(NotImplementedError, match="mask: got a traced array"):
        jax.jit(lambda mask: splash.make_splash_mha(mask, **ONE))(jnp.ones((H, T, S), bool))


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        ({"q": jnp.ones((H, T, D))[None]}, ValueError, "q: got shape"),
        ({"q": jnp.ones((H - 1, T, D))}, ValueError, "q: got shape"),
        ({"k": jnp.ones((K, S - 1, D))}, ValueError, "k: got shape"),
        ({"k": jnp.ones((3, S, D)), "v": jnp.ones((3, S, D))}, ValueError, "k: got 3 heads"),
        ({"v": jnp.ones((K, S - 1, D))}, ValueError, "v: got length"),
        ({"sinks": jnp.ones(H + 1)}, ValueError, "sinks: got shape"),
        ({"segment_ids": splash.SegmentIds(IDS.q, IDS.q)}, ValueError, "kv_segment_ids: got"),
    ],
)
@pytest.mark.parametrize("names", [["full"], ["dense", "full"]], ids=["one mask", "one per head"])
def test_errors_of_calls_name_the_argument(call, error, argument, names):
    arguments = dict(zip("qkv", operands(), strict=True)) | call
    with pytest.raises(error, match=f"fa4_jax: {argument}"):
        splash.make_splash_mha(masks(splash, *names), **ONE)(**arguments)


@pytest.mark.parametrize(
    ("make", "error", "argument"),
    [
        (lambda: splash.CausalMask((T,)), ValueError, "shape: got"),
        (lambda: splash.CausalMask((T, S), shard_count=3), ValueError, "shard_count: got 3"),
        (lambda: splash.ChunkedCausalMask((T, S), 0), ValueError, "chunk_size: got 0"),
        (lambda: splash.NumpyMask(np.ones((T, S))), ValueError, "array: got float64"),
        (lambda: splash.MultiHeadMask([]), ValueError, "masks: got none"),
        (lambda: splash.MultiHeadMask([GAP]), TypeError, r"masks\[0\]: got ndarray"),
        (
            lambda: splash.MultiHeadMask([splash.FullMask((T, S)), splash.FullMask((S, T))]),
            ValueError,
            r"masks\[1\]: got shape",
        ),
        (lambda: splash.FullMask((T, S)) & splash.FullMask((S, T)), ValueError, "mask: got shape"),
        (lambda: splash.FullMask((T, S)) and 1, TypeError, "mask: got a bool"),
    ],
)
def test_errors_of_masks_name_the_argument(make, error, argument):
    with pytest.raises(error, match=f"fa4_jax: {argument}"):
        make()
