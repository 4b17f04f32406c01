// The vector operations of a sharpness measurement on the CPU, in one parallel region over the chunks of all
// tensors. Compiled once per instruction set, like kernels.cpp, with internal linkage for the same reason.
// No mathematics here: vectors.h has it.
// SPDX-License-Identifier: Apache-2.0
#include "../vectors.h"

#include "blocks.h"
#include "kernels.h"

namespace fw {
namespace {

// elements that are worked on at a time: as many as all vectors of a warm measurement have room for in the
// first-level cache, so that adding up the lanes of a product counts for little
constexpr int kRun = 1024;
constexpr int kDotLanes = 64;

// the columns of one chunk from its start on; null where there is none
template <class C>
struct Streams {
  const Span& span;
  int64_t first;
  int32_t count;
  const C* basis;
  C* out;
  const C* scale;

  Streams(const Algebra& call, const Chunk& chunk)
      : span(at<Span>(call.spans)[chunk.row]),
        first(chunk.offset),
        count(chunk.count),
        basis(call.basis ? at<C>(call.basis) + span.offset + chunk.offset : nullptr),
        out(call.out ? at<C>(call.out) + span.offset + chunk.offset : nullptr),
        scale(call.scale ? at<C>(call.scale) + span.offset + chunk.offset : nullptr) {}

  int block(int32_t done) const { return count - done < kRun ? count - done : kRun; }
};

// the sum of products of two blocks: a lane adds 16 of them in the type of the vectors, whose elements are no
// better; the lanes fix the order
template <class C>
FW_LEAF double dot(const C* __restrict a, const C* __restrict b, int count) {
  C lanes[kDotLanes] = {};
  int whole = count - count % kDotLanes;
  for (int i = 0; i < whole; i += kDotLanes)
    for (int lane = 0; lane < kDotLanes; ++lane)
      lanes[lane] = multiply_add(a[i + lane], b[i + lane], lanes[lane]);
  for (int i = whole; i < count; ++i) lanes[i - whole] = multiply_add(a[i], b[i], lanes[i - whole]);
  double sums[kLanes] = {};
  for (int lane = 0; lane < kDotLanes; ++lane) sums[lane % kLanes] += static_cast<double>(lanes[lane]);
  double sum = 0.0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return sum;
}

template <class P, class C>
FW_LEAF void perturb_block(P* __restrict param, const P* __restrict value, const C* __restrict scale,
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

template <class C>
FW_LEAF void scale_block(C* __restrict out, const C* __restrict scale, int count) {
  for (int i = 0; i < count; ++i) out[i] *= scale[i];
}

template <class P, class C>
FW_LEAF void moved_block(C* __restrict out, const P* __restrict value, const C* __restrict scale,
                         const C* __restrict v, C size, int count) {
  for (int i = 0; i < count; ++i) out[i] = moved(value[i], size, scale ? scale[i] : C(1), v[i]);
}

template <class C>
FW_LEAF void axpy_block(C* __restrict out, C coefficient, const C* __restrict v, int count) {
  for (int i = 0; i < count; ++i) out[i] = multiply_add(coefficient, v[i], out[i]);
}

template <class C>
FW_LEAF void start_block(C* __restrict out, C keep, bool fresh, int count) {
  for (int i = 0; i < count; ++i) out[i] = fresh ? C(0) : keep * out[i];
}

template <class C>
FW_LEAF void product_block(C* __restrict out, const C* __restrict a, const C* __restrict b, int count) {
  for (int i = 0; i < count; ++i) out[i] = a[i] * b[i];
}

// a block of a gradient, zeros where there is none
template <class C>
const C* load_gradient(uint64_t column, const Span& span, int64_t offset, int count, C* scratch) {
  if (column) return load<C>(column, span.dtype, offset, count, scratch);
  for (int i = 0; i < count; ++i) scratch[i] = C(0);
  return scratch;
}

template <class P, class C>
struct Chunks {
  static void perturb(const Algebra& call, const Chunk& chunk, double*) {
    const Streams<C> s(call, chunk);
    const C size = static_cast<C>(*at<double>(call.factors));
    P* param = at<P>(s.span.param) + s.first;
    perturb_block(param, at<P>(s.span.snapshot) + s.first, s.scale, s.basis, size, s.count);
  }

  static void finish(const Algebra& call, const Chunk& chunk, double* sums) {
    const Streams<C> s(call, chunk);
    const C size = static_cast<C>(*at<double>(call.factors));
    const C* last = s.basis + (call.n_basis - 1) * call.stride;
    const P* values = at<P>(s.span.snapshot) + s.first;
    alignas(64) C plus_scratch[kRun], minus_scratch[kRun];
    for (int32_t done = 0; done < s.count; done += kRun) {
      const int count = s.block(done);
      C* out = s.out + done;
      const C* plus = load_gradient(s.span.plus, s.span, s.first + done, count, plus_scratch);
      const C* minus = load_gradient(s.span.minus, s.span, s.first + done, count, minus_scratch);
      difference_block(out, plus, minus, count);
      if (call.narrow) {
        alignas(64) C way[kRun];
        moved_block(way, values + done, s.scale ? s.scale + done : nullptr, last + done, size, count);
        sums[call.n_basis] += dot(way, way, count);
        sums[call.n_basis + 1] += dot(way, out, count);
      }
      if (s.scale) scale_block(out, s.scale + done, count);
      memcpy(at<P>(s.span.param) + s.first + done, values + done, count * sizeof(P));
      for (int i = 0; i < call.n_basis; ++i) sums[i] += dot(s.basis + i * call.stride + done, out, count);
    }
  }

  static void combine(const Algebra& call, const Chunk& chunk, double* sums) {
    const Streams<C> s(call, chunk);
    const double* factors = at<double>(call.factors);
    alignas(64) C scratch[kRun];
    for (int32_t done = 0; done < s.count; done += kRun) {
      const int count = s.block(done);
      C* out = s.out + done;
      start_block(out, static_cast<C>(factors[0]), call.fresh != 0, count);
      for (int i = 0; i < call.n_basis; ++i)
        axpy_block(out, static_cast<C>(factors[i + 1]), s.basis + i * call.stride + done, count);
      for (int i = 0; i < call.n_basis; ++i) sums[i] += dot(s.basis + i * call.stride + done, out, count);
      sums[call.n_basis] += dot(out, out, count);
      if (s.scale) {
        product_block(scratch, s.scale + done, out, count);
        sums[call.n_basis + 1] += dot(scratch, scratch, count);
      }
    }
  }
};

using ChunkFunction = void (*)(const Algebra&, const Chunk&, double*);

template <class P, class C>
ChunkFunction operation_on(int operation) {
  if (operation == kPerturb) return Chunks<P, C>::perturb;
  return operation == kFinish ? Chunks<P, C>::finish : Chunks<P, C>::combine;
}

template <class C>
ChunkFunction function_of(int operation, int32_t dtype) {
  // rows of float64 have vectors of float64
  if constexpr (sizeof(C) == sizeof(double))
    if (dtype == kFloat64) return operation_on<double, C>(operation);
  if (dtype == kBFloat16) return operation_on<BFloat16, C>(operation);
  if (dtype == kFloat16) return operation_on<Float16, C>(operation);
  return operation_on<float, C>(operation);
}

void run(const Algebra& call, int operation, int threads) {
  const Chunk* chunks = at<Chunk>(call.chunks);
  const int64_t width = sum_count(call);
  double* partials = at<double>(call.partials);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < call.n_chunks; ++i) {
    const int32_t dtype = at<Span>(call.spans)[chunks[i].row].dtype;
    double* sums = partials + i * width;
    if (operation != kPerturb)
      for (int64_t k = 0; k < width; ++k) sums[k] = 0.0;
    auto function =
        call.doubles ? function_of<double>(operation, dtype) : function_of<float>(operation, dtype);
    function(call, chunks[i], sums);
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
