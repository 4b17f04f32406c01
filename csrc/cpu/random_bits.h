// Random bits of a block of elements, several counters at a time.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../rounding.h"
#include "../table.h"
#include "wide.h"

namespace fw {
namespace {

// Words of neighbouring counters in the low halves of 64-bit lanes, which is what a product of words takes;
// the high halves may hold anything. Two registers, because the rounds of one wait for each other.
struct Words {
  typedef uint64_t Lanes __attribute__((vector_size(kWide * sizeof(uint64_t))));
  static constexpr int kRegisters = 2;
  static constexpr int kCounters = kRegisters * kWide;
  Lanes lanes[kRegisters];
};

FW_HOST_DEVICE Words operator^(Words a, uint32_t b) {
  for (auto& lanes : a.lanes) lanes ^= uint64_t{b};
  return a;
}

FW_HOST_DEVICE Words operator^(uint32_t a, Words b) { return b ^ a; }

FW_HOST_DEVICE Words operator^(Words a, Words b) {
  for (int r = 0; r < Words::kRegisters; ++r) a.lanes[r] ^= b.lanes[r];
  return a;
}

FW_HOST_DEVICE Words operator>>(Words a, int bits) {
  for (auto& lanes : a.lanes) lanes >>= bits;
  return a;
}

// products of the low halves of lanes
FW_HOST_DEVICE Words::Lanes multiply_halves(Words::Lanes a, uint32_t b) {
  const Words::Lanes other = Words::Lanes{} + uint64_t{b};
#if defined(__AVX512F__)
  return (Words::Lanes)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)other);
#elif defined(__AVX2__)
  return (Words::Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)other);
#elif defined(__SSE2__)
  return (Words::Lanes)_mm_mul_epu32((__m128i)a, (__m128i)other);
#else
  return (a & uint64_t{0xffffffffu}) * other;
#endif
}

FW_HOST_DEVICE void multiply_words(Words a, uint32_t b, Words& high, Words& low) {
  for (int r = 0; r < Words::kRegisters; ++r) low.lanes[r] = multiply_halves(a.lanes[r], b);
  high = low >> 32;
}

// Interleaves lanes as every instruction set does: `even` has the first lanes of each 128 bits of a and b,
// `odd` the second ones.
inline void interleave(Words::Lanes a, Words::Lanes b, Words::Lanes& even, Words::Lanes& odd) {
#if defined(__AVX512F__)
  even = (Words::Lanes)_mm512_maskz_unpacklo_epi64(0xff, (__m512i)a, (__m512i)b);
  odd = (Words::Lanes)_mm512_maskz_unpackhi_epi64(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  even = (Words::Lanes)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
  odd = (Words::Lanes)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
  for (int i = 0; i < kWide; ++i) {
    even[i] = i % 2 ? b[i - 1] : a[i];
    odd[i] = i % 2 ? b[i] : a[i + 1];
  }
#endif
}

// the lane of a counter, so that interleaved words are in the order of the counters
constexpr int lane_of(int counter) { return counter % (kWide / 2) * 2 + counter / (kWide / 2); }

// writes the words of counters one after the other
inline void store_words(const Words (&word)[4], uint16_t* to) {
  const Words::Lanes half = Words::Lanes{} + uint64_t{0xffffffffu};
  for (int r = 0; r < Words::kRegisters; ++r) {
    const Words::Lanes first = (word[0].lanes[r] & half) | (word[1].lanes[r] << 32);
    const Words::Lanes last = (word[2].lanes[r] & half) | (word[3].lanes[r] << 32);
    Words::Lanes pairs[2];
    interleave(first, last, pairs[0], pairs[1]);
    memcpy(to + r * kWide * kDrawn, pairs, sizeof pairs);
  }
}

// the bits of `count` counters from `first` on, and of up to Words::kCounters - 1 more; all with one high
// word
inline FW_LEAF void draw_counters(uint16_t* __restrict bits, const RandomKey& key, uint64_t first,
                                  int count) {
  const RandomKey k = key;
  const uint32_t high = static_cast<uint32_t>(first >> 32);
  Words block;
  for (int r = 0; r < Words::kRegisters; ++r)
    for (int i = 0; i < kWide; ++i) block.lanes[r][lane_of(i)] = first + r * kWide + i;
  for (int i = 0; i < count; i += Words::kCounters) {
    Words word[4];
    fw::draw(k, block, high, word);
    store_words(word, bits + i * kDrawn);
    for (auto& lanes : block.lanes) lanes += uint64_t{Words::kCounters};
  }
}

// of the number of the counter of an element
inline int64_t high_word(int64_t element) { return element / kDrawn >> 32; }

// the random bits of a block of up to kSize elements, which begins anywhere among the kDrawn of a counter
template <int kSize>
struct RandomBits {
  alignas(64) uint16_t bits[(kSize / kDrawn + 1 + Words::kCounters) * kDrawn];

  // draws those of `count` elements of a row from `offset` on, and returns them
  const uint16_t* draw(const Row& row, const RandomKey& key, int64_t offset, int count) {
    const int64_t first = row.first_element + offset;
    if (!is_consecutive(row) || high_word(first) != high_word(first + count - 1)) {
      for (int i = 0; i < count; ++i)
        bits[i] = static_cast<uint16_t>(bits_of_element(key, number_of(row, offset + i)));
      return bits;
    }
    const int before = static_cast<int>(first % kDrawn);
    draw_counters(bits, key, first / kDrawn, (before + count + kDrawn - 1) / kDrawn);
    return bits + before;
  }
};

}  // namespace
}  // namespace fw
