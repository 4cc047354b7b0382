// SPDX-License-Identifier: Apache-2.0
#ifndef FA4_JAX_FFI_LAUNCH_H_
#define FA4_JAX_FFI_LAUNCH_H_

#include "check.h"
#include "cuda_api.h"
#include "registry.h"

namespace fa4_jax {

// Clears the results that start from zero, then calls the kernel's exported host function, which
// launches it, both on the stream of a device with `num_sms` multiprocessors. Returns a cudaError.
int Launch(const Kernel& kernel, const Call& call, int num_sms, cudaStream_t stream);

}  // namespace fa4_jax

#endif  // FA4_JAX_FFI_LAUNCH_H_
