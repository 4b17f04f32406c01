// The vector operations of a sharpness measurement on the CPU, in one parallel region over the chunks of all
// tensors. Compiled once per instruction set and with internal linkage, as step.cpp is.
// No mathematics here: vectors.h has it.
// SPDX-License-Identifier: Apache-2.0
#include "../vectors.h"

#if defined(FW_X86_64)
#include <immintrin.h>
#endif

#include <type_traits>

#include "blocks.h"
#include "step.h"

namespace fw {
namespace {

// elements that a loop takes at a time: each lane of a sum adds 16 of them in the type of the vectors, which
// is as accurate as they are, before the sum continues in double
constexpr int kRun = 256;
// basis vectors that one loop takes, as many as a warm start has; any more take loops of their own
constexpr int kHeld = 4;
constexpr int64_t kLine = 64;
// Vectors longer than this, in bytes, are written past the caches, which avoids reading cache lines that are
// written whole. perturb has four columns of this length; a last-level cache of 32 MiB does not hold them, so
// the lines written first would be evicted before they are read.
constexpr int64_t kCached = 8 << 20;

#if defined(FW_X86_64)
void line_past_caches(char* to, const char* from) {
#if defined(__AVX__)
  using Wide = __m256i;
  for (int64_t i = 0; i < kLine; i += sizeof(Wide))
    _mm256_stream_si256(reinterpret_cast<Wide*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const Wide*>(from + i)));
#else
  using Wide = __m128i;
  for (int64_t i = 0; i < kLine; i += sizeof(Wide))
    _mm_stream_si128(reinterpret_cast<Wide*>(to + i),
                     _mm_loadu_si128(reinterpret_cast<const Wide*>(from + i)));
#endif
}
// orders the stores past the caches before the reads of other threads
void finish_past_caches() { _mm_sfence(); }
#else
void line_past_caches(char* to, const char* from) { memcpy(to, from, kLine); }
void finish_past_caches() {}
#endif

// memcpy past the caches, except for cache lines that are not written whole
FW_LEAF void copy_past_caches(void* to, const void* from, int64_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  int64_t done = -reinterpret_cast<intptr_t>(out) & (kLine - 1);
  if (done > bytes) done = bytes;
  memcpy(out, in, done);
  for (; done + kLine <= bytes; done += kLine) line_past_caches(out + done, in + done);
  memcpy(out + done, in + done, bytes - done);
}

template <class T>
void copy(T* to, const T* from, int count, bool past_caches) {
  if (past_caches)
    copy_past_caches(to, from, count * sizeof(T));
  else
    memcpy(to, from, count * sizeof(T));
}

// pointers to the parameter and the vectors from the start of a chunk on; null for a vector that is not given
template <class C>
struct ChunkPointers {
  const TensorSlice& tensor;
  int64_t first;
  int32_t count;
  const C* basis;
  C* out;
  const C* scale;

  ChunkPointers(const VectorOp& call, const Chunk& chunk)
      : tensor(at<TensorSlice>(call.slices)[chunk.row]),
        first(chunk.offset),
        count(chunk.count),
        basis(call.basis ? at<C>(call.basis) + tensor.offset + chunk.offset : nullptr),
        out(call.out ? at<C>(call.out) + tensor.offset + chunk.offset : nullptr),
        scale(call.scale ? at<C>(call.scale) + tensor.offset + chunk.offset : nullptr) {}

  int block(int32_t done) const { return count - done < kRun ? count - done : kRun; }
};

// Adds to kSums sums over a block in one loop; the lanes fix the order of the sums. body(i, lane) adds
// element i to lane[0], lane[kLanes] and so on.
template <int kSums, class C, class Body>
FW_HOST_DEVICE void add_up(double* __restrict sums, int count, Body body) {
  C lanes[kSums * kLanes] = {};
  int whole = count - count % kLanes;
  for (int i = 0; i < whole; i += kLanes)
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) body(i + lane, lanes + lane);
  for (int i = whole; i < count; ++i) body(i, lanes + i - whole);
  for (int k = 0; k < kSums; ++k) {
    double sum = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(lanes[k * kLanes + lane]);
    sums[k] += sum;
  }
}

template <class C>
FW_HOST_DEVICE void add_product(C& sum, C a, C b) {
  sum = multiply_add(a, b, sum);
}

template <class C>
FW_LEAF void add_dot(double* sum, const C* __restrict a, const C* __restrict b, int count) {
  add_up<1, C>(sum, count, [=](int i, C* lane) { add_product(*lane, a[i], b[i]); });
}

// finish, with the products of its result with kBasis vectors
template <int kBasis, bool kScaled, class C>
FW_LEAF void finish_block(double* sums, C* __restrict out, const C* __restrict plus,
                          const C* __restrict minus, const C* __restrict scale, const C* __restrict basis,
                          int64_t stride, int count) {
  add_up<kBasis, C>(sums, count, [=](int i, C* lane) {
    C x = plus[i] - minus[i];
    if constexpr (kScaled) x *= scale[i];
    out[i] = x;
    for (int k = 0; k < kBasis; ++k) add_product(lane[k * kLanes], basis[k * stride + i], x);
  });
}

// combine of kBasis vectors, with the products of its result with them and the sums of squares
template <int kBasis, bool kScaled, class C>
FW_LEAF void combine_block(double* sums, C* __restrict out, C keep, const double* factors,
                           const C* __restrict scale, const C* __restrict basis, int64_t stride, int count) {
  C factor[kBasis + 1] = {};
  for (int k = 0; k < kBasis; ++k) factor[k] = static_cast<C>(factors[k]);
  add_up<kBasis + 1 + kScaled, C>(sums, count, [=](int i, C* lane) {
    C x = keep * out[i];
    for (int k = 0; k < kBasis; ++k) x = multiply_add(factor[k], basis[k * stride + i], x);
    out[i] = x;
    for (int k = 0; k < kBasis; ++k) add_product(lane[k * kLanes], basis[k * stride + i], x);
    add_product(lane[kBasis * kLanes], x, x);
    if constexpr (kScaled) {
      C y = scale[i] * x;
      add_product(lane[(kBasis + 1) * kLanes], y, y);
    }
  });
}

template <class P, class V, class C>
FW_LEAF void perturb_block(P* __restrict param, const V* __restrict value, const C* __restrict scale,
                           const C* __restrict v, C size, int count) {
  if (scale)
    for (int i = 0; i < count; ++i)
      param[i] = stored<P>(displaced(static_cast<C>(widen(value[i])), size, scale[i], v[i]));
  else
    for (int i = 0; i < count; ++i)
      param[i] = stored<P>(displaced(static_cast<C>(widen(value[i])), size, C(1), v[i]));
}

template <class C>
FW_LEAF void difference_block(C* __restrict out, const C* __restrict plus, const C* __restrict minus,
                              int count) {
  for (int i = 0; i < count; ++i) out[i] = plus[i] - minus[i];
}

template <class P, class V, class C>
FW_LEAF void moved_block(C* __restrict out, const V* __restrict value, const C* __restrict scale,
                         const C* __restrict v, C size, int count) {
  for (int i = 0; i < count; ++i)
    out[i] = moved<P>(static_cast<C>(widen(value[i])), size, scale ? scale[i] : C(1), v[i]);
}

template <class C>
FW_LEAF void axpy_block(C* __restrict out, C coefficient, const C* __restrict v, int count) {
  for (int i = 0; i < count; ++i) out[i] = multiply_add(coefficient, v[i], out[i]);
}

template <class C>
FW_LEAF void start_block(C* __restrict out, C keep, bool fresh, int count) {
  for (int i = 0; i < count; ++i) out[i] = fresh ? C(0) : keep * out[i];
}

// a block of a gradient; zeros if there is no gradient
template <class C>
const C* load_gradient(uint64_t column, const TensorSlice& tensor, int64_t offset, int count, C* scratch) {
  if (column) return load<C>(column, tensor.dtype, offset, count, scratch);
  for (int i = 0; i < count; ++i) scratch[i] = C(0);
  return scratch;
}

// calls body with a block of values: the snapshot, or what it is with the residue of its rounding mode
template <class P, class Body>
void with_values(const TensorSlice& tensor, int64_t offset, int count, Body body) {
  if constexpr (sizeof(P) == sizeof(BFloat16)) {
    if (has_residue(tensor.rounding)) {
      alignas(64) float scratch[kRun];
      Row row = {};
      row.param = tensor.snapshot;
      row.dtype = tensor.dtype;
      row.rounding = tensor.rounding;
      row.residue = tensor.residue;
      return body(load_param(row, offset, count, scratch));
    }
  }
  body(at<P>(tensor.snapshot) + offset);
}

// calls body with the number of basis vectors and the presence of a scale as compile-time constants
template <int kBasis = 0, class Body>
FW_HOST_DEVICE void with_constants(int held, bool scaled, Body body) {
  if constexpr (kBasis < kHeld)
    if (held > kBasis) return with_constants<kBasis + 1>(held, scaled, body);
  std::integral_constant<int, kBasis> basis;
  if (scaled)
    body(basis, std::true_type());
  else
    body(basis, std::false_type());
}

template <class P, class C>
struct Chunks {
  static void perturb(const VectorOp& call, const Chunk& chunk, double*, bool past_caches) {
    const ChunkPointers<C> s(call, chunk);
    const C size = static_cast<C>(*at<double>(call.factors));
    P* param = at<P>(s.tensor.param) + s.first;
    const P* snapshot = at<P>(s.tensor.snapshot) + s.first;
    if (!past_caches && !has_residue(s.tensor.rounding))
      return perturb_block(param, snapshot, s.scale, s.basis, size, s.count);
    alignas(64) P scratch[kRun];
    for (int32_t done = 0; done < s.count; done += kRun) {
      const int count = s.block(done);
      P* to = past_caches ? scratch : param + done;
      with_values<P>(s.tensor, s.first + done, count, [&](const auto* value) {
        perturb_block(to, value, s.scale ? s.scale + done : nullptr, s.basis + done, size, count);
      });
      if (past_caches) copy(param + done, scratch, count, true);
    }
  }

  static void finish(const VectorOp& call, const Chunk& chunk, double* sums, bool past_caches) {
    const ChunkPointers<C> s(call, chunk);
    const C size = static_cast<C>(*at<double>(call.factors));
    const int held = call.n_basis < kHeld ? call.n_basis : kHeld, before = call.n_basis - held;
    P* param = at<P>(s.tensor.param) + s.first;
    const P* snapshot = at<P>(s.tensor.snapshot) + s.first;
    alignas(64) C plus_scratch[kRun], minus_scratch[kRun], out_scratch[kRun];
    for (int32_t done = 0; done < s.count; done += kRun) {
      const int count = s.block(done);
      const C *scale = s.scale ? s.scale + done : nullptr, *basis = s.basis + done;
      C* out = past_caches ? out_scratch : s.out + done;
      const C* plus = load_gradient(s.tensor.plus, s.tensor, s.first + done, count, plus_scratch);
      const C* minus = load_gradient(s.tensor.minus, s.tensor, s.first + done, count, minus_scratch);
      if (call.narrow) {
        alignas(64) C way[kRun];
        difference_block(out, plus, minus, count);
        const C* last = basis + (call.n_basis - 1) * call.stride;
        with_values<P>(s.tensor, s.first + done, count,
                       [&](const auto* value) { moved_block<P>(way, value, scale, last, size, count); });
        add_dot(sums + call.n_basis, way, way, count);
        add_dot(sums + call.n_basis + 1, way, out, count);
      }
      with_constants(held, scale, [&](auto kBasis, auto kScaled) {
        finish_block<kBasis(), kScaled()>(sums + before, out, plus, minus, scale,
                                          basis + before * call.stride, call.stride, count);
      });
      for (int i = 0; i < before; ++i) add_dot(sums + i, basis + i * call.stride, out, count);
      if (past_caches) copy(s.out + done, out, count, true);
      copy(param + done, snapshot + done, count, past_caches);
    }
  }

  static void combine(const VectorOp& call, const Chunk& chunk, double* sums, bool) {
    const ChunkPointers<C> s(call, chunk);
    const double* factors = at<double>(call.factors);
    const int held = call.n_basis < kHeld ? call.n_basis : kHeld, before = call.n_basis - held;
    for (int32_t done = 0; done < s.count; done += kRun) {
      const int count = s.block(done);
      const C *scale = s.scale ? s.scale + done : nullptr, *basis = s.basis + done;
      C* out = s.out + done;
      C keep = static_cast<C>(factors[0]);
      if (call.fresh || before) {
        start_block(out, keep, call.fresh != 0, count);
        keep = C(1);
      }
      for (int i = 0; i < before; ++i)
        axpy_block(out, static_cast<C>(factors[i + 1]), basis + i * call.stride, count);
      with_constants(held, scale, [&](auto kBasis, auto kScaled) {
        combine_block<kBasis(), kScaled()>(sums + before, out, keep, factors + 1 + before, scale,
                                           basis + before * call.stride, call.stride, count);
      });
      for (int i = 0; i < before; ++i) add_dot(sums + i, basis + i * call.stride, out, count);
    }
  }
};

using ChunkFunction = void (*)(const VectorOp&, const Chunk&, double*, bool past_caches);

template <class P, class C>
ChunkFunction operation_on(int operation) {
  if (operation == kPerturb) return Chunks<P, C>::perturb;
  return operation == kFinish ? Chunks<P, C>::finish : Chunks<P, C>::combine;
}

template <class C>
ChunkFunction function_of(int operation, int32_t dtype) {
  // float64 tensors have float64 vectors
  if constexpr (sizeof(C) == sizeof(double))
    if (dtype == kFloat64) return operation_on<double, C>(operation);
  if (dtype == kBFloat16) return operation_on<BFloat16, C>(operation);
  if (dtype == kFloat16) return operation_on<Float16, C>(operation);
  return operation_on<float, C>(operation);
}

void run(const VectorOp& call, int operation, int threads) {
  const Chunk* chunks = at<Chunk>(call.chunks);
  const int64_t width = sum_count(call);
  double* partials = at<double>(call.partials);
  int64_t bytes = 0;
  for (int64_t i = 0; i < call.n_chunks; ++i)
    bytes += chunks[i].count * (call.doubles ? sizeof(double) : sizeof(float));
  const bool past_caches = bytes > kCached;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < call.n_chunks; ++i) {
      const int32_t dtype = at<TensorSlice>(call.slices)[chunks[i].row].dtype;
      double* sums = partials + i * width;
      if (operation != kPerturb)
        for (int64_t k = 0; k < width; ++k) sums[k] = 0.0;
      auto function =
          call.doubles ? function_of<double>(operation, dtype) : function_of<float>(operation, dtype);
      function(call, chunks[i], sums, past_caches);
    }
    finish_past_caches();
  }
  if (operation == kPerturb) return;
  double* sums = at<double>(call.sums);
  for (int64_t k = 0; k < width; ++k) {
    sums[k] = 0.0;
    for (int64_t i = 0; i < call.n_chunks; ++i) sums[k] += partials[i * width + k];
  }
}

}  // namespace

extern const VectorFunction FW_JOIN(vectors_, FW_ISA);
const VectorFunction FW_JOIN(vectors_, FW_ISA) = run;

}  // namespace fw
