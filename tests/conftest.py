# SPDX-License-Identifier: Apache-2.0
"""What every test shares: which tests run here, and a process that hasn't warned yet."""

from __future__ import annotations

import jax
import pytest

from fa4_jax import _ffi, _reference

# Before the first use of a device: two, so that meshes have something to do.
jax.config.update("jax_num_cpu_devices", 2)


def pytest_configure(config: pytest.Config) -> None:
    # On a CPU the primitives run the reference, with a warning; tests of that warning catch it.
    config.addinivalue_line("filterwarnings", "ignore::fa4_jax.FallbackWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items) or _has_cuda():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def _has_cuda() -> bool:
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


@pytest.fixture
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has given no fallback warning and lowered nothing."""
    monkeypatch.setattr(_reference, "_warned", set())
    jax.clear_caches()


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowering for CUDA behaves as if the library were there; nothing can run."""
    monkeypatch.setattr(_ffi, "register", lambda: None)
