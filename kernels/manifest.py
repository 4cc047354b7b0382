# SPDX-License-Identifier: Apache-2.0
"""Write `manifest.json` for a built library; `fa4_jax._ffi` checks the library against it."""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import pathlib

from fa4_jax._variants import TARGET_VERSION


def manifest(library: pathlib.Path, kernels: pathlib.Path, cuda: str) -> dict[str, object]:
    """The facts about `library`. Loads it, which also shows that it loads without a GPU."""
    content = library.read_bytes()
    ffi_version = ctypes.CDLL(str(library.resolve())).fa4_jax_ffi_api_version()
    return {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "ffi_api_version": list(divmod(ffi_version, 1000)),
        "target_version": TARGET_VERSION,
        "cuda_version": cuda,
        **json.loads(kernels.read_text()),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="kernels.manifest")
    parser.add_argument("--library", type=pathlib.Path, required=True)
    parser.add_argument("--kernels", type=pathlib.Path, required=True)
    parser.add_argument("--cuda", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    facts = manifest(options.library, options.kernels, options.cuda)
    options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
