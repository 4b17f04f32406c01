// Sixteen-bit storage types: widening to float, and rounding to nearest, ties to even, as torch does.
// Integer arithmetic without branches, so that one source vectorises on every instruction set with the same
// bits. Where kOrdinary, numbers are below the largest finite one, which takes fewer instructions.
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "platform.h"

namespace fw {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FW_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FW_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FW_HOST_DEVICE float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

FW_HOST_DEVICE float widen(Float16 x) {
  uint32_t sign = (x.bits & 0x8000u) << 16;
  uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  // the multiplication moves the exponent bias from 15 to 127 and normalises subnormals on the way
  uint32_t scaled = bits_of(float_of(magnitude) * 0x1p112f);
  uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return float_of(sign | scaled | special);
}

FW_HOST_DEVICE float widen(float x) { return x; }
FW_HOST_DEVICE double widen(double x) { return x; }

// the bits of a number without its sign; with a sign of the integer, which AVX2 compares at once
FW_HOST_DEVICE int32_t magnitude_bits(uint32_t bits) { return static_cast<int32_t>(bits & 0x7fffffffu); }

// the largest finite number of a 16-bit type, as the bits of a float
template <class T>
constexpr int32_t kLargest = 0x7f7f0000;
template <>
constexpr int32_t kLargest<Float16> = 0x477fe000;

// writes the nearest number of 16 bits, and returns it as it would be widened
template <bool kOrdinary = false>
FW_HOST_DEVICE float narrow_to(float x, BFloat16& out) {
  uint32_t bits = bits_of(x);
  uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  bool is_nan = !kOrdinary && magnitude_bits(bits) > 0x7f800000;
  uint32_t nearest = is_nan ? 0x7fc00000u : rounded & 0xffff0000u;
  out.bits = static_cast<uint16_t>(nearest >> 16);
  return float_of(nearest);
}

template <bool kOrdinary = false>
FW_HOST_DEVICE void narrow(float x, BFloat16& out) {
  narrow_to<kOrdinary>(x, out);
}

template <bool kOrdinary = false>
FW_HOST_DEVICE void narrow(float x, Float16& out) {
  uint32_t bits = bits_of(x);
  uint32_t sign = bits & 0x80000000u;
  uint32_t magnitude = bits ^ sign;
  // adding 0.5 leaves a subnormal half in the low bits of the sum, rounded by the adder
  uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  uint32_t half = !kOrdinary && magnitude >= 0x47800000u ? special : finite;
  out.bits = static_cast<uint16_t>(half | (sign >> 16));
}

template <bool kOrdinary = false>
FW_HOST_DEVICE float narrow_to(float x, Float16& out) {
  narrow<kOrdinary>(x, out);
  return widen(out);
}

FW_HOST_DEVICE void narrow(float x, float& out) { out = x; }
FW_HOST_DEVICE void narrow(double x, double& out) { out = x; }

}  // namespace fw
