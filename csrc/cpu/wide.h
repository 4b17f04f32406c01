// Neighbouring numbers of a column in one register, for sums in double. The compiler would load a full
// register of floats and convert it by halves, which took 1.7 times as long as converting while loading (Zen
// 3). SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../platform.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// not inlined, because gcc loses __restrict when it inlines the loop into its caller
#define FW_LEAF __attribute__((noinline))

namespace fw {
namespace {

// doubles that a register holds
#if defined(__AVX512F__)
constexpr int kWide = 8;
#elif defined(__AVX__)
constexpr int kWide = 4;
#else
constexpr int kWide = 2;
#endif

template <class C>
struct Wide {
  typedef C Numbers __attribute__((vector_size(kWide * sizeof(C))));
  Numbers numbers;
};

template <class C>
FW_HOST_DEVICE Wide<C> load_wide(const C* from) {
  Wide<C> x;
  memcpy(&x.numbers, from, sizeof x.numbers);
  return x;
}

FW_HOST_DEVICE void store_wide(Wide<double> x, double* to) { memcpy(to, &x.numbers, sizeof x.numbers); }

template <class C>
FW_HOST_DEVICE Wide<C> operator*(Wide<C> a, C b) {
  return {a.numbers * b};
}

FW_HOST_DEVICE Wide<double> operator+(Wide<double> a, Wide<double> b) { return {a.numbers + b.numbers}; }

FW_HOST_DEVICE Wide<double> widened(Wide<double> x) { return x; }
FW_HOST_DEVICE Wide<double> widened(Wide<float> x) {
#if defined(__AVX512F__)
  // the form without a mask makes gcc warn of an uninitialised register
  return {_mm512_maskz_cvtps_pd(0xff, x.numbers)};
#elif defined(__AVX__)
  return {_mm256_cvtps_pd(x.numbers)};
#else
  return {typename Wide<double>::Numbers{x.numbers[0], x.numbers[1]}};
#endif
}

// beside those of single numbers
using fw::multiply_add;

FW_HOST_DEVICE Wide<double> multiply_add(Wide<double> a, Wide<double> b, Wide<double> c) {
  Wide<double> sum;
  for (int i = 0; i < kWide; ++i) sum.numbers[i] = fw::multiply_add(a.numbers[i], b.numbers[i], c.numbers[i]);
  return sum;
}

}  // namespace
}  // namespace fw
