// SPDX-License-Identifier: Apache-2.0
// A CUDA runtime without a GPU, and handlers that let JAX call the library on its CPU platform.
//
// Linked with the unmodified ffi/*.cc, the unmodified generated registry and an entry point per row
// (written by fake_library.py, ending in the three Fake* functions below). Python sets and reads
// the state through the fa4_jax_fake_* functions.
#include <alloca.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda_api.h"
#include "registry.h"
#include "xla/ffi/api/c_api.h"

extern "C" XLA_FFI_Error* fa4_jax_execute(XLA_FFI_CallFrame* frame);
extern "C" XLA_FFI_Error* fa4_jax_initialize(XLA_FFI_CallFrame* frame);

namespace {

enum Call {
  kSetDevice,
  kGetAttribute,
  kIsCapturing,
  kInit,
  kLoadToDevice,
  kLaunch,
  kMemset,
  kNumCalls
};

std::atomic<int> failures[kNumCalls];  // the error the call returns
std::atomic<int> counts[kNumCalls];
std::atomic<int> compute_capability{90};
std::atomic<int> multiprocessors{2};
std::atomic<int> capturing{0};
std::atomic<int> device_ordinal{0};
std::atomic<int> initialize_first{1};
thread_local int current_device = 0;

using LaunchCallback = void (*)(const char* name, void** args, int32_t num_args);
std::atomic<LaunchCallback> launch_callback{nullptr};

int Enter(Call call) {
  counts[call].fetch_add(1);
  return failures[call].load();
}

// How the next frames are falsified, in ways that XLA itself wouldn't.
enum Mutation { kNone, kOffsetPointer, kNullPointer, kResultIsOperand, kSetLastDim };
std::atomic<int> mutation{kNone};
std::atomic<int> mutated_index{0};
std::atomic<int64_t> mutation_value{0};

XLA_FFI_Error* FakeStream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = reinterpret_cast<void*>(0x5717EA);
  return nullptr;
}

XLA_FFI_Error* FakeDeviceOrdinal(XLA_FFI_DeviceOrdinal_Get_Args* args) {
  args->device_ordinal = device_ordinal.load();
  return nullptr;
}

// Calls the library as XLA does on a GPU: both stages with the same frame, on a stream and a
// device.
XLA_FFI_Error* CallAsOnGpu(XLA_FFI_CallFrame frame) {
  auto* api = static_cast<XLA_FFI_Api*>(alloca(frame.api->struct_size));
  std::memcpy(api, frame.api, frame.api->struct_size);
  api->XLA_FFI_Stream_Get = FakeStream;
  api->XLA_FFI_DeviceOrdinal_Get = FakeDeviceOrdinal;
  frame.api = api;
  if (initialize_first.load() != 0) {
    XLA_FFI_CallFrame initialize = frame;
    initialize.stage = XLA_FFI_ExecutionStage_INITIALIZE;
    if (XLA_FFI_Error* error = fa4_jax_initialize(&initialize)) return error;
  }
  return fa4_jax_execute(&frame);
}

XLA_FFI_Error* MutateAndCall(XLA_FFI_CallFrame frame) {
  const int kind = mutation.load();
  const int index = mutated_index.load();
  const int64_t value = mutation_value.load();
  XLA_FFI_Buffer buffer;
  std::vector<void*> args(frame.args.args, frame.args.args + frame.args.size);
  std::vector<void*> rets(frame.rets.rets, frame.rets.rets + frame.rets.size);
  std::vector<int64_t> dims;
  frame.args.args = args.data();
  frame.rets.rets = rets.data();
  if (kind == kResultIsOperand) {
    buffer = *static_cast<XLA_FFI_Buffer*>(rets[index]);
    buffer.data = static_cast<XLA_FFI_Buffer*>(args[value])->data;
    rets[index] = &buffer;
  } else if (kind != kNone) {
    buffer = *static_cast<XLA_FFI_Buffer*>(args[index]);
    dims.assign(buffer.dims, buffer.dims + buffer.rank);
    if (kind == kOffsetPointer) buffer.data = static_cast<char*>(buffer.data) + value;
    if (kind == kNullPointer) buffer.data = nullptr;
    if (kind == kSetLastDim) dims.back() = value;
    buffer.dims = dims.data();
    args[index] = &buffer;
  }
  return CallAsOnGpu(frame);
}

}  // namespace

void FakeInit(void** args) {
  auto* library = *static_cast<cudaLibrary_t**>(args[0]);
  const int error = Enter(kInit);
  if (error == 0) *library = reinterpret_cast<cudaLibrary_t>(0x11B);
  *static_cast<int*>(args[1]) = error;
}

void FakeLoadToDevice(void** args) {
  const int device = *static_cast<int*>(args[1]);
  int error = Enter(kLoadToDevice);
  // The exported code loads for the device it is told; the thread must be on it, too.
  if (error == 0 && device != current_device) error = 101;
  *static_cast<int*>(args[2]) = error;
}

void FakeLaunch(const char* name, void** args, int32_t num_args) {
  const int error = Enter(kLaunch);
  *static_cast<int*>(args[num_args - 1]) = error;
  if (LaunchCallback callback = launch_callback.load()) callback(name, args, num_args);
}

extern "C" {

int cudaSetDevice(int device) {
  const int error = Enter(kSetDevice);
  if (error == 0) current_device = device;
  return error;
}

int cudaDeviceGetAttribute(int* value, int attribute, int) {
  const int error = Enter(kGetAttribute);
  if (error != 0) return error;
  switch (attribute) {
    case fa4_jax::kCudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      break;
    case fa4_jax::kCudaDevAttrComputeCapabilityMajor:
      *value = compute_capability / 10;
      break;
    default:
      *value = compute_capability % 10;
  }
  return 0;
}

int cudaStreamIsCapturing(cudaStream_t, int* status) {
  const int error = Enter(kIsCapturing);
  *status = capturing.load();
  return error;
}

int cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  const int error = Enter(kMemset);
  if (error == 0) std::memset(data, value, bytes);
  return error;
}

const char* cudaGetErrorName(int) { return "cudaErrorFake"; }
const char* cudaGetErrorString(int) { return "a fake error"; }

// Forgets what was loaded, as a new process would.
void fa4_jax_fake_unload() {
  for (const fa4_jax::Kernel& kernel : fa4_jax::Registry()) {
    kernel.module->devices = 0;
    kernel.module->library = nullptr;
  }
}

void fa4_jax_fake_fail(int call, int error) { failures[call] = error; }
int fa4_jax_fake_count(int call) { return counts[call]; }
void fa4_jax_fake_compute_capability(int value) { compute_capability = value; }
void fa4_jax_fake_multiprocessors(int value) { multiprocessors = value; }
void fa4_jax_fake_capturing(int value) { capturing = value; }
void fa4_jax_fake_device(int ordinal) { device_ordinal = ordinal; }
int fa4_jax_fake_current_device() { return current_device; }
void fa4_jax_fake_on_launch(LaunchCallback callback) { launch_callback = callback; }
void fa4_jax_fake_mutate(int kind, int index, int64_t value) {
  mutation = kind;
  mutated_index = index;
  mutation_value = value;
}

void fa4_jax_fake_initialize_first(int value) { initialize_first = value; }

XLA_FFI_Error* fa4_jax_fake_execute(XLA_FFI_CallFrame* frame) {
  if (frame->extension_start != nullptr) return fa4_jax_execute(frame);  // asks for metadata
  return MutateAndCall(*frame);
}

}  // extern "C"
