# SPDX-License-Identifier: Apache-2.0
"""A device without hardware: the project's own library on a fake CUDA runtime, launches emulated.

The library is linked from the shipped C++ (`ffi/*.cc`), the generated registry and the exported
kernel objects; only the CUDA runtime (`tests/fake/`) is not the real one. JAX calls its FFI handler
on the CPU platform. So table, registry, checks, exported wrapper, tensor maps, kernel parameters
and PTX are what runs. A launch finds its PTX by the sha256 of the cubin inside the object, never by
name.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import enum
import fnmatch
import functools
import hashlib
import math
import os
import pathlib
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fa4_jax._variants import ROW_MULTIPLE, VARIANTS, Variant, round_up
from kernels import signatures, toolchain

from . import artifacts, ptx, roles
from .artifacts import ROOT, Artifact
from .launch import Configuration, Launch, Options, Program
from .memory import GlobalMemory
from .schedule import Schedule

TARGET = "fa4_jax_emulated"
# What the real runtime returns when a kernel goes wrong.
_LAUNCH_FAILURE = 719
_FAT_BINARY = 0xBA55ED50


class DriverCall(enum.IntEnum):
    """Call sites of the exported objects, in the order of tests/fake/fake_driver.cc."""

    load_data = 0
    get_kernel = 1
    kernel_get_attribute = 2
    device_get_attribute = 3
    get_device = 4
    func_set_attribute = 5
    kernel_set_attribute = 6
    launch = 7


@dataclasses.dataclass(frozen=True)
class LaunchRecord:
    """What one emulated launch did."""

    name: str
    configuration: Configuration
    counts: Mapping[str, collections.Counter[str]]
    """By role."""
    ctas: Sequence[collections.Counter[str]]
    seconds: float


_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)
_BUFFER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int)


def build_library(rows: Mapping[str, Artifact]) -> pathlib.Path:
    """libfa4_jax.so of these rows on the fake runtime, linked once per content."""
    fake = [ROOT / "tests" / "fake" / name for name in ("fake_cuda.cc", "fake_driver.cc")]
    sources = [*sorted((ROOT / "ffi").glob("*.cc")), *fake]
    headers = sorted((ROOT / "ffi").glob("*.h"))
    include = toolchain.locate("jaxlib", "include/xla/ffi/api/ffi.h").parents[3]
    registry = signatures.registry_source([artifact.variant for artifact in rows.values()])
    digest = hashlib.sha256(f"{include}\n{registry}".encode())
    for path in [*sources, *headers]:
        digest.update(path.read_bytes())
    for artifact in rows.values():
        digest.update(artifact.path("o").read_bytes())
    folder = artifacts.cache_folder() / f"library-{digest.hexdigest()[:24]}"
    library = folder / "libfa4_jax.so"
    with artifacts.locked(folder):
        if not library.exists():
            generated = folder / "registry.generated.cc"
            generated.write_text(registry)
            partial = folder / "partial.so"
            command = [
                "g++",
                "-std=c++17",
                "-O1",
                "-shared",
                "-fPIC",
                "-DNDEBUG",
                "-fno-exceptions",
            ]
            command += ["-isystem", str(include), "-I", str(ROOT / "ffi"), *map(str, sources)]
            command += [str(generated), *(str(a.path("o")) for a in rows.values())]
            command += [f"-Wl,--version-script={ROOT / 'ffi' / 'exports.lds'}", "-Wl,-z,defs"]
            command += ["-pthread", "-fuse-ld=bfd", "-o", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"linking the emulated library failed:\n{done.stderr[-4000:]}")
            partial.rename(library)
    return library


class Device:
    """The emulated device; one per process (`device()`), because JAX keeps FFI targets for ever."""

    def __init__(self, rows: Mapping[str, Artifact]) -> None:
        self.rows = rows
        self.by_cubin = {artifact.report["cubin_sha256"]: artifact for artifact in rows.values()}
        self.library = ctypes.CDLL(str(build_library(rows)))
        self.memory = GlobalMemory()
        self.options = Options()
        self.launches: list[LaunchRecord] = []
        self.error: Exception | None = None
        self.programs: dict[str, Program] = {}
        self._digests: dict[int, str] = {}
        self._num_sms = 0
        self._buffer_names: Sequence[str] = ()
        # ctypes keeps no reference to callbacks that C holds.
        self._callbacks = (_LAUNCH(self._on_launch), _BUFFER(self._on_buffer))
        self.library.fa4_jax_fake_driver_on_launch(self._callbacks[0])
        self.library.fa4_jax_fake_driver_on_buffer(self._callbacks[1])
        handler = jax.ffi.pycapsule(self.library.fa4_jax_emulated_execute)
        jax.ffi.register_ffi_target(TARGET, handler, platform="cpu")

    # Calls ----------------------------------------------------------------------------------------

    def run(
        self,
        variant: Variant,
        operands: Sequence[Any],
        scalars: Mapping[str, float],
        *,
        schedule: str = "eager",
        check: bool = False,
        free: Mapping[str, int] | None = None,
        num_sms: int = 2,
    ) -> list[np.ndarray]:
        """Call a row through the FFI; returns its results. Raises what the emulated kernel raised.

        `schedule`, `check`: see `launch.Options`; a deterministic row has ordered additions.
        `free`: sizes that the operands don't tell, such as T of backward_postprocess. `num_sms`:
        multiprocessors of the device, each with one CTA at a time; few, so that a persistent
        kernel's CTAs compute several tiles.
        """
        signature = variant.signature
        sizes = dict(variant.static_dims)
        for buffer, operand in zip(signature.operands, operands, strict=True):
            sizes.update(zip(buffer.dims, np.shape(operand), strict=True))
        sizes.setdefault("R", round_up(sizes["T"], ROW_MULTIPLE) if "T" in sizes else 0)
        sizes.update(free or {})
        results = [
            jax.ShapeDtypeStruct(
                tuple(sizes[letter] for letter in buffer.dims),
                jax.numpy.dtype(signatures.buffer_dtype(variant, buffer).numpy_name),
            )
            for buffer in signature.results
        ]
        kinds = {"f32": np.float32, "i32": np.int32}
        attributes = {s.name: kinds[s.kind](scalars[s.name]) for s in signature.attributes}
        self._buffer_names = [b.name for b in (*signature.operands, *signature.results)]
        ordered = "deterministic" in variant.features
        self.options = Options(Schedule.parse(schedule), check, num_sms, ordered)
        self.error = None
        self.select(variant)
        if num_sms != self._num_sms:
            self.library.fa4_jax_fake_multiprocessors(num_sms)
            self.unload()  # the library asks when it loads a module
            self._num_sms = num_sms
        call = jax.ffi.ffi_call(TARGET, results, input_output_aliases=signature.aliases)
        try:
            got = call(*map(jax.numpy.asarray, operands), kernel=variant.key, **attributes)
            return [np.asarray(result) for result in got]
        except Exception as raised:
            if self.error is None:
                raise
            error, self.error = self.error, None
            raise error from raised
        finally:
            self._buffer_names, self.options = (), Options()

    def select(self, variant: Variant) -> None:
        """Be a device that runs the row. The library remembers capabilities by device ordinal, so
        each architecture has its own."""
        major, minor = variant.arch.compute_capability
        self.library.fa4_jax_fake_compute_capability(10 * major + minor)
        self.library.fa4_jax_fake_device(major)

    def program(self, artifact: Artifact) -> Program:
        """The translated PTX of a row."""
        digest = artifact.report["cubin_sha256"]
        if digest not in self.programs:
            (kernel,) = ptx.parse(artifact.ptx).values()
            self.programs[digest] = Program(kernel, artifact.variant.name)
        return self.programs[digest]

    # Faults ---------------------------------------------------------------------------------------

    def fail(self, call: DriverCall, error: int) -> None:
        """From now on the call returns `error`; 0 heals it."""
        self.library.fa4_jax_fake_driver_fail(int(call), error)

    def count(self, call: DriverCall) -> int:
        """How often the call was made."""
        return self.library.fa4_jax_fake_driver_count(int(call))

    def unload(self) -> None:
        """Forget loaded modules, as a new process would."""
        self.library.fa4_jax_fake_unload()

    # Callbacks ------------------------------------------------------------------------------------

    def _on_buffer(self, data: int, size: int, index: int) -> None:
        if size:
            names = self._buffer_names
            name = names[index] if index < len(names) else f"buffer {index}"
            self.memory.register(data, size, name)
        else:
            self.memory.unregister(data)

    def _on_launch(
        self, image: int, name: bytes, dims: Any, shared_bytes: int, arguments: Any
    ) -> int:
        try:
            self._launch(image, name.decode(), list(dims[:9]), shared_bytes, arguments)
        except Exception as error:  # can't cross C: `run` raises it again
            self.error = error
            return _LAUNCH_FAILURE
        return 0

    def _launch(
        self, image: int, name: str, dims: list[int], shared_bytes: int, arguments: Any
    ) -> None:
        digest = self._digest(image)
        if digest not in self.by_cubin:
            raise KeyError(f"no PTX was kept for the cubin of {name}, sha256 {digest}")
        artifact = self.by_cubin[digest]
        program = self.program(artifact)
        if program.kernel.name != name:
            raise KeyError(
                f"the PTX of {artifact.variant.name} defines {program.kernel.name}, not {name}"
            )
        raw = bytearray(program.kernel.parameter_bytes)
        for index, parameter in enumerate(program.kernel.parameters):
            raw[parameter.offset : parameter.offset + parameter.size] = ctypes.string_at(
                arguments[index], parameter.size
            )
        configuration = Configuration(
            (dims[0], dims[1], dims[2]), (dims[3], dims[4], dims[5]), (dims[6], dims[7], dims[8]),
            shared_bytes,
        )  # fmt: skip
        launch = Launch(
            program,
            configuration,
            bytes(raw),
            self.memory,
            self.options,
            registers_per_thread=launch_registers(artifact, math.prod(configuration.block)),
            roles=roles.of(artifact.variant),
        )
        start = time.perf_counter()
        launch.run()
        seconds = time.perf_counter() - start
        self.launches.append(
            LaunchRecord(program.name, configuration, launch.counts, launch.ctas, seconds)
        )

    def _digest(self, image: int) -> str:
        """The sha256 of the cubin at an address."""
        if image not in self._digests:
            self._digests[image] = hashlib.sha256(_cubin_at(image)).hexdigest()
        return self._digests[image]


def _cubin_at(address: int) -> bytes:
    """The cubin in the fat binary at an address: a header (magic, version, header bytes, payload
    bytes), then entries, one of which is the ELF file that the compiler was given back."""
    magic, _, header_bytes, payload_bytes = struct.unpack("<IHHQ", ctypes.string_at(address, 16))
    if magic != _FAT_BINARY:
        raise ValueError(f"no fat binary at {address:#x}: it starts with {magic:#x}")
    content = ctypes.string_at(address, header_bytes + payload_bytes)
    start = content.index(b"\x7fELF")
    header = content[start : start + 64]
    # An ELF file ends with the tables that its header locates.
    program_offset, section_offset = struct.unpack_from("<QQ", header, 32)
    program_size, programs, section_size, sections = struct.unpack_from("<4H", header, 54)
    size = max(program_offset + program_size * programs, section_offset + section_size * sections)
    return content[start : start + size]


def launch_registers(artifact: Artifact, threads: int) -> int:
    """Registers per thread that the CTA starts with: what ptxas used, in the allocation unit of
    8."""
    used = int(artifact.report["registers"])
    return min(-(-used // 8) * 8, 65536 // threads // 8 * 8)


@functools.cache
def device() -> Device:
    """The process's emulated device, with every row of the table; or, where not all are wanted,
    those with a name that a pattern of FA4_JAX_EMULATOR_ROWS (separated by commas) matches."""
    patterns = os.environ.get("FA4_JAX_EMULATOR_ROWS", "*").split(",")
    wanted = [v for v in VARIANTS if any(fnmatch.fnmatchcase(v.name, p) for p in patterns)]
    return Device(artifacts.artifacts(wanted))
