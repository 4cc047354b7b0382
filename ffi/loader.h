// SPDX-License-Identifier: Apache-2.0
// Everything that calls the CUDA runtime. An own launcher, without the DSL's runtime, would replace
// loader.cc and launch.cc only.
#ifndef FA4_JAX_FFI_LOADER_H_
#define FA4_JAX_FFI_LOADER_H_

#include <cstdint>

#include "registry.h"
#include "xla/ffi/api/ffi.h"

namespace fa4_jax {

// The device's compute capability; asked once per device, then remembered.
ffi::Error ComputeCapability(int32_t device, int* major, int* minor);

inline bool IsLoaded(const Kernel& kernel, int32_t device) {
  return device >= 0 && device < 64 &&
         (kernel.module->devices.load(std::memory_order_acquire) >> device & 1) != 0;
}

// Makes the kernel ready on the device, once. Safe to call from any number of threads; after a
// failure the next call tries again. Touches no other device and no calling thread's CUDA state.
ffi::Error Load(const Kernel& kernel, int32_t device);

// The number of multiprocessors of a device on which something is loaded.
int NumSms(int32_t device);

// How many modules have been loaded on the device.
int64_t ModuleLoads(int32_t device);

// Whether the stream is being captured into a graph, when nothing can be loaded.
ffi::Error IsCapturing(cudaStream_t stream, bool* capturing);

// A CUDA error as an ffi::Error. `what` says what failed.
ffi::Error CudaError(int error, std::string_view what, const Kernel& kernel, int32_t device);

}  // namespace fa4_jax

#endif  // FA4_JAX_FFI_LOADER_H_
