// What the C++ made of PTX by translate.py runs on: the memories, exchanges and numbers of a GPU, on one
// core. The threads of a block are fibers. Found and reported, each by the line of the PTX: barriers and
// shuffles that not all threads come to, races of shared and global memory, shared memory that nobody wrote,
// and accesses without alignment or outside of variables and parameters. SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define PTX_INLINE [[gnu::always_inline]] inline

namespace ptx {

// as in translate.py
constexpr uint64_t kLocalBegin = 0x1000, kLocalEnd = 0x3000, kSharedBegin = 0x10000, kSharedEnd = 0x200000;

struct Variable {
  uint64_t begin, end;
  const char* name;
};

struct Thread;

// a kernel and what its PTX declares
struct Entry {
  const char* name;
  void (*kernel)(Thread&);
  unsigned max_threads;
  const unsigned* sizes;
  unsigned n_params;
  const Variable* shared;
  unsigned n_shared, shared_bytes;
};

struct Block;

// the part of a thread that translated code reads and writes
struct Thread {
  Block* block;
  unsigned index;
  unsigned char local[kLocalEnd - kLocalBegin];
};

// the part of a block that translated code reads; params holds addresses of the arguments
struct Block {
  const Entry* entry;
  unsigned char* const* params;
  unsigned index, n_blocks, n_threads;
  unsigned char* shared;
};

// raw: a parameter of a call inside a kernel, which the caller holds as a variable
enum Space { kGlobal, kShared, kParam, kLocal, kGeneric, kRaw };

// whether races of global memory are looked for
extern bool watches_global;

// machine.cpp: these end the launch if they find something
[[noreturn]] void fail(Thread&, int line, const char* what, uint64_t address = 0, uint64_t size = 0);
// checks an access, and returns where the bytes lie on the host; value is what a plain store brings
void* reach(Thread&, Space, uint64_t address, unsigned size, bool write, bool is_atomic, const void* value,
            int line);
void barrier(Thread&, int line);
void warp_barrier(Thread&, int line);
void fence(Thread&, int line);
// synchronizes with those that used the same place, as far as fences allow; strong has fences of its own
void before_atomic(Thread&, Space, uint64_t address, bool strong, int line);
// the value that another lane of the warp brings to the same shuffle
uint32_t exchange(Thread&, uint32_t value, uint32_t lane, uint32_t mask, int line);

PTX_INLINE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
PTX_INLINE double as_double(uint64_t bits) {
  double x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
PTX_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof x);
  return bits;
}
PTX_INLINE uint64_t bits_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof x);
  return bits;
}

// whether an access needs no other check
template <Space space>
PTX_INLINE bool is_plain(uint64_t address, unsigned size) {
  return space == kRaw ||
         (space == kGlobal && !watches_global && address >= kSharedEnd && address % size == 0);
}
template <Space space, class T, int N>
inline void load(Thread& t, uint64_t address, T (&to)[N], int line) {
  const void* from = reinterpret_cast<void*>(address);
  if (!is_plain<space>(address, sizeof to))
    from = reach(t, space, address, sizeof to, false, false, nullptr, line);
  memcpy(to, from, sizeof to);
}
template <Space space, class T, int N>
inline void store(Thread& t, uint64_t address, const T (&from)[N], int line) {
  void* to = reinterpret_cast<void*>(address);
  if (!is_plain<space>(address, sizeof from))
    to = reach(t, space, address, sizeof from, true, false, from, line);
  memcpy(to, from, sizeof from);
}
template <Space space, class T, class F>
inline T atomic(Thread& t, uint64_t address, T operand, F function, bool strong, int line) {
  before_atomic(t, space, address, strong, line);
  void* place = reach(t, space, address, sizeof(T), true, true, nullptr, line);
  T before, after;
  memcpy(&before, place, sizeof before);
  after = function(before, operand);
  memcpy(place, &after, sizeof after);
  return before;
}

struct Shuffled {
  uint32_t value;
  bool valid;
};
// where a lane takes its value from, by the definition of shfl.sync; bounds holds the segment and the last
// lane
inline Shuffled shuffle(Thread& t, uint32_t value, int from, bool valid, uint32_t mask, int line) {
  return {exchange(t, value, valid ? uint32_t(from) : t.index % 32, mask, line), valid};
}
inline int first_lane(const Thread& t, uint32_t bounds) { return int(t.index % 32 & bounds >> 8 & 31); }
inline int last_lane(const Thread& t, uint32_t bounds) {
  return first_lane(t, bounds) | int(bounds & 31 & ~(bounds >> 8));
}
inline Shuffled shuffle_up(Thread& t, uint32_t x, uint32_t by, uint32_t bounds, uint32_t mask, int line) {
  const int from = int(t.index % 32) - int(by & 31);
  return shuffle(t, x, from, from >= last_lane(t, bounds), mask, line);
}
inline Shuffled shuffle_down(Thread& t, uint32_t x, uint32_t by, uint32_t bounds, uint32_t mask, int line) {
  const int from = int(t.index % 32 + (by & 31));
  return shuffle(t, x, from, from <= last_lane(t, bounds), mask, line);
}
inline Shuffled shuffle_bfly(Thread& t, uint32_t x, uint32_t by, uint32_t bounds, uint32_t mask, int line) {
  const int from = int(t.index % 32 ^ (by & 31));
  return shuffle(t, x, from, from <= last_lane(t, bounds), mask, line);
}
inline Shuffled shuffle_idx(Thread& t, uint32_t x, uint32_t lane, uint32_t bounds, uint32_t mask, int line) {
  const int from = first_lane(t, bounds) | int(lane & 31 & ~(bounds >> 8));
  return shuffle(t, x, from, from <= last_lane(t, bounds), mask, line);
}
template <class T, class F>
inline T reduce_warp(Thread& t, T value, uint32_t mask, F function, int line) {
  static_assert(sizeof(T) == 4, "a register of 32 bits");
  for (uint32_t distance = 16; distance > 0; distance /= 2)
    value = function(value, T(shuffle_bfly(t, uint32_t(value), distance, 31, mask, line).value));
  return value;
}

template <class T>
PTX_INLINE T shift_left(T x, uint32_t by) {
  return by < 8 * sizeof(T) ? T(x << by) : T(0);
}
template <class T>
PTX_INLINE T shift_right(T x, uint32_t by) {
  if (by >= 8 * sizeof(T)) return x < T(0) ? T(-1) : T(0);
  return T(x >> by);
}
template <class T>
inline T high_half(T x, T y) {
  using Wide = __int128;
  return T(Wide(x) * Wide(y) >> 8 * sizeof(T));
}
template <class T>
inline uint32_t leading_zeros(T x) {
  constexpr int kBits = 8 * sizeof(T);
  return x ? uint32_t(__builtin_clzll(uint64_t(x) << (64 - kBits))) : kBits;
}
template <class T>
inline T quotient(Thread& t, T x, T y, int line) {
  if (y == 0) fail(t, line, "division by zero");
  return y == T(-1) && T(-1) < T(0) ? T(0 - x) : T(x / y);
}
template <class T>
inline T rest(Thread& t, T x, T y, int line) {
  if (y == 0) fail(t, line, "division by zero");
  return y == T(-1) && T(-1) < T(0) ? T(0) : T(x % y);
}
inline uint32_t permute_bytes(uint32_t x, uint32_t y, uint32_t choice) {
  const uint64_t all = x | uint64_t(y) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t chosen = choice >> 4 * i & 15, byte = uint32_t(all >> 8 * (chosen & 7)) & 255;
    // the highest bit of the choice repeats the sign of the byte
    result |= (chosen & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
  }
  return result;
}
template <class T>
inline T bit_field(T x, uint32_t begin, uint32_t count) {
  static_assert(T(-1) > T(0), "without a sign to extend");
  begin &= 255, count &= 255;
  const T mask = count < 8 * sizeof(T) ? T((T(1) << count) - 1) : T(-1);
  return begin < 8 * sizeof(T) ? T(x >> begin & mask) : T(0);
}
inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t by) {
  return uint32_t((uint64_t(high) << 32 | low) << (by & 31) >> 32);
}
inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t by) {
  return uint32_t((uint64_t(high) << 32 | low) >> (by & 31));
}
// bit i of the table is the result where the bits of x, y and z spell i
inline uint32_t any_logic(uint32_t x, uint32_t y, uint32_t z, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? x : ~x) & (i & 2 ? y : ~y) & (i & 1 ? z : ~z);
  return result;
}

// an integral number, or the nearest one that the type has; zero for NaN
template <class T>
inline T saturated(double x) {
  constexpr bool kSigned = T(-1) < T(0);
  const double end = std::ldexp(1.0, 8 * sizeof(T) - kSigned);
  const T least = kSigned ? T(T(1) << (8 * sizeof(T) - 1)) : T(0);
  if (x != x) return 0;
  if (x >= end) return T(~least);
  return x <= (kSigned ? -end : 0.0) ? least : T(x);
}
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
// 20 bits of 1/x; subnormal numbers count as zero
inline double rough_reciprocal(double x) {
  if (std::fabs(x) < 0x1p-1022) return std::copysign(INFINITY, x);
  const double y = as_double(bits_of(1.0 / x) & 0xffffffff00000000);
  return std::fabs(y) < 0x1p-1022 ? std::copysign(0.0, x) : y;
}
inline float float_of_bfloat16(uint16_t bits) { return as_float(uint32_t(bits) << 16); }
inline uint16_t bfloat16_of(float x) {
  const uint32_t bits = bits_of(x);
  return x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float float_of_half(uint16_t bits) {
  _Float16 x;
  memcpy(&x, &bits, sizeof x);
  return float(x);
}
inline uint16_t half_of(float x) {
  const _Float16 narrow = _Float16(x);
  uint16_t bits;
  memcpy(&bits, &narrow, sizeof bits);
  return x != x ? 0x7fff : bits;
}

}  // namespace ptx
