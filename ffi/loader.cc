// SPDX-License-Identifier: Apache-2.0
#include "loader.h"

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string_view>

#include "cuda_api.h"
#include "error.h"

namespace fa4_jax {
namespace {

constexpr int kMaxDevices = 64;  // bits of Module::devices

// Guards loading and Module::library. A load takes milliseconds and happens once, so one lock will
// do; what has been loaded is read without it.
std::mutex load_mutex;
std::atomic<int64_t> loads[kMaxDevices];
std::atomic<int> capabilities[kMaxDevices];  // 1000 * major + minor; 0: not asked yet
std::atomic<int> num_sms[kMaxDevices];       // written before Module::devices says "loaded"

ffi::ErrorCode CodeOf(int error) {
  switch (error) {
    case kCudaErrorMemoryAllocation:
      return ffi::ErrorCode::kResourceExhausted;
    case kCudaErrorInsufficientDriver:
    case kCudaErrorNoDevice:
    case kCudaErrorInvalidDevice:
    case kCudaErrorInvalidKernelImage:
    case kCudaErrorNoKernelImageForDevice:
      return ffi::ErrorCode::kFailedPrecondition;
    default:
      return ffi::ErrorCode::kInternal;
  }
}

std::string_view Advice(int error) {
  return error == kCudaErrorInsufficientDriver
             ? "; update the NVIDIA driver, or build against an older CUDA runtime: pip install . "
               "-C cmake.define.FA4_JAX_CUDA=12"
             : "";
}

ffi::Error CheckDevice(int32_t device) {
  if (device >= 0 && device < kMaxDevices) return ffi::Error::Success();
  return MakeError(ffi::ErrorCode::kFailedPrecondition, "got device ordinal ", device,
                   ", expected 0 to ", kMaxDevices - 1);
}

struct LoadTask {
  const Kernel* kernel;
  int device;
  int num_sms = 0;
  int error = kCudaSuccess;
};

// The exported entry points take arrays of pointers to their arguments. A library and its kernel's
// handle, which the exported code keeps in a global, are one for all devices; load_to_device writes
// the handle again, the same one, and sets the kernel's attributes on that device.
void LoadOnThisThread(LoadTask* task) {
  Module* module = task->kernel->module;
  // A runtime call may create a context on the current device, which in a new thread is device 0.
  task->error = cudaSetDevice(task->device);
  if (task->error != kCudaSuccess) return;
  task->error =
      cudaDeviceGetAttribute(&task->num_sms, kCudaDevAttrMultiProcessorCount, task->device);
  if (task->error != kCudaSuccess) return;
  if (module->library == nullptr) {
    cudaLibrary_t library = nullptr;
    cudaLibrary_t* library_pointer = &library;
    void* args[] = {&library_pointer, &task->error};
    task->kernel->init(args);
    if (task->error != kCudaSuccess) return;
    module->library = library;
  }
  cudaLibrary_t* library_pointer = &module->library;
  void* args[] = {&library_pointer, &task->device, &task->error};
  task->kernel->load_to_device(args);
}

}  // namespace

ffi::Error CudaError(int error, std::string_view what, const Kernel& kernel, int32_t device) {
  return MakeError(CodeOf(error), what, " ", kernel.name, " on device ", device, ": CUDA error ",
                   error, " ", cudaGetErrorName(error), ": ", cudaGetErrorString(error),
                   Advice(error));
}

ffi::Error ComputeCapability(int32_t device, int* major, int* minor) {
  if (ffi::Error error = CheckDevice(device); error.failure()) return error;
  int capability = capabilities[device].load(std::memory_order_relaxed);
  if (capability == 0) {
    int status = cudaDeviceGetAttribute(major, kCudaDevAttrComputeCapabilityMajor, device);
    if (status == kCudaSuccess) {
      status = cudaDeviceGetAttribute(minor, kCudaDevAttrComputeCapabilityMinor, device);
    }
    if (status != kCudaSuccess) {
      return MakeError(CodeOf(status), "asking for the compute capability of device ", device,
                       ": CUDA error ", status, " ", cudaGetErrorName(status), ": ",
                       cudaGetErrorString(status), Advice(status));
    }
    capability = 1000 * *major + *minor;
    capabilities[device].store(capability, std::memory_order_relaxed);
  }
  *major = capability / 1000;
  *minor = capability % 1000;
  return ffi::Error::Success();
}

ffi::Error Load(const Kernel& kernel, int32_t device) {
  if (ffi::Error error = CheckDevice(device); error.failure()) return error;
  std::lock_guard<std::mutex> lock(load_mutex);
  if (IsLoaded(kernel, device)) return ffi::Error::Success();
  // On a thread of its own, because the runtime's current device belongs to the thread, and putting
  // the caller's back could create a context on a device that the program doesn't use.
  LoadTask task{&kernel, device};
  pthread_t thread;
  auto run = [](void* task) -> void* {
    LoadOnThisThread(static_cast<LoadTask*>(task));
    return nullptr;
  };
  if (int error = pthread_create(&thread, nullptr, run, &task); error != 0) {
    return MakeError(ffi::ErrorCode::kResourceExhausted, "loading ", kernel.name,
                     ": pthread_create failed with error ", error);
  }
  pthread_join(thread, nullptr);
  if (task.error != kCudaSuccess) return CudaError(task.error, "loading", kernel, device);
  loads[device].fetch_add(1, std::memory_order_relaxed);
  num_sms[device].store(task.num_sms, std::memory_order_relaxed);
  kernel.module->devices.fetch_or(uint64_t{1} << device, std::memory_order_release);
  return ffi::Error::Success();
}

int NumSms(int32_t device) { return num_sms[device].load(std::memory_order_relaxed); }

int64_t ModuleLoads(int32_t device) {
  return device >= 0 && device < kMaxDevices ? loads[device].load(std::memory_order_relaxed) : 0;
}

ffi::Error IsCapturing(cudaStream_t stream, bool* capturing) {
  int status = kCudaStreamCaptureStatusNone;
  if (int error = cudaStreamIsCapturing(stream, &status); error != kCudaSuccess) {
    return MakeError(CodeOf(error), "asking whether the stream is captured: CUDA error ", error,
                     " ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
  }
  *capturing = status != kCudaStreamCaptureStatusNone;
  return ffi::Error::Success();
}

}  // namespace fa4_jax
