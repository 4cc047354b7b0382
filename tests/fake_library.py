# SPDX-License-Identifier: Apache-2.0
"""Builds the FFI library against a fake CUDA runtime, so that its C++ runs under JAX on a CPU.

The sources of `ffi/`, the generated registry and its tables are the shipped ones; only the compiled
kernels (an entry point that reports its arguments instead) and the CUDA runtime are replaced.
"""

from __future__ import annotations

import fcntl
import hashlib
import pathlib
import subprocess
import sys

from fa4_jax._variants import VARIANTS

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # `kernels` isn't installed; last, so that an installed fa4_jax wins

from kernels import signatures, toolchain  # noqa: E402

FAKE_SOURCE = ROOT / "tests" / "fake" / "fake_cuda.cc"


def _entry_points() -> str:
    """What the exported objects would define."""
    text = [
        "#include <cstdint>",
        "void FakeInit(void** args);",
        "void FakeLoadToDevice(void** args);",
        "void FakeLaunch(const char* name, void** args, int32_t num_args);",
        'extern "C" {',
    ]
    for variant in VARIANTS:
        symbol = f"_mlir_{variant.name}"
        text += [
            f"void {symbol}__mlir_ciface_launch(void** args, int32_t num_args) {{",
            f'  FakeLaunch("{variant.name}", args, num_args);',
            "}",
            f"void {symbol}_cuda_init(void** args) {{ FakeInit(args); }}",
            f"void {symbol}_cuda_load_to_device(void** args) {{ FakeLoadToDevice(args); }}",
        ]
    text.append("}")
    return "\n".join(text) + "\n"


def build(compiler_flags: tuple[str, ...] = ("-O1",)) -> pathlib.Path:
    """The shared library, built once per content of its sources and flags."""
    headers = toolchain.locate("jaxlib", "include/xla/ffi/api/ffi.h").parents[3]
    generated = {
        "registry.generated.cc": signatures.registry_source(VARIANTS),
        "entry_points.cc": _entry_points(),
    }
    sources = sorted([*(ROOT / "ffi").glob("*.cc"), FAKE_SOURCE])
    inputs = [*sources, *sorted((ROOT / "ffi").glob("*.h")), ROOT / "ffi" / "exports.lds"]
    digest = hashlib.sha256(repr((compiler_flags, str(headers), generated)).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    directory = ROOT / "build" / "fake" / digest.hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / "libfa4_jax.so"
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may want it at once
        if not library.exists():
            _compile(directory, sources, generated, headers, compiler_flags)
    return library


def _compile(
    directory: pathlib.Path,
    sources: list[pathlib.Path],
    generated: dict[str, str],
    headers: pathlib.Path,
    flags: tuple[str, ...],
) -> None:
    for name, text in generated.items():
        (directory / name).write_text(text)
    partial = directory / "partial.so"
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-DNDEBUG", "-fno-exceptions", *flags]
    command += ["-Wall", "-Wextra", "-Werror", "-isystem", str(headers), "-I", str(ROOT / "ffi")]
    command += [*map(str, sources), *(str(directory / name) for name in generated)]
    command += [f"-Wl,--version-script={ROOT / 'ffi' / 'exports.lds'}", "-Wl,-z,defs", "-pthread"]
    try:
        subprocess.run([*command, "-o", str(partial)], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        raise
    partial.rename(directory / "libfa4_jax.so")
