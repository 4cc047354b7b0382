// SPDX-License-Identifier: Apache-2.0
#include "launch.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fa4_jax {
namespace {

// What an exported function takes for a tensor: the data pointer, then the sizes (int32) and the
// strides (int64, in elements) that weren't fixed at compile time, laid out as a C struct.
// kernels/build.py compares this rule with the struct in every exported header.
class CuteTensor {
 public:
  void Fill(const Buffer& buffer, const Call::Tensor& tensor) {
    Append(tensor.data);
    for (int i = 0; i < buffer.rank; ++i) {
      if (buffer.dims[i].size == 0) Append(static_cast<int32_t>(tensor.dims[i]));
    }
    size_ = (size_ + alignof(int64_t) - 1) / alignof(int64_t) * alignof(int64_t);
    // Row-major, so a stride is static while every dimension after it is. From the last dimension:
    int64_t strides[kMaxRank];
    bool is_static[kMaxRank];
    int64_t stride = 1;
    bool all_static = true;
    for (int i = buffer.rank - 1; i >= 0; --i) {
      strides[i] = stride;
      is_static[i] = all_static;
      stride *= tensor.dims[i];
      all_static &= buffer.dims[i].size != 0;
    }
    for (int i = 0; i < buffer.rank; ++i) {
      if (!is_static[i]) Append(strides[i]);
    }
  }

  void* data() { return bytes_; }

 private:
  template <typename T>
  void Append(T value) {
    std::memcpy(bytes_ + size_, &value, sizeof value);
    size_ += sizeof value;
  }

  static constexpr size_t kMaxSize =
      sizeof(void*) + kMaxRank * sizeof(int32_t) + kMaxRank * sizeof(int64_t);
  alignas(8) unsigned char bytes_[kMaxSize + alignof(int64_t)];
  size_t size_ = 0;
};

}  // namespace

int Launch(const Kernel& kernel, const Call& call, int num_sms, cudaStream_t stream) {
  CuteTensor tensors[kMaxBuffers];
  ScalarValue scalars[kMaxScalars];
  int32_t status = 0;
  void* args[kMaxBuffers + kMaxScalars + 2];
  int32_t num_args = 0;
  args[num_args++] = &stream;
  for (size_t i = 0; i < kernel.scalars.size(); ++i) {
    if (kernel.scalars[i].kind == Scalar::kNumSms) {
      scalars[i].i32 = num_sms;
    } else {
      scalars[i] = call.scalars[i];
    }
    args[num_args++] = &scalars[i];
  }
  for (size_t i = 0; i < kernel.buffers.size(); ++i) {
    if (kernel.buffers[i].zeroed) {
      const int error = cudaMemsetAsync(call.buffers[i].data, 0, call.buffers[i].bytes, stream);
      if (error != kCudaSuccess) return error;
    }
    tensors[i].Fill(kernel.buffers[i], call.buffers[i]);
    args[num_args++] = tensors[i].data();
  }
  args[num_args++] = &status;
  kernel.launch(args, num_args);
  return status;
}

}  // namespace fa4_jax
