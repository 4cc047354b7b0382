# SPDX-License-Identifier: Apache-2.0
"""`python -m fa4_jax.doctor`: what it finds, and its exit status."""

import functools
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import Oracle, visible

import fa4_jax
from fa4_jax import _ffi, _self_test, _variants, doctor
from fa4_jax._variants import VARIANTS, Arch
from fa4_jax.doctor import Check, Status

LIBRARY = "libfa4_jax.so"
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="about machines without a GPU")


def run(capsys, *arguments):
    """(exit status, checks by name) of one in-process run."""
    status = doctor.main(["--json", *arguments])
    report = json.loads(capsys.readouterr().out)
    assert report["exit_status"] == status
    return status, {check["name"]: check for check in report["checks"]}


@on_cpu
def test_without_a_gpu_it_is_limited_and_the_reference_is_right(capsys):
    status, checks = run(capsys)
    assert status == 1
    assert checks["device"]["status"] == "limited"
    assert checks["self-test"]["status"] == "ok"
    assert checks["self-test"]["detail"].startswith("reference")
    assert checks["gpu-tests"]["status"] == "limited"
    assert checks["gpu-tests"]["detail"].startswith("not run: the program is for platform cpu")


@on_cpu
def test_command_line_prints_every_check_and_exits_with_its_status(tmp_path):
    # From another folder, as a user would, with the fa4_jax that this test imported.
    environment = {
        **os.environ,
        "PYTHONPATH": str(pathlib.Path(fa4_jax.__file__).parents[1]),
        "FA4_JAX_SOMETHING": "seen",
    }
    result = subprocess.run(
        [sys.executable, "-m", "fa4_jax.doctor"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1, result.stderr
    for name in (
        "device",
        "library",
        "kernels",
        "environment",
        "self-test",
        "gpu-tests",
        jax.__version__,
    ):
        assert name in result.stdout
    assert "FA4_JAX_SOMETHING=seen" in result.stdout


def test_missing_library_is_a_limitation(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(_ffi, "library_path", lambda: tmp_path / LIBRARY)
    assert doctor.check_library().status == Status.limited
    assert doctor.check_kernels() == Check("kernels", Status.limited, "none")


def write_library(folder, **changes):
    """A library file that was never built, and a manifest that is right but for `changes`."""
    content = b"not an ELF file"
    (folder / LIBRARY).write_bytes(content)
    facts = {
        "size": len(content),
        "sha256": "0" * 64,
        "ffi_api_version": [0, 1],
        "target_version": 1,
        "cuda_version": "13",
        "dsl_version": "4.8.1",
        "arches": ["sm90a"],
        "kernels": [],
    }
    (folder / "manifest.json").write_text(json.dumps(facts | changes))


@pytest.mark.parametrize("changes", [{}, {"size": 3}], ids=["other bytes", "truncated"])
def test_damaged_library_is_broken(capsys, monkeypatch, tmp_path, changes):
    write_library(tmp_path, **changes)
    monkeypatch.setattr(_ffi, "library_path", lambda: tmp_path / LIBRARY)
    status, checks = run(capsys)
    assert status == 2
    assert checks["library"]["status"] == "broken"
    assert "expected" in checks["library"]["detail"]


def test_incomplete_build_is_a_limitation(monkeypatch, tmp_path):
    write_library(tmp_path, kernels=["fa4_forward_sm90a_bf16_d64"])
    monkeypatch.setattr(_ffi, "library_path", lambda: tmp_path / LIBRARY)
    check = doctor.check_kernels()
    assert check.status == Status.limited
    assert "1 of " in check.detail


@pytest.mark.parametrize(
    ("capability", "why"),
    [
        ("8.9", "they begin with Hopper"),
        ("10.3", "a binary for sm_100a runs on no other GPU of its family"),
        ("11.0", "it would need kernels of its own"),
        ("12.0", "it has neither of the instructions that they are made of, wgmma and tcgen05"),
        ("12.1", "it has neither of the instructions that they are made of, wgmma and tcgen05"),
    ],
)
def test_what_runs_on_a_gpu_without_kernels(monkeypatch, tmp_path, capability, why) -> None:
    write_library(tmp_path, kernels=[variant.name for variant in VARIANTS])
    monkeypatch.setattr(_ffi, "library_path", lambda: tmp_path / LIBRARY)
    here = {"platform": "gpu", "compute_capability": f"9.0, {capability}"}
    monkeypatch.setattr(doctor, "devices", lambda: here)
    check = doctor.check_kernels()
    assert check.status == Status.limited
    assert f"this machine's sm {capability} runs none of them: {why}. All calls run" in check.detail
    here["compute_capability"] = "9.0"
    assert doctor.check_kernels().status == Status.ok


def test_a_gpu_without_every_kernel_has_the_reference_only(monkeypatch, tmp_path) -> None:
    """A program is lowered for all architectures that are served; one with a part isn't."""
    write_library(tmp_path, kernels=[variant.name for variant in VARIANTS])
    monkeypatch.setattr(_ffi, "library_path", lambda: tmp_path / LIBRARY)
    here = {"platform": "gpu", "compute_capability": "9.0, 10.0"}
    monkeypatch.setattr(doctor, "devices", lambda: here)
    monkeypatch.setattr(_variants, "served_arches", lambda: (Arch.sm90a,))
    assert "sm 10.0 runs none of them: sm_100a has only some" in doctor.check_kernels().detail
    monkeypatch.setattr(_variants, "served_arches", lambda: tuple(Arch))
    assert doctor.check_kernels().status == Status.ok


# --- The tests on a GPU, with the reference in the kernels' place.
# ------------------------------------------------------------------

ROWS = [("bfloat16", (64, 64)), ("float16", (96, 64))]


@pytest.fixture
def on_gpu(monkeypatch) -> None:
    """A GPU that runs `ROWS`, as far as the doctor can tell."""
    run = _self_test.run

    def run_here(case, dtype, head_dims, implementation):
        assert implementation == "fa4"
        return run(case, dtype, head_dims, "reference")

    monkeypatch.setattr(doctor, "kernel_reasons", lambda: ())
    monkeypatch.setattr(doctor, "rows_here", lambda: ROWS)
    monkeypatch.setattr(_self_test, "run", run_here)


@pytest.mark.parametrize("capability", ["9.0", "10.0"])
def test_every_dtype_and_head_dim_of_the_gpu_is_tested(monkeypatch, capability) -> None:
    here = [SimpleNamespace(compute_capability=capability)]
    monkeypatch.setattr(jax, "devices", lambda backend: here)
    head_dims = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
    dtypes = {v.dtype.numpy_name for v in VARIANTS if v.key.startswith("backward_bf16")}
    assert dtypes <= {dtype for dtype, _ in doctor.rows_here()}
    assert {dims for _, dims in doctor.rows_here()} == set(head_dims)


@pytest.mark.usefixtures("on_gpu")
def test_gpu_tests_report_the_worst_error_of_every_result(capsys) -> None:
    doctor.main(["--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    found = [check for check in checks if check["name"] == "gpu-tests"]
    assert [check["status"] for check in found] == ["ok", "ok"]
    for check, text in zip(
        found, ("bfloat16, head_dim 64", "float16, head_dim 96/64"), strict=True
    ):
        assert check["detail"].startswith(f"fa4, {text}: worst error / allowed 0.")
        results = {(result["case"], result["name"]) for result in check["results"]}
        names = ("out", "lse", "dq", "dk", "dv")
        assert results == {
            (case, f"{name} {norm}")
            for case in ("causal", "everything")
            for name in names
            for norm in ("max", "rms")
        }
        worst = max(result["error"] / result["allowed"] for result in check["results"])
        assert f" {worst:.2f}, " in check["detail"]


def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    return x + ((factor - 1) * (x - jax.lax.stop_gradient(x))).astype(x.dtype)


FAULTS = {
    "out": lambda attend, q, k, v: (lambda out, lse: (1.02 * out, lse))(*attend(q, k, v)),
    "lse": lambda attend, q, k, v: (lambda out, lse: (out, lse + 1e-4))(*attend(q, k, v)),
    "dq": lambda attend, q, k, v: attend(scale_gradient(q, 1.02), k, v),
    "dk dv": lambda attend, q, *kv: attend(q, *(scale_gradient(x, 1.02) for x in kv)),
    "out lse dq dk dv": lambda attend, q, k, v: attend(q * jnp.nan, k, v),
}


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("fault", FAULTS)
def test_gpu_tests_find_a_kernel_that_is_wrong(monkeypatch, fault: str) -> None:
    """By 2 %, or the lse by 1e-4."""
    right = fa4_jax.flash_attention

    def wrong(q, k, v, **options):
        out, lse = FAULTS[fault](functools.partial(right, **options), q, k, v)
        return out.astype(q.dtype), lse

    monkeypatch.setattr(fa4_jax, "flash_attention", wrong)
    causal, _ = _self_test.cases()
    check = doctor.tested("gpu-tests", "fa4", "float16", (64, 64), [causal])
    assert check.status == Status.broken
    bad = {x["name"].split()[0] for x in check.results if not x["error"] <= x["allowed"]}
    assert bad >= set(fault.split())


@pytest.mark.usefixtures("on_gpu")
def test_a_gpu_test_that_raises_is_broken_and_the_others_run(monkeypatch) -> None:
    def fail(case, dtype, *rest):
        if dtype == "bfloat16":
            raise RuntimeError("misaligned address\nand more")
        return [_self_test.Result(case.name, "out", 1.0, 2.0)]

    monkeypatch.setattr(_self_test, "run", fail)
    first, second = doctor.check_gpu_tests()
    assert first.status == Status.broken
    assert first.detail == "bfloat16, head_dim 64: RuntimeError: misaligned address"
    assert second.status == Status.ok


@pytest.mark.parametrize("case", _self_test.cases(), ids=lambda case: case.name)
def test_its_float64_attention_is_the_definition(case: _self_test.Case) -> None:
    rng = np.random.default_rng(1)
    shapes = (2, 131, 4, 24), (2, 150, 2, 24), (2, 150, 2, 16), (2, 131, 4, 16), (2, 4, 131)
    q, k, v, dout, dlse = given = [rng.standard_normal(shape) for shape in shapes]
    options = dict(case.options)
    softcap, sinks = options.pop("softcap", None), options.pop("sinks", None)
    options.pop("deterministic", None)
    seen = visible(131, 150, **options)
    oracle = Oracle(seen, 24**-0.5, softcap=softcap, sinks=sinks)
    exact = _self_test._Attention.of(case, None, tuple(given))
    results = exact.forward(None)
    results |= exact.backward(None, results["out"], results["lse"])
    expected = *oracle.forward(q, k, v), *oracle.backward(q, k, v, dout, dlse)[:3]
    for result, value in zip(results.values(), expected, strict=True):
        np.testing.assert_allclose(result, value, 1e-9, 1e-12)


@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_wrong_numbers_are_broken(capsys, monkeypatch, factor):
    right = fa4_jax.flash_attention
    monkeypatch.setattr(fa4_jax, "flash_attention", lambda *a, **k: factor * right(*a, **k))
    status, checks = run(capsys)
    assert status == 2
    assert checks["self-test"]["status"] == "broken"


def test_a_check_that_raises_is_broken(capsys, monkeypatch):
    def check_something() -> Check:
        raise RuntimeError("cuInit failed\nand more")

    monkeypatch.setattr(doctor, "CHECKS", (check_something,))
    status, checks = run(capsys)
    assert status == 2
    assert checks["something"]["detail"] == "RuntimeError: cuInit failed"


@pytest.mark.parametrize("worst", list(Status))
def test_exit_status_is_the_worst_check(capsys, monkeypatch, worst):
    checks = [lambda s=s: Check("check", s, "") for s in (Status.ok, worst, Status.ok)]
    monkeypatch.setattr(doctor, "CHECKS", tuple(checks))
    assert run(capsys)[0] == int(worst)
