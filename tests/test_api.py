# SPDX-License-Identifier: Apache-2.0
"""What a user meets first: importing, signatures, defaults, fallback."""

from __future__ import annotations

import ast
import inspect
import pathlib
import subprocess
import sys
import textwrap
import typing
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fa4_jax
from fa4_jax import (
    FallbackWarning,
    LibraryError,
    _api,
    _dispatch,
    _ffi,
    _reference,
    _variants,
    dot_product_attention,
    flash_attention,
    flash_attention_varlen,
)
from fa4_jax._spec import AttentionSpec

PACKAGE = pathlib.Path(fa4_jax.__file__).parent


def operands(dtype=jnp.bfloat16, head_dim: int = 64, seqlen_k: int = 24) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = (2, 16, 4, head_dim), (2, seqlen_k, 2, head_dim), (2, seqlen_k, 2, head_dim)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def python(code: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PACKAGE.parent), "JAX_PLATFORMS": "cpu"},
    )


def test_import_needs_no_jax_and_the_first_use_little_more() -> None:
    code = """
        import sys
        import fa4_jax, fa4_jax._variants
        assert "jax" not in sys.modules and "numpy" not in sys.modules
        import jax
        before = set(sys.modules)
        fa4_jax.flash_attention
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(sorted(new - set(sys.stdlib_module_names)))
        # An import that asks for devices fixes the platform before the user can choose it.
        assert not jax._src.xla_bridge.backends_are_initialized()
    """
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert set(ast.literal_eval(run.stdout)) <= {"fa4_jax", "jax", "jaxlib", "ml_dtypes", "numpy"}


def test_import_without_site_packages_reads_the_table() -> None:
    """What `kernels/build.py` does in an environment that has no JAX."""
    find = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
    run = python(find + "import fa4_jax._variants as v; print(len(v.VARIANTS))", "-S", "-E")
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == len(_variants.VARIANTS)


def test_exports_are_the_typed_ones() -> None:
    """`__init__` lists its names twice, for run time and for type checkers: the lists agree."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {
        alias.asname: node.module.removeprefix("fa4_jax.")
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If)
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == fa4_jax._HOMES
    assert set(fa4_jax._HOMES) <= set(dir(fa4_jax))
    for name in fa4_jax._HOMES:
        assert getattr(fa4_jax, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'flash_attn'"):
        fa4_jax.flash_attn  # noqa: B018 - the look-up is the test


def test_dot_product_attention_begins_with_jax_nns_signature() -> None:
    theirs = list(inspect.signature(jax.nn.dot_product_attention).parameters.values())
    ours = list(inspect.signature(dot_product_attention).parameters.values())
    facts = [(p.name, p.kind, p.default) for p in ours]
    assert facts[: len(theirs)] == [(p.name, p.kind, p.default) for p in theirs]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_the_keywords_are_the_same_in_every_list() -> None:
    signature = inspect.signature(flash_attention).parameters
    keywords = {name: p.default for name, p in signature.items() if p.kind is p.KEYWORD_ONLY}
    fields = {f.name: f.default for f in _api._Options.__dataclass_fields__.values()}
    assert keywords == {name: fields[name] for name in keywords}
    others = {"bias", "mask", "cu_seqlens_q", "cu_seqlens_k", "is_packed", "names"}
    assert set(fields) - set(keywords) == others
    assert set(typing.get_type_hints(_api.AllFlashOptions)) == set(keywords)
    packed = inspect.signature(flash_attention_varlen).parameters
    own = {name: p.default for name, p in packed.items() if p.kind is p.KEYWORD_ONLY}
    assert own == {name: keywords[name] for name in own} | {"causal_alignment": "bottom_right"}
    assert set(typing.get_type_hints(_api.VarlenOptions)) | {"return_lse"} == set(own)
    ours = inspect.signature(dot_product_attention).parameters
    typed = set(typing.get_type_hints(_api.JaxNnOptions)) | {"return_residual"}
    assert typed == {name for name, p in ours.items() if p.kind is p.KEYWORD_ONLY}


def test_every_public_argument_is_documented() -> None:
    for function in (flash_attention, dot_product_attention, flash_attention_varlen):
        for name in inspect.signature(function).parameters:
            assert f"\n      {name}: " in function.__doc__, name


@pytest.mark.parametrize("window", [None, 3, (5, 2), (4, None)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_dot_product_attention_is_jax_nns(window, is_causal: bool) -> None:
    q, k, v = operands(jnp.float32)
    jax_window = (window[0], 24) if isinstance(window, tuple) and window[1] is None else window
    kwargs = {"scale": 0.3, "is_causal": is_causal, "return_residual": True}
    theirs = jax.nn.dot_product_attention(q, k, v, local_window_size=jax_window, **kwargs)
    ours = dot_product_attention(
        q, k, v, local_window_size=window, implementation="reference", **kwargs
    )
    for x, y in zip(ours, theirs, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(x, y, 0, 2e-6)


def test_the_residual_has_no_gradient_and_the_lse_has() -> None:
    q, k, v = operands(jnp.float32)

    def residual(q):
        kwargs = {"return_residual": True, "implementation": "reference"}
        return dot_product_attention(q, k, v, **kwargs)[1].sum()

    def lse(q):
        return flash_attention(q, k, v, return_lse=True, implementation="reference")[1].sum()

    assert np.all(np.asarray(jax.grad(residual)(q)) == 0)
    assert np.all(np.asarray(jax.grad(lse)(q)) != 0)


def test_the_residual_has_the_dtype_of_the_query() -> None:
    q, k, v = operands(jnp.bfloat16)
    _, residual = dot_product_attention(q, k, v, return_residual=True, implementation="reference")
    _, expected = jax.nn.dot_product_attention(q, k, v, return_residual=True)
    assert (residual.shape, residual.dtype) == (expected.shape, expected.dtype)


def test_jax_nn_masks_lengths_and_bias_without_leading_axes() -> None:
    q, k, v = operands(jnp.float32)
    rng = np.random.default_rng(1)
    mask = rng.random((16, 24)) < 0.8
    bias = jnp.asarray(rng.standard_normal((4, 16, 24)), jnp.float32)
    lengths = {
        "query_seq_lengths": np.array([16, 9], np.int32),
        "key_value_seq_lengths": np.array([11, 24], np.int32),
    }
    ours = dot_product_attention(q, k, v, bias, mask, implementation="reference", **lengths)
    theirs = jax.nn.dot_product_attention(q, k, v, bias, mask, **lengths)
    np.testing.assert_allclose(ours, theirs, 0, 2e-6)


def test_a_query_that_sees_nothing_differs_from_jax_nn() -> None:
    """Documented: 0 here, the average of the values there."""
    q, k, v = operands(jnp.float32)
    mask = np.ones((1, 1, 16, 24), bool)
    mask[:, :, 3] = False
    ours = dot_product_attention(q, k, v, mask=mask, implementation="reference")
    theirs = jax.nn.dot_product_attention(q, k, v, mask=mask)
    assert np.all(np.asarray(ours[:, 3]) == 0)
    np.testing.assert_allclose(theirs[:, 3, 0], v[:, :, 0].mean(1), 0, 1e-6)


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_rank_3_is_rank_4_without_batch(implementation: str | None) -> None:
    q, k, v = (x[0] for x in operands(jnp.bfloat16))
    kwargs = {"return_lse": True, "implementation": implementation}
    out, lse = flash_attention(q, k, v, **kwargs)
    batched = flash_attention(q[None], k[None], v[None], **kwargs)
    assert (out.shape, lse.shape) == ((16, 4, 64), (4, 16))
    assert np.array_equal(out, batched[0][0]) and np.array_equal(lse, batched[1][0])
    residual = dot_product_attention(q, k, v, return_residual=True, implementation="reference")[1]
    assert residual.shape == (16, 4)
    start = np.full(16, 2)
    kwargs["implementation"] = "reference"
    np.testing.assert_array_equal(
        flash_attention(q, k, v, kv_start=start, **kwargs)[0],
        flash_attention(q[None], k[None], v[None], kv_start=start[None], **kwargs)[0][0],
    )


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("scale", [-0.7, 0, 0.0, 1e-60, np.float32(2), np.int64(1), np.array(0.5)])
def test_any_finite_static_scale(scale, implementation: str | None) -> None:
    q, k, v = operands(jnp.bfloat16)

    def loss(q, k, v, scale=scale):
        out, lse = flash_attention(
            q, k, v, softmax_scale=scale, return_lse=True, implementation=implementation
        )
        return (out.astype(jnp.float32) ** 2).sum() + lse.sum()

    def plain(q, k, v):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        x = jnp.einsum("btnd,bsnd->bnts", q, k) * float(scale)
        out = jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(x), v)
        return (out**2).sum() + jax.nn.logsumexp(x, -1).sum()

    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    expected, expected_gradients = jax.value_and_grad(plain, (0, 1, 2))(q, k, v)
    np.testing.assert_allclose(value, expected, 1e-2)
    for x, y in zip(gradients, expected_gradients, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(x - y).max() <= 2e-2 * np.abs(y).max()


def test_numpy_operands_and_array_likes() -> None:
    q, k, v = operands(jnp.bfloat16)

    class Parameter:
        def __init__(self, value):
            self.value = value

        def __jax_array__(self):
            return self.value

    expected = flash_attention(q, k, v, implementation="reference")
    for wrap in (np.asarray, Parameter):
        got = flash_attention(*map(wrap, (q, k, v)), implementation="reference")
        assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    ("window_size", "causal", "alignment", "band"),
    [
        ((None, None), False, "top_left", (-5, 9)),
        ((None, None), True, "top_left", (-5, 0)),
        ((None, None), True, "bottom_right", (-5, 4)),
        ((2, 3), False, "top_left", (-2, 3)),
        ((2, 3), False, "bottom_right", (2, 7)),
        ((2, 3), True, "top_left", (-2, 0)),
        ((2**31, 2**40), False, "top_left", (-5, 9)),
        ((0, 2**31), False, "bottom_right", (4, 9)),
    ],
)
def test_band(window_size, causal: bool, alignment: str, band: tuple[int, int]) -> None:
    left, right = window_size
    spec = AttentionSpec(
        softmax_scale=1.0,
        window_left=left,
        window_right=0 if causal else right,
        alignment=alignment,
    )
    assert spec.band(5, 9) == band


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_clamping_the_band_changes_no_visible_key(alignment: str) -> None:
    sides = (None, 0, 1, 3, 8, 100)
    for seqlen_q, seqlen_k in ((1, 1), (3, 8), (8, 3), (5, 5)):
        i, j = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)
        offset = seqlen_k - seqlen_q if alignment == "bottom_right" else 0
        for left in sides:
            for right in sides:
                spec = AttentionSpec(
                    softmax_scale=1.0, window_left=left, window_right=right, alignment=alignment
                )
                lower, upper = spec.band(seqlen_q, seqlen_k)
                assert -seqlen_q <= lower <= seqlen_k and -seqlen_q <= upper <= seqlen_k
                seen = (j >= i + lower) & (j <= i + upper)
                expected = np.ones_like(seen)
                if left is not None:
                    expected &= j >= i + offset - left
                if right is not None:
                    expected &= j <= i + offset + right
                assert np.array_equal(seen, expected)


@pytest.mark.usefixtures("fresh_warnings")
def test_none_falls_back_with_one_warning_that_names_the_reasons() -> None:
    q, k, v = operands(jnp.float32, head_dim=40)
    with pytest.warns(FallbackWarning) as caught:
        dot_product_attention(q, k, v, bias=jnp.zeros(()))
        dot_product_attention(q, k, v, bias=jnp.zeros(()), is_causal=True)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "dtype float32 has no kernel" in message
    assert "bias isn't in the kernels yet" in message
    assert 'implementation="reference"' in message
    assert caught[0].filename == __file__
    with pytest.warns(FallbackWarning, match="dtype float32 has no kernel"):
        flash_attention(q, k, v)


@pytest.mark.usefixtures("fresh_warnings")
def test_none_on_a_cpu_warns_once_and_reference_never() -> None:
    q, k, v = operands()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = flash_attention(q, k, v, causal=True, implementation="reference")
    with pytest.warns(FallbackWarning, match="platform cpu") as caught:
        out = flash_attention(q, k, v, causal=True)
        flash_attention(q, k, v)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert np.array_equal(out, expected)


def test_fa4_off_cuda_raises_when_lowered() -> None:
    q, k, v = operands()
    with pytest.raises(NotImplementedError, match="got a program for platform cpu, expected cuda"):
        flash_attention(q, k, v, implementation="fa4")
    traced = jax.eval_shape(lambda *x: flash_attention(*x, implementation="fa4"), q, k, v)
    assert traced.shape == q.shape


@pytest.mark.usefixtures("fresh_warnings")
def test_a_missing_library_raises_under_fa4_and_falls_back_under_none(monkeypatch) -> None:
    def register() -> None:
        raise LibraryError("fa4_jax: kernel library: got none")

    monkeypatch.setattr(_ffi, "register", register)
    q, k, v = operands()

    def lower(implementation: str | None) -> str:
        attention = jax.jit(lambda *x: flash_attention(*x, implementation=implementation))
        return attention.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()

    with pytest.raises(LibraryError, match="kernel library: got none"):
        lower("fa4")
    with pytest.warns(FallbackWarning, match="kernel library: got none"):
        assert "fa4_jax_forward" not in lower(None)
    assert issubclass(LibraryError, ImportError)


@pytest.mark.usefixtures("fresh_warnings", "without_library")
def test_a_gpu_without_kernels_falls_back_or_raises(monkeypatch) -> None:
    reasons = ("compute capability 8.0 has no kernel (built: 9.0)",)
    monkeypatch.setattr(_dispatch, "device_reasons", lambda: reasons)
    q, k, v = operands()

    def lower(implementation: str | None) -> str:
        attention = jax.jit(lambda *x: flash_attention(*x, implementation=implementation))
        return attention.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()

    with pytest.raises(NotImplementedError, match=r"compute capability 8\.0 has no kernel"):
        lower("fa4")
    with pytest.warns(FallbackWarning, match=r"compute capability 8\.0"):
        assert "fa4_jax_forward" not in lower(None)


@pytest.mark.usefixtures("fresh_warnings", "without_library")
def test_a_gradient_without_kernels_raises_at_trace_time_or_falls_back(monkeypatch) -> None:
    """A head dim built forward only: the forward runs, its gradient says no before that."""
    rows = tuple(v for v in _variants.VARIANTS if v.kernel is _variants.Kernel.forward)
    monkeypatch.setattr(_variants, "VARIANTS", rows)
    q, k, v = operands()

    def loss(q, implementation):
        return flash_attention(q, k, v, implementation=implementation).astype(jnp.float32).sum()

    assert jax.eval_shape(lambda q: loss(q, "fa4"), q).shape == ()
    with pytest.raises(NotImplementedError, match="no gradient: head_dim 64 has no bf16 backward"):
        jax.eval_shape(jax.grad(lambda q: loss(q, "fa4")), q)
    with pytest.warns(FallbackWarning, match="has no bf16 backward_preprocess kernel"):
        jax.grad(lambda q: loss(q, None))(q)


def test_export_disabled_checks_cover_every_kernel() -> None:
    names = {str(check) for check in fa4_jax.export_disabled_checks()}
    assert names == {f"custom_call:{_variants.target_name(k)}" for k in _variants.Kernel}


def test_memory_of_the_reference_is_linear_in_length() -> None:
    def temporary_bytes(seqlen: int) -> int:
        x = jax.ShapeDtypeStruct((1, seqlen, 1, 16), jnp.float32)

        def loss(q, k, v):
            return flash_attention(q, k, v, causal=True, implementation="reference").sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert _reference.BLOCK == 512
    short, long = temporary_bytes(4096), temporary_bytes(16384)
    assert long < 4.5 * short
    # The T x S matrix of one head would be 1 GiB.
    assert long < 2**26
