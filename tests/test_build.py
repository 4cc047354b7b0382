# SPDX-License-Identifier: Apache-2.0
"""The build: rows compile to the C ABI that the registry states, reproducibly, for any x86-64."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import fake_library
import pytest

from fa4_jax import _ffi
from fa4_jax._variants import VARIANTS, Kernel
from kernels import build as kernels_build
from kernels import signatures

ROOT = fake_library.ROOT
ROW = next(v for v in VARIANTS if v.kernel == Kernel.backward_postprocess)

# What an exported object needs from the DSL's runtime. A new name here needs a look: loader.cc
# and the tests' fake runtimes are written for these.
RUNTIME_SYMBOLS = {
    "_cuKernelGetAttribute",
    "_cudaDeviceGetAttribute",
    "_cudaFuncSetAttribute",
    "_cudaGetDevice",
    "_cudaKernelSetAttributeForDevice",
    "_cudaLaunchKernelEx",
    "_cudaLibraryGetKernel",
    "_cudaLibraryLoadData",
}


def run(*command: object) -> str:
    return subprocess.run(
        [str(c) for c in command], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout


def build(out: pathlib.Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kernels.build", "--only", ROW.name, "--jobs", "1"]
    return subprocess.run(
        [*command, "--out", str(out), *options], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One row, compiled."""
    pytest.importorskip("cutlass", reason="compiling kernels needs nvidia-cutlass-dsl")
    out = tmp_path_factory.mktemp("kernels")
    result = build(out, "--keep")
    assert result.returncode == 0, result.stderr
    return out


def test_second_build_compiles_nothing(built):
    before = {path: path.stat().st_mtime_ns for path in built.iterdir()}
    result = build(built, "--keep")
    assert result.returncode == 0
    assert "(up to date)" in result.stderr
    assert {path: path.stat().st_mtime_ns for path in built.iterdir()} == before


@pytest.mark.parametrize("lost", ["o", "h", "json"])
def test_a_lost_file_is_built_again(built, lost):
    path = built / f"{ROW.name}.{lost}"
    path.unlink()
    result = build(built, "--keep")
    assert "(up to date)" not in result.stderr
    assert path.is_file()


def test_a_row_of_another_key_is_built_again(built):
    path = built / f"{ROW.name}.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "key": "0" * 64}))
    assert "(up to date)" not in build(built, "--keep").stderr
    assert json.loads(path.read_text())["key"] == facts["key"]


def test_what_another_build_has_is_taken_if_its_key_is_the_same(built, tmp_path, monkeypatch):
    monkeypatch.setenv("FA4_JAX_BUILT_KERNELS", str(built))
    assert "(up to date)" in build(tmp_path / "same").stderr
    for suffix in ("o", "h"):
        name = f"{ROW.name}.{suffix}"
        assert (tmp_path / "same" / name).read_bytes() == (built / name).read_bytes()
    other = tmp_path / "other"
    shutil.copytree(built, other)
    facts = json.loads((built / f"{ROW.name}.json").read_text())
    (other / f"{ROW.name}.json").write_text(json.dumps({**facts, "key": "0" * 64}))
    monkeypatch.setenv("FA4_JAX_BUILT_KERNELS", str(other))
    assert "(up to date)" not in build(tmp_path / "of_another_key").stderr


def test_digest_and_object_are_the_same_in_another_process(built, tmp_path):
    first, second = build(built, "--keep", "--digest"), build(tmp_path, "--digest")
    assert first.stdout == second.stdout
    assert re.fullmatch(rf"[0-9a-f]{{64}}  {ROW.name}\n", first.stdout)
    name = f"{ROW.name}.o"
    assert (built / name).read_bytes() == (tmp_path / name).read_bytes()


def test_cubin_and_ptx_are_bound_by_hash(built):
    facts = json.loads((built / f"{ROW.name}.json").read_text())
    for suffix in ("cubin", "ptx"):
        assert (
            facts[f"{suffix}_sha256"] == run("sha256sum", built / f"{ROW.name}.{suffix}").split()[0]
        )
    assert (built / f"{ROW.name}.cubin").read_bytes() in (built / f"{ROW.name}.o").read_bytes()


def test_report_names_registers_and_shared_memory(built):
    text = build(built, "--keep", "--report").stdout
    assert re.search(
        rf"{ROW.name}: [1-9]\d* registers, 0 bytes spilled, \d+ bytes of shared memory", text
    )


def test_report_says_that_ptxas_serialised_the_products():
    """Lines as ptxas wrote them into the remarks of a row that had too few registers."""
    remarks = """
  - Remark:      'ptxas output: ptxas info    : (C7517) wgmma.wait_group is injected in around line 3748 by compiler to allow use of registers defined by GMMA in function ''fa4_row_0''
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register resources for the function ''fa4_row_0''
ptxas info    : Function properties for fa4_row_0
ptxas         .     0 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 5 barriers
"""  # noqa: E501
    facts = kernels_build._ptxas_facts(remarks)
    assert (facts["registers"], facts["spill_bytes"]) == (168, 24)
    assert facts["losses"] == (
        "wgmma.mma_async instructions are serialized due to insufficient register resources",
    )


def test_exported_header_is_what_the_registry_says(built):
    header = (built / f"{ROW.name}.h").read_text()
    signatures.check_header(ROW, header)
    for old, new in (
        ("int32_t dynamic_shapes[3]", "int32_t dynamic_shapes[4]"),
        ("int64_t dynamic_strides[2]", "int64_t dynamic_strides[1]"),
        ("int64_t dynamic_strides", "int32_t dynamic_strides"),
        ("float softmax_scale", "int32_t softmax_scale"),
        (", cudaStream_t stream", ""),
        ("__mlir_ciface_launch", "__mlir_ciface_other"),
    ):
        assert old in header
        with pytest.raises(ValueError):
            signatures.check_header(ROW, header.replace(old, new))


def test_object_needs_only_the_known_runtime(built):
    undefined = run("nm", "--undefined-only", built / f"{ROW.name}.o")
    assert set(undefined.split()) - {"U", "_GLOBAL_OFFSET_TABLE_"} == RUNTIME_SYMBOLS


def test_host_code_runs_on_any_x86_64(built):
    """The DSL's default is the build machine's instruction set: SIGILL where there's no AVX-512."""
    for path in (built / f"{ROW.name}.o", fake_library.build()):
        code = run("objdump", "-d", path)
        assert "call" in code
        assert not re.search(r"%[yz]mm\d|%k[1-7]\b", code)


def test_a_row_that_does_not_compile_is_named(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(ROOT)!r})
            from kernels import build
            build.KERNELS = dict.fromkeys(build.KERNELS, "kernels.no_such_file:Kernel")
            if __name__ == "__main__":
                sys.exit(build.main(["--only", {ROW.name!r}, "--out", {str(tmp_path)!r}]))
            """
        )
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.returncode == 1
    assert f"{ROW.name} did not compile:" in result.stderr
    assert "No module named 'kernels.no_such_file'" in result.stderr
    assert not (tmp_path / "registry.generated.cc").exists()


def test_an_unknown_row_lists_the_table():
    result = subprocess.run(
        [sys.executable, "-m", "kernels.build", "--only", "sideways_*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "no row is called fa4_sideways_*" in result.stderr
    assert VARIANTS[0].name in result.stderr


def test_registry_has_one_entry_per_row():
    source = signatures.registry_source(VARIANTS)
    entries = re.findall(r'^    \{"(\w+)", "(fa4_\w+)", (\d+), (\d+),$', source, re.MULTILINE)
    expected = [(v.key, v.name, *map(str, v.arch.compute_capability)) for v in VARIANTS]
    assert sorted(entries) == sorted(expected)
    assert [key for key, *_ in entries] == sorted(key for key, *_ in entries)  # binary search


def test_built_library_exports_and_needs_nothing_more():
    path = _ffi.library_path()
    if not path.is_file():
        pytest.skip("the kernel library isn't built here")
    exported = {line.split()[-1] for line in run("nm", "-D", "--defined-only", path).splitlines()}
    assert exported >= {"fa4_jax_execute", "fa4_jax_initialize", "fa4_jax_ffi_api_version"}
    assert all(name.startswith("fa4_jax_") for name in exported)
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", path)))
    assert needed <= {f"lib{name}.so.{n}" for name, n in (("c", 6), ("m", 6))} | {
        "ld-linux-x86-64.so.2"
    }
    assert not re.search(r"RPATH|RUNPATH", run("readelf", "-d", path))
    _ffi.verify()
