# SPDX-License-Identifier: Apache-2.0
"""Faults of the driver, at every call that the exported kernels make: what JAX gets, and the retry.

`test_ffi` fails the C++ library's own calls; here the exported objects are the real ones. They
build tensor maps themselves, without a driver call, so there is no encode step to fail.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest
from emulator.device import Device, DriverCall, device

XLA_ERRORS = (jax.errors.JaxRuntimeError, ValueError)
LOADING = (
    DriverCall.load_data,
    DriverCall.get_kernel,
    DriverCall.kernel_get_attribute,
    DriverCall.device_get_attribute,
    DriverCall.kernel_set_attribute,
)
ERRORS = {
    2: "RESOURCE_EXHAUSTED",
    35: "FAILED_PRECONDITION.*update the NVIDIA driver",
    100: "FAILED_PRECONDITION",
    200: "FAILED_PRECONDITION",
    209: "FAILED_PRECONDITION",
    719: "INTERNAL",
    999: "INTERNAL",
}
ROW = "fa4_backward_postprocess_sm90a_bf16_d64"

by_error = pytest.mark.parametrize("error, status", ERRORS.items())
by_call = pytest.mark.parametrize("call", LOADING, ids=lambda call: call.name)


@pytest.fixture
def where() -> Iterator[Device]:
    """The device, as in a new process, and healed afterwards."""
    device().unload()
    yield device()
    for call in DriverCall:
        device().fail(call, 0)


def call_row(where: Device) -> np.ndarray:
    """One launch; its right result is 2 everywhere."""
    dq_accum = np.full((1, 1, 128, 64), 4, np.float32)
    scalars = {"softmax_scale": 0.5}
    (dq,) = where.run(where.rows[ROW].variant, (dq_accum,), scalars, free={"T": 5})
    return dq


def assert_works(where: Device) -> None:
    assert (call_row(where).astype(np.float32) == 2).all()


@by_call
@by_error
def test_a_failed_load_is_an_error_and_the_next_call_retries(
    where: Device, call: DriverCall, error: int, status: str
) -> None:
    where.fail(call, error)
    launches = where.count(DriverCall.launch)
    for _ in range(2):
        with pytest.raises(XLA_ERRORS, match=status) as raised:
            call_row(where)
        assert f"loading {ROW}" in str(raised.value)
        assert f"CUDA error {error} " in str(raised.value)
    assert where.count(DriverCall.launch) == launches
    where.fail(call, 0)
    assert_works(where)


@by_error
def test_a_failed_launch_is_an_error_and_the_next_call_works(
    where: Device, error: int, status: str
) -> None:
    assert_works(where)
    loads = where.count(DriverCall.load_data)
    where.fail(DriverCall.launch, error)
    with pytest.raises(XLA_ERRORS, match=status) as raised:
        call_row(where)
    assert f"launching {ROW}" in str(raised.value)
    where.fail(DriverCall.launch, 0)
    assert_works(where)
    assert where.count(DriverCall.load_data) == loads


@by_call
def test_a_loaded_kernel_asks_the_driver_no_more(where: Device, call: DriverCall) -> None:
    assert_works(where)
    count = where.count(call)
    where.fail(call, 999)
    assert_works(where)
    assert where.count(call) == count


def test_another_kernel_is_not_affected(where: Device) -> None:
    assert_works(where)
    where.fail(DriverCall.get_kernel, 999)
    other = where.rows[ROW.replace("bf16", "f16")].variant
    dq_accum = np.zeros((1, 1, 128, 64), np.float32)
    with pytest.raises(XLA_ERRORS, match="loading fa4_backward_postprocess_sm90a_f16_d64"):
        where.run(other, (dq_accum,), {"softmax_scale": 1.0}, free={"T": 1})
    assert_works(where)
