# SPDX-License-Identifier: Apache-2.0
"""The FFI library: verification before loading, checks of every call, loading, launching.

The C++ runs on the CPU platform, against a fake CUDA runtime (`fake_library`). Long because every
check of a call has its malformed call here, 67 of them, beside the error that it gets.
"""

import concurrent.futures
import ctypes
import functools
import json
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import threading

import fake_library
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fa4_jax import _ffi
from fa4_jax._variants import (
    BLOCK,
    MAX_DIMENSION,
    VARIANTS,
    Buffer,
    DType,
    Feature,
    Kernel,
    Variant,
    round_up,
)
from kernels import manifest as build_manifest

SET_DEVICE, GET_ATTRIBUTE, IS_CAPTURING, INIT, LOAD_TO_DEVICE, LAUNCH, MEMSET = range(7)
OFFSET_POINTER, NULL_POINTER, RESULT_IS_OPERAND, SET_LAST_DIM = range(1, 5)
OUT_OF_MEMORY, INSUFFICIENT_DRIVER, NO_KERNEL_IMAGE = 2, 35, 209
# Which of the two a status becomes is up to JAX and the platform.
XLA_ERRORS = (jax.errors.JaxRuntimeError, ValueError)
SIZES = {"B": 2, "T": 100, "S": 70, "N": 4, "K": 2, "R": round_up(100, 128), "Z": 2}
SIZES |= {"M": -(-100 // BLOCK), "J": -(-70 // BLOCK)}
SCALARS = {
    "softmax_scale": np.float32(0.5),
    "softcap": np.float32(30),
    "band_lower": np.int32(-3),
    "band_upper": np.int32(5),
}


class Fake:
    """The library linked with a fake CUDA runtime, registered for the CPU platform."""

    target = "fa4_jax_fake"

    def __init__(self, path: pathlib.Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.fa4_jax_handler_entries.restype = ctypes.c_int64
        self.library.fa4_jax_module_loads.restype = ctypes.c_int64
        self.library.fa4_jax_kernel_names.restype = ctypes.c_char_p
        # XLA's CPU platform has no initialize stage: the fake runs both.
        handler = jax.ffi.pycapsule(self.library.fa4_jax_fake_execute)
        jax.ffi.register_ffi_target(self.target, handler, platform="cpu")

    def reset(self) -> None:
        for call in range(7):
            self.library.fa4_jax_fake_fail(call, 0)
        self.library.fa4_jax_fake_capturing(0)
        self.library.fa4_jax_fake_compute_capability(90)
        self.library.fa4_jax_fake_on_launch(None)
        self.mutate(0, 0, 0)
        self.library.fa4_jax_fake_initialize_first(1)
        self.device(0)
        self.library.fa4_jax_fake_unload()

    def multiprocessors(self, number: int) -> None:
        """Of every device; the library asks when it loads a module."""
        self.library.fa4_jax_fake_multiprocessors(number)

    def device(self, ordinal: int) -> None:
        self.library.fa4_jax_fake_device(ordinal)

    def fail(self, call: int, error: int) -> None:
        self.library.fa4_jax_fake_fail(call, error)

    def count(self, call: int) -> int:
        return self.library.fa4_jax_fake_count(call)

    def loads(self, device: int) -> int:
        return self.library.fa4_jax_module_loads(device)

    def mutate(self, kind: int, index: int, value: int) -> None:
        self.library.fa4_jax_fake_mutate(kind, index, ctypes.c_int64(value))


@functools.cache
def shared_fake() -> Fake:
    return Fake(fake_library.build())


@pytest.fixture
def fake() -> Fake:
    shared_fake().reset()
    yield shared_fake()
    shared_fake().reset()


def variant_of(kernel: Kernel, features: tuple[Feature, ...] = (), head_dim: int = 64) -> Variant:
    wanted = (kernel, features, DType.bf16, head_dim)
    return next(v for v in VARIANTS if (v.kernel, v.features, v.dtype, v.head_dim) == wanted)


def shape(variant: Variant, buffer: Buffer, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple({**sizes, **variant.static_dims}[letter] for letter in buffer.dims)


def numpy_dtype(variant: Variant, buffer: Buffer):
    return jnp.dtype((buffer.dtype or variant.dtype).numpy_name)


class RawCall:
    """A raw ffi_call of one row, right unless a test changes something."""

    def __init__(self, variant: Variant, sizes: dict[str, int] = SIZES) -> None:
        signature = variant.signature
        self.operands = [
            np.zeros(shape(variant, b, sizes), numpy_dtype(variant, b)) for b in signature.operands
        ]
        self.results = [
            jax.ShapeDtypeStruct(shape(variant, b, sizes), numpy_dtype(variant, b))
            for b in signature.results
        ]
        self.aliases = signature.aliases
        self.attributes = {"kernel": variant.key}
        self.attributes |= {scalar.name: SCALARS[scalar.name] for scalar in signature.attributes}

    def operand(self, index: int, shape=None, dtype=None) -> None:
        old = self.operands[index]
        self.operands[index] = np.zeros(shape or old.shape, dtype or old.dtype)

    def result(self, index: int, shape=None, dtype=None) -> None:
        old = self.results[index]
        self.results[index] = jax.ShapeDtypeStruct(shape or old.shape, dtype or old.dtype)

    def __call__(self):
        call = jax.ffi.ffi_call(Fake.target, self.results, input_output_aliases=self.aliases)
        return jax.block_until_ready(call(*self.operands, **self.attributes))


# Loading and launching ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_launch_passes_what_the_exported_function_expects(fake, variant):
    """The stream, scalars and structs, read back as the exported C signature lays them out."""
    seen = []

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_int32)
    def on_launch(name, args, num_args):
        tensors = []
        for i, buffer in enumerate(variant.signature.buffers):
            extents = shape(variant, buffer, SIZES)
            is_static = [letter in variant.static_dims for letter in buffer.dims]
            n_sizes = is_static.count(False)
            rank = len(is_static)
            dynamic_strides = [axis for axis in range(rank) if not all(is_static[axis + 1 :])]
            fields = [("data", ctypes.c_void_p), ("sizes", ctypes.c_int32 * n_sizes)]
            fields += [("strides", ctypes.c_int64 * len(dynamic_strides))]
            struct = type("Tensor", (ctypes.Structure,), {"_fields_": fields})
            tensor = struct.from_address(args[1 + len(variant.signature.scalars) + i])
            strides = [int(np.prod(extents[axis + 1 :])) for axis in dynamic_strides]
            tensors.append(
                (list(tensor.sizes), [e for e, s in zip(extents, is_static, strict=True) if not s])
            )
            tensors.append((list(tensor.strides), strides))
            tensors.append((tensor.data % 16, 0))
        scalars = {}
        for i, scalar in enumerate(variant.signature.scalars, 1):
            kind = ctypes.c_float if scalar.kind == "f32" else ctypes.c_int32
            scalars[scalar.name] = kind.from_address(args[i]).value
        stream = ctypes.c_uint64.from_address(args[0]).value
        # After the buffers only the status that the exported function sets.
        assert num_args == 2 + len(variant.signature.scalars) + len(variant.signature.buffers)
        seen.append((name.decode(), tensors, scalars, stream))

    fake.library.fa4_jax_fake_on_launch(on_launch)
    fake.multiprocessors(132)
    major, minor = variant.arch.compute_capability
    fake.device(40 + major)  # a device is asked for its compute capability once
    fake.library.fa4_jax_fake_compute_capability(10 * major + minor)
    RawCall(variant)()
    ((name, tensors, scalars, stream),) = seen
    assert name == variant.name
    assert all(got == expected for got, expected in tensors), tensors
    supplied = {"num_sms": 132}
    expected = {s.name: {**SCALARS, **supplied}[s.name] for s in variant.signature.scalars}
    assert scalars == expected
    assert stream == 0x5717EA


def test_kernel_names_are_the_table(fake):
    names = fake.library.fa4_jax_kernel_names().decode().split()
    assert sorted(names) == sorted(variant.name for variant in VARIANTS)


def test_entries_are_counted(fake):
    call = jax.jit(RawCall(variant_of(Kernel.forward)))
    before = fake.library.fa4_jax_handler_entries()
    for _ in range(3):
        call()
    assert fake.library.fa4_jax_handler_entries() == before + 3


def test_first_calls_from_many_threads_load_once_per_device(fake):
    calls = [RawCall(variant_of(Kernel.forward)), RawCall(variant_of(Kernel.backward))]
    threads = 16
    for device in (0, 1):
        fake.device(device)
        loads = fake.loads(device)
        barrier = threading.Barrier(threads)

        def run(i, barrier=barrier):
            barrier.wait()
            calls[i % 2]()

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, range(threads)))
        assert fake.loads(device) == loads + 2  # one per kernel


def test_a_loaded_kernel_is_not_loaded_again(fake):
    call = RawCall(variant_of(Kernel.forward))
    call()
    calls = [fake.count(c) for c in (SET_DEVICE, GET_ATTRIBUTE, IS_CAPTURING, INIT)]
    for _ in range(5):
        call()
    assert [fake.count(c) for c in (SET_DEVICE, GET_ATTRIBUTE, IS_CAPTURING, INIT)] == calls


def test_execute_loads_what_initialize_did_not(fake):
    fake.library.fa4_jax_fake_initialize_first(0)
    loads = fake.loads(0)
    RawCall(variant_of(Kernel.forward))()
    assert fake.loads(0) == loads + 1


def test_nothing_is_loaded_while_the_stream_is_captured(fake):
    """After initialize a captured first call launches; without it, it is an error."""
    fake.library.fa4_jax_fake_capturing(1)
    call = RawCall(variant_of(Kernel.forward))
    fake.library.fa4_jax_fake_initialize_first(0)
    loads = fake.loads(0)
    with pytest.raises(XLA_ERRORS, match="FAILED_PRECONDITION.*while its stream is captured"):
        call()
    assert fake.loads(0) == loads
    fake.library.fa4_jax_fake_initialize_first(1)
    call()
    assert fake.loads(0) == loads + 1


def test_loading_leaves_the_callers_device_alone(fake):
    fake.device(5)
    RawCall(variant_of(Kernel.forward))()
    assert fake.library.fa4_jax_fake_current_device() == 0


@pytest.mark.parametrize(
    "step", [SET_DEVICE, INIT, LOAD_TO_DEVICE], ids=["set_device", "init", "load_to_device"]
)
@pytest.mark.parametrize(
    "error, status",
    [
        (OUT_OF_MEMORY, "RESOURCE_EXHAUSTED"),
        (INSUFFICIENT_DRIVER, "FAILED_PRECONDITION.*update the NVIDIA driver"),
        (NO_KERNEL_IMAGE, "FAILED_PRECONDITION"),
        (999, "INTERNAL"),
    ],
)
def test_failed_load_is_an_error_and_the_next_call_retries(fake, step, error, status):
    call = RawCall(variant_of(Kernel.forward))
    loads = fake.loads(0)
    fake.fail(step, error)
    for _ in range(2):
        with pytest.raises(XLA_ERRORS, match=status) as info:
            call()
        assert "loading fa4_forward_sm90a_bf16_d64 on device 0" in str(info.value)
        assert f"CUDA error {error} cudaErrorFake" in str(info.value)
    assert fake.loads(0) == loads
    fake.fail(step, 0)
    call()
    assert fake.loads(0) == loads + 1


def test_failed_launch_is_an_error(fake):
    fake.fail(LAUNCH, 719)
    with pytest.raises(XLA_ERRORS, match="launching fa4_forward.*CUDA error 719"):
        RawCall(variant_of(Kernel.forward))()


def test_a_result_that_starts_from_zero_is_cleared_before_the_launch(fake):
    row = variant_of(Kernel.forward, INTERVAL)
    (cleared,) = (i for i, buffer in enumerate(row.signature.results) if buffer.zeroed)
    memsets = fake.count(MEMSET)
    for _ in range(3):  # XLA hands out what an earlier call left
        results = RawCall(row)()
        assert (np.asarray(results[cleared]) == 0).all()
    assert fake.count(MEMSET) == memsets + 3
    RawCall(variant_of(Kernel.forward))()
    assert fake.count(MEMSET) == memsets + 3


def test_failed_memset_is_an_error_and_nothing_is_launched(fake):
    launches = fake.count(LAUNCH)
    fake.fail(MEMSET, 719)
    with pytest.raises(XLA_ERRORS, match="launching fa4_forward.*CUDA error 719"):
        RawCall(variant_of(Kernel.forward, INTERVAL))()
    assert fake.count(LAUNCH) == launches


def test_another_architecture_is_unimplemented(fake):
    fake.device(40)  # never asked for its compute capability before
    fake.library.fa4_jax_fake_compute_capability(75)
    with pytest.raises(XLA_ERRORS, match=r"got compute capability 7\.5, expected 9\.0, 10\.0"):
        RawCall(variant_of(Kernel.forward))()


def test_no_driver_is_an_error(fake):
    fake.device(41)
    fake.fail(GET_ATTRIBUTE, INSUFFICIENT_DRIVER)
    with pytest.raises(XLA_ERRORS, match="update the NVIDIA driver"):
        RawCall(variant_of(Kernel.forward))()


@pytest.mark.parametrize("ordinal", [-1, 64])
def test_device_out_of_range_is_an_error(fake, ordinal):
    fake.device(ordinal)
    with pytest.raises(XLA_ERRORS, match=f"got device ordinal {ordinal}"):
        RawCall(variant_of(Kernel.forward))()


# Malformed calls ----------------------------------------------------------------------------------

MALFORMED = []


def malformed(kernel: Kernel, message: str, features: tuple[Feature, ...] = ()):
    """Register a case: a function that spoils a RawCall, or the fake, and the error it gets."""

    def register(spoil):
        variant = variant_of(kernel, features)
        case = pytest.param(variant, message, spoil, id=spoil.__name__.strip("_"))
        MALFORMED.append(case)
        return spoil

    return register


F, B, PRE, POST = (
    Kernel.forward,
    Kernel.backward,
    Kernel.backward_preprocess,
    Kernel.backward_postprocess,
)
INTERVAL = (Feature.interval,)
SOFTCAP = (Feature.interval, Feature.softcap)


@malformed(F, 'attribute kernel: got "nope", expected a kernel of this build')
def unknown_kernel(call, fake):
    call.attributes["kernel"] = "nope"


@malformed(F, "attribute kernel: got nothing, expected a string")
def no_kernel(call, fake):
    del call.attributes["kernel"]


@malformed(F, "attribute kernel: got another type, expected a string")
def kernel_is_a_number(call, fake):
    call.attributes["kernel"] = np.int32(3)


@malformed(F, "got 4 operands, expected 7")
def kernel_of_another_pass(call, fake):
    call.attributes["kernel"] = variant_of(B).key


@malformed(F, "got 3 operands, expected 4")
def operand_missing(call, fake):
    del call.operands[2]


@malformed(F, "got 5 operands, expected 4")
def operand_too_many(call, fake):
    call.operands.append(call.operands[0])


@malformed(F, "got 1 results, expected 2")
def result_missing(call, fake):
    del call.results[1]


@malformed(F, "got 3 results, expected 2")
def result_too_many(call, fake):
    call.results.append(call.results[0])


@malformed(F, "q: got dtype F32, expected BF16")
def wrong_dtype(call, fake):
    call.operand(0, dtype=np.float32)


@malformed(F, "v: got dtype F16, expected BF16")
def mixed_dtypes(call, fake):
    call.operand(2, dtype=np.float16)


@malformed(F, "lse: got dtype BF16, expected F32")
def wrong_result_dtype(call, fake):
    call.result(1, dtype=jnp.bfloat16)


@malformed(F, r"q: got rank 3 \[100, 4, 64\], expected rank 4 \[B, T, N, 64\]")
def wrong_rank(call, fake):
    call.operand(0, shape=(100, 4, 64))


@malformed(F, r"q: got rank 0 \[\], expected rank 4")
def scalar_operand(call, fake):
    call.operands[0] = call.operands[0].ravel()[0].reshape(())


@malformed(F, r"q: got shape \[2, 100, 4, 72\], expected \[B, T, N, 64\]")
def wrong_head_dim(call, fake):
    call.operand(0, shape=(2, 100, 4, 72))


@malformed(F, r"k: got shape \[3, 70, 2, 64\], expected \[B, S, K, 64\] with B = 2")
def batches_differ(call, fake):
    call.operand(1, shape=(3, 70, 2, 64))


@malformed(F, "v: got shape .* with S = 70")
def key_and_value_lengths_differ(call, fake):
    call.operand(2, shape=(2, 71, 2, 64))


@malformed(F, "v: got shape .* with K = 2")
def key_and_value_heads_differ(call, fake):
    call.operand(2, shape=(2, 70, 4, 64))


@malformed(F, "got N = 4 and K = 3, expected N to be a multiple of K")
def heads_not_a_multiple(call, fake):
    call.operand(1, shape=(2, 70, 3, 64))
    call.operand(2, shape=(2, 70, 3, 64))


@malformed(F, "out: got shape .* with T = 100")
def out_too_short(call, fake):
    call.result(0, shape=(2, 99, 4, 64))


@malformed(F, r"lse: got shape \[2, 100, 4\], expected \[B, N, T\] with N = 4")
def lse_transposed(call, fake):
    call.result(1, shape=(2, 100, 4))


@malformed(PRE, "got R = 100, expected 128: T = 100 rounded up to a multiple of 128")
def workspace_not_padded(call, fake):
    call.result(0, shape=(2, 4, 100))
    call.result(1, shape=(2, 4, 100))
    call.result(2, shape=(2, 4, 100, 64))


@malformed(POST, "got R = 256, expected 128")
def workspace_of_another_length(call, fake):
    call.operand(0, shape=(2, 4, 256, 64))


@malformed(F, r"k: got dimension 1 of size 0 in \[2, 0, 2, 64\], expected 1 to")
def no_keys(call, fake):
    call.operand(1, shape=(2, 0, 2, 64))
    call.operand(2, shape=(2, 0, 2, 64))


@malformed(PRE, f"lse: got dimension 2 of size {2**31} .* expected 1 to {MAX_DIMENSION}")
def dimension_beyond_int32(call, fake):
    fake.mutate(SET_LAST_DIM, 2, 2**31)


@malformed(F, "q: got dimension 3 of size -64 ")
def negative_dimension(call, fake):
    fake.mutate(SET_LAST_DIM, 0, -64)


@malformed(F, "attribute softmax_scale: got nothing, expected a float32")
def scale_missing(call, fake):
    del call.attributes["softmax_scale"]


@malformed(F, "attribute softmax_scale: got another type, expected a float32")
def scale_is_float64(call, fake):
    call.attributes["softmax_scale"] = np.float64(1)


@malformed(POST, "attribute softmax_scale: got another type, expected a float32")
def scale_is_a_string(call, fake):
    call.attributes["softmax_scale"] = "1.0"


@malformed(F, "attribute softmax_scale: got 0, expected a finite number > 0")
def scale_zero(call, fake):
    call.attributes["softmax_scale"] = np.float32(0)


@malformed(F, "attribute softmax_scale: got -1, expected a finite number > 0")
def scale_negative(call, fake):
    call.attributes["softmax_scale"] = np.float32(-1)


@malformed(F, "attribute softmax_scale: got -?nan, expected a finite number > 0")
def scale_nan(call, fake):
    call.attributes["softmax_scale"] = np.float32(np.nan)


@malformed(B, "attribute softmax_scale: got inf, expected a finite number > 0")
def scale_infinite(call, fake):
    call.attributes["softmax_scale"] = np.float32(np.inf)


@malformed(F, "attribute softcap: got 0, expected a finite number > 0")
def softcap_zero(call, fake):
    call.attributes["softcap"] = np.float32(0)


@malformed(B, "attribute softcap: got nothing, expected a float32")
def softcap_missing(call, fake):
    del call.attributes["softcap"]


@malformed(F, "attribute band_lower: got another type, expected an int32")
def band_is_int64(call, fake):
    call.attributes["band_lower"] = np.int64(0)


@malformed(F, "attribute band_lower: got -101, expected -T to S, here -100 to 70")
def band_lower_too_low(call, fake):
    call.attributes["band_lower"] = np.int32(-101)


@malformed(B, "attribute band_upper: got 71, expected -T to S, here -100 to 70")
def band_upper_too_high(call, fake):
    call.attributes["band_upper"] = np.int32(71)


@malformed(
    F, "got 6 attributes, expected 5: kernel, softmax_scale, softcap, band_lower, band_upper"
)
def attribute_too_many(call, fake):
    call.attributes["causal"] = True


@malformed(
    F, "got 6 attributes, expected 5: kernel, softmax_scale, softcap, band_lower, band_upper"
)
def attribute_that_the_library_supplies(call, fake):
    call.attributes["num_sms"] = np.int32(1)


@malformed(B, "dq_accum: got different memory as operand and as result, expected one buffer")
def in_place_buffer_not_aliased(call, fake):
    call.aliases = {}


@malformed(F, "k: got data pointer .* expected a multiple of 16 that isn't null")
def misaligned_pointer(call, fake):
    fake.mutate(OFFSET_POINTER, 1, 2)


@malformed(F, "k: got data pointer .* expected a multiple of 16 that isn't null")
def null_pointer(call, fake):
    fake.mutate(NULL_POINTER, 1, 0)


@malformed(F, "result out: got memory that overlaps q, expected memory of its own")
def result_overlaps_operand(call, fake):
    fake.mutate(RESULT_IS_OPERAND, 0, 0)


@malformed(B, "result dk: got memory that overlaps q, expected memory of its own")
def gradient_overlaps_operand(call, fake):
    fake.mutate(RESULT_IS_OPERAND, 0, 0)


@malformed(F, "sinks: got dtype BF16, expected F32")
def sinks_of_16_bits(call, fake):
    call.operand(3, dtype=jnp.bfloat16)


@malformed(F, "got Z = 1, expected B = 2, or 0")
def sinks_of_one_batch_entry(call, fake):
    call.operand(3, shape=(1, 4))


@malformed(F, "got Z = 3, expected B = 2, or 0", INTERVAL)
def sinks_of_a_larger_batch(call, fake):
    call.operand(3, shape=(3, 4))


@malformed(F, r"sinks: got shape \[2, 2\], expected \[Z, N\] with N = 4")
def sinks_of_the_key_heads(call, fake):
    call.operand(3, shape=(2, 2))


@malformed(F, r"sinks: got shape \[0, 3\], expected \[Z, N\] with N = 4")
def no_sinks_of_other_heads(call, fake):
    call.operand(3, shape=(0, 3))


@malformed(F, "sinks: got rank 1", SOFTCAP)
def sinks_without_a_batch(call, fake):
    call.operand(3, shape=(4,))


@malformed(F, "sinks: got data pointer .* expected a multiple of 16 that isn't null")
def sinks_at_null(call, fake):
    fake.mutate(NULL_POINTER, 3, 0)


@malformed(F, "got 4 operands, expected 7", INTERVAL)
def interval_missing(call, fake):
    del call.operands[4:]


@malformed(F, "got 7 operands, expected 4")
def interval_of_a_row_without(call, fake):
    call.operands += RawCall(variant_of(F, INTERVAL)).operands[4:]


@malformed(F, "kv_start: got dtype S16, expected S32", INTERVAL)
def bounds_of_16_bits(call, fake):
    call.operand(4, dtype=np.int16)


@malformed(F, "kv_end: got dtype U32, expected S32", SOFTCAP)
def unsigned_bounds(call, fake):
    call.operand(5, dtype=np.uint32)


@malformed(B, "kv_end: got dtype F32, expected S32", INTERVAL)
def floating_bounds(call, fake):
    call.operand(8, dtype=np.float32)


@malformed(F, "q: got dtype S32, expected BF16", INTERVAL)
def integer_queries(call, fake):
    call.operand(0, dtype=np.int32)


@malformed(F, r"kv_end: got shape \[2, 100\], expected \[B, R\] with R = 128", INTERVAL)
def bounds_of_different_lengths(call, fake):
    call.operand(5, shape=(2, 100))


@malformed(F, "got R = 100, expected 128: T = 100 rounded up to a multiple of 128", INTERVAL)
def bounds_without_padding(call, fake):
    call.operand(4, shape=(2, 100))
    call.operand(5, shape=(2, 100))


@malformed(B, r"kv_start: got shape \[1, 128\], expected \[B, R\] with B = 2", INTERVAL)
def bounds_of_one_batch_entry(call, fake):
    call.operand(7, shape=(1, 128))


@malformed(F, "got M = 1, expected 2: T = 100 in blocks of 64", INTERVAL)
def too_few_blocks_of_queries(call, fake):
    call.operand(6, shape=(2, 1, 4))


@malformed(F, "got M = 3, expected 2: T = 100 in blocks of 64", SOFTCAP)
def too_many_blocks_of_queries(call, fake):
    call.operand(6, shape=(2, 3, 4))


@malformed(B, "got J = 1, expected 2: S = 70 in blocks of 64", SOFTCAP)
def too_few_blocks_of_keys(call, fake):
    call.operand(9, shape=(2, 1, 4))


@malformed(B, "got J = 128, expected 2: S = 70 in blocks of 64", INTERVAL)
def blocks_of_one_key(call, fake):
    call.operand(9, shape=(2, 128, 4))


@malformed(F, r"key_range: got shape \[2, 2, 2\], expected \[B, M, 4\]", INTERVAL)
def ranges_of_two(call, fake):
    call.operand(6, shape=(2, 2, 2))


@malformed(B, r"query_range: got dimension 1 of size 0 .* expected 1 to", INTERVAL)
def no_blocks_of_keys(call, fake):
    call.operand(9, shape=(2, 0, 4))


@malformed(B, "query_range: got data pointer .* expected a multiple of 16", INTERVAL)
def ranges_misaligned(call, fake):
    fake.mutate(OFFSET_POINTER, 9, 4)


@pytest.mark.parametrize("variant, message, spoil", MALFORMED)
def test_malformed_call_is_an_invalid_argument(fake, variant, message, spoil):
    call = RawCall(variant)
    call()  # right as it stands
    launches = fake.count(LAUNCH)
    spoil(call, fake)
    with pytest.raises(XLA_ERRORS, match=message) as info:
        call()
    assert "INVALID_ARGUMENT: fa4_jax: " in str(info.value)
    assert fake.count(LAUNCH) == launches, "a malformed call was launched"


@pytest.mark.parametrize("features", [(), INTERVAL, SOFTCAP], ids="-".join)
def test_no_sinks_are_an_operand_of_size_0_wherever_it_lies(fake, features):
    call = RawCall(variant_of(Kernel.forward, features), {**SIZES, "Z": 0})
    seen = []

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_int32)
    def on_launch(name, args, num_args):
        sinks = args[1 + len(SCALARS) + 1 + 3]  # the stream, scalars and num_sms, q, k, v
        # The pointer, then the sizes.
        seen.append(
            (
                ctypes.c_void_p.from_address(sinks).value,
                *(ctypes.c_int32 * 2).from_address(sinks + 8),
            )
        )

    fake.library.fa4_jax_fake_on_launch(on_launch)
    call()
    fake.mutate(NULL_POINTER, 3, 0)
    call()
    fake.mutate(OFFSET_POINTER, 3, 2)
    call()
    assert seen == [(None, 0, 4)] * 3
    launches = fake.count(LAUNCH)
    fake.mutate(SET_LAST_DIM, 3, 5)
    with pytest.raises(XLA_ERRORS, match=r"sinks: got shape \[0, 5\]"):
        call()
    assert fake.count(LAUNCH) == launches


def test_a_wrong_call_leaves_the_next_one_right(fake):
    good, bad = RawCall(variant_of(Kernel.forward)), RawCall(variant_of(Kernel.forward))
    bad.operand(0, dtype=np.float32)
    for _ in range(3):
        with pytest.raises(XLA_ERRORS):
            bad()
        good()


# Verification before loading ----------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the Python package whose `lib` holds the fake library and its manifest."""
    copy = tmp_path / "fa4_jax"
    source = pathlib.Path(_ffi.__file__).parent
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    library = copy / "lib" / "libfa4_jax.so"
    library.parent.mkdir()
    shutil.copyfile(fake_library.build(), library)
    kernels = tmp_path / "kernels.json"
    kernels.write_text(
        json.dumps({"dsl_version": "0", "arches": ["sm90a"], "kernels": [v.name for v in VARIANTS]})
    )
    # Of the original: this loads the library, and spoiling a loaded one is a SIGBUS at exit.
    facts = build_manifest.manifest(fake_library.build(), kernels, "13")
    (library.parent / "manifest.json").write_text(json.dumps(facts))
    return copy


def run_python(package: pathlib.Path, code: str) -> str:
    """Run `code` where `package` is the installed one; a crash fails the test."""
    # -S: an editable install's import hook would come before the path.
    folders = [str(package.parent), *dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib")))]
    result = subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(code)],
        cwd=package.parent,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": ":".join(folders), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}"
    return result.stdout


# What a failed registration must leave behind: the reason, and a JAX that works.
TRY = """
    import pathlib, fa4_jax
    assert pathlib.Path(fa4_jax.__file__).parent.parent == pathlib.Path.cwd()
    from fa4_jax import _ffi
    try:
        _ffi.register()
        print("registered")
    except _ffi.LibraryError as error:
        print(error)
    import jax
    assert jax.jit(lambda x: x + 1)(1) == 2
"""


def test_good_library_registers(package):
    output = run_python(
        package,
        TRY
        + """
    import concurrent.futures, importlib
    importlib.reload(_ffi)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: _ffi.register(), range(8)))
    print(_ffi.handler_entries(), _ffi.module_loads(0), len(_ffi.kernel_names()))
    """,
    )
    assert output.split() == ["registered", "0", "0", str(len(VARIANTS))]


def spoil_library(change):
    def spoil(library: pathlib.Path) -> None:
        library.write_bytes(change(library.read_bytes()))

    return spoil


def spoil_manifest(**changes):
    def spoil(library: pathlib.Path) -> None:
        path = library.with_name("manifest.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def flip(content: bytes, part: float) -> bytes:
    at = int(part * (len(content) - 1))
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


DAMAGED = {
    "missing": (pathlib.Path.unlink, "kernel library: got"),
    "missing manifest": (lambda path: path.with_name("manifest.json").unlink(), "got no .*json"),
    "empty": (spoil_library(lambda content: b""), "got 0 bytes, expected"),
    **{
        f"truncated at {part:.0%}": (
            spoil_library(lambda content, part=part: content[: int(part * len(content))]),
            "got [0-9]+ bytes, expected [0-9]+ bytes",
        )
        for part in (0.01, 0.25, 0.5, 0.75, 0.99)
    },
    **{
        f"bit flipped at {part:.0%}": (
            spoil_library(lambda content, part=part: flip(content, part)),
            "got sha256 [0-9a-f]+, expected sha256",
        )
        for part in (0, 0.25, 0.5, 0.75, 1)
    },
    "not a library": (spoil_library(lambda content: b"x" * len(content)), "sha256"),
    "manifest of another build": (spoil_manifest(sha256="0" * 64), "expected sha256 0000"),
    "empty manifest": (
        lambda path: path.with_name("manifest.json").write_text(""),
        "manifest.json",
    ),
    "manifest without keys": (
        lambda path: path.with_name("manifest.json").write_text("{}"),
        "manifest.json: got TypeError",
    ),
    "manifest of a newer format": (spoil_manifest(surprise=1), "manifest.json: got TypeError"),
    "older targets": (spoil_manifest(target_version=0), "got targets of version 0"),
    "newer FFI": (spoil_manifest(ffi_api_version=[0, 99]), "got XLA FFI 0.99, expected 0"),
    "another major FFI": (spoil_manifest(ffi_api_version=[1, 0]), "got XLA FFI 1.0, expected 0"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_library_is_a_library_error(package, monkeypatch, damage):
    spoil, message = DAMAGED[damage]
    spoil(package / "lib" / "libfa4_jax.so")
    monkeypatch.setattr(_ffi.fa4_jax, "__path__", [str(package)])
    with pytest.raises(_ffi.LibraryError, match=message) as info:
        _ffi.verify()
    assert str(info.value).startswith("fa4_jax: ")
    assert "; " in str(info.value), "doesn't say what to do"


@pytest.mark.parametrize("damage", ["truncated at 50%", "newer FFI"])
def test_damaged_library_leaves_jax_working(package, damage):
    spoil, message = DAMAGED[damage]
    spoil(package / "lib" / "libfa4_jax.so")
    assert run_python(package, TRY).startswith("fa4_jax: kernel library: got")


def test_second_copy_of_the_package_is_refused(package, tmp_path):
    other = tmp_path / "other" / "fa4_jax"
    shutil.copytree(package, other)
    output = run_python(
        package,
        TRY
        + f"""
    import sys
    for name in [n for n in sys.modules if n.split(".")[0] == "fa4_jax"]:
        del sys.modules[name]
    sys.path.insert(0, {str(other.parent)!r})
    from fa4_jax import _ffi as second
    assert second.__file__ != _ffi.__file__
    try:
        second.register()
    except second.LibraryError as error:
        print(error)
    """,
    )
    assert output.startswith("registered\nfa4_jax: kernel library: got a second copy")


def test_library_loads_without_jax_and_without_a_gpu():
    """The generated registry covers the table for every signature; nothing is needed to load it."""
    library = ctypes.CDLL(str(fake_library.build()))
    major, minor = divmod(library.fa4_jax_ffi_api_version(), 1000)
    assert (major, minor) <= _ffi.jax_ffi_version()
    names = library.fa4_jax_kernel_names
    names.restype = ctypes.c_char_p
    assert set(names().decode().split()) == {variant.name for variant in VARIANTS}
