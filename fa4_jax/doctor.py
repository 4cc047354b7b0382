# SPDX-License-Identifier: Apache-2.0
"""Check an installation: `python -m fa4_jax.doctor [--json]`.

Prints versions, GPUs, the kernel library, which kernels serve this machine's GPUs, and the error of
one tiny forward and backward against float64. Needs no GPU and no library to run.

Exit status: 0, the kernels work; 1, attention works with limitations, for instance by the reference
where there is no GPU; 2, broken.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

PREFIX = "FA4_JAX_"
# Relative L2 error against float64 that bfloat16 attention stays below: out and gradients of the
# self-test are near 3e-3. A wrong mask or scale gives more than 1e-1.
TOLERANCE = 2e-2


class Status(enum.IntEnum):
    """How a check went; the worst one is the exit status."""

    ok = 0
    limited = 1
    broken = 2


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    status: Status
    detail: str


def versions() -> dict[str, str]:
    """Versions of everything that takes part."""
    from fa4_jax import _ffi

    packages = ["fa4-jax", "jax", "jaxlib", "numpy"]
    plugins = ["jax-cuda12-plugin", "jax-cuda13-plugin"]
    found = {"python": platform.python_version()}
    for package in packages + plugins:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package in packages:
                found[package] = "not installed"
    found["jaxlib FFI"] = "{}.{}".format(*_ffi.jax_ffi_version())
    return found


def driver() -> str | None:
    """The NVIDIA driver's version, from whatever on this machine knows it."""
    try:
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:
        pass  # Not installed, or no driver: the next ways find out.
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            result = subprocess.run(query, capture_output=True, text=True, timeout=5, check=True)
            return result.stdout.split()[0]
        except (subprocess.SubprocessError, OSError, IndexError):
            pass
    try:
        text = pathlib.Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return found.group(1) if found else None


def devices() -> dict[str, Any]:
    """What JAX computes on."""
    import jax

    local = jax.local_devices()
    capabilities = sorted({getattr(device, "compute_capability", None) or "" for device in local})
    return {
        "device": local[0].device_kind,
        "count": len(local),
        "platform": local[0].platform,
        "compute_capability": ", ".join(filter(None, capabilities)) or None,
        "driver": driver(),
    }


def installed_elsewhere() -> str | None:
    """A hint if Python took this package from a source tree although another one is installed."""
    try:
        installed = importlib.metadata.distribution("fa4-jax").locate_file("fa4_jax/doctor.py")
    except importlib.metadata.PackageNotFoundError:
        return "install it with pip"
    if pathlib.Path(str(installed)).resolve() == pathlib.Path(__file__).resolve():
        return None
    return "an installed fa4_jax is hidden by this source tree: use python -P, or another folder"


def attention_float64(inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """(out, dq, dk, dv) of causal grouped-query attention in float64 for (q, k, v, dout)."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in inputs)
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5
    logits = scale * np.einsum("btnd,bsnd->bnts", q, k)
    logits = np.where(np.tri(*logits.shape[-2:], dtype=bool), logits, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("bnts,bsnd->btnd", p, v)
    dp = np.einsum("btnd,bsnd->bnts", dout, v)
    ds = scale * p * (dp - np.sum(dp * p, -1, keepdims=True))
    dq = np.einsum("bnts,bsnd->btnd", ds, k)
    dk = np.einsum("bnts,btnd->bsnd", ds, q)
    dv = np.einsum("bnts,btnd->bsnd", p, dout)

    def sum_groups(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(3)

    return out, dq, sum_groups(dk), sum_groups(dv)


def self_test(implementation: str) -> dict[str, float]:
    """Relative L2 error of out, dq, dk and dv on a small problem with odd lengths."""
    import jax
    import jax.numpy as jnp

    from fa4_jax import flash_attention

    random = np.random.default_rng(0)
    shapes = [(1, length, heads, 64) for length, heads in ((131, 4), (131, 2), (131, 2), (131, 4))]
    inputs = tuple(jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in shapes)

    @jax.jit
    def forward_backward(q, k, v, dout):
        def attend(q, k, v):
            return flash_attention(q, k, v, causal=True, implementation=implementation)

        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    results = [np.asarray(x, np.float64) for x in forward_backward(*inputs)]
    expected = attention_float64(tuple(np.asarray(x.astype(jnp.float32)) for x in inputs))
    return {
        name: float(np.linalg.norm(result - value) / np.linalg.norm(value))
        for name, result, value in zip(("out", "dq", "dk", "dv"), results, expected, strict=True)
    }


def check_device() -> Check:
    """A GPU that JAX sees."""
    found = devices()
    capability = found["compute_capability"]
    text = f"{found['count']} x {found['device']}"
    if found["platform"] == "gpu":
        detail = f"{text}, sm {capability}, driver {found['driver'] or 'unknown'}"
        return Check("device", Status.ok, detail)
    if found["driver"]:
        hint = "there is an NVIDIA driver, but JAX doesn't use it: pip install 'jax[cuda13]'"
        return Check("device", Status.limited, f"{text}; {hint}")
    return Check("device", Status.limited, f"{text}, no GPU: attention runs on the reference")


def check_library() -> Check:
    """The kernel library is there, undamaged, and registers with this jaxlib."""
    from fa4_jax import _ffi

    path = _ffi.library_path()
    if not path.exists():
        detail = f"{path} is missing: there are no kernels here, only the reference"
        if shadowed := installed_elsewhere():
            detail += f"; {shadowed}"
        return Check("library", Status.limited, detail)
    try:
        facts = _ffi.verify()
        _ffi.register()
    except _ffi.LibraryError as error:
        return Check("library", Status.broken, str(error))
    return Check(
        "library",
        Status.ok,
        f"{path}, {facts.size} bytes, sha256 {facts.sha256[:12]} as built, "
        f"FFI {'.'.join(map(str, facts.ffi_api_version))}, CUDA {facts.cuda_version}, "
        f"CuTe DSL {facts.dsl_version}",
    )


def check_kernels() -> Check:
    """Kernels for the compute capabilities of this machine's GPUs."""
    from fa4_jax import _ffi
    from fa4_jax._variants import VARIANTS, served_arches

    try:
        built = set(_ffi.kernel_names())
    except _ffi.LibraryError:
        return Check("kernels", Status.limited, "none")
    counts: dict[str, list[int]] = {}
    for variant in VARIANTS:
        count = counts.setdefault("{}.{}".format(*variant.arch.compute_capability), [0, 0])
        count[0] += variant.name in built
        count[1] += 1
    text = ", ".join(f"{n} of {total} for sm {key}" for key, (n, total) in counts.items())
    if any(0 < n < total for n, total in counts.values()):
        return Check("kernels", Status.limited, f"{text}: an incomplete build")
    here = devices()
    if here["platform"] == "gpu":
        capabilities = here["compute_capability"].split(", ")
        served = {"{}.{}".format(*arch.compute_capability) for arch in served_arches()}
        if unserved := [key for key in capabilities if key not in served]:
            detail = f"{text}; none for this machine's sm {', '.join(unserved)}: reference only"
            return Check("kernels", Status.limited, detail)
    return Check("kernels", Status.ok, text)


def check_self_test() -> Check:
    """One forward and backward, by the kernels if they run here, else by the reference."""
    import jax
    import jax.numpy as jnp

    from fa4_jax import is_supported

    q, kv = (jax.ShapeDtypeStruct((1, 131, heads, 64), jnp.bfloat16) for heads in (4, 2))
    implementation = "fa4" if is_supported(q, kv, kv, causal=True).ok else "reference"
    errors = self_test(implementation)
    text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    right = all(error <= TOLERANCE for error in errors.values())  # False for NaN, too.
    return Check(
        "self-test",
        Status.ok if right else Status.broken,
        f"{implementation}, relative error against float64: {text} (allowed {TOLERANCE:g})",
    )


def check_environment() -> Check:
    """Variables that may change what this package does."""
    found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if PREFIX in name]
    return Check("environment", Status.ok, ", ".join(found) or f"no {PREFIX}* variable is set")


CHECKS: tuple[Callable[[], Check], ...] = (
    check_device,
    check_library,
    check_kernels,
    check_environment,
    check_self_test,
)


def examine() -> Iterator[Check]:
    """All checks; one that raises is a finding, too."""
    for check in CHECKS:
        try:
            yield check()
        except Exception as error:
            name = check.__name__.removeprefix("check_").replace("_", "-")
            text = (str(error).strip().splitlines() or [""])[0]
            yield Check(name, Status.broken, f"{type(error).__name__}: {text}")


VERDICTS = {
    Status.ok: "ok: the FA4 kernels work here",
    Status.limited: "limited: attention works, but not everything above is available",
    Status.broken: "broken: see above",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; the exit status is the worst check's."""
    parser = argparse.ArgumentParser(
        prog="python -m fa4_jax.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    found = versions()
    if not options.json:
        print("\n".join(f"{'':8} {name:12} {text}" for name, text in found.items()))
    checks = []
    for check in examine():
        checks.append(check)
        if not options.json:
            print(f"{check.status.name:8} {check.name:12} {check.detail}", flush=True)
    verdict = max(check.status for check in checks)
    if options.json:
        report = {
            "status": verdict.name,
            "exit_status": int(verdict),
            "versions": found,
            "checks": [{**vars(check), "status": check.status.name} for check in checks],
        }
        print(json.dumps(report, indent=1))
    else:
        print(f"\n{VERDICTS[verdict]}")
    return int(verdict)


if __name__ == "__main__":
    sys.exit(main())
