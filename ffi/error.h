// SPDX-License-Identifier: Apache-2.0
// Building `ffi::Error`s. Everything here is off the hot path.
#ifndef FA4_JAX_FFI_ERROR_H_
#define FA4_JAX_FFI_ERROR_H_

#include <sstream>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace fa4_jax {

namespace ffi = ::xla::ffi;

template <typename... Parts>
[[gnu::noinline, gnu::cold]] ffi::Error MakeError(ffi::ErrorCode code, const Parts&... parts) {
  std::ostringstream message;
  message << "fa4_jax: ";
  (message << ... << parts);
  return ffi::Error(code, message.str());
}

template <typename... Parts>
[[gnu::noinline, gnu::cold]] ffi::Error InvalidArgument(const Parts&... parts) {
  return MakeError(ffi::ErrorCode::kInvalidArgument, parts...);
}

}  // namespace fa4_jax

#endif  // FA4_JAX_FFI_ERROR_H_
