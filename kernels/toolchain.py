# SPDX-License-Identifier: Apache-2.0
"""Where the wheels that the C++ build links against keep their files.

    python -m kernels.toolchain [--cuda 12]     # prints NAME=path lines

Asks the installed packages' own records, so nothing is imported and no CUDA toolkit is needed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import pathlib

# Variable, distribution by CUDA version, path below its root (a folder is named by a file in it).
_FILES = {
    "FFI_HEADERS": (dict.fromkeys(("12", "13"), "jaxlib"), "include/xla/ffi/api/ffi.h"),
    "CUDART_STATIC": (
        {"12": "nvidia-cuda-runtime-cu12", "13": "nvidia-cuda-runtime"},
        "lib/libcudart_static.a",
    ),
    "DSL_RUNTIME": (
        {"12": "nvidia-cutlass-dsl-libs-cu12", "13": "nvidia-cutlass-dsl-libs-cu13"},
        "lib/libcuda_dialect_runtime_static.a",
    ),
}


def locate(distribution: str, suffix: str) -> pathlib.Path:
    """The file of an installed distribution whose path ends in `suffix`."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"the build needs the package {distribution}; pip install it") from None
    for file in files:
        if str(file).endswith(suffix):
            return pathlib.Path(str(file.locate())).resolve()
    raise SystemExit(f"the package {distribution} holds no {suffix}")


def toolchain(cuda: str) -> dict[str, pathlib.Path]:
    """Variable to path, for a CUDA major version."""
    found = {name: locate(by_cuda[cuda], suffix) for name, (by_cuda, suffix) in _FILES.items()}
    found["FFI_HEADERS"] = found["FFI_HEADERS"].parents[3]  # what `#include "xla/..."` starts from
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="kernels.toolchain")
    parser.add_argument("--cuda", choices=("12", "13"), default="13")
    for name, path in toolchain(parser.parse_args().cuda).items():
        print(f"{name}={path}")


if __name__ == "__main__":
    main()
