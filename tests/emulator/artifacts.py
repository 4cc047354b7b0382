# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels for the emulator: object, PTX and cubin of each row, built once per content,
by `pip install .` from this checkout or by the first test that wants them.

A row's files live in a folder named by `kernels.build.row_key`, the hash of everything that they
depend on, so a folder never goes stale and several checkouts and runs can share the cache:
`FA4_JAX_EMULATOR_CACHE`, by default `build/emulator` in the checkout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator

from fa4_jax._variants import VARIANTS, Variant
from kernels import build

ROOT = pathlib.Path(__file__).resolve().parents[2]
_SUFFIXES = ("o", "h", "ptx", "cubin", "json")
# Where an installation from this checkout has left the same files.
_INSTALLED = "build/*/kernels"


@dataclasses.dataclass(frozen=True)
class Artifact:
    """The files of one row."""

    variant: Variant
    folder: pathlib.Path

    def path(self, suffix: str) -> pathlib.Path:
        """One of `o`, `h`, `ptx`, `cubin`, `json`."""
        return self.folder / f"{self.variant.name}.{suffix}"

    @functools.cached_property
    def report(self) -> dict:
        """What the compiler said: `kernels.build.Report` as a dict."""
        return json.loads(self.path("json").read_text())

    @property
    def ptx(self) -> str:
        """The PTX text whose cubin is in the object."""
        return self.path("ptx").read_text()


def cache_folder() -> pathlib.Path:
    """Where compiled kernels are kept."""
    return pathlib.Path(os.environ.get("FA4_JAX_EMULATOR_CACHE") or ROOT / "build" / "emulator")


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """One process at a time: several test workers may want the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def artifacts(variants: Iterable[Variant] = VARIANTS) -> dict[str, Artifact]:
    """The rows' files by row name, compiled now if they have to be."""
    cache = cache_folder()
    found = {v.name: Artifact(v, cache / build.row_key(v)[:24]) for v in variants}
    if all(_complete(artifact) for artifact in found.values()):
        return found
    with locked(cache):
        missing = [artifact for artifact in found.values() if not _complete(artifact)]
        missing = [artifact for artifact in missing if not _adopt(artifact, cache)]
        if missing:
            _build(missing, cache)
    return found


def _complete(artifact: Artifact) -> bool:
    return artifact.folder.is_dir()


def _adopt(artifact: Artifact, cache: pathlib.Path) -> bool:
    """Take the files of an installation if they are of the same row and sources."""
    key = build.row_key(artifact.variant)
    for installed in sorted(ROOT.glob(_INSTALLED)):
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            folder = pathlib.Path(scratch) / artifact.folder.name
            folder.mkdir()
            if build.adopt(artifact.variant, key, installed, folder, keep=True):
                folder.rename(artifact.folder)
                return True
    return False


def _build(missing: list[Artifact], cache: pathlib.Path) -> None:
    """Compile in a process of its own: the compiler is large, and wants its own environment."""
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        out = pathlib.Path(scratch)
        command = [sys.executable, "-m", "kernels.build", "--keep", "--out", str(out)]
        command += [item for a in missing for item in ("--only", a.variant.name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"kernels.build failed:\n{done.stderr[-4000:]}")
        for artifact in missing:
            # A complete folder appears at once, or not at all.
            folder = out / artifact.folder.name
            folder.mkdir()
            for suffix in _SUFFIXES:
                shutil.move(out / f"{artifact.variant.name}.{suffix}", folder)
            folder.rename(artifact.folder)
