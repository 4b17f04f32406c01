// Packs of a parameter as the rounding mode of its row keeps them. A branch chooses the mode at run time: it
// is the same for a whole block, and a kernel per mode would take as long again to compile. No mathematics
// here: rounding.h has it. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <type_traits>

#include "../rounding.h"
#include "device.h"

namespace fw {
namespace {

// whether parameters of a type have a rounding mode
template <class P>
constexpr bool kIsRounded = sizeof(P) == 2;

// moves the elements of an array down and copies others behind the last one
template <class T, int N, class U, int kMore>
FW_DEVICE void append(T (&to)[N], const U (&more)[kMore]) {
  constexpr int kBy = kMore * sizeof(U) < sizeof(T) ? 1 : int(kMore * sizeof(U) / sizeof(T));
  T last[kBy] = {};
  memcpy(last, more, sizeof more < sizeof last ? sizeof more : sizeof last);
  for (int k = 0; k < N - kBy; ++k) to[k] = to[k + kBy];
  for (int k = 0; k < kBy; ++k) to[N - kBy + k] = last[k];
}

// the bits of N elements of 16 bits, in the registers of their values
template <int N, class T>
FW_DEVICE void pack(const T (&from)[N], float (&to)[N]) {
  // otherwise what was in the rest of the registers would be kept alive
  for (int k = 0; k < N; ++k) to[k] = 0.0f;
  memcpy(to, from, sizeof from);
}

// the number of an element in its row, by its address
template <class P>
FW_DEVICE int64_t element_at(const Row& row, const P* param) {
  return param - at<const P>(row.param);
}

// the residue that belongs to a parameter
template <class T, class P>
FW_DEVICE T* residue_of(const Row& row, const P* param) {
  return at<T>(row.residue) + element_at(row, param);
}

// the random bits of N elements of a row from one on, 16 each
template <int N>
FW_DEVICE void draw_bits(const Row& row, const RandomKey& key, int64_t element,
                         uint32_t (&words)[(N + 1) / 2]) {
  static_assert(kDrawn % N == 0, "one counter");
  const bool share =
      N > 1 && is_consecutive(row) && static_cast<uint64_t>(row.first_element + element) % N == 0;
  for (uint32_t& word : words) word = 0;
  // one draw in the code for elements that share a counter and for those that do not. These go from the last
  // one on: the words are shifted, because an index in a loop would put them into local memory.
#pragma unroll 1
  for (int k = share ? 0 : N - 1; k >= 0; --k) {
    const int64_t number = number_of(row, element + k);
    uint32_t drawn[4];
    draw_with(key, number, drawn);
    if (N > 1 && share) {
      for (int w = 0; w < N / 2; ++w)
        words[w] = N < kDrawn && static_cast<uint64_t>(number) % kDrawn ? drawn[w + 2] : drawn[w];
    } else {
      for (int w = (N - 1) / 2; w > 0; --w) words[w] = words[w] << 16 | words[w - 1] >> 16;
      words[0] = words[0] << 16 | bits_among(drawn, number);
    }
  }
}

// Whole packs of 16 bits of each thread in shared memory, which is where an update that rounds takes halves
// of them from: two would need too many registers, and registers have no index.
enum Place { kParamPlace, kResiduePlace, kGradPlace, kStatePlace, kPlaces = kStatePlace + kMaxStates };

FW_DEVICE uint4& staged(int place) {
  __shared__ uint4 packs[kPlaces][kThreads];
  return packs[place][threadIdx.x];
}

template <class T>
FW_DEVICE void stage(int place, const T* from) {
  staged(place) = *global(reinterpret_cast<const uint4*>(from));
}

template <class T>
FW_DEVICE void unstage(int place, T* to) {
  *global(reinterpret_cast<uint4*>(to)) = staged(place);
}

// loads half a pack from element i on, of a staged pack if kStaged
template <bool kStaged, int N, class T>
FW_DEVICE void load_half(int place, const T* from, int64_t i, T (&to)[N]) {
  if constexpr (kStaged && sizeof(T) == 2)
    memcpy(to, reinterpret_cast<const uint2*>(&staged(place)) + i / N % 2, sizeof to);
  else
    load(from + i, to);
}

template <bool kStaged, int N, class T>
FW_DEVICE void store_half(const T (&from)[N], int place, T* to, int64_t i) {
  if constexpr (kStaged && sizeof(T) == 2)
    memcpy(reinterpret_cast<uint2*>(&staged(place)) + i / N % 2, from, sizeof from);
  else
    store(from, to + i);
}

// the values of N elements of a 16-bit parameter in a mode with a residue, whose element i is that of the
// first
template <bool kStaged = false, int N, class P>
FW_DEVICE void load_exact(int32_t rounding, uint64_t residue, int64_t i, const P (&param)[N],
                          float (&value)[N]) {
  if (rounding == kMaster) {
    load(at<const float>(residue) + i, value);
    for (int k = 0; k < N; ++k) value[k] = load_master(param[k], value[k]);
  } else if (rounding == kKahan) {
    BFloat16 compensation[N];
    load_half<kStaged>(kResiduePlace, at<const BFloat16>(residue), i, compensation);
    for (int k = 0; k < N; ++k) value[k] = load_kahan(param[k], compensation[k]);
  } else if constexpr (std::is_same<P, BFloat16>::value) {
    int16_t remainder[N];
    load_half<kStaged>(kResiduePlace, at<const int16_t>(residue), i, remainder);
    for (int k = 0; k < N; ++k) value[k] = load_split(param[k], remainder[k]);
  }
}

// N elements of a parameter in registers, in a mode that is not nearest if kRounds
template <int N, class P, bool kRounds = kIsRounded<P>>
struct ParamPack {
  P value[N];

  template <class Pointers>
  FW_DEVICE void load_from(const Pointers& s, int32_t i) {
    load(s.param + i, value);
  }

  template <class Pointers>
  FW_DEVICE void widen(const Pointers&) {}

  template <class Pointers>
  FW_DEVICE void store_to(const Pointers& s, int32_t i, const Step&, RoundingPass) {
    store(value, s.param + i);
  }
};

// N elements of a 16-bit parameter; those without residues are packed in `value` until widen() and after
// store_to(), which takes half the registers
template <int N, class P>
struct ParamPack<N, P, true> {
  float value[N];

  // waits for what it loads only where there are residues
  template <class Pointers>
  FW_DEVICE void load_from(const Pointers& s, int32_t i) {
    P param[N];
    load_half<Pointers::kStaged>(kParamPlace, s.param, i, param);
    if (has_residue(s.rounding))
      load_exact<Pointers::kStaged>(s.rounding, s.row->residue, element_at(*s.row, s.param + i), param,
                                    value);
    else
      pack(param, value);
  }

  // makes the values those that were loaded or stored
  template <class Pointers>
  FW_DEVICE void widen(const Pointers& s) {
    if (has_residue(s.rounding)) return;
    P param[N];
    memcpy(param, value, sizeof param);
    widen_all(param, value);
  }

  // rounds and stores values in a pass of a step
  template <class Pointers>
  FW_DEVICE void store_to(const Pointers& s, int32_t i, const Step& step, RoundingPass pass) {
    P param[N];
    if (draws_bits(s.rounding)) {
      store_drawn(s, i, RandomKey(*s.row, at<StepDecision>(step.decision)->t, pass), param);
    } else if (s.rounding != kSplit) {
      for (int k = 0; k < N; ++k) narrow(value[k], param[k]);
      if (s.rounding == kMaster) store(value, residue<float>(s) + i);
    } else if constexpr (std::is_same<P, BFloat16>::value) {
      int16_t remainder[N];
      for (int k = 0; k < N; ++k) {
        store_split(value[k], param[k], remainder[k]);
        value[k] = load_split(param[k], remainder[k]);
      }
      store_half<Pointers::kStaged>(remainder, kResiduePlace, residue<int16_t>(s), i);
    }
    store_half<Pointers::kStaged>(param, kParamPlace, s.param, i);
    if (!has_residue(s.rounding)) pack(param, value);
  }

 private:
  template <class T, class Pointers>
  FW_DEVICE static T* residue(const Pointers& s) {
    return residue_of<T>(*s.row, s.param);
  }

  // the modes that draw bits, in a loop over pairs of elements, whose registers and code are those of one
  // pair
  template <class Pointers>
  FW_DEVICE void store_drawn(const Pointers& s, int32_t i, const RandomKey& key, P (&param)[N]) {
    constexpr int kPair = N < 2 ? N : 2, kPairs = N / kPair;
    uint32_t bits[kPairs], params[kPairs] = {}, compensations[kPairs] = {};
    draw_bits<N>(*s.row, key, element_at(*s.row, s.param + i), bits);
#pragma unroll 1
    for (int pair = 0; pair < kPairs; ++pair) {
      P rounded[kPair];
      BFloat16 compensation[kPair] = {};
      float stored[kPair] = {};
      for (int k = 0; k < kPair; ++k) {
        const uint32_t own = (bits[0] >> (16 * k)) & 0xffffu;
        if (s.rounding == kStochastic) {
          round_stochastically(value[k], own, rounded[k]);
        } else {
          const float plain = narrow_to(value[k], rounded[k]);
          compensation[k] = compensation_of<P>(value[k], plain, own);
          stored[k] = load_kahan(rounded[k], compensation[k]);
        }
      }
      for (int k = 0; k + 1 < kPairs; ++k) bits[k] = bits[k + 1];
      append(params, rounded);
      append(compensations, compensation);
      append(value, stored);
    }
    memcpy(param, params, sizeof param);
    if (s.rounding == kStochastic) return;
    BFloat16 half[N];
    memcpy(half, compensations, sizeof half);
    store_half<Pointers::kStaged>(half, kResiduePlace, residue<BFloat16>(s), i);
  }
};

}  // namespace
}  // namespace fw
