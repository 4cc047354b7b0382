// SPDX-License-Identifier: Apache-2.0
// What the exported kernels call of the CUDA runtime, without a GPU: a launch goes to a callback.
//
// Linked with the unmodified ffi/*.cc, the generated registry, the exported objects and
// fake_cuda.cc, in place of the DSL's runtime. Names and argument lists are those of
// libcuda_dialect_runtime.
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "xla/ffi/api/c_api.h"

extern "C" XLA_FFI_Error* fa4_jax_fake_execute(XLA_FFI_CallFrame* frame);

namespace {

// Call sites, in the order of DriverCall in tests/emulator/device.py.
enum Call {
  kLoadData,
  kGetKernel,
  kKernelGetAttribute,
  kDeviceGetAttribute,
  kGetDevice,
  kFuncSetAttribute,
  kKernelSetAttribute,
  kLaunch,
  kNumCalls
};

std::array<std::atomic<int>, kNumCalls> failures;  // what the call returns
std::array<std::atomic<int>, kNumCalls> counts;

int Enter(Call call) {
  counts[call].fetch_add(1);
  return failures[call].load();
}

// A loaded module is its image, a kernel an image and a name.
struct Kernel {
  const void* image;
  std::string name;
};

std::mutex kernels_mutex;
std::map<std::pair<const void*, std::string>, Kernel> kernels;

struct Dim3 {
  unsigned x, y, z;
};

// cudaLaunchAttribute: an id, then 64 bytes at offset 8.
struct LaunchAttribute {
  int id;
  int padding;
  union {
    char bytes[64];
    Dim3 cluster;
  } value;
};
constexpr int kClusterDimension = 4;

// cudaLaunchConfig_t
struct LaunchConfig {
  Dim3 grid, block;
  size_t shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned num_attributes;
};

// dims: grid, block, cluster; returns a cudaError.
using LaunchCallback = int (*)(const void* image, const char* name, const unsigned* dims,
                               uint64_t shared_bytes, void** args);
// Before a call (bytes > 0) and after it (bytes == 0), for each operand and result.
using BufferCallback = void (*)(void* data, uint64_t bytes, int index);

std::atomic<LaunchCallback> launch_callback{nullptr};
std::atomic<BufferCallback> buffer_callback{nullptr};

size_t Bytes(const XLA_FFI_Buffer& buffer) {
  const bool is_32_bit =
      buffer.dtype == XLA_FFI_DataType_F32 || buffer.dtype == XLA_FFI_DataType_S32;
  size_t bytes = is_32_bit ? 4 : 2;
  for (int64_t i = 0; i < buffer.rank; ++i) bytes *= buffer.dims[i];
  return bytes;
}

template <typename Function>
void ForEachBuffer(const XLA_FFI_CallFrame& frame, Function function) {
  int index = 0;
  for (int64_t i = 0; i < frame.args.size; ++i) {
    function(*static_cast<XLA_FFI_Buffer*>(frame.args.args[i]), index++, false);
  }
  for (int64_t i = 0; i < frame.rets.size; ++i) {
    auto& result = *static_cast<XLA_FFI_Buffer*>(frame.rets.rets[i]);
    bool in_place = false;
    for (int64_t j = 0; j < frame.args.size; ++j) {
      in_place |= static_cast<XLA_FFI_Buffer*>(frame.args.args[j])->data == result.data;
    }
    if (!in_place) function(result, index, true);
    ++index;
  }
}

}  // namespace

extern "C" {

int _cudaLibraryLoadData(void** library, const void* image, void*, void*, unsigned, void*, void*,
                         unsigned) {
  const int error = Enter(kLoadData);
  if (error == 0) *library = const_cast<void*>(image);
  return error;
}

int _cudaLibraryGetKernel(void** kernel, void* library, const char* name) {
  const int error = Enter(kGetKernel);
  if (error != 0) return error;
  std::lock_guard<std::mutex> lock(kernels_mutex);
  const std::pair<const void*, std::string> key{library, name};
  *kernel = &kernels.emplace(key, Kernel{library, name}).first->second;
  return 0;
}

int _cuKernelGetAttribute(int* value, int, void*, int) {
  *value = 0;
  return Enter(kKernelGetAttribute);
}

int _cudaDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int kMaxSharedMemoryPerBlockOptin = 97;
  *value = attribute == kMaxSharedMemoryPerBlockOptin ? 227 * 1024 : 1;
  return Enter(kDeviceGetAttribute);
}

int _cudaGetDevice(int* device) {
  *device = 0;
  return Enter(kGetDevice);
}

int _cudaFuncSetAttribute(void*, int, int) { return Enter(kFuncSetAttribute); }

int _cudaKernelSetAttributeForDevice(void*, int, int, int) { return Enter(kKernelSetAttribute); }

int _cudaLaunchKernelEx(const LaunchConfig* config, void* handle, void** args) {
  if (const int error = Enter(kLaunch); error != 0) return error;
  const auto& kernel = *static_cast<Kernel*>(handle);
  unsigned dims[9] = {config->grid.x,
                      config->grid.y,
                      config->grid.z,
                      config->block.x,
                      config->block.y,
                      config->block.z,
                      1,
                      1,
                      1};
  for (unsigned i = 0; i < config->num_attributes; ++i) {
    const LaunchAttribute& attribute = config->attributes[i];
    if (attribute.id != kClusterDimension) continue;
    const Dim3& cluster = attribute.value.cluster;
    dims[6] = cluster.x;
    dims[7] = cluster.y;
    dims[8] = cluster.z;
  }
  LaunchCallback callback = launch_callback.load();
  if (callback == nullptr) return 0;
  return callback(kernel.image, kernel.name.c_str(), dims, config->shared_bytes, args);
}

void fa4_jax_fake_driver_fail(int call, int error) { failures[call] = error; }
int fa4_jax_fake_driver_count(int call) { return counts[call]; }
void fa4_jax_fake_driver_on_launch(LaunchCallback callback) { launch_callback = callback; }
void fa4_jax_fake_driver_on_buffer(BufferCallback callback) { buffer_callback = callback; }

// A call as from a GPU, its buffers announced, its results poisoned with NaN.
XLA_FFI_Error* fa4_jax_emulated_execute(XLA_FFI_CallFrame* frame) {
  BufferCallback callback = buffer_callback.load();
  if (frame->extension_start != nullptr || callback == nullptr) return fa4_jax_fake_execute(frame);
  ForEachBuffer(*frame, [callback](const XLA_FFI_Buffer& buffer, int index, bool is_result) {
    if (is_result) std::memset(buffer.data, 0xFF, Bytes(buffer));
    if (Bytes(buffer) > 0) callback(buffer.data, Bytes(buffer), index);
  });
  XLA_FFI_Error* error = fa4_jax_fake_execute(frame);
  ForEachBuffer(*frame, [callback](const XLA_FFI_Buffer& buffer, int index, bool) {
    if (Bytes(buffer) > 0) callback(buffer.data, 0, index);
  });
  return error;
}

}  // extern "C"
