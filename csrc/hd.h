// Host/device markers and fixed-width aliases, for every header that g++ and nvcc both read.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FW_HD __host__ __device__ __forceinline__
#else
#define FW_HD __attribute__((always_inline)) inline
#endif

namespace fw {
using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

// plain sqrt of <cmath> would widen a float to double
FW_HD float root(float x) { return sqrtf(x); }
FW_HD double root(double x) { return sqrt(x); }
}  // namespace fw
