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

FW_HOST_DEVICE Words operator|(Words a, uint32_t b) {
  for (auto& lanes : a.lanes) lanes |= uint64_t{b};
  return a;
}

FW_HOST_DEVICE Words operator^(Words a, uint32_t b) {
  for (auto& lanes : a.lanes) lanes ^= uint64_t{b};
  return a;
}

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

// writes the words of counters one after the other
inline void store_words(const Words (&word)[4], uint16_t* to) {
  for (int r = 0; r < Words::kRegisters; ++r) {
    const uint64_t half = 0xffffffffu;
    const Words::Lanes first = (word[0].lanes[r] & half) | (word[1].lanes[r] << 32);
    const Words::Lanes last = (word[2].lanes[r] & half) | (word[3].lanes[r] << 32);
    for (int i = 0; i < kWide; ++i) {
      const uint64_t pair[2] = {first[i], last[i]};
      memcpy(to + (r * kWide + i) * kDrawn, pair, sizeof pair);
    }
  }
}

// the bits of `count` counters from `first` on, and of up to Words::kCounters - 1 more
inline FW_LEAF void draw_counters(uint16_t* __restrict bits, const RandomKey& key, uint64_t first,
                                  int count) {
  const RandomKey k = key;
  Words block;
  for (int r = 0; r < Words::kRegisters; ++r)
    for (int i = 0; i < kWide; ++i) block.lanes[r][i] = first + r * kWide + i;
  for (int i = 0; i < count; i += Words::kCounters) {
    Words word[4];
    fw::draw(k, block, block >> 32, word);
    store_words(word, bits + i * kDrawn);
    for (auto& lanes : block.lanes) lanes += uint64_t{Words::kCounters};
  }
}

// the random bits of a block of up to kSize elements, which begins anywhere among the kDrawn of a counter
template <int kSize>
struct RandomBits {
  alignas(64) uint16_t bits[(kSize / kDrawn + 1 + Words::kCounters) * kDrawn];

  // draws those of `count` elements of a row from `offset` on, and returns them
  const uint16_t* draw(const Row& row, const RandomKey& key, int64_t offset, int count) {
    if (!is_consecutive(row)) {
      for (int i = 0; i < count; ++i)
        bits[i] = static_cast<uint16_t>(bits_of_element(key, number_of(row, offset + i)));
      return bits;
    }
    const int64_t first = row.first_element + offset;
    const int before = static_cast<int>(first % kDrawn);
    draw_counters(bits, key, first / kDrawn, (before + count + kDrawn - 1) / kDrawn);
    return bits + before;
  }
};

}  // namespace
}  // namespace fw
