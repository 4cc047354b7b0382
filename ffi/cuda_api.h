// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime functions this library calls, declared here because their own headers come in
// three packages that a build would need for these lines only. The ABI of each is fixed since
// CUDA 12.0. The exported kernels call a few more, through the DSL's runtime.
#ifndef FA4_JAX_FFI_CUDA_API_H_
#define FA4_JAX_FFI_CUDA_API_H_

#include <cstddef>

extern "C" {
struct CUstream_st;
struct CUlib_st;
typedef CUstream_st* cudaStream_t;
typedef CUlib_st* cudaLibrary_t;

int cudaSetDevice(int device);
int cudaDeviceGetAttribute(int* value, int attribute, int device);
int cudaStreamIsCapturing(cudaStream_t stream, int* capture_status);
int cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream);
const char* cudaGetErrorName(int error);
const char* cudaGetErrorString(int error);
}

namespace fa4_jax {

// enum cudaError
constexpr int kCudaSuccess = 0;
constexpr int kCudaErrorMemoryAllocation = 2;
constexpr int kCudaErrorInsufficientDriver = 35;
constexpr int kCudaErrorNoDevice = 100;
constexpr int kCudaErrorInvalidDevice = 101;
constexpr int kCudaErrorInvalidKernelImage = 200;
constexpr int kCudaErrorNoKernelImageForDevice = 209;
// enum cudaDeviceAttr
constexpr int kCudaDevAttrMultiProcessorCount = 16;
constexpr int kCudaDevAttrComputeCapabilityMajor = 75;
constexpr int kCudaDevAttrComputeCapabilityMinor = 76;
// enum cudaStreamCaptureStatus
constexpr int kCudaStreamCaptureStatusNone = 0;

}  // namespace fa4_jax

#endif  // FA4_JAX_FFI_CUDA_API_H_
