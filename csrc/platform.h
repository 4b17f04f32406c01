// Host/device markers and fixed-width aliases, for every header that g++ and nvcc both read.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FW_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FW_HOST_DEVICE __attribute__((always_inline)) inline
#endif

namespace fw {
using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

// A pointer that is known to be one to global memory: the device has an instruction for that, and a slower
// one for any memory.
template <class T>
FW_HOST_DEVICE T* global(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// plain sqrt and fabs of <cmath> would widen a float to double
FW_HOST_DEVICE float root(float x) { return sqrtf(x); }
FW_HOST_DEVICE double root(double x) { return sqrt(x); }
FW_HOST_DEVICE float magnitude(float x) { return fabsf(x); }
FW_HOST_DEVICE double magnitude(double x) { return fabs(x); }

// cos(pi x): the device's own needs no memory for the reduction of large arguments
#if defined(__CUDA_ARCH__)
FW_HOST_DEVICE double cos_of_pi(double x) { return cospi(x); }
#else
FW_HOST_DEVICE double cos_of_pi(double x) { return cos(3.141592653589793 * x); }
#endif

// in the type of sums
FW_HOST_DEVICE double widened(float x) { return x; }
FW_HOST_DEVICE double widened(double x) { return x; }

// a * b + c rounded once where the machine has the instruction: written out, and contraction by the compiler
// turned off, so that every machine that has it gives the same bits
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
FW_HOST_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FW_HOST_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
#else
FW_HOST_DEVICE float multiply_add(float a, float b, float c) { return a * b + c; }
FW_HOST_DEVICE double multiply_add(double a, double b, double c) { return a * b + c; }
#endif
}  // namespace fw
