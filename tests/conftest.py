# SPDX-License-Identifier: Apache-2.0
"""What every test shares: which tests run here, and a process that hasn't warned yet."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from fa4_jax import _ffi, _reference, _sharding

# Before the first use of a device. A test's programs run once or twice, so LLVM's optimising them
# costs more than it saves. Not where there is a GPU: what runs there is what is tested.
if not pathlib.Path("/dev/nvidiactl").exists():
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
# Eight, so that meshes have something to split.
jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config: pytest.Config) -> None:
    # On a CPU the primitives run the reference, with a warning; tests of that warning catch it.
    config.addinivalue_line("filterwarnings", "ignore::fa4_jax.FallbackWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    from gpu import skip_reason

    if reason := skip_reason():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[None]:
    """Blocks of 16 in the reference, so that small shapes have several, whole and ragged."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(_reference, "BLOCK", 16)
        jax.clear_caches()
        yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def worst(request: pytest.FixtureRequest) -> Iterator[dict[str, tuple[float, str]]]:
    """The largest error over what is allowed, by result: printed at the end, so that a log shows
    it. `gpu.record` fills it."""
    ratios: dict[str, tuple[float, str]] = {}
    yield ratios
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter:
        reporter.write_line("")
        for name, (ratio, case) in sorted(ratios.items()):
            reporter.write_line(f"{name:8} worst error / allowed {ratio:.2f} at {case}")


@pytest.fixture
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has given none of our warnings and lowered nothing."""
    monkeypatch.setattr(_reference, "_warned", set())
    monkeypatch.setattr(_sharding, "_warned", set())
    jax.clear_caches()


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowering for CUDA behaves as if the library were there; nothing can run."""
    monkeypatch.setattr(_ffi, "register", lambda: None)


@pytest.fixture
def emulated() -> Callable[[str], Callable[..., list[np.ndarray]]]:
    """`emulated("fa4_forward_sm90a_bf16_d128")(operands, scalars)` gives the results of a compiled
    row.

    The row runs in the CPU emulator, through the project's own library; keyword arguments are those
    of
    `emulator.device.Device.run`.
    """
    from emulator.device import device

    def row(name: str) -> Callable[..., list[np.ndarray]]:
        return functools.partial(device().run, device().rows[name].variant)

    return row
