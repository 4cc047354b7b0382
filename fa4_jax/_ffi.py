# SPDX-License-Identifier: Apache-2.0
"""Find, verify, load and register the kernel library, once and only when needed.

The library is checked before it is loaded, because a truncated one kills Python with SIGBUS, and
before it is registered, because XLA refuses a handler built with newer FFI headers than its own
only when a backend starts, and then the whole backend fails.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import pathlib
import re
import threading
from collections.abc import Callable

import fa4_jax
from fa4_jax._variants import TARGET_VERSION, Kernel, target_name

# Which library registered our targets. Kept on `jax.ffi`, because that registry is the process's.
_OWNER = "_fa4_jax_library"

_lock = threading.Lock()
_library: ctypes.CDLL | None = None


class LibraryError(ImportError):
    """The kernel library is missing, damaged, or doesn't fit this JAX or this package."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the build recorded about the library beside it."""

    size: int
    sha256: str
    ffi_api_version: tuple[int, int]
    target_version: int
    cuda_version: str
    dsl_version: str
    arches: tuple[str, ...]
    kernels: tuple[str, ...]


def library_path() -> pathlib.Path:
    """Where the kernel library is, or belongs if it isn't there."""
    # An editable install keeps what was built in another folder of the package's path.
    candidates = [pathlib.Path(folder) / "lib" / "libfa4_jax.so" for folder in fa4_jax.__path__]
    return next((path for path in candidates if path.is_file()), candidates[0]).resolve()


def manifest() -> Manifest:
    """What the build recorded about the library.

    Raises:
      LibraryError: if the manifest is missing or unreadable.
    """
    path = library_path().with_name("manifest.json")
    try:
        facts = json.loads(path.read_text())
        facts = {key: tuple(v) if isinstance(v, list) else v for key, v in facts.items()}
        return Manifest(**facts)
    except FileNotFoundError:
        raise _error(
            "kernel library", f"no {path}", "a built library", "install the package"
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _error(
            "manifest.json", f"{type(error).__name__}: {error}", "the build's own"
        ) from error


def kernel_names() -> tuple[str, ...]:
    """Names (`Variant.name`) of the rows this build holds.

    Raises:
      LibraryError: if the manifest is missing or unreadable.
    """
    return manifest().kernels


def verify() -> Manifest:
    """Check the library's size, hash and versions without loading it.

    Raises:
      LibraryError: says what differs and what to do.
    """
    facts = manifest()
    path = library_path()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _error(
            "kernel library", f"{type(error).__name__}: {error}", "a built library"
        ) from None
    if len(content) != facts.size:
        raise _error("kernel library", f"{len(content)} bytes", f"{facts.size} bytes")
    digest = hashlib.sha256(content).hexdigest()
    if digest != facts.sha256:
        raise _error("kernel library", f"sha256 {digest}", f"sha256 {facts.sha256}")
    if facts.target_version != TARGET_VERSION:
        raise _error(
            "kernel library", f"targets of version {facts.target_version}", f"{TARGET_VERSION}"
        )
    major, minor = facts.ffi_api_version
    jax_major, jax_minor = jax_ffi_version()
    if major != jax_major or minor > jax_minor:
        raise _error(
            "kernel library",
            f"XLA FFI {major}.{minor}",
            f"{jax_major}.{jax_minor} or older, this jaxlib's",
            "update jaxlib, or reinstall fa4-jax in this environment",
        )
    return facts


def jax_ffi_version() -> tuple[int, int]:
    """(major, minor) of the XLA FFI that the installed jaxlib implements."""
    import jax.ffi

    header = pathlib.Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    try:
        text = header.read_text()
    except OSError as error:
        raise _error("jaxlib", f"{type(error).__name__}: {error}", "its FFI headers") from None
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    if found[0] is None or found[1] is None:
        raise _error("jaxlib", f"no version in {header}", "XLA_FFI_API_MAJOR and _MINOR")
    return int(found[0].group(1)), int(found[1].group(1))


def register() -> None:
    """Load the library and register its targets with XLA, once per process.

    Raises:
      LibraryError: if the library can't be used. Nothing is registered then, and a later call looks
        again.
    """
    global _library
    if _library is not None:
        return
    with _lock:
        if _library is None:
            _library = _register()


def handler_entries() -> int:
    """How often XLA has entered the execute handler, which replaying a command buffer doesn't."""
    return _counter("fa4_jax_handler_entries")()


def module_loads(device: int) -> int:
    """How many kernels have been loaded on the CUDA device of this ordinal."""
    return _counter("fa4_jax_module_loads")(ctypes.c_int32(device))


def _register() -> ctypes.CDLL:
    import jax.ffi

    path = str(library_path())
    owner = getattr(jax.ffi, _OWNER, None)
    if owner is not None and owner[0] != path:
        # XLA would find two handlers of one name and refuse to start any backend.
        raise _error(
            "kernel library", f"a second copy, {path}", f"only {owner[0]}", "restart Python"
        )
    if owner is not None:  # this module was reloaded
        return owner[1]
    verify()
    try:
        library = ctypes.CDLL(path)
        handlers = {
            stage: jax.ffi.pycapsule(getattr(library, f"fa4_jax_{stage}"))
            for stage in ("execute", "initialize")
        }
    except (OSError, AttributeError) as error:
        raise _error("kernel library", str(error), "a library that loads") from error
    for kernel in Kernel:
        jax.ffi.register_ffi_target(target_name(kernel), handlers, platform="CUDA")
    setattr(jax.ffi, _OWNER, (path, library))
    return library


def _counter(name: str) -> Callable[..., int]:
    register()
    assert _library is not None
    function = getattr(_library, name)
    function.restype = ctypes.c_int64
    return function


def _error(
    what: str, got: str, expected: str, do: str = "reinstall with `pip install --force-reinstall`"
) -> LibraryError:
    return LibraryError(f"fa4_jax: {what}: got {got}, expected {expected}; {do}")
