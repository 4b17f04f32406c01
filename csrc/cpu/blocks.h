// Blocks of a tensor, small enough for the first-level cache, in the type of the arithmetic. Everything here
// has internal linkage, because the CPU kernels are compiled once per instruction set.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <type_traits>

#include "../dtypes.h"
#include "../rounding.h"
#include "../table.h"
#include "random_bits.h"
#include "wide.h"

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
  for (int i = widen_wide(from, to, count); i < count; ++i) to[i] = static_cast<C>(widen(from[i]));
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

// Whether all numbers that went by are ordinary ones of a 16-bit type. The loops below convert a block as if
// it had no others, which takes fewer instructions, and check it on the way.
template <class P>
struct OrdinaryCheck {
  int32_t largest = 0;

  FW_HOST_DEVICE void add(float x) {
    const int32_t magnitude = magnitude_bits(bits_of(x));
    largest = magnitude > largest ? magnitude : largest;
  }
  FW_HOST_DEVICE bool passed() const { return largest < kLargest<P>; }
};

// calls a loop over a block for ordinary numbers, and where it returns false for those of any kind
template <class Loop>
void convert(const Loop& loop) {
  if (!loop(std::true_type())) loop(std::false_type());
}

template <bool kOrdinary, class P>
FW_LEAF bool narrow_all(const float* __restrict from, P* __restrict to, int count) {
  OrdinaryCheck<P> check;
  for (int i = narrow_wide(from, to, count); i < count; ++i) {
    check.add(from[i]);
    narrow<kOrdinary>(from[i], to[i]);
  }
  return check.passed();
}

template <bool kOrdinary, class P>
FW_LEAF bool load_kahan_all(const P* __restrict param, const BFloat16* __restrict compensation,
                            float* __restrict to, int count) {
  OrdinaryCheck<P> check;
  for (int i = 0; i < count; ++i) {
    const float value = compensated(param[i], compensation[i]);
    check.add(value);
    to[i] = checked_value<kOrdinary>(value, param[i]);
  }
  return check.passed();
}

inline FW_LEAF void load_split_all(const BFloat16* __restrict param, const int16_t* __restrict remainder,
                                   float* __restrict to, int count) {
  for (int i = 0; i < count; ++i) to[i] = load_split(param[i], remainder[i]);
}

template <bool kOrdinary, class P>
FW_LEAF bool load_master_all(const P* __restrict param, const float* __restrict master, float* __restrict to,
                             int count) {
  OrdinaryCheck<P> check;
  for (int i = 0; i < count; ++i) {
    check.add(master[i]);
    to[i] = checked_value<kOrdinary>(master[i], param[i]);
  }
  return check.passed();
}

template <bool kOrdinary, class P>
FW_LEAF bool round_all(const float* __restrict from, const uint16_t* __restrict bits, P* __restrict to,
                       int count) {
  OrdinaryCheck<P> check;
  for (int i = 0; i < count; ++i) {
    P rounded;
    check.add(from[i]);
    round_stochastically<kOrdinary>(from[i], bits[i], rounded);
    to[i] = rounded;
  }
  return check.passed();
}

template <bool kOrdinary, class P>
FW_LEAF bool store_kahan_all(const float* __restrict from, const uint16_t* __restrict bits,
                             P* __restrict param, BFloat16* __restrict compensation, int count) {
  OrdinaryCheck<P> check;
  for (int i = 0; i < count; ++i) {
    P rounded;
    check.add(from[i]);
    const float plain = narrow_to<kOrdinary>(from[i], rounded);
    compensation[i] = compensation_of<P, kOrdinary>(from[i], plain, bits[i]);
    param[i] = rounded;
  }
  return check.passed();
}

template <bool kOrdinary>
FW_LEAF bool store_split_all(const float* __restrict from, BFloat16* __restrict param,
                             int16_t* __restrict remainder, int count) {
  OrdinaryCheck<BFloat16> check;
  for (int i = 0; i < count; ++i) {
    check.add(from[i]);
    store_split<kOrdinary>(from[i], param[i], remainder[i]);
  }
  return check.passed();
}

template <class P>
void load_exact(const Row& row, int64_t offset, int count, float* scratch) {
  const P* param = at<P>(row.param) + offset;
  if (row.rounding == kKahan)
    return convert([&](auto ordinary) {
      return load_kahan_all<ordinary>(param, at<BFloat16>(row.residue) + offset, scratch, count);
    });
  if (row.rounding == kMaster)
    return convert([&](auto ordinary) {
      return load_master_all<ordinary>(param, at<float>(row.residue) + offset, scratch, count);
    });
  if constexpr (std::is_same_v<P, BFloat16>)
    load_split_all(param, at<int16_t>(row.residue) + offset, scratch, count);
}

// a block of the values of a parameter: with the residue that its rounding mode keeps
template <class C>
C* load_param(const Row& row, int64_t offset, int count, C* scratch) {
  if constexpr (sizeof(C) == sizeof(float)) {
    if (has_residue(row.rounding)) {
      if (row.dtype == kBFloat16)
        load_exact<BFloat16>(row, offset, count, scratch);
      else
        load_exact<Float16>(row, offset, count, scratch);
      return scratch;
    }
  }
  return load<C>(row.param, row.dtype, offset, count, scratch);
}

template <class P>
void store_rounded(const float* block, const Row& row, const RandomKey& key, int64_t offset, int count) {
  P* param = at<P>(row.param) + offset;
  RandomBits<kBlock> random;
  const uint16_t* bits = draws_bits(row.rounding) ? random.draw(row, key, offset, count) : nullptr;
  if (row.rounding == kStochastic)
    return convert([&](auto ordinary) { return round_all<ordinary>(block, bits, param, count); });
  if (row.rounding == kKahan)
    return convert([&](auto ordinary) {
      return store_kahan_all<ordinary>(block, bits, param, at<BFloat16>(row.residue) + offset, count);
    });
  if constexpr (std::is_same_v<P, BFloat16>)
    if (row.rounding == kSplit)
      return convert([&](auto ordinary) {
        return store_split_all<ordinary>(block, param, at<int16_t>(row.residue) + offset, count);
      });
  convert([&](auto ordinary) { return narrow_all<ordinary>(block, param, count); });
  if (row.rounding == kMaster) memcpy(at<float>(row.residue) + offset, block, count * sizeof(float));
}

// writes a block of values back; a column that was updated in place is already up to date
inline void store_param(const float* block, const Row& row, const RandomKey& key, int64_t offset, int count) {
  if (row.dtype == kBFloat16) store_rounded<BFloat16>(block, row, key, offset, count);
  if (row.dtype == kFloat16) store_rounded<Float16>(block, row, key, offset, count);
}
inline void store_param(const double*, const Row&, const RandomKey&, int64_t, int) {}

// blocks of the states of a row in the type of the arithmetic: their columns themselves, or widened copies of
// those that are rounded
template <int kStates, class C>
struct StateBlocks {
  C* state[kMaxStates];
  alignas(64) C scratch[kStates > 0 ? kStates : 1][kBlock];

  void load(const Row& row, int64_t offset, int count) {
    const uint64_t columns[kMaxStates] = {row.state0, row.state1, row.state2};
    for (int k = 0; k < kMaxStates; ++k)
      state[k] = k < kStates ? fw::load<C>(columns[k], row.state_dtype, offset, count, scratch[k]) : nullptr;
  }

  // rounds and writes what an update has changed; states that were updated in place are already up to date
  void store(const Row& row, int64_t step, int64_t offset, int count) const {
    if (!has_rounded_states(row)) return;
    if constexpr (sizeof(C) == sizeof(float)) {
      const uint64_t columns[kMaxStates] = {row.state0, row.state1, row.state2};
      RandomBits<kBlock> random;
      for (int k = 0; k < kStates; ++k) {
        const RandomKey key(row, step, static_cast<RoundingPass>(kStatePass + k));
        const uint16_t* bits = random.draw(row, key, offset, count);
        BFloat16* to = at<BFloat16>(columns[k]) + offset;
        convert([&](auto ordinary) { return round_all<ordinary>(state[k], bits, to, count); });
      }
    }
  }
};

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
