# SPDX-License-Identifier: Apache-2.0
"""Check an installation: `python -m fa4_jax.doctor [--json]`.

Prints versions, GPUs, the kernel library and which kernels serve this machine's GPUs. Runs a small
forward and backward against float64 and, on a GPU with kernels, two for each dtype and head dim.
Needs no GPU and no library to run.

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
import math
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fa4_jax._self_test import Case

PREFIX = "FA4_JAX_"


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
    results: Sequence[Mapping[str, Any]] = ()
    """Of tests: of each result its case, its error and what is allowed."""


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
    from fa4_jax._untyped import jax_

    local = jax_.local_devices()
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
    from fa4_jax._variants import VARIANTS

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
        lacks = filter(None, map(unserved, here["compute_capability"].split(", ")))
        if why := "; ".join(lacks):
            detail = f"{text}; {why}. All calls run, on the reference, which is exact and slower"
            return Check("kernels", Status.limited, detail)
    return Check("kernels", Status.ok, text)


def unserved(capability: str) -> str:
    """Why GPUs of this compute capability run no kernel of ours, or an empty string."""
    from fa4_jax._dispatch import capability_of
    from fa4_jax._variants import Arch, served_arches

    version = capability_of(capability)
    if version in {arch.compute_capability for arch in served_arches()}:
        return ""
    built = next((arch for arch in Arch if arch.compute_capability == version), None)
    family = next((arch for arch in Arch if arch.compute_capability[0] == version[0]), None)
    if built:
        why = f"{built.cuda_target} has only some of the kernels that a call may need, so far"
    elif family:
        why = f"a binary for {family.cuda_target} runs on no other GPU of its family"
    elif version[0] == 11:
        why = "it would need kernels of its own"
    elif version[0] == 12:
        why = "it has neither of the instructions that they are made of, wgmma and tcgen05"
    else:
        why = "they begin with Hopper"
    return f"this machine's sm {capability} runs none of them: {why}"


def check_self_test() -> Check:
    """One forward and backward, by the kernels if they run here, else by the reference."""
    from fa4_jax import _self_test

    implementation = "reference" if kernel_reasons() else "fa4"
    return tested("self-test", implementation, "bfloat16", (64, 64), _self_test.cases()[:1])


def check_gpu_tests() -> Iterator[Check]:
    """Small cases of every dtype and head dim that this machine's GPUs have kernels for."""
    from fa4_jax import _self_test
    from fa4_jax._dispatch import head_dims_text

    if reasons := kernel_reasons():
        yield Check("gpu-tests", Status.limited, f"not run: {'; '.join(reasons)}")
        return
    for dtype, head_dims in rows_here():
        try:
            yield tested("gpu-tests", "fa4", dtype, head_dims, _self_test.cases())
        except Exception as error:
            text = f"{dtype}, head_dim {head_dims_text(head_dims)}: {one_line(error)}"
            yield Check("gpu-tests", Status.broken, text)


def kernel_reasons() -> tuple[str, ...]:
    """Why no kernel runs in this process; empty if they do."""
    from fa4_jax import _dispatch

    return _dispatch.program_reasons(_dispatch.default_platform(), require_kernel=False)


def rows_here() -> list[tuple[str, tuple[int, int]]]:
    """(dtype, head dims) of the kernels for this machine's GPUs."""
    from fa4_jax import _dispatch
    from fa4_jax._variants import VARIANTS, Kernel

    targets = _dispatch.device_targets()
    rows = (v for v in VARIANTS if v.arch.cuda_target in targets and v.kernel is Kernel.backward)
    return sorted({(v.dtype.numpy_name, (v.head_dim, v.head_dim_v)) for v in rows})


def tested(
    name: str,
    implementation: str,
    dtype: str,
    head_dims: tuple[int, int],
    cases: Sequence[Case],
) -> Check:
    """The results of these cases as one finding."""
    from fa4_jax import _self_test
    from fa4_jax._dispatch import head_dims_text

    results = [
        result
        for case in cases
        for result in _self_test.run(case, dtype, head_dims, implementation)
    ]
    # NaN is worse than any number.
    worst = max(results, key=lambda x: math.inf if math.isnan(x.ratio) else x.ratio)
    right = all(result.ratio <= 1 for result in results)
    return Check(
        name,
        Status.ok if right else Status.broken,
        f"{implementation}, {dtype}, head_dim {head_dims_text(head_dims)}: worst error / allowed "
        f"{worst.ratio:.2f}, {worst.name} in case {worst.case!r}",
        [dataclasses.asdict(result) for result in results],
    )


def check_environment() -> Check:
    """Variables that may change what this package does."""
    found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if PREFIX in name]
    return Check("environment", Status.ok, ", ".join(found) or f"no {PREFIX}* variable is set")


CHECKS: tuple[Callable[[], Check | Iterator[Check]], ...] = (
    check_device,
    check_library,
    check_kernels,
    check_environment,
    check_self_test,
    check_gpu_tests,
)


def examine() -> Iterator[Check]:
    """All checks; one that raises is a finding, too."""
    for check in CHECKS:
        try:
            found = check()
            yield from (found,) if isinstance(found, Check) else found
        except Exception as error:
            name = check.__name__.removeprefix("check_").replace("_", "-")
            yield Check(name, Status.broken, one_line(error))


def one_line(error: Exception) -> str:
    """Its type and the first line of what it says."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"


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
    checks: list[Check] = []
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
