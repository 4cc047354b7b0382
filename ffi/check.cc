// SPDX-License-Identifier: Apache-2.0
#include "check.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <ostream>
#include <string_view>

#include "error.h"

namespace fa4_jax {
namespace {

// Kernels use 16-byte copies and TMA, and were compiled with this promise.
constexpr uintptr_t kAlignment = 16;

// Sizes by letter; 0 until a buffer gives one.
class Sizes {
 public:
  int64_t& operator[](char letter) { return sizes_[letter - 'A']; }

 private:
  int64_t sizes_[26] = {};
};

// Shapes for messages: what was given, [2, 128, 4, 64], and what a buffer expects, [B, T, N, 128].
struct Shape {
  ffi::AnyBuffer::Dimensions dims;
};

std::ostream& operator<<(std::ostream& os, const Shape& shape) {
  os << '[';
  for (size_t i = 0; i < shape.dims.size(); ++i) os << (i > 0 ? ", " : "") << shape.dims[i];
  return os << ']';
}

struct ExpectedShape {
  const Buffer& buffer;
};

std::ostream& operator<<(std::ostream& os, const ExpectedShape& expected) {
  os << '[';
  for (int i = 0; i < expected.buffer.rank; ++i) {
    const Dim dim = expected.buffer.dims[i];
    os << (i > 0 ? ", " : "");
    if (dim.size > 0) {
      os << dim.size;
    } else {
      os << dim.letter;
    }
  }
  return os << ']';
}

// The bytes a buffer spans, for the overlap check.
struct Extent {
  uintptr_t begin, end;
};

bool MayBeZero(const Kernel& kernel, char letter) {
  for (const DimRule& rule : kernel.rules) {
    if (rule.kind == DimRule::kSameOrZero && rule.letter == letter) return true;
  }
  return false;
}

ffi::Error CheckDims(const Kernel& kernel, const Buffer& want, const ffi::AnyBuffer& got,
                     Sizes* sizes) {
  const Shape shape{got.dimensions()};
  if (shape.dims.size() != static_cast<size_t>(want.rank)) {
    return InvalidArgument(kernel.key, ": ", want.name, ": got rank ", shape.dims.size(), " ",
                           shape, ", expected rank ", want.rank, " ", ExpectedShape{want});
  }
  for (int i = 0; i < want.rank; ++i) {
    const Dim dim = want.dims[i];
    const int64_t size = shape.dims[i];
    const int64_t smallest = MayBeZero(kernel, dim.letter) ? 0 : 1;
    if (size < smallest || size > kMaxDimension) {
      return InvalidArgument(kernel.key, ": ", want.name, ": got dimension ", i, " of size ", size,
                             " in ", shape, ", expected ", smallest, " to ", kMaxDimension);
    }
    if (dim.size > 0 && size != dim.size) {
      return InvalidArgument(kernel.key, ": ", want.name, ": got shape ", shape, ", expected ",
                             ExpectedShape{want});
    }
    int64_t& known = (*sizes)[dim.letter];
    if (known == 0) known = size;
    if (known != size) {
      return InvalidArgument(kernel.key, ": ", want.name, ": got shape ", shape, ", expected ",
                             ExpectedShape{want}, " with ", dim.letter, " = ", known,
                             " as in the other buffers");
    }
  }
  return ffi::Error::Success();
}

ffi::Error CheckBuffer(const Kernel& kernel, const Buffer& want, const ffi::AnyBuffer& got,
                       Sizes* sizes, Call::Tensor* tensor, Extent* extent) {
  if (got.element_type() != want.dtype) {
    return InvalidArgument(kernel.key, ": ", want.name, ": got dtype ", got.element_type(),
                           ", expected ", want.dtype);
  }
  if (ffi::Error error = CheckDims(kernel, want, got, sizes); error.failure()) return error;

  size_t bytes = ffi::ByteWidth(want.dtype);
  bool overflow = false;
  for (int64_t size : got.dimensions()) overflow |= __builtin_mul_overflow(bytes, size, &bytes);
  if (overflow || bytes > static_cast<size_t>(std::numeric_limits<int64_t>::max())) {
    return InvalidArgument(kernel.key, ": ", want.name, ": got shape ", Shape{got.dimensions()},
                           ", expected fewer than 2^63 bytes");
  }
  const uintptr_t begin = reinterpret_cast<uintptr_t>(got.untyped_data());
  if (bytes == 0) {  // XLA allocates nothing for it
    *tensor = {nullptr, got.dimensions().begin(), 0};
    *extent = {0, 0};
    return ffi::Error::Success();
  }
  if (begin == 0 || begin % kAlignment != 0 || begin + bytes < begin) {
    return InvalidArgument(kernel.key, ": ", want.name, ": got data pointer ", got.untyped_data(),
                           ", expected a multiple of ", kAlignment, " that isn't null");
  }
  *tensor = {got.untyped_data(), got.dimensions().begin(), bytes};
  *extent = {begin, begin + bytes};
  return ffi::Error::Success();
}

ffi::Error CheckRules(const Kernel& kernel, Sizes sizes) {
  for (const DimRule& rule : kernel.rules) {
    const int64_t size = sizes[rule.letter];
    const int64_t other = sizes[rule.other];
    if (rule.kind == DimRule::kMultipleOf && size % other != 0) {
      return InvalidArgument(kernel.key, ": got ", rule.letter, " = ", size, " and ", rule.other,
                             " = ", other, ", expected ", rule.letter, " to be a multiple of ",
                             rule.other);
    }
    if (rule.kind == DimRule::kRoundedUp || rule.kind == DimRule::kBlocks) {
      const int64_t blocks = (other + rule.multiple - 1) / rule.multiple;
      const bool in_blocks = rule.kind == DimRule::kBlocks;
      const int64_t expected = in_blocks ? blocks : blocks * rule.multiple;
      if (size != expected) {
        return InvalidArgument(kernel.key, ": got ", rule.letter, " = ", size, ", expected ",
                               expected, ": ", rule.other, " = ", other,
                               in_blocks ? " in blocks of " : " rounded up to a multiple of ",
                               rule.multiple);
      }
    }
    if (rule.kind == DimRule::kSameOrZero && size != 0 && size != other) {
      return InvalidArgument(kernel.key, ": got ", rule.letter, " = ", size, ", expected ",
                             rule.other, " = ", other, ", or 0");
    }
  }
  return ffi::Error::Success();
}

ffi::Error CheckScalar(const Kernel& kernel, const Scalar& want, const ffi::Dictionary& attrs,
                       Sizes* sizes, ScalarValue* value) {
  const bool is_f32 = want.kind == Scalar::kPositiveF32;
  bool decoded = false;
  if (is_f32) {
    if (auto got = attrs.get<float>(want.name); got.has_value()) {
      value->f32 = *got;
      decoded = true;
    }
  } else if (auto got = attrs.get<int32_t>(want.name); got.has_value()) {
    value->i32 = *got;
    decoded = true;
  }
  if (!decoded) {
    return InvalidArgument(kernel.key, ": attribute ", want.name, ": got ",
                           attrs.contains(want.name) ? "another type" : "nothing", ", expected ",
                           is_f32 ? "a float32" : "an int32");
  }
  if (is_f32) {
    if (std::isfinite(value->f32) && value->f32 > 0) return ffi::Error::Success();
    return InvalidArgument(kernel.key, ": attribute ", want.name, ": got ", value->f32,
                           ", expected a finite number > 0");
  }
  const int64_t lower = -(*sizes)[want.lower];
  const int64_t upper = (*sizes)[want.upper];
  if (lower <= value->i32 && value->i32 <= upper) return ffi::Error::Success();
  return InvalidArgument(kernel.key, ": attribute ", want.name, ": got ", value->i32,
                         ", expected -", want.lower, " to ", want.upper, ", here ", lower, " to ",
                         upper);
}

ffi::Error CheckOverlaps(const Kernel& kernel, const Extent* extents) {
  for (int written : kernel.results) {
    for (int other = 0; other < static_cast<int>(kernel.buffers.size()); ++other) {
      if (other == written || extents[written].end <= extents[other].begin ||
          extents[other].end <= extents[written].begin) {
        continue;
      }
      return InvalidArgument(kernel.key, ": result ", kernel.buffers[written].name,
                             ": got memory that overlaps ", kernel.buffers[other].name,
                             ", expected memory of its own");
    }
  }
  return ffi::Error::Success();
}

ffi::Error CheckCounts(const Kernel& kernel, size_t args, size_t rets, size_t attrs) {
  if (args != kernel.num_operands) {
    return InvalidArgument(kernel.key, ": got ", args, " operands, expected ", kernel.num_operands);
  }
  if (rets != kernel.results.size()) {
    return InvalidArgument(kernel.key, ": got ", rets, " results, expected ",
                           kernel.results.size());
  }
  size_t expected = 1;
  std::ostringstream names;
  for (const Scalar& scalar : kernel.scalars) {
    if (scalar.kind == Scalar::kNumSms) continue;
    ++expected;
    names << ", " << scalar.name;
  }
  if (attrs > expected) {
    return InvalidArgument(kernel.key, ": got ", attrs, " attributes, expected ", expected,
                           ": kernel", names.str());
  }
  return ffi::Error::Success();
}

}  // namespace

ffi::Error CheckCall(const Kernel& kernel, const ffi::RemainingArgs& args,
                     const ffi::RemainingRets& rets, const ffi::Dictionary& attrs, Call* call) {
  if (ffi::Error error = CheckCounts(kernel, args.size(), rets.size(), attrs.size());
      error.failure()) {
    return error;
  }
  Sizes sizes;
  Extent extents[kMaxBuffers];
  for (size_t i = 0; i < args.size(); ++i) {
    auto buffer = args.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) {
      return InvalidArgument(kernel.key, ": ", kernel.buffers[i].name,
                             ": got an operand that isn't a buffer, expected ",
                             ExpectedShape{kernel.buffers[i]});
    }
    ffi::Error error =
        CheckBuffer(kernel, kernel.buffers[i], *buffer, &sizes, &call->buffers[i], &extents[i]);
    if (error.failure()) return error;
  }
  for (size_t i = 0; i < rets.size(); ++i) {
    const size_t slot = kernel.results[i];
    auto buffer = rets.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) {
      return InvalidArgument(kernel.key, ": ", kernel.buffers[slot].name,
                             ": got a result that isn't a buffer, expected ",
                             ExpectedShape{kernel.buffers[slot]});
    }
    const bool in_place = slot < kernel.num_operands;
    if (in_place && (*buffer)->untyped_data() != call->buffers[slot].data) {
      return InvalidArgument(kernel.key, ": ", kernel.buffers[slot].name,
                             ": got different memory as operand and as result, expected one buffer "
                             "updated in place (input_output_aliases)");
    }
    ffi::Error error = CheckBuffer(kernel, kernel.buffers[slot], **buffer, &sizes,
                                   &call->buffers[slot], &extents[slot]);
    if (error.failure()) return error;
  }
  if (ffi::Error error = CheckRules(kernel, sizes); error.failure()) return error;
  for (size_t i = 0; i < kernel.scalars.size(); ++i) {
    if (kernel.scalars[i].kind == Scalar::kNumSms) continue;
    ffi::Error error = CheckScalar(kernel, kernel.scalars[i], attrs, &sizes, &call->scalars[i]);
    if (error.failure()) return error;
  }
  return CheckOverlaps(kernel, extents);
}

}  // namespace fa4_jax
