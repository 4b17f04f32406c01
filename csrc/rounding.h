// Rounding of 16-bit parameters and states, and the residues that keep what it drops of parameters, once for
// the CPU and CUDA; reference/rounding.py has the same statements. A mode is a way to load the value of a
// parameter before an update and to store it afterwards; the rules in between are those of any other
// parameter. States of 16 bits are rounded stochastically.
// Stochastic rounding: Gupta et al. 2015, arXiv:1502.02551. Compensation: Kahan 1965; for bfloat16 training
// Zamirai et al. 2020, arXiv:2010.06192. Random bits: Philox, Salmon et al. 2011.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "dtypes.h"
#include "table.h"

namespace fw {

// the value of each is described in reference/rounding.py
enum Rounding : int32_t { kNearest = 0, kStochastic = 1, kKahan = 2, kSplit = 3, kMaster = 4 };
// the passes of a step that round: the update, its states one by one from kStatePass on, and the return to a
// sphere
enum RoundingPass : uint32_t { kUpdatePass = 0, kStatePass = 1, kSpherePass = 8 };

// whether parameters of a mode have a residue, whether it has 16 bits, and whether they need random bits
FW_HOST_DEVICE bool has_residue(int32_t rounding) { return rounding > kStochastic; }
FW_HOST_DEVICE bool has_short_residue(int32_t rounding) { return rounding == kKahan || rounding == kSplit; }
FW_HOST_DEVICE bool draws_bits(int32_t rounding) { return rounding == kStochastic || rounding == kKahan; }
FW_HOST_DEVICE bool has_rounded_states(const Row& row) { return row.state_dtype == kBFloat16; }

// random bits

// 7 rounds pass all tests of BigCrush
constexpr int kPhiloxRounds = 7;
// elements that share the four words of one counter, 16 bits each
constexpr int kDrawn = 8;
// of the second word of a counter; the bits below are those of the element
constexpr int kPassBit = 28;

// what the random bits of a row depend on besides the element
struct RandomKey {
  uint32_t key0, key1, number, step, high;

  // step counts the updates made before this one
  FW_HOST_DEVICE RandomKey(const Row& row, int64_t step, RoundingPass pass)
      : key0(static_cast<uint32_t>(row.seed)),
        key1(static_cast<uint32_t>(row.seed >> 32)),
        number(static_cast<uint32_t>(row.number)),
        step(static_cast<uint32_t>(step)),
        high(static_cast<uint32_t>(pass) << kPassBit) {}
};

// both words of a product
FW_HOST_DEVICE void multiply_words(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

// the rounds of Philox that are left. Words may have types of their own: those of several blocks lie beside
// each other in a vector, and what all of them share is a number.
template <int kLeft, class A, class B, class C, class D, class Word>
FW_HOST_DEVICE void draw_rounds(A a, B b, C c, D d, uint32_t k, uint32_t m, Word (&word)[4]) {
  if constexpr (kLeft == 0) {
    word[0] = a;
    word[1] = b;
    word[2] = c;
    word[3] = d;
  } else {
    A first, low_first;
    C second, low_second;
    multiply_words(a, 0xD2511F53u, first, low_first);
    multiply_words(c, 0xCD9E8D57u, second, low_second);
    draw_rounds<kLeft - 1>(second ^ (b ^ k), low_second, first ^ (d ^ m), low_first, k + 0x9E3779B9u,
                           m + 0xBB67AE85u, word);
  }
}

// the four words of kDrawn elements from number kDrawn * block on, whose low word and high word are given; or
// of several blocks with the same high word
template <class Word>
FW_HOST_DEVICE void draw(const RandomKey& key, Word low, uint32_t high, Word (&word)[4]) {
  draw_rounds<kPhiloxRounds>(low, high | key.high, key.number, key.step, key.key0, key.key1, word);
}

// those that one element of the whole tensor shares
FW_HOST_DEVICE void draw_with(const RandomKey& key, int64_t element, uint32_t (&word)[4]) {
  const uint64_t block = static_cast<uint64_t>(element) / kDrawn;
  draw(key, static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), word);
}

// its own 16 bits among them
FW_HOST_DEVICE uint32_t bits_among(const uint32_t (&word)[4], int64_t element) {
  const int place = static_cast<int>(static_cast<uint64_t>(element) % kDrawn);
  // an index that depends on the element would put the words into local memory of a GPU
  const uint32_t pair = place < 4 ? (place < 2 ? word[0] : word[1]) : (place < 6 ? word[2] : word[3]);
  return (pair >> (16 * (place % 2))) & 0xffffu;
}

// the 16 bits of one element of the whole tensor
FW_HOST_DEVICE uint32_t bits_of_element(const RandomKey& key, int64_t element) {
  uint32_t word[4];
  draw_with(key, element, word);
  return bits_among(word, element);
}

// whether the elements of a row follow one another in the whole tensor
FW_HOST_DEVICE bool is_consecutive(const Row& row) { return row.run == row.numel; }

// the number of an element of a row in the whole tensor
FW_HOST_DEVICE int64_t number_of(const Row& row, int64_t i) {
  if (is_consecutive(row)) return row.first_element + i;
  // without a sign, which takes fewer registers of a GPU
  const int64_t runs = static_cast<int64_t>(static_cast<uint64_t>(i) / static_cast<uint64_t>(row.run));
  return row.first_element + i + runs * (row.run_stride - row.run);
}

// rounding

// a if the condition holds, else b; arithmetic, because gcc turns conditions that depend on one another into
// branches, and vectorises no loop with branches
FW_HOST_DEVICE uint32_t choose(bool condition, uint32_t a, uint32_t b) {
  return b ^ ((a ^ b) & -static_cast<uint32_t>(condition));
}

// a number rounded up in magnitude with the probability of the fraction that is dropped; beyond the largest
// finite number the nearest one, of which a half decides
template <bool kOrdinary = false>
FW_HOST_DEVICE void round_stochastically(float x, uint32_t bits, BFloat16& out) {
  const uint32_t pattern = bits_of(x);
  const int32_t magnitude = magnitude_bits(pattern);
  const bool is_ordinary = kOrdinary || magnitude < kLargest<BFloat16>;
  const bool is_nan = !kOrdinary && magnitude > 0x7f800000;
  const uint32_t rounded = pattern + choose(is_ordinary, bits, 0x8000u);
  // 16 bits last, which vectors pack
  out.bits = static_cast<uint16_t>(choose(is_nan, 0x7fc00000u, rounded) >> 16);
}

template <bool kOrdinary = false>
FW_HOST_DEVICE void round_stochastically(float x, uint32_t bits, Float16& out) {
  const uint32_t pattern = bits_of(x), magnitude = pattern & 0x7fffffffu;
  const bool is_small = magnitude < 0x38800000u;
  // in units of 2^-40, of which the smallest half has 2^16
  const float units = float_of(choose(is_small, magnitude, 0u)) * 0x1p40f;
  const uint32_t small = (static_cast<uint32_t>(static_cast<int32_t>(units)) + bits) >> 16;
  const uint32_t normal = (magnitude - 0x38000000u + (bits & 0x1fffu)) >> 13;
  const uint32_t rounded = choose(is_small, small, normal) | ((pattern & 0x80000000u) >> 16);
  Float16 nearest;
  narrow<kOrdinary>(x, nearest);
  const bool is_ordinary = kOrdinary || static_cast<int32_t>(magnitude) < kLargest<Float16>;
  out.bits = static_cast<uint16_t>(choose(is_ordinary, rounded, nearest.bits));
}

// a value, unless it rounds to another number than the parameter, which was then written from outside
template <bool kOrdinary = false, class P>
FW_HOST_DEVICE float checked_value(float value, P param) {
  P rounded;
  const float plain = widen(param);
  return narrow_to<kOrdinary>(value, rounded) == plain ? value : plain;
}

template <class P>
FW_HOST_DEVICE float compensated(P param, BFloat16 compensation) {
  return widen(param) + widen(compensation);
}

template <class P>
FW_HOST_DEVICE float load_kahan(P param, BFloat16 compensation) {
  return checked_value(compensated(param, compensation), param);
}

// what a parameter of type P, whose value is `plain`, lacks of a value that was rounded to it; rounded
// stochastically, so that updates below its own last digit are not lost either, unless the sum would round to
// another parameter
template <class P, bool kOrdinary = false>
FW_HOST_DEVICE BFloat16 compensation_of(float value, float plain, uint32_t bits) {
  const float lacking = kOrdinary || magnitude(plain) < INFINITY ? value - plain : 0.0f;
  // far below the largest bfloat16
  const uint32_t rounded = (bits_of(lacking) + bits) & 0xffff0000u;
  P sum;
  const bool is_same = bits_of(narrow_to<kOrdinary>(plain + float_of(rounded), sum)) == bits_of(plain);
  BFloat16 kept;
  kept.bits = static_cast<uint16_t>(choose(is_same, rounded, bits_of(lacking)) >> 16);
  return kept;
}

template <class P>
FW_HOST_DEVICE float load_master(P param, float master) {
  return checked_value(master, param);
}

FW_HOST_DEVICE float load_split(BFloat16 param, int16_t remainder) {
  // nothing rounds to 0 from below
  const bool is_zero = static_cast<uint16_t>(param.bits << 1) == 0;
  const int16_t own = is_zero && remainder < 0 ? int16_t{0} : remainder;
  return float_of((static_cast<uint32_t>(param.bits) << 16) + static_cast<uint32_t>(int32_t{own}));
}

// the nearest bfloat16, halves away from 0, and the bits that it lacks
template <bool kOrdinary = false>
FW_HOST_DEVICE void store_split(float value, BFloat16& param, int16_t& remainder) {
  const uint32_t bits = bits_of(value), rounded = (bits + 0x8000u) >> 16;
  const bool is_nan = !kOrdinary && (bits & 0x7fffffffu) > 0x7f800000u;
  param.bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
  remainder = static_cast<int16_t>(is_nan ? 0u : bits - (rounded << 16));
}

}  // namespace fw
