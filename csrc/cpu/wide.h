// Neighbouring numbers of a column in one register, for what the compiler does not make of loops: sums in
// double, for which it would load a full register of floats and convert it by halves, which took 1.7 times as
// long as converting while loading (Zen 3); and conversions of float16.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "../dtypes.h"

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

// Conversions that the compiler makes no vectors of. Each converts the first numbers of a column, as many as
// registers of eight hold where the machine has the instruction, and returns how many; with the bits of
// widen() and narrow(), but for signalling NaNs, which it makes quiet.
template <class T, class C>
FW_HOST_DEVICE int widen_wide(const T*, C*, int) {
  return 0;
}

template <class T>
FW_HOST_DEVICE int narrow_wide(const float*, T*, int) {
  return 0;
}

#if defined(__F16C__)
inline int widen_wide(const Float16* from, float* to, int count) {
  int i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  return i;
}

inline int narrow_wide(const float* from, Float16* to, int count) {
  int i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 x = _mm256_loadu_ps(from + i);
    // of a NaN its sign is kept alone
    const __m256 nan = _mm256_or_ps(_mm256_and_ps(x, _mm256_set1_ps(-0.0f)), _mm256_set1_ps(NAN));
    const __m256 quiet = _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(quiet, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  return i;
}
#endif

}  // namespace
}  // namespace fw
