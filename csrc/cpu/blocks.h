// Blocks of a tensor, small enough for the first-level cache, in the type of the arithmetic. Everything here
// has internal linkage, because the CPU kernels are compiled once per instruction set.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../dtypes.h"
#include "../table.h"

// not inlined, because gcc loses __restrict when it inlines the loop into its caller
#define FW_LEAF __attribute__((noinline))

namespace fw {
namespace {

// Elements that a rule takes at a time. A gradient block read for its norm is still in the first-level cache
// when the update reads it, and so is a parameter block when its average does. Blocks are short, so that the
// processor overlaps the sums of one block, which need little memory bandwidth, with the update of another.
constexpr int kBlock = 256;
// independent sums of a reduction, which fix its order
constexpr int kLanes = 16;

// elements of the block that begins `done` elements into a chunk
inline int block_size(const Chunk& chunk, int32_t done) {
  const int32_t left = chunk.count - done;
  return left < kBlock ? left : kBlock;
}

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

template <class T>
void narrow_all(const float* __restrict from, T* __restrict to, int count) {
  for (int i = 0; i < count; ++i) narrow(from[i], to[i]);
}

// writes a widened block back; a column that was updated in place is already up to date
inline void store(float* block, uint64_t column, int32_t dtype, int64_t offset, int count) {
  if (dtype == kBFloat16) narrow_all(block, at<BFloat16>(column) + offset, count);
  if (dtype == kFloat16) narrow_all(block, at<Float16>(column) + offset, count);
}
inline void store(double*, uint64_t, int32_t, int64_t, int) {}

// calls visitor.run with the number of states of a row and the type of its arithmetic as template arguments
template <class Rule, int kStates, class Visitor>
Partial with_states(const Row& row, const Visitor& visitor) {
  if constexpr (kStates < Rule::kMaxStates)
    if (row.n_states > kStates) return with_states<Rule, kStates + 1>(row, visitor);
  if (row.dtype == kFloat64) return visitor.template run<kStates, double>();
  return visitor.template run<kStates, float>();
}

}  // namespace
}  // namespace fw
