// SPDX-License-Identifier: Apache-2.0
// The library's surface: two XLA FFI handlers and a few C functions for Python and tests.
//
//   fa4_jax_initialize  before each execution, until XLA replays a captured graph by itself: loads
//                       the call's kernel on the call's device, or sees that it is loaded
//   fa4_jax_execute     checks the call and launches
//
// The same two serve every kernel; the attribute "kernel" says which. Handlers return errors; they
// never throw, print or abort.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>

#include "check.h"
#include "cuda_api.h"
#include "error.h"
#include "launch.h"
#include "loader.h"
#include "registry.h"
#include "xla/ffi/api/ffi.h"

namespace fa4_jax {
namespace {

std::atomic<int64_t> execute_entries{0};

ffi::Error NotBuilt(std::string_view key, const Kernel* first, const Kernel* last, int major,
                    int minor) {
  std::ostringstream built;
  for (const Kernel* k = first; k != last; ++k) {
    built << (k == first ? "" : ", ") << k->major << '.' << k->minor;
  }
  return MakeError(ffi::ErrorCode::kUnimplemented, "kernel ", key,
                   " isn't built for this device: got compute capability ", major, ".", minor,
                   ", expected ", built.str());
}

// The kernel that a call names, for the device that runs it.
ffi::Error FindKernel(const ffi::Dictionary& attrs, int32_t device, const Kernel** kernel) {
  auto key = attrs.get<std::string_view>("kernel");
  if (!key.has_value()) {
    return InvalidArgument("attribute kernel: got ",
                           attrs.contains("kernel") ? "another type" : "nothing",
                           ", expected a string, the name of a kernel");
  }
  struct ByKey {
    bool operator()(const Kernel& a, std::string_view b) const { return a.key < b; }
    bool operator()(std::string_view a, const Kernel& b) const { return a < b.key; }
  };
  const List<Kernel> registry = Registry();
  const auto [first, last] = std::equal_range(registry.begin(), registry.end(), *key, ByKey());
  if (first == last) {
    return InvalidArgument("attribute kernel: got \"", *key,
                           "\", expected a kernel of this build:\n", KernelNames());
  }
  int major, minor;
  if (ffi::Error error = ComputeCapability(device, &major, &minor); error.failure()) return error;
  for (*kernel = first; *kernel != last; ++*kernel) {
    if ((*kernel)->major == major && (*kernel)->minor == minor) return ffi::Error::Success();
  }
  return NotBuilt(*key, first, last, major, minor);
}

ffi::Error Initialize(int32_t device, ffi::RemainingArgs, ffi::RemainingRets,
                      ffi::Dictionary attrs) {
  const Kernel* kernel;
  if (ffi::Error error = FindKernel(attrs, device, &kernel); error.failure()) return error;
  return IsLoaded(*kernel, device) ? ffi::Error::Success() : Load(*kernel, device);
}

// For an XLA that didn't run Initialize. Loading is impossible while the stream is captured, so
// that one case is an error.
ffi::Error LoadLate(const Kernel& kernel, int32_t device, cudaStream_t stream) {
  bool capturing = false;
  if (ffi::Error error = IsCapturing(stream, &capturing); error.failure()) return error;
  if (!capturing) return Load(kernel, device);
  return MakeError(ffi::ErrorCode::kFailedPrecondition, kernel.name, " isn't loaded on device ",
                   device,
                   " and can't be while its stream is captured: expected the initialize stage of "
                   "the call to run first");
}

ffi::Error Execute(cudaStream_t stream, int32_t device, ffi::RemainingArgs args,
                   ffi::RemainingRets rets, ffi::Dictionary attrs) {
  execute_entries.fetch_add(1, std::memory_order_relaxed);
  const Kernel* kernel;
  if (ffi::Error error = FindKernel(attrs, device, &kernel); error.failure()) return error;
  Call call;
  if (ffi::Error error = CheckCall(*kernel, args, rets, attrs, &call); error.failure()) {
    return error;
  }
  if (!IsLoaded(*kernel, device)) {
    if (ffi::Error error = LoadLate(*kernel, device, stream); error.failure()) return error;
  }
  const int status = Launch(*kernel, call, NumSms(device), stream);
  if (status != kCudaSuccess) return CudaError(status, "launching", *kernel, device);
  return ffi::Error::Success();
}

}  // namespace

// XLA may capture both into a command buffer: they only launch, on the stream they are given.
XLA_FFI_DEFINE_HANDLER_SYMBOL(fa4_jax_execute, Execute,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs(),
                              {ffi::Traits::kCmdBufferCompatible});

// The frame of this stage carries the operands, too, but they mustn't be looked at yet.
XLA_FFI_DEFINE_HANDLER_SYMBOL(fa4_jax_initialize, Initialize,
                              ffi::Ffi::Bind<ffi::ExecutionStage::kInitialize>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs(),
                              {ffi::Traits::kCmdBufferCompatible});

extern "C" {

// The FFI version of the headers this was built with: 1000 * major + minor.
int32_t fa4_jax_ffi_api_version() { return 1000 * XLA_FFI_API_MAJOR + XLA_FFI_API_MINOR; }

// The kernels of this build, one a line.
const char* fa4_jax_kernel_names() { return KernelNames(); }

// How often fa4_jax_execute was entered: a replayed graph doesn't.
int64_t fa4_jax_handler_entries() { return execute_entries.load(std::memory_order_relaxed); }

// How many modules have been loaded on the device.
int64_t fa4_jax_module_loads(int32_t device) { return ModuleLoads(device); }

}  // extern "C"

}  // namespace fa4_jax
