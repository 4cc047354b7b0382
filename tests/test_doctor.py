# SPDX-License-Identifier: Apache-2.0
"""`python -m fa4_jax.doctor`: what it finds, and its exit status."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

import fa4_jax
from fa4_jax import _ffi, doctor
from fa4_jax._variants import VARIANTS
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
    for name in ("device", "library", "kernels", "environment", "self-test", jax.__version__):
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


def test_a_gpu_without_every_kernel_has_the_reference_only(monkeypatch, tmp_path):
    """Forward kernels are there for compute capability 10.0; a gradient would find none."""
    write_library(tmp_path, kernels=[variant.name for variant in VARIANTS])
    monkeypatch.setattr(_ffi, "library_path", lambda: tmp_path / LIBRARY)
    here = {"platform": "gpu", "compute_capability": "9.0, 10.0"}
    monkeypatch.setattr(doctor, "devices", lambda: here)
    check = doctor.check_kernels()
    assert check.status == Status.limited
    assert "machine's sm 10.0: reference only" in check.detail
    here["compute_capability"] = "9.0"
    assert doctor.check_kernels().status == Status.ok


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
