// Packs of the states of a row, in the type of the arithmetic or rounded stochastically to bfloat16. A branch
// chooses at run time, as it does among the rounding modes of parameters. No mathematics here: rounding.h has
// it. SPDX-License-Identifier: Apache-2.0
#pragma once
#include "params.cuh"

namespace fw {
namespace {

template <class T>
FW_DEVICE T* column(uint64_t address, int64_t offset) {
  return address ? at<T>(address) + offset : nullptr;
}

// whether states beside parameters of a type, or in a type of arithmetic, may be rounded
template <class T>
constexpr bool kMayRoundStates = sizeof(T) < sizeof(double);

// the states of one row from an element on; null for those that the row does not have
template <class C>
struct StatePointers {
  // of BFloat16 if rounded
  C *state0, *state1, *state2;
  bool rounded;

  // rounds: whether any states may be rounded, a constant of the kernel
  FW_DEVICE StatePointers(const Row& row, int64_t offset, bool rounds)
      : rounded(kMayRoundStates<C> && rounds && has_rounded_states(row)) {
    state0 = state(row.state0, offset);
    state1 = state(row.state1, offset);
    state2 = state(row.state2, offset);
  }

 private:
  FW_DEVICE C* state(uint64_t address, int64_t offset) const {
    return rounded ? reinterpret_cast<C*>(column<BFloat16>(address, offset)) : column<C>(address, offset);
  }
};

// N elements of each state in registers, of states that may be rounded if kRounds
template <int kStates, int N, class C, bool kRounds = kMayRoundStates<C>>
struct StatePack {
  C state0[N], state1[N], state2[N];

  template <class Pointers>
  FW_DEVICE void load_from(const Pointers& s, int32_t i) {
    if constexpr (kStates > 0) load(s.states.state0 + i, state0);
    if constexpr (kStates > 1) load(s.states.state1 + i, state1);
    if constexpr (kStates > 2) load(s.states.state2 + i, state2);
  }

  template <class Pointers>
  FW_DEVICE void widen(const Pointers&) {}

  // the states of an element; those that the row does not have are left alone
  FW_DEVICE void read(int k, C (&state)[kMaxStates]) const {
    if constexpr (kStates > 0) state[0] = state0[k];
    if constexpr (kStates > 1) state[1] = state1[k];
    if constexpr (kStates > 2) state[2] = state2[k];
  }
  FW_DEVICE void write(int k, const C (&state)[kMaxStates]) {
    if constexpr (kStates > 0) state0[k] = state[0];
    if constexpr (kStates > 1) state1[k] = state[1];
    if constexpr (kStates > 2) state2[k] = state[2];
  }

  template <class Pointers>
  FW_DEVICE void draw(const Pointers&, int32_t, const Step&) {}

  template <class Pointers>
  FW_DEVICE void round(const Pointers&) {}

  template <class Pointers>
  FW_DEVICE void store_to(const Pointers& s, int32_t i) const {
    if constexpr (kStates > 0) store(state0, s.states.state0 + i);
    if constexpr (kStates > 1) store(state1, s.states.state1 + i);
    if constexpr (kStates > 2) store(state2, s.states.state2 + i);
  }
};

// states of bfloat16 are packed until widen(), so that nothing waits for one load before the next one is
// issued
template <int kStates, int N>
struct StatePack<kStates, N, float, true> : StatePack<kStates, N, float, false> {
  using Plain = StatePack<kStates, N, float, false>;
  using Plain::state0, Plain::state1, Plain::state2;

  template <class Pointers>
  FW_DEVICE void load_from(const Pointers& s, int32_t i) {
    if (!s.states.rounded) return Plain::load_from(s, i);
    if constexpr (kStates > 0) load_packed<Pointers::kStaged>(kStatePlace + 0, s.states.state0, i, state0);
    if constexpr (kStates > 1) load_packed<Pointers::kStaged>(kStatePlace + 1, s.states.state1, i, state1);
    if constexpr (kStates > 2) load_packed<Pointers::kStaged>(kStatePlace + 2, s.states.state2, i, state2);
  }

  // makes the values those that were loaded
  template <class Pointers>
  FW_DEVICE void widen(const Pointers& s) {
    if (!s.states.rounded) return;
    if constexpr (kStates > 0) widen_packed(state0);
    if constexpr (kStates > 1) widen_packed(state1);
    if constexpr (kStates > 2) widen_packed(state2);
  }

  // draws the bits for round(); an update does so before it loads, because a draw takes many registers
  template <class Pointers>
  FW_DEVICE void draw(const Pointers& s, int32_t i, const Step& step) {
    if (!s.states.rounded) return;
    const int64_t t = at<StepDecision>(step.decision)->t, element = element_at(*s.row, s.param + i);
    // one draw in the code: after the last one all bits are in their places
#pragma unroll 1
    for (int pass = kStatePass; pass < kStatePass + kStates; ++pass) {
      memcpy(bits0, bits1, sizeof bits0);
      memcpy(bits1, bits2, sizeof bits1);
      draw_bits<N>(*s.row, RandomKey(*s.row, t, static_cast<RoundingPass>(pass)), element, bits2);
    }
  }

  // makes the values those that store_to() stores without rounding
  template <class Pointers>
  FW_DEVICE void round(const Pointers& s) {
    if (!s.states.rounded) return;
    if constexpr (kStates > 0) round_all(state0, kStates == 1 ? bits2 : kStates == 2 ? bits1 : bits0);
    if constexpr (kStates > 1) round_all(state1, kStates == 2 ? bits2 : bits1);
    if constexpr (kStates > 2) round_all(state2, bits2);
  }

  template <class Pointers>
  FW_DEVICE void store_to(const Pointers& s, int32_t i) const {
    if (!s.states.rounded) return Plain::store_to(s, i);
    if constexpr (kStates > 0) store_packed<Pointers::kStaged>(state0, kStatePlace + 0, s.states.state0, i);
    if constexpr (kStates > 1) store_packed<Pointers::kStaged>(state1, kStatePlace + 1, s.states.state1, i);
    if constexpr (kStates > 2) store_packed<Pointers::kStaged>(state2, kStatePlace + 2, s.states.state2, i);
  }

 private:
  // 16 for each element; those of the last state are bits2
  using Bits = uint32_t[(N + 1) / 2];
  Bits bits0 = {}, bits1 = {}, bits2 = {};

  template <bool kStaged>
  FW_DEVICE static void load_packed(int place, const float* from, int32_t i, float (&to)[N]) {
    BFloat16 packed[N];
    load_half<kStaged>(place, reinterpret_cast<const BFloat16*>(from), i, packed);
    pack(packed, to);
  }

  FW_DEVICE static void widen_packed(float (&value)[N]) {
    BFloat16 packed[N];
    memcpy(packed, value, sizeof packed);
    widen_all(packed, value);
  }

  template <bool kStaged>
  FW_DEVICE static void store_packed(const float (&from)[N], int place, float* to, int32_t i) {
    BFloat16 packed[N];
#pragma unroll
    for (int k = 0; k < N; ++k) packed[k].bits = static_cast<uint16_t>(bits_of(from[k]) >> 16);
    store_half<kStaged>(packed, place, reinterpret_cast<BFloat16*>(to), i);
  }

  FW_DEVICE static void round_all(float (&value)[N], const Bits& bits) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      BFloat16 rounded;
      round_stochastically(value[k], (bits[k / 2] >> (16 * (k % 2))) & 0xffffu, rounded);
      value[k] = fw::widen(rounded);
    }
  }
};

}  // namespace
}  // namespace fw
