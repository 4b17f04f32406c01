// Columns in blocks that stay in the first-level cache, in the type of the arithmetic: for the kernels of the
// CPU, which are compiled once per instruction set and therefore share nothing that has a linkage.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../dtypes.h"
#include "../table.h"

// a leaf of its own keeps what __restrict says, which inlining into the chunk loop would lose
#define FW_LEAF __attribute__((noinline))

#define FW_JOIN_(a, b) a##b
#define FW_JOIN(a, b) FW_JOIN_(a, b)

namespace fw {
namespace {

// elements that pass through a rule at a time: a gradient block read for its norm is still in the first-level
// cache when the update reads it, and so is a parameter block when its average does. Short, so that adding
// norms, which asks little of the memory, and updating, which asks much, overlap in the processor.
constexpr int kBlock = 256;
constexpr int kLanes = 16;

template <class T, class C>
void load_as(const T* __restrict from, C* __restrict to, int count) {
  for (int i = 0; i < count; ++i) to[i] = static_cast<C>(widen(from[i]));
}

// a block of a column in the type of the arithmetic: the column itself, or a widened copy in scratch
template <class C>
C* load(uint64_t column, int32_t dtype, int64_t offset, int count, C* scratch) {
  switch (dtype) {
    case kFloat32:
      if constexpr (sizeof(C) == sizeof(float)) return at<C>(column) + offset;
      load_as(at<float>(column) + offset, scratch, count);
      return scratch;
    case kFloat64:
      if constexpr (sizeof(C) == sizeof(double)) return at<C>(column) + offset;
      load_as(at<double>(column) + offset, scratch, count);
      return scratch;
    case kBFloat16:
      load_as(at<BFloat16>(column) + offset, scratch, count);
      return scratch;
    default:
      load_as(at<Float16>(column) + offset, scratch, count);
      return scratch;
  }
}

}  // namespace
}  // namespace fw
