// Host/device markers, fixed-width integers and elementary functions, for every header that g++ and nvcc both
// read.
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

#define FW_JOIN_(a, b) a##b
#define FW_JOIN(a, b) FW_JOIN_(a, b)
#define FW_TEXT_(a) #a
#define FW_TEXT(a) FW_TEXT_(a)

namespace fw {
using std::int16_t;
using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

// tells nvcc that a pointer is one to global memory, so that it emits ld.global instead of a generic load
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

// cos(pi x); cospi() of the device needs no local memory for the reduction of large arguments
#if defined(__CUDA_ARCH__)
FW_HOST_DEVICE double cos_of_pi(double x) { return cospi(x); }
#else
FW_HOST_DEVICE double cos_of_pi(double x) { return cos(3.141592653589793 * x); }
#endif

// converts to the type of sums
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
