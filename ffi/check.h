// SPDX-License-Identifier: Apache-2.0
// The checks that keep a launch memory-safe. Python makes them too, but a program may reach the
// library without it: a raw ffi_call, or a program exported by another version.
#ifndef FA4_JAX_FFI_CHECK_H_
#define FA4_JAX_FFI_CHECK_H_

#include <cstddef>
#include <cstdint>

#include "registry.h"
#include "xla/ffi/api/ffi.h"

namespace fa4_jax {

// A checked call: what a kernel needs apart from the stream.
struct Call {
  struct Tensor {
    void* data;
    const int64_t* dims;
    size_t bytes;
  };
  Tensor buffers[kMaxBuffers];       // in the order of Kernel::buffers
  ScalarValue scalars[kMaxScalars];  // those that are attributes
};

// Checks operands, results and attributes against the kernel's signature and fills `call`.
ffi::Error CheckCall(const Kernel& kernel, const ffi::RemainingArgs& args,
                     const ffi::RemainingRets& rets, const ffi::Dictionary& attrs, Call* call);

}  // namespace fa4_jax

#endif  // FA4_JAX_FFI_CHECK_H_
