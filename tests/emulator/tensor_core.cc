// SPDX-License-Identifier: Apache-2.0
// One k16 step of Hopper's tensor cores for 16-bit operands, bit for bit; see tensor_core.py.
//
// Every value here is a multiple of 2^(largest - 25) below 2^(largest + 7) once it is cut off, so
// double arithmetic is exact and the order of the sum doesn't matter.
#include <algorithm>
#include <cmath>

namespace {

constexpr int kDepth = 16;         // products per step
constexpr int kFractionBits = 25;  // kept below the largest exponent
constexpr int kZero = -4096;       // exponent of a zero

// The exponent of a finite number in a format with this least exponent.
int Exponent(float value, int least) {
  return value == 0 ? kZero : std::max(std::ilogb(value), least);
}

// Rounded toward zero to 24 significant bits.
float Truncate(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(nearest) > std::fabs(value) ? std::nextafterf(nearest, 0.0f) : nearest;
}

}  // namespace

// d[m][n] += a[m][16] b[n][16]^T for m < rows <= 64, n < columns <= 256. The operands are float32
// copies of numbers of a format with this least exponent; all are finite.
extern "C" void fa4_jax_tensor_core_step(const float* a, const float* b, float* d, int rows,
                                         int columns, int least_exponent) {
  int left[64 * kDepth];
  int right[256 * kDepth];
  for (int i = 0; i < rows * kDepth; ++i) left[i] = Exponent(a[i], least_exponent);
  for (int i = 0; i < columns * kDepth; ++i) right[i] = Exponent(b[i], least_exponent);
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < columns; ++n) {
      const float* x = a + m * kDepth;
      const float* y = b + n * kDepth;
      float* result = d + m * columns + n;
      int largest = Exponent(*result, -126);
#pragma omp simd reduction(max : largest)
      for (int k = 0; k < kDepth; ++k) {
        largest = std::max(largest, left[m * kDepth + k] + right[n * kDepth + k]);
      }
      if (largest < kZero / 2) continue;  // nothing but zeros
      const double scale = std::ldexp(1.0, kFractionBits - largest);
      double sum = std::trunc(*result * scale);
#pragma omp simd reduction(+ : sum)
      for (int k = 0; k < kDepth; ++k) {
        sum += std::trunc(static_cast<double>(x[k]) * y[k] * scale);
      }
      *result = Truncate(std::ldexp(sum, largest - kFractionBits));
    }
  }
}
