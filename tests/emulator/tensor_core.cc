// SPDX-License-Identifier: Apache-2.0
// One k16 step of Hopper's tensor cores for 16-bit operands, bit for bit; see tensor_core.py.
//
// Every value here is a multiple of 2^(largest - 25) below 2^(largest + 7) once it is cut off, so
// double arithmetic is exact and the order of the sum doesn't matter.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kDepth = 16;         // products per step
constexpr int kFractionBits = 25;  // kept below the largest exponent
constexpr int kZero = -4096;       // exponent of a zero
constexpr int kSmallest = -252;    // exponent of a product of two numbers that aren't
constexpr int kMaxColumns = 256;

template <typename To, typename From>
To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The exponent of a finite number in a format with this least exponent. By its bits, like what
// follows: the library's functions took four fifths of the time.
int Exponent(float value, int least) {
  const int biased = static_cast<int>(BitCast<uint32_t>(value) >> 23 & 0xFF);
  return value == 0 ? kZero : std::max(biased - 127, least);
}

// 2^exponent, of a normal double.
double PowerOfTwo(int exponent) {
  return BitCast<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

// Rounded toward zero to 24 significant bits.
float Truncate(double value) {
  const float nearest = static_cast<float>(value);
  // The bits of a float further from zero are one more.
  return std::fabs(nearest) > std::fabs(value) ? BitCast<float>(BitCast<uint32_t>(nearest) - 1)
                                               : nearest;
}

}  // namespace

// d[m][n] += a[m][16] b[n][16]^T for m < rows <= 64, n < columns <= 256. The operands are float32
// copies of numbers of a format with this least exponent; all are finite. Columns side by side, so
// that the compiler computes several at a time.
extern "C" void fa4_jax_tensor_core_step(const float* a, const float* b, float* d, int rows,
                                         int columns, int least_exponent) {
  double right[kDepth][kMaxColumns];
  int right_exponents[kDepth][kMaxColumns];
  for (int n = 0; n < columns; ++n) {
    for (int k = 0; k < kDepth; ++k) {
      right[k][n] = b[n * kDepth + k];
      right_exponents[k][n] = Exponent(b[n * kDepth + k], least_exponent);
    }
  }
  for (int m = 0; m < rows; ++m) {
    float* result = d + m * columns;
    int largest[kMaxColumns];
    double sums[kMaxColumns];
    double scales[kMaxColumns];
    for (int n = 0; n < columns; ++n) largest[n] = Exponent(result[n], -126);
    for (int k = 0; k < kDepth; ++k) {
      const int left = Exponent(a[m * kDepth + k], least_exponent);
      for (int n = 0; n < columns; ++n) {
        largest[n] = std::max(largest[n], left + right_exponents[k][n]);
      }
    }
    for (int n = 0; n < columns; ++n) {
      // Nothing but zeros: the result stays, with its sign.
      scales[n] = largest[n] < kSmallest ? 0 : PowerOfTwo(kFractionBits - largest[n]);
      sums[n] = std::trunc(result[n] * scales[n]);
    }
    for (int k = 0; k < kDepth; ++k) {
      const double left = a[m * kDepth + k];
      for (int n = 0; n < columns; ++n) sums[n] += std::trunc(left * right[k][n] * scales[n]);
    }
    for (int n = 0; n < columns; ++n) {
      const int exponent = std::max(largest[n], kSmallest) - kFractionBits;
      result[n] = scales[n] == 0 ? result[n] : Truncate(sums[n] * PowerOfTwo(exponent));
    }
  }
}
